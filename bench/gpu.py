"""Speed on a GPU beside torch.nn (cuDNN): `python -m fastrnn.bench.gpu`, a part of `./run gpu`.

Forward (inference) and training (forward, and backward to the parameters and the input) of one layer, in
microseconds a step, medians of alternating samples.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastrnn

SIZES, BATCHES, LENGTHS = (64, 128, 256, 512, 768, 1024, 2048), (1, 16, 64, 128), (256, 1024)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROUNDS, SAMPLE = 5, 0.01  # samples of each, and seconds that one should take
# Microseconds that a step of an LSTM's forward pass takes at least on an H100 SXM, in 16 bits: the latency of
# the exchange between multiprocessors, tensor cores' time, shared memory's and the cache's traffic.
LIMITS = {
    128: (0.5, 0.5, 0.5, 0.5),
    256: (0.56, 0.56, 0.57, 0.57),
    512: (0.69, 0.69, 0.92, 1.1),
    1024: (1.1, 1.1, 1.8, 2.7),
    2048: (1.7, 2.0, 4.7, 8.6),
}


@dataclass(frozen=True)
class Row:
    """ours, theirs: microseconds a step; limit: its least, where that is known; kernel: the forward pass's,
    with its tiles."""

    cell: str
    mode: str
    dtype: str
    T: int
    B: int
    H: int
    ours: float
    theirs: float
    spread: float
    limit: float | None
    kernel: str

    def text(self) -> str:
        limit = "" if self.limit is None else f"{self.limit / self.ours:8.0%}"
        return (
            f"{self.cell:5}{self.mode:9}{self.dtype:9}{self.T:6}{self.B:5}{self.H:6}{self.ours:10.2f}"
            f"{self.theirs:10.2f}{self.theirs / self.ours:8.2f}{limit:>8}  {self.kernel}"
        )


HEADER = "cell mode     type          T    B     H   ours us  cuDNN us   ratio   limit"


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, int, int, int]]:
    """(cell, dtype, T, B, H), what tells most first."""
    for T in args.steps or LENGTHS[: 1 if args.quick else None]:
        for dtype in args.dtype or DTYPES:
            for cell in args.cell or ("lstm", "gru", "rnn"):
                for H in args.hidden or SIZES:
                    for B in args.batch or BATCHES:
                        if not args.quick or (B in (1, 64) and H in (128, 512)):
                            yield cell, dtype, T, B, H


class Timer:
    """Seconds of calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def sample(self, call: Callable[[], Any], calls: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self.synchronize()
        return (time.perf_counter() - start) / calls

    def alternate(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float, float]:
        """Medians of both, and the spread of their ratio: its interquartile range over its median."""
        counts = []
        for call in (ours, theirs):
            call()  # compiles
            counts.append(max(1, round(SAMPLE / max(self.sample(call, 1), 1e-6))))
        pairs = [(self.sample(ours, counts[0]), self.sample(theirs, counts[1])) for _ in range(ROUNDS)]
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        return (
            statistics.median(a for a, _ in pairs),
            statistics.median(b for _, b in pairs),
            (high - low) / middle,
        )


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph: what the GPU takes for it, whatever the processor's speed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def calls(module: torch.nn.Module, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def forward() -> None:
        with torch.no_grad():
            module(x)

    def training() -> None:
        y = module(x)[0]
        torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))

    return {"forward": forward, "training": training}


def layer(package: Any, case: tuple[str, str, int, int, int], device: torch.device) -> torch.nn.Module:
    cell, dtype, _, _, H = case
    torch.manual_seed(0)
    return getattr(package, cell.upper())(H, H).to(device, DTYPES[dtype])


def sequence(case: tuple[str, str, int, int, int], device: torch.device) -> torch.Tensor:
    _, dtype, T, B, H = case
    return torch.randn(T, B, H, device=device, dtype=DTYPES[dtype], requires_grad=True)


def prepare(case: tuple[str, str, int, int, int], device: torch.device) -> None:
    """Runs a case once, for its kernels to lie compiled in Triton's cache."""
    with fastrnn.backend("triton"):
        for call in calls(layer(fastrnn, case, device), sequence(case, device)).values():
            call()
    Timer(device).synchronize()


def measure(case: tuple[str, str, int, int, int], device: torch.device, graphs: bool) -> list[Row]:
    cell, dtype, T, B, H = case
    modules = [layer(package, case, device) for package in (fastrnn, torch.nn)]
    x = sequence(case, device)
    ours, theirs = (calls(module, x) for module in modules)
    said = fastrnn.explain(modules[0], x)
    kernel = ", ".join(filter(None, (said.kernel, said.split)))
    rows = []
    for mode in ours:
        if graphs:
            ours[mode], theirs[mode] = captured(ours[mode]), captured(theirs[mode])
        mine, other, spread = Timer(device).alternate(ours[mode], theirs[mode])
        limit = None
        counted = cell == "lstm" and mode == "forward" and dtype != "float32" and H in LIMITS and B in BATCHES
        if counted and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
            limit = LIMITS[H][BATCHES.index(B)]
        rows.append(Row(cell, mode, dtype, T, B, H, mine / T * 1e6, other / T * 1e6, spread, limit, kernel))
    return rows


def machine(device: torch.device) -> dict[str, str | None]:
    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type != "cuda":
        return {"device": str(device), **found}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    drivers = []
    with contextlib.suppress(FileNotFoundError):  # a line for each GPU, all of the one driver
        drivers = subprocess.run(query, capture_output=True, text=True).stdout.split()
    import triton

    return {
        "device": torch.cuda.get_device_name(device),
        "driver": drivers[0] if drivers else "unknown",
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton.__version__,
        **found,
    }


def plot(rows: Sequence[Row], about: dict[str, str | None], path: Path) -> None:
    """torch.nn's time over ours against H, a line each batch, of the first type and length measured."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [row for row in rows if (row.dtype, row.T) == (rows[0].dtype, rows[0].T)]
    cells = list(dict.fromkeys(row.cell for row in shown))
    modes = list(dict.fromkeys(row.mode for row in shown))
    figure, axes = pyplot.subplots(
        len(modes),
        len(cells),
        figsize=(4 * len(cells), 3 * len(modes)),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for i, j in itertools.product(range(len(modes)), range(len(cells))):
        axis = axes[i][j]
        of_all = [row for row in shown if (row.mode, row.cell) == (modes[i], cells[j])]
        for B in dict.fromkeys(row.B for row in of_all):
            line = [(row.H, row.theirs / row.ours) for row in of_all if row.B == B]
            axis.plot(*zip(*line, strict=True), marker="o", label=f"B = {B}")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(
            title=f"{cells[j]}, {modes[i]}", xscale="log", yscale="log", xlabel="H", ylabel="times as fast"
        )
        axis.set_xticks([row.H for row in of_all], [str(row.H) for row in of_all], rotation=60)
        axis.xaxis.set_minor_locator(pyplot.NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(
        f"torch.nn's (cuDNN) time over ours: {shown[0].dtype}, T = {shown[0].T}, {about['device']}"
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn.bench.gpu", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, two batches, one length")
    parser.add_argument("--backend", default="auto", help="fastrnn's (auto)")
    parser.add_argument("--cell", nargs="+", choices=("lstm", "gru", "rnn"))
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES))
    for name, what in (("steps", "T"), ("batch", "B"), ("hidden", "H")):
        parser.add_argument(f"--{name}", nargs="+", type=int, metavar=what)
    parser.add_argument("--minutes", type=float, default=60, help="leave out what does not fit")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="processes that compile the kernels, before any timing",
    )
    parser.add_argument(
        "--graphs", action="store_true", help="both as CUDA graphs: without what the processor takes"
    )
    parser.add_argument("--json", type=Path, default=Path("out/gpu.json"), metavar="PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="a picture of the ratios (matplotlib)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    if args.device.type == "cuda" and args.device.index is not None:
        torch.cuda.set_device(args.device)  # whose streams and graphs are torch's current ones
    about = machine(args.device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    chosen = list(cases(args))
    if args.device.type != "cpu" and args.jobs > 1 and args.backend == "triton":
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
            # One length: kernels do not depend on it.
            first = [case for case in chosen if case[2] == chosen[0][2]]
            list(pool.map(prepare, first, itertools.repeat(args.device)))
    print(HEADER)
    rows: list[Row] = []
    failed: list[str] = []
    left = 0
    for case in chosen:
        if time.monotonic() > end:
            left += 1
            continue
        try:
            with fastrnn.backend(args.backend):
                measured = measure(case, args.device, args.graphs)
        except Exception as error:  # whatever it is: a GPU is rare, and the other rows are not lost
            failed.append(f"{case}: {type(error).__name__}: {error}")
            print(f"not measured: {failed[-1]}", flush=True)
            continue
        for row in measured:
            print(row.text(), flush=True)
            rows.append(row)
    if left:
        print(f"{left} cases left out after {args.minutes:g} minutes")
    for mode in ("forward", "training"):
        ratios = [row.theirs / row.ours for row in rows if row.mode == mode]
        if ratios:
            print(
                f"{mode}: geometric mean of torch.nn's time over ours {statistics.geometric_mean(ratios):.2f}"
            )
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(
        json.dumps(
            {
                "machine": about,
                "graphs": args.graphs,
                "rows": [asdict(row) for row in rows],
                "failed": failed,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"written: {args.json}")
    if args.plot and rows:
        plot(rows, about, args.plot)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())

"""What a run of the benchmarks tells: a table, a JSON file and a plot."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn.bench.grid import GATES, Shape, flop


@dataclass
class Record:
    """One cell, mode and shape: medians in seconds over alternating rounds."""

    cell: str
    mode: str
    shape: Shape
    rounds: int
    ours: float
    rivals: dict[str, float]

    @property
    def gflops(self) -> float:
        return flop(self.cell, self.shape, self.mode) / self.ours / 1e9

    def ratio(self, rival: str) -> float:
        return self.rivals[rival] / self.ours


@dataclass
class Settings:
    """What was asked for, and what the tests found."""

    quick: bool = False
    cells: tuple[str, ...] = tuple(GATES)
    records: list[Record] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The time to spend on one cell, mode and shape."""
        return 0.5 if self.quick else 2.0

    @property
    def min_rounds(self) -> int:
        return 7 if self.quick else 11


SETTINGS = pytest.StashKey[Settings]()


class CpuClock:
    """Who had the machine's CPU time since construction: the hypervisor's other guests, other processes."""

    def __init__(self) -> None:
        self.start, self.own_start = self.read(), time.process_time()

    @staticmethod
    def read() -> list[int]:
        """User, nice, system, idle, iowait, irq, softirq, steal: ticks of all CPUs."""
        try:
            return [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return [0] * 8

    def shares(self) -> tuple[float, float]:
        """(stolen, taken by other processes), of all the CPU time there was."""
        spent = [b - a for a, b in zip(self.start, self.read(), strict=True)]
        total = max(1, sum(spent))
        busy = total - spent[3] - spent[4] - spent[7]
        own = (time.process_time() - self.own_start) * os.sysconf("SC_CLK_TCK")
        return spent[7] / total, max(0.0, busy - own) / total


def measured_peak() -> float:
    """GFLOP/s of the best of ten float32 products of 2048 x 2048, with the threads in force."""
    n = 2048
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b, out=c)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine(clock: CpuClock, peak: float) -> dict[str, Any]:
    steal, others = clock.shares()
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastrnn": fastrnn.__version__,
        "peak_gflops": round(peak, 1),
        "load_average": [round(n, 2) for n in os.getloadavg()],
        "steal": round(steal, 4),
        "other_processes": round(others, 4),
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def rival_names(records: list[Record]) -> list[str]:
    return sorted({name for r in records for name in r.rivals}, key=lambda name: name != "torch.nn")


def means(records: list[Record]) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios: {"lstm forward": {"torch.nn": 1.7}}."""
    groups: dict[str, dict[str, float]] = {}
    for cell, mode in dict.fromkeys((r.cell, r.mode) for r in records):
        group = [r for r in records if (r.cell, r.mode) == (cell, mode)]
        groups[f"{cell} {mode}"] = {
            name: geometric_mean([r.ratio(name) for r in group if name in r.rivals])
            for name in rival_names(group)
        }
    return groups


def table(records: list[Record], peak: float) -> str:
    rivals = rival_names(records)
    head = f"{'cell':5}{'mode':10}{'T':>5}{'B':>4}{'I':>6}{'H':>6}{'rounds':>8}"
    head += f"{'ours ms':>10}{'GFLOP/s':>9}{'of peak':>9}"
    lines = [head + "".join(f"{name + ' ms':>16}{'ratio':>7}" for name in rivals)]
    for r in sorted(records, key=lambda r: (list(GATES).index(r.cell), r.mode)):
        s = r.shape
        line = f"{r.cell:5}{r.mode:10}{s.T:5}{s.B:4}{s.I:6}{s.H:6}{r.rounds:8}{r.ours * 1e3:10.3f}"
        line += f"{r.gflops:9.1f}{r.gflops / peak:9.1%}"
        for name in rivals:
            line += (
                f"{r.rivals[name] * 1e3:16.3f}{r.ratio(name):7.2f}"
                if name in r.rivals
                else f"{'-':>16}{'-':>7}"
            )
        lines.append(line)
    lines.append("geometric means of the ratios (rival's time / ours, above 1 is faster):")
    for group, by_rival in means(records).items():
        lines.append(f"  {group:15}" + "   ".join(f"{name} {mean:.2f}" for name, mean in by_rival.items()))
    return "\n".join(lines)


def disturbed(about: dict[str, Any]) -> bool:
    """With a neighbour on one core torch's spinning threads have been seen to take 1000 times as long."""
    return bool(about["steal"] + about["other_processes"] > 0.1)


def describe(about: dict[str, Any]) -> str:
    text = (
        f"{about['cpu']}, {about['cpus']} CPUs, {about['threads']} threads, torch {about['torch']}\n"
        "float32, medians of alternating rounds\n"
        f"peak {about['peak_gflops']} GFLOP/s: the best torch.mm of 2048 x 2048 in this process\n"
        f"load average {about['load_average']}, CPU steal {about['steal']:.1%}, "
        f"other processes had {about['other_processes']:.1%} of the CPU time"
    )
    if disturbed(about):
        text += "\nWARNING: the machine was busy with other things: these figures prove nothing, run again"
    return text


def write_json(path: Path, records: list[Record], about: dict[str, Any]) -> None:
    rows = [
        {
            **{"cell": r.cell, "mode": r.mode, "rounds": r.rounds, "gflops": r.gflops},
            **{name: getattr(r.shape, name) for name in "TBIH"},
            "seconds": {"fastrnn": r.ours, **r.rivals},
        }
        for r in records
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": about, "geometric_means": means(records), "results": rows}, indent=1)
    )


def write_plot(path: Path, records: list[Record], about: dict[str, Any]) -> None:
    """Bars of torch.nn's time over ours, one panel a mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = list(dict.fromkeys(r.mode for r in records))
    cells = list(dict.fromkeys(r.cell for r in records))
    shapes = list(dict.fromkeys(r.shape for r in records))
    figure, axes = pyplot.subplots(
        len(modes), squeeze=False, figsize=(10, 3.5 * len(modes)), layout="constrained"
    )
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        for k, cell in enumerate(cells):
            chosen = [r for r in records if (r.cell, r.mode) == (cell, mode)]
            places = [shapes.index(r.shape) + (k - (len(cells) - 1) / 2) * 0.25 for r in chosen]
            axis.bar(places, [r.ratio("torch.nn") for r in chosen], width=0.25, label=cell)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(shapes)), [f"T{s.T} B{s.B}\nH{s.H}" for s in shapes])
        axis.set_ylabel(f"{mode}: torch.nn's time / ours")
        axis.legend()
    warning = (
        "\nThe machine was busy with other things: these figures prove nothing" if disturbed(about) else ""
    )
    figure.suptitle(
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}{warning}", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

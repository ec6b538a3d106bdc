"""Speed beside torch.nn and onnxruntime: `python -m fastrnn bench`. Never imported by `import fastrnn`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from fastrnn.lm.checkpoint import check_writable
from fastrnn.lm.errors import Parser, UserError


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m fastrnn bench", description=__doc__, allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="three shapes, few rounds")
    p.add_argument(
        "--cell", action="append", choices=["lstm", "gru", "rnn"], help="may be given more than once"
    )
    p.add_argument("--threads", type=int, help="threads of torch and of the rivals")
    p.add_argument("--json", type=Path, default=Path("out/bench.json"), metavar="PATH")
    p.add_argument("--plot", type=Path, default=Path("out/bench.png"), metavar="PATH")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the grid and reports; returns the exit code."""
    args = parser().parse_args(argv)
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise UserError(f"bench needs {', '.join(missing)}: pip install 'fastrnn[bench]'")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be at least 1, got {args.threads}")
    for path in (args.json, args.plot):
        check_writable(str(path))
    import pytest

    from fastrnn.bench import report, rivals

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = report.Settings(args.quick, tuple(args.cell or report.GATES))

    class Plugin:
        @staticmethod
        def pytest_configure(config: pytest.Config) -> None:
            config.stash[report.SETTINGS] = settings

    note = rivals.why_no_onnxruntime()
    clock = report.CpuClock()
    peak = report.measured_peak()
    here = Path(__file__).resolve().parent
    options = ["-c", os.devnull, "--rootdir", str(here), "-p", "no:cacheprovider"]
    code = pytest.main(
        [str(here / "test_speed.py"), "-q", "--benchmark-columns=median,iqr,rounds", *options], [Plugin()]
    )
    if not settings.records:
        return int(code)
    about = report.machine(clock, peak)
    print(f"\n{report.describe(about)}\n{report.table(settings.records, peak)}")
    if note:
        print(note)
    report.write_json(args.json, settings.records, about)
    print(f"wrote {args.json}")
    if find_spec("matplotlib"):
        report.write_plot(args.plot, settings.records, about)
        print(f"wrote {args.plot}")
    else:
        print("no plot: matplotlib is not installed")
    return int(code)

"""Speed beside torch.nn and onnxruntime: `python -m fastrnn bench`. Never imported by `import fastrnn`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastrnn.lm.checkpoint import check_writable
from fastrnn.lm.errors import Parser, UserError

if TYPE_CHECKING:
    from fastrnn.bench.records import Settings

SECTIONS = ("memory", "crowded", "scaling")  # of sections.py, which needs pytest


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m fastrnn bench", description=__doc__, allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="three shapes and a streaming step, few rounds")
    p.add_argument(
        "--cell", action="append", choices=["lstm", "gru", "rnn"], help="may be given more than once"
    )
    p.add_argument("--threads", type=int, help="threads of torch and of the rivals")
    p.add_argument(
        "--skip",
        action="append",
        choices=SECTIONS,
        default=[],
        help="a section after the rows: peak memory, a neighbour on every core, one thread beside two",
    )
    p.add_argument("--compare", type=Path, metavar="EARLIER.json", help="say what changed beyond the noise")
    p.add_argument("--json", type=Path, default=Path("out/bench.json"), metavar="PATH")
    p.add_argument("--plot", type=Path, default=Path("out/bench.png"), metavar="PATH")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the grid and reports; returns the exit code, which the goals do not touch."""
    args = parser().parse_args(argv)
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise UserError(f"bench needs {', '.join(missing)}: pip install 'fastrnn[bench]'")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be at least 1, got {args.threads}")
    for path in (args.json, args.plot):
        check_writable(str(path))
    from fastrnn.bench import compare, goals, grid, machine, records, report, rivals, sections

    # Read before --json, which may be the same file, is written.
    earlier = records.read_json(args.compare) if args.compare else None
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = records.Settings(args.quick, tuple(args.cell or grid.GATES))

    product, fma = machine.product_peak(), machine.fma_peak()
    clock = machine.CpuClock()
    code = measure_rows(settings)
    if not settings.records:
        return code
    about = machine.about(clock.read(), product, fma)
    wanted = [name for name in SECTIONS if name not in args.skip and not args.quick]
    probes, failed = sections.measure(wanted, settings.cells)
    outcomes = goals.evaluate(settings.records, probes, fma)

    parts = [report.describe(about), report.table(settings.records, about["peak_gflops"])]
    parts += [sections.table(probes), *failed, rivals.why_no_onnxruntime()]
    if earlier:
        parts.append(compare.compare(*earlier, settings.records, about))
    parts.append(goals.report(outcomes))
    print("", *filter(None, parts), sep="\n")
    records.write_json(args.json, settings.records, about, probes, goals.as_json(outcomes))
    print(f"wrote {args.json}")
    if find_spec("matplotlib"):
        report.write_plot(args.plot, settings.records, about)
        print(f"wrote {args.plot}")
    else:
        print("no plot: matplotlib is not installed")
    return code or int(bool(failed))


def measure_rows(settings: Settings) -> int:
    """Fills settings.records; returns pytest's exit code."""
    import pytest

    from fastrnn.bench.records import SETTINGS

    class Plugin:
        @staticmethod
        def pytest_configure(config: pytest.Config) -> None:
            config.stash[SETTINGS] = settings

    here = Path(__file__).resolve().parent
    options = ["-c", os.devnull, "--rootdir", str(here), "-p", "no:cacheprovider"]
    options += ["-q", "--benchmark-columns=median,iqr,rounds"]
    return int(pytest.main([str(here / "test_speed.py"), *options], [Plugin()]))

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
    from fastrnn.bench.grid import Case
    from fastrnn.bench.records import Run


def parser() -> argparse.ArgumentParser:
    from fastrnn.bench.sections import SECTIONS  # not above: it runs `python -m fastrnn.bench.memory`

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
        help="a section after the rows: peak memory, a neighbour on every core, one thread beside two, a "
        "decoder with attention, attention alone, recursive cells",
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
        raise UserError(f"bench needs {', '.join(missing)}: in fastrnn's clone, pip install -e '.[bench]'")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be at least 1, got {args.threads}")
    for path in (args.json, args.plot):
        check_writable(str(path))
    from fastrnn.bench import compare, goals, grid, limits, machine, records, report, rivals, sections

    # Read before --json, which may be the same file, is written.
    earlier = records.read_json(args.compare) if args.compare else None
    if args.threads:
        torch.set_num_threads(args.threads)
    cells = tuple(args.cell or grid.GATES)
    cases = [case for case in (grid.quick_rows() if args.quick else grid.rows()) if case.cell in cells]
    run = records.Run(0.5, 7) if args.quick else records.Run(1.5, 11, 0.02)

    clock = machine.CpuClock()
    product, called = machine.product_peak(), (machine.least_calls(), machine.least_layers())
    peaks = limits.measure(torch.get_num_threads(), *called)
    code = measure_rows(cases, run)
    if not run.records:
        return code
    about = machine.about(clock.read(), product, peaks)
    wanted = [name for name in sections.SECTIONS if name not in args.skip and not args.quick]
    probes, failed = sections.measure(wanted, cells)
    outcomes = goals.evaluate(run.records, probes, peaks)

    parts = [report.describe(about, peaks), report.table(run.records, peaks)]
    parts += [sections.table(probes), *failed, rivals.why_no_onnxruntime()]
    if earlier:
        parts.append(compare.compare(*earlier, [*run.records, *probes], about))
    parts.append(goals.report(outcomes))
    print("", *filter(None, parts), sep="\n")
    records.write_json(args.json, run.records, about, probes, goals.as_json(outcomes))
    print(f"wrote {args.json}")
    if find_spec("matplotlib"):
        report.write_plot(args.plot, run.records, about)
        print(f"wrote {args.plot}")
    else:
        print("no plot: matplotlib is not installed")
    return code or int(bool(failed))


def measure_rows(cases: list[Case], run: Run) -> int:
    """Fills run.records; returns pytest's exit code. KeyboardInterrupt where Ctrl-C was pressed meanwhile."""
    import pytest

    class Plugin:
        @staticmethod
        def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
            metafunc.parametrize("case", cases, ids=lambda case: case.id)

        @staticmethod
        @pytest.hookimpl(tryfirst=True)
        def pytest_benchmark_group_stats() -> list[None]:
            """No table of pytest-benchmark's: the report has one."""
            return []

        @pytest.fixture(name="run")
        def the_run(self) -> Run:
            return run

    here = Path(__file__).resolve().parent
    options = ["-c", os.devnull, "--rootdir", str(here), "-p", "no:cacheprovider"]
    code = pytest.main([str(here / "test_speed.py"), "-q", *options], [Plugin()])
    if code == pytest.ExitCode.INTERRUPTED:  # Ctrl-C, which pytest keeps to itself
        raise KeyboardInterrupt
    return int(code)

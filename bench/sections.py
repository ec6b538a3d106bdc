"""What the report measures beside the rows: a crowded machine, and one thread beside two."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product

import torch

from fastrnn.bench import memory, rivals
from fastrnn.bench.grid import MODES, SHAPES, Case
from fastrnn.bench.machine import CpuClock
from fastrnn.bench.records import Probe

SECONDS = 1.5  # for one figure
# A barrier a step, and a shape whose batch can be split.
CROWDED = (SHAPES[1], SHAPES[5])
SCALING = SHAPES[5]
# It ends by itself where the benchmark was killed.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**5): pass"


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that compute all the time."""
    started = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(count)]
    try:
        time.sleep(0.3)  # they start
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def median_seconds(call: rivals.Call, seconds: float, most: int = 200) -> float:
    """The median over as many calls as fit, at least three unless one takes longer than all that time."""
    samples = [rivals.timed(call)]
    while len(samples) < most and sum(samples) < seconds * (1 if len(samples) >= 3 else 3):
        samples.append(rivals.timed(call))
    return statistics.median(samples)


def both(case: Case) -> tuple[rivals.Call, rivals.Call]:
    """Our call and torch.nn's, warmed up and compared."""
    calls = rivals.calls(case)
    rivals.check(case, calls)
    return calls["fastrnn"], calls[rivals.TORCH]


def crowded(cells: tuple[str, ...], seconds: float = SECONDS) -> list[Probe]:
    """How many times as long a forward call takes with one busy neighbour process per core."""
    probes = []
    for case in (Case(cell, "forward", shape) for cell, shape in product(cells, CROWDED)):
        pair = both(case)
        clock = CpuClock()
        quiet = [median_seconds(call, seconds / 3) for call in pair]
        conditions = clock.read()  # of the quiet half: the other is crowded on purpose
        with neighbours(os.cpu_count() or 1):
            loaded = [median_seconds(call, seconds) for call in pair]
        ours, theirs = (slow / fast for slow, fast in zip(loaded, quiet, strict=True))
        probes.append(Probe("crowded", case, ours, theirs, conditions))
    return probes


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scaling(cells: tuple[str, ...], rounds: int = 5) -> list[Probe]:
    """How many times as fast two threads are as one; nothing where there is one alone."""
    if min(torch.get_num_threads(), os.cpu_count() or 1) < 2:
        return []
    probes = []
    for case in (Case(cell, mode, SCALING) for cell, mode in product(cells, MODES)):
        pair = both(case)
        clock = CpuClock()
        gains = []
        for call in pair:
            seconds: dict[int, list[float]] = {1: [], 2: []}
            for count in [1, 2] * rounds:
                with threads(count):
                    call()  # the team is made anew
                    seconds[count].append(rivals.timed(call))
            gains.append(statistics.median(seconds[1]) / statistics.median(seconds[2]))
        probes.append(Probe("scaling", case, gains[0], gains[1], clock.read()))
    return probes


SECTIONS = {"memory": memory.measure, "crowded": crowded, "scaling": scaling}
UNITS = {
    "memory": ("peak memory of a call, MiB", 2**20),
    "crowded": ("a call's time with one busy neighbour process per core, over its quiet time", 1),
    "scaling": ("speed on two threads over that on one", 1),
}


def measure(names: list[str], cells: tuple[str, ...]) -> tuple[list[Probe], list[str]]:
    """The sections' figures, and a line for each section that failed: the rows before it are not lost."""
    probes, failed = [], []
    for name in names:
        print(f"measuring: {name}", flush=True)
        try:
            probes += SECTIONS[name](cells)
        except (RuntimeError, AssertionError) as error:
            failed.append(f"{name} was not measured: {error}")
    return probes, failed


def table(probes: list[Probe]) -> str:
    """Each section's figures, ours and torch.nn's."""
    lines = []
    for section in dict.fromkeys(p.section for p in probes):
        title, unit = UNITS[section]
        lines.append(f"{title}:")
        for p in (p for p in probes if p.section == section):
            line = f"  {p.case.id:36}ours {p.ours / unit:9.2f}   torch.nn {p.theirs / unit:9.2f}"
            line += f"   ratio {p.ours / p.theirs:.2f}" * (section == "memory")
            lines.append(line + p.conditions.text())
    return "\n".join(lines)

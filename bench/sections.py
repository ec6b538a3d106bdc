"""What the report measures beside the rows: peak memory, a crowded machine, one thread beside two, and
the decoder and attention."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from fastrnn.bench import attention, memory, rivals, trees
from fastrnn.bench.grid import LARGE, MODES, SMALL, WIDE, Case
from fastrnn.bench.machine import CpuClock
from fastrnn.bench.records import Probe, median_error, standard_error

SECONDS = 3.0  # for one figure of ours and one of torch.nn's
# A barrier a step, in short steps and long ones, and a shape whose batch can be split.
CROWDED, SCALING = (SMALL, WIDE, LARGE), LARGE
# torch.nn gained 1.4 to 2.1 there on two cores; 1.0 in a probe whose threads had shared one.
LEAST_GAIN, TRIES = 1.2, 3
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


def both(case: Case) -> dict[str, rivals.Call]:
    """Our call and torch.nn's, warmed up and compared. Nobody else's threads are there to spin."""
    calls = rivals.calls(case, onnx=False)
    wrong = rivals.check(case, calls)
    assert not wrong
    return calls


def medians(samples: dict[Any, list[float]]) -> dict[Any, float]:
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


def crowded(cells: tuple[str, ...], seconds: float = SECONDS) -> list[Probe]:
    """How many times as long a call takes with one busy neighbour process per core."""
    probes = []
    for case in (Case(*row) for row in product(cells, MODES, CROWDED)):
        calls = both(case)
        clock = CpuClock()
        quiet = rivals.alternate(calls, seconds / 3)
        conditions = clock.read()  # of the quiet part: the other is crowded on purpose
        with neighbours(os.cpu_count() or 1):
            loaded = rivals.alternate(calls, seconds)
        then, now = medians(quiet), medians(loaded)
        times = (now[name] / then[name] for name in (rivals.OURS, rivals.TORCH))
        error = math.hypot(*(median_error(samples[rivals.OURS]) for samples in (quiet, loaded)))
        probes.append(Probe("crowded", case, *times, conditions, error))
    return probes


class Incomplete(RuntimeError):
    """What a section could measure, and in words what it could not."""

    def __init__(self, text: str, probes: list[Probe]) -> None:
        super().__init__(text)
        self.probes = probes


def one_beside_two(case: Case, seconds: float) -> Probe:
    """How many times as fast two threads are as one, ours and torch.nn's."""
    calls, threads = both(case), torch.get_num_threads()

    def prepare(run: tuple[str, int]) -> None:
        name, count = run
        torch.set_num_threads(count)
        # The team is made anew, and for a while its threads may share a core.
        rivals.settle(calls[name])

    clock = CpuClock()
    try:
        runs = {(name, count): call for name, call in calls.items() for count in (1, 2)}
        samples = rivals.alternate(runs, seconds, prepare)
    finally:
        torch.set_num_threads(threads)
    took, error = medians(samples), standard_error(samples[rivals.OURS, 1], samples[rivals.OURS, 2])
    gains = (took[name, 1] / took[name, 2] for name in (rivals.OURS, rivals.TORCH))
    return Probe("scaling", case, *gains, clock.read(), error)


def scaling(cells: tuple[str, ...], seconds: float = 2 * SECONDS) -> list[Probe]:
    """How many times as fast two threads are as one; nothing where there is one alone.

    A probe in which torch.nn gains nothing says that there was no second core, and is taken again. Raises
    Incomplete where that stays so.
    """
    if min(torch.get_num_threads(), os.cpu_count() or 1) < 2:
        return []
    probes, rejected = [], []
    for case in (Case(cell, mode, SCALING) for cell, mode in product(cells, MODES)):
        for _ in range(TRIES):
            probe = one_beside_two(case, seconds)
            if probe.theirs >= LEAST_GAIN:
                probes.append(probe)
                break
        else:
            rejected.append(f"{case.id} (torch.nn's {probe.theirs:.2f})")
    if rejected:
        text = (
            f"on two threads torch.nn gained less than {LEAST_GAIN} in {TRIES} tries of {', '.join(rejected)}"
        )
        raise Incomplete(text, probes)
    return probes


SECTIONS = {
    "memory": memory.measure,
    "crowded": crowded,
    "scaling": scaling,
    "decoder": attention.decoder,
    "attention": attention.attention,
    "trees": trees.measure,
}
UNITS = {
    "memory": ("peak memory of a call, MiB", 2**20),
    "crowded": ("a call's time with one busy neighbour process per core, over its quiet time", 1),
    "scaling": ("speed on two threads over that on one", 1),
    "decoder": ("a decoder with attention and a loop over torch.nn's cells, ms a call", 1e-3),
    "attention": ("attention and scaled_dot_product_attention, ms a call", 1e-3),
    "trees": ("recursive cells: speed over that of a Python recursion over torch.nn modules", 1),
}


def measure(names: list[str], cells: tuple[str, ...]) -> tuple[list[Probe], list[str]]:
    """The sections' figures, and a line for each section that failed: the rows before it are not lost."""
    probes, failed = [], []
    for name in names:
        print(f"measuring: {name}", flush=True)
        try:
            probes += SECTIONS[name](cells)
        except Incomplete as error:
            probes += error.probes
            failed.append(f"{name} was measured in part: {error}")
        except Exception as error:  # a lack of memory or of a file loses no rows either
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
            line += f"   ratio {p.figure:.2f}" * (section == "memory")
            line += f"   times as fast {p.figure:.2f}" * (section in ("decoder", "attention"))
            lines.append(line + p.conditions.text())
    return "\n".join(lines)

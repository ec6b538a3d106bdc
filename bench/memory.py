"""Peak memory of one call, ours beside torch.nn's, each in a process of its own:
`python -m fastrnn.bench.memory PACKAGE CELL MODE T B I H KIND` prints bytes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import nn

import fastrnn
from fastrnn.bench import rivals
from fastrnn.bench.grid import MODES, Case, Shape
from fastrnn.bench.records import Probe

SHAPE = Shape(1000, 32, 512, 512)
TINY = Shape(2, 1, 4, 4)
KINDS = ("plain", "batch first")
PACKAGES = {rivals.OURS: fastrnn, rivals.TORCH: nn}
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kilobytes(status: str, name: str) -> int:
    """A field of /proc/self/status; raises ValueError where it is missing."""
    for line in status.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise ValueError(f"/proc/self/status has no {name}")


def growth(before: str, after: str) -> int:
    """Bytes that the peak (VmHWM) after a call lies above what was in memory (VmRSS) before it."""
    return 1024 * max(0, kilobytes(after, "VmHWM") - kilobytes(before, "VmRSS"))


def peak_bytes(package: str, case: Case) -> int:
    """Of one call in this process; weights and input are there before it, the output counts.

    A tiny layer of the same kind runs first, so that loading code and starting threads do not count. Where
    the system does not let the peak be reset, an earlier, higher one would be found: there is none here.
    """

    def prepared(case: Case) -> rivals.Pass:
        dtype = rivals.dtype(case)
        return rivals.Pass(case, rivals.layer(PACKAGES[package], case, dtype), dtype)

    prepared(replace(case, shape=TINY))()
    call = prepared(case)
    before = STATUS.read_text()
    with contextlib.suppress(OSError):
        RESET.write_text("5")
    y = call()  # kept, as a caller keeps it
    after = STATUS.read_text()
    del y
    return growth(before, after)


def in_a_process(package: str, case: Case) -> int:
    """peak_bytes in a fresh process with the threads in force here. Raises RuntimeError where that fails."""
    s = case.shape
    words = [package, case.cell, case.mode, *map(str, (s.T, s.B, s.I, s.H)), case.kind]
    threads = str(torch.get_num_threads())
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS=threads)
    command = [sys.executable, "-m", "fastrnn.bench.memory", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory of {package} {case.id} could not be measured:\n{done.stderr}")
    return int(done.stdout)


def measure(cells: tuple[str, ...], shape: Shape = SHAPE) -> list[Probe]:
    """Every cell, forward and in training, of both kinds; nothing where the system has no /proc."""
    if not STATUS.exists():
        return []
    cases = [Case(*row) for row in product(cells, MODES, [shape], KINDS)]
    return [Probe("memory", case, *(in_a_process(package, case) for package in PACKAGES)) for case in cases]


if __name__ == "__main__":
    package, cell, mode, *sizes, kind = sys.argv[1:]
    print(peak_bytes(package, Case(cell, mode, Shape(*map(int, sizes)), kind)))

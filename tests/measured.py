"""Rows and a machine's peaks, made up, for the tests of the benchmarks."""

from __future__ import annotations

import dataclasses

from fastrnn.bench import grid, limits
from fastrnn.bench.machine import Conditions
from fastrnn.bench.records import Record

CASE = grid.Case("lstm", "forward", grid.SMALL)
SWEEPS = [(1 << 10, 400.0), (1 << 20, 200.0)]
PEAKS = limits.Peaks(
    2,
    {"float32": 100.0, "bfloat16": 1000.0},
    read=SWEEPS,
    dot=SWEEPS,
    activations={"float32": 10.0, "bfloat16": 20.0},
    copy=50.0,
    meet=1e-6,
    wake=2e-6,
    call={"forward": 5e-6, "step": 3e-6, "training": 4e-5},
    ours={"lstm step": 9e-6},
)
FREE = dataclasses.replace(  # but for the products
    PEAKS, activations=dict.fromkeys(PEAKS.activations, 1e9), copy=1e9, meet=0.0, wake=0.0, call={}
)
MACHINE = {"cpu": "a CPU", "cpus": 2, "threads": 2, "torch": "2.13.0", "unquiet": False}
NOISY = Conditions(3.0, 0.0, 0.5)


def record(ratio=2.0, case=CASE, error=0.005, **more):
    rivals = {"torch.nn": ratio * 1e-3}
    return Record(case, 11, 1e-3, rivals, {"torch.nn": 4 * error}, {"torch.nn": error}, **more)

"""A machine's peaks, made up, for the tests of the benchmarks, which skip where fastrnn.bench is missing."""

from __future__ import annotations

import dataclasses

from fastrnn.bench import grid, limits

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

"""One benchmark per cell, shape and mode: ours alternates with every rival, round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastrnn
from fastrnn.bench import rivals
from fastrnn.bench.grid import GRID, MODES, QUICK, Shape
from fastrnn.bench.report import SETTINGS, Record, Settings


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.stash.get(SETTINGS, Settings())
    metafunc.parametrize("shape", QUICK if settings.quick else GRID, ids=lambda shape: shape.id)
    metafunc.parametrize("mode", MODES)
    metafunc.parametrize("cell", settings.cells)


def timed(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_speed(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, cell: str, mode: str, shape: Shape
) -> None:
    settings = request.config.stash.get(SETTINGS, Settings())
    torch.manual_seed(0)
    x = torch.randn(shape.T, shape.B, shape.I)
    theirs = rivals.TORCH[cell](shape.I, shape.H)
    ours = getattr(fastrnn, cell.upper())(shape.I, shape.H)
    ours.load_state_dict(theirs.state_dict())
    step = rivals.STEPS[mode]
    calls: dict[str, Callable[[], Tensor]] = {}
    if mode == "forward" and rivals.why_no_onnxruntime() is None:
        calls["onnxruntime"] = rivals.onnxruntime_forward(cell, theirs, shape, x)
    calls["torch.nn"] = lambda: step(theirs, x)

    # A wrong answer must not be timed. These calls are also the warm-up.
    expected = rivals.forward(ours, x)
    for name, call in calls.items():
        torch.testing.assert_close(call().detach(), expected, rtol=1e-3, atol=1e-3, msg=f"{name} disagrees")
    a_round = timed(lambda: step(ours, x)) + sum(timed(call) for call in calls.values())
    a_round += 3 * (rivals.SETTLE + rivals.WAKE) * (len(calls) > 1)
    affordable = settings.seconds / a_round
    rounds = int(min(200, max(3, affordable, min(settings.min_rounds, 4 * affordable))))

    samples: dict[str, list[float]] = {name: [] for name in calls}

    def before_each_round() -> None:
        for name, call in calls.items():
            if len(calls) > 1:
                rivals.settle(call)
            theirs.zero_grad(set_to_none=True)
            samples[name].append(timed(call))
        if len(calls) > 1:
            rivals.settle(lambda: step(ours, x))
        ours.zero_grad(set_to_none=True)

    benchmark.pedantic(step, args=(ours, x), setup=before_each_round, rounds=rounds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    benchmark.extra_info.update(medians)
    settings.records.append(Record(cell, mode, shape, rounds, benchmark.stats.stats.median, medians))

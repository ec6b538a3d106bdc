"""One benchmark a row: ours alternates with every rival, round by round."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastrnn.bench import rivals
from fastrnn.bench.grid import Case, quick_rows, rows
from fastrnn.bench.machine import CpuClock
from fastrnn.bench.records import SETTINGS, Record, Settings


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.stash.get(SETTINGS, Settings())
    cases = [case for case in (quick_rows() if settings.quick else rows()) if case.cell in settings.cells]
    metafunc.parametrize("case", cases, ids=lambda case: case.id)


def test_speed(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, case: Case) -> None:
    settings = request.config.stash.get(SETTINGS, Settings())
    clock = CpuClock()
    calls = rivals.calls(case)
    rivals.check(case, calls)
    ours = calls.pop("fastrnn")
    # Only another library's threads are worth waiting for.
    settled = rivals.ONNX in calls
    a_round = sum(map(rivals.timed, (ours, *calls.values())))
    a_round += settled * (len(calls) + 1) * (rivals.SETTLE + rivals.WAKE)
    affordable = settings.seconds / a_round
    rounds = int(min(200, max(3, affordable, min(settings.min_rounds, 4 * affordable))))

    samples: dict[str, list[float]] = {name: [] for name in calls}

    def before_each_round() -> None:
        for name, call in calls.items():
            if settled:
                rivals.settle(call)
            samples[name].append(rivals.timed(call))
        if settled:
            rivals.settle(ours)
        rivals.forget(ours)

    benchmark.pedantic(ours, setup=before_each_round, rounds=rounds)
    samples["fastrnn"] = list(benchmark.stats.stats.data)
    record = Record.of(case, samples, clock.read())
    benchmark.extra_info.update(record.rivals)
    settings.records.append(record)

"""One benchmark a row: ours alternates with every rival, round by round."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from fastrnn.bench import rivals
from fastrnn.bench.grid import Case
from fastrnn.bench.machine import CpuClock
from fastrnn.bench.records import Record, Run


def test_speed(benchmark: BenchmarkFixture, case: Case, run: Run) -> None:
    """`case` and `run` come from `measure_rows`."""
    calls = rivals.calls(case)
    rivals.check(case, calls)
    ours = calls.pop(rivals.OURS)
    # Only another library's threads are worth waiting for.
    settled = rivals.ONNX in calls
    a_round = sum(map(rivals.timed, (ours, *calls.values())))
    a_round += settled * (len(calls) + 1) * (rivals.SETTLE + rivals.WAKE)
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def before_each_round() -> None:
        for name, call in calls.items():
            if settled:
                rivals.settle(call)
            samples[name].append(rivals.timed(call))
        if settled:
            rivals.settle(ours)
        rivals.forget(ours)

    clock = CpuClock()
    benchmark.pedantic(ours, setup=before_each_round, rounds=rivals.rounds(a_round, run.seconds, run.least))
    samples[rivals.OURS] = list(benchmark.stats.stats.data)
    run.records.append(Record.of(case, samples, clock.read()))

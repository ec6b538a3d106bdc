"""One benchmark a row: ours alternates with every rival, round by round."""

from __future__ import annotations

import time

from pytest_benchmark.fixture import BenchmarkFixture

from fastrnn.bench import rivals
from fastrnn.bench.grid import Case
from fastrnn.bench.machine import CpuClock
from fastrnn.bench.records import Record, Run


def test_speed(benchmark: BenchmarkFixture, case: Case, run: Run) -> None:
    """`case` and `run` come from `measure_rows`."""
    calls = rivals.calls(case)
    wrong = rivals.check(case, calls)
    for name in wrong:
        del calls[name]
    calls = {**rivals.pace(case), **calls}
    # Only another library's threads are worth waiting for, and then worth more than one call.
    settled = rivals.ONNX in calls
    once = {name: rivals.timed(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name in [name for name in calls if rivals.far_behind(once[name], once[rivals.OURS], run.seconds)]:
        samples[name].append(once.pop(name))
        del calls[name]
    repeats = rivals.repeats(max(once.values())) if settled else 1
    a_round = repeats * sum(once.values()) + settled * len(calls) * (rivals.SETTLE + rivals.WAKE)

    def a_round_of_all() -> None:
        for name, call in calls.items():
            if settled:
                rivals.settle(call)
            samples[name].append(rivals.repeated(call, repeats))

    clock, start = CpuClock(), time.perf_counter()
    benchmark.pedantic(a_round_of_all, rounds=rivals.rounds(a_round, run.seconds, run.least))
    first = time.perf_counter() - start
    most = 3 * min(first, rivals.MOST * run.seconds)
    while (record := Record.of(case, samples, clock.read())).error.get(rivals.TORCH, 0) > run.error:
        if time.perf_counter() - start > most:
            break
        for _ in range(max(1, record.rounds // 2)):
            a_round_of_all()
    record.wrong = wrong
    run.records.append(record)

"""`bench --compare`: changes told from noise, and the errors that the noise is made of."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

pytest.importorskip("fastrnn.bench", reason="an in-place build links it")
from measured import CASE, MACHINE, NOISY, record

from fastrnn.bench import compare, grid, records, rivals, test_speed
from fastrnn.bench.grid import Case
from fastrnn.bench.records import Probe, Record
from fastrnn.lm.errors import UserError


def test_compare_tells_changes_from_noise():
    one, two = CASE, Case("gru", "forward", grid.SMALL)
    earlier = [record(2.0, one), record(2.0, two)]
    text = compare.compare(earlier, MACHINE, [record(1.7, one), record(1.96, two)], MACHINE)
    assert "1 slower, 0 faster, 1 within the noise" in text
    assert f"slower  -15.0% (noise 3.0%)  {one.id}: 2.00 -> 1.70, ours 1.0000 -> 1.0000 ms" in text
    noisy = compare.compare(earlier, MACHINE, [record(1.7, one, error=0.1), record(2.0, two)], MACHINE)
    assert "0 slower, 0 faster, 2 within the noise" in noisy


def test_compare_tells_changes_of_sections():
    def probes(scale):
        return [
            Probe("memory", CASE, 100 * scale, 200),
            Probe("crowded", CASE, 2.0 * scale, 9.0),
            Probe("scaling", CASE, 1.9 / scale, 2.0),
            Probe("decoder", CASE, 1e-3 * scale, 5e-3),
            Probe("trees", CASE, 30 / scale, 1.0, error=0.1),
        ]

    text = compare.compare([record(), *probes(1)], MACHINE, [record(), *probes(1.2)], MACHINE)
    assert "4 slower, 0 faster, 2 within the noise" in text
    assert f"slower  -16.7% (noise 3.0%)  crowded {CASE.id}: 0.50 -> 0.42" in text
    assert f"  memory {CASE.id}: 2.00 -> 1.67" in text
    assert " ms" not in text
    better = compare.compare(probes(1), MACHINE, probes(0.5), MACHINE)
    assert "0 slower, 5 faster" in better


def test_a_row_without_its_error_is_refused(tmp_path):
    path, probe = tmp_path / "run.json", Probe("scaling", CASE, 1.9, 2.0, NOISY)
    for kind in ("results", "sections"):
        records.write_json(path, [record(error=0.01)], MACHINE, [probe], [])
        content = json.loads(path.read_text())
        del content[kind][0]["error"]
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="not a file that this version's bench --json wrote"):
            records.read_json(path)


def test_compare_counts_rows_of_one_run_only_and_marks_unquiet_ones():
    now = [record(4.0, conditions=NOISY), record(case=Case("rnn", "last", grid.VANISHING))]
    earlier = [record(2.0), record(case=Case("rnn", "training", grid.SMALL))]
    text = compare.compare(earlier, MACHINE, now, MACHINE)
    assert "1 faster, 0 within the noise; 1 rows only then, 1 only now" in text
    assert "faster +100.0%" in text
    assert text.endswith("*")


def test_on_another_machine_only_ratios_count():
    other = {**MACHINE, "cpu": "another"}
    slow = Record(
        CASE, 11, 1.0, {"torch.nn": 2.0}, {}, {"torch.nn": 0.0}
    )  # 1000 times the time, the same ratio
    text = compare.compare([record(2.0)], MACHINE, [slow], other)
    assert "1 within the noise" in text
    assert "not the same machine: a CPU" in text
    assert " ms" not in compare.compare([record(3.0)], MACHINE, [slow], other)


def test_the_noise_of_two_rows():
    assert compare.noise(record(error=0.03), record(error=0.04)) == pytest.approx(0.15)
    assert compare.noise(record(error=0.0), record(error=0.0)) == compare.LEAST_NOISE


def test_the_error_of_a_ratio_of_medians():
    rng = random.Random(1)

    def error(n, wide, drift=0.0):
        """Of so many rounds, beside how far as many such ratios really lie apart."""
        errors, logs = [], []
        for _ in range(60):
            slow = [math.exp(drift * math.sin(6 * k / n)) for k in range(n)]
            ours, theirs = ([s * math.exp(rng.gauss(0, wide)) for s in slow] for _ in range(2))
            errors.append(records.standard_error(theirs, ours))
            logs.append(math.log(statistics.median(theirs) / statistics.median(ours)))
        return statistics.mean(errors), statistics.stdev(logs)

    for n in (11, 100):
        found, true = error(n, 0.1)
        assert 0.7 < found / true < 1.5
        assert 0.7 < found / (math.sqrt(math.pi / 2 / n) * 0.1 * math.sqrt(2)) < 1.5  # normal, independent
    # A hundred rounds say what eleven cannot, and a drift that both share is none.
    assert error(100, 0.1)[0] < 0.5 * error(11, 0.1)[0]
    assert error(100, 0.02, 0.3)[0] < 0.1
    assert records.standard_error([2.0] * 5, [1.0] * 5) == 0


def test_many_short_calls_make_a_sample():
    assert [rivals.repeats(s) for s in (1e-6, 1e-3, 0.009, 1.0)] == [50, 20, 2, 1]
    calls = []
    assert 0 <= rivals.repeated(lambda: calls.append(0), 5) < 1
    assert len(calls) == 5


def test_a_rival_far_behind_is_called_once(monkeypatch):
    """Where a call of its takes so long that others would not change the verdict."""
    assert rivals.far_behind(theirs=100, ours=1.6, seconds=1.5)
    assert not rivals.far_behind(theirs=100, ours=11, seconds=1.5)
    assert not rivals.far_behind(theirs=5, ours=0.1, seconds=1.5)

    case = Case("rnn", "training", grid.Shape(2, 1, 8, 8), dtype="bfloat16")
    calls, timed, run = rivals.calls(case), rivals.timed, records.Run(0.01, 3)
    slow, times = calls[rivals.TORCH], []

    def seconds(call):
        times.append(call)
        return timed(call) + 10 * (call is slow)

    class Rounds:
        @staticmethod
        def pedantic(call, rounds):
            for _ in range(rounds):
                call()

    monkeypatch.setattr(rivals, "timed", seconds)
    monkeypatch.setattr(rivals, "calls", lambda case: dict(calls))
    test_speed.test_speed(Rounds, case, run)
    (found,) = run.records
    assert times.count(slow) == 1
    assert found.rounds == times.count(calls[rivals.OURS]) - 1 >= 3
    assert found.rivals[rivals.TORCH] > 10
    assert found.spread.keys() == found.error.keys() == {rivals.FLOAT32}
    assert compare.error(found) == records.UNKNOWN_ERROR

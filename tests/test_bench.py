"""The benchmarks' report: rows, goals, comparisons, memory. None of these times anything."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastrnn import __main__ as cli

pytest.importorskip("fastrnn.bench", reason="an in-place build links it")
from fastrnn.bench import compare, goals, grid, machine, memory, records, report, rivals, sections
from fastrnn.bench.goals import Goal
from fastrnn.bench.grid import Case, Shape
from fastrnn.bench.machine import Conditions
from fastrnn.bench.records import Probe, Record
from fastrnn.lm.errors import UserError

CASE = Case("lstm", "forward", grid.SMALL)
MACHINE = {"cpu": "a CPU", "cpus": 2, "threads": 2, "torch": "2.13.0", "unquiet": False}
NOISY = Conditions(3.0, 0.0, 0.5)


def record(ratio=2.0, case=CASE, spread=0.02, **more):
    return Record(case, 11, 1e-3, {"torch.nn": ratio * 1e-3}, {"torch.nn": spread}, **more)


@pytest.mark.parametrize("rows", [grid.rows, grid.quick_rows], ids=["full", "quick"])
def test_no_row_stands_twice(rows):
    ids = [case.id for case in rows()]
    assert len(ids) == len(set(ids)) == len(set(rows()))


def test_the_quick_rows_are_among_the_full_ones():
    assert set(grid.quick_rows()) < set(grid.rows())


def tiny(case):
    s = case.shape
    return dataclasses.replace(case, shape=Shape(min(s.T, 6), min(s.B, 3), 8, 8))


@pytest.mark.parametrize("case", sorted({*map(tiny, grid.rows())}, key=lambda c: c.id), ids=lambda c: c.id)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_every_kind_of_row_runs_and_all_rivals_agree(case):
    calls = rivals.calls(case)
    rivals.check(case, calls)
    expected = {"fastrnn", "torch.nn"}
    expected |= {"fastrnn float32"} if case.dtype == "bfloat16" else set()
    expected |= {"onnxruntime"} if rivals.onnx_can(case) and rivals.why_no_onnxruntime() is None else set()
    assert set(calls) == expected


def test_operations():
    shape = Shape(10, 2, 3, 4)
    assert grid.flop(Case("lstm", "forward", shape)) == 2 * 20 * 16 * 7
    assert grid.flop(Case("gru", "last", shape)) == 3 * 2 * 20 * 12 * 7
    assert grid.flop(Case("rnn", "forward", shape, "bidirectional")) == 2 * 2 * 20 * 4 * 7
    assert grid.flop(Case("rnn", "forward", shape, "two layers")) == 2 * 20 * 4 * (7 + 8)
    assert grid.flop(Case("lstm", "forward", shape, "projection")) == 2 * 20 * (16 * 5 + 8)
    assert Case("rnn", "forward", shape, "packed").lengths == [10, 2]
    assert grid.flop(Case("rnn", "forward", shape, "packed")) == 2 * 12 * 4 * 7


def test_a_record_of_samples():
    step = Case("rnn", "step", Shape(1, 1, 8, 8))
    r = Record.of(step, {"fastrnn": [1.0, 1.0, 2.0], "torch.nn": [2.0, 4.0, 4.0]}, NOISY)
    assert (r.rounds, r.ours, r.rivals, r.spread) == (3, 0.01, {"torch.nn": 0.04}, {"torch.nn": 1.0})
    assert r.ratio("torch.nn") == 4
    assert records.relative_spread([1, 2, 3, 4, 5]) == 2 / 3


# Goals


def outcome(goal, *rows, peak=None):
    return goals.outcome(goal, rows, peak)


def test_a_goal_names_the_worst_row():
    goal = Goal("any", "torch.nn", 1.5, ("forward",))
    good, bad = record(2.0), record(1.2, Case("gru", "forward", grid.MEDIUM), conditions=NOISY)
    o = outcome(goal, good, bad, record(0.1, Case("gru", "training", grid.MEDIUM)))
    assert (o.measured, o.worst, o.rows, o.met_rows) == (1.2, bad.case.id, 2, 1)
    assert o.met is False
    assert o.unquiet
    text = goals.report([o])
    assert text.startswith("goals: 0 met, 1 not met, 0 not measured")
    assert "NOT MET" in text
    assert "at least 1.50x torch.nn, measured 1.20x (1 of 2 rows; worst gru-forward-T100-B32" in text
    assert text.endswith("*")


def test_at_most_a_mean_and_a_share_of_the_peak():
    step = record(case=Case("lstm", "step", grid.STEPS[1]))
    goal = Goal("step", goals.MICROSECONDS, 1000.0, ("step",), at_most=True)
    assert outcome(goal, step).met
    assert not outcome(dataclasses.replace(goal, bound=999.0), step).met

    mean = outcome(Goal("mean", "torch.nn", 2.0, ("forward",), mean=True), record(1.0), record(4.0))
    assert mean.met
    assert mean.measured == pytest.approx(2)

    share = Goal("share", goals.PEAK, 0.5, ("forward",))
    r = record()
    assert outcome(share, r, peak=2 * r.gflops).met
    assert not outcome(share, r, peak=2.1 * r.gflops).met
    assert outcome(share, r, peak=None).met is None  # no compiler: the peak is not known


def test_a_goal_only_where_the_rival_is_slow():
    goal = Goal("slow", "torch.nn", 3.0, ("forward",), rival_us=2500.0)
    assert outcome(goal, record(2.0), record(4.0)).rows == 1
    assert outcome(goal, record(2.0)).met is None


def test_sections_have_goals_of_their_own():
    probes = [Probe("memory", CASE, 59, 100), Probe("crowded", CASE, 3.5, 30.0)]
    found = {o.goal.section: o for o in goals.evaluate([], probes, None) if o.met is not None}
    assert found["memory"].met
    assert found["memory"].measured == 0.59
    assert found["crowded"].met is False
    assert set(found) == {"memory", "crowded"}  # the goals of the rows leave them alone
    assert "ratio 0.59" in sections.table(probes)


def test_every_goal_meets_a_row_and_every_row_a_goal():
    rows = [
        Record(case, 11, 1e-3, dict.fromkeys((rivals.TORCH, rivals.ONNX, rivals.FLOAT32), 1.0))
        for case in grid.rows()
    ]
    shapes = {"memory": (memory.SHAPE,), "crowded": sections.CROWDED, "scaling": (sections.SCALING,)}
    rows += [
        Probe(section, Case("gru", mode, shape), 1.0, 1.0)
        for section in shapes
        for mode in (grid.MODES if section != "crowded" else ["forward"])
        for shape in shapes[section]
    ]
    assert not [o.goal.text for o in goals.evaluate(rows, [], 1.0) if o.met is None]
    assert not [r.case.id for r in rows if not any(goal.concerns(r) for goal in goals.GOALS)]
    texts = [goal.text for goal in goals.GOALS]
    assert len(texts) == len(set(texts))


# Comparisons


def test_compare_tells_changes_from_noise():
    one, two = CASE, Case("gru", "forward", grid.SMALL)
    earlier = [record(2.0, one), record(2.0, two)]
    text = compare.compare(earlier, MACHINE, [record(1.7, one), record(1.96, two)], MACHINE)
    assert "1 slower, 0 faster, 1 within the noise" in text
    assert f"slower  -15.0% (noise 3.0%)  {one.id}: 2.00 -> 1.70, ours 1.0000 -> 1.0000 ms" in text
    noisy = compare.compare(earlier, MACHINE, [record(1.7, one, spread=0.3), record(2.0, two)], MACHINE)
    assert "0 slower, 0 faster, 2 within the noise" in noisy


def test_compare_counts_rows_of_one_run_only_and_marks_unquiet_ones():
    now = [record(4.0, conditions=NOISY), record(case=Case("rnn", "last", grid.VANISHING))]
    earlier = [record(2.0), record(case=Case("rnn", "training", grid.SMALL))]
    text = compare.compare(earlier, MACHINE, now, MACHINE)
    assert "1 faster, 0 within the noise; 1 rows only then, 1 only now" in text
    assert "faster +100.0%" in text
    assert text.endswith("*")


def test_on_another_machine_only_ratios_count():
    other = {**MACHINE, "cpu": "another"}
    slow = Record(CASE, 11, 1.0, {"torch.nn": 2.0}, {"torch.nn": 0.0})  # 1000 times the time, the same ratio
    text = compare.compare([record(2.0)], MACHINE, [slow], other)
    assert "1 within the noise" in text
    assert "not the same machine: a CPU" in text
    assert " ms" not in compare.compare([record(3.0)], MACHINE, [slow], other)


def test_the_noise_of_two_rows():
    assert compare.noise(record(spread=0.03), record(spread=0.04)) == pytest.approx(0.05)
    assert compare.noise(record(spread=0.0), record(spread=0.0)) == compare.LEAST_NOISE
    unknown = Record(CASE, 11, 1e-3, {"torch.nn": 2e-3})
    assert compare.noise(unknown, record(spread=0.0)) == compare.UNKNOWN_SPREAD


# Files


def test_a_file_comes_back(tmp_path):
    path = tmp_path / "deep" / "run.json"
    rows = [record(2.0, conditions=NOISY), record(3.0, Case("gru", "training", grid.MEDIUM, "packed"))]
    rows.append(record(case=Case("rnn", "forward", grid.SMALL, dtype="bfloat16")))
    outcomes = goals.evaluate(rows, [], None)
    records.write_json(path, rows, MACHINE, [Probe("memory", CASE, 1, 2)], goals.as_json(outcomes))
    assert records.read_json(path) == (rows, MACHINE)

    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(path.read_text(), parse_constant=constant)
    assert {g["goal"]: g["met"] for g in content["goals"]} == {o.goal.text: o.met for o in outcomes}
    assert content["sections"][0]["torch.nn"] == 2


def old_file(path):
    """As the first version wrote it: no kind, dtype, spread or conditions."""
    row = {
        "cell": "lstm",
        "mode": "forward",
        "rounds": 11,
        "gflops": 85.0,
        "T": 100,
        "B": 1,
        "I": 128,
        "H": 128,
    }
    row["seconds"] = {"fastrnn": 1e-3, "onnxruntime": 3e-3, "torch.nn": 2e-3}
    path.write_text(json.dumps({"machine": MACHINE, "geometric_means": {}, "results": [row]}))
    return path


def test_a_file_of_the_first_version(tmp_path):
    earlier = records.read_json(old_file(tmp_path / "old.json"))
    assert earlier[0] == [Record(CASE, 11, 1e-3, {"onnxruntime": 3e-3, "torch.nn": 2e-3})]
    assert "1 within the noise" in compare.compare(*earlier, [record(1.85)], MACHINE)
    assert "noise 10.2%" in compare.compare(*earlier, [record(1.6)], MACHINE)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": [{}], "machine": {}}', '{"results": [1]}'])
def test_a_file_that_no_run_wrote(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.json is not a file that bench --json wrote"):
        records.read_json(path)


def test_a_missing_file_is_told_before_anything_is_measured(capsys, tmp_path):
    pytest.importorskip("pytest_benchmark")
    options = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert cli.main(["bench", "--compare", str(tmp_path / "none.json"), *options]) == 2
    assert f"cannot read {tmp_path / 'none.json'}: No such file" in capsys.readouterr().err


# Memory and the machine


def status(rss, peak):
    return f"Name:\tpython\nVmPeak:\t  999999 kB\nVmHWM:\t  {peak} kB\nVmRSS:\t  {rss} kB\n"


def test_growth_is_the_peak_over_what_was_there():
    assert memory.growth(status(1000, 9000), status(1200, 5000)) == 4000 * 1024
    assert memory.growth(status(1000, 1000), status(900, 990)) == 0
    with pytest.raises(ValueError, match="no VmHWM"):
        memory.growth(status(1, 1), "VmRSS: 3 kB")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_output_is_among_the_bytes():
    found = memory.in_a_process("fastrnn", Case("rnn", "forward", Shape(2000, 4, 8, 512)))
    assert 2000 * 4 * 512 * 4 * 0.9 < found < 100 * 2**20


def proc(folder, ticks):
    folder.joinpath("stat").write_text("cpu " + " ".join(map(str, ticks)) + "\ncpu0 1 2 3\n")
    folder.joinpath("loadavg").write_text("1.50 0.70 0.30 2/90 3\n")


def test_conditions_of_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.time, "process_time", lambda: 5.0)
    proc(tmp_path, [0] * 8)
    clock = machine.CpuClock(tmp_path)
    proc(tmp_path, [100, 0, 50, 700, 50, 0, 0, 100])
    assert clock.read() == Conditions(1.5, 0.1, 0.15)
    assert clock.read().unquiet
    assert clock.read().text().split() == ["1.50", "10.0%", "15.0%", "*"]


def test_a_system_that_does_not_tell(tmp_path):
    conditions = machine.CpuClock(tmp_path / "none").read()
    assert conditions == Conditions(None, None, None)
    assert not conditions.unquiet
    assert conditions.text().strip() == ""


def test_the_report_of_a_run():
    rows = [record(2.0), record(3.0, Case("gru", "step", grid.STEPS[0]), conditions=NOISY)]
    text = report.table(rows, 100.0)
    assert "gru-step-T1-B1-I128-H128" in text
    assert "* 1 of 2 rows were taken while others had the CPUs" in text
    assert records.means(rows) == {
        "lstm forward": {"torch.nn": pytest.approx(2)},
        "gru step": {"torch.nn": pytest.approx(3)},
    }
    about = machine.about(Conditions(), 100.0, None)
    assert "for want of a compiler" in report.describe(about)
    assert about["threads"] == torch.get_num_threads()
    assert "WARNING" in report.describe(machine.about(NOISY, 100.0, 120.0))


def test_without_a_compiler_the_peak_is_unknown(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert machine.fma_peak() is None


def test_busy_neighbours_end_with_the_block():
    with sections.neighbours(2) as started:
        assert [process.poll() for process in started] == [None, None]
    assert None not in [process.poll() for process in started]


def test_a_section_that_fails_loses_no_rows(monkeypatch):
    def fails(cells):
        raise RuntimeError("no")

    monkeypatch.setattr(sections, "SECTIONS", {"memory": fails, "scaling": lambda cells: [cells]})
    assert sections.measure(["memory", "scaling"], ("gru",)) == ([("gru",)], ["memory was not measured: no"])

"""The benchmarks' report: rows, goals, comparisons, memory. None of these times anything."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import torch

import fastrnn
from fastrnn import __main__ as cli

pytest.importorskip("fastrnn.bench", reason="an in-place build links it")
from measured import CASE, FREE, MACHINE, NOISY, PEAKS, record

from fastrnn.bench import (
    attention,
    goals,
    grid,
    limits,
    machine,
    memory,
    records,
    report,
    rivals,
    sections,
    trees,
)
from fastrnn.bench.goals import Goal
from fastrnn.bench.grid import Case, Shape
from fastrnn.bench.machine import Conditions
from fastrnn.bench.records import Probe, Record
from fastrnn.lm.errors import UserError


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
    assert not rivals.check(case, calls)
    expected = {"fastrnn", "torch.nn"}
    expected |= {"fastrnn float32"} if case.dtype != "float32" else set()
    expected |= {"onnxruntime"} if rivals.onnx_can(case) and rivals.why_no_onnxruntime() is None else set()
    assert set(calls) == expected
    assert isinstance(calls["fastrnn"].module, fastrnn.inference.Quantized) == (case.dtype == "int8")


@pytest.mark.parametrize("mode", grid.MODES)
def test_a_wrong_answer_is_not_timed(mode):
    case = Case("gru", mode, Shape(3, 2, 8, 8))
    calls = rivals.calls(case, onnx=False)
    with torch.no_grad():
        calls["fastrnn"].module.weight_hh_l0[0] += 0.5
    with pytest.raises(AssertionError, match=r"torch\.nn disagrees"):
        rivals.check(case, calls)


def test_wrong_gradients_are_not_timed():
    case = Case("lstm", "training", Shape(3, 2, 8, 8))
    calls = rivals.calls(case, onnx=False)
    calls["fastrnn"].module.weight_hh_l0.register_hook(lambda grad: grad * 1.1)
    with pytest.raises(AssertionError, match=r"torch\.nn disagrees"):
        rivals.check(case, calls)


@pytest.mark.parametrize("factor", [2.0, math.nan])
@pytest.mark.parametrize("whose", ["fastrnn", "torch.nn"])
def test_in_bfloat16_a_wrong_rival_is_told_from_a_wrong_answer(whose, factor):
    case = Case("lstm", "training", Shape(3, 2, 8, 8), dtype="bfloat16")
    calls = rivals.calls(case, onnx=False)
    calls[whose].module.weight_hh_l0.register_hook(lambda grad: grad * factor)
    if whose == "fastrnn":
        with pytest.raises(AssertionError, match="fastrnn float32 disagrees"):
            rivals.check(case, calls)
    else:
        wrong = rivals.check(case, calls)
        assert wrong == ["torch.nn"]


def test_a_layer_is_called_as_users_do():
    forward, training = (
        rivals.calls(Case("gru", mode, Shape(3, 2, 8, 8)), onnx=False)["fastrnn"] for mode in grid.MODES
    )
    assert training.module.training
    assert not forward.module.training
    assert forward().is_inference()
    training()
    leaves = [*training.module.parameters(), training.x]
    assert all(leaf.grad is not None for leaf in leaves)
    training.forget()
    assert all(leaf.grad is None for leaf in leaves)


def test_rounds():
    assert rivals.rounds(0.1, 2.0, 11) == 20
    assert rivals.rounds(1e-6, 2.0, 11) == 1000
    assert rivals.rounds(0.5, 2.0, 11) == 11
    assert rivals.rounds(1.0, 2.0, 11) == 8  # four times the seconds are enough
    assert rivals.rounds(9.0, 2.0, 11) == 3


def test_calls_alternate():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = rivals.alternate(calls, 0.0, lambda name: order.append(name.upper()))
    assert "".join(order) == "AaBb" * 3
    assert [len(seconds) for seconds in samples.values()] == [3, 3]


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
    assert r.product is None
    assert r.ratio("torch.nn") == 4
    assert records.relative_spread([1, 2, 3, 4, 5]) == 2 / 3


# Goals


def outcome(goal, *rows, peaks=None):
    return goals.outcome(goal, rows, peaks)


def test_a_goal_names_the_worst_row():
    goal = Goal("any", "torch.nn", 1.5, ("forward",))
    good, bad = record(2.0), record(1.2, Case("gru", "forward", grid.MEDIUM), conditions=NOISY)
    worse = record(1.1, Case("rnn", "forward", grid.LARGE))
    rows = [good, bad, worse, record(0.1, Case("gru", "training", grid.MEDIUM))]
    o = outcome(goal, *rows, peaks=PEAKS)
    assert (o.worst.measured, o.worst.row, o.rows, o.met) == (1.1, worse.case.id, 3, False)
    assert [f.row for f in o.unmet] == [worse.case.id, bad.case.id]
    text = goals.report([o]).splitlines()
    assert text[0] == (
        "goals: 0 met, 1 not met (each row beyond this machine by its count: 1; with products at torch.mm's "
        "pace: 1), 0 not measured"
    )
    assert "NOT MET" in text[1]
    assert "at least 1.5x torch.nn, measured 1.1x (3 rows; worst rnn-forward-T100-B32" in text[1]
    limit = limits.of(bad.case, PEAKS)
    assert limit.ours > grid.flop(bad.case) / 100e9  # 2 * 3200 * 768 * 512 = 2.52 GFLOP, 25.2 ms
    said = f"    {bad.case.id}: 1.2x *; {1.2e-3 / limit.ours:.4g}x by the count at best, the goal is beyond "
    assert text[3] == f"{said}this machine: {limit.explain(bad.ours)}"
    fast = dataclasses.replace(FREE, gflops={"float32": 1e6}, read=[(1, 1e6)], dot=[(1, 1e6)])
    open_one = goals.report([outcome(goal, bad, peaks=fast)])
    assert "x by the count at best, which does not explain the miss: measured 1 ms, counted " in open_one
    assert (
        "1 not met (each row beyond this machine by its count: 0; with products at torch.mm's pace: 0)"
        in open_one
    )
    assert len(text) == 4
    assert "no count" in goals.report([outcome(goal, bad)])


def test_a_miss_beside_what_the_machine_multiplied_at():
    """The peaks are the best of many tries; in a row's own rounds the machine may have been slower."""
    goal, row = Goal("any", "torch.nn", 1.5, ("forward",)), record(1.2, Case("lstm", "forward", grid.LARGE))
    fast = dataclasses.replace(FREE, gflops={"float32": 1e6}, read=[(1, 1e6)], dot=[(1, 1e6)])
    operations = grid.flop(row.case) / 1e9
    slow = dataclasses.replace(row, ours=0.1, rivals={"torch.nn": 0.12}, product=10 * operations)
    found = outcome(goal, slow, peaks=fast).worst
    assert found.at_pace == pytest.approx(1.2, rel=1e-3)  # the products alone take its 0.1 s
    assert found.at_limit > 1000
    text = goals.report([outcome(goal, slow, peaks=fast)])
    assert "by its count: 0; with products at torch.mm's pace: 1), 0 not measured" in text
    assert "which does not explain the miss (1.2x at torch.mm's pace): measured 100 ms, counted " in text
    assert (
        f"; at the {10 * operations:.0f} GFLOP/s of torch.mm in the same rounds the count is 100 ms" in text
    )
    assert f"{10 * operations:9.1f}" in report.table([slow], fast)
    assert outcome(goal, row, peaks=fast).worst.at_pace is None


def test_a_product_is_timed_beside_long_rows_alone():
    large, small = Case("lstm", "forward", grid.LARGE), Case("rnn", "forward", grid.MEDIUM)
    assert list(rivals.pace(large)) == [rivals.PRODUCT]
    assert rivals.pace(small) == rivals.pace(dataclasses.replace(large, dtype="bfloat16")) == {}
    samples = {rivals.PRODUCT: [1e-2, 2e-2, 9.0], "fastrnn": [1.0, 1.0, 1.0], "torch.nn": [1.0, 1.0, 1.0]}
    r = Record.of(large, samples, NOISY)
    assert r.rivals == {"torch.nn": 1.0}
    assert r.product == pytest.approx(2 * rivals.SIDE**3 / 2e-2 / 1e9)
    assert rivals.product(3)().shape == (3, 3)


def test_what_was_not_measured_is_told():
    assert "not measured  forward, any: at least 1.5x torch.nn" in goals.report(
        [outcome(Goal("any", "torch.nn", 1.5, ("forward",)))]
    )


def test_at_most_a_mean_and_a_share_of_the_peak():
    step = record(case=Case("lstm", "step", grid.STEPS[1]))
    goal = Goal("step", goals.MICROSECONDS, 1000.0, ("step",), at_most=True)
    assert outcome(goal, step).met
    slow = dataclasses.replace(step, ours=2e-3)
    o = outcome(dataclasses.replace(goal, bound=999.0), step, slow)
    assert not o.met
    assert [f.measured for f in o.unmet] == [2000.0, 1000.0]
    assert o.worst == o.unmet[0]

    goal = Goal("mean", "torch.nn", 2.0, ("forward",), mean=True)
    mean = outcome(goal, record(1.0), record(4.0), peaks=PEAKS)
    assert mean.met
    assert mean.worst.measured == pytest.approx(2)
    least = limits.of(CASE, PEAKS).ours
    assert mean.worst.at_limit == pytest.approx(2e-3 / least)
    assert not outcome(dataclasses.replace(goal, bound=2.1), record(1.0), record(4.0)).met
    assert (mean.worst.at_pace, mean.worst.count) == (None, "every row as fast as its own count allows")
    missed = outcome(
        dataclasses.replace(goal, bound=1e9), record(1.0), record(4.0, product=50.0), peaks=PEAKS
    )
    assert 0 < missed.worst.at_pace < missed.worst.at_limit
    assert "the goal is beyond this machine" in goals.report([missed])
    assert "at torch.mm's pace): every row as fast as its own count allows" in goals.report([missed])

    share = Goal("share", goals.PEAK, 0.5, ("forward",))
    r = record()
    peaks = [dataclasses.replace(PEAKS, gflops={"float32": k * r.gflops}) for k in (2, 2.1)]
    assert outcome(share, r, peaks=peaks[0]).met
    assert not outcome(share, r, peaks=peaks[1]).met
    assert outcome(share, r, peaks=None).met is None  # no compiler: the peak is not known


def test_beside_float32_both_are_at_their_limits():
    """Else what float32 falls short of its own would count as within bfloat16's reach."""
    case = dataclasses.replace(CASE, dtype="bfloat16")
    row = dataclasses.replace(record(case=case), rivals={rivals.FLOAT32: 3e-3})
    peaks = dataclasses.replace(PEAKS, gflops={"float32": 100.0, "bfloat16": 200.0})
    found = outcome(Goal("b", rivals.FLOAT32, 4.0, ("forward",), dtype="bfloat16"), row, peaks=peaks).worst
    assert found.measured == 3
    assert found.at_limit == pytest.approx(limits.of(CASE, peaks).ours / limits.of(case, peaks).ours)


def test_a_goal_only_where_the_rival_is_slow():
    goal = Goal("slow", "torch.nn", 3.0, ("forward",), rival_us=2500.0)
    assert outcome(goal, record(2.0), record(4.0)).rows == 1
    assert outcome(goal, record(2.0)).met is None


def test_sections_have_goals_of_their_own():
    probes = [Probe("memory", CASE, 59, 100), Probe("crowded", CASE, 3.5, 30.0)]
    found = {o.goal.section: o for o in goals.evaluate([], probes, None) if o.met is not None}
    assert found["memory"].met
    assert found["memory"].worst.measured == 0.59
    assert found["crowded"].met is False
    text = goals.report([found["crowded"]])
    assert "3.5x; 2x by the count at best, which does not explain the miss: with a busy neighbour" in text
    assert set(found) == {"memory", "crowded"}  # the goals of the rows leave them alone
    assert "ratio 0.59" in sections.table(probes)


@pytest.mark.parametrize("mode", grid.MODES)
@pytest.mark.parametrize("cell", trees.CELLS)
def test_a_recursion_gives_the_numbers_of_a_forest(cell, mode):
    made = trees.calls(Case(cell, mode, Shape(9, 3, 4, 5), "trees"))
    torch.testing.assert_close(made[rivals.OURS](), made[trees.RECURSION]())
    torch.testing.assert_close(made[rivals.OURS].x.grad, made[trees.RECURSION].x.grad)


def test_every_goal_meets_a_row_and_every_row_a_goal():
    rows = [
        Record(case, 11, 1e-3, dict.fromkeys((rivals.TORCH, rivals.ONNX, rivals.FLOAT32), 1.0))
        for case in grid.rows()
    ]
    shapes = {"memory": (memory.SHAPE,), "crowded": sections.CROWDED, "scaling": (sections.SCALING,)}
    shapes |= {"decoder": (attention.DECODER,), "attention": (attention.ATTENTION,)}
    shapes["trees"] = (trees.SHAPE,)
    assert shapes.keys() == sections.SECTIONS.keys() == sections.UNITS.keys()
    rows += [
        Probe(section, Case("dot" if section == "attention" else "gru", mode, shape), 1.0, 1.0)
        for section in shapes
        for mode in grid.MODES
        for shape in shapes[section]
    ]
    assert not [o.goal.text for o in goals.evaluate(rows, [], PEAKS) if o.met is None]
    assert not [r.case.id for r in rows if not any(goal.concerns(r) for goal in goals.GOALS)]
    texts = [goal.text for goal in goals.GOALS]
    assert len(texts) == len(set(texts))


# Files


def test_a_file_comes_back(tmp_path):
    path = tmp_path / "deep" / "run.json"
    rows = [record(2.0, conditions=NOISY), record(3.0, Case("gru", "training", grid.MEDIUM, "packed"))]
    rows.append(record(case=Case("rnn", "forward", grid.SMALL, dtype="int8"), product=123.4))
    rows[-1].wrong.append("torch.nn")
    outcomes = goals.evaluate(rows, [], None)
    probes = [Probe("memory", CASE, 1, 2, NOISY, 0.1)]
    records.write_json(path, rows, MACHINE, probes, goals.as_json(outcomes))
    assert records.read_json(path) == ([*rows, *probes], MACHINE)

    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(path.read_text(), parse_constant=constant)
    assert {g["goal"]: g["met"] for g in content["goals"]} == {o.goal.text: o.met for o in outcomes}
    assert content["sections"][0]["torch.nn"] == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": [{}], "machine": {}}', '{"results": [1]}'])
def test_a_file_that_no_run_wrote(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.json is not a file that this version's"):
        records.read_json(path)


def test_a_missing_file_is_told_before_anything_is_measured(capsys, tmp_path):
    pytest.importorskip("pytest_benchmark")
    options = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert cli.main(["bench", "--compare", str(tmp_path / "none.json"), *options]) == 2
    assert f"cannot read {tmp_path / 'none.json'}: No such file" in capsys.readouterr().err


def test_the_report_of_a_run():
    rows = [record(2.0), record(3.0, Case("gru", "step", grid.STEPS[0]), conditions=NOISY)]
    text = report.table(rows, PEAKS)
    assert "gru-step-T1-B1-I128-H128" in text
    assert "* 1 of 2 rows were taken while others had the CPUs" in text
    assert "WRONG" not in text
    assert records.means(rows) == {
        "lstm forward": {"torch.nn": pytest.approx(2)},
        "gru step": {"torch.nn": pytest.approx(3)},
    }
    untimed = dataclasses.replace(rows[0], rivals={}, spread={}, error={}, wrong=["torch.nn"])
    assert "WRONG" in report.table([untimed, rows[1]], PEAKS)
    assert records.means([untimed]) == {"lstm forward": {}}
    assert goals.evaluate([untimed], [], None)[0].met is None
    about = machine.about(Conditions(), 100.0, None)
    assert "for want of a compiler" in report.describe(about, None)
    assert about["threads"] == torch.get_num_threads()
    text = report.describe(machine.about(NOISY, 100.0, PEAKS), PEAKS)
    assert "WARNING" in text
    assert "float32 100, bfloat16 1000" in text
    assert f"{torch.get_num_threads()} threads for everybody" in text


def test_attention_and_its_decoder_are_compared():
    """Both rivals compute the same, or the section would raise; their limits count operations."""
    shape = grid.Shape(3, 2, 4, 4)
    probes = attention.decoder(("lstm", "gru", "rnn"), shape, 0.0) + attention.attention((), shape, 0.0)
    assert [p.case.mode for p in probes] == ["forward", "training"] * 4
    found = limits.of_probe("decoder", Case("lstm", "training", shape), PEAKS)
    operations = 3 * 2 * 3 * 2 * (16 * 12 + 4 * 8 + 3 * 8)
    assert found.ours == pytest.approx(operations / PEAKS.gflops["float32"] / 1e9)
    assert limits.of_probe("attention", Case("dot", "forward", shape), None) is None
    assert "times as fast" in sections.table(probes)


def test_busy_neighbours_end_with_the_block():
    with sections.neighbours(2) as started:
        assert [process.poll() for process in started] == [None, None]
    assert None not in [process.poll() for process in started]


def test_a_section_that_fails_loses_no_rows(monkeypatch):
    def fails(cells):
        raise RuntimeError("no")

    monkeypatch.setattr(sections, "SECTIONS", {"memory": fails, "scaling": lambda cells: [cells]})
    assert sections.measure(["memory", "scaling"], ("gru",)) == ([("gru",)], ["memory was not measured: no"])


def test_scaling_is_measured_again_where_torch_gains_nothing(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(sections.os, "cpu_count", lambda: 2)
    gains = {"lstm": [1.0, 1.9], "gru": [1.0, 1.1, 1.0]}
    monkeypatch.setattr(
        sections,
        "one_beside_two",
        lambda case, seconds: Probe("scaling", case, 1.1, gains[case.cell].pop(0)),
    )
    monkeypatch.setattr(sections, "MODES", ("forward",))
    probes, failed = sections.measure(["scaling"], ("lstm", "gru"))
    assert [(p.case.cell, p.theirs) for p in probes] == [("lstm", 1.9)]
    assert failed == [
        "scaling was measured in part: on two threads torch.nn gained less than 1.2 in 3 tries of "
        "gru-forward-T100-B32-I512-H512 (torch.nn's 1.00)"
    ]
    assert gains == {"lstm": [], "gru": []}


def test_threads_settle_before_a_call_of_one_beside_two_is_timed(monkeypatch):
    monkeypatch.setattr(rivals, "SETTLE", 0.0)
    monkeypatch.setattr(rivals, "WAKE", 0.0)
    threads, settled = torch.get_num_threads(), []
    settle = rivals.settle
    monkeypatch.setattr(
        rivals, "settle", lambda call: (settled.append(torch.get_num_threads()), settle(call))
    )
    probe = sections.one_beside_two(Case("gru", "forward", Shape(3, 2, 8, 8)), 0.0)
    assert min(probe.ours, probe.theirs) > 0
    assert sorted(settled) == [1] * 6 + [2] * 6
    assert torch.get_num_threads() == threads


def test_crowding_is_measured_in_both_modes(monkeypatch):
    monkeypatch.setattr(sections, "CROWDED", (Shape(3, 2, 8, 8),))
    monkeypatch.setattr(sections.os, "cpu_count", lambda: 1)
    probes = sections.crowded(("rnn",), 0.0)
    assert [p.case.mode for p in probes] == ["forward", "training"]
    assert all(min(p.ours, p.theirs) > 0 for p in probes)


@pytest.mark.parametrize(("wide", "least", "most"), [(0.0, 10, 10), (1.0, 20, 33)])
def test_a_row_of_wide_error_gets_more_rounds(wide, least, most, monkeypatch):
    """Up to three times as many seconds as were planned."""
    from fastrnn.bench import test_speed

    rng, clock = random.Random(0), [0.0]

    def timed(call):
        clock[0] += 1.0
        return 1.0 + wide * rng.random()

    class Benchmark:
        @staticmethod
        def pedantic(function, rounds):
            for _ in range(rounds):
                function()

    monkeypatch.setattr(rivals, "calls", lambda case: dict.fromkeys((rivals.OURS, rivals.TORCH)))
    monkeypatch.setattr(rivals, "check", lambda *args: wrong)
    monkeypatch.setattr(rivals, "timed", timed)
    monkeypatch.setattr(test_speed.time, "perf_counter", lambda: clock[0])
    run, wrong = records.Run(20.0, 7, 0.02), []
    test_speed.test_speed(Benchmark, CASE, run)
    wrong = [rivals.TORCH]
    test_speed.test_speed(Benchmark, CASE, run)
    found, alone = run.records
    assert least <= found.rounds <= most
    assert (found.error[rivals.TORCH] > 0.02) == bool(wide)
    assert (alone.rivals, alone.wrong) == ({}, wrong)


def test_a_figure_has_its_error_beside_it():
    goal = Goal("any", "torch.nn", 1.5, ("forward",))
    text = goals.report([outcome(goal, record(1.2, error=0.05), record(2.0, error=0.001), peaks=PEAKS)])
    assert "measured 1.2x ± 5% (2 rows" in text
    assert f"    {CASE.id}: 1.2x ± 5%; " in text
    text = goals.report([outcome(goal, record(1.2, error=0.001), peaks=PEAKS)])
    assert "±" not in text
    mean = outcome(dataclasses.replace(goal, mean=True), record(1.0, error=0.04), record(1.0, error=0.03))
    assert mean.worst.error == pytest.approx(0.025)

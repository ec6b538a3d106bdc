"""The benchmarks' report: rows, goals, comparisons, memory. None of these times anything."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import __main__ as cli

pytest.importorskip("fastrnn.bench", reason="an in-place build links it")
from fastrnn.bench import (
    attention,
    compare,
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

CASE = Case("lstm", "forward", grid.SMALL)
MACHINE = {"cpu": "a CPU", "cpus": 2, "threads": 2, "torch": "2.13.0", "unquiet": False}
NOISY = Conditions(3.0, 0.0, 0.5)
PEAKS = limits.Peaks(2, {"float32": 100.0, "bfloat16": 1000.0}, [(1 << 10, 400.0), (1 << 20, 200.0)])


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
    assert rivals.rounds(1e-6, 2.0, 11) == 200
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
    assert text[0] == "goals: 0 met, 1 not met, 0 not measured"
    assert "NOT MET" in text[1]
    assert "at least 1.5x torch.nn, measured 1.1x (3 rows; worst rnn-forward-T100-B32" in text[1]
    # 2 * 3200 * 768 * 512 = 2.52 GFLOP, and 1.2 ms of torch.nn's
    best = 1.2e-3 / (grid.flop(bad.case) / 100e9)
    assert text[3].startswith(
        f"    {bad.case.id}: 1.2x *; {best:.4g}x at its limit: 2.52 GFLOP at 100 GFLOP/s"
    )
    assert len(text) == 4
    assert "no count" in goals.report([outcome(goal, bad)])


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

    share = Goal("share", goals.PEAK, 0.5, ("forward",))
    r = record()
    peaks = [dataclasses.replace(PEAKS, gflops={"float32": k * r.gflops}) for k in (2, 2.1)]
    assert outcome(share, r, peaks=peaks[0]).met
    assert not outcome(share, r, peaks=peaks[1]).met
    assert outcome(share, r, peaks=None).met is None  # no compiler: the peak is not known


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
    assert "3.5x; 2x at its limit: with a busy neighbour" in goals.report([found["crowded"]])
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
        for mode in (grid.MODES if section != "crowded" else ["forward"])
        for shape in shapes[section]
    ]
    assert not [o.goal.text for o in goals.evaluate(rows, [], PEAKS) if o.met is None]
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


# Files


def test_a_file_comes_back(tmp_path):
    path = tmp_path / "deep" / "run.json"
    rows = [record(2.0, conditions=NOISY), record(3.0, Case("gru", "training", grid.MEDIUM, "packed"))]
    rows.append(record(case=Case("rnn", "forward", grid.SMALL, dtype="int8")))
    outcomes = goals.evaluate(rows, [], None)
    records.write_json(path, rows, MACHINE, [Probe("memory", CASE, 1, 2)], goals.as_json(outcomes))
    assert records.read_json(path) == (rows, MACHINE)

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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", memory.KINDS)
def test_inference_holds_no_copy_of_the_input(kind):
    """y takes 2 MiB, x 62: a chunk of steps of it is copied at a time, and it may lie batch first."""
    found = memory.in_a_process("fastrnn", Case("rnn", "forward", Shape(1000, 32, 512, 16), kind))
    assert found < 16 * 2**20


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
    text = report.table(rows, PEAKS)
    assert "gru-step-T1-B1-I128-H128" in text
    assert "* 1 of 2 rows were taken while others had the CPUs" in text
    assert records.means(rows) == {
        "lstm forward": {"torch.nn": pytest.approx(2)},
        "gru step": {"torch.nn": pytest.approx(3)},
    }
    about = machine.about(Conditions(), 100.0, None)
    assert "for want of a compiler" in report.describe(about, None)
    assert about["threads"] == torch.get_num_threads()
    text = report.describe(machine.about(NOISY, 100.0, PEAKS), PEAKS)
    assert "WARNING" in text
    assert "float32 100, bfloat16 1000" in text
    assert f"{torch.get_num_threads()} threads for everybody" in text


# Limits


def test_without_a_compiler_the_peaks_are_unknown(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert limits.measure(1) is None


def test_peaks_of_this_machine():
    peaks = limits.measure(1)
    if peaks is None:
        pytest.skip("no compiler")
    assert peaks.gflops["bfloat16"] >= peaks.gflops["float32"] > 0.1
    assert [size for size, _ in peaks.read] == [2**k for k in range(14, 25)]
    assert peaks.bandwidth(2**14) > 0.1


def test_bandwidth_is_that_of_somewhat_fewer_bytes():
    assert [PEAKS.bandwidth(n) for n in (1, 1 << 10, (1 << 20) - 1, 1 << 20, 1 << 30)] == [
        400,
        400,
        400,
        200,
        200,
    ]


def test_the_least_seconds():
    def bytes_of(case):
        return limits.swept_bytes(case), limits.row_bytes(case)

    # One sequence of 100: H [512, 128] at every step; x and y, 256 numbers a step.
    assert bytes_of(CASE) == (4 * 512 * 128, 4 * 100 * 256)
    # 256 KiB, half of it for each core, at 400 GB/s, and the rows; the products take less.
    seconds = (100 * 2**18 / 400 + 100 * 1024 / 400) / 1e9
    fast = dataclasses.replace(PEAKS, gflops={"float32": 1e6})
    assert limits.of(CASE, fast).ours == pytest.approx(seconds)
    assert limits.of(CASE, PEAKS).ours == pytest.approx(grid.flop(CASE) / 100e9)
    assert limits.of(CASE, PEAKS).count.startswith(
        "26.2 MFLOP at 100 GFLOP/s, 262 us; 100 x 0.25 MiB of weights"
    )


def test_bytes_of_every_kind():
    shape = Shape(10, 2, 3, 4)
    step = Case("gru", "step", Shape(1, 1, 3, 4))
    assert limits.swept_bytes(step) == 4 * 12 * (3 + 4)
    assert limits.swept_bytes(Case("lstm", "forward", shape, "projection")) == 4 * (16 * 2 + 2 * 4)
    assert limits.swept_bytes(Case("rnn", "forward", shape, dtype="int8")) == 16
    assert limits.row_bytes(Case("rnn", "forward", shape, "bidirectional")) == 4 * 20 * (3 + 8)
    # x y; gates and c, and their gradients, out and in; x y; dx
    assert limits.row_bytes(Case("lstm", "training", shape)) == 4 * 20 * (7 + 2 * 4 * (5 + 4) + 7 + 3)
    count = limits.of(Case("rnn", "training", shape, "bidirectional"), PEAKS).count
    assert "; 40 x " in count  # steps, directions, there and back
    # int8's products have no measured peak: bytes alone
    assert "FLOP" not in limits.of(Case("rnn", "forward", shape, dtype="int8"), PEAKS).count


def test_the_least_memory():
    shape = Shape(1000, 32, 512, 512)
    unit = 4 * 1000 * 32 * 512
    assert limits.of_memory(Case("lstm", "forward", shape)).ours == unit
    found = limits.of_memory(Case("gru", "training", shape))
    assert found.ours == unit * 6 + 4 * 3 * 512 * (1024 + 2)
    assert found.count == "y 62.5 MiB + saved 250 MiB + dx 62.5 MiB + gradients of weights 6.01 MiB"


def test_prefixes():
    assert [limits.si(x) for x in (1.25e-3, 2.5e-8, 3, 8.05e10)] == ["1.25 m", "25 n", "3 ", "80.5 G"]


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

"""The directions of what the benchmark's sections state, and which rows a goal is of."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch
from measured import MACHINE, NOISY, PEAKS, record

from fastrnn import bench
from fastrnn.bench import (
    attention,
    compare,
    goals,
    gpu,
    grid,
    limits,
    machine,
    records,
    rivals,
    sections,
    trees,
)
from fastrnn.bench.goals import Goal
from fastrnn.bench.grid import Case, Shape
from fastrnn.bench.records import Record, median_error, standard_error

TINY = Shape(3, 2, 8, 8)
OURS, THEIRS = [1.0, 2.0, 3.0, 2.0], [7.0, 8.0, 9.0, 8.0]  # seconds, round by round


def alternating(monkeypatch, *given):
    """Samples that are given, one call after the other, in the place of those that would be taken."""
    left = list(given)
    monkeypatch.setattr(rivals, "alternate", lambda *args: left.pop(0))


def test_crowding_is_loaded_over_quiet(monkeypatch):
    monkeypatch.setattr(sections, "CROWDED", (TINY,))
    monkeypatch.setattr(sections, "MODES", ("forward",))
    monkeypatch.setattr(sections, "neighbours", contextlib.nullcontext)
    quiet = {rivals.OURS: OURS, rivals.TORCH: THEIRS}
    loaded = {rivals.OURS: [3.0, 6.0, 9.0, 6.0], rivals.TORCH: [4 * s for s in THEIRS]}
    alternating(monkeypatch, quiet, loaded)
    (probe,) = sections.crowded(("rnn",), 0.0)
    assert (probe.ours, probe.theirs) == (3.0, 4.0)
    assert probe.error == math.hypot(median_error(OURS), median_error(loaded[rivals.OURS])) > 0


def test_scaling_is_one_thread_over_two(monkeypatch):
    samples = {
        (rivals.OURS, 1): [4.0, 4.0, 5.0, 4.0],
        (rivals.OURS, 2): OURS,
        (rivals.TORCH, 1): [3 * s for s in THEIRS],
        (rivals.TORCH, 2): THEIRS,
    }
    alternating(monkeypatch, samples)
    probe = sections.one_beside_two(Case("gru", "forward", TINY), 0.0)
    assert (probe.ours, probe.theirs) == (2.0, 3.0)
    assert probe.error == standard_error(samples[rivals.OURS, 1], OURS) > 0


def test_attention_and_decoders_are_seconds_of_each(monkeypatch):
    alternating(monkeypatch, *[{rivals.OURS: OURS, rivals.TORCH: THEIRS}] * 4)
    probes = attention.decoder(("gru",), TINY, 0.0) + attention.attention((), TINY, 0.0)
    assert [(p.ours, p.theirs) for p in probes] == [(2.0, 8.0)] * 4
    assert {p.error for p in probes} == {standard_error(THEIRS, OURS)}


def test_trees_are_the_recursions_time_over_ours(monkeypatch):
    monkeypatch.setattr(trees, "SHAPE", Shape(5, 2, 4, 4))
    alternating(monkeypatch, *[{rivals.OURS: OURS, trees.RECURSION: THEIRS}] * 2)
    probes = trees.measure(("rnn",), 0.0)
    assert [(p.ours, p.theirs) for p in probes] == [(4.0, 1.0)] * 2


@pytest.mark.parametrize(
    ("B", "H", "mode", "cell", "inside"),
    [
        (2, 16, "forward", "gru", True),
        (4, 32, "forward", "gru", True),
        (1, 16, "forward", "gru", False),
        (5, 16, "forward", "gru", False),
        (2, 15, "forward", "gru", False),
        (2, 33, "forward", "gru", False),
        (2, 16, "training", "gru", False),
        (2, 16, "forward", "lstm", False),
    ],
)
def test_a_goal_is_of_rows_within_its_bounds(B, H, mode, cell, inside):
    goal = goals.Goal("", rivals.TORCH, 1.0, ("forward",), ("gru",), B=(2, 4), H=(16, 32))
    row = Record(Case(cell, mode, Shape(3, B, H, H)), 3, 1.0, {rivals.TORCH: 1.0})
    assert goal.concerns(row) is inside


def test_an_error_of_rounds_that_hang_together():
    """Of a machine that is slow for a while they say less than as many that know nothing of each other."""
    together = [1.0] * 40 + [2.0] * 40 + [1.0] * 40 + [2.0] * 40
    apart = [1.0, 2.0] * 80
    steady = [1.0] * 160
    assert standard_error(together, steady) > 1.5 * standard_error(apart, steady)


def test_an_interrupted_run_writes_nothing(monkeypatch, tmp_path):
    """Ctrl-C among the rows ends it all: what was measured till then is no run."""
    monkeypatch.setattr(pytest, "main", lambda *args: pytest.ExitCode.INTERRUPTED)
    for name in ("product_peak", "least_calls", "least_layers"):
        monkeypatch.setattr(machine, name, lambda: None)
    monkeypatch.setattr(limits, "measure", lambda *args: None)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--quick", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")])
    assert not list(tmp_path.iterdir())


def test_a_gpus_case_that_fails_loses_no_rows(monkeypatch, tmp_path, capsys):
    taken = []

    def measure(case, device, graphs):
        taken.append(case)
        if len(taken) == 2:
            raise RuntimeError("no room")
        cell, dtype, T, B, H = case
        return [gpu.Row(cell, "forward", dtype, T, B, H, 1.0, 2.0, 0.0, None, "")]

    monkeypatch.setattr(gpu, "measure", measure)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--device", "cpu", "--json", str(path)]) == 1
    written = json.loads(path.read_text())
    assert len(taken) > 2
    assert len(written["rows"]) == len(taken) - 1
    assert written["failed"] == [f"{taken[1]}: RuntimeError: no room"]
    assert written["failed"][0] in capsys.readouterr().out


def test_slower_is_as_far_as_faster():
    """1.22 times as slow is as far as 1.22 times as fast, though it is -18 %."""
    earlier = [record(1.0, error=0.05)]
    assert 0.2 < compare.noise(*earlier, *earlier) < 0.22
    for ratio, told in ((1.22, "0 slower, 1 faster"), (0.82, "1 slower, 0 faster"), (0.84, "1 within")):
        assert told in compare.compare(earlier, MACHINE, [record(ratio, error=0.05)], MACHINE)


def test_operations_of_attention():
    shape = Shape(3, 2, 4, 4)
    forward, training = (
        limits.of_probe("attention", Case("dot", mode, shape), PEAKS).ours for mode in grid.MODES
    )
    assert forward == pytest.approx(2 * 2 * (2 * 3 * 3 * 4) / 100e9)  # two products
    assert training == pytest.approx(7 / 2 * forward)


def test_a_section_that_failed_is_an_exit_code(monkeypatch, tmp_path, capsys):
    pytest.importorskip("pytest_benchmark")

    def fails(cells):
        raise RuntimeError("no room")

    monkeypatch.setattr(machine, "product_peak", lambda: 100.0)
    for name in ("least_calls", "least_layers"):
        monkeypatch.setattr(machine, name, dict)
    monkeypatch.setattr(limits, "measure", lambda *args: None)
    monkeypatch.setattr(bench, "measure_rows", lambda cases, run: run.records.append(record()) or 0)
    monkeypatch.setattr(sections, "SECTIONS", {"memory": fails})
    options = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    assert bench.main(options) == 1
    assert "memory was not measured: no room" in capsys.readouterr().out
    assert len(records.read_json(tmp_path / "b.json")[0]) == 1
    assert bench.main([*options, "--skip", "memory", "--compare", str(tmp_path / "b.json")]) == 0
    assert "1 within the noise" in capsys.readouterr().out


def test_a_mean_with_one_unquiet_row_is_unquiet():
    goal = Goal("mean", "torch.nn", 1.0, ("forward",), mean=True)
    found = goals.outcome(goal, [record(2.0), record(2.0, conditions=NOISY)], None)
    assert found.worst.unquiet
    assert goals.report([found]).endswith("*")


def test_an_earlier_run_that_was_unquiet_is_marked():
    text = compare.compare([record(2.0, conditions=NOISY)], MACHINE, [record(4.0)], MACHINE)
    assert text.endswith(" *")


def test_one_core_has_no_scaling(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(sections.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(sections, "one_beside_two", lambda *args: pytest.fail("there is one core"))
    assert sections.scaling(("gru",)) == []


def test_packing_of_few_sequences_and_the_call_of_last():
    def found(mode, cell, B):
        parts = limits.parts(Case(cell, mode, Shape(10, B, 32, 64)), PEAKS, limits.Way(1, 1, 2))
        return {p.name: p.seconds for p in parts}

    assert found("forward", "lstm", 4)["packing"] == pytest.approx(4 * 256 * 32 / 50e9)
    assert found("forward", "lstm", 5)["packing"] == pytest.approx(4 * 256 * (32 + 64) / 50e9)
    assert found("last", "gru", 8)["a module's call"] == 4e-5

"""What the benchmarks count that a row must take, and the peaks behind it. None of these times a row."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
import torch

from fastrnn import kernels

pytest.importorskip("fastrnn.bench", reason="an in-place build links it")
from measured import CASE, FREE, PEAKS, SWEEPS

from fastrnn.bench import grid, limits, machine
from fastrnn.bench.grid import Case, Shape


def test_without_a_compiler_the_peaks_are_unknown(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert limits.measure(1) is None


needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "g++") is None,
    reason="peaks.cpp is compiled: there is no C++ compiler",
)


@needs_a_compiler
def test_peaks_of_this_machine():
    peaks = limits.measure(1)
    assert peaks is not None
    assert peaks.gflops["bfloat16"] >= peaks.gflops["float32"] > 0.1
    assert peaks.activations["bfloat16"] >= peaks.activations["float32"] > 0.001
    for sweeps, most in ((peaks.read, 26), (peaks.dot, 24)):
        assert [size for size, _ in sweeps] == [2**k for k in range(14, most + 1)]
        assert limits.bandwidth(sweeps, 2**14) > 0.1
    assert peaks.copy > 0.1
    assert peaks.meet == 0  # one thread waits for none
    assert 0 <= peaks.wake < 1e-3
    assert peaks.call == peaks.ours == {}


@needs_a_compiler
def test_a_meeting_of_two_takes_time():
    peaks = limits.measure(2)
    assert peaks is not None
    assert 1e-9 < peaks.meet < 0.1


def test_the_least_calls():
    least, ours = machine.least_calls(), machine.least_layers()
    assert set(least) == {"forward", "step", "training"}
    assert set(ours) == {f"{cell} {mode}" for cell in grid.GATES for mode in least}
    assert all(0 < least[name.split()[1]] < seconds < 1 for name, seconds in ours.items())


def test_bandwidth_is_that_of_somewhat_fewer_bytes():
    sizes = (1, 1 << 10, (1 << 20) - 1, 1 << 20, 1 << 30)
    assert [limits.bandwidth(SWEEPS, n) for n in sizes] == [400, 400, 400, 200, 200]


def test_the_ways_to_share_a_call_out():
    def found(case, threads):
        return [tuple(way) for way in limits.ways(case, threads)]

    one, many = Shape(9, 1, 4, 4), Shape(9, 8, 4, 4)
    assert found(Case("gru", "forward", one), 1) == [(1, 1, 1)]
    assert found(Case("gru", "forward", one), 2) == [(1, 1, 1), (1, 1, 2)]
    assert found(Case("gru", "forward", many), 4) == [(1, 1, 1), (1, 1, 4), (1, 2, 2), (1, 4, 1)]
    assert found(Case("gru", "forward", one, "bidirectional"), 2) == [(1, 1, 1), (1, 1, 2), (2, 1, 1)]
    assert found(Case("gru", "forward", one, "two layers"), 3) == [(1, 1, 1), (1, 1, 3)]


def test_the_least_seconds_of_products():
    # One sequence of 100: R [512, 128] at every step; x and y, 256 numbers a step.
    assert (limits.swept(CASE), limits.row_bytes(CASE)) == (512 * 128, 4 * 100 * 256)
    two = limits.Way(1, 1, 2)
    # 256 KiB, half of it for each core at its 200 GB/s; W's operations come after.
    reading, half = 100 * 2**17 / 200e9, grid.flop(CASE) / 2
    fast = dataclasses.replace(PEAKS, gflops={"float32": 1e4})
    part = limits.products(CASE, fast, two)
    assert part.seconds == pytest.approx(reading + half / 1e13)
    assert part.count == ("100 x 0.125 MiB of weights at 200 GB/s a core in the scan, 13.1 MFLOP beside it")
    part = limits.products(CASE, PEAKS, two)
    assert part.seconds == pytest.approx(2 * half / 100e9)
    assert part.text.startswith("products 262 us (13.1 MFLOP at 100 GFLOP/s in the scan")
    # One thread has half of the peaks.
    assert limits.products(CASE, PEAKS, limits.Way(1, 1, 1)).seconds == pytest.approx(4 * half / 100e9)
    # Rows of a core read all of R, which directions side by side do in half of the sweeps.
    rows = dataclasses.replace(CASE, shape=Shape(100, 2, 128, 128))
    assert limits.products(rows, fast, limits.Way(1, 2, 1)).seconds == pytest.approx(2 * reading, rel=0.05)
    both = dataclasses.replace(CASE, kind="bidirectional")
    assert limits.products(both, fast, limits.Way(2, 1, 1)).seconds == pytest.approx(2 * reading, rel=0.05)
    assert limits.products(both, fast, two).seconds == pytest.approx(2 * reading, rel=0.05)
    slow = dataclasses.replace(fast, read=[(1, 1.0)])
    assert limits.products(CASE, slow, two) == ("rows", pytest.approx(102400 / 1e9), "0.0977 MiB at 1 GB/s")


def test_every_part_of_a_count():
    def found(case, way=(1, 1, 2)):
        return {p.name: pytest.approx(p.seconds) for p in limits.parts(case, PEAKS, limits.Way(*way))[1:]}

    # 5 functions of each unit; W alone is packed of a call of one sequence.
    assert found(CASE) == {
        "gates": 100 * 128 * 5 / 10e9,
        "meetings": 100e-6,
        "waking threads": 2e-6,
        "packing": 4 * 512 * 128 / 50e9,
        "a module's call": 5e-6,
    }
    assert found(CASE, (1, 1, 1)) == {
        "gates": 100 * 128 * 5 / 5e9,
        "packing": 4 * 512 * 128 / 25e9,
        "a module's call": 5e-6,
    }
    shape = Shape(10, 8, 32, 64)
    training = Case("lstm", "training", shape, "projection")
    assert found(training) == {
        "gates": 80 * 64 * 6 / 10e9,
        "meetings": 10 * 2 * 2 * 1e-6,
        "waking threads": 4e-6,
        "packing": 2 * 4 * (256 * (32 + 32) + 32 * 64) / 50e9,
        "a module's call": 4e-5,
    }
    half = Case("gru", "forward", shape, dtype="bfloat16")
    pairs = dataclasses.replace(PEAKS, gflops={"float32": 100.0, "bfloat16": 200.0})
    assert limits.parts(half, pairs, limits.Way(1, 1, 2))[1][:2] == ("gates", 80 * 64 * 3 / 20e9)
    # By tiles they come at once with products: the longer counts.
    assert "gates" not in found(half)
    slow = dataclasses.replace(PEAKS, activations={"float32": 1e-3, "bfloat16": 1e-3})
    assert limits.parts(half, slow, limits.Way(1, 1, 2))[0][:2] == ("gates", pytest.approx(80 * 64 * 3 / 1e6))
    assert "packing" not in found(Case("gru", "step", grid.STEPS[0]))
    assert "packing" not in found(Case("gru", "forward", shape, dtype="int8"))
    assert "meetings" not in found(Case("gru", "training", shape, "bidirectional"), (2, 1, 1))
    assert found(Case("gru", "training", shape, "two layers"))["meetings"] == 10 * 2 * 2 * 1e-6
    four = dataclasses.replace(PEAKS, threads=4)
    group = limits.parts(CASE, four, limits.Way(1, 2, 2))[2]
    assert group == ("meetings", pytest.approx(100 * 0.5e-6), "100 of 500 ns")


def test_a_count_and_its_rest():
    limit = limits.of(CASE, PEAKS)
    # A meeting of 1 us a step is worth half of the time.
    assert limit.ours == pytest.approx(sum(p.seconds for p in limits.parts(CASE, PEAKS, limits.Way(1, 1, 2))))
    text = limit.explain(1e-3)
    assert text.startswith(f"measured 1 ms, counted {limits.si(limit.ours)}s: 2 threads, products 262 us (")
    assert " + meetings 100 us (100 of 1 us) + the other parts " in text
    rest = 1e-3 - limit.ours
    assert text.endswith(f"; the rest {limits.si(rest)}s, {rest / 1e-3:.0%}")
    assert "; LESS than was counted: a peak or the row was disturbed; the rest -" in limit.explain(1e-5)
    lonely = dataclasses.replace(PEAKS, meet=1e-3)
    assert limits.of(CASE, lonely).count.startswith("1 thread, products 524 us (")
    step = limits.of(Case("lstm", "step", grid.STEPS[0]), PEAKS)
    # Of its 9 us a module's 3 are counted.
    assert "; our call's own part 6 us; the rest " in step.explain(3e-5)
    assert limits.Limit(2**20, "y 1 MiB", "B").explain(3 * 2**20) == (
        "measured 3 MiB, counted 1 MiB: y 1 MiB; the rest 2 MiB, 67%"
    )


def test_bytes_of_every_kind():
    shape = Shape(10, 2, 3, 4)
    step = Case("gru", "step", Shape(1, 1, 3, 4))
    assert limits.swept(step) == 12 * (3 + 4)
    assert limits.swept(Case("lstm", "forward", shape, "projection")) == 16 * 2 + 2 * 4
    assert limits.row_bytes(Case("rnn", "forward", shape, "bidirectional")) == 4 * 20 * (3 + 8)
    # x y; gates and c, and their gradients, out and in; x y; dx
    assert limits.row_bytes(Case("lstm", "training", shape)) == 4 * 20 * (7 + 2 * 4 * (5 + 4) + 7 + 3)
    # Of bfloat16 gates and c are kept in float32.
    half = dataclasses.replace(Case("lstm", "training", shape), dtype="bfloat16")
    assert limits.row_bytes(half) == 20 * (2 * (7 + 7 + 3) + 2 * 4 * (4 * 5 + 2 * 4))
    assert limits.row_bytes(dataclasses.replace(half, mode="forward")) == 20 * 2 * 7
    assert limits.row_bytes(Case("rnn", "forward", shape, dtype="int8")) == 20 * 4 * 7
    one, near = limits.Way(1, 1, 1), dataclasses.replace(FREE, gflops={"float32": 1e9}, read=[(1, 1e9)])
    count = limits.products(Case("rnn", "training", shape, "bidirectional"), near, one).count
    assert count.startswith("40 x 6.1e-05 MiB")  # steps, directions, there and back
    # int8's products have no measured peak: bytes alone
    assert limits.products(Case("rnn", "forward", shape, dtype="int8"), near, one).count == (
        "10 x 1.53e-05 MiB of weights at 200 GB/s a core"
    )


def test_the_least_memory():
    shape = Shape(1000, 32, 512, 512)
    unit = 4 * 1000 * 32 * 512
    assert limits.of_memory(Case("lstm", "forward", shape)).ours == unit
    found = limits.of_memory(Case("gru", "training", shape))
    assert found.ours == unit * 6 + 4 * 3 * 512 * (1024 + 2)
    assert found.count == "y 62.5 MiB + saved 250 MiB + dx 62.5 MiB + gradients of weights 6.01 MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", limits.SAVED)
def test_what_is_saved_is_float32(cell, dtype):
    T, B, I, H = 3, 2, 4, 8
    name, states = {"rnn": "rnn_tanh"}.get(cell, cell), 2 if cell == "lstm" else 1
    G = grid.GATES[cell]
    params = [torch.zeros(G * H, width, dtype=dtype) for width in (I, H)]
    x, firsts = torch.zeros(T, B, I, dtype=dtype), [torch.zeros(1, B, H, dtype=dtype)] * states
    kept = kernels.call(kernels.Inputs(name, x, firsts, params, None, None, None), True, False)
    tensors = [*kept.seq, *kept.saved]
    assert sum(t.nbytes for t in tensors) == 4 * limits.SAVED[cell] * T * B * H


def test_prefixes():
    found = [limits.si(x) for x in (1.25e-3, 2.5e-8, 3, 8.05e10, 0, -2e-6)]
    assert found == ["1.25 m", "25 n", "3 ", "80.5 G", "0 ", "-2 u"]

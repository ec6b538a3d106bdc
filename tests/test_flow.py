"""What `fastrnn.diagnostics` says and draws of the gradient's flow."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from helpers import F64, randn

import fastrnn
from fastrnn import diagnostics, flow
from fastrnn.diagnostics import gradient_flow

T, B, I, H = 7, 3, 4, 5


def build(kind, **options):
    torch.manual_seed(3)
    return getattr(fastrnn, kind)(I, H, dtype=F64, **options)


def of_rate(rate, steps=100, dtype=F64):
    """h' = rate * h, positive."""
    layer = fastrnn.RNN(1, 2, nonlinearity="relu", bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1.0)
        layer.weight_hh_l0.copy_(rate * torch.eye(2, dtype=dtype))
    return gradient_flow(layer, torch.rand(steps, 1, 1, dtype=dtype))


@pytest.mark.parametrize(
    ("rate", "steps", "parts"),
    [
        (
            0.8,
            100,
            ("vanish", "falls by 20 % a step over 99 steps", "a tenth after 11", "a thousandth after 31"),
        ),
        (0.985, 100, ("vanish", "falls by 1.5 % a step", "a thousandth after 457 at that rate")),
        (
            1.2,
            100,
            ("explode", "grows by 20 % a step over 99 steps", "to 6.9e+07 times", "tenfold every 13 steps"),
        ),
        (40.0, 4, ("explode", "grows 40-fold a step over 3 steps")),
        (1.0, 100, ("steady", "over 99 steps, to 1 times its size")),
        (1.001, 300, ("steady", "+0.1 % a step")),
        (0.995, 1000, ("vanish", "falls by 0.5 % a step")),
        (0.7, 2, ("steady",)),
        (0.4, 2, ("vanish", "falls by 60 % a step over 1 step")),
        (0.5, 1, ("single step",)),
        (0.0, 5, ("vanish at once", "0 from 1 step back on")),
    ],
)
def test_summary(rate, steps, parts):
    found = of_rate(rate, steps)
    assert found.verdict in (parts[0].split()[0], "start")
    if steps > 1 and rate:
        assert found.rate == pytest.approx(rate, rel=1e-9)
    text = found.summary()
    assert text.startswith("RNN: ")
    assert text.endswith(".")
    assert "\n" not in text
    for part in parts:
        assert part in text
    assert text in repr(found)


def test_summary_of_underflow_and_overflow():
    gone = of_rate(0.2, 200, torch.float32)
    assert gone.verdict == "vanish"
    assert gone.rate == pytest.approx(0.2, rel=1e-3)  # numbers that have lost their digits do not count
    assert "is below the smallest normal number from 55 steps back on" in gone.summary()
    over = gradient_flow_of_overflow()
    assert over.verdict == "explode"
    assert over.rate == pytest.approx(4.0, rel=1e-3)
    assert "is not finite from 64 steps back on" in over.summary()


def test_a_fall_that_ends_in_what_is_no_number():
    layer, x = build("GRU"), randn(30, 1, I)
    reset = torch.zeros(30, 1, dtype=torch.bool)
    reset[11] = True
    x[3] = math.inf  # which makes the states up to the reset NaN
    found = gradient_flow(layer, x, reset=reset)
    assert found.verdict == "explode"
    assert 0 < found.rate < 1
    assert "is not finite from 20 steps back on" in found.summary()
    assert "grows" not in found.summary()


def gradient_flow_of_overflow():
    layer = fastrnn.RNN(1, 2, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(4 * torch.eye(2))
    return gradient_flow(layer, torch.zeros(100, 1, 1), torch.full((1, 1, 2), 1e-35))


def test_summary_where_nothing_arrives():
    layer = build("GRU", bidirectional=True)
    forward, reverse = gradient_flow(layer, randn(T, B, I))
    assert forward.verdict == "vanish"
    assert reverse.verdict == "start"
    assert "reads this direction only at the step with which it begins" in reverse.summary()
    assert reverse.summary().startswith("GRU, reverse: ")
    middle = gradient_flow(build("GRU"), randn(T, B, I), loss=lambda o: o[4].sum())
    assert (middle.origin, middle.verdict) == ((4, False), "vanish")
    assert "over 4 steps" in middle.summary()
    ends = gradient_flow(layer, randn(T, B, I), loss=lambda o: o[-1, :, :H].sum() + o[0, :, H:].sum())
    assert [one.verdict for one in ends] == ["vanish", "vanish"]
    assert [one.origin for one in ends] == [(T - 1, False), (0, True)]
    # The last output reads the layer below at all steps, in reverse too: less the farther it lies back.
    for n, one in enumerate(gradient_flow(build("GRU", num_layers=2, bidirectional=True), randn(40, B, I))):
        assert (one.origin, one.verdict) == ((39, False), "vanish" if n < 3 else "start")
    none = gradient_flow(layer, randn(T, B, I), loss=lambda o: (o * 0).sum())
    assert [one.verdict for one in none] == ["none", "none"]
    assert "no gradient" in none[0].summary()
    empty = gradient_flow(build("LSTM"), randn(T, 2, I), lengths=torch.tensor([0, 0]))
    assert empty.verdict == "none"
    assert bool(empty.singular_values.isnan().all())


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_plot(kind, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "flow.png"
    layer, x = build(kind, bidirectional=True), randn(T, B, I)
    flows = gradient_flow(layer, x)
    flows[0].plot(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "singular_values" not in vars(flows[0])  # a picture takes some of them alone
    diagnostics.plot(flows, tmp_path / "all.svg")
    assert "<svg" in (tmp_path / "all.svg").read_text()
    for odd in (x[:1], x[:2] * math.nan):
        gradient_flow(layer, odd)[0].plot(str(path))
    with pytest.raises(OSError, match="none"):
        flows[0].plot(tmp_path / "none" / "flow.png")
    with pytest.raises(ValueError, match="no flow"):
        diagnostics.plot([], path)


def test_the_drawn_spectrum_is_of_the_singular_values(monkeypatch):
    lengths = torch.tensor([T, 3, 5])
    for one in gradient_flow(build("LSTM", bidirectional=True), randn(T, B, I), lengths=lengths):
        drawn, total = one._spectrum()
        assert drawn.shape == (total, 2 * H)
        values = one.singular_values
        assert total == 6 + 2 + 4
        torch.testing.assert_close(
            drawn.sort(0)[0], values[~values.isnan().any(-1)].sort(0)[0], rtol=1e-10, atol=1e-13
        )
        torch.testing.assert_close(one._spectrum()[0], drawn, rtol=1e-10, atol=1e-13)
    monkeypatch.setattr(flow, "_DRAWN", 4)
    some, total = gradient_flow(build("GRU"), randn(T, B, I))._spectrum()
    assert (some.shape, total) == ((4, H), 18)


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install fastrnn\[lm\]"):
        of_rate(0.5).plot(tmp_path / "flow.png")

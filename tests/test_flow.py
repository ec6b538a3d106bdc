"""What `fastrnn.diagnostics` says and draws of the gradient's flow."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from helpers import F64, randn
from torch.nn.utils.rnn import pack_padded_sequence

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
            (
                "vanish",
                "falls by 20 % a step on average over 99 steps",
                "a tenth after 11",
                "a thousandth after 31",
            ),
        ),
        (0.985, 100, ("vanish", "falls by 1.5 % a step", "a thousandth after 457 at that rate")),
        (
            1.2,
            100,
            (
                "explode",
                "grows by 20 % a step on average over 99 steps",
                "to 6.9e+07 times",
                "tenfold every 13 steps",
            ),
        ),
        (40.0, 4, ("explode", "grows 40-fold a step on average over 3 steps, to 6.4e+04 times")),
        (1.0, 100, ("steady", "+0 % a step on average over 99 steps, to 1 times its size")),
        (1.001, 300, ("steady", "+0.1 % a step")),
        (0.995, 1000, ("vanish", "falls by 0.5 % a step")),
        (0.7, 2, ("steady",)),
        (0.4, 2, ("vanish", "falls by 60 % a step on average over 1 step")),
        (0.5, 1, ("start", "single step")),
        (0.0, 5, ("vanish at once", "0 from 1 step back on")),
    ],
)
def test_summary(rate, steps, parts):
    found = of_rate(rate, steps)
    assert found.verdict == parts[0].split()[0]
    if steps > 1 and rate:
        assert found.rate == pytest.approx(rate, rel=1e-9)
    text = found.summary()
    assert text.startswith("RNN: ")
    assert text.endswith(".")
    assert "\n" not in text
    for part in parts[found.verdict == "start" :]:
        assert part in text
    assert text in repr(found)


def test_summary_of_underflow_and_overflow():
    gone = of_rate(0.2, 200, torch.float32)
    assert gone.verdict == "vanish"
    assert gone.rate == pytest.approx(0.2, rel=1e-3)  # numbers that have lost their digits do not count
    assert "is too small for float32 from 55 steps back on" in gone.summary()
    # In float64 all of them are there, though their squares are not.
    whole = of_rate(0.2, 400)
    assert whole.rate == pytest.approx(0.2, rel=1e-9)
    assert "over 399 steps" in whole.summary()
    # A reset cuts the gradient off.
    reset = torch.arange(30)[:, None] == 20
    layer = build("RNN")
    assert (
        gradient_flow(layer, randn(30, 1, I), reset=reset).summary().endswith("is 0 from 10 steps back on.")
    )
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
    assert found.verdict == "nan"
    assert "the forward pass itself is not finite, from step 3 on" in found.summary()
    both = gradient_flow(build("LSTM", bidirectional=True), x, loss=lambda o: o[0, :, H:].sum())
    assert "the forward pass itself is not finite, from step 3 on" in both[1].summary()


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0", "bias_hh_l0"])
def test_weights_that_are_no_numbers(name):
    layer = build("LSTM")
    with torch.no_grad():
        getattr(layer, name)[0] = math.nan
    found = gradient_flow(layer, randn(T, B, I))
    assert found.verdict == "nan"
    assert "the forward pass itself is not finite, from step 0 on" in found.summary()


def test_a_loss_that_is_no_number():
    found = gradient_flow(build("GRU"), randn(T, B, I), loss=lambda o: o[-1].sum() * math.nan)
    assert found.verdict == "nan"
    assert "the loss's gradient by the layer's output is not finite" in found.summary()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_padded_batch_has_its_members_rate(kind):
    """Lags count from each sequence's own end, and a sequence that ends is no fall."""
    layer, rows = build(kind, num_layers=2), torch.tensor([40, 0, 7, 31, 2])
    one = randn(60, 1, I)
    x = torch.zeros(60, 5, I, dtype=F64)
    for b, n in enumerate(rows.tolist()):
        x[:n, b] = one[60 - n :, 0]  # the same end in each: by the states before, much the same gradients
    padded, alone = gradient_flow(layer, x, lengths=rows), gradient_flow(layer, x[:40, :1])
    packed = gradient_flow(layer, pack_padded_sequence(x[:, [0, 2, 3, 4]], rows[[0, 2, 3, 4]], False, False))
    for found, same, want in zip(padded, packed, alone, strict=True):
        assert found.verdict == "vanish"
        assert found.origin == (39, False)
        assert found.rate == pytest.approx(want.rate, rel=0.01)
        assert same.rate == pytest.approx(found.rate, rel=1e-9)
        assert "over 39 steps" in found.summary()
    # In reverse each begins at its end, and goes on to it.
    both = build(kind, bidirectional=True)
    forward, reverse = gradient_flow(both, x, lengths=rows)
    assert (forward.verdict, reverse.verdict) == ("vanish", "start")
    assert forward.origin == reverse.origin == (39, False)
    reverse = gradient_flow(both, x, lengths=rows, loss=lambda o: o[0, :, H:].sum())[1]
    assert reverse.origin == (0, True)
    want = gradient_flow(both, x[:40, :1], loss=lambda o: o[0, :, H:].sum())[1]
    assert reverse.rate == pytest.approx(want.rate, rel=0.05)


def test_a_steady_padded_batch_is_steady():
    layer = fastrnn.RNN(1, 2, nonlinearity="relu", bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1.0)
        layer.weight_hh_l0.copy_(torch.eye(2))
    lengths = torch.tensor([200, 0, 7, 31, 5, 100, 64, 2])
    found = gradient_flow(layer, torch.rand(200, 8, 1, dtype=F64), lengths=lengths)
    assert (found.verdict, found.rate) == ("steady", pytest.approx(1, rel=1e-12))
    torch.testing.assert_close(found._by_lag(found._s), torch.full((200,), math.sqrt(14), dtype=F64))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_loss_of_many_steps_has_no_rate(kind):
    x = randn(T, B, I)
    for loss, steps in ((lambda o: o.square().mean(), T), (lambda o: o[-2:].sum(), 2)):
        for found in gradient_flow(build(kind, num_layers=2), x, loss=loss):
            assert found.verdict == "mixed"
            assert math.isnan(found.rate)
            assert f"the loss reads {steps} steps" in found.summary()
            assert "let loss= read one step" in found.summary()
    # Each half reads one step, the layer below both.
    layer = build(kind, num_layers=2, bidirectional=True)
    ends = gradient_flow(layer, x, loss=lambda o: o[-1, :, :H].sum() + o[0, :, H:].sum())
    assert [one.verdict for one in ends] == ["mixed", "mixed", "vanish", "vanish"]


def test_the_lstm_is_judged_by_its_whole_state():
    """With chrono biases c holds the gradient, and h hardly any of it."""
    layer = fastrnn.init.chrono_(fastrnn.init.orthogonal_(build("LSTM")), 200)
    found = gradient_flow(layer, randn(200, B, I))
    whole = (found.norms.square() + found.norms_c.square()).sqrt()
    torch.testing.assert_close(found.norms_state, whole)
    assert found.rate == pytest.approx(float(whole[0] / whole[-1]) ** (1 / 199), rel=1e-9)
    assert found.norms[0] / found.norms[-1] < 0.01 < found.norms_state[0] / found.norms_state[-1]
    assert "||dL/d(h, c)||" in found.summary()
    gru = gradient_flow(build("GRU"), randn(T, B, I))
    assert gru.norms_state is gru.norms


def test_training_may_go_on_before_the_jacobians_are_made():
    layer, x = build("LSTM", proj_size=2), randn(T, B, I)
    want, found = gradient_flow(layer, x).singular_values, gradient_flow(layer, x)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(3)
    torch.testing.assert_close(found.singular_values, want, rtol=0, atol=0)


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
    # The reverse direction above goes on from step 0, and the layer below with it, forward too.
    deep = build("GRU", num_layers=2, bidirectional=True)
    below = gradient_flow(deep, randn(40, B, I), loss=lambda o: o[0, :, H:].sum())[0]
    assert (below.origin, below.verdict) == ((0, True), "vanish")
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
        for one in gradient_flow(layer, odd):
            one.plot(str(path))
            assert one.singular_values.shape[0] == len(odd) - 1
            one.plot(str(path))  # of the values that are there now
    flows[0].plot(tmp_path / "new" / "folder" / "flow.png")
    assert (tmp_path / "new" / "folder" / "flow.png").exists()
    with pytest.raises(OSError, match=r"flow\.png"):  # a file is no folder
        flows[0].plot(path / "flow.png")
    with pytest.raises(ValueError, match=r"path must end in one of .*\.png, .*got .*flow\.abc"):
        flows[0].plot(tmp_path / "other" / "flow.abc")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="no flow"):
        diagnostics.plot([], path)


def axes_of():
    return pytest.importorskip("matplotlib.figure").Figure().subplots()


def lines_of(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_the_drawn_norms_are_by_lag():
    axes, found = axes_of(), of_rate(0.5, 12)
    flow._draw_norms(axes, found)
    lines = lines_of(axes)
    assert len(lines) == 2
    lags, values = lines[r"$\|\partial L/\partial h_k\|$"]
    assert [int(lag) for lag in lags] == list(range(12))
    assert values == pytest.approx([math.sqrt(2) * 0.5**lag for lag in range(12)])
    assert lines["mean: 0.5 a step"][0] == [0, 11]
    assert lines["mean: 0.5 a step"][1] == pytest.approx([values[0], values[-1]])
    assert axes.get_xlabel() == "lag: steps before step 11"

    axes, found = axes_of(), gradient_flow_of_overflow()
    flow._draw_norms(axes, found)  # what is not finite is left out
    assert max(lines_of(axes)[r"$\|\partial L/\partial h_k\|$"][0]) == 63

    axes = axes_of()
    flow._draw_norms(axes, of_rate(1.0))  # a steady curve is not blown up
    low, high = axes.get_ylim()
    assert high / low == pytest.approx(100)


def test_the_lstms_curves_are_those_of_h_c_and_both():
    axes, layer = axes_of(), build("LSTM", bidirectional=True)
    found = gradient_flow(layer, randn(T, B, I), loss=lambda o: o[0, :, H:].sum())[1]
    flow._draw_norms(axes, found)
    lines = lines_of(axes)
    for name, norms in (("h", found.norms), ("c", found.norms_c), ("(h, c)", found.norms_state)):
        assert lines[f"$\\|\\partial L/\\partial {name}_k\\|$"][1] == pytest.approx(norms.tolist())
    assert axes.get_xlabel() == "lag: steps after step 0"
    axes = axes_of()
    flow._draw_norms(axes, gradient_flow(layer, randn(T, B, I), lengths=torch.tensor([T, 2, 3]))[0])
    assert axes.get_xlabel() == "lag: steps before the one the loss reads, each sequence's own"


def test_where_nothing_flows_no_lone_dot_is_drawn():
    axes = axes_of()
    flow._draw_norms(axes, gradient_flow(build("GRU", bidirectional=True), randn(T, B, I))[1])
    assert not axes.lines
    assert [text.get_text() for text in axes.texts] == ["nothing flows back"]


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
    with pytest.raises(ImportError, match="pip install matplotlib"):
        of_rate(0.5).plot(tmp_path / "flow.png")


def test_the_earliest_origin_where_lags_go_on():
    layer, x = build("GRU", bidirectional=True), randn(T, 2, I)
    reverse = gradient_flow(layer, x, loss=lambda o: o[1, 0, H:].sum() + o[3, 1, H:].sum())[1]
    assert reverse.origin == (1, True)


def test_a_steady_padded_batch_is_steady_in_reverse():
    layer = fastrnn.RNN(1, 2, nonlinearity="relu", bias=False, bidirectional=True, dtype=F64)
    with torch.no_grad():
        for name, w in layer.named_parameters():
            w.copy_(torch.eye(2)) if "hh" in name else w.fill_(1.0)
    lengths = torch.tensor([200, 0, 7, 31, 5, 100, 64, 2])
    x = torch.rand(200, 8, 1, dtype=F64)
    found = gradient_flow(layer, x, lengths=lengths, loss=lambda o: o[0, :, 2:].sum())[1]
    assert (found.verdict, found.rate) == ("steady", pytest.approx(1, rel=1e-12))
    torch.testing.assert_close(found._by_lag(found._s), torch.full((200,), math.sqrt(14), dtype=F64))


def test_a_suffix_in_capitals(tmp_path):
    pytest.importorskip("matplotlib")
    gradient_flow(build("GRU"), randn(T, B, I)).plot(tmp_path / "FLOW.PNG")
    assert (tmp_path / "FLOW.PNG").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_loss_of_the_first_step():
    x = randn(40, B, I)
    both = gradient_flow(build("GRU", bidirectional=True), x, loss=lambda o: o[0].sum())
    assert [(one.origin, one.verdict) for one in both] == [((0, True), "start"), ((0, True), "vanish")]
    deep = build("GRU", num_layers=2, bidirectional=True)
    below = gradient_flow(deep, x, loss=lambda o: o[0].sum())[0]
    assert (below.origin, below.verdict) == ((0, True), "vanish")


def test_a_layer_compiled_in_place():
    layer, x = build("GRU"), randn(T, B, I)
    want = gradient_flow(layer, x)
    layer.compile(backend="eager")
    assert torch.equal(gradient_flow(layer, x).norms, want.norms)


def test_a_loss_of_one_element():
    layer, x = build("GRU"), randn(T, B, I)
    found = gradient_flow(layer, x, loss=lambda o: o[-1].sum().view(1, 1))
    assert torch.equal(found.norms, gradient_flow(layer, x).norms)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("GRU", {"reset_after": False}), ("RNN", {})],
)
def test_without_biases(kind, extra, tolerances):
    bare, zero, x = build(kind, bias=False, **extra), build(kind, **extra), randn(T, B, I)
    with torch.no_grad():
        for name, p in zero.named_parameters():
            p.zero_() if name.startswith("bias") else p.copy_(getattr(bare, name))
    found, want = gradient_flow(bare, x), gradient_flow(zero, x)
    for name in ("norms", "singular_values"):
        bound = {"rtol": tolerances[F64].grad_rtol, "atol": 0}
        torch.testing.assert_close(getattr(found, name), getattr(want, name), **bound)

"""A call of one layer without masks, which goes past most of Python: values, gradients, errors and limits."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.utils.prune
from helpers import LAYERS, assert_same, assert_same_error, hidden, pair, randn, tensors
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import ops

cells = pytest.mark.parametrize("cell", LAYERS)


@pytest.fixture
def direct(monkeypatch):
    """The calls that went straight to the kernel, without a gradient."""
    calls, kernel = [], ops.stream

    def counted(*args):
        result = kernel(*args)
        calls.append(args[0])
        return result

    monkeypatch.setattr(ops, "stream", counted)
    return calls


def compare(ours, theirs, x, hx, direct):
    for mode in (torch.no_grad, torch.inference_mode):
        before = len(direct)
        with mode():
            got = ours(x, hx)
            assert_same(got, theirs(x, hx))
        assert len(direct) == before + 1
        given = [x] if hx is None else tensors((x, hx))
        if x.numel():
            places = [t.untyped_storage().data_ptr() for t in [*tensors(got), *given]]
            assert len(set(places)) == len(places)
        assert type(got) is tuple or isinstance(ours, torch.nn.RNNCellBase)


@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 5), (6, 3), (2, 40)])
@pytest.mark.parametrize("bias", [True, False])
@cells
def test_values(cell, bias, T, B, direct):
    ours, theirs = pair(cell, 5, 19, bias=bias)
    compare(ours, theirs, randn(T, B, 5), hidden(ours, B), direct)


@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 4), (20, 2), (2, 40)])
@cells
def test_biases_are_read_where_they_lie(cell, T, B, direct):
    """64 units are whole vectors of any instruction set: no padded copy is made, at any alignment."""
    ours, theirs = pair(cell, 5, 64)
    for module in (ours, theirs):
        for name in ("bias_ih_l0", "bias_hh_l0"):
            bias = getattr(module, name)
            bias.data = torch.cat([bias.new_full((1,), torch.nan), bias.detach()])[1:]
    compare(ours, theirs, randn(T, B, 5), hidden(ours, B), direct)


@cells
def test_values_of_other_forms(cell, direct):
    """One sequence alone, the batch first, and no states given."""
    ours, theirs = pair(cell, 5, 19)
    one = tuple(h[:, 0] for h in tensors(hidden(ours, 1)))
    compare(ours, theirs, randn(6, 5), one if len(one) > 1 else one[0], direct)
    compare(ours, theirs, randn(6, 5), None, direct)
    compare(ours, theirs, randn(6, 3, 5), None, direct)
    ours, theirs = pair(cell, 5, 19, batch_first=True)
    compare(ours, theirs, randn(3, 6, 5), hidden(ours, 3), direct)
    compare(ours, theirs, randn(3, 6, 5), None, direct)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(name, bias, direct):
    ours, theirs = (getattr(of, name)(5, 19, bias=bias).double() for of in (fastrnn, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    for shape in ((3, 19), (1, 19), (19,)):
        x, h, c = randn(*shape[:-1], 5), randn(*shape), randn(*shape)
        compare(ours, theirs, x, (h, c) if name == "LSTMCell" else h, direct)
        compare(ours, theirs, x, None, direct)
    with torch.no_grad():  # what a cell refuses, it refuses here too
        for x, h in ((randn(3, 5), randn(19)), (randn(5), randn(1, 19)), (randn(3, 4), randn(3, 19))):
            hx = (h, h) if name == "LSTMCell" else h
            assert_same_error(lambda x=x, hx=hx: ours(x, hx), lambda x=x, hx=hx: theirs(x, hx), text=False)
        if name == "LSTMCell":  # whose two states one tensor would be by its length
            both = randn(2, 3, 19)
            assert_same_error(lambda: ours(randn(3, 5), both), lambda: theirs(randn(3, 5), both), text=False)


def test_projection(direct):
    ours, theirs = pair("lstm", 5, 19, proj_size=7)
    compare(ours, theirs, randn(3, 2, 5), hidden(ours, 2), direct)


@pytest.mark.parametrize("B", [1, 4, 5])
@cells
def test_the_same_bits_at_every_call(cell, B):
    """Every other call sweeps the weights backwards; 150 units are an odd number of vectors, not all full."""
    layer = pair(cell, 5, 150)[0]
    x, hx = randn(1, B, 5), hidden(layer, B)
    with torch.no_grad():
        first, *others = [tensors(layer(x, hx)) for _ in range(4)]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@cells
def test_strides(cell, direct):
    """Inputs, states and weights that are no dense blocks."""
    ours, theirs = pair(cell, 5, 6)
    for layer in (ours, theirs):
        layer.weight_hh_l0.data = layer.weight_hh_l0.data.t().contiguous().t()
    hx = hidden(ours, 3)
    odd = [h.transpose(1, 2).contiguous().transpose(1, 2) for h in tensors(hx)]
    hx = tuple(odd) if isinstance(hx, tuple) else odd[0]
    compare(ours, theirs, randn(3, 4, 5).transpose(0, 1), hx, direct)


@cells
def test_no_sequences(cell, direct):
    ours, theirs = pair(cell, 5, 6)
    compare(ours, theirs, randn(2, 0, 5), hidden(ours, 0), direct)


@cells
def test_errors_are_those_of_any_call(cell):
    ours, theirs = pair(cell, 5, 6)
    x, hx = randn(3, 2, 5), hidden(ours, 2)

    def with_states(change):
        return tuple(map(change, hx)) if isinstance(hx, tuple) else change(hx)

    wrong = [
        (randn(3, 2, 4), hx),
        (randn(0, 2, 5), hx),
        (randn(3, 4, 2, 5), hx),
        (x.float(), hx),
        (x, with_states(lambda h: h[:, :1])),
        (x, with_states(lambda h: h[0])),
        (x, with_states(lambda h: h.repeat(2, 1, 1))),
        (x, with_states(lambda h: h[..., :3])),
        (x, with_states(lambda h: h.float())),
        (x, with_states(lambda h: h.to("meta"))),
    ]
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            for args in wrong:
                assert_same_error(lambda a=args: ours(*a), lambda a=args: theirs(*a), text=False)


@pytest.mark.parametrize("form", ["plain", "batch first", "unbatched", "no states"])
@pytest.mark.parametrize("wanted", ["all", "input", "states", "weight_hh_l0", "none"])
@cells
def test_gradients_are_those_of_any_call(cell, wanted, form, monkeypatch):
    """To the bit; each on its own, beside what wants none."""
    layer, _ = pair(cell, 5, 6, batch_first=form == "batch first")
    B = {"unbatched": None, "batch first": 7}.get(form, 3)
    x = randn(7, 5) if B is None else randn(7, 3, 5)
    hx = None if form == "no states" else hidden(layer, B)
    given = {"input": [x], "states": tensors(hx), **{n: [p] for n, p in layer.named_parameters()}}
    for name, leaves in given.items():
        for t in leaves:
            t.requires_grad_(wanted in ("all", name))
    wants = [t for leaves in given.values() for t in leaves if t.requires_grad]
    expected = tensors(layer._run(x, hx, None, None, False)[:2])
    monkeypatch.setattr(layer, "_run", lambda *args: pytest.fail("it took the usual path"))
    got = tensors(layer(x, hx))
    assert_same(got, expected, rtol=0, atol=0)
    assert all(t.requires_grad == bool(wants) for t in got)
    if wants:
        weights = [torch.full_like(t, 0.1 + k) for k, t in enumerate(got)]
        assert_same(
            torch.autograd.grad(got, wants, weights),
            torch.autograd.grad(expected, wants, weights),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "frozen"])
def test_what_no_check_explains_is_raised_as_it_is(kind, monkeypatch):
    """Rather than hidden behind a second call, at twice the cost."""
    made = fastrnn.freeze(fastrnn.GRU(5, 6)) if kind == "frozen" else getattr(fastrnn, kind)(5, 6)
    x = torch.randn(3, 5) if kind.endswith("Cell") else torch.randn(4, 3, 5)
    calls = []

    def fails(*args):
        calls.append(args)
        raise RuntimeError("no memory")

    monkeypatch.setattr(ops, "stream", fails)
    monkeypatch.setattr(ops, "call", fails)
    for module in (fastrnn.functional, fastrnn.packed):
        monkeypatch.setattr(module, "layer", lambda *args, **options: pytest.fail("it was run again"))
    for mode in (torch.no_grad,) if kind == "frozen" else (torch.no_grad, torch.enable_grad):
        calls.clear()
        with mode():
            with pytest.raises(RuntimeError, match="no memory"):
                made(x)
            assert len(calls) == 1
            with pytest.raises(
                (RuntimeError, ValueError), match="input"
            ):  # an error of the caller's has its words
                made(x[..., :4])


@cells
def test_what_is_left_on_the_meta_device(cell):
    """Outputs would be memory that nobody filled."""
    layer = pair(cell, 5, 6)[0]
    x, hx = randn(3, 2, 5), hidden(layer, 2)
    states, params = tensors(hx), [p.detach() for p in layer.parameters()]
    reset = torch.zeros(3, 2, dtype=torch.bool, device="meta")
    lengths = torch.ones(2, dtype=torch.long, device="meta")

    def call(states=states, params=params, **masks):
        return fastrnn.functional.layer(layer._cell, x, states, params, **masks)

    layer.to("meta")
    for function in (
        lambda: layer(x, hx),
        lambda: layer(x),
        lambda: call(states=[*states[:-1], states[-1].to("meta")]),
        lambda: call(params=[params[0], params[1].to("meta"), *params[2:]]),
        lambda: call(reset=reset),
        lambda: call(lengths=lengths),
    ):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), pytest.raises(RuntimeError, match=r"not at the same device.*meta"):
                function()


def test_when_more_is_asked_for(direct):
    """Other backends, casts and several layers take the usual path, same numbers; training its own."""
    layer = fastrnn.GRU(5, 6)
    x, h = torch.randn(3, 2, 5), torch.randn(1, 2, 6)
    with torch.no_grad():
        expected = layer(x, h)
        assert len(direct) == 1
        with fastrnn.backend("reference"):
            torch.testing.assert_close(layer(x, h), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x, h)[0].dtype == torch.bfloat16
        fastrnn.GRU(5, 6, num_layers=2)(x, torch.randn(2, 2, 6))
        fastrnn.GRU(5, 6, bidirectional=True)(x, torch.randn(2, 2, 6))
        layer(x, h, lengths=torch.tensor([3, 1]))
        torch.vmap(lambda s: layer(x, s)[0])(h.expand(4, *h.shape))
        with FlopCounterMode(display=False) as counter:
            layer(x, h)
        assert counter.get_total_flops() == 2 * 6 * 18 * (5 + 6)
    assert layer(x, h)[0].requires_grad
    assert len(direct) == 1


def test_a_reparametrized_layer(direct):
    """The weights in force count, wherever they come from."""
    layer = fastrnn.LSTM(5, 6)
    x, hx = torch.randn(3, 2, 5), (torch.randn(1, 2, 6), torch.randn(1, 2, 6))
    with torch.no_grad():
        doubled = {name: 2 * p for name, p in layer.named_parameters()}
        ours = torch.func.functional_call(layer, doubled, (x, hx))[0]
        torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        layer.parametrizations.weight_hh_l0.original0.mul_(3)
        normed = layer(x, hx)[0]
        with fastrnn.backend("reference"):
            torch.testing.assert_close(layer(x, hx)[0], normed)
        plain = fastrnn.LSTM(5, 6)
        plain.load_state_dict(doubled)
        torch.testing.assert_close(plain(x, hx)[0], ours)


WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


def no_parameter(module, name, how):
    """Makes a weight pruned, parametrized or a buffer."""
    if how == "pruned":
        torch.nn.utils.prune.l1_unstructured(module, name, 0.3)
    elif how == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(module, name, torch.nn.Softsign())
    else:
        value = getattr(module, name).detach()
        delattr(module, name)
        module.register_buffer(name, value)


@pytest.mark.parametrize("names", [*((n,) for n in WEIGHTS), WEIGHTS[2:]], ids="+".join)
@pytest.mark.parametrize("how", ["pruned", "parametrized", "buffer"])
@pytest.mark.parametrize("P", [0, 4])
def test_a_weight_that_is_no_parameter(P, how, names):
    """A layer must not go on without it, nor without both biases."""
    layer = fastrnn.LSTM(5, 6, proj_size=P)
    x, hx = torch.randn(3, 2, 5), (torch.randn(1, 2, P or 6), torch.randn(1, 2, 6))
    for name in names:
        no_parameter(layer, name, how)
    with torch.no_grad():
        got = layer(x, hx)[0]
        with fastrnn.backend("reference"):
            torch.testing.assert_close(got, layer(x, hx)[0])


def test_the_operator_takes_no_holes():
    layer = fastrnn.LSTM(5, 6)
    x, h = torch.randn(3, 2, 5), torch.randn(1, 2, 6)
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in layer.parameters())
    for holes in ((w_ih, None, b_ih), (w_ih, w_hh, None, b_hh), (w_ih, None, None, b_hh)):
        with pytest.raises(RuntimeError, match="without holes"):
            torch.ops.fastrnn.stream("lstm", x, h, h, *holes)


@pytest.mark.parametrize("grad", [True, False])
@cells
def test_a_state_that_is_no_tensor(cell, grad):
    ours, theirs = (module.requires_grad_(False) for module in pair(cell, 5, 6))
    x, hx = randn(3, 2, 5), 3 if cell in ("gru", "rnn_tanh", "rnn_relu") else (3, 3)
    with torch.set_grad_enabled(grad):
        assert_same_error(lambda: ours(x, hx), lambda: theirs(x, hx))


@pytest.mark.parametrize("grad", [True, False])
def test_an_error_keeps_no_tensor(grad):
    """By a cycle of an exception and its traceback, which lasts until the collector comes."""
    layer, x = fastrnn.GRU(5, 6), torch.randn(3, 2, 4)
    kept = weakref.ref(x)
    gc.disable()
    try:
        with torch.set_grad_enabled(grad), contextlib.suppress(RuntimeError):
            layer(x)
        del x
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh", "both"])
@pytest.mark.parametrize("how", ["pruned", "parametrized", "buffer"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cells_bias_that_is_no_parameter(kind, how, missing):
    cell, x = getattr(fastrnn, kind)(5, 6), torch.randn(3, 5)
    for name in ("bias_ih", "bias_hh") if missing == "both" else (missing,):
        no_parameter(cell, name, how)
    with torch.no_grad():
        got = cell(x)
        with fastrnn.backend("reference"):
            torch.testing.assert_close(got, cell(x))

"""LSTM, GRU and RNN against torch.nn's: values, gradients, shapes, dropout, packed sequences."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from helpers import F64, LAYERS, assert_same, each_layer, grads, hidden, pair, randn, tensors
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import modules

T, B, IN, H = 4, 3, 3, 5


@each_layer
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "nohx"])
def test_values_and_gradients(cell, layers, bidirectional, batch_first, bias, given):
    ours, theirs = pair(cell, IN, H, layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
    x = randn(*((B, T) if batch_first else (T, B)), IN, grad=True)
    hx = hidden(ours, B, grad=True) if given else None
    inputs = [x, *tensors(hx)]
    a, b = ours(x, hx), theirs(x, hx)
    assert_same(a, b)
    assert_same(grads(a, inputs + list(ours.parameters())), grads(b, inputs + list(theirs.parameters())))


@each_layer
def test_one_seed_gives_the_same_weights(cell):
    ours, theirs = pair(cell, IN, H, 2, bidirectional=True)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


@each_layer
def test_state_dict_loads_both_ways(cell):
    ours, theirs = pair(cell, IN, H, 2, bidirectional=True)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(1)
    x = randn(T, B, IN)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours(x), theirs(x))
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(0.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours(x), theirs(x))


def test_signatures():
    first = ["input_size", "hidden_size", "num_layers"]
    rest = ["bias", "batch_first", "dropout", "bidirectional"]
    expected = {
        modules.LSTM: [*first, *rest, "proj_size", "device", "dtype"],
        modules.GRU: [*first, *rest],
        modules.RNN: [*first, "nonlinearity", *rest],
    }
    for kind, names in expected.items():
        parameters = inspect.signature(kind).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names
    parameters = inspect.signature(modules.LSTM.forward).parameters
    assert list(parameters) == ["self", "input", "hx", "lengths", "reset", "return_states"]
    assert parameters["lengths"].kind is inspect.Parameter.KEYWORD_ONLY


def test_positional_calls():
    lstm = modules.LSTM(3, 5, 2, False, True, 0.1, True, 2, "cpu", F64)
    assert repr(lstm) == repr(torch.nn.LSTM(3, 5, 2, False, True, 0.1, True, 2, "cpu", F64))
    assert lstm.weight_ih_l0.dtype == F64
    args = (3, 5, 2, False, True, 0.1, True)
    assert repr(modules.GRU(*args)) == repr(torch.nn.GRU(*args))
    args = (3, 5, 2, "relu", False, True, 0.1, True)
    rnn = modules.RNN(*args)
    assert repr(rnn) == repr(torch.nn.RNN(*args))
    assert rnn.mode == "RNN_RELU"
    assert rnn.nonlinearity == "relu"


@each_layer
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [True, False])
def test_unbatched(cell, batch_first, given):
    ours, theirs = pair(cell, IN, H, 2, bidirectional=True, batch_first=batch_first)
    x = randn(T, IN)
    hx = hidden(ours, None) if given else None
    assert_same(ours(x, hx), theirs(x, hx))


@each_layer
def test_empty_batch_trains(cell):
    ours, theirs = pair(cell, IN, H, 2, bidirectional=True)
    x = torch.zeros(T, 0, IN, dtype=F64, requires_grad=True)
    a, b = ours(x), theirs(x)
    assert [t.shape for t in tensors(a)] == [t.shape for t in tensors(b)]
    a[0].sum().backward()
    assert x.grad is not None
    assert all(not p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("cell", ["lstm", "lstm_proj"])
def test_a_list_serves_as_hx(cell):
    ours, theirs = pair(cell, IN, H)
    x, hx = randn(T, B, IN), hidden(ours, B)
    assert_same(ours(x, list(hx)), theirs(x, hx))


@each_layer
@pytest.mark.parametrize("layers", [1, 2])
def test_results_are_contiguous_and_share_no_memory(cell, layers):
    ours, _ = pair(cell, IN, H, layers, bidirectional=True)
    x, hx = randn(T, B, IN), hidden(ours, B)
    results = tensors(ours(x, hx))
    storages = {t.untyped_storage().data_ptr() for t in [*results, x, *tensors(hx)]}
    assert len(storages) == len(results) + 1 + len(tensors(hx))
    assert all(t.is_contiguous() for t in results)


@each_layer
@pytest.mark.parametrize("form", ["TB", "BT", "packed"])
def test_dropout_draws_what_torch_draws(cell, form):
    ours, theirs = pair(cell, IN, H, 3, bidirectional=True, dropout=0.4, batch_first=form == "BT")
    x = randn(B, T, IN) if form == "BT" else randn(T, B, IN)
    if form == "packed":
        x = pack_padded_sequence(x, torch.tensor([2, 4, 3]), enforce_sorted=False)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        results.append((layer(x), torch.get_rng_state()))
    (ours_result, ours_state), (theirs_result, theirs_state) = results
    assert_same(ours_result, theirs_result)
    assert torch.equal(ours_state, theirs_state)
    torch.manual_seed(4)
    assert not torch.equal(tensors(ours(x))[0], tensors(ours_result)[0])
    ours.eval(), theirs.eval()
    state = torch.get_rng_state()
    assert_same(ours(x), theirs(x))
    assert torch.equal(state, torch.get_rng_state())
    ours.train().dropout = 0.0
    assert_same(ours(x), theirs(x))


@each_layer
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "nohx"])
def test_packed_sequences(cell, sort, layers, bidirectional, given):
    ours, theirs = pair(cell, IN, H, layers, bidirectional=bidirectional)
    ends = torch.tensor([5, 3, 3, 1] if sort else [3, 1, 5, 3])
    x = randn(5, 4, IN, grad=True)
    hx = hidden(ours, 4, grad=True) if given else None
    results, gradients = [], []
    for layer in (ours, theirs):
        packed = pack_padded_sequence(x, ends, enforce_sorted=sort)
        result = layer(packed, hx)
        results.append(result)
        gradients.append(grads(result, [x, *tensors(hx), *layer.parameters()]))
    (packed, _), (expected, _) = results
    assert type(packed) is type(expected)
    assert (packed.sorted_indices is None) == (expected.sorted_indices is None) == sort
    assert_same(*results)
    assert_same(*gradients)
    assert_same(pad_packed_sequence(packed), pad_packed_sequence(expected))


@each_layer
def test_partial_output_gradients(cell):
    ours, theirs = pair(cell, IN, H, 2, bidirectional=True)
    x = randn(T, B, IN, grad=True)
    count = len(tensors(ours(x)))
    for k in range(count):
        a, b = ([tensors(layer(x))[k]] for layer in (ours, theirs))
        assert_same(
            [g for g in grads(a, [x, *ours.parameters()]) if g is not None],
            [g for g in grads(b, [x, *theirs.parameters()]) if g is not None],
        )


@each_layer
def test_gradients_in_eval_mode_and_twice(cell):
    ours, theirs = pair(cell, IN, H)
    ours.eval()
    x = randn(T, B, IN)
    out, expected = ours(x)[0].sum(), theirs(x)[0].sum()
    out.backward(retain_graph=True)
    out.backward()
    expected.backward()
    assert_same([p.grad for p in ours.parameters()], [2 * p.grad for p in theirs.parameters()])


@each_layer
def test_non_contiguous_inputs(cell):
    ours, theirs = pair(cell, IN, H)
    x = randn(IN, B, 2 * T).permute(2, 1, 0)[::2]
    hx = hidden(ours, 2 * B)
    hx = hx[:, ::2] if ours.mode != "LSTM" else tuple(h[:, ::2] for h in hx)
    assert not x.is_contiguous()
    assert_same(ours(x, hx), theirs(x, hx))
    expanded = randn(1, B, IN).expand(T, B, IN)
    assert_same(ours(expanded, hx), theirs(expanded, hx))


@each_layer
def test_frozen_parts_get_no_gradient(cell):
    ours, _ = pair(cell, IN, H)
    ours.weight_hh_l0.requires_grad_(False)
    ours(randn(T, B, IN))[0].sum().backward()
    assert ours.weight_hh_l0.grad is None
    assert ours.weight_ih_l0.grad is not None
    ours.requires_grad_(False)
    assert not ours(randn(T, B, IN))[0].requires_grad


@each_layer
def test_autocast(cell):
    kind, _, extra = LAYERS[cell]
    layer = kind(IN, H, 2, **extra)
    x, hx = torch.randn(T, B, IN), [h.float() for h in tensors(hidden(layer, B))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [layer(x), layer(x.bfloat16(), hx if layer.mode == "LSTM" else hx[0])]
        # As in torch, autocast leaves float64 alone.
        assert copy.deepcopy(layer).double()(x.double())[0].dtype == F64
    assert all(t.dtype == torch.bfloat16 for t in tensors(results))
    torch.testing.assert_close(results[0][0].float(), layer(x)[0], atol=0.05, rtol=0.05)


def test_gru_reset_before():
    layer = modules.GRU(IN, H, dtype=F64, reset_after=False)
    assert repr(layer) == "GRU(3, 5, reset_after=False)"
    x = randn(T, B, IN)
    w, r, b, c = (p.detach() for p in layer.parameters())
    h, steps = torch.zeros(B, H, dtype=F64), []
    for x_t in x:
        gx = x_t @ w.T + b
        rz = torch.sigmoid(gx[:, : 2 * H] + h @ r[: 2 * H].T + c[: 2 * H])
        n = torch.tanh(gx[:, 2 * H :] + (rz[:, :H] * h) @ r[2 * H :].T + c[2 * H :])
        h = (1 - rz[:, H:]) * n + rz[:, H:] * h
        steps.append(h)
    assert_same(layer(x), (torch.stack(steps), h[None]))
    layer.reset_after = True  # attributes are read at every call
    assert_same(layer(x), layer.to_torch()(x))


def test_a_program_that_only_rebinds_the_name(monkeypatch):
    def program():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LSTM(4, 6, 2, batch_first=True)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        x, losses = randn(3, 5, 4), []
        for _ in range(3):
            out, (h, c) = model(x)
            loss = out.square().sum() + h.sum() + c.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        return type(model[1]), torch.stack(losses)

    before, expected = program()
    monkeypatch.setattr(torch.nn, "LSTM", modules.LSTM)
    after, losses = program()
    assert before is not after is modules.LSTM
    assert_same(losses, expected, rtol=1e-9, atol=1e-9)
    assert type(modules.LSTM(2, 3).to_torch()) is before


def test_a_rebound_name_compiled(monkeypatch):
    """Dynamo breaks the graph at whatever torch.nn.LSTM names, unless allow_rnn is set (README)."""
    monkeypatch.setattr(torch.nn, "LSTM", modules.LSTM)
    layer, x = torch.nn.LSTM(4, 6).double(), randn(3, 2, 4)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert_same(compiled(x), layer(x))


def dropped(library, kind):
    """DropConnect as subclasses of torch.nn's layers have it."""

    class Dropped(getattr(library, kind)):
        def forward(self, *args):
            kept = self._flat_weights
            named = zip(self._flat_weights_names, kept, strict=True)
            self._flat_weights = [
                w * (torch.arange(w.numel()).view_as(w) % 2) if "hh" in n else w for n, w in named
            ]
            try:
                return super().forward(*args)
            finally:
                self._flat_weights = kept

    return Dropped(4, 5, num_layers=2)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_weights_that_a_subclass_assigns(kind):
    """torch.nn's layers compute with `_flat_weights`; ours too, where it was assigned, and only then."""
    ours, theirs, x = dropped(fastrnn, kind), dropped(torch.nn, kind), torch.randn(6, 3, 4)
    theirs.load_state_dict(ours.state_dict())
    y, expected = ours(x)[0], theirs(x)[0]
    torch.testing.assert_close(y, expected)
    for layer, out in ((ours, y), (theirs, expected)):
        out.sum().backward()
        assert (layer.weight_hh_l0.grad.flatten()[::2] == 0).all()
    torch.testing.assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad)
    ours.weight_hh_l0.data.zero_()  # the assigned list is gone
    plain = getattr(fastrnn, kind)(4, 5, num_layers=2)
    plain.load_state_dict(ours.state_dict())
    whole = getattr(fastrnn, kind).forward
    torch.testing.assert_close(whole(ours, x)[0], plain(x)[0])


def test_weights_in_the_place_of_parameters():
    """Of one layer, whose calls take the short way else."""
    layer, x = fastrnn.LSTM(4, 5), torch.randn(6, 3, 4)
    expected = layer(x)[0]
    weights = list(layer._flat_weights)
    layer._flat_weights = [torch.zeros_like(w) for w in weights]
    assert not layer(x)[0].any()
    for name in layer._flat_weights_names:
        delattr(layer, name)
    layer._flat_weights = weights
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_conversion_keeps_weights_in_the_place_of_parameters(kind):
    """There and back, and in a layer of the other library on the same Parameters."""
    layer, x = getattr(torch.nn, kind)(4, 5), torch.randn(6, 3, 4)
    layer._flat_weights = [2 * w.detach() for w in layer._flat_weights]
    expected = layer(x)[0]
    ours, theirs = getattr(fastrnn, kind), getattr(torch.nn, kind)
    for step, become in (
        (fastrnn.convert, ours),
        (lambda layer: layer.to_torch(), theirs),
        (fastrnn.revert, theirs),
        (fastrnn.convert, ours),
    ):
        other = step(layer)
        assert type(other) is become
        assert ("_given_weights" in vars(other)) == (become is ours)
        torch.testing.assert_close(other(x)[0], expected)
    for copy_of in (fastrnn.freeze, fastrnn.quantize):
        with pytest.raises(ValueError, match="the layer has weights assigned to its _flat_weights"):
            copy_of(layer)
    layer._flat_weights = list(layer.parameters())
    torch.testing.assert_close(fastrnn.freeze(layer)(x)[0], layer(x)[0])


def test_to_torch_of_a_compiled_layer():
    """It runs what it is, with its own hooks."""
    layer = fastrnn.GRU(3, 4)
    layer.compile(backend="eager")
    twin, calls = layer.to_torch(), []
    twin.register_forward_hook(lambda *args: calls.append(1))
    twin(torch.randn(5, 2, 3))
    assert calls == [1]


def test_explain_of_one_sequence_where_the_batch_is_first():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        x = torch.zeros(100, 64)
        want = fastrnn.explain(fastrnn.LSTM(64, 256), x)
        assert fastrnn.explain(fastrnn.LSTM(64, 256, batch_first=True), x) == want
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("how", ["weight_norm taken off", "registered", "in the dict"])
def test_conversion_of_a_list_that_lags_behind(how):
    """torch.nn's layers renew theirs at the next call: what stands in it until then is nobody's choice."""
    layer, x = torch.nn.LSTM(3, 4), torch.randn(5, 2, 3)
    if how == "weight_norm taken off":
        parametrizations.weight_norm(layer, "weight_hh_l0")
        with torch.no_grad():
            layer.parametrizations.weight_hh_l0.original0.mul_(3)
        parametrize.remove_parametrizations(layer, "weight_hh_l0")
    elif how == "registered":
        layer.register_parameter("weight_hh_l0", torch.nn.Parameter(torch.randn(16, 4)))
    else:
        layer._parameters["weight_hh_l0"] = torch.nn.Parameter(torch.randn(16, 4))
    other = torch.nn.LSTM(3, 4)  # a copy's making would renew this one's
    other.load_state_dict(layer.state_dict())
    expected = other(x)[0]
    assert layer._flat_weights[1] is not layer.weight_hh_l0
    y = fastrnn.convert(layer)(x)[0]
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.weight_hh_l0.grad.any()
    torch.testing.assert_close(fastrnn.freeze(layer)(x)[0], expected)

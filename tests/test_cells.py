"""LSTMCell, GRUCell and RNNCell against torch.nn's."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from helpers import CELLS, F64, assert_same, each_cell, grads, pair, randn, tensors

import fastrnn
from fastrnn import cells

B, IN, H = 3, 4, 5


def states(cell, B=B, H=H, seed=1, grad=False):
    """A random hx: (h, c) for the LSTM, else h; B=None: unbatched."""
    shape = (H,) if B is None else (B, H)
    h = randn(*shape, seed=seed, grad=grad)
    return (h, randn(*shape, seed=seed + 1, grad=grad)) if cell == "lstm" else h


@each_cell
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [B, 1, 0, None])
@pytest.mark.parametrize("given", [True, False])
def test_values_and_gradients(cell, bias, batch, given):
    ours, theirs = pair(cell, IN, H, bias=bias, table=CELLS)
    x = randn(*(() if batch is None else (batch,)), IN, grad=True)
    hx = states(cell, batch, grad=True) if given else None
    a, b = ours(x, hx), theirs(x, hx)
    assert_same(a, b)
    inputs = [x, *tensors(hx)]
    assert_same(grads(a, [*inputs, *ours.parameters()]), grads(b, [*inputs, *theirs.parameters()]))


@each_cell
def test_a_loop_of_steps(cell):
    ours, theirs = pair(cell, IN, H, table=CELLS)
    xs = randn(6, B, IN, grad=True)
    results = []
    for module in (ours, theirs):
        s = None
        for x in xs:
            s = module(x, s)
        results.append((s, grads(s, [xs, *module.parameters()])))
    assert_same(*results)


@each_cell
def test_weights_and_state_dict(cell):
    ours, theirs = pair(cell, IN, H, table=CELLS)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    with torch.no_grad():
        ours.weight_hh.mul_(2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = randn(B, IN)
    assert_same(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert repr(ours) == repr(theirs)
    ours, theirs = pair(cell, IN, H, bias=False, table=CELLS)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@each_cell
def test_signatures_are_torchs(cell):
    ours, theirs, _ = CELLS[cell]
    expected = [n for n in inspect.signature(theirs).parameters if n != "self"]
    parameters = inspect.signature(ours).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == expected


def test_positional_calls():
    assert cells.RNNCell(3, 4, False, "relu", "cpu", F64).weight_ih.dtype == F64
    assert cells.LSTMCell(3, 4, False, "cpu", F64).bias_ih is None
    assert cells.GRUCell(3, 4, True, "cpu", F64).bias_hh.dtype == F64


@each_cell
def test_no_hidden_units(cell):
    ours, theirs = pair(cell, IN, 0, table=CELLS)
    assert [t.shape for t in tensors(ours(randn(B, IN)))] == [t.shape for t in tensors(theirs(randn(B, IN)))]


@each_cell
def test_results_share_no_memory(cell):
    ours, _ = pair(cell, IN, H, table=CELLS)
    x, hx = randn(B, IN), states(cell)
    results = tensors(ours(x, hx))
    storages = {t.untyped_storage().data_ptr() for t in [*results, x, *tensors(hx)]}
    assert len(storages) == len(results) + 1 + len(tensors(hx))
    assert all(t.is_contiguous() for t in results)


@each_cell
def test_copies(cell):
    ours, _ = pair(cell, IN, H, table=CELLS)
    x = randn(B, IN)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(other(x), ours(x))
        assert repr(other) == repr(ours)


@each_cell
def test_functional_call_and_parametrization(cell):
    ours, theirs = pair(cell, IN, H, table=CELLS)
    x = randn(B, IN)
    other = {name: torch.full_like(p, 0.1) for name, p in ours.named_parameters()}
    assert_same(torch.func.functional_call(ours, other, x), torch.func.functional_call(theirs, other, x))
    for module in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh")
    assert_same(ours(x), theirs(x))
    assert_same(ours.to_torch()(x), theirs(x))


@each_cell
def test_to_torch(cell):
    ours, theirs = pair(cell, IN, H, table=CELLS)
    twin = ours.to_torch()
    assert type(twin) is type(theirs)
    assert repr(twin) == repr(theirs)
    assert all(a is b for a, b in zip(twin.parameters(), ours.parameters(), strict=True))
    assert_same(twin(randn(B, IN)), ours(randn(B, IN)))


def test_gru_reset_before():
    cell = cells.GRUCell(IN, H, dtype=F64, reset_after=False)
    assert repr(cell) == "GRUCell(4, 5, reset_after=False)"
    x, h = randn(B, IN), states("gru")
    gx = x @ cell.weight_ih.T + cell.bias_ih
    r, z = torch.sigmoid(gx[:, : 2 * H] + h @ cell.weight_hh[: 2 * H].T + cell.bias_hh[: 2 * H]).chunk(2, 1)
    n = torch.tanh(gx[:, 2 * H :] + (r * h) @ cell.weight_hh[2 * H :].T + cell.bias_hh[2 * H :])
    assert_same(cell(x, h), (1 - z) * n + z * h)
    with pytest.raises(ValueError, match="reset_after"):
        cell.to_torch()
    with pytest.raises(TypeError, match="reset_after"):
        cells.GRUCell(IN, H, reset_after=1)


class Decoder(torch.nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        return self.cell(x)


@each_cell
def test_tracers_and_compiler(cell):
    torch._dynamo.reset()
    model = Decoder(pair(cell, IN, H, table=CELLS)[0])
    x = randn(B, IN)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["cell"]
    assert_same(traced(x), model(x))
    assert_same(torch.jit.script(copy.deepcopy(model))(x), model(x))
    assert_same(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@each_cell
def test_autocast(cell):
    kind, _, extra = CELLS[cell]
    module = kind(IN, H, **extra)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = tensors([module(torch.randn(B, IN)), module(torch.randn(B, IN).bfloat16())])
    assert all(t.dtype == torch.bfloat16 for t in result)


@each_cell
@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh", "both"])
def test_a_bias_that_was_taken_away(cell, missing):
    ours, theirs = pair(cell, IN, H, table=CELLS)
    for module in (ours, theirs):
        for name in ("bias_ih", "bias_hh") if missing == "both" else (missing,):
            setattr(module, name, None)
    x = randn(B, IN, grad=True)
    a, b = ours(x), theirs(x)
    assert_same(a, b)
    assert_same(grads(a, [x, *ours.parameters()]), grads(b, [x, *theirs.parameters()]))


@each_cell
def test_biases_that_came_later(cell):
    ours, theirs = pair(cell, IN, H, bias=False, table=CELLS)
    for name in ("bias_ih", "bias_hh"):
        bias = torch.nn.Parameter(randn(len(ours.weight_ih), seed=len(name)))
        for module in (ours, theirs):
            setattr(module, name, bias)
    assert_same(ours(randn(B, IN)), theirs(randn(B, IN)))


@pytest.mark.parametrize("hx", [torch.zeros(2, H, dtype=F64), (torch.ones(H, dtype=F64),) * 3])
def test_unbatched_the_first_two_states_of_whatever_it_is(hx):
    ours, theirs = pair("lstm", IN, H, table=CELLS)
    assert_same(ours(randn(IN), hx), theirs(randn(IN), hx))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (4,)])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_states_are_no_views(kind, shape, grad, backend):
    """Truncated backpropagation detaches them in place, and what inference made may be changed in place."""
    cell = getattr(fastrnn, kind)(4, 5)
    with fastrnn.backend(backend), torch.set_grad_enabled(grad):
        states = cell(torch.randn(shape))
    for h in states if isinstance(states, tuple) else (states,):
        assert h.shape == (*shape[:-1], 5)
        assert not h._is_view()
        assert h.detach_().grad_fn is None

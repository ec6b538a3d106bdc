"""Autograd through the operators: numeric and partial gradients, double backward, transforms, compiler."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from helpers import F64, MASKS, TIGHT, random_case, random_masks
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import functional
from fastrnn.reference import CELLS


def case(cell, mask="none", D=1, P=0):
    x, states, params = random_case(cell, 3, 2, 2, 3, D=D, P=P)
    x, masks = random_masks(mask, x)
    S = len(states)

    def f(*flat):
        with fastrnn.backend("cpu"):
            y, last, seq = functional.layer(
                cell, flat[0], flat[1 : 1 + S], flat[1 + S :], return_states=True, **masks
            )
        return (y, *last, *seq)

    return f, tuple(t.requires_grad_() for t in (x, *states, *params))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell, mask):
    f, leaves = case(cell, mask, D=2)
    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("mask", ["none", "lengths+reset", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradgradcheck(cell, mask):
    f, leaves = case(cell, mask)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_projection_gradcheck_and_gradgradcheck():
    f, leaves = case("lstm", D=2, P=2)
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_each_output_alone(cell):
    """A gradient that reaches one output only, the others undefined."""
    f, leaves = case(cell, "lengths")
    for i in range(len(f(*leaves))):
        ours = torch.autograd.grad(f(*leaves)[i].square().sum(), leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in ours)
        weights = [torch.zeros_like(o) for o in f(*leaves)]
        weights[i] = 2 * f(*leaves)[i].detach()
        dense = torch.autograd.grad(f(*leaves), leaves, weights)
        for a, b in zip(ours, dense, strict=True):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_only_what_needs_a_gradient(cell):
    x, states, params = random_case(cell, 3, 2, 2, 3)
    params[0].requires_grad_()
    with fastrnn.backend("cpu"):
        y = functional.layer(cell, x, states, params)[0]
        (only,) = torch.autograd.grad(y.sum(), params[0])
        x.requires_grad_()
        y = functional.layer(cell, x, states, params)[0]
        _, both = torch.autograd.grad(y.sum(), [x, params[0]])
    assert torch.equal(only, both)


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_kept_for_the_backward_pass(cell):
    """Inputs aside: y, the sequences of the other states, and what the cell saves, unless that is y."""
    T, B, H, spec = 3, 2, 3, CELLS[cell]
    x, states, params = random_case(cell, T, B, 2, H)
    inputs = {t.data_ptr() for t in (x, *states, *params)}
    kept = []
    x.requires_grad_()
    with (
        fastrnn.backend("cpu"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        functional.layer(cell, x, states, params)
    values = sum(t.numel() for t in kept if t.data_ptr() not in inputs)
    assert values == T * B * H * (spec.states + (0 if spec.saves_h else spec.saved))


def test_two_backwards_and_an_edit_in_place():
    x, states, params = random_case("gru", 3, 2, 2, 3)
    x.requires_grad_()
    with fastrnn.backend("cpu"):
        y = functional.gru(x, states[0], params)[0]
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad(y.sum(), x, retain_graph=True)[0])
        total = y.sum()
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_last_states_may_be_edited_before_backward(kind):
    """As reinforcement learning does with finished episodes; torch.nn allows it too."""
    results = []
    for library in (fastrnn, torch.nn):
        torch.manual_seed(0)
        layer = getattr(library, kind)(2, 3)
        state, loss = None, 0
        for _ in range(3):
            y, state = layer(torch.randn(1, 4, 2), state)
            loss = loss + y.sum()
            with torch.no_grad():
                for s in state if kind == "LSTM" else [state]:
                    s[:, 1] = 0
        results.append(torch.autograd.grad(loss, list(layer.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_batched_gradients(kind):
    layer = getattr(fastrnn, kind)(2, 3).double()
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    y = layer(x)[0]
    rows = torch.eye(y.numel(), dtype=torch.float64).view(-1, *y.shape)
    batched = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)[0]
    for row, ours in zip(rows, batched, strict=True):
        torch.testing.assert_close(ours, torch.autograd.grad(y, x, row, retain_graph=True)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_flop_counter(kind):
    """Twice the weights a row, and in the backward pass that again for each gradient that is needed."""
    layer, x = getattr(fastrnn, kind)(5, 7, num_layers=2, bidirectional=True), torch.randn(6, 3, 5)
    weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    of_input = layer.weight_ih_l0.numel() + layer.weight_ih_l0_reverse.numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 2 * 6 * 3 * weights
    for need_x, need_params, computed in (
        (True, True, 3 * weights),
        (False, True, 3 * weights - of_input),
        (True, False, 2 * weights),
    ):
        layer.requires_grad_(need_params)
        with FlopCounterMode(display=False) as counter:
            layer(x.clone().requires_grad_(need_x))[0].sum().backward()
        assert counter.get_total_flops() == 2 * 6 * 3 * computed


@pytest.mark.parametrize("cell", CELLS)
def test_transforms_are_right(cell):
    """torch.func on the default backend, against the plain reference."""
    x, states, params = random_case(cell, 3, 2, 2, 3)

    def loss(x):
        return functional.layer(cell, x, states, params)[0].square().sum()

    def results():
        tangent = torch.ones_like(x)
        return (
            torch.func.grad(loss)(x),
            torch.func.jvp(loss, (x,), (tangent,))[1],
            torch.func.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x])),
            torch.func.hessian(loss)(x),
        )

    ours = results()
    with fastrnn.backend("reference"):
        theirs = results()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, batch_first):
    """The fakes and the registered autograd rule, as torch itself tests operators."""
    x, states, params = random_case(cell, 3, 2, 2, 3, D=2)
    if batch_first:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    for t in (x, *states, *params):
        t.requires_grad_()
    args = (cell, x, states, params, None, None, None, True, True)
    torch.library.opcheck(torch.ops.fastrnn.layer.default, args)
    with torch.no_grad():
        y, last, seq, saved = torch.ops.fastrnn.layer(*args)
        plain = [t.detach() for t in (x, *states, *params)]
        S = len(states)
        back = (
            cell,
            y,
            last,
            seq,
            plain[0],
            plain[1 : 1 + S],
            plain[1 + S :],
            None,
            None,
            None,
            y,
            seq,
            saved,
        )
        torch.library.opcheck(torch.ops.fastrnn.layer_backward.default, (*back, True, True))


@pytest.mark.parametrize("outputs", [slice(None), slice(0, 1), slice(1, 2)], ids=["all", "y", "h"])
@pytest.mark.parametrize("cell", CELLS)
def test_registered_rules_gradgradcheck(cell, outputs):
    """The operator itself, as compiled graphs call it: both rules, with gradients for some outputs only."""
    x, states, params = random_case(cell, 3, 2, 2, 3)
    leaves = [t.requires_grad_() for t in (x, *states, *params)]
    S = len(states)

    def f(*flat):
        out = torch.ops.fastrnn.layer(
            cell, flat[0], list(flat[1 : 1 + S]), list(flat[1 + S :]), None, None, None, True, True
        )
        return (out[0], *out[1], *out[2])[outputs]

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_compiles_whole(kind, batch_first):
    """Forward and backward in one graph, with no break."""
    layer = getattr(fastrnn, kind)(4, 6, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(5, 3, 4, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x)[0], layer(x)[0]
    torch.testing.assert_close(y, expected)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad(y.square().sum(), leaves)
    theirs = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_rounds_no_float64_states():
    params = [p.detach() for p in fastrnn.GRU(3, 4).parameters()]
    x, h = torch.randn(5, 2, 3), torch.zeros(1, 2, 4, dtype=F64)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="autocast leaves float64 as it is"),
    ):
        functional.layer("gru", x, [h], params)


@pytest.mark.parametrize("name", CELLS)
def test_functions_of_each_cell_take_all_masks(name):
    x, states, params = random_case(name, 5, 3, 2, 4)
    calls = {
        "lstm": lambda x, **m: functional.lstm(x, states, params, **m),
        "gru": lambda x, **m: functional.gru(x, states[0], params, **m),
        "gru_reset_before": lambda x, **m: functional.gru(x, states[0], params, reset_after=False, **m),
        "rnn_tanh": lambda x, **m: functional.rnn(x, states[0], params, **m),
        "rnn_relu": lambda x, **m: functional.rnn(x, states[0], params, nonlinearity="relu", **m),
    }
    lengths, reset = torch.tensor([5, 2, 3]), torch.arange(15).view(5, 3) % 4 == 2
    rows = pack_padded_sequence(x, torch.tensor([5, 3, 2]))
    for given, masks in (
        (x, {}),
        (x, {"lengths": lengths}),
        (x, {"reset": reset}),
        (x, {"lengths": lengths, "reset": reset}),
        (rows.data, {"batch_sizes": rows.batch_sizes}),
    ):
        y, last = calls[name](given, **masks)
        want, ends, _ = functional.layer(name, given, states, params, **masks)
        torch.testing.assert_close((y, last), (want, ends if name == "lstm" else ends[0]), rtol=0, atol=0)


# The LSTM keeps most.
FORMS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "projection": {"P": 2},
    "projection without biases": {"P": 2, "bias": False},
    "packed": {"mask": "packed"},
}


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_other_forms(form):
    """And of a backward pass of which not all is needed."""
    options = {"mask": "none", **FORMS[form]}
    mask = options.pop("mask")
    x, states, params = random_case("lstm", 3, 2, 2, 3, D=2, **options)
    x, masks = random_masks(mask, x)
    args = (x, states, params, *(masks.get(name) for name in ("lengths", "batch_sizes", "reset")))
    torch.library.opcheck(torch.ops.fastrnn.layer.default, ("lstm", *args, True, True))
    y, last, seq, saved = torch.ops.fastrnn.layer("lstm", *args, True, True)
    for needs in ((True, False), (False, True)):
        back = ("lstm", y, last, [], *args, y, seq, saved, *needs)
        torch.library.opcheck(torch.ops.fastrnn.layer_backward.default, back)


@pytest.mark.parametrize("return_states", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_the_operator_gives_what_it_was_asked_for(save, return_states):
    """As csrc/ops.cpp has it, with gradients as without; what is saved has none."""
    x, states, params = random_case("lstm", 3, 2, 2, 3)
    for grad in (False, True):
        x.requires_grad_(grad)
        args = ("lstm", x, states, params, None, None, None, save, return_states)
        y, _, seq, saved = torch.ops.fastrnn.layer(*args)
        assert (len(seq), len(saved)) == (save or return_states, save)
        assert [t.requires_grad for t in (y, *seq, *saved)] == [grad] * (1 + len(seq)) + [False] * save


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("cell", CELLS)
def test_derivatives_of_the_backward_operator(cell, needs):
    """Of what it was asked for, and that alone: those of the whole."""
    x, states, params = random_case(cell, 3, 2, 2, 3)
    args = (x, states, params, None, None, None)
    y, last, seq, saved = torch.ops.fastrnn.layer(cell, *args, True, True)
    dy = torch.randn_like(y).requires_grad_()

    def backward(*needs):
        return torch.ops.fastrnn.layer_backward(cell, dy, last, [], *args, y, seq, saved, *needs)

    (dx, dstates, dparams), (whole, *others) = backward(*needs), backward(True, True)
    assert dx.shape == (x.shape if needs[0] else (0,))
    assert len(dparams) == needs[1] * len(params)
    ours = [*[dx] * needs[0], *dstates, *dparams]
    theirs = [*[whole] * needs[0], *others[0], *others[1][: len(dparams)]]
    found, expected = (
        torch.autograd.grad(sum(g.square().sum() for g in each), dy) for each in (ours, theirs)
    )
    with torch.no_grad():
        plain = [
            t for part in backward(*needs) for t in (part if isinstance(part, list) else [part] * needs[0])
        ]
    torch.testing.assert_close((ours, found), (theirs, expected), **TIGHT)
    torch.testing.assert_close(ours, plain, **TIGHT)


def test_the_backward_operator_on_two_devices():
    """What it gave would be memory that nobody filled."""
    x, states, params = random_case("lstm", 3, 2, 2, 3)
    args = (x, states, params, None, None, None)
    y, last, seq, saved = torch.ops.fastrnn.layer("lstm", *args, True, True)
    given = [y, last, [], *args, y, seq, saved]
    for k in (0, 1, 9, 10, 11):
        far = given[k].to("meta") if isinstance(given[k], torch.Tensor) else [t.to("meta") for t in given[k]]
        with pytest.raises(RuntimeError, match="not at the same device"):
            torch.ops.fastrnn.layer_backward("lstm", *given[:k], far, *given[k + 1 :], True, True)


def test_the_flop_counters_logger_is_as_it_was():
    assert logging.getLogger("torch.utils.flop_counter").level == logging.NOTSET


# Functions of [5, 2, 4], by each of the operators.
OPERATORS = {
    "layer": partial(fastrnn.LSTM, 4, 3, dtype=F64),
    "attention": partial(fastrnn.Attention, 4, dtype=F64),
    "decoder": partial(fastrnn.AttentionDecoder, 4, 4, 4, dtype=F64),
    "tree": partial(fastrnn.TreeRNN, 4, 3, dtype=F64),
}


def output(name, x):
    module = OPERATORS[name]()
    if name == "tree":
        return module(x.flatten(0, 1), fastrnn.Forest.from_parents([-1, *(k // 2 for k in range(9))]))
    return module(x, x.detach())[0] if name in ("attention", "decoder") else module(x)[0]


@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_over_a_backward_pass(name):
    """As torch's tutorial makes a Jacobian of a graph that is there."""
    x = torch.randn(5, 2, 4, dtype=F64, requires_grad=True)
    y = output(name, x)
    many = torch.randn(3, *y.shape, dtype=F64)
    together = torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(many)
    for v, g in zip(many, together, strict=True):
        torch.testing.assert_close(g, torch.autograd.grad(y, x, v, retain_graph=True)[0])

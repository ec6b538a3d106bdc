"""Recursive layers as torch's layers: derivatives, compilers, types, errors, state dicts."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode
from trees import CELLS, F64, binary, derivatives, forest, make, random_tree, recursion, states

import fastrnn

cells = pytest.mark.parametrize("cell", CELLS)
directions = pytest.mark.parametrize("direction", ["up", "down"])
TREES = random_tree(9, random.Random(3))


def as_function(layer, trees):
    """The layer as a function of x and its parameters."""
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *params):
        out = functional_call(layer, dict(zip(names, params, strict=True)), (x, trees))
        return out if isinstance(out, tuple) else (out,)

    return run, [p.detach().requires_grad_() for p in layer.parameters()]


@directions
@cells
def test_gradgradcheck(cell, direction):
    layer, trees = make(cell, 2, 2, direction=direction), forest(*random_tree(5, random.Random(1)))
    run, params = as_function(layer, trees)
    x = torch.randn(5, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *params))
    assert torch.autograd.gradgradcheck(run, (x, *params))


@cells
def test_second_and_third_derivatives_without_an_input(cell):
    """Of the parameters; weight_ih, which is not used, has none."""
    layer, trees = make(cell, 2, 3), forest(*TREES)
    states(layer, None, trees)[0].square().sum().backward()
    assert layer.weight_ih.grad is None
    assert layer.bias_ih.grad.abs().sum() > 0
    value = states(layer, None, trees)[0].square().sum()
    assert torch.autograd.grad(value, layer.weight_ih, create_graph=True, allow_unused=True) == (None,)

    def third(run):
        layer.zero_grad()
        value = sum(s.square().sum() for s in run())
        for _ in range(2):
            (value,) = torch.autograd.grad(value, layer.weight_hh, create_graph=True)
            value = value.square().sum()
        return torch.autograd.grad(value, layer.weight_hh)[0]

    ours, plain = (
        third(lambda: states(layer, None, trees)),
        third(lambda: recursion(layer, None, *TREES)),
    )
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@cells
def test_one_gradient_at_a_time(cell):
    """h alone, c alone, x alone, parameters alone: each is what it is among all."""
    layer, trees = make(cell, 2, 3), forest(*TREES)
    x = torch.randn(9, 2, dtype=F64, requires_grad=True)
    for index in range(len(states(layer, x, trees))):
        ours = derivatives([states(layer, x, trees)[index]], [x, *layer.parameters()])
        theirs = derivatives([recursion(layer, x, *TREES)[index]], [x, *layer.parameters()])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        for leaf, whole in zip([x, *layer.parameters()], ours, strict=True):
            alone = derivatives([states(layer, x, trees)[index]], [leaf])[0]
            torch.testing.assert_close(alone, whole)
    layer.requires_grad_(False)
    torch.testing.assert_close(derivatives(states(layer, x, trees)[:1], [x])[0].shape, x.shape)


@cells
def test_torch_func_and_batched_gradients(cell):
    layer, trees = make(cell, 2, 3), forest(*TREES)
    run, params = as_function(layer, trees)
    xs = torch.randn(4, 9, 2, dtype=F64)

    def loss(x, *params):
        return sum(s.sin().sum() for s in run(x, *params))

    for e, x in enumerate(xs):
        torch.testing.assert_close(vmap(lambda x: run(x, *params)[0])(xs)[e], run(x, *params)[0])
        own = x.clone().requires_grad_()
        expected = torch.autograd.grad(loss(own, *params), [own, *params])
        everything = tuple(range(1 + len(params)))
        for a, b in zip(grad(loss, everything)(x, *params), expected, strict=True):
            torch.testing.assert_close(a, b)
        _, along = jvp(lambda x: loss(x, *params), (x,), (xs[0],))
        torch.testing.assert_close(along, (expected[0] * xs[0]).sum())
    x = xs[0].requires_grad_()
    h = run(x, *params)[0]
    weights = torch.randn(3, *h.shape, dtype=F64)
    (together,) = torch.autograd.grad(h, x, weights, is_grads_batched=True, retain_graph=True)
    for v, g in zip(weights, together, strict=True):
        torch.testing.assert_close(torch.autograd.grad(h, x, v, retain_graph=True)[0], g)


def test_the_bare_operator_refuses_transforms():
    layer, schedule = fastrnn.TreeRNN(2, 3), forest([-1]).schedule("up")
    x = torch.randn(1, 2)

    def f(x):
        return torch.ops.fastrnn.tree("tree_rnn_tanh", x, list(layer.parameters()), schedule, False)[0].sum()

    with pytest.raises(RuntimeError, match="knows no transforms"):
        grad(f)(x)


@pytest.mark.parametrize("with_x", [True, False])
@cells
def test_opcheck(cell, with_x):
    layer, trees = make(cell, 2, 3, dtype=torch.float32), forest(*TREES)
    x = torch.randn(9, 2, requires_grad=True) if with_x else None
    for save in (True, False):
        arguments = (layer._cell, x, list(layer.parameters()), trees.schedule("up"), save)
        torch.library.opcheck(torch.ops.fastrnn.tree.default, arguments)
    with torch.no_grad():
        h, others, saved = torch.ops.fastrnn.tree(*arguments[:-1], True)
    # Without gradients of their own: a second derivative is taken level by level, which no graph could be.
    params = [p.detach() for p in layer.parameters()]
    own = (None if x is None else x.detach(), params, trees.schedule("up"), h, others, saved, with_x, True)
    arguments = (layer._cell, torch.ones_like(h), [torch.ones_like(c) for c in others], *own)
    for given in (arguments, (*arguments[:-1], False)):
        torch.library.opcheck(torch.ops.fastrnn.tree_backward.default, given)
    torch.library.opcheck(torch.ops.fastrnn.tree_schedule.default, (trees.parents, trees.slots, True))
    torch.library.opcheck(torch.ops.fastrnn.tree_slots.default, (trees.parents, None))


class Tagger(nn.Module):
    """Up, then down: every node knows its whole tree."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = fastrnn.NaryTreeLSTM(4, 6)
        self.down = fastrnn.TreeRNN(6, 5, direction="down")
        self.head = nn.Linear(5, 3)

    def forward(self, x, trees):
        h, _ = self.up(x, trees)
        return self.head(self.down(h, trees)), trees.at_roots(h)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_fullgraph(backend):
    """One graph for a given schedule, training too; another forest may compile again, and is right."""
    torch._dynamo.reset()
    model = Tagger()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for n in (11, 30, 7):
        trees, x = forest(*binary(n)), torch.randn(n, 4)
        ours, theirs = compiled(x, trees), model(x, trees)
        torch.testing.assert_close(ours, theirs)
        a, b = (derivatives(out, list(model.parameters())) for out in (ours, theirs))
        torch.testing.assert_close(a, b)


def test_the_graph_holds_one_operator_a_layer():
    """However deep the tree."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(Tagger(), fullgraph=True, backend=counter)
    compiled(torch.randn(400, 4), forest([*range(1, 400), -1]))
    (graph,) = counter.graphs
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum(name.startswith("fastrnn.tree") and "schedule" not in name for name in names) == 2


@cells
def test_torch_func_in_a_graph(cell):
    """First and second derivatives, of a forest whose levels are known; else the error says what to do."""
    torch._dynamo.reset()
    layer, trees, x = make(cell, 2, 3), forest(*TREES), torch.randn(9, 2, dtype=F64)

    def first(x):
        return grad(lambda x: sum(s.sin().sum() for s in states(layer, x, trees)))(x)

    def second(x):
        return grad(lambda x: first(x).square().sum())(x)

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call forest.steps\('up'\) before"):
        torch.compile(first, fullgraph=True, backend="eager")(x)
    expected = [first(x), second(x)]  # kept from within a transform, and no worse for it
    for run, value in zip((first, second), expected, strict=True):
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x), value)


def test_second_derivatives_of_a_graph():
    """torch's compiler has none, and says so; without its autograd they are the reference's, as in eager."""
    torch._dynamo.reset()
    layer, trees = make("nary", 2, 3), forest(*TREES)

    def second(run):
        x = torch.ones(9, 2, dtype=F64, requires_grad=True)
        (slope,) = torch.autograd.grad(run(x, trees)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    torch.testing.assert_close(second(torch.compile(layer, fullgraph=True, backend="eager")), second(layer))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second(torch.compile(layer, fullgraph=True, backend="aot_eager"))


@cells
def test_types(cell, tolerances):
    """16 bits and autocast: float32 arithmetic, rounded once."""
    wide, trees = make(cell, 4, 6), forest(*TREES)
    x = torch.randn(9, 4, dtype=F64)
    expected = states(wide, x, trees)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = copy.deepcopy(wide).to(dtype)
        out = states(layer, x.to(dtype), trees)
        assert all(s.dtype == dtype for s in out)
        torch.testing.assert_close([s.double() for s in out], list(expected), **tolerances[dtype].output)
        with fastrnn.backend("reference"):
            torch.testing.assert_close(
                list(states(layer, x.to(dtype), trees)), list(out), **tolerances[dtype].output
            )
    layer = copy.deepcopy(wide).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = states(layer, x.float().requires_grad_(), trees)
        assert all(s.dtype == torch.bfloat16 for s in out)
        torch.testing.assert_close(
            [s.double() for s in out], list(expected), **tolerances[torch.bfloat16].output
        )
        derivatives([s.float() for s in out], list(layer.parameters()))
    assert states(layer.to("meta"), torch.empty(9, 4, device="meta"), trees.to("meta"))[0].shape == (9, 6)


@pytest.mark.parametrize("kind", ["child_sum", "nary", "rnn"])
def test_state_dicts_of_torchs_cells(kind):
    """One seed gives the same weights."""
    ours, theirs = {
        "child_sum": (fastrnn.ChildSumTreeLSTM, nn.LSTMCell),
        "nary": (lambda *a: fastrnn.NaryTreeLSTM(*a, arity=1), nn.LSTMCell),
        "rnn": (lambda *a: fastrnn.TreeRNN(*a, arity=1), nn.RNNCell),
    }[kind]
    torch.manual_seed(1)
    tree = ours(3, 4)
    torch.manual_seed(1)
    cell = theirs(3, 4)
    for (name, p), (other, q) in zip(tree.state_dict().items(), cell.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(p, q)
    tree.load_state_dict(cell.state_dict())


def test_shapes_of_parameters_and_repr():
    nary = fastrnn.NaryTreeLSTM(3, 4, arity=5, bias=False)
    assert nary.weight_ih.shape == (16, 3)
    assert nary.weight_hh.shape == (32, 20)
    assert nary.bias_ih is None
    assert repr(nary) == "NaryTreeLSTM(3, 4, arity=5, bias=False)"
    rnn = fastrnn.TreeRNN(3, 4, nonlinearity="relu", direction="down")
    assert rnn.weight_hh.shape == (4, 8)
    assert repr(rnn) == "TreeRNN(3, 4, arity=2, direction='down', nonlinearity=relu)"
    assert repr(fastrnn.ChildSumTreeLSTM(3, 4)) == "ChildSumTreeLSTM(3, 4)"
    none = fastrnn.ChildSumTreeLSTM(0, 4)
    h, _ = none(None, forest([1, -1]))
    torch.testing.assert_close(none(torch.empty(2, 0), forest([1, -1]))[0], h)


X = torch.randn(3, 2)
PATH = [1, 2, -1]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fastrnn.TreeRNN(2, 3)(X[:2], forest(PATH)), ValueError, r"\[3, 2\].*3 nodes, got \[2, 2\]"),
        (lambda: fastrnn.TreeRNN(4, 3)(X, forest(PATH)), ValueError, r"x must be \[N, I\] = \[3, 4\]"),
        (lambda: fastrnn.TreeRNN(2, 3)(X[0], forest(PATH)), ValueError, r"got \[2\]"),
        (lambda: fastrnn.TreeRNN(2, 3)(X.double(), forest(PATH)), RuntimeError, "same dtype"),
        (lambda: fastrnn.TreeRNN(2, 3)([1], forest(PATH)), TypeError, "x must be a Tensor or None, got list"),
        (lambda: fastrnn.TreeRNN(2, 3)(X, PATH), TypeError, "must be a fastrnn.Forest, got list"),
        (
            lambda: fastrnn.NaryTreeLSTM(2, 3)(X, forest([-1, 0, 0], [0, 0, 4])),
            ValueError,
            "node 0 has a child, node 2, in slot 4; a cell of arity 2 has slots 0 to 1",
        ),
        (
            lambda: fastrnn.TreeRNN(2, 3, 1, direction="down")(X, forest([-1, 0, 0])),
            ValueError,
            "node 0 has a child, node 2, in slot 1",
        ),
        (lambda: fastrnn.TreeRNN(2, 3)(X, forest(PATH).to("meta")), RuntimeError, "forest is on meta"),
        (lambda: fastrnn.TreeRNN(2, 3, nonlinearity="sin"), ValueError, "'tanh' or 'relu', got 'sin'"),
        (lambda: fastrnn.NaryTreeLSTM(2, 3, 0), ValueError, "arity must be 1 or more, got 0"),
        (lambda: fastrnn.NaryTreeLSTM(2, 0), ValueError, "hidden_size must be 1 or more"),
        (lambda: fastrnn.NaryTreeLSTM(-1, 3), ValueError, "input_size must be 0 or more, got -1"),
        (lambda: fastrnn.NaryTreeLSTM(2.0, 3), TypeError, "input_size must be an int, got float"),
        (lambda: fastrnn.TreeRNN(2, 3, bias=1), TypeError, "bias should be of type bool"),
        (lambda: fastrnn.ChildSumTreeLSTM(2, 3, direction="left"), ValueError, "'up' or 'down', got 'left'"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_biases_of_another_dtype_or_size(backend):
    for bias, words in (
        (torch.zeros(3).double(), r"same dtype.*bias_hh is torch\.float64"),
        (torch.zeros(1), r"bias_hh must be \[3\], got \[1\]"),  # which would broadcast
    ):
        layer = fastrnn.TreeRNN(2, 3)
        layer.bias_hh = nn.Parameter(bias)
        with fastrnn.backend(backend), pytest.raises(RuntimeError, match=words):
            layer(X, forest(PATH))


def test_meta_layers():
    layer = fastrnn.TreeRNN(2, 3, device="meta")
    for backend in ("auto", "reference"):
        with fastrnn.backend(backend), pytest.raises(RuntimeError, match="are not at the same device"):
            layer(X, forest(PATH))
    assert layer(torch.empty(3, 2, device="meta"), forest(PATH)).shape == (3, 3)


def test_autocast_casts_the_input():
    layer, x = fastrnn.TreeRNN(2, 3), torch.randn(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x, forest(PATH)), layer(x.bfloat16(), forest(PATH)))


def test_a_replaced_weight_of_the_wrong_shape():
    layer = fastrnn.NaryTreeLSTM(2, 3)
    layer.weight_hh = nn.Parameter(torch.randn(15, 3))
    with pytest.raises(RuntimeError, match=r"weight_hh must be \[15, 6\], got \[15, 3\]"):
        layer(X, forest(PATH))


@pytest.mark.parametrize("asked", ["triton", "cuda"])
def test_backends_without_recursive_cells_say_so(asked):
    layer = fastrnn.TreeRNN(2, 3)
    with (
        fastrnn.backend(asked),
        pytest.raises(fastrnn.BackendError, match="it has no kernel for recursive cells"),
    ):
        layer(X, forest(PATH))
    with fastrnn.backend(asked):
        assert fastrnn.explain(layer, X).backend is None


def test_explain():
    layer = fastrnn.NaryTreeLSTM(2, 3)
    assert "nary_lstm levels in C++" in repr(fastrnn.explain(layer, X))
    assert fastrnn.explain(layer, None).backend == "cpu"
    assert fastrnn.explain(layer, X.to(torch.complex64)).backend == "reference"
    with fastrnn.backend("reference"):
        assert fastrnn.explain(layer, X).reason == "asked for"
    with pytest.raises(TypeError, match="a LSTM needs an input"):
        fastrnn.explain(fastrnn.LSTM(2, 3), None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@directions
@cells
def test_on_the_gpu(cell, direction):
    """The plain reference there: values and gradients of the CPU."""
    layer, trees = make(cell, 3, 8, direction=direction), forest(*random_tree(200, random.Random(1)))
    x = torch.randn(200, 3, dtype=F64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    out = states(layer, x, trees)
    expected = [*out, *derivatives(out, leaves)]
    far = copy.deepcopy(layer).cuda()
    moved = [x.detach().cuda().requires_grad_(), *far.parameters()]
    out = states(far, moved[0], trees.to("cuda"))
    weights = torch.linspace(-1, 2, out[0].numel(), dtype=F64).view(out[0].shape).cuda()
    found = [*out, *torch.autograd.grad(sum((s * weights).sum() for s in out), moved)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_x", [True, False])
@cells
def test_derivatives_of_the_backward_operator(cell, with_x):
    """In all that it was given, by finite differences; of what it was asked for, and that alone."""
    layer, schedule = make(cell, 2, 2), forest(*random_tree(5, random.Random(1))).schedule("up")
    S = 1 + (cell in ("child_sum", "nary"))
    x = [torch.randn(5, 2, dtype=F64)] if with_x else []
    grads = [torch.randn(5, 2, dtype=F64) for _ in range(S)]
    leaves = [t.detach().requires_grad_() for t in (*grads, *x, *layer.parameters())]

    def backward(needs, *flat):
        (dh, *dstates), x, params = flat[:S], flat[S] if with_x else None, list(flat[S + with_x :])
        with torch.no_grad():
            kept = torch.ops.fastrnn.tree(layer._cell, x, params, schedule, True)
        args = (layer._cell, dh, dstates, x, params, schedule, *kept)
        dx, dparams = torch.ops.fastrnn.tree_backward(*args, *needs)
        assert dx.shape == ((5, 2) if with_x and needs[0] else (0,))
        assert len(dparams) == needs[1] * len(params)
        return (*[dx] * (with_x and needs[0]), *dparams)

    assert torch.autograd.gradcheck(lambda *flat: backward((True, True), *flat), leaves)
    whole = backward((True, True), *leaves)
    with torch.no_grad():
        torch.testing.assert_close(whole, backward((True, True), *leaves))
    for needs in ((True, False), (False, True), (False, False)):
        expected = whole[:with_x] * needs[0] + whole[with_x:] * needs[1]
        torch.testing.assert_close(backward(needs, *leaves), expected)


@pytest.mark.parametrize("with_x", [True, False])
@cells
def test_flops(cell, with_x):
    """As if every node were another's child, in one slot; the backward pass again for both factors."""
    layer, trees = make(cell, 2, 3), forest(*TREES)
    x = torch.randn(9, 2, dtype=F64) if with_x else None
    weights = layer.weight_ih.numel() * with_x + layer.weight_hh.numel() // layer.arity
    with FlopCounterMode(display=False) as counter:
        h = states(layer, x, trees)[0]
    assert counter.get_total_flops() == 2 * 9 * weights
    with FlopCounterMode(display=False) as counter:
        h.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * weights


def test_what_the_operator_keeps_has_no_gradient():
    """And it keeps it where it is asked to."""
    layer, schedule = make("nary", 2, 3), forest(*TREES).schedule("up")
    for save in (False, True):
        *_, saved = torch.ops.fastrnn.tree(layer._cell, None, list(layer.parameters()), schedule, save)
        assert len(saved) == 2 * save
        assert not any(t.requires_grad for t in saved)


@cells
def test_what_lies_apart(cell):
    """An x wider than all children's h, whose rows are another's columns; gradients of sums, one number."""
    layer, trees = make(cell, 100, 3), forest(*TREES)
    x = torch.randn(100, 9, dtype=F64).t().requires_grad_()
    leaves, found = [x, *layer.parameters()], []
    for backend in ("cpu", "reference"):
        with fastrnn.backend(backend):
            out = states(layer, x, trees)
        found.append([*out, *torch.autograd.grad(sum(s.sum() for s in out), leaves)])
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_the_operators_trust_nobody():
    layer, schedule = make("nary", 2, 3, dtype=torch.float32), forest(*TREES).schedule("up")
    params = [p.detach() for p in layer.parameters()]
    h, kept, saved = torch.ops.fastrnn.tree("nary_lstm", None, params, schedule, True)
    for given in ((kept, []), (kept, saved[:1]), ([], saved), (kept * 2, saved)):
        with pytest.raises(RuntimeError, match="needs what tree gave and saved"):
            torch.ops.fastrnn.tree_backward(
                "nary_lstm", h, [], None, params, schedule, h, *given, False, True
            )
    with pytest.raises(RuntimeError, match="needs what tree gave and saved"):
        torch.ops.fastrnn.tree_backward(
            "nary_lstm", h, kept * 2, None, params, schedule, h, kept, saved, False, True
        )
    with pytest.raises(RuntimeError, match="params must be"):
        torch.ops.fastrnn.tree("nary_lstm", None, [], schedule, False)

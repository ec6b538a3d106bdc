"""torch.func, forward-mode AD and their nestings: the kernels' answers are the plain reference's."""

from __future__ import annotations

import pytest
import torch
from helpers import MASKS, random_case, random_masks
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fastrnn
from fastrnn import functional, kernels
from fastrnn.reference import CELLS

KINDS = ("LSTM", "GRU", "RNN")


class Case:
    """A layer as a function of (x, *states, *params), all of its outputs, and random arguments for it."""

    def __init__(self, cell, mask="none", D=2, P=0):
        x, states, params = random_case(cell, 4, 3, 2, 3, D=D, P=P)
        x, self.masks = random_masks(mask, x)
        self.cell, self.states = cell, len(states)
        self.flat = (x, *states, *params)

    def __call__(self, x, *rest, **masks):
        states, params = rest[: self.states], rest[self.states :]
        masks = {**self.masks, **masks}
        y, last, seq = functional.layer(self.cell, x, states, params, return_states=True, **masks)
        return (y, *last, *seq)

    def loss(self, *flat, **masks):
        return sum((t * t.detach().sin()).sum() + t.square().sum() for t in self(*flat, **masks))


def both(function):
    """The kernels' answer and the reference's."""
    with fastrnn.backend("cpu"):
        ours = function()
    with fastrnn.backend("reference"):
        return ours, function()


def agree(function):
    torch.testing.assert_close(*both(function), rtol=1e-9, atol=1e-9)


def stacked(flat, count=3):
    return tuple(torch.stack([t * (1 + 0.3 * e) for e in range(count)]) for t in flat)


cells = pytest.mark.parametrize("cell", CELLS)
masks = pytest.mark.parametrize("mask", MASKS)


@masks
@cells
def test_grad_and_vjp(cell, mask):
    case = Case(cell, mask)
    everything = tuple(range(len(case.flat)))
    agree(lambda: grad(case.loss, everything)(*case.flat))
    agree(lambda: vjp(case, *case.flat)[1](tuple(torch.ones_like(t) for t in case(*case.flat))))


@masks
@cells
def test_vmap(cell, mask):
    """Over the input, over all that has rows, over one parameter, over everything; at any dimension."""
    case = Case(cell, mask)
    many, n = stacked(case.flat), len(case.flat)
    rows = 1 + case.states
    for batched in (range(1), range(rows), range(n - 1, n), range(n)):
        dims = tuple(0 if i in batched else None for i in range(n))
        args = [many[i] if i in batched else case.flat[i] for i in range(n)]
        agree(lambda dims=dims, args=args: vmap(case, dims)(*args))
    moved = (many[0].movedim(0, -1), *case.flat[1:])
    agree(lambda: vmap(case, (-1, *[None] * (n - 1)), out_dims=1)(*moved))


@cells
def test_vmap_over_masks(cell):
    case = Case(cell)
    x = case.flat[0]
    lengths = torch.tensor([[4, 0, 2], [1, 3, 4]])
    reset = torch.rand(2, *x.shape[:2]) < 0.4
    agree(lambda: vmap(lambda a: case(*case.flat, lengths=a))(lengths))
    agree(lambda: vmap(lambda a, b: case(*case.flat, lengths=a, reset=b))(lengths, reset))
    agree(lambda: vmap(lambda a: grad(case.loss)(*case.flat, reset=a))(reset))


@masks
@cells
def test_gradients_of_each_sample(cell, mask):
    """vmap(grad): for parameters, and for inputs alone."""
    case = Case(cell, mask)
    n, rows = len(case.flat), 1 + case.states
    samples = (*stacked(case.flat[:rows]), *case.flat[rows:])
    dims = tuple(0 if i < rows else None for i in range(n))
    agree(lambda: vmap(grad(case.loss, tuple(range(n))), dims)(*samples))
    agree(lambda: vmap(grad(case.loss), dims)(*samples))
    alone = [grad(case.loss, n - 1)(*(t[e] for t in samples[:rows]), *samples[rows:]) for e in range(3)]
    torch.testing.assert_close(vmap(grad(case.loss, n - 1), dims)(*samples), torch.stack(alone))


@masks
@cells
def test_tangents(cell, mask):
    case = Case(cell, mask)
    tangents = tuple(torch.randn_like(t) for t in case.flat)
    agree(lambda: jvp(case, case.flat, tangents))
    agree(lambda: jvp(lambda x: case(x, *case.flat[1:]), case.flat[:1], tangents[:1]))
    # The transpose of the gradient, by torch's own reverse mode.
    _, pullback = vjp(case, *case.flat)
    outputs, pushed = jvp(case, case.flat, tangents)
    cotangents = tuple(torch.randn_like(t) for t in outputs)
    forward = sum((a * b).sum() for a, b in zip(pushed, cotangents, strict=True))
    backward = sum((a * b).sum() for a, b in zip(tangents, pullback(cotangents), strict=True))
    torch.testing.assert_close(forward, backward)

    def duals():
        with forward_ad.dual_level():
            made = [forward_ad.make_dual(p, t) for p, t in zip(case.flat, tangents, strict=True)]
            return [forward_ad.unpack_dual(t).tangent for t in case(*made)]

    torch.testing.assert_close(duals(), list(pushed))


@cells
def test_jacobians_and_hessians(cell):
    case = Case(cell, "lengths", D=1)

    def directional(x, *rest):
        return jvp(lambda x: case.loss(x, *rest), (x,), (x,))[1]

    for w in (0, len(case.flat) - 1):
        agree(lambda w=w: jacrev(case, w)(*case.flat))
        agree(lambda w=w: jacfwd(case, w)(*case.flat))
        agree(lambda w=w: hessian(case.loss, w)(*case.flat))  # forward over reverse
        agree(lambda w=w: jacrev(grad(case.loss, w), w)(*case.flat))
        agree(
            lambda w=w: grad(lambda *f: jvp(lambda x: case.loss(x, *f[1:]), f[:1], f[:1])[1], w)(*case.flat)
        )
    torch.testing.assert_close(jacrev(case)(*case.flat), jacfwd(case)(*case.flat))


@cells
def test_forward_modes_in_one_another(cell):
    """torch calls a Function's jvp with forward mode off: the outer of two would see nothing."""
    case = Case(cell)
    x, *rest = case.flat
    v = torch.randn_like(x)

    def along(f):
        return lambda u: jvp(f, (u,), (v,))[1]

    def y(u):
        return case(u, *rest)[0]

    def loss(u):
        return case.loss(u, *rest)

    def pullback():
        pull = vjp(y, x)[1]
        return along(along(lambda u: pull(u.sin().sum() * torch.ones_like(y(x)))[0]))(x)

    for nest in (
        lambda: along(along(y))(x),
        lambda: along(along(grad(loss)))(x),
        lambda: along(grad(lambda u: along(loss)(u)))(x),
        lambda: grad(lambda u: along(along(loss))(u))(x),
        lambda: vmap(along(along(y)))(torch.stack([x, 2 * x])),
        lambda: jacfwd(jacfwd(loss))(x),
        pullback,
    ):
        ours, theirs = both(nest)
        assert theirs.abs().max() > 1e-3 or cell == "rnn_relu"  # whose second derivative is 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_forward_modes_in_one_another_compiled():
    layer = fastrnn.GRU(2, 3).double()
    x, v = torch.randn(3, 1, 2).double(), torch.randn(3, 1, 2).double()

    def twice(u):
        return jvp(lambda w: jvp(lambda z: layer(z)[0], (w,), (v,))[1], (u,), (v,))[1]

    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), twice(x))


def test_vmap_over_nothing():
    layer = fastrnn.LSTM(2, 3)
    assert vmap(lambda x: layer(x)[0])(torch.randn(0, 5, 4, 2)).shape == (0, 5, 4, 3)
    assert vmap(lambda x: layer(x)[0], in_dims=1)(torch.randn(5, 0, 4, 2)).shape == (0, 5, 4, 3)
    params = {name: p.expand(0, *p.shape) for name, p in layer.named_parameters()}
    many = vmap(lambda p, x: functional_call(layer, p, x)[0], in_dims=(0, None))
    assert many(params, torch.randn(5, 4, 2)).shape == (0, 5, 4, 3)


def test_projection_nested_vmap_and_third_derivatives():
    case = Case("lstm", "lengths+reset", P=2)
    agree(lambda: vmap(grad(case.loss, tuple(range(len(case.flat)))))(*stacked(case.flat)))
    agree(lambda: jvp(grad(case.loss), case.flat, case.flat))
    many = torch.stack(stacked(case.flat[:1])[0].unbind() * 2).unflatten(0, (2, 3))
    agree(lambda: vmap(vmap(lambda x: case(x, *case.flat[1:])))(many))
    small = Case("gru", D=1)

    def loss(h):
        return small.loss(small.flat[0], h, *small.flat[2:])

    agree(lambda: grad(lambda h: grad(lambda h: grad(loss)(h).sum())(h).sum())(small.flat[1]))


def test_kernels_are_called(monkeypatch):
    """One call where samples share weights; one each for stacked weights and for samples' own gradients."""
    case, calls = Case("gru"), []
    call, backward = kernels.call, kernels.run_backward
    monkeypatch.setattr(kernels, "call", lambda i, *rest: calls.append(i.x.shape[1]) or call(i, *rest))
    monkeypatch.setattr(kernels, "run_backward", lambda i, *rest: calls.append("back") or backward(i, *rest))
    many, rest = stacked(case.flat), case.flat[1:]
    one = (0, *[None] * len(rest))
    vmap(case, one)(many[0], *rest)
    assert calls == [9]
    calls.clear()
    vmap(grad(case.loss), one)(many[0], *rest)
    assert calls == [9, 9, "back"]
    calls.clear()
    vmap(case)(*many)
    assert calls == [3, 3, 3]
    calls.clear()
    with torch.no_grad():
        vmap(grad(case.loss, len(rest)), one)(many[0], *rest)
    assert calls == [9] + [3, "back"] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_ensembles_and_private_gradients_of_modules(kind):
    """As torch's tutorials write them; trained parameters outside the transform get their gradients too."""
    models = [getattr(fastrnn, kind)(3, 4, num_layers=2, bidirectional=True).double() for _ in range(3)]
    params, buffers = stack_module_state(models)
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def run(params, buffers, x):
        return functional_call(models[0], (params, buffers), (x,))[0]

    together = vmap(run, (0, 0, None))(params, buffers, x)
    for y, model in zip(together, models, strict=True):
        torch.testing.assert_close(y, model(x)[0])
    together.square().sum().backward()
    for e, model in enumerate(models):
        model(x)[0].square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(params[name].grad[e], p.grad)
    samples = torch.randn(4, 5, 2, 3, dtype=torch.float64)
    shared = {name: p.detach() for name, p in models[0].named_parameters()}
    each = vmap(grad(lambda p, x: run(p, {}, x).square().sum()), (None, 0))(shared, samples)
    for e, sample in enumerate(samples):
        models[0].zero_grad()
        models[0](sample)[0].square().sum().backward()
        for name, p in models[0].named_parameters():
            torch.testing.assert_close(each[name][e], p.grad)


def test_dropout_under_vmap_follows_randomness():
    layer = fastrnn.LSTM(3, 4, num_layers=2, dropout=0.5)
    xs = torch.randn(1, 6, 2, 3).expand(2, -1, -1, -1)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: layer(x)[0])(xs)
    same = vmap(lambda x: layer(x)[0], randomness="same")(xs)
    different = vmap(lambda x: layer(x)[0], randomness="different")(xs)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def test_bfloat16_and_states():
    """Double backward in bfloat16, where the kernel's cell state is float32."""
    layer = fastrnn.LSTM(3, 4).bfloat16()
    x = torch.randn(5, 2, 3).bfloat16().requires_grad_()
    _, _, states = layer(x, return_states=True)
    (dx,) = torch.autograd.grad(states.c.square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    twin = fastrnn.LSTM(3, 4).double()
    twin.load_state_dict(layer.state_dict())
    z = x.detach().double().requires_grad_()
    (dz,) = torch.autograd.grad(twin(z, return_states=True)[2].c.square().sum(), z, create_graph=True)
    dz.square().sum().backward()
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=0.1, atol=0.1 * float(z.grad.abs().max()))
    vmapped = vmap(lambda x: layer(x, return_states=True)[2].c)(x.detach()[None])
    assert vmapped.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    """The compiler traces the transforms, and finds the kernels in them."""
    layer = getattr(fastrnn, kind)(3, 4).double()
    params = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    xs = torch.stack([x, 2 * x])

    def loss(params, x):
        return functional_call(layer, params, (x,))[0].square().sum()

    for name, function in {
        "vmap": lambda: vmap(lambda x: layer(x)[0])(xs),
        "vmap(grad)": lambda: vmap(grad(loss), (None, 0))(params, xs),
        "jvp": lambda: jvp(lambda x: layer(x)[0], (x,), (x,)),
        "jacfwd": lambda: jacfwd(lambda x: layer(x)[0])(x),
        "hessian": lambda: hessian(lambda x: loss(params, x))(x),
    }.items():
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), function(), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "dual"])
def test_the_bare_operator_refuses(transform):
    """It would drop tangents without a word."""
    x, states, params = random_case("gru", 3, 2, 2, 3)

    def f(x):
        return torch.ops.fastrnn.layer("gru", x, states, params, None, None, None, False, False)[0].sum()

    def dual(x):
        with forward_ad.dual_level():
            f(forward_ad.make_dual(x, x))

    run = {"grad": grad(f), "jvp": lambda x: jvp(f, (x,), (x,)), "vmap": vmap(f), "dual": dual}[transform]
    with pytest.raises(RuntimeError, match=r"knows no transforms|Batching rule not implemented"):
        run(x)


@pytest.mark.parametrize("kind", KINDS)
def test_functionalize(kind):
    """Around and inside other transforms; as a graph of plain operators."""
    layer, x = getattr(fastrnn, kind)(4, 6, dtype=torch.float64), torch.randn(5, 2, 4, dtype=torch.float64)

    def loss(x):
        return layer(x)[0].square().sum()

    functionalize = torch.func.functionalize
    expected, slope = layer(x)[0], grad(loss)(x)
    torch.testing.assert_close(functionalize(lambda x: layer(x)[0])(x), expected)
    torch.testing.assert_close(functionalize(grad(loss))(x), slope)
    torch.testing.assert_close(grad(functionalize(loss))(x), slope)
    torch.testing.assert_close(make_fx(functionalize(grad(loss)))(x)(x), slope)


def test_vmap_over_batch_sizes():
    """Other rows are each entry's own: a call for each."""
    x, states, params = random_case("lstm", 4, 3, 2, 3, D=2)
    rows, many = x.flatten(0, 1)[:6], torch.tensor([[3, 2, 1], [2, 2, 2]])

    def run(sizes):
        return functional.layer("lstm", rows, states, params, batch_sizes=sizes)[:2]

    (y, last), each = vmap(run)(many), [run(sizes) for sizes in many]
    torch.testing.assert_close(y, torch.stack([one[0] for one in each]))
    for k, state in enumerate(last):
        torch.testing.assert_close(state, torch.stack([one[1][k] for one in each]))


def test_errors_under_transforms():
    """In the words of any call's."""
    x, states, params = random_case("gru", 3, 2, 2, 3)
    wrong = [params[0], params[1][:, :2], *params[2:]]
    with pytest.raises(ValueError, match=r"w_hh must be \[9, 3\], got \[9, 2\]"):
        vmap(lambda x: functional.layer("gru", x, states, wrong)[0])(x[None])


def test_the_bare_backward_operator_refuses():
    """A tangent of the gradient that it was given, too."""
    x, states, params = random_case("gru", 3, 2, 2, 3)
    args = (x, states, params, None, None, None)
    y, _, seq, saved = torch.ops.fastrnn.layer("gru", *args, True, True)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(y, y)
        with pytest.raises(RuntimeError, match="knows no transforms"):
            torch.ops.fastrnn.layer_backward("gru", dy, [], [], *args, y, seq, saved, True, True)

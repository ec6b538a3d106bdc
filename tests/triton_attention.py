"""The Triton kernels of attention against the float64 reference; test_triton.py runs these as it runs
triton_interpreted.py's."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import functional, fused, reference
from fastrnn.triton_kernels import attention as kernels
from fastrnn.triton_kernels import heuristics

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
F64 = torch.float64
ALL = (True,) * 4  # the gradients that are needed
EPSILON = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MASKS = ("none", "lengths", "queries")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if kernels.INTERPRETED:
        import side_by_side

        side_by_side.install(monkeypatch)


@pytest.fixture(autouse=True)
def memory_that_nobody_filled_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills what is allocated
    yield
    torch.use_deterministic_algorithms(False)


def case(Tq, S, B, K, V, additive, mask):
    """(query, keys, values, v), mask: some queries that may attend to nothing, some positions to none."""
    given = [torch.randn(shape, dtype=F64) for shape in ((Tq, B, K), (S, B, K), (S, B, V))]
    given.append(torch.randn(K, dtype=F64) if additive else None)
    if mask == "lengths":
        lengths = torch.arange(B) * S // max(1, B - 1)
        return given, torch.arange(S) < lengths[:, None]
    if mask == "queries":
        allowed = torch.rand(B, Tq, S) < 0.7
        allowed[:, Tq // 2] = False
        allowed[:, :, S // 2] = False
        return given, allowed
    return given, None


def error(ours, expected):
    """The largest error, of the largest entry."""
    worst = 0.0
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all()
        if b.numel():
            worst = max(worst, (a.cpu().to(F64) - b).abs().max().item() / max(b.abs().max().item(), 1e-3))
    return worst


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("dtype", EPSILON)
def test_values_and_gradients(dtype, additive, mask, need_weights):
    """Of several tiles of queries and positions, in several programs of columns without a mask."""
    widths = (130, 140) if mask == "none" else (33, 20)
    given, allowed = case(18, 35, 2, *widths, additive, mask)
    given = [None if t is None else t.to(dtype).to(F64).requires_grad_() for t in given]
    context, weights = reference.attention(*given, allowed, 0.5)
    outputs = [context, weights] if need_weights else [context]
    grads = [torch.randn_like(o) for o in outputs]
    leaves = [t for t in given if t is not None]
    expected = torch.autograd.grad(outputs, leaves, grads)
    flat = [None if t is None else t.detach().to(DEVICE, dtype) for t in given]
    moved = None if allowed is None else allowed.to(DEVICE)
    found = kernels.forward(*flat, moved, 0.5, need_weights)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    assert error(found[: 1 + need_weights], outputs) < EPSILON[dtype]
    given_back = [g.to(DEVICE, dtype) for g in grads] + [None] * (not need_weights)
    back = kernels.backward(*given_back, *flat, moved, 0.5, found[0], found[2], *ALL)
    assert error(back[: len(leaves)], expected) < 2 * EPSILON[dtype]


@pytest.mark.parametrize("additive", [False, True])
def test_only_weights_have_a_gradient(additive):
    given, allowed = case(5, 7, 2, 4, 3, additive, "lengths")
    given = [None if t is None else t.requires_grad_() for t in given]
    context, weights = reference.attention(*given, allowed, 1.0)
    leaves = [t for t in given if t is not None]
    dweights = torch.randn_like(weights)
    expected = torch.autograd.grad(weights, leaves, dweights, materialize_grads=True)
    flat = [None if t is None else t.detach().to(DEVICE, torch.float32) for t in given]
    allowed, dweights = allowed.to(DEVICE), dweights.to(DEVICE, torch.float32)
    context, _, lse = kernels.forward(*flat, allowed, 1.0, True)
    back = kernels.backward(None, dweights, *flat, allowed, 1.0, context, lse, *ALL)
    assert error(back[: len(leaves)], expected) < 1e-4


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("additive", [False, True])
def test_gradients_that_nobody_needs(additive, mask):
    """They have no elements, and the others the bits they have together."""
    given, allowed = case(18, 35, 2, 33, 20, additive, mask)
    flat = [None if t is None else t.to(DEVICE, torch.float32) for t in given]
    allowed = None if allowed is None else allowed.to(DEVICE)
    context, weights, lse = kernels.forward(*flat, allowed, 0.5, True)
    args = (context, weights, *flat, allowed, 0.5, context, lse)
    whole = kernels.backward(*args, *ALL)
    for needs in itertools.product((False, True), repeat=4):
        for need, ours, expected in zip(needs, kernels.backward(*args, *needs), whole, strict=True):
            assert torch.equal(ours, expected) if need else ours.shape == (0,), needs


@pytest.mark.parametrize("additive", [False, True])
def test_what_nobody_may_attend_to_is_not_read(additive):
    given, allowed = case(5, 7, 3, 4, 3, additive, "lengths")
    flat = [None if t is None else t.to(DEVICE, torch.float32) for t in given]
    for t in flat[1:3]:
        t[~allowed.t().to(DEVICE)] = float("nan")
    context, weights, lse = kernels.forward(*flat, allowed.to(DEVICE), 1.0, True)
    back = kernels.backward(context, weights, *flat, allowed.to(DEVICE), 1.0, context, lse, *ALL)
    assert all(t.isfinite().all() for t in (context, weights, lse, *back))
    assert (context[:, 0] == 0).all()  # a sequence of no positions
    assert (weights.sum(-1)[1:] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("additive", [False, True])
def test_no_gradient_reaches_what_nobody_may_attend_to(additive):
    """Not one of 0 times infinity either."""
    given, _ = case(5, 7, 2, 4, 3, additive, "none")
    flat = [None if t is None else t.to(DEVICE, torch.float32) for t in given]
    allowed = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    allowed[0, [2, 6]] = False
    context, _, lse = kernels.forward(*flat, allowed, 1.0, False)
    dcontext = torch.ones_like(context)
    dcontext[1, 0, 0] = torch.inf
    _, dkeys, dvalues, _ = kernels.backward(dcontext, None, *flat, allowed, 1.0, context, lse, *ALL)
    for gradient in (dkeys, dvalues):
        assert (gradient[[2, 6], 0] == 0).all()
        assert gradient[:, 1].isfinite().all()


def test_no_number_in_a_score_reaches_its_query():
    """As the reference has it: it must not pass for a query that may attend to nothing."""
    given, _ = case(3, 4, 1, 5, 2, False, "none")
    query, keys, values = (t.to(DEVICE, torch.float32) for t in given[:3])
    for bad in (float("nan"), float("inf")):
        query[1, 0, 0] = bad
        context, weights, lse = kernels.forward(query, keys, values, None, None, 1.0, True)
        assert context[1].isnan().all()
        assert weights[0, 1].isnan().all()
        assert lse[0, 1].isnan()
        assert context[[0, 2]].isfinite().all()


@pytest.mark.parametrize("additive", [False, True])
def test_scores_of_minus_infinity_alone(additive):
    """They have no softmax, as in the reference; only a mask leaves nothing to attend to."""
    given, _ = case(3, 20, 1, 5, 2, additive, "none")
    query, keys, values, v = (None if t is None else t.to(DEVICE, torch.float32) for t in given)
    if additive:
        v[0], query[1, 0, 0] = float("inf"), -100.0
        query[[0, 2], 0, 0] = 100.0
    else:
        keys[:, 0, 0] = keys[:, 0, 0].abs() + 1
        query[1, 0, 0] = float("-inf")
    cpu = [None if t is None else t.cpu().to(F64) for t in (query, keys, values, v)]
    expected = reference.attention(*cpu, None, 1.0)
    context, weights, _ = kernels.forward(query, keys, values, v, None, 1.0, True)
    assert expected[0][1].isnan().all()
    for ours, theirs in zip((context, weights), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.float(), equal_nan=True)  # float32's own bounds
    allowed = torch.ones(1, 3, 20, dtype=torch.bool, device=DEVICE)
    allowed[:, 1] = False
    context, weights, lse = kernels.forward(query, keys, values, v, allowed, 1.0, True)
    assert all((t == 0).all() for t in (context[1], weights[0, 1], lse[0, 1]))


def test_additive_scores_of_small_sums():
    """Whose tanh is nearly themselves: a difference of numbers near 1 would have lost their digits."""
    given, _ = case(5, 20, 1, 7, 3, True, "none")
    query, keys, values, v = given[0] * 1e-4, given[1] * 1e-4, given[2], given[3] * 1e4
    flat = [t.to(DEVICE, torch.float32) for t in (query, keys, values, v)]
    expected = reference.attention(*(t.cpu().to(F64) for t in flat), None, 1.0)
    assert error(kernels.forward(*flat, None, 1.0, True)[:2], expected) < 1e-5


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("additive", [False, True])
def test_the_same_gradient_of_all_weights_reaches_nothing(additive, dtype):
    """They sum up to 1 whatever the scores are. Rounded to 16 bits they would not."""
    given, _ = case(5, 40, 1, 7, 3, additive, "none")
    flat = [None if t is None else t.to(DEVICE, dtype) for t in given]
    context, weights, lse = kernels.forward(*flat, None, 1.0, True)
    back = kernels.backward(None, torch.full_like(weights, 100.0), *flat, None, 1.0, context, lse, *ALL)
    assert all(g.abs().max() < 1e-3 for g in back if g.numel())


@pytest.mark.parametrize("additive", [False, True])
def test_a_transposed_logarithm(additive):
    given, _ = case(5, 7, 3, 4, 3, additive, "none")
    flat = [None if t is None else t.to(DEVICE, torch.float32) for t in given]
    context, weights, lse = kernels.forward(*flat, None, 1.0, True)
    laid = lse.t().contiguous().t()
    assert not laid.is_contiguous()
    found = [kernels.backward(context, weights, *flat, None, 1.0, context, of, *ALL) for of in (lse, laid)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Allocations(TorchDispatchMode):
    """The shapes of what is allocated."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self.found.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(("additive", "weighted"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_some_queries_at_a_time(dtype, mask, additive, weighted, monkeypatch):
    """Which sum up to the same; in memory are then these queries' scores alone."""
    given, allowed = case(40, 35, 2, 4, 20, additive, mask)
    flat = [None if t is None else t.to(DEVICE, dtype) for t in given]
    allowed = None if allowed is None else allowed.to(DEVICE)
    context, weights, lse = kernels.forward(*flat, allowed, 0.5, True)
    args = (context, weights if weighted else None, *flat, allowed, 0.5, context, lse)
    whole = kernels.backward(*args, *ALL)
    monkeypatch.setattr(heuristics, "SCORE_BYTES", 1)
    with Allocations() as allocations:
        found = kernels.backward(*args, *ALL)
    assert (2, 16, 35) in allocations.found
    assert (2, 40, 35) not in allocations.found
    assert {t.dtype for t in found} == {dtype}
    assert error(found, [t.cpu().to(F64) for t in whole]) < EPSILON[dtype]
    for needs in ((True, False, False, False), (False, True, True, True)):
        for need, ours, expected in zip(needs, kernels.backward(*args, *needs), found, strict=True):
            assert torch.equal(ours, expected) if need else ours.shape == (0,), needs


def test_the_weights_are_allocated_once():
    given, _ = case(5, 7, 2, 4, 3, False, "none")
    flat = [None if t is None else t.to(DEVICE, torch.float32) for t in given]
    with Allocations() as allocations:
        kernels.forward(*flat, None, 1.0, True)
    assert allocations.found.count((2, 5, 7)) == 1


@pytest.mark.parametrize("sizes", [(16 * 65535 + 1, 1, 1, 1, 1), (1, 32 * 65535 + 1, 1, 1, 1)])
def test_more_tiles_than_a_launch_has_programs(sizes):
    given, _ = case(*sizes, False, "none")
    flat = [None if t is None else t.to(DEVICE, torch.float32) for t in given]
    with pytest.raises(RuntimeError, match=f"at most 65535 tiles .*, got .*Tq={sizes[0]}, S={sizes[1]}"):
        kernels.forward(*flat, None, 1.0, need_weights=True)


@pytest.mark.parametrize("additive", [False, True])
def test_a_gradient_of_no_weight_reaches_nothing(additive):
    """The loss of a logarithm of the weights has infinite ones."""
    given, allowed = case(5, 7, 3, 4, 3, additive, "lengths")
    flat = [None if t is None else t.to(DEVICE, torch.float32) for t in given]
    allowed = allowed.to(DEVICE)
    context, weights, lse = kernels.forward(*flat, allowed, 1.0, True)
    dweights = torch.where(weights == 0, float("inf"), 1 / weights)
    back = kernels.backward(context, dweights, *flat, allowed, 1.0, context, lse, *ALL)
    assert all(t.isfinite().all() for t in back)


@pytest.mark.parametrize(
    "sizes",
    [(0, 3, 2, 4, 5), (3, 0, 2, 4, 5), (3, 2, 0, 4, 5), (3, 2, 2, 0, 5), (3, 2, 2, 4, 0), (1, 1, 1, 1, 1)],
)
def test_smallest_sizes(sizes):
    given, _ = case(*sizes, False, "none")
    flat = [None if t is None else t.to(DEVICE, torch.float32) for t in given]
    context, weights, lse = kernels.forward(*flat, None, 1.0, True)
    Tq, S, B, _, V = sizes
    assert context.shape == (Tq, B, V)
    assert weights.shape == (B, Tq, S)
    if S:
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, Tq, device=DEVICE))
    back = kernels.backward(context, weights, *flat, None, 1.0, context, lse, *ALL)
    assert all(t.isfinite().all() for t in (context, *back))


def test_bad_input():
    given, _ = case(5, 7, 2, 4, 3, True, "none")
    query, keys, values, v = (t.to(DEVICE, torch.float32) for t in given)
    for flat, mask, text in (
        ((query, keys[:, :, 1:], values, v), None, r"keys must be .* = \[7, 2, 4\], got \[7, 2, 3\]"),
        ((query, keys, values, v[1:]), None, r"v must be \[K\] = \[4\], got \[3\]"),
        ((query, keys, values, v), torch.ones(2, 6, dtype=torch.bool), r"mask must be .* = \[2, 7\] or"),
        ((query[0], keys, values, v), None, "query must have 3 dimensions, got 2"),
    ):
        with pytest.raises(ValueError, match=text):
            kernels.forward(*flat, mask, 1.0, True)
    with pytest.raises(RuntimeError, match=r"bfloat16, float16 for all tensors, got float32, float64"):
        kernels.forward(query, keys.double(), values, v, None, 1.0, True)
    context, weights, lse = kernels.forward(query, keys, values, v, None, 1.0, True)
    rest = (query, keys, values, v, None, 1.0)
    for grads, kept, text in (
        ((context[1:], weights), (context, lse), r"dcontext must be \[5, 2, 3\]"),
        ((context, weights[:1]), (context, lse), r"dweights must be \[2, 5, 7\]"),
        ((context, weights), (context, lse[:, 1:]), r"lse must be \[2, 5\]"),
    ):
        with pytest.raises(ValueError, match=text):
            kernels.backward(*grads, *rest, *kept, *ALL)


def test_the_operator_of_a_gpu_calls_these_kernels():
    given, _ = case(5, 7, 2, 4, 3, False, "none")
    flat = [None if t is None else t.to(DEVICE, torch.float32) for t in given]
    ours = kernels.forward(*flat, None, 1.0, False)
    found = fused._triton("forward")(*flat, None, 1.0, False)
    assert all(torch.equal(a, b) for a, b in zip(ours, found, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="the operator goes to these kernels for GPU tensors")
@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("score", ["dot", "general", "additive"])
def test_modules(score, dtype):
    """The layer with Triton's kernels beside the same with plain operations, eager and compiled."""
    torch.manual_seed(3)
    layer = fastrnn.Attention(24, 24, score=score, device=DEVICE, dtype=dtype)
    query = torch.randn(6, 3, 24, device=DEVICE, dtype=dtype, requires_grad=True)
    memory = torch.randn(9, 3, 24, device=DEVICE, dtype=dtype, requires_grad=True)
    lengths = torch.tensor([9, 4, 0])
    found = []
    for backend, call in (
        ("reference", layer),
        ("auto", layer),
        ("auto", torch.compile(layer, fullgraph=True, backend="aot_eager")),
    ):
        with fastrnn.backend(backend):
            context, weights = call(query, memory, lengths=lengths)
        loss = context.square().sum() + weights[:, :, 0].sum()
        grads = torch.autograd.grad(loss, [query, memory, *layer.parameters()])
        found.append([context, weights, *grads])
    for ours in found[1:]:
        assert error(ours, [t.detach().cpu().to(F64) for t in found[0]]) < 4 * EPSILON[dtype]


@pytest.mark.skipif(DEVICE == "cpu", reason="the operator goes to these kernels for GPU tensors")
def test_the_operator():
    given, allowed = case(5, 7, 2, 4, 3, True, "lengths")
    flat = [t.to(DEVICE, torch.float32).requires_grad_() for t in given]
    args = (*flat, allowed.to(DEVICE), 1.0)
    torch.library.opcheck(torch.ops.fastrnn.attention.default, (*args, True))
    context, _ = functional.attention(*flat, mask=allowed.to(DEVICE))
    first = torch.autograd.grad(context.square().sum(), flat, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), flat)
    assert all(g.isfinite().all() for g in second)

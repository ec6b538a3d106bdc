"""Attention and its decoder compute the gradients that somebody needs, and no others."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import TIGHT, randn
from test_decoder import operator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import functional, fused

NEEDS = list(itertools.product((False, True), repeat=4))
each_score = pytest.mark.parametrize("additive", [False, True])
each_mask = pytest.mark.parametrize("masked", [False, True])


def tensors(Tq, S, B, K, V, additive, masked, dtype=torch.float64):
    """query, keys, values, v; mask, with a query of no position and a position of no query."""
    shapes = ((Tq, B, K), (S, B, K), (S, B, V), (K,))
    flat = [randn(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    mask = torch.rand(B, Tq, S, generator=torch.Generator().manual_seed(9)) < 0.7
    mask[:, Tq // 2] = False
    mask[:, :, S // 2] = False
    return flat[: 3 + additive] + [None] * (not additive), mask if masked else None


class Watch(TorchDispatchMode):
    """Calls of a backward operator: their last arguments, and the elements of their results."""

    def __init__(self, op=torch.ops.fastrnn.attention_backward.default):
        super().__init__()
        self.op = op
        self.needs, self.elements = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is self.op:
            self.needs.append(args[-4:])
            self.elements.append([t.numel() for t in tree_leaves(out)])
        return out


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("Tq", [3, 40])  # few queries, and a block of them
@each_score
def test_no_gradient_reaches_what_nobody_may_attend_to(additive, Tq, backend):
    """Not one of 0 times infinity either: of a position amid others, and of one behind the last."""
    (query, keys, values, v), _ = tensors(Tq, 20, 2, 8, 8, additive, False)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, [4, 18, 19]] = False
    leaves = [t.requires_grad_() for t in (keys, values)]
    with fastrnn.backend(backend):
        context, _ = functional.attention(query, keys, values, v, mask=mask)
        dcontext = torch.ones_like(context)
        dcontext[1, 0, 0] = torch.inf
        for gradient in torch.autograd.grad(context, leaves, dcontext):
            assert (gradient[[4, 18, 19], 0] == 0).all()
            assert gradient[:, 1].isfinite().all()
            assert not gradient[:, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", ["context", "weights", "both"])
@pytest.mark.parametrize("Tq", [5, 40, 150])  # few queries, a block of them, and more
@each_mask
@each_score
def test_each_subset_has_the_bits_of_the_whole(additive, masked, Tq, given, dtype):
    """What is not needed has no elements."""
    flat, mask = tensors(Tq, 50, 3, 20, 24, additive, masked, dtype)
    context, weights, lse = torch.ops.fastrnn.attention(*flat, mask, 0.5, True)
    grads = (None if given == "weights" else context, None if given == "context" else weights)
    args = (*grads, *flat, mask, 0.5, context, lse)
    whole = torch.ops.fastrnn.attention_backward(*args, *(True,) * 4)
    for needs in NEEDS:
        for need, ours, expected in zip(
            needs, torch.ops.fastrnn.attention_backward(*args, *needs), whole, strict=True
        ):
            assert torch.equal(ours, expected) if need else ours.shape == (0,), needs


@pytest.mark.parametrize("threads", [1, 3])
@each_score
def test_threads_that_share_a_sequence(additive, threads):
    flat, mask = tensors(150, 90, 2, 48, 40, additive, True, torch.float32)
    context, weights, lse = torch.ops.fastrnn.attention(*flat, mask, 0.5, True)
    args, before = (context, weights, *flat, mask, 0.5, context, lse), torch.get_num_threads()
    whole = torch.ops.fastrnn.attention_backward(*args, *(True,) * 4)
    try:
        torch.set_num_threads(threads)
        for needs in NEEDS:
            found = torch.ops.fastrnn.attention_backward(*args, *needs)
            assert all(torch.equal(a, b) for n, a, b in zip(needs, found, whole, strict=True) if n), needs
    finally:
        torch.set_num_threads(before)


@each_mask
@each_score
def test_autograd_asks_for_what_requires_grad(additive, masked):
    flat, mask = tensors(6, 9, 2, 8, 4, additive, masked)
    count = 3 + additive

    def run(needs):
        leaves = [
            None if t is None else t.clone().requires_grad_(n) for t, n in zip(flat, needs, strict=True)
        ]
        context, weights = functional.attention(*leaves, mask=mask, scale=0.5)
        with Watch() as watch:
            (context.square().sum() + weights.square().sum()).backward()
        return [None if t is None else t.grad for t in leaves], watch

    whole, _ = run((True,) * 4)
    for needs in NEEDS:
        if not any(needs[:count]):
            continue
        found, watch = run(needs)
        assert watch.needs == [tuple(n and t is not None for n, t in zip(needs, flat, strict=True))]
        assert [bool(n) for n in watch.elements[0]] == list(watch.needs[0])
        for need, ours, expected in zip(needs[:count], found, whole, strict=False):
            assert torch.equal(ours, expected) if need else ours is None, needs


@each_score
def test_second_derivatives(additive):
    """By the function and by the operator alone, against the reference."""
    flat, mask = tensors(3, 4, 2, 3, 5, additive, True)

    def through(needs, call):
        leaves = [
            None if t is None else t.clone().requires_grad_(n) for t, n in zip(flat, needs, strict=True)
        ]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        context, weights = call(leaves)
        loss = context.square().sum() + weights.pow(3).sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    def function(leaves):
        return functional.attention(*leaves, mask=mask, scale=0.5)

    for needs in NEEDS:
        if not any(needs[: 3 + additive]):
            continue
        with fastrnn.backend("reference"):
            expected = through(needs, function)
        for call in (function, lambda leaves: torch.ops.fastrnn.attention(*leaves, mask, 0.5, True)[:2]):
            torch.testing.assert_close(through(needs, call), expected)


@each_score
def test_derivatives_of_the_backward_operator(additive):
    """With respect to all it was given, those of what it computed."""
    flat, mask = tensors(3, 4, 2, 3, 5, additive, True)
    context, weights, lse = torch.ops.fastrnn.attention(*flat, mask, 0.5, True)
    leaves = [t.clone().requires_grad_() for t in (context, weights, *flat) if t is not None]

    def run(needs):
        given = [*leaves, *[None] * (not additive)]
        found = torch.ops.fastrnn.attention_backward(*given, mask, 0.5, context, lse, *needs)
        loss = sum(g.square().sum() for g, need in zip(found, needs, strict=True) if need)
        return found, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    for i in range(3 + additive):
        found, second = run([i == j for j in range(4)])
        whole = torch.ops.fastrnn.attention_backward(
            *leaves, *[None] * (not additive), mask, 0.5, context, lse, *(True,) * 4
        )
        assert [t.numel() > 0 for t in found] == [i == j for j in range(4)]
        torch.testing.assert_close(found[i], whole[i])
        expected = torch.autograd.grad(
            whole[i].square().sum(), leaves, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(second, expected)
    nothing = torch.ops.fastrnn.attention_backward(
        *leaves, *[None] * (not additive), mask, 0.5, context, lse, *(False,) * 4
    )
    assert all(t.shape == (0,) for t in nothing)


@pytest.mark.parametrize("frozen", ["memory", "query"])
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_compiled_graphs_ask_for_as_little(score, frozen):
    attn = fastrnn.Attention(4, score=score, dtype=torch.float64).requires_grad_(False)
    given = {name: randn(5, 2, 4, seed=i) for i, name in enumerate(("query", "memory", "values"))}
    leaves = [t.requires_grad_() for name, t in given.items() if name != frozen]
    expected = torch.autograd.grad(attn(**given)[0].square().sum(), leaves)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    loss = compiled(**given)[0].square().sum()
    with Watch() as watch:
        found = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(found, expected)
    assert watch.needs == [(frozen != "query", frozen != "memory", True, False)]


def test_flops_are_of_what_is_computed():
    flat, _ = tensors(5, 7, 2, 3, 4, False, False)
    pairs = 2 * 5 * 7 * 2
    for needs, expected in (
        ((True, True, True), pairs * (3 * 3 + 2 * 4)),
        ((True, False, False), pairs * (2 * 3 + 4)),
        ((False, False, True), pairs * (3 + 4)),
    ):
        leaves = [t.clone().requires_grad_(n) for t, n in zip(flat, needs, strict=False)]
        context, _ = functional.attention(*leaves)
        with FlopCounterMode(display=False) as counter:
            context.sum().backward()
        assert counter.get_total_flops() == expected


# --- the decoder


def decoder_backward(call, flat, needs):
    """dx, dparams and dw_h, dkeys, dvalues, dw_q, dv as lists; dstates and dfeed, which always come."""
    with torch.no_grad():
        args = call.arguments(flat)
        out, last, weights, saved = torch.ops.fastrnn.decoder(call.cell, *args, call.scale, True)
        found = torch.ops.fastrnn.decoder_backward(
            call.cell, out, last, weights, *args, call.scale, out, weights, saved, *needs
        )
    dx, dstates, dfeed, dparams, dw_h, dkeys, dvalues, dw_q, dv = found
    return ([dx], [*dparams, dw_h, dw_q, dv], [dkeys], [dvalues]), [*dstates, dfeed]


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
@each_score
def test_each_subset_of_the_decoders_has_the_bits_of_the_whole(additive, cell):
    call, flat = operator(cell, additive, 2, 7, 3, 9, 4, 20, 11)
    whole, always = decoder_backward(call, flat, (True,) * 4)
    for needs in NEEDS:
        found, others = decoder_backward(call, flat, needs)
        assert all(map(torch.equal, others, always))
        for need, ours, expected in zip(needs, found, whole, strict=True):
            same = all(map(torch.equal, ours, expected)) and len(ours) == len(expected)
            assert same if need else not any(t.numel() for t in ours), needs
        assert needs[1] or len(found[1]) == 3  # no list of the layers' own


@each_score
def test_the_decoders_flops_are_of_what_is_computed(additive):
    call, flat = operator("gru", additive)
    x, _, _, params, w_h, keys, values, w_q, *_ = call.arguments(flat)
    weights = sum(w.numel() for w in (*params, w_h, w_q) if w is not None and w.dim() == 2)
    (T, B, of_x), (S, _, K), V = x.shape, keys.shape, values.shape[2]
    of_x *= params[0].shape[0]
    for needs, expected in (
        ((True,) * 4, 2 * weights + 2 * S * (K + V)),
        ((False, True, True, False), 2 * weights - of_x + S * (2 * K + V)),
        ((True, False, False, True), weights + S * (K + 2 * V)),
    ):
        with FlopCounterMode(display=False) as counter:
            decoder_backward(call, flat, needs)
        found = counter.get_flop_counts()["Global"][torch.ops.fastrnn.decoder_backward]
        assert found == 2 * T * B * expected


def scanned(call, flat, wanted):
    """The loss and the leaves of it, with those wanted that `wanted` names."""
    x, states, feed, params, w_h, keys, values, w_q, v, mask, drops = call.arguments(flat)
    names = {"x": [x], "params": [*params, w_h, w_q, v], "keys": [keys], "values": [values], "states": states}
    names |= {"w_h": [w_h], "w_q": [w_q], "v": [v]}
    new = {id(t): t.detach().clone() for t in flat if t is not None}
    leaves = [new[id(t)].requires_grad_() for name in wanted for t in names[name] if t is not None]
    x, states, feed, params, w_h, keys, values, w_q, v, mask, drops = call.arguments(
        [None if t is None else new[id(t)] for t in flat]
    )
    layers = [params[4 * k : 4 * k + 4] for k in range(call.layers)]
    out, last, weights = functional.decoder(
        *(call.cell, x, states, feed, layers, w_h, keys, values),
        **{"w_q": w_q, "v": v, "mask": mask, "drops": drops, "scale": call.scale},
    )
    return out.square().sum() + last[0].sum() + weights.pow(3).sum(), leaves


GROUPS = ("x", "params", "keys", "values", "states")


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@each_score
def test_the_decoders_autograd_asks_for_what_requires_grad(additive, cell):
    """First and second derivatives are the reference's."""
    call, flat = operator(cell, additive, 2, 3, 2, 3, 2, 3, 2)
    for count in (1, 2, 4):
        for wanted in itertools.combinations(GROUPS, count):
            found = []
            for backend in ("auto", "reference"):
                with fastrnn.backend(backend):
                    loss, leaves = scanned(call, flat, wanted)
                    with Watch(torch.ops.fastrnn.decoder_backward.default) as watch:
                        plain = torch.autograd.grad(loss, leaves, retain_graph=True)
                    first = torch.autograd.grad(loss, leaves, create_graph=True)
                    loss = sum(g.square().sum() for g in first)
                    second = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
                found.append([*plain, *first, *second])
                if backend == "auto":
                    assert watch.needs == [tuple(group in wanted for group in GROUPS[:4])]
            torch.testing.assert_close(*found)


def test_a_decoder_over_a_frozen_encoder():
    """A module's training step, in a graph too, makes no gradient of the keys."""
    torch.manual_seed(3)
    decoder = fastrnn.AttentionDecoder(3, 4, 4, dtype=torch.float64)
    x, memory = randn(5, 2, 3), randn(6, 2, 4)
    leaves, found = list(decoder.parameters()), []
    for call in (decoder, torch.compile(decoder, fullgraph=True, backend="aot_eager")):
        loss = call(x, memory)[0].square().sum()
        with Watch(torch.ops.fastrnn.decoder_backward.default) as watch:
            found.append(torch.autograd.grad(loss, leaves))
        # The values are the memory times a part of W_c, which learns.
        assert watch.needs == [(False, True, False, True)]
    torch.testing.assert_close(*found)


def shorter(S, length):
    """A mask of three memories, the first shorter."""
    return torch.arange(S) < torch.tensor([[length], [S], [S]])


def holed(S):
    """A mask of three memories, the second with a hole."""
    return torch.arange(S) != torch.tensor([[S], [S // 2], [S]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("Tq", "mask"),
    [
        (140, shorter(270, 256)),
        (140, shorter(520, 512)),
        (70, shorter(1040, 1000)),
        (140, shorter(700, 0)),
        (3, holed(1024)),
    ],
    ids=lambda value: f"S={value.shape[1]}" if isinstance(value, torch.Tensor) else None,
)
@each_score
def test_each_memory_has_scratch_of_its_own_size(additive, Tq, mask, dtype):
    """As each sequence alone: a shorter one takes more queries at a time, one with a hole is copied."""
    flat, _ = tensors(Tq, mask.shape[1], 3, 16, 16, additive, False, dtype)
    before = torch.get_num_threads()

    def run(rows):
        own = [t[:, rows] if t is not None and t.dim() == 3 else t for t in flat]
        context, weights, lse = torch.ops.fastrnn.attention(*own, mask[rows], 0.5, True)
        args = (context, weights, *own, mask[rows], 0.5, context, lse)
        return torch.ops.fastrnn.attention_backward(*args, *(True,) * 4)[:3]

    alone = [torch.cat(each, 1) for each in zip(run([0]), run([1]), run([2]), strict=True)]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for found, expected in zip(run([0, 1, 2]), alone, strict=True):
                assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)


def test_error_is_at_most_twice_torchs():
    """Against float64, the context and the gradients of one query and memory, in several blocks."""
    query, memory, given = (randn(600, 2, 64, seed=i) for i in range(3))

    def ours(q, m):
        return functional.attention(q, m, m, scale=0.125, need_weights=False)[0]

    def torchs(q, m):
        q, m = q.transpose(0, 1)[:, None], m.transpose(0, 1)[:, None]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, m, m, scale=0.125)[:, 0].transpose(0, 1)

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (query, memory)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, given.to(dtype))]

    exact = run(torchs, torch.float64)
    errors = [
        [(a - b).norm() for a, b in zip(run(f, torch.float32), exact, strict=True)] for f in (ours, torchs)
    ]
    assert all(a <= 2 * b for a, b in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("name", ["w_h", "w_q", "v"])
def test_a_decoder_of_which_one_weight_learns(name):
    call, flat = operator("gru", True, 2, 3, 2, 3, 2, 3, 2)
    found = []
    for backend in ("auto", "reference"):
        with fastrnn.backend(backend):
            loss, leaves = scanned(call, flat, (name,))
            found.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("needs", NEEDS)
@each_score
def test_derivatives_of_the_decoders_backward_operator(additive, needs):
    """Of what it was asked for, and that alone: those of the whole."""
    call, flat = operator("gru", additive, 1, 2, 2, 3, 1, 2, 2)
    args = call.arguments([None if t is None else t.detach() for t in flat])
    out, last, weights, saved = torch.ops.fastrnn.decoder(call.cell, *args, call.scale, True)
    dout = torch.randn_like(out).requires_grad_()

    def backward(*needs):
        dx, dstates, dfeed, dparams, dw_h, dkeys, dvalues, dw_q, dv = torch.ops.fastrnn.decoder_backward(
            *(call.cell, dout, last, weights, *args, call.scale, out, weights, saved), *needs
        )
        assert len(dparams) == needs[1] * 4
        return [[dx], [*dparams, dw_h, dw_q, dv], [dkeys], [dvalues]], [*dstates, dfeed]

    (parts, always), (whole, others) = backward(*needs), backward(True, True, True, True)
    assert all(t.numel() == 0 for need, part in zip(needs, parts, strict=True) if not need for t in part)
    ours, theirs = (
        [*first, *(t for need, part in zip(needs, of, strict=True) if need for t in part)]
        for first, of in ((always, parts), (others, whole))
    )
    found, expected = (
        torch.autograd.grad(sum(g.square().sum() for g in each), dout) for each in (ours, theirs)
    )
    torch.testing.assert_close((ours, found), (theirs, expected), **TIGHT)


@each_score
def test_flops_of_the_forward_passes(additive):
    flat, _ = tensors(5, 7, 2, 3, 4, additive, False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional.attention(*flat)
    assert counter.get_total_flops() == 2 * 5 * 7 * 2 * (3 + 4)
    call, flat = operator("gru", additive, H=6, K=5)
    x, _, _, params, w_h, keys, values, w_q, *_ = call.arguments(flat)
    weights = sum(w.numel() for w in (*params, w_h, w_q) if w is not None and w.dim() == 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fused.run(call, flat)
    rows, (S, _, K), V = x.shape[0] * x.shape[1], keys.shape, values.shape[2]
    assert counter.get_total_flops() == 2 * rows * (weights + S * (K + V))


@each_score
def test_what_the_operators_keep_has_no_gradient(additive):
    """And they keep it where they are asked to."""
    flat, mask = tensors(3, 4, 2, 3, 5, additive, True)
    flat[0].requires_grad_()
    assert not torch.ops.fastrnn.attention(*flat, mask, 0.5, True)[2].requires_grad
    call, flat = operator("gru", additive)
    for save in (False, True):
        *_, saved = torch.ops.fastrnn.decoder(call.cell, *call.arguments(flat), call.scale, save)
        assert bool(saved) == save
        assert not any(t.requires_grad for t in saved)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
def test_tensors_of_two_types(autocast, backend):
    """Autocast rounds no float64, as of layers."""
    (query, keys, values, _), _ = tensors(3, 4, 2, 3, 5, False, False, torch.float32)
    words = "all tensors must be torch.bfloat16" if autocast else "all tensors must be torch.float32"
    with fastrnn.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for given in ((query, keys.double(), values), (query, keys, values.double())):
            with pytest.raises(RuntimeError, match=f"{words} like the first, got torch.float64"):
                functional.attention(*given)

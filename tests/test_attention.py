"""fastrnn.Attention beside the textbook's formulas in float64 and torch.nn.functional's attention."""

from __future__ import annotations

import pytest
import torch
from helpers import F64, Fresh, assert_same, grads, randn
from torch import nn

import fastrnn
from fastrnn import functional, kernels, reference
from fastrnn.attention import SCORES

each_score = pytest.mark.parametrize("score", SCORES)
# Tq, S, B, Q, M, V; M of "dot" is Q.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 5, 2, 4, 6, 4),
    (5, 7, 3, 33, 20, 19),
    (70, 40, 2, 16, 8, 16),
    (3, 600, 2, 8, 5, 32),
    (140, 40, 2, 16, 8, 16),
    (130, 290, 2, 8, 8, 8),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
MASKS = ("none", "lengths", "mask", "each", "both")
each_mask = pytest.mark.parametrize("mask", MASKS)


def case(score, shape, grad=True, **options):
    Tq, S, B, Q, M, V = shape
    M = Q if score == "dot" else M
    torch.manual_seed(3)
    attn = fastrnn.Attention(Q, M, score=score, dtype=F64, **options)
    tensors = [randn(Tq, B, Q, seed=1), randn(S, B, M, seed=2), randn(S, B, V, seed=3)]
    return attn, [t.requires_grad_(grad) for t in tensors]


def masks(kind, shape, seed=0):
    Tq, S, B = shape[:3]
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, S + 1, (B,), generator=g)
    lengths[-1] = 0
    shape = (B, Tq, S) if kind in ("each", "both") else (B, S)
    mask = torch.rand(shape, generator=g) < 0.6
    return {
        "none": {},
        "lengths": {"lengths": lengths},
        "mask": {"mask": mask},
        "each": {"mask": mask},
        "both": {"mask": mask, "lengths": lengths},
    }[kind]


def textbook(attn, query, memory, values, lengths=None, mask=None):
    """One query, one position, one sequence at a time."""
    Tq, B, S = query.shape[0], query.shape[1], memory.shape[0]
    context, weights = torch.zeros(Tq, B, values.shape[2], dtype=F64), torch.zeros(B, Tq, S, dtype=F64)
    for b in range(B):
        for t in range(Tq):
            allowed = [
                s
                for s in range(S)
                if (lengths is None or s < lengths[b])
                and (mask is None or bool(mask[b, s] if mask.dim() == 2 else mask[b, t, s]))
            ]
            if not allowed:
                continue
            q = query[t, b]
            if attn.score == "dot":
                scores = [q @ memory[s, b] for s in allowed]
            elif attn.score == "general":
                scores = [q @ (attn.weight @ memory[s, b]) for s in allowed]
            else:
                scores = [
                    attn.v @ torch.tanh(attn.weight_q @ q + attn.weight_m @ memory[s, b]) for s in allowed
                ]
            scale = 1 if attn.scale is None else attn.scale
            w = torch.softmax(scale * torch.stack(scores), 0)
            weights = weights.index_put((torch.tensor(b), torch.tensor(t), torch.tensor(allowed)), w)
            row = sum(w[i] * values[s, b] for i, s in enumerate(allowed))
            context = context.index_put((torch.tensor(t), torch.tensor(b)), row)
    return context, weights


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@each_mask
@each_score
def test_equals_the_textbook(score, mask, backend):
    """Values, and gradients of a loss of context and weights."""
    shape = SHAPES[1]
    attn, tensors = case(score, shape, scale=0.7)
    given = masks(mask, shape)
    leaves = [*tensors, *attn.parameters()]
    with fastrnn.backend(backend):
        ours = attn(*tensors, **given)
        ours_grads = grads(ours, leaves)
    theirs = textbook(attn, *tensors, **given)
    assert_same(ours, theirs)
    assert_same(
        ours_grads,
        [
            g if g is not None else torch.zeros_like(t)
            for g, t in zip(grads(theirs, leaves), leaves, strict=True)
        ],
    )


@each_mask
@each_shape
@each_score
def test_kernels_equal_the_reference(score, shape, mask):
    attn, tensors = case(score, shape)
    given, leaves, results = masks(mask, shape), [*tensors, *attn.parameters()], []
    for backend in ("cpu", "reference"):
        with fastrnn.backend(backend):
            out = attn(*tensors, **given)
            alone = attn(*tensors, need_weights=False, **given)
            results.append((out, alone[0], grads(out, leaves), grads(alone, leaves)))
        assert alone[1] is None
    assert_same(*results, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_each_instruction_set(isa, use_isa):
    use_isa(isa)
    for score in SCORES:
        for shape in (SHAPES[2], *SHAPES[5:]):
            test_kernels_equal_the_reference(score, shape, "both")


@pytest.mark.parametrize("mask", ["none", "mask", "each"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_equals_scaled_dot_product_attention(mask, need_weights):
    shape = (9, 11, 3, 16, 16, 5)
    attn, (query, memory, values) = case("dot", shape, scale=0.25)
    given = masks(mask, shape, seed=4)
    allowed = given.get("mask")
    if allowed is not None:
        allowed[..., 0] = True  # torch's own has no word for rows without any
        allowed = allowed if allowed.dim() == 3 else allowed[:, None]
    context, _ = attn(query, memory, values, need_weights=need_weights, **given)
    theirs = nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (query, memory, values)), attn_mask=allowed, scale=0.25
    ).transpose(0, 1)
    assert_same(
        (context, grads(context, [query, memory, values])), (theirs, grads(theirs, [query, memory, values]))
    )


@each_score
def test_memory_is_the_values_where_none_are_given(score):
    attn, (query, memory, _) = case(score, (3, 5, 2, 4, 4, 4))
    assert_same(attn(query, memory), attn(query, memory, memory))


@each_score
def test_order_of_the_memory(score):
    """Memory and mask permuted together permute the weights, and leave the context."""
    shape = (4, 40, 3, 16, 16, 8)
    attn, (query, memory, values) = case(score, shape, grad=False)
    order = torch.randperm(40)
    for kind in ("mask", "each"):
        mask = masks(kind, shape)["mask"]
        context, weights = attn(query, memory, values, mask=mask)
        again, permuted = attn(query, memory[order], values[order], mask=mask[..., order])
        assert_same(again, context, rtol=1e-10, atol=1e-12)
        assert_same(permuted, weights[..., order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("need_weights", [True, False])
@each_score
def test_padding_reaches_nothing(score, need_weights, backend):
    """NaN, or another length of it, changes no value and no gradient; a sequence of nothing gives zeros."""
    shape = (3, 9, 3, 16, 16, 16)
    attn, (query, memory, values) = case(score, shape)
    lengths = torch.tensor([5, 9, 0])
    padded = torch.arange(9)[:, None] >= lengths
    dirty = [t.detach().masked_fill(padded[:, :, None], torch.nan).requires_grad_() for t in (memory, values)]
    with fastrnn.backend(backend):
        clean = attn(query, memory, values, lengths=lengths, need_weights=need_weights)
        ours = attn(query, *dirty, lengths=lengths, need_weights=need_weights)
        hole = padded.mT.logical_not()
        as_mask = attn(query, *dirty, mask=hole, need_weights=need_weights)
    assert_same(ours, clean)
    assert_same(as_mask, clean)
    assert not ours[0][:, 2].any()
    leaves = list(attn.parameters())
    ours_grads = grads(ours, [query, *dirty, *leaves])
    assert_same(ours_grads, grads(clean, [query, memory, values, *leaves]))
    for g in ours_grads[1:3]:
        assert not g[padded].any()


@pytest.mark.parametrize("mask", ["none", "each"])
@each_score
def test_gradcheck_and_gradgradcheck(score, mask):
    shape = (2, 3, 2, 2, 2, 3)
    attn, tensors = case(score, shape)
    given = masks(mask, shape)
    leaves = [*tensors, *attn.parameters()]

    def f(query, memory, values, *params):
        weights = dict(zip(dict(attn.named_parameters()), params, strict=True))
        return torch.func.functional_call(attn, weights, (query, memory, values), given)

    with fastrnn.backend("cpu"):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


def test_each_output_alone():
    attn, tensors = case("general", SHAPES[1])
    for i in range(2):
        ours = torch.autograd.grad(attn(*tensors)[i].square().sum(), tensors, allow_unused=True)
        out = attn(*tensors)
        dense = [torch.zeros_like(o) for o in out]
        dense[i] = 2 * out[i].detach()
        for a, b in zip(ours, torch.autograd.grad(out, tensors, dense), strict=True):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


@each_score
def test_layouts(score):
    """batch_first, and a memory of one sequence without its batch dimension."""
    shape = (3, 5, 2, 4, 4, 6)
    attn, tensors = case(score, shape, grad=False)
    given = masks("each", shape)
    context, weights = attn(*tensors, **given)
    attn.batch_first = True
    swapped = attn(*(t.transpose(0, 1) for t in tensors), **given)
    assert_same((swapped[0].transpose(0, 1), swapped[1]), (context, weights))
    one = attn(*(t[:, 1] for t in tensors), mask=given["mask"][1])
    assert_same(one, (context[:, 1], weights[1]))


# None; what leaves out the end, or one in between.
LEAVE_OUT = {"none": None, "end": slice(250, None), "hole": slice(7, 8)}


def leaving_out(left_out, *shape):
    if LEAVE_OUT[left_out] is None:
        return None
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., LEAVE_OUT[left_out]] = False
    return mask


@pytest.mark.parametrize("left_out", LEAVE_OUT)
@pytest.mark.parametrize("additive", [False, True])
def test_scores_of_minus_infinity(additive, left_out):
    """Alone they have no softmax, as in plain torch, unless a mask leaves out others; one is worth 0."""
    query, keys, values = randn(3, 1, 5), randn(300, 1, 5, seed=1).abs() + 1, randn(300, 1, 4, seed=2)
    v = randn(5, seed=3) if additive else None
    if v is None:
        query[1, 0, 0], keys[0, 0, 1] = -torch.inf, -torch.inf
        query[:, 0, 1] = query[:, 0, 1].abs()
    else:
        v[0], query[:, 0, 0] = torch.inf, torch.tensor([100.0, -100.0, 100.0])  # others +inf: no number
    mask = leaving_out(left_out, 1, 300)
    expected = reference.attention(query, keys, values, v, mask, 1.0)
    context, weights, _ = torch.ops.fastrnn.attention(query, keys, values, v, mask, 1.0, True)
    torch.testing.assert_close((context, weights), expected, equal_nan=True)
    assert weights[0, 1].isnan().all() if mask is None else (weights[0, 1] == 0).all()
    if not additive:
        assert weights[0, 0, 0] == 0
    allowed = torch.ones(1, 3, 300, dtype=torch.bool)
    allowed[:, 1] = False
    found = torch.ops.fastrnn.attention(query, keys, values, v, allowed, 1.0, True)
    assert all((t == 0).all() for t in (found[0][1], found[1][0, 1], found[2][0, 1]))


@pytest.mark.parametrize("left_out", LEAVE_OUT)
def test_a_decoders_scores_of_minus_infinity_alone(left_out):
    T, B, I, H, S, K = 2, 2, 3, 4, 300, 5
    params = [randn(3 * H, I + H), randn(3 * H, H, seed=1), randn(3 * H, seed=2), randn(3 * H, seed=3)]
    keys, v = randn(S, B, K, seed=4), randn(K, seed=5)
    keys[:, 0, 0], v[0] = -5, torch.inf  # those of the other sequence are no number
    given = randn(T, B, I), [randn(1, B, H)], randn(B, H)
    rest = randn(H, H), keys, randn(S, B, H), torch.zeros(K, H, dtype=F64), v, leaving_out(left_out, B, S), []
    ours = torch.ops.fastrnn.decoder("gru", *given, params, *rest, 1.0, False)[:3]
    theirs = reference.decoder("gru", *given, [params], *rest, 1.0)
    torch.testing.assert_close(ours[2][0], theirs[2][0], equal_nan=True)
    torch.testing.assert_close(ours[0][:, 0], theirs[0][:, 0], equal_nan=True)
    assert ours[2][0].isnan().all() if left_out == "none" else (ours[2][0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_score
def test_error_is_at_most_twice_plain_torchs(score, dtype):
    shape = (20, 50, 3, 24, 24, 24)
    attn, tensors = case(score, shape, grad=False)
    true = attn(*tensors, lengths=torch.tensor([50, 20, 1]))
    attn.to(dtype)
    low = [t.to(dtype) for t in tensors]
    ours = attn(*low, lengths=torch.tensor([50, 20, 1]))
    assert all(t.dtype == dtype for t in ours)
    wide = [t.float() if dtype != torch.float32 else t for t in low]
    weights = [p.to(wide[0].dtype) for p in attn.parameters()]
    with fastrnn.backend("reference"):
        plain = torch.func.functional_call(
            attn,
            dict(zip(dict(attn.named_parameters()), weights, strict=True)),
            tuple(wide),
            {"lengths": torch.tensor([50, 20, 1])},
        )
    for a, b, c in zip(ours, plain, true, strict=True):
        error, theirs = (a.double() - c).abs().max(), (b.double() - c).abs().max()
        assert error <= 2 * theirs + 2 * torch.finfo(dtype).eps * c.abs().max()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@each_score
def test_autocast_gives_one_dtype(score, kind):
    attn, tensors = case(score, SHAPES[1])
    attn.float()
    tensors = [t.detach().float().requires_grad_() for t in tensors]
    with torch.autocast("cpu", kind):
        out = attn(*tensors)
    assert {t.dtype for t in out} == {kind}
    for g, t in zip(grads([o.float() for o in out], tensors), tensors, strict=True):
        assert g.dtype == t.dtype


def attention_operator(Tq=3, S=4, B=2, K=3, V=5, additive=False, masked=True):
    tensors = [
        randn(Tq, B, K),
        randn(S, B, K, seed=1),
        randn(S, B, V, seed=2),
        randn(K, seed=3) if additive else None,
    ]
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    return [*leaves, torch.rand(B, Tq, S) < 0.6 if masked else None, 0.5, True]


@pytest.mark.parametrize("additive", [False, True])
def test_opcheck(additive):
    args = attention_operator(additive=additive)
    torch.library.opcheck(torch.ops.fastrnn.attention.default, tuple(args))
    torch.library.opcheck(torch.ops.fastrnn.attention.default, (*args[:-1], False))
    with torch.no_grad():
        context, weights, lse = torch.ops.fastrnn.attention(*args)
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in args[:-1]]
    back = (context, weights, *plain, context, lse)
    for needs in ((True, True, True, True), (True, False, False, False), (False, False, True, True)):
        torch.library.opcheck(torch.ops.fastrnn.attention_backward.default, (*back, *needs))


@pytest.mark.parametrize("additive", [False, True])
def test_registered_rules_gradgradcheck(additive):
    """The operator itself, as compiled graphs call it."""
    args = attention_operator(2, 3, 2, 2, 2, additive)
    leaves = [t for t in args[:4] if t is not None]

    def f(*values):
        v = values[3] if additive else None
        return torch.ops.fastrnn.attention(*values[:3], v, *args[4:])[:2]

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.slow
@each_score
def test_compiles_whole(score):
    attn, tensors = case(score, SHAPES[1])
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    leaves = [*tensors, *attn.parameters()]
    for given in (masks("lengths", SHAPES[1]), masks("each", SHAPES[1])):
        ours, plain = compiled(*tensors, **given), attn(*tensors, **given)
        assert_same((ours, grads(ours, leaves)), (plain, grads(plain, leaves)))


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_compiles_for_sizes_that_change(mask):
    """torch.compile holds a size that changed as a symbol, in a mask given for the first time as a number."""
    attn, _ = case("dot", SHAPES[1])
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    for Tq, kind in ((3, "none"), (6, "none"), (4, mask), (5, mask)):
        shape = (Tq, 5, 2, 4, 4, 4)
        _, tensors = case("dot", shape)
        given = masks(kind, shape)
        assert_same(compiled(*tensors, **given), attn(*tensors, **given))


@each_score
def test_transforms(score):
    """vmap, jvp and jacobians, which are the formula's."""
    attn, (query, memory, values) = case(score, (3, 4, 2, 3, 3, 5), grad=False)
    many = torch.stack([query, 2 * query])
    each = [attn(q, memory, values) for q in many]
    batched = torch.func.vmap(lambda q: attn(q, memory, values))(many)
    assert_same(batched, [torch.stack(column) for column in zip(*each, strict=True)])
    tangent = torch.func.jvp(lambda q: attn(q, memory, values)[0], (query,), (query,))[1]
    slope = (attn(query * (1 + 1e-6), memory, values)[0] - attn(query * (1 - 1e-6), memory, values)[0]) / 2e-6
    assert_same(tangent, slope, rtol=1e-6, atol=1e-8)
    rows = torch.eye(6, dtype=F64).view(6, 3, 2, 1).expand(6, 3, 2, 5)
    query.requires_grad_()
    out = attn(query, memory, values)[0]
    batched = torch.autograd.grad(out, query, rows, is_grads_batched=True, retain_graph=True)[0]
    for row, g in zip(rows, batched, strict=True):
        assert_same(g, torch.autograd.grad(out, query, row, retain_graph=True)[0])


@pytest.mark.parametrize("B", [1, 2, 5])
@each_score
def test_bits_do_not_depend_on_threads(score, B):
    """Threads share a sequence where there are fewer of these, or some are left over."""
    shape = (300, 90, B, 48, 48, 48)
    attn, tensors = case(score, shape)
    attn.float()
    tensors = [t.detach().float().requires_grad_() for t in tensors]
    given, before, results = {"mask": masks("each", shape)["mask"]}, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([])
            for need in (True, False):
                # The products with weights are torch's, and none of the kernels' business.
                v = tensors[0][0, 0] if score == "additive" else None
                out = functional.attention(*tensors, v, need_weights=need, **given)
                out = out if need else out[:1]
                results[-1] += [*out, *grads(out, tensors)]
    finally:
        torch.set_num_threads(before)
    for r in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], r, strict=True))


def test_no_matrix_of_weights_unless_asked_for():
    """Neither forward nor backward allocates as much as [B, Tq, S]."""
    attn, tensors = case("dot", (512, 512, 4, 8, 8, 8))
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(
                t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
            )
            return out

    with Watch():
        attn(*tensors, need_weights=False)[0].sum().backward()
    assert max(seen) < 4 * 512 * 512 / 8


def test_nothing_to_attend_to():
    attn, (query, _, _) = case("dot", (3, 1, 2, 4, 4, 4))
    context, weights = attn(query, query.new_empty(0, 2, 4))
    assert context.shape == (3, 2, 4)
    assert not context.any()
    assert weights.shape == (2, 3, 0)
    assert attn(query[:, :0], query.new_empty(5, 0, 4))[0].shape == (3, 0, 4)


def poisoned():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for score in SCORES:
        for mask in MASKS:
            for shape in SHAPES[1:4]:
                test_kernels_equal_the_reference(score, shape, mask)


def test_every_element_is_written():
    Fresh("test_attention.poisoned", seconds=300, MALLOC_PERTURB_="128").finish()


def test_parameters_and_repr():
    attn = fastrnn.Attention(4, 6, score="additive", scale=2.0)
    assert {n: tuple(p.shape) for n, p in attn.named_parameters()} == {
        "weight_q": (4, 4),
        "weight_m": (4, 6),
        "v": (4,),
    }
    assert repr(attn) == "Attention(4, 6, score='additive', scale=2.0)"
    assert {n: tuple(p.shape) for n, p in fastrnn.Attention(4, 6, score="general").named_parameters()} == {
        "weight": (4, 6)
    }
    assert not list(fastrnn.Attention(4).parameters())


def test_an_explicit_backend():
    attn, tensors = case("dot", SHAPES[1])
    with fastrnn.backend("cuda"), pytest.raises(fastrnn.BackendError):
        attn(*tensors)
    assert_same(reference.attention(*tensors, None, None, 1.0), attn(*tensors), rtol=1e-10, atol=1e-12)

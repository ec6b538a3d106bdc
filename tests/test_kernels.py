"""The C++ scan against the plain reference: values and gradients of every cell, shape and mask."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers import MASKS, Fresh, random_case, random_masks

import fastrnn
from fastrnn import functional, kernels
from fastrnn.reference import CELLS

# T, B, I, H: single elements, odd sizes, more than one chunk of time, units beyond a vector.
SHAPES = ((1, 1, 1, 1), (5, 3, 4, 3), (7, 13, 5, 33), (3, 2, 3, 257), (300, 9, 6, 17), (19, 9, 1, 107))


def run(backend, cell, x, states, params, masks, weights):
    """Every output, and the gradients of their weighted sum."""
    leaves = [t.detach().requires_grad_() for t in (x, *states, *params)]  # with the strides that they have
    S = len(states)
    with fastrnn.backend(backend):
        y, last, seq = functional.layer(
            cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :], return_states=True, **masks
        )
    outputs = [y, *last, *seq]
    generator = torch.Generator().manual_seed(weights)
    loss = sum((o * torch.randn(o.shape, dtype=o.dtype, generator=generator)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, leaves)
    return [o.detach() for o in outputs], list(grads)


def assert_agree(cell, x, states, params, masks, tolerance=1e-12):
    ours = run("cpu", cell, x, states, params, masks, 1)
    theirs = run("reference", cell, x, states, params, masks, 1)
    for group in (0, 1):
        for a, b in zip(ours[group], theirs[group], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + float(b.abs().max())))
    with torch.no_grad(), fastrnn.backend("cpu"):
        y, last, _ = functional.layer(cell, x, states, params, **masks)
    for a, b in zip((y, *last), ours[0], strict=False):
        assert torch.equal(a, b), "inference and training must give the same bits"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_parity(cell, shape, D, mask):
    x, states, params = random_case(cell, *shape, D=D)
    x, masks = random_masks(mask, x)
    assert_agree(cell, x, states, params, masks)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("P", [1, 5, 40])
def test_parity_projection(P, D, mask):
    x, states, params = random_case("lstm", 6, 7, 3, 41, D=D, P=P)
    x, masks = random_masks(mask, x)
    assert_agree("lstm", x, states, params, masks)


@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("cell", CELLS)
def test_each_instruction_set(cell, isa, use_isa):
    use_isa(isa)
    assert kernels.instruction_set() == isa
    x, states, params = random_case(cell, 9, 11, 5, 37, D=2)
    assert_agree(cell, x, states, params, {"lengths": torch.randint(0, 10, (11,))})
    # One row a step, packed; then few enough rows that the weights are read where torch keeps them.
    for T, B, H in (
        (110, 1, 200),
        (30, 1, 200),
        (9, 1, 200),
        (3, 2, 64),
        (4, 3, 37),
        (3, 4, 64),
        (1, 16, 64),
    ):
        x, states, params = random_case(cell, T, B, 5, H)
        assert_agree(cell, x, states, params, {})


def refused():
    """Called in a process whose FASTRNN_CPU_ISA is none: the first question is not the last to be told."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"FASTRNN_CPU_ISA must be one of baseline.*, got avx1024"):
            functional.layer("lstm", *random_case("lstm", 1, 1, 1, 1))


def test_unknown_instruction_set(use_isa):
    Fresh("test_kernels.refused", FASTRNN_CPU_ISA="avx1024").finish()
    before = kernels.instruction_set()
    with pytest.raises(RuntimeError, match=r"must be one of baseline.*, got avx1024"):
        use_isa("avx1024")
    assert kernels.instruction_set() == before


def forced():
    """Called in a process whose FASTRNN_CPU_ISA is baseline."""
    assert kernels.instruction_set() == "baseline"


def test_forced_instruction_set():
    Fresh("test_kernels.forced", FASTRNN_CPU_ISA="baseline").finish()


RIVALS = {
    "lstm": (torch.nn.LSTM, {}),
    "lstm_proj": (torch.nn.LSTM, {"proj_size": 20}),
    "gru": (torch.nn.GRU, {}),
    "rnn_tanh": (torch.nn.RNN, {}),
    "rnn_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
}


# Long sums: of a weight's gradient over 1600 rows, of a step's product over 772 terms; of an input's gradient
# over 2048, from weights packed and where they lie. Many steps, and many units, of float32 alone.
SHORT = ((60, 8, 48, 96), (7, 50, 8, 32), (20, 64, 32, 64), (99, 1, 8, 40), (30, 1, 8, 64))
LONG = ((400, 4, 16, 256), (12, 33, 260, 512), (2, 8, 64, 512), (16, 1, 64, 256), (60, 1, 8, 256))
LONGEST = ((1000, 2, 16, 64), (12, 8, 64, 1024))


def outputs(module, x):
    x = x.clone().requires_grad_()
    y = module(x)[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def errors(module, x, exact):
    found = zip(outputs(module, x), exact, strict=True)
    return [(a.double() - e).square().mean().sqrt().item() for a, e in found]


@functools.lru_cache(maxsize=1)  # of one instruction set after another
def draws(name, dtype, shape):
    """torch.nn's layers, inputs, what is exact, and torch.nn's errors."""
    kind, options = RIVALS[name]
    T, B, I, H = shape
    found = []
    for _ in range(3):
        theirs, x = kind(I, H, **options).to(dtype), torch.randn(T, B, I).to(dtype)
        exact = outputs(copy.deepcopy(theirs).double(), x.double())
        found.append((theirs, x, exact, errors(theirs, x, exact)))
    return found


@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        pytest.param(dtype, shape, marks=[pytest.mark.slow] * (shape not in SHORT), id=f"{name}-{shape}")
        for name, dtype, shapes in (
            ("float32", torch.float32, (*SHORT, *LONG, *LONGEST)),
            ("bfloat16", torch.bfloat16, (*SHORT, *LONG)),
        )
        for shape in shapes
    ],
)
@pytest.mark.parametrize("name", RIVALS)
def test_error_is_at_most_twice_torchs(name, dtype, shape, isa, use_isa):
    """Root mean square against float64, over the output and every gradient; the median of three draws."""
    use_isa(isa)
    ratios = [
        [
            a / b
            for a, b in zip(errors(fastrnn.convert(copy.deepcopy(theirs)), x, exact), of_theirs, strict=True)
        ]
        for theirs, x, exact, of_theirs in draws(name, dtype, shape)
    ]
    medians = torch.tensor(ratios).median(0).values
    assert (medians <= 2).all(), medians


@pytest.mark.parametrize("cell", CELLS)
def test_extremes(cell):
    """Saturated gates give exact limits; a NaN stays in its own sequence."""
    x, states, params = random_case(cell, 3, 4, 2, 20, dtype=torch.float32)
    params = [p.detach() for p in params]
    with fastrnn.backend("cpu"):
        for value in (1e4, -1e4, 1e30, -1e30):
            x = torch.full_like(x, value)
            y = functional.layer(cell, x, states, params)[0]
            with fastrnn.backend("reference"):
                torch.testing.assert_close(
                    y, functional.layer(cell, x, states, params)[0], rtol=1e-5, atol=1e-6
                )
        x = torch.randn_like(x)
        clean = functional.layer(cell, x, states, params)[0]
        x[1, 2] = float("nan")
        y = functional.layer(cell, x, states, params)[0]
    assert y[1:, 2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(y[:, others], clean[:, others])
    assert torch.equal(y[0], clean[0])


@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gate_functions_near_their_limits(dtype, isa, use_isa):
    """Within a few ulp over all their range, by cells that are nothing else."""
    use_isa(isa)
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 0, 1001)]).to(dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    with fastrnn.backend("cpu"):
        y = functional.layer("rnn_tanh", x.view(1, -1, 1), [x.new_zeros(1, len(x), 1)], [one, zero])[0]
    true = torch.tanh(x.double())
    ulp = torch.finfo(dtype).eps * true.abs()
    assert ((y.flatten().double() - true).abs() <= 3 * ulp).all()
    # sigmoid(x): an LSTM's output gate, where i = 0, f = 1 and tanh(c) = 1.
    x = torch.linspace(-80, 20, 9001, dtype=dtype)
    w, b = x.new_tensor([0, 0, 0, 1]).view(4, 1), x.new_tensor([-1e3, 1e3, 0, 0])
    states = [x.new_zeros(1, len(x), 1), x.new_full((1, len(x), 1), 30)]
    with fastrnn.backend("cpu"):
        y = functional.layer("lstm", x.view(1, -1, 1), states, [w, 0 * w, b, 0 * b])[0]
    true = torch.sigmoid(x.double())
    assert ((y.flatten().double() - true).abs() <= 4 * torch.finfo(dtype).eps * true).all()


@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("I", [500, 1024, 1200, 2100])
@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh", "gru"])
def test_rows_longer_than_a_piece(cell, I, isa, use_isa):
    """K beyond what a product walks at once (512 of float64, 64 where that is h's own sum), x ending before,
    at and after its pieces."""
    use_isa(isa)
    x, states, params = random_case(cell, 2, 29, I, 33)
    with torch.no_grad():
        with fastrnn.backend("cpu"):
            ours = functional.layer(cell, x, states, params)[0]
        with fastrnn.backend("reference"):
            theirs = functional.layer(cell, x, states, params)[0]
    # Within a rounding for each of up to 2,133 products, 4.7e-13.
    torch.testing.assert_close(ours, theirs, rtol=5e-13, atol=5e-13)


@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        *(((2, T, B, I, H), "none") for T, B, I, H in [(40, 7, 16, 64), (40, 40, 16, 64), (5, 1, 8, 300)]),
        *(((2, 300, 24, 24, 64), mask) for mask in MASKS[1:]),  # chunks of steps, whose rows become fewer
        ((1, 40, 16, 16, 64), "none"),  # of four threads two share the rows, and each part's units two
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_threads(cell, shape, mask, save):
    D, *shape = shape
    x, states, params = random_case(cell, *shape, D=D, dtype=torch.float32)
    x, masks = random_masks(mask, x)
    leaves = [t.requires_grad_(save) for t in (x, *states, *params)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            with torch.set_grad_enabled(save), fastrnn.backend("cpu"):
                y = functional.layer(cell, x, states, params, **masks)[0]
                results.append(torch.autograd.grad(y.sum(), leaves) if save else [y])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("cell", "H"), [*(("lstm", H) for H in (32, 33, 40)), ("gru", 32), ("gru_reset_before", 32)]
)
def test_training_that_outgrows_the_caches(cell, H, threads, mask, isa, use_isa):
    """What is kept for the backward pass goes past the caches where it is whole lines: the bits are those of
    a few sequences at a time, whose own stays there."""
    use_isa(isa)
    B, each, kept = 24, 4, {"lstm": 5, "gru": 4, "gru_reset_before": 3}[cell]
    cache = torch.ops.fastrnn.plan("lstm", torch.empty(1, H), 1, 1, 1, H, H, 1, False, 1)[4]
    T = 2 * cache * threads // (B * kept * 4 * H) + 1
    x, states, params = random_case(cell, T, B, 5, H, dtype=torch.float32)
    lengths = T - torch.arange(B) // 3
    reset = torch.rand(T, B) < 0.01
    leaves = [t.requires_grad_() for t in (x, *states)]

    def run(of):
        masks, rows = {}, x[:, of]
        if "lengths" in mask:
            masks["lengths"] = lengths[of]
        if "reset" in mask:
            masks["reset"] = reset[:, of]
        if mask == "packed":
            real = torch.arange(T)[:, None] < lengths[of]
            rows, masks = rows[real], {"batch_sizes": real.sum(1)[: lengths[of].max()]}
        y, last, seq = functional.layer(
            cell, rows, [s[:, of] for s in states], params, return_states=True, **masks
        )
        if mask == "packed":
            y, seq = x.new_zeros(*real.shape, H).index_put((real,), y), []
        gradients = torch.autograd.grad(y.sum() + sum((s * s).sum() for s in last), leaves)
        return [y, *(s[0] for s in (*last, *seq)), gradients[0][:, of], *(g[0, of] for g in gradients[1:])]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with fastrnn.backend("cpu"):
            whole = run(slice(0, B))
            parts = [run(slice(b, b + each)) for b in range(0, B, each)]
    finally:
        torch.set_num_threads(before)
    for all_, *some in zip(whole, *parts, strict=True):
        assert torch.equal(all_, torch.cat(some, all_.dim() - 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh", "gru_reset_before"])
def test_gradients_of_y_that_are_not_contiguous(cell, mask, dtype):
    """Of a sum (expanded) or of a transposed y, over chunks of steps: the same bits as from dense ones."""
    x, states, params = random_case(cell, 300, 9, 4, 17, D=2, dtype=dtype)
    x, masks = random_masks(mask, x)
    leaves = [t.requires_grad_() for t in (x, *states, *params)]
    with fastrnn.backend("cpu"):
        y = functional.layer(cell, x, states, params, **masks)[0]
    strided = torch.randn(y.shape[::-1], dtype=y.dtype).permute(*reversed(range(y.dim())))
    for dy in (torch.tensor(0.3, dtype=y.dtype).expand(y.shape), strided):
        assert not dy.is_contiguous()
        ours = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        dense = torch.autograd.grad(y, leaves, dy.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))


def beside_nan(x, dim):
    return torch.stack([x, torch.full_like(x, torch.nan)], dim)


# The same values elsewhere in memory; "columns" are copied whole, the others a chunk of steps at a time.
LAYOUTS = {
    "batch first": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "part of each row": lambda x: beside_nan(x, -2).flatten(-2)[..., : x.shape[-1]],
    "every other row": lambda x: beside_nan(x, -2).flatten(-3, -2)[..., ::2, :],
    "columns": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_an_input_that_is_not_contiguous(cell, mask, isa, use_isa):
    """Read where it lies: over chunks of steps, by threads that share out rows or units, with x and h in one
    product or two, the bits are those of the contiguous one."""
    use_isa(isa)
    before = torch.get_num_threads()
    for threads, dtype, D, shape in (
        (1, torch.float64, 2, (130, 9, 6, 17)),
        (2, torch.float32, 1, (50, 24, 24, 64)),
        (1, torch.bfloat16, 2, (20, 7, 40, 64)),
        (2, torch.float32, 1, (20, 3, 32, 64)),
    ):
        x, states, params = random_case(cell, *shape, D=D, dtype=dtype)
        x, masks = random_masks(mask, x)
        try:
            torch.set_num_threads(threads)
            expected = run("cpu", cell, x, states, params, masks, 1)
            for name, layout in LAYOUTS.items():
                other = layout(x)
                assert torch.equal(other, x)
                assert other.is_contiguous() == (mask == "packed" and name == "batch first")
                found = run("cpu", cell, other, states, params, masks, 1)
                for a, b in zip((*expected[0], *expected[1]), (*found[0], *found[1]), strict=True):
                    assert torch.equal(a, b), name
        finally:
            torch.set_num_threads(before)


def poisoned():
    """Every cell and mask; called in a process whose fresh memory is poisoned."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    for cell in CELLS:
        for T, B, H in ((6, 9, 21), (2, 3, 21), (40, 1, 33)):
            for mask in MASKS:
                x, states, params = random_case(cell, T, B, 3, H, D=2)
                x, masks = random_masks(mask, x)
                assert_agree(cell, x, states, params, masks)


def test_every_element_is_written():
    """New tensors hold NaN and new scratch holds 0x7f bytes, so that an element nobody wrote shows."""
    Fresh("test_kernels.poisoned", seconds=300, MALLOC_PERTURB_="128").finish()


@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_a_gradient_goes_through_relu_of_nan(isa, use_isa):
    use_isa(isa)
    ours, theirs = (kind(3, 20, nonlinearity="relu") for kind in (fastrnn.RNN, torch.nn.RNN))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 2, 3)
    x[2, 0, 0] = torch.nan
    for layer in (ours, theirs):
        layer(x)[0].sum().backward()
    torch.testing.assert_close(ours.bias_ih_l0.grad, theirs.bias_ih_l0.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 7])
@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_an_infinite_gradient_ends_where_relu_cuts_off(isa, B, dtype, use_isa):
    """Times a derivative of 0 it would be NaN; torch.nn chooses too."""
    use_isa(isa)
    ours, theirs = (kind(3, 20, nonlinearity="relu", dtype=dtype) for kind in (fastrnn.RNN, torch.nn.RNN))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, B, 3, dtype=dtype)
    for layer in (ours, theirs):
        y = layer(x)[0]
        y.backward(torch.where(y > 0, 1.0, torch.inf))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad.isfinite().all()
        if dtype != torch.bfloat16:  # torch.nn's rounds after each operation
            torch.testing.assert_close(mine.grad, other.grad)


TINY = {torch.float32: 1e-40, torch.float64: 1e-310}  # denormal


def denormals_count():
    """On this thread, and on every other one of torch's pool."""
    return all(bool((torch.full((1 << 20,), tiny, dtype=dtype) * 1).all()) for dtype, tiny in TINY.items())


@pytest.mark.parametrize("dtype", TINY, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_flushed_only_inside(threads, dtype):
    """h = relu(x + h) hands a denormal on unless it is flushed, and so does its derivative; the threads' own
    arithmetic keeps it."""
    before, shape = torch.get_num_threads(), (3, 40, 64)
    eye = torch.eye(64, dtype=dtype)
    x, h = (torch.full(size, TINY[dtype], dtype=dtype) for size in (shape, (1, *shape[1:])))
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            assert not functional.layer("rnn_relu", x, [h], [eye, eye])[0].any()
            large = eye * torch.finfo(dtype).max ** 0.8  # a product with it would be none: x must count as 0
            assert not functional.layer("rnn_relu", x, [h], [large, eye])[0].any()
        assert denormals_count()
        leaves = [t.requires_grad_() for t in (torch.ones_like(x), torch.ones_like(h), eye, eye.clone())]
        y, _, _ = functional.layer("rnn_relu", leaves[0], leaves[1:2], leaves[2:])
        assert y.all()  # the derivative is 1
        assert not any(g.any() for g in torch.autograd.grad(y, leaves, x))
        assert denormals_count()
    finally:
        torch.set_num_threads(before)


def test_denormals_count_after_an_error():
    """Of a call that is refused, and of one that finds no memory."""
    eye = torch.eye(64)
    for x in (torch.ones(2, 3, 63), torch.ones(1, 1, 64).expand(2, 1 << 44, 64)):
        with pytest.raises((ValueError, RuntimeError)):
            functional.layer("rnn_relu", x, [torch.ones(1, 1, 64).expand(1, x.shape[1], 64)], [eye, eye])
        assert denormals_count()


@pytest.mark.parametrize(
    ("x", "h", "weights"),
    [
        (torch.zeros(2**63 - 1, 1, 0), torch.zeros(1, 1, 1), [(1, 0), (1, 1)]),
        (torch.zeros(1, 1, 1).expand(2**63 - 1, 1, 1), torch.zeros(1, 1, 1), [(1, 1), (1, 1)]),
        (torch.zeros(2**30, 2**30, 0), torch.zeros(1, 1, 1).expand(1, 2**30, 1), [(1, 0), (1, 1)]),
        (torch.zeros(1, 0, 0), torch.zeros(1, 0, 2**31), [(2**31, 0), (2**31, 2**31)]),
    ],
)
def test_sizes_that_no_memory_holds(x, h, weights):
    """Where a width of 0 or a stride of 0 makes tensors of them: what the kernels allocate would overflow."""
    params = [torch.zeros(1, 1).expand(*size) if 0 not in size else torch.zeros(size) for size in weights]
    with pytest.raises(RuntimeError, match="must be the sizes of what fits into memory, got"):
        torch.ops.fastrnn.layer("rnn_tanh", x, [h], params, None, None, None, False, False)


@pytest.mark.parametrize("mask", ["lengths", "lengths+reset"])
@pytest.mark.parametrize("cell", CELLS)
def test_whole_lengths_are_none(cell, mask):
    """Where all sequences are of T steps, as one alone often is, the bits are those without lengths."""
    x, states, params = random_case(cell, 30, 4, 3, 37, D=2)
    x, masks = random_masks(mask, x)
    got = []
    for lengths in (torch.full((4,), 30), None):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *states, *params)]
        S = len(states)
        y, last, _ = functional.layer(
            cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :], **{**masks, "lengths": lengths}
        )
        got.append([y, *last, *torch.autograd.grad(y.sum() + sum(s.sum() for s in last), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))

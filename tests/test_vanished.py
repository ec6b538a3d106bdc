"""Chunks of steps whose gradients are all 0, which the CPU's backward pass leaves out: whoever looks at the
results must not notice."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers import MASKS, Fresh, random_case, random_masks

import fastrnn
from fastrnn import functional, kernels
from fastrnn.reference import CELLS

T, B, H = 50, 32, 33  # chunks of at most 16 steps
# Of the longest sum, a weight's gradient over all rows: a rounding for each term.
ROUNDED = T * B * torch.finfo(torch.float64).eps


def forgets(cell, biases):
    """Whether with these biases of its gates a step's states do not depend on those before it."""
    gx, R = torch.tensor([biases], dtype=torch.float64), torch.zeros(len(biases), 1, dtype=torch.float64)
    states = tuple(torch.ones(1, 1, dtype=torch.float64) for _ in range(CELLS[cell].states))
    jacobian = torch.autograd.functional.jacobian(
        lambda *states: CELLS[cell].step(gx, states[0], states, R, None), states
    )
    return all(abs(float(d)) < 1e-60 for row in jacobian for d in row)


@functools.cache
def closed(cell):
    """The first biases of its gates, each 0, -150 or 150, that make any cell forget."""
    every = itertools.product((0, -150, 150), repeat=CELLS[cell].gates)
    return next(biases for biases in every if forgets(cell, biases))


def short_memory(cell, D=1, P=0, dtype=torch.float64):
    """A case whose gradients are 0, and not merely small, after a few steps."""
    x, states, params = random_case(cell, T, B, 3, H, D=D, P=P, dtype=dtype)
    for p in params:
        if p.dim() == 2 and p.shape[1] == (P or H):
            p *= 1e-40 if dtype == torch.float64 else 1e-5
        elif p.dim() == 1:
            for gate, bias in zip(p.view(-1, H), closed(cell), strict=True):
                gate[:] = bias or gate
    return x, states, params


def gradients(backend, cell, x, states, params, masks, reaching):
    """Of x, states and parameters, for each of `reaching`: (y, last, seq) to what the loss sees of them."""
    leaves = [t.detach().requires_grad_() for t in (x, *states, *params)]
    S = len(states)
    with fastrnn.backend(backend):
        outputs = functional.layer(
            cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :], return_states=True, **masks
        )
    losses = []
    for sees in reaching:
        generator = torch.Generator().manual_seed(1)
        losses.append(
            sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in sees(*outputs))
        )
    # The reference's all at once: its graph of small operators takes as long for one.
    if backend == "reference" and len(losses) > 1:
        each = torch.eye(len(losses), dtype=torch.float64)
        grads = torch.autograd.grad(
            torch.stack(losses), leaves, each, materialize_grads=True, is_grads_batched=True
        )
        yield from zip(*grads, strict=True)
        return
    for loss in losses:
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        yield [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def of_kernels(cell, case, masks, reaching, threads):
    """On so many threads; the reference, whose threads would wait for those of tests beside it, on as many as
    there were."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return list(gradients("cpu", cell, *case, masks, reaching))
    finally:
        torch.set_num_threads(before)


def assert_agree(cell, case, masks, *reaching, threads=1):
    ours = of_kernels(cell, case, masks, reaching, threads)
    theirs = gradients("reference", cell, *case, masks, reaching)
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            # What is not finite may be infinite here and NaN there: a gate may be a rounding away from 1.
            assert torch.equal(a.isfinite(), b.isfinite())
            a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
            scale = 1 + float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=ROUNDED, atol=ROUNDED * scale)


REACHING = {
    "last": lambda y, last, seq: [y[-1]],
    "first": lambda y, last, seq: [y[0]],
    "two": lambda y, last, seq: [y[y.shape[0] // 2], y[-1]],
    "states": lambda y, last, seq: list(last),
    "h": lambda y, last, seq: [last[0]],
    "c": lambda y, last, seq: [last[-1]],
    "nothing": lambda y, last, seq: [0 * y.sum()],
    "spread": lambda y, last, seq: [y.transpose(0, 1)[:, : y.shape[0] // 3]],  # and not contiguous
    "sequence": lambda y, last, seq: [s[:, s.shape[1] // 2] for s in seq] or [y[1]],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_parity(cell, D, mask):
    x, states, params = short_memory(cell, D)
    x, masks = random_masks(mask, x)
    assert_agree(cell, (x, states, params), masks, *REACHING.values(), threads=2)


# Of three threads directions are done one after the other, of ragged batches by parts of the units, which
# meet; of four side by side.
@pytest.mark.parametrize("threads", [3, 4])
@pytest.mark.parametrize("mask", ["none", "lengths+reset", "packed"])
@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "gru_reset_before"])
def test_both_directions_on_threads(kind, mask, threads):
    cell, P = kind.removesuffix("_proj"), 20 if kind == "lstm_proj" else 0
    for case in (short_memory(cell, 2, P), random_case(cell, T, B, 3, H, D=2, P=P)):
        x, masks = random_masks(mask, case[0])
        assert_agree(cell, (x, *case[1:]), masks, *REACHING.values(), threads=threads)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_that_do_not_vanish(cell, D, mask):
    x, states, params = random_case(cell, T, B, 3, H, D=D)
    x, masks = random_masks(mask, x)
    assert_agree(cell, (x, states, params), masks, *REACHING.values(), threads=2)


@pytest.mark.parametrize("step", range(25, T - 1))
def test_a_gradient_that_ends_at_once(step):
    """At a step of which relu lets nothing through: if that is its chunk's last, the gradient of the step
    before still lies in the scan's other ring, which the chunk of the earlier loss reads if those between
    them have an odd number of steps, as 512 rows of 34 do."""
    x, states, params = random_case("rnn_relu", T, 34, 3, H)
    params[0].abs_()
    x[step] = -1000
    assert_agree("rnn_relu", (x, states, params), {}, lambda y, last, seq: [y[step + 1], y[step - 25]])


def test_a_gradient_that_only_c_carries():
    """c stays 0, so that no gate has a gradient, and hands its own on."""
    x, states, params = random_case("lstm", T, B, 3, H)
    states[1].zero_()
    params[2][:H] = -1000  # the input gate
    params[2][H : 2 * H] = 3  # the forget gate
    assert_agree("lstm", (x, states, params), {}, REACHING["c"], REACHING["last"])


def test_a_gradient_that_waits_for_the_end_of_its_sequence():
    x, states, params = random_case("lstm", T, B, 3, H, D=2)
    for length in range(1, T, 5):
        lengths = torch.full((B,), T)
        lengths[3] = length
        for j in range(2):
            only = [lambda y, last, seq, j=j: [last[j][:, 3]]]
            assert_agree("lstm", (x, states, params), {"lengths": lengths}, *only)


class Operator:
    """The backward operator, whose arguments a test may change: what no forward pass leaves, too."""

    def __init__(self, cell, D=1, P=0, dtype=torch.float64, lengths=None):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x, states, params = short_memory(cell, D, P, wide)
        self.cell, self.lengths, self.dtype = cell, lengths, dtype
        self.x, self.states = x.to(dtype), [t.to(dtype) for t in states]
        self.params = [p.to(dtype) for p in params]
        with fastrnn.backend("cpu"), torch.no_grad():
            self.y, last, self.seq, self.saved = torch.ops.fastrnn.layer(
                cell, self.x, self.states, self.params, lengths, None, None, True, True
            )
        self.dlast = [torch.zeros_like(t) for t in last]
        self.dy = torch.zeros_like(self.y)
        self.dy[-1] = 1

    def rows(self, tensor, begin, end):
        """Of steps whose sequences are all there."""
        return tensor.view(-1, tensor.shape[-1])[begin * B : end * B]

    def backward(self):
        dx, dstates, dparams = torch.ops.fastrnn.layer_backward(
            *(self.cell, self.dy, self.dlast, [], self.x, self.states, self.params, self.lengths, None, None),
            *(self.y, self.seq, self.saved, True, True),
        )
        return [dx, *dstates, *dparams]

    def is_finite(self):
        return all(bool(t.isfinite().all()) for t in self.backward())


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])  # which multiplies no h
def test_chunks_are_left_out(cell, D, dtype, ragged):
    """Values too large to be multiplied, which no forward pass leaves, show who reads them."""
    lengths = torch.tensor([T] * (B - 1) + [T // 2]) if ragged else None
    for begin, end, left_out in ((2, 12, True), (T // 2 - 5, T // 2, True), (T - 5, T, False)):
        op = Operator(cell, D, dtype=dtype, lengths=lengths)
        if ragged and not left_out:
            op.dy[T // 2 - 1] = 1  # and here, among rows that the steps before it all have
            begin, end = T // 2 - 5, T // 2
        large = 1e200 if dtype == torch.float64 else 1e30
        op.rows(op.saved[0] if op.saved else op.y, begin, end)[:] = large
        assert op.is_finite() == left_out
        op.dy = op.dy.transpose(0, 1).contiguous().transpose(0, 1)  # is copied a chunk at a time
        assert op.is_finite() == left_out


def poisoned():
    """Called in a process whose fresh memory is poisoned."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for cell in CELLS:
        for D in (1, 2):
            some = [REACHING[name] for name in ("last", "first", "nothing")]
            assert_agree(cell, short_memory(cell, D), {}, *some)


def test_every_element_is_written():
    Fresh("test_vanished.poisoned", MALLOC_PERTURB_="128").finish()


def test_sequences_that_have_not_begun_do_not_keep_a_chunk_in():
    op = Operator("gru", lengths=torch.tensor([T] * (B - 1) + [5]))
    op.dlast[0][0, -1] = 1
    row = 5 * B + (25 - 5) * (B - 1)  # of step 25, after the short one's end
    op.saved[0].view(T * B, -1)[row : row + B] = 1e200
    assert op.is_finite()


@pytest.mark.parametrize("gradient", ["last", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(
    "where", ["x", "w_ih", "w_hh", "w_hr", "h0", "c0", "y", "c", "saved", "raw", "nowhere"]
)
def test_infinities_are_met(where, D, dtype, gradient):
    """In a chunk that could be left out: what is not finite is so where gradients too small to matter keep
    every chunk in."""
    op = Operator("lstm", D, P=20, dtype=dtype)
    if gradient == "none":
        op.dy.zero_()
    places = {
        **{"x": op.x[5, 2], "w_ih": op.params[0][1], "w_hh": op.params[1][1], "w_hr": op.params[4][1]},
        **{"h0": op.states[0][0, 3], "c0": op.states[1][0, 3], "y": op.y[4, 2], "c": op.seq[0][0, 4, 2]},
        **{"saved": op.rows(op.saved[0], 3, 4)[5], "raw": op.rows(op.saved[1], 3, 4)[5]},
    }
    if where != "nowhere":
        places[where][0] = torch.inf
    some = op.backward()
    op.dy[op.dy == 0] = 1e-290 if dtype == torch.float64 else 1e-30
    every = op.backward()
    for a, b in zip(some, every, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    assert all(bool(t.isfinite().all()) for t in some) == (where == "nowhere")


@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_are_those_of_the_whole(cell, dtype, isa, use_isa):
    """An infinite column of x keeps every chunk in, and spoils nothing but that column of W's gradients."""
    use_isa(isa)
    op = Operator(cell, 2, dtype=dtype)
    op.dy[T // 2] = 1
    some = op.backward()
    op.x[..., 1] = torch.inf
    for a, b in zip(some, op.backward(), strict=True):
        if a.shape == op.params[0].shape:
            assert not b[:, 1].isfinite().any()
            a, b = a[:, ::2], b[:, ::2]
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("where", [3, 7, 11, 15, "state", "w_ih"])  # a step of x, of some member's part
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])  # to whose h it goes on
def test_what_is_not_finite_stays_so(cell, where, D, value):
    """0 times infinity is NaN, in the gradients of torch.nn too."""
    x, states, params = short_memory(cell, D)
    if isinstance(where, int):
        x[where, 2, 1] = value
    elif where == "state":
        states[-1][:, 3, 4] = value
    else:
        x[..., 0] = x[..., 0].abs()  # else the forward pass sums up both infinities
        params[0][1, 0] = value
    (theirs,) = gradients("reference", cell, x, states, params, {}, [REACHING["last"]])
    assert any(g.isnan().any() for g in theirs)
    assert_agree(cell, (x, states, params), {}, REACHING["last"], threads=3)


def test_what_is_beyond_the_lengths_is_not_looked_at():
    lengths = torch.tensor([T] * (B - 1) + [1])
    op = Operator("gru", lengths=lengths)
    op.x[1:, -1] = op.y[1:, -1] = torch.nan
    op.saved[0].view(T * B, -1)[B + 2 * (B - 1) : B + 12 * (B - 1)] = 1e200  # of steps 3 to 12
    assert op.is_finite()


@pytest.mark.parametrize("wanted", ["x", "parameters"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_some_alone(cell, wanted):
    x, states, params = short_memory(cell, 2)
    (whole,) = gradients("cpu", cell, x, states, params, {}, [REACHING["two"]])
    leaves = [t.detach().clone() for t in (x, *states, *params)]
    S = len(states)
    some = [0] if wanted == "x" else list(range(1 + S, len(leaves)))
    for j in some:
        leaves[j].requires_grad_()
    y, _, _ = functional.layer(cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :])
    generator = torch.Generator().manual_seed(1)
    seen = REACHING["two"](y, None, None)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in seen)
    for j, grad in zip(some, torch.autograd.grad(loss, [leaves[j] for j in some]), strict=True):
        assert torch.equal(grad, whole[j])


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("step", range(0, T, 3))
def test_an_infinite_h_that_enters_a_chunk(step, D):
    """relu lets one through, and negative weights put an end to it in the next step: h is infinite at one
    step alone, which may be another chunk's. The gradient of R multiplies it by that next step's, which is
    0."""
    x, states, params = short_memory("rnn_relu", D)
    for p in params:
        p.copy_(-p.abs() if p.shape[-1] == H and p.dim() == 2 else p.abs())
    for s in (step, step + 1, step + 2):
        spiked = x.clone()
        spiked[min(s, T - 1), 2] = torch.inf
        assert_agree("rnn_relu", (spiked, states, params), {}, REACHING["last"])

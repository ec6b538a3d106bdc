"""Chunks of steps whose gradients are all 0, which the CPU's backward pass leaves out: whoever looks at the
results must not notice."""

from __future__ import annotations

import pytest
import torch
from helpers import MASKS, random_case, random_masks

import fastrnn
from fastrnn import functional, kernels
from fastrnn.reference import CELLS

T, B, H = 50, 32, 33  # chunks of at most 16 steps


def short_memory(cell, D=1, P=0, dtype=torch.float64):
    """A case whose gradients are 0, and not merely small, after a few steps."""
    x, states, params = random_case(cell, T, B, 3, H, D=D, P=P, dtype=dtype)
    for p in params:
        if p.dim() == 2 and p.shape[1] == (P or H):
            p *= 1e-40 if dtype == torch.float64 else 1e-5
        elif p.shape == (4 * H,):
            p[H : 2 * H] = -150  # the forget gate
        elif p.shape == (3 * H,):
            p[H : 2 * H] = -150  # the update gate: h' = n
    return x, states, params


def gradients(backend, cell, x, states, params, masks, reaching):
    """Of x, states and parameters, for each of `reaching`: (y, last, seq) to what the loss sees of them."""
    leaves = [t.detach().requires_grad_() for t in (x, *states, *params)]
    S = len(states)
    with fastrnn.backend(backend):
        outputs = functional.layer(
            cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :], return_states=True, **masks
        )
    for sees in reaching:
        generator = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in sees(*outputs))
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        yield [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def of_kernels(cell, case, masks, reaching, threads):
    """The reference takes one thread: several would wait for each other where tests run side by side."""
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
            scale = 1 + float(b.abs().nan_to_num(0, 0).max())
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * scale, equal_nan=True)


REACHING = {
    "last": lambda y, last, seq: [y[-1]],
    "first": lambda y, last, seq: [y[0]],
    "two": lambda y, last, seq: [y[y.shape[0] // 2], y[-1]],
    "states": lambda y, last, seq: list(last),
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


# Of three threads directions are done one after the other, by parts of the units that meet; of four side by
# side.
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


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_chunks_are_left_out(cell):
    """Saved values that no forward pass leaves, finite and too large to multiply, show who reads them."""
    x, states, params = short_memory(cell)
    with fastrnn.backend("cpu"), torch.no_grad():
        y, _, seq, (saved,) = torch.ops.fastrnn.layer(cell, x, states, params, None, None, None, True, True)
    dy = torch.zeros_like(y)
    dy[-1] = 1
    for begin, end, left_out in ((2, 12, True), (45, 50, False)):
        large = saved.clone()
        large.view(T, B, -1)[begin:end] = 1e200
        dx, dstates, dparams = torch.ops.fastrnn.layer_backward(
            cell, dy, [], [], x, states, params, None, None, None, y, seq, [large], True, True
        )
        assert all(bool(t.isfinite().all()) for t in (dx, *dstates, *dparams)) == left_out


@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_short_types(cell, dtype, isa, monkeypatch):
    monkeypatch.setenv("FASTRNN_CPU_ISA", isa)
    x, states, params = short_memory(cell, 2, dtype=torch.float32)
    case = x.to(dtype), [s.to(dtype) for s in states], [p.to(dtype) for p in params]
    wide = case[0].float(), [s.float() for s in case[1]], [p.float() for p in case[2]]
    reaching = [lambda *out, name=name: [t.float() for t in REACHING[name](*out)] for name in ("last", "two")]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    narrow = of_kernels(cell, case, {}, reaching, 2)
    for ours, theirs in zip(narrow, gradients("reference", cell, *wide, {}, reaching), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            scale = float(b.abs().max())
            torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("where", ["x", "state", "w_ih"])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])  # to whose h it goes on
def test_what_is_not_finite_stays_so(cell, where, D, value):
    """0 times infinity is NaN, in the gradients of torch.nn too."""
    x, states, params = short_memory(cell, D)
    if where == "x":
        x[5, 2, 1] = value
    elif where == "state":
        states[-1][:, 3, 4] = value
    else:
        x[..., 0] = x[..., 0].abs()  # else the forward pass sums up both infinities
        params[0][1, 0] = value
    (theirs,) = gradients("reference", cell, x, states, params, {}, [REACHING["last"]])
    assert any(g.isnan().any() for g in theirs)
    assert_agree(cell, (x, states, params), {}, REACHING["last"], threads=3)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["x", "w_ih", "w_hh", "w_hr"])
def test_infinities_of_short_types_on_threads(where, dtype, threads):
    """NaN at the same places as where a second loss, too small to matter, leaves no chunk out."""
    x, states, params = short_memory("lstm", P=20, dtype=torch.float32)
    if where == "x":
        x[5, 2, 1] = torch.inf
    else:
        x[..., 0] = x[..., 0].abs()
        states[0] = states[0].abs() + 1  # h begins positive, and infinities of one sign meet it
        {"w_ih": params[0], "w_hh": params[1], "w_hr": params[4]}[where][1, 0] = torch.inf
    case = x.to(dtype), [s.to(dtype) for s in states], [p.to(dtype) for p in params]
    some, all_ = of_kernels(
        "lstm", case, {}, [lambda y, last, seq: [y[-1]], lambda y, last, seq: [y[-1], 1e-20 * y]], threads
    )
    assert any(g.isnan().any() for g in all_)
    for a, b in zip(some, all_, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_what_is_beyond_the_lengths_is_not_looked_at():
    """A chunk is left out although what pads x is not finite: gradients are those without it."""
    x, states, params = short_memory("lstm")
    lengths = torch.randint(1, T // 2, (B,))
    padded = x.masked_fill((torch.arange(T)[:, None] >= lengths)[..., None], torch.nan)
    for given in (x, padded):
        assert_agree("lstm", (given, states, params), {"lengths": lengths}, REACHING["first"])


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

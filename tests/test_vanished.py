"""Chunks of steps whose gradients are all 0, which the CPU's backward pass passes over: whoever looks at the
results must not notice."""

from __future__ import annotations

import pytest
import torch
from helpers import MASKS, random_case, random_masks

import fastrnn
from fastrnn import functional, kernels
from fastrnn.reference import CELLS

T, B = 50, 32  # chunks of 4 to 16 steps, by the processor's caches


def short_memory(cell, D=1, P=0, I=3, H=33, dtype=torch.float64):
    """A case whose gradients are 0, and not merely small, after a few steps."""
    x, states, params = random_case(cell, T, B, I, H, D=D, P=P, dtype=dtype)
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


def assert_agree(cell, case, masks, *reaching, threads=1):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ours = list(gradients("cpu", cell, *case, masks, reaching))
    torch.set_num_threads(before)
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
    "sequence": lambda y, last, seq: [s[s.shape[0] // 2] for s in seq] or [y[1]],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_parity(cell, D, mask):
    x, states, params = short_memory(cell, D)
    x, masks = random_masks(mask, x)
    assert_agree(cell, (x, states, params), masks, *REACHING.values(), threads=2)


@pytest.mark.parametrize("mask", MASKS)
def test_projection_on_three_threads(mask):
    x, states, params = short_memory("lstm", 2, P=5)
    x, masks = random_masks(mask, x)
    assert_agree("lstm", (x, states, params), masks, *REACHING.values(), threads=3)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_that_do_not_vanish(cell):
    assert_agree(cell, random_case(cell, T, B, 3, 33), {}, *REACHING.values())


@pytest.mark.parametrize("step", range(25, T - 1))
def test_a_gradient_that_ends_at_once(step):
    """At a step of which relu lets nothing through: if that is its chunk's last, the gradient of the step
    before still lies in the scan's other ring, which the chunk of the earlier loss reads if those between
    them have an odd number of steps, as 512 rows of 34 do."""
    x, states, params = random_case("rnn_relu", T, 34, 3, 33)
    params[0].abs_()
    x[step] = -1000
    assert_agree("rnn_relu", (x, states, params), {}, lambda y, last, seq: [y[step + 1], y[step - 25]])


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
    narrow = gradients("cpu", cell, *case, {}, reaching)
    for ours, theirs in zip(narrow, gradients("reference", cell, *wide, {}, reaching), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            scale = float(b.abs().max())
            torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("where", ["x", "state", "weight"])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])  # to whose h it goes on
def test_what_is_infinite_stays_so(cell, where, D):
    """0 times infinity is NaN, in the gradients of torch.nn too."""
    x, states, params = short_memory(cell, D)
    if where == "x":
        x[5, 2, 1] = torch.inf
    elif where == "state":
        states[-1][:, 3, 4] = torch.inf
    else:
        x[..., 0] = x[..., 0].abs()  # else the forward pass sums up both infinities
        params[0][1, 0] = torch.inf
    (theirs,) = gradients("reference", cell, x, states, params, {}, [REACHING["last"]])
    assert any(g.isnan().any() for g in theirs)
    assert_agree(cell, (x, states, params), {}, REACHING["last"])


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("step", range(0, T, 3))
def test_an_infinite_h_that_enters_a_chunk(step, D):
    """relu lets one through, and negative weights put an end to it in the next step: h is infinite at one
    step alone, which may be another chunk's. The gradient of R multiplies it by that next step's, which is
    0."""
    x, states, params = short_memory("rnn_relu", D)
    for p in params:
        p.copy_(-p.abs() if p.shape[-1] == 33 and p.dim() == 2 else p.abs())
    for s in (step, step + 1, step + 2):
        spiked = x.clone()
        spiked[min(s, T - 1), 2] = torch.inf
        assert_agree("rnn_relu", (spiked, states, params), {}, REACHING["last"])

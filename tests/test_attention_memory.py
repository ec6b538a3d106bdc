"""Attention's operators and memory: what lies apart, what threads share, what nobody asked."""

from __future__ import annotations

import pytest
import torch
from helpers import Fresh
from test_attention_gradients import each_score, tensors

import fastrnn
from fastrnn import functional


@each_score
def test_what_lies_apart(additive):
    """Every argument with strides, and the gradients of sums, which are one number."""
    flat, mask = tensors(5, 7, 3, 6, 4, additive, True)
    given = [None if t is None else torch.stack([t, t], -1)[..., 0] for t in (*flat, mask)]
    assert not any(t.is_contiguous() for t in given if t is not None)
    leaves, found = [t.requires_grad_() for t in given[:-1] if t is not None], []
    for backend in ("cpu", "reference"):
        with fastrnn.backend(backend):
            outputs = functional.attention(*given[:-1], mask=given[-1])
        found.append([*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("threads", "lengths"), [(2, (900, 20, 900)), (4, (20, 900, 20, 20, 900, 900)), (5, (90, 90))], ids=str
)
@each_score
def test_threads_that_share_what_is_left_over(additive, threads, lengths):
    """Scratch of a thread that is still at a sequence of its own is not theirs yet."""
    S, before = max(lengths), torch.get_num_threads()
    flat, _ = tensors(140, S, len(lengths), 16, 16, additive, False, torch.float32)
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    context, weights, lse = torch.ops.fastrnn.attention(*flat, mask, 0.5, True)
    args, found = (context, weights, *flat, mask, 0.5, context, lse, *(True,) * 4), []
    try:
        for n in (1, *(threads,) * 3):
            torch.set_num_threads(n)
            found.append(torch.ops.fastrnn.attention_backward(*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def no_queries():
    """The gradients of a memory that nobody asked are zeros, not what its memory held."""
    for additive in (False, True):
        flat, _ = tensors(1, 7, 2, 6, 4, additive, False)
        leaves = [t.requires_grad_() for t in (flat[0][:0], *flat[1:]) if t is not None]
        context, _ = functional.attention(*leaves, *[None] * (not additive))
        assert not any(g.any() for g in torch.autograd.grad(context.sum(), leaves))


def test_no_queries():
    Fresh("test_attention_memory.no_queries", MALLOC_PERTURB_="128").finish()

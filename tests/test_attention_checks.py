"""What attention refuses, and in which words."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import F64, assert_same, randn
from test_attention import case

import fastrnn
from fastrnn import functional

BAD = {
    "memory of another width": (lambda q, m: (q, m[..., :3]), {}, ValueError, r"memory must be \[S, B, M\]"),
    "memory of another batch": (lambda q, m: (q, m[:, :1]), {}, ValueError, r"memory must be \[S, B, M\]"),
    "query of another width": (lambda q, m: (q[..., :3], m), {}, ValueError, r"query must be \[Tq, B, Q\]"),
    "values of another length": (lambda q, m: (q, m, m[:2]), {}, ValueError, r"values must be \[S, B, V\]"),
    "ranks": (lambda q, m: (q, m[0]), {}, ValueError, r"must all have 3 dimensions.*2 \(memory\)"),
    "lists": (lambda q, m: (q, m.tolist()), {}, TypeError, "memory must be a Tensor, got list"),
    "dtypes": (lambda q, m: (q, m.float()), {}, RuntimeError, "memory must be torch.float64"),
    "integers": (lambda q, m: (q, m.long()), {}, ValueError, "floating point"),
    "lengths too long": (
        lambda q, m: (q, m),
        {"lengths": torch.tensor([6, 1])},
        ValueError,
        r"\[0, S\] = \[0, 5\], got 6",
    ),
    "mask of numbers": (
        lambda q, m: (q, m),
        {"mask": torch.ones(2, 5)},
        ValueError,
        "mask must be a BoolTensor",
    ),
    "mask of lists": (
        lambda q, m: (q, m),
        {"mask": [[True] * 5] * 2},
        TypeError,
        "mask must be a BoolTensor, got list",
    ),
    "another device": (
        lambda q, m: (q, m.to("meta")),
        {},
        RuntimeError,
        "memory must be on cpu like the query, got meta",
    ),
    "mask on another device": (
        lambda q, m: (q, m),
        {"mask": torch.ones(2, 5, device="meta").bool()},
        ValueError,
        "mask must be on the input's device, cpu, or on the CPU, got one on meta",
    ),
    "mask of another shape": (
        lambda q, m: (q, m),
        {"mask": torch.ones(5, 2).bool()},
        ValueError,
        r"\[2, 5\] or \[2, 3, 5\], got \[5, 2\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, options, error, text = BAD[name]
    attn, (query, memory, _) = case("dot", (3, 5, 2, 4, 4, 4), grad=False)
    with pytest.raises(error, match=text):
        attn(*make(query, memory), **options)


def test_errors_speak_of_the_callers_layout():
    attn, (query, memory, _) = case("dot", (3, 5, 2, 4, 4, 4), grad=False, batch_first=True)
    query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    with pytest.raises(ValueError, match=r"memory must be \[B, S, M\] = \[2, 5, 4\], got \[1, 5, 4\]"):
        attn(query, memory[:1])
    with pytest.raises(ValueError, match=r"query must be \[Tq, Q\] = \[3, 4\], got \[3, 3\]"):
        attn(query[0, :, :3], memory[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_of_the_function(backend):
    q, k, m, v = randn(3, 2, 4), randn(5, 2, 4), randn(5, 2, 6), randn(4)
    with fastrnn.backend(backend):
        for args, options, text in (
            ((q, k[..., :3], m), {}, r"keys must be \[S, B, K\] = \[5, 2, 4\], got \[5, 2, 3\]"),
            ((q, k, m[:4]), {}, r"values must be \[S, B, V\]"),
            ((q, k, m, v[:3]), {}, r"v must be \[K\]"),
            ((q, k[0], m), {}, "keys must have 3 dimensions, got 2"),
            ((q, k, m[0]), {}, "values must have 3 dimensions, got 2"),
            ((q, k, m), {"mask": torch.ones(2, 1, 5).bool()}, r"\[2, 3, 5\], got \[2, 1, 5\]"),
        ):
            with pytest.raises(ValueError, match=text):
                functional.attention(*args, **options)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        ((4, 5), {}, ValueError, "query_size == memory_size, got 4 and 5"),
        (
            (4,),
            {"score": "cosine"},
            ValueError,
            "score must be one of 'dot', 'general', 'additive', got 'cosine'",
        ),
        ((0,), {}, ValueError, "query_size must be 1 or more, got 0"),
        ((4.0,), {}, TypeError, "query_size must be an int"),
        ((4,), {"batch_first": 1}, TypeError, "batch_first should be of type bool"),
        ((4,), {"scale": torch.tensor(0.5)}, TypeError, "scale must be a number, got Tensor"),
        ((4,), {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ((4,), {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ((4,), {"scale": True}, TypeError, "scale must be a number, got bool"),
        ((4, True), {"score": "general"}, TypeError, "memory_size must be an int, got bool"),
    ],
)
def test_bad_constructions(args, options, error, text):
    with pytest.raises(error, match=text):
        fastrnn.Attention(*args, **options)


def test_where_the_weight_is_drawn_from():
    weight = fastrnn.Attention(4, 100, score="general").weight
    assert 0.08 < weight.abs().max() <= 1 / math.sqrt(100)


def test_sizes_of_one_keep_their_dimension():
    attn = fastrnn.Attention(4, dtype=F64)
    assert attn(randn(1, 4), randn(5, 4))[1].shape == (1, 5)
    assert attn(randn(3, 4), randn(1, 4))[1].shape == (3, 1)


def test_a_scale_of_zero():
    weights = fastrnn.Attention(4, scale=0.0, dtype=F64)(randn(3, 2, 4), randn(5, 2, 4))[1]
    assert_same(weights, torch.full((2, 3, 5), 0.2, dtype=F64))


def test_masks_of_the_memory_alone():
    """[S] of unbatched memory; [B, S] beside lengths, here of as many sequences as queries."""
    attn, mask = fastrnn.Attention(4, dtype=F64), torch.tensor([1, 0, 1, 1, 0]).bool()
    query, memory = randn(3, 4), randn(5, 4)
    assert_same(attn(query, memory, mask=mask), attn(query, memory, mask=mask.expand(3, 5)))
    mask, lengths = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 1, 0]]).bool(), torch.tensor([4, 2])
    both = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    for Tq in (2, 3):
        query, memory = randn(Tq, 2, 4), randn(5, 2, 4)
        assert_same(attn(query, memory, mask=mask, lengths=lengths), attn(query, memory, mask=both))


def test_a_decoders_output_and_state_share_no_memory():
    decoder, memory = fastrnn.AttentionDecoder(4, 6, 6), torch.randn(3, 2, 6)
    with torch.no_grad():
        for call, x in ((decoder, torch.randn(4, 2, 4)), (decoder.step, torch.randn(2, 4))):
            out, state, _ = call(x, memory)
            before = state[-1].clone()
            out.zero_()
            assert torch.equal(state[-1], before)


def test_sizes_that_no_memory_holds():
    """As of layers: widths of 0 make tensors of them, and what the kernels allocate would overflow."""
    z, none = torch.zeros, (None, None)
    query, memory, needs = z(16, 1, 0), z(2**59, 1, 0), (True, True, True, False)
    with pytest.raises(RuntimeError, match="Tq, S and B must be the sizes of what fits into memory"):
        torch.ops.fastrnn.attention_backward(
            *(*none, query, memory, memory, *none, 1.0, query, z(1, 16), *needs),
        )
    memory, params = z(2**58, 1, 0), [z(0, 0), z(0, 0), z(0), z(0)]
    with pytest.raises(RuntimeError, match="T, S and B must be the sizes of what fits into memory"):
        torch.ops.fastrnn.decoder(
            *("rnn_tanh", z(1, 1, 0), [z(1, 1, 0)], z(1, 0), params, z(0, 0), memory, memory),
            *(*none, None, [], 1.0, False),
        )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_decoders_mask_is_of_its_memory_alone(backend):
    """One of each query's own, which attention takes, would broadcast in the formula of a single step."""
    T, B, S, H = 3, 2, 5, 4
    x, feed, h = randn(T, B, 2), randn(B, H), randn(1, B, H)
    params = [randn(3 * H, 2 + H), randn(3 * H, H), randn(3 * H), randn(3 * H)]
    given = (x, [h], feed, [params], randn(H, H), randn(S, B, H), randn(S, B, H))
    with fastrnn.backend(backend):
        out, _, weights = functional.decoder("gru", *given, mask=torch.ones(B, S).bool())
        assert (out.shape, weights.shape) == ((T, B, H), (B, T, S))
        with pytest.raises(ValueError, match=r"mask must be \[B, S\] = \[2, 5\], got \[2, 3, 5\]"):
            functional.decoder("gru", *given, mask=torch.ones(B, T, S).bool())

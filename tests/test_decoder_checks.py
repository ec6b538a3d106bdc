"""fastrnn.AttentionDecoder: where its parameters come from, and what it refuses, in which words."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import F64, assert_same, randn
from test_decoder import operator

import fastrnn


def test_where_parameters_are_drawn_from():
    """weight_c as torch.nn.Linear's, the layers' as torch.nn.LSTM's, the attention's too, anew each time."""
    decoder = fastrnn.AttentionDecoder(2, 9, 91, score="general")
    assert 0.08 < decoder.weight_c.abs().max() <= 1 / math.sqrt(9 + 91)
    for name, p in fastrnn.AttentionDecoder(2, 25, 25).named_parameters():
        if "_l0" in name:
            assert 0.15 < p.abs().max() <= 1 / math.sqrt(25)
    decoder = fastrnn.AttentionDecoder(2, 3, 4, num_layers=2, score="additive")
    before = copy.deepcopy(decoder)
    decoder.reset_parameters()
    for p, q in zip(decoder.parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q)


def test_the_attentions_scale_holds_in_the_scan():
    """As it does in steps."""
    decoder = fastrnn.AttentionDecoder(2, 4, 4, dtype=F64)
    decoder.attention = fastrnn.Attention(4, scale=0.25, dtype=F64)
    x, memory, out, state, columns = randn(3, 2, 2), randn(5, 2, 4), [], None, []
    for x_t in x:
        a, state, weights = decoder.step(x_t, memory, state)
        out.append(a)
        columns.append(weights)
    assert_same(decoder(x, memory), (torch.stack(out), state, torch.stack(columns, 1)))


def test_all_may_be_dropped():
    assert fastrnn.AttentionDecoder(2, 4, 4, num_layers=2, dropout=1.0).dropout == 1


@pytest.mark.parametrize(
    ("sizes", "options", "error", "text"),
    [
        ((2, 4, 4), {"batch_first": 1}, TypeError, "batch_first should be of type bool"),
        ((0, 4, 4), {}, ValueError, "input_size must be 1 or more, got 0"),
    ],
)
def test_bad_constructions(sizes, options, error, text):
    with pytest.raises(error, match=text):
        fastrnn.AttentionDecoder(*sizes, **options)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_no_feeding_takes_no_a(cell):
    decoder, h = fastrnn.AttentionDecoder(2, 4, 4, cell=cell, input_feeding=False, dtype=F64), randn(1, 3, 4)
    state = (*[h] * (1 + (cell == "lstm")), randn(3, 4))
    with pytest.raises(TypeError, match=r"the state of this decoder must be .*h_n"):
        decoder(randn(2, 3, 2), randn(5, 3, 4), state)


@pytest.mark.parametrize("steps", [1, 3])
def test_states_of_another_dtype(steps):
    decoder = fastrnn.AttentionDecoder(2, 4, 4, cell="gru", dtype=F64)
    x, memory, h, a = randn(steps, 3, 2), randn(5, 3, 4), randn(1, 3, 4), randn(3, 4)
    with pytest.raises(RuntimeError, match=r"a must be torch\.float64 like the parameters"):
        decoder(x, memory, (h, a.float()))
    with pytest.raises(RuntimeError, match=r"h_n must be torch\.float64 like the parameters"):
        decoder(x, memory, h.float())


def test_a_state_of_no_dimensions():
    decoder = fastrnn.AttentionDecoder(2, 4, 4, cell="gru", dtype=F64)
    for shape in ((3, 2), (3, 1, 2)):
        memory = randn(5, *shape[1:-1], 4)
        with pytest.raises(ValueError, match=r"h_n must be \[L, B, H\] = \[1, 1, 4\], got \[\]"):
            decoder(randn(*shape), memory, torch.tensor(1.0, dtype=F64))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda x: x[:, :1], ValueError, r"input_t must be \[B, I\] = \[3, 2\], got \[3, 1\]"),
        (lambda x: x[None], ValueError, "input_t must have 2 dimensions, or unbatched 1, got 3"),
        (lambda x: x.long(), ValueError, "input_t must be a floating point"),
        (lambda x: x.float(), RuntimeError, r"input_t must be torch\.float64"),
        (lambda x: x.tolist(), TypeError, "input_t must be a Tensor, got list"),
    ],
)
def test_bad_input_of_a_step(make, error, text):
    decoder = fastrnn.AttentionDecoder(2, 4, 4, dtype=F64)
    with pytest.raises(error, match=text):
        decoder.step(make(randn(3, 2)), randn(5, 3, 4))


def test_memory_of_another_rank():
    decoder = fastrnn.AttentionDecoder(2, 4, 4, dtype=F64)
    with pytest.raises(ValueError, match="memory must have 3 dimensions like the input, got 2"):
        decoder(randn(2, 3, 2), randn(5, 4))
    with pytest.raises(ValueError, match="memory must have 2 dimensions like the input, got 3"):
        decoder(randn(2, 2), randn(5, 3, 4))


NAMES = ["x", "states", "feed", "params", "w_h", "keys", "values", "w_q", "v", "mask", "drops"]


@torch.no_grad()
def test_the_operators_trust_nobody():
    call, flat = operator("lstm")
    given = dict(zip(NAMES, call.arguments(flat), strict=True))

    def decoder(**changed):
        return torch.ops.fastrnn.decoder("lstm", *{**given, **changed}.values(), 0.5, True)

    for words, changed in (
        ("of at least one step", {"x": given["x"][:0]}),
        ("without w_q keys must be as wide as h, 3, got 2", {"keys": given["keys"][..., :2]}),
        ("the additive score needs both w_q and v", {"v": randn(3)}),
        ("the additive score needs both w_q and v", {"w_q": randn(3, 3)}),
        ("drops must be of each layer but the last, got 2", {"drops": given["drops"] * 2}),
    ):
        with pytest.raises(RuntimeError, match=words):
            decoder(**changed)
    out, last, weights, saved = decoder()
    for words, dlast, kept in (
        ("needs what decoder saved: expected 6 tensors, got 5", last, saved[:-1]),
        ("dlast must be empty or one for each state", last[:1], saved),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.fastrnn.decoder_backward(
                *("lstm", out, dlast, weights, *given.values(), 0.5, out, weights, kept), *(True,) * 4
            )


@pytest.mark.parametrize("additive", [False, True])
def test_what_lies_apart(additive):
    """Every argument with strides, and the gradients of sums, which are one number."""
    call, flat = operator("lstm", additive)
    flat = [None if t is None else torch.stack([t.detach(), t.detach()], -1)[..., 0] for t in flat]
    assert not any(t.is_contiguous() for t in flat if t is not None)
    leaves, found = [t.requires_grad_() for t in flat[: call.primals] if t is not None], []
    for run in (lambda flat: fastrnn.fused.run(call, flat), call.reference):
        outputs = run(flat)
        found.append([*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)])
    torch.testing.assert_close(*found)

"""The kernels of attention of every query over all keys, forward and backward; attention.py calls them.

Scores are made tile by tile, wherever they are needed (Dao 2022, "FlashAttention"; Bahdanau's additive score
as well), so there is no [Tq, S] matrix in memory unless the weights are asked for, but for the gradients of
additive scores: making one of those again takes K times as long as reading it. Every sum has one program and
one order: the same bits in every run.

Dimensions: Tq queries, S positions, B batch, K width of queries and keys, V of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import cells

# Values that differ from call to call, for which no kernel is compiled anew.
FREE = ("Tq", "S", "B", "mask_b", "mask_q")


@triton.jit
def _rows(p, row, stride, column, has_row, has_column):
    return tl.load(
        p + row[:, None] * stride + column[None, :], mask=has_row[:, None] & has_column[None, :], other=0.0
    )


@triton.jit
def _put(p, row, stride, column, value, has_row, has_column):
    tl.store(
        p + row[:, None] * stride + column[None, :],
        value.to(p.dtype.element_ty),
        mask=has_row[:, None] & has_column[None, :],
    )


@triton.jit
def _product(
    a, b, row_a, row_b, stride, has_a, has_b, K,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of a times rows of b: [BLOCK_A, BLOCK_B]."""
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = _rows(a, row_a, stride, k, has_a, k < K).to(OPERAND)
        right = _rows(b, row_b, stride, k, has_b, k < K).to(OPERAND)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _tanh_of_sums(query, keys, row_q, row_s, K, k, has_q, has_s):
    """[BLOCK_Q, BLOCK_S, BLOCK_K]"""
    q = _rows(query, row_q, K, k, has_q, k < K).to(tl.float32)
    key = _rows(keys, row_s, K, k, has_s, k < K).to(tl.float32)
    return cells.tanh(q[:, None, :] + key[None, :, :])


@triton.jit
def _read(attended, s, b, S, MASKED: tl.constexpr):
    """Which of the positions s of sequence b are read: those that there are and any query may attend to."""
    has_s = s < S
    if MASKED:
        has_s = has_s & (tl.load(attended + b.to(tl.int64) * S + s, mask=has_s, other=0) != 0)
    return has_s


@triton.jit
def _weights(
    query, keys, v, mask, attended, lse, q, s, b, Tq, S, B, K, scale,
    mask_b, mask_q,
    ADDITIVE: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of queries q and positions s of sequence b, -inf where q may not attend to s, or, NORMED, their
    softmax, 0 there; and which positions are read at all."""
    row_q, row_s = q.to(tl.int64) * B + b, s.to(tl.int64) * B + b
    has_q, has_s = q < Tq, _read(attended, s, b, S, MASKED)
    may = has_q[:, None] & (s < S)[None, :]
    if MASKED:
        allowed = tl.load(
            mask + b.to(tl.int64) * mask_b + q.to(tl.int64)[:, None] * mask_q + s[None, :], mask=may, other=0
        )
        may = may & (allowed != 0)
    if ADDITIVE:
        score = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            t = _tanh_of_sums(query, keys, row_q, row_s, K, k, has_q, has_s)
            score += tl.sum(t * tl.load(v + k, mask=k < K, other=0.0).to(tl.float32)[None, None, :], 2)
    else:
        score = _product(
            query, keys, row_q, row_s, K, has_q, has_s, K, BLOCK_Q, BLOCK_S, BLOCK_K, OPERAND, PRECISION
        )
    score = tl.where(may, score * scale, float("-inf"))
    if NORMED:
        of_row = tl.load(lse + b.to(tl.int64) * Tq + q, mask=has_q, other=0.0)
        score = tl.where(may, tl.exp(score - of_row[:, None]), 0.0)
    return score, has_s


@triton.jit(do_not_specialize=FREE)
def attend_forward(
    query, keys, values, v,  # [Tq, B, K], [S, B, K], [S, B, V], [K]
    mask, attended,  # bytes: [B, Tq, S] with strides mask_b, mask_q, 1; [B, S], what any query may attend to
    context, lse,  # [Tq, B, V]; [B, Tq] float32, the logarithm of the softmax's sum: come out
    Tq, S, B, K, V, scale, mask_b, mask_q,
    ADDITIVE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (B, tiles of queries, tiles of V)"""
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(0)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    most = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        score, has_s = _weights(
            query, keys, v, mask, attended, lse, q, s, b, Tq, S, B, K, scale, mask_b, mask_q,
            ADDITIVE, MASKED, False, BLOCK_Q, BLOCK_S, BLOCK_K, OPERAND, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(score, 1))
        # Not -inf where nothing has been allowed yet: the difference of two would be no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - base[:, None])
        before = tl.exp(most - base)
        total = total * before + tl.sum(weight, 1)
        part = _rows(values, s.to(tl.int64) * B + b, V, column, has_s, column < V)
        acc = tl.dot(
            weight.to(part.dtype).to(OPERAND),
            part.to(OPERAND),
            acc * before[:, None],
            input_precision=PRECISION,
        )
        most = higher
    # NaN is not 0, and without a mask nothing is left out: scores of -inf alone have no softmax.
    has_q = q < Tq
    some = has_q
    if MASKED:
        some = total != 0.0
    out = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    _put(context, q.to(tl.int64) * B + b, V, column, out, has_q, column < V)
    if tl.program_id(2) == 0:
        found = tl.where(some, most + tl.log(tl.where(some, total, 1.0)), 0.0)
        tl.store(lse + b.to(tl.int64) * Tq + q, found, mask=has_q)


@triton.jit(do_not_specialize=FREE)
def attend_weights(
    query, keys, v, mask, attended, lse,
    weights,  # [B, Tq, S]: comes out
    Tq, S, B, K, scale, mask_b, mask_q,
    ADDITIVE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (B, tiles of queries, tiles of S)"""
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(0)
    s = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    weight, _ = _weights(
        query, keys, v, mask, attended, lse, q, s, b, Tq, S, B, K, scale, mask_b, mask_q,
        ADDITIVE, MASKED, True, BLOCK_Q, BLOCK_S, BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip
    place = (b.to(tl.int64) * Tq + q)[:, None] * S + s[None, :]
    tl.store(weights + place, weight.to(weights.dtype.element_ty), mask=(q < Tq)[:, None] & (s < S)[None, :])


@triton.jit
def _gradients(
    query, keys, values, v, mask, attended, lse, dcontext, dweights, delta, q, s, b,
    Tq, S, B, K, V, scale, mask_b, mask_q,
    ADDITIVE: tl.constexpr, MASKED: tl.constexpr, DWEIGHTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the scores before their scale, and which positions are read."""
    weight, has_s = _weights(
        query, keys, v, mask, attended, lse, q, s, b, Tq, S, B, K, scale, mask_b, mask_q,
        ADDITIVE, MASKED, True, BLOCK_Q, BLOCK_S, BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip
    row_q, row_s = q.to(tl.int64) * B + b, s.to(tl.int64) * B + b
    has_q = q < Tq
    given = _product(
        dcontext, values, row_q, row_s, V, has_q, has_s, V, BLOCK_Q, BLOCK_S, BLOCK_K, OPERAND, PRECISION
    )
    place = b.to(tl.int64) * Tq + q
    if DWEIGHTS:
        given += tl.load(
            dweights + place[:, None] * S + s[None, :], mask=has_q[:, None] & (s < S)[None, :], other=0.0
        ).to(tl.float32)
    given -= tl.load(delta + place, mask=has_q, other=0.0)[:, None]
    # A gradient of what has no weight may be infinite, and reaches nothing.
    return tl.where(weight != 0.0, weight * given * scale, 0.0), has_s


@triton.jit(do_not_specialize=FREE)
def attend_dscores(
    query, keys, values, v, mask, attended, lse,
    dcontext, dweights,  # as context and weights
    delta,  # [B, Tq] float32: the sum of weights times their gradients
    dscores,  # [B, Tq, S] float32: comes out
    Tq, S, B, K, V, scale, mask_b, mask_q,
    ADDITIVE: tl.constexpr, MASKED: tl.constexpr, DWEIGHTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (B, tiles of queries, tiles of S), where ADDITIVE"""
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(0)
    s = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    ds, _ = _gradients(
        query, keys, values, v, mask, attended, lse, dcontext, dweights, delta, q, s, b,
        Tq, S, B, K, V, scale, mask_b, mask_q,
        ADDITIVE, MASKED, DWEIGHTS, BLOCK_Q, BLOCK_S, BLOCK_K, OPERAND, PRECISION,
    )  # fmt: skip
    place = (b.to(tl.int64) * Tq + q)[:, None] * S + s[None, :]
    tl.store(dscores + place, ds, mask=(q < Tq)[:, None] & (s < S)[None, :])


@triton.jit
def _dscores(dscores, attended, q, s, b, Tq, S, MASKED: tl.constexpr):
    """What attend_dscores left, and which positions are read."""
    has_s = _read(attended, s, b, S, MASKED)
    place = (b.to(tl.int64) * Tq + q)[:, None] * S + s[None, :]
    return tl.load(dscores + place, mask=(q < Tq)[:, None] & (s < S)[None, :], other=0.0), has_s


@triton.jit(do_not_specialize=FREE)
def attend_dquery(
    query, keys, values, v, mask, attended, lse, dcontext, dweights, delta,
    dscores,  # as attend_dscores left it, where ADDITIVE
    dquery,  # [Tq, B, K]: comes out
    dv,  # [B, tiles of queries, K] float32: where ADDITIVE and DV, each program's part comes out
    Tq, S, B, K, V, scale, mask_b, mask_q,
    ADDITIVE: tl.constexpr, MASKED: tl.constexpr, DWEIGHTS: tl.constexpr,
    DQUERY: tl.constexpr, DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (B, tiles of queries, tiles of K). DQUERY: whether dquery comes out; always, where not ADDITIVE"""
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(0)
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_q = q.to(tl.int64) * B + b
    has_q, has = q < Tq, column < K
    acc = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        row_s = s.to(tl.int64) * B + b
        if ADDITIVE:
            ds, has_s = _dscores(dscores, attended, q, s, b, Tq, S, MASKED)
            t = _tanh_of_sums(query, keys, row_q, row_s, K, column, has_q, has_s)
            if DQUERY:
                acc += tl.sum(ds[:, :, None] * (1.0 - t * t), 1)
            if DV:
                sums += tl.sum(tl.sum(ds[:, :, None] * t, 1), 0)
        else:
            ds, has_s = _gradients(
                query, keys, values, v, mask, attended, lse, dcontext, dweights, delta, q, s, b,
                Tq, S, B, K, V, scale, mask_b, mask_q,
                ADDITIVE, MASKED, DWEIGHTS, BLOCK_Q, BLOCK_S, BLOCK_K, OPERAND, PRECISION,
            )  # fmt: skip
            part = _rows(keys, row_s, K, column, has_s, has)
            acc = tl.dot(ds.to(part.dtype).to(OPERAND), part.to(OPERAND), acc, input_precision=PRECISION)
    if DV:
        place = (b.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * K + column
        tl.store(dv + place, sums, mask=has)
    if DQUERY:
        if ADDITIVE:
            acc *= tl.load(v + column, mask=has, other=0.0).to(tl.float32)[None, :]
        _put(dquery, row_q, K, column, acc, has_q, has)


@triton.jit(do_not_specialize=FREE)
def attend_dkeys(
    query, keys, values, v, mask, attended, lse, dcontext, dweights, delta, dscores,
    dkeys,  # [S, B, K]: comes out
    Tq, S, B, K, V, scale, mask_b, mask_q,
    ADDITIVE: tl.constexpr, MASKED: tl.constexpr, DWEIGHTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (B, tiles of S, tiles of K)"""
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    b = tl.program_id(0)
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_s = s.to(tl.int64) * B + b
    acc = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, Tq, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        row_q, has_q = q.to(tl.int64) * B + b, q < Tq
        if ADDITIVE:
            ds, has_s = _dscores(dscores, attended, q, s, b, Tq, S, MASKED)
            t = _tanh_of_sums(query, keys, row_q, row_s, K, column, has_q, has_s)
            acc += tl.sum(ds[:, :, None] * (1.0 - t * t), 0)
        else:
            ds, has_s = _gradients(
                query, keys, values, v, mask, attended, lse, dcontext, dweights, delta, q, s, b,
                Tq, S, B, K, V, scale, mask_b, mask_q,
                ADDITIVE, MASKED, DWEIGHTS, BLOCK_Q, BLOCK_S, BLOCK_K, OPERAND, PRECISION,
            )  # fmt: skip
            part = _rows(query, row_q, K, column, has_q, column < K)
            left = tl.trans(ds.to(part.dtype).to(OPERAND))
            acc = tl.dot(left, part.to(OPERAND), acc, input_precision=PRECISION)
    if ADDITIVE:
        acc *= tl.load(v + column, mask=column < K, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(_read(attended, s, b, S, MASKED)[:, None], acc, 0.0)  # 0 times infinity is NaN
    _put(dkeys, row_s, K, column, acc, s < S, column < K)


@triton.jit(do_not_specialize=FREE)
def attend_dvalues(
    query, keys, v, mask, attended, lse, dcontext,
    dvalues,  # [S, B, V]: comes out
    Tq, S, B, K, V, scale, mask_b, mask_q,
    ADDITIVE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (B, tiles of S, tiles of V)"""
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    b = tl.program_id(0)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
    for first in range(0, Tq, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        weight, _ = _weights(
            query, keys, v, mask, attended, lse, q, s, b, Tq, S, B, K, scale, mask_b, mask_q,
            ADDITIVE, MASKED, True, BLOCK_Q, BLOCK_S, BLOCK_K, OPERAND, PRECISION,
        )  # fmt: skip
        part = _rows(dcontext, q.to(tl.int64) * B + b, V, column, q < Tq, column < V)
        left = tl.trans(weight.to(part.dtype).to(OPERAND))
        acc = tl.dot(left, part.to(OPERAND), acc, input_precision=PRECISION)
    acc = tl.where(_read(attended, s, b, S, MASKED)[:, None], acc, 0.0)  # as in attend_dkeys
    _put(dvalues, s.to(tl.int64) * B + b, V, column, acc, s < S, column < V)

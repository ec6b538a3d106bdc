"""Attention of every query over all keys, forward and backward: what torch.ops.fastrnn.attention and
attention_backward run on GPUs.

Scores are made tile by tile, wherever they are needed (Dao 2022, "FlashAttention"; Bahdanau's additive score
as well), so there is no [Tq, S] matrix in memory unless the weights are asked for, but for the gradients of
additive scores: making one of those again takes K times as long as reading it. Every sum has one program and
one order: the same bits in every run.

Dimensions: Tq queries, S positions, B batch, K width of queries and keys, V of values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layer import DTYPES, INTERPRETED, alone

# Values that differ from call to call, for which no kernel is compiled anew.
FREE = ("Tq", "S", "B")
TILE_OF_QUERIES, TILE_OF_POSITIONS, PIECE = (
    16,
    32,
    64,
)  # of dot products, and what they load of K or V at once
ADDITIVE_TILE, ADDITIVE_PIECE = 16, 16
WIDEST = 128  # columns of a result that a program makes


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
    return 2.0 * tl.sigmoid(2.0 * (q[:, None, :] + key[None, :, :])) - 1.0


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
    has_q, has_s = q < Tq, s < S
    may = has_q[:, None] & has_s[None, :]
    if MASKED:
        has_s = has_s & (tl.load(attended + b.to(tl.int64) * S + s, mask=has_s, other=0) != 0)
        allowed = tl.load(mask + b * mask_b + q[:, None] * mask_q + s[None, :], mask=may, other=0)
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
        score = tl.exp(score - of_row[:, None])
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
    """grid (tiles of queries, B, tiles of V)"""
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(1)
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
    some = total > 0.0
    has_q = q < Tq
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
    """grid (tiles of queries, B, tiles of S)"""
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(1)
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
    return weight * (given - tl.load(delta + place, mask=has_q, other=0.0)[:, None]) * scale, has_s


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
    """grid (tiles of queries, B, tiles of S), where ADDITIVE"""
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(1)
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
    has_s = s < S
    if MASKED:
        has_s = has_s & (tl.load(attended + b.to(tl.int64) * S + s, mask=has_s, other=0) != 0)
    place = (b.to(tl.int64) * Tq + q)[:, None] * S + s[None, :]
    return tl.load(dscores + place, mask=(q < Tq)[:, None] & (s < S)[None, :], other=0.0), has_s


@triton.jit(do_not_specialize=FREE)
def attend_dquery(
    query, keys, values, v, mask, attended, lse, dcontext, dweights, delta,
    dscores,  # as attend_dscores left it, where ADDITIVE
    dquery,  # [Tq, B, K]: comes out
    dv,  # [B, tiles of queries, K] float32: where ADDITIVE, each program's part comes out
    Tq, S, B, K, V, scale, mask_b, mask_q,
    ADDITIVE: tl.constexpr, MASKED: tl.constexpr, DWEIGHTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (tiles of queries, B, tiles of K)"""
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(1)
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
            acc += tl.sum(ds[:, :, None] * (1.0 - t * t), 1)
            sums += tl.sum(tl.sum(ds[:, :, None] * t, 1), 0)
        else:
            ds, has_s = _gradients(
                query, keys, values, v, mask, attended, lse, dcontext, dweights, delta, q, s, b,
                Tq, S, B, K, V, scale, mask_b, mask_q,
                ADDITIVE, MASKED, DWEIGHTS, BLOCK_Q, BLOCK_S, BLOCK_K, OPERAND, PRECISION,
            )  # fmt: skip
            part = _rows(keys, row_s, K, column, has_s, has)
            acc = tl.dot(ds.to(part.dtype).to(OPERAND), part.to(OPERAND), acc, input_precision=PRECISION)
    if ADDITIVE:
        acc *= tl.load(v + column, mask=has, other=0.0).to(tl.float32)[None, :]
        place = (b.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * K + column
        tl.store(dv + place, sums, mask=has)
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
    """grid (tiles of S, B, tiles of K)"""
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    b = tl.program_id(1)
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
    """grid (tiles of S, B, tiles of V)"""
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    b = tl.program_id(1)
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
    _put(dvalues, s.to(tl.int64) * B + b, V, column, acc, s < S, column < V)


# --- calls


def precision(query: Tensor) -> str:
    """Of float32 products: TF32 where torch's own products may use it, else as good as float32's own."""
    if query.dtype != torch.float32 or query.device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def options(dtype: torch.dtype, precision: str, additive: bool, masked: bool) -> dict[str, Any]:
    """The compile-time arguments that all kernels share."""
    return {
        "ADDITIVE": additive,
        "MASKED": masked,
        "BLOCK_Q": ADDITIVE_TILE if additive else TILE_OF_QUERIES,
        "BLOCK_S": ADDITIVE_TILE if additive else TILE_OF_POSITIONS,
        "BLOCK_K": ADDITIVE_PIECE if additive else PIECE,
        # Interpreted products of 16-bit floats are wrong, see layer.options.
        "OPERAND": tl.float32 if INTERPRETED else DTYPES[dtype],
        "PRECISION": precision,
        "num_warps": 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def columns(width: int) -> int:
    """Of a result so wide that a program makes."""
    return min(WIDEST, max(16, int(triton.next_power_of_2(width))))


class Call:
    """What forward and backward of a call have in common: sizes, contiguous tensors, masks."""

    def __init__(
        self, query: Tensor, keys: Tensor, values: Tensor, v: Tensor | None, mask: Tensor | None, scale: float
    ) -> None:
        (self.Tq, self.B, self.K), (self.S, _, self.V) = query.shape, values.shape
        given = (query, keys, values) if v is None else (query, keys, values, v)
        if any(t.dtype != query.dtype for t in given) or query.dtype not in DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            found = ", ".join(str(t.dtype).removeprefix("torch.") for t in given)
            raise RuntimeError(f"attention's Triton kernels take one of {known} for all tensors, got {found}")
        shapes = ((self.S, self.B, self.K), (self.S, self.B, self.V), (self.K,))
        for name, tensor, shape in zip(("keys", "values", "v"), (keys, values, v), shapes, strict=True):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"attention: {name} must be {list(shape)}, got {list(tensor.shape)}")
        masks = ((self.B, self.S), (self.B, self.Tq, self.S))
        if mask is not None and (tuple(mask.shape) not in masks or mask.dtype != torch.bool):
            raise ValueError(
                f"attention: mask must be torch.bool {list(masks[0])} or {list(masks[1])}, got {mask.dtype} "
                f"{list(mask.shape)}"
            )
        self.query, self.keys, self.values = query.contiguous(), keys.contiguous(), values.contiguous()
        self.v = self.query if v is None else v.contiguous()
        self.additive, self.masked, self.scale = v is not None, mask is not None, scale
        self.mask = self.attended = self.query  # pointers that no kernel reads
        self.strides = (0, 0)
        if mask is not None:
            whole = mask.dim() == 3
            self.mask = mask.contiguous().view(torch.uint8)
            self.attended = mask.any(1).view(torch.uint8) if whole else self.mask
            self.strides = (self.Tq * self.S, self.S) if whole else (self.S, 0)

    @property
    def empty(self) -> bool:
        return 0 in (self.Tq, self.S, self.B, self.K, self.V)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.Tq, self.S, self.B, self.K

    def options(self) -> dict[str, Any]:
        return options(self.query.dtype, precision(self.query), self.additive, self.masked)

    def of_queries(self, options: dict[str, Any]) -> int:
        return int(triton.cdiv(self.Tq, options["BLOCK_Q"]))

    def of_positions(self, options: dict[str, Any]) -> int:
        return int(triton.cdiv(self.S, options["BLOCK_S"]))

    def weights(self, lse: Tensor) -> Tensor:
        """[B, Tq, S]"""
        out = self.query.new_empty(self.B, self.Tq, self.S)
        options = self.options()
        attend_weights[(self.of_queries(options), self.B, self.of_positions(options))](
            self.query, self.keys, self.v, self.mask, self.attended, lse, out,
            *self.sizes, self.scale, *self.strides, **options,
        )  # fmt: skip
        return out


def forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.fastrnn.attention's arguments and results."""
    call = Call(query, keys, values, v, mask, scale)
    lse = query.new_zeros(call.B, call.Tq, dtype=torch.float32)
    weights = query.new_zeros((call.B, call.Tq, call.S) if need_weights else 0)
    context = query.new_zeros(call.Tq, call.B, call.V)
    if call.empty:
        return context, weights, lse
    options = call.options()
    width = columns(call.V)
    with alone(query.device):
        attend_forward[(call.of_queries(options), call.B, triton.cdiv(call.V, width))](
            call.query, call.keys, call.values, call.v, call.mask, call.attended, context, lse,
            *call.sizes, call.V, scale, *call.strides, BLOCK_V=width, **options,
        )  # fmt: skip
        if need_weights:
            weights = call.weights(lse)
    return context, weights, lse


def backward(
    dcontext: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    scale: float,
    context: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.fastrnn.attention_backward's arguments and results."""
    call = Call(query, keys, values, v, mask, scale)
    dquery, dkeys, dvalues = (torch.empty_like(t) for t in (call.query, call.keys, call.values))
    dv = torch.zeros_like(call.v) if v is not None else query.new_empty(0)
    if call.empty:
        return dquery.zero_(), dkeys.zero_(), dvalues.zero_(), dv
    with alone(query.device):
        dcontext = torch.zeros_like(context) if dcontext is None else dcontext.contiguous()
        delta = (dcontext.float() * context.float()).sum(-1).t().contiguous()
        given = call.query
        if dweights is not None:
            given = dweights.contiguous()
            delta += (given.float() * call.weights(lse).float()).sum(-1)
        options = {**call.options(), "DWEIGHTS": dweights is not None}
        common = (
            call.query,
            call.keys,
            call.values,
            call.v,
            call.mask,
            call.attended,
            lse,
            dcontext,
            given,
            delta,
        )
        rest = (*call.sizes, call.V, scale, *call.strides)
        queries, positions = call.of_queries(options), call.of_positions(options)
        dscores = parts = delta
        if call.additive:
            dscores = delta.new_empty(call.B, call.Tq, call.S)
            parts = delta.new_empty(call.B, queries, call.K)
            attend_dscores[(queries, call.B, positions)](*common, dscores, *rest, **options)
        width = ADDITIVE_PIECE if call.additive else columns(call.K)
        tiles = triton.cdiv(call.K, width)
        attend_dquery[(queries, call.B, tiles)](
            *common, dscores, dquery, parts, *rest, BLOCK_C=width, **options
        )
        attend_dkeys[(positions, call.B, tiles)](*common, dscores, dkeys, *rest, BLOCK_C=width, **options)
        width = columns(call.V)
        attend_dvalues[(positions, call.B, triton.cdiv(call.V, width))](
            call.query, call.keys, call.v, call.mask, call.attended, lse, dcontext, dvalues,
            *rest, BLOCK_V=width, **call.options(),
        )  # fmt: skip
        if v is not None:
            dv = parts.sum((0, 1)).to(v.dtype)
    return dquery, dkeys, dvalues, dv

"""Attention by attend.py's kernels: torch.ops.fastrnn.attention and attention_backward on GPUs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrnn._checks import attention_sizes, dtype_names, same_device
from fastrnn.gpu import GRID_LIMIT, alone

from . import attend, heuristics
from .layer import DTYPES, INTERPRETED


def precision(query: Tensor) -> str:
    """Of float32 products: TF32 where torch's own products may use it, else as good as float32's own."""
    if query.dtype != torch.float32 or query.device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def options(dtype: torch.dtype, precision: str, additive: bool, masked: bool) -> dict[str, Any]:
    """The compile-time arguments that all kernels share."""
    return {
        "ADDITIVE": additive,
        "MASKED": masked,
        "BLOCK_Q": heuristics.ADDITIVE_TILE if additive else heuristics.TILE_OF_QUERIES,
        "BLOCK_S": heuristics.ADDITIVE_TILE if additive else heuristics.TILE_OF_POSITIONS,
        "BLOCK_K": heuristics.ADDITIVE_PIECE if additive else heuristics.PIECE,
        # Interpreted products of 16-bit floats are wrong, see layer.options.
        "OPERAND": tl.float32 if INTERPRETED else DTYPES[dtype],
        "PRECISION": precision,
        "num_warps": 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def columns(width: int) -> int:
    """Of a result so wide that a program makes."""
    return min(heuristics.WIDEST, max(16, int(triton.next_power_of_2(width))))


class Call:
    """What forward and backward of a call have in common: sizes, contiguous tensors, masks."""

    def __init__(
        self, query: Tensor, keys: Tensor, values: Tensor, v: Tensor | None, mask: Tensor | None, scale: float
    ) -> None:
        attention_sizes(query, keys, values, v, mask)
        (self.Tq, self.B, self.K), (self.S, _, self.V) = query.shape, values.shape
        given = (query, keys, values) if v is None else (query, keys, values, v)
        same_device(query, (keys, values), given[3:], (mask,))
        if any(t.dtype != query.dtype for t in given) or query.dtype not in DTYPES:
            raise RuntimeError(
                f"attention's Triton kernels take one of {dtype_names(DTYPES)} for all tensors, "
                f"got {dtype_names(t.dtype for t in given)}"
            )
        self.query, self.keys, self.values = query.contiguous(), keys.contiguous(), values.contiguous()
        self.v = self.query if v is None else v.contiguous()
        self.additive, self.masked, self.scale = v is not None, mask is not None, scale
        self.mask = self.attended = self.query  # pointers that no kernel reads
        self.strides = (0, 0)
        if mask is not None:
            whole = mask.dim() == 3
            mask = mask.to(query.device)
            self.mask = mask.contiguous().view(torch.uint8)
            self.attended = mask.any(1).view(torch.uint8) if whole else self.mask
            self.strides = (self.Tq * self.S, self.S) if whole else (self.S, 0)

    def check_tiles(self, positions: bool, gradients: bool) -> None:
        """RuntimeError where a launch would have more programs than there may be: of queries and of values'
        columns in each pass, of positions where they are shared out, of keys' columns for the gradients."""
        tiles = self.options()
        programs = (
            self.of_queries(tiles),
            self.of_positions(tiles) if positions else 1,
            triton.cdiv(self.K, self.columns_of_keys) if gradients else 1,
            triton.cdiv(self.V, columns(self.V)),
        )
        if max(programs) > GRID_LIMIT:
            raise RuntimeError(
                f"attention's Triton kernels take at most {GRID_LIMIT} tiles of queries, positions and "
                f"columns, got {programs} of Tq={self.Tq}, S={self.S}, K={self.K}, V={self.V}"
            )

    @property
    def empty(self) -> bool:
        return 0 in (self.Tq, self.S, self.B)

    @property
    def columns_of_keys(self) -> int:
        """Of the gradients of queries and keys that a program makes."""
        return heuristics.ADDITIVE_PIECE if self.additive else columns(self.K)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.Tq, self.S, self.B, self.K

    def options(self) -> dict[str, Any]:
        return options(self.query.dtype, precision(self.query), self.additive, self.masked)

    def of_queries(self, options: dict[str, Any]) -> int:
        return int(triton.cdiv(self.Tq, options["BLOCK_Q"]))

    def of_positions(self, options: dict[str, Any]) -> int:
        return int(triton.cdiv(self.S, options["BLOCK_S"]))

    def queries_at_once(self, dweights: bool) -> int:
        """Whose weights, or gradients of scores, [B, ., S] in float32, a backward pass has in memory: all
        where it has neither, or they take less than the sums over parts would."""
        if not (self.additive or dweights):
            return self.Tq
        sums = 2 * 4 * self.B * self.S * self.K * self.additive
        tile, each = int(self.options()["BLOCK_Q"]), 4 * self.B * self.S
        return max(max(heuristics.SCORE_BYTES, sums) // each // tile, 1) * tile

    def part(self, of: slice) -> Call:
        """The same of these queries alone."""
        part = copy.copy(self)
        part.query = self.query[of]
        part.Tq = part.query.shape[0]
        if self.strides[1]:  # each query has a mask of its own
            part.mask = self.mask[:, of].contiguous()
            part.strides = (part.Tq * self.S, self.S)
        return part

    def weights(self, lse: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, Tq, S]"""
        out = self.query.new_empty(self.B, self.Tq, self.S, dtype=dtype)
        options = self.options()
        attend.attend_weights[(self.B, self.of_queries(options), self.of_positions(options))](
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
    call.check_tiles(positions=need_weights, gradients=False)
    lse = query.new_empty(call.B, call.Tq, dtype=torch.float32)
    context = query.new_empty(call.Tq, call.B, call.V)
    if call.empty:
        weights = query.new_empty((call.B, call.Tq, call.S) if need_weights else 0)
        return context.zero_(), weights, lse.zero_()
    options = call.options()
    width = columns(call.V)
    with alone(query.device):
        attend.attend_forward[(call.B, call.of_queries(options), max(1, triton.cdiv(call.V, width)))](
            call.query, call.keys, call.values, call.v, call.mask, call.attended, context, lse,
            *call.sizes, call.V, scale, *call.strides, BLOCK_V=width, **options,
        )  # fmt: skip
        weights = call.weights(lse, query.dtype) if need_weights else query.new_empty(0)
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
    need_query: bool,
    need_keys: bool,
    need_values: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.fastrnn.attention_backward's arguments and results."""
    call = Call(query, keys, values, v, mask, scale)
    call.check_tiles(positions=True, gradients=True)
    shapes = (
        ("dcontext", dcontext, (call.Tq, call.B, call.V)),
        ("dweights", dweights, (call.B, call.Tq, call.S)),
        ("context", context, (call.Tq, call.B, call.V)),
        ("lse", lse, (call.B, call.Tq)),
    )
    for name, tensor, shape in shapes:
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != query.device):
            raise ValueError(
                f"attention: {name} must be {list(shape)} on {query.device}, "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
    need_v &= call.additive
    dquery, dkeys, dvalues, dv = (
        torch.empty_like(t) if need else query.new_empty(0)
        for t, need in zip(
            (call.query, call.keys, call.values, call.v),
            (need_query, need_keys, need_values, need_v),
            strict=True,
        )
    )
    if call.empty:
        return dquery.zero_(), dkeys.zero_(), dvalues.zero_(), dv.zero_()
    with alone(query.device):
        dcontext = torch.zeros_like(context) if dcontext is None else dcontext.contiguous()
        lse = lse.contiguous()
        if need_values and call.V:
            width = columns(call.V)
            attend.attend_dvalues[(call.B, call.of_positions(call.options()), triton.cdiv(call.V, width))](
                call.query, call.keys, call.v, call.mask, call.attended, lse, dcontext, dvalues,
                *call.sizes, call.V, scale, *call.strides, BLOCK_V=width, **call.options(),
            )  # fmt: skip
        if not (need_query or need_keys or need_v):
            return dquery, dkeys, dvalues, dv
        delta = (dcontext.float() * context.float()).sum(-1).t().contiguous()
        dweights = None if dweights is None else dweights.contiguous()
        rows = call.queries_at_once(dweights is not None)
        pieces = [slice(first, first + rows) for first in range(0, call.Tq, rows)]
        if dweights is not None:
            for of in pieces:
                # Rounded, the weights would not sum up to 1.
                weights = call.part(of).weights(lse[:, of].contiguous(), torch.float32)
                none = weights == 0  # whose gradient may be infinite, and reaches nothing
                delta[:, of] += weights.mul_(dweights[:, of]).masked_fill_(none, 0).sum(-1)
        results = dquery, dkeys, dv
        if len(pieces) == 1 or not call.additive:
            _of_scores(call, dcontext, dweights, lse, delta, (need_query, need_keys, need_v), results)
            return dquery, dkeys, dvalues, dv
        sums = [torch.zeros_like(t, dtype=torch.float32) for t in (dkeys, dv)]
        made = [torch.empty_like(t) for t in sums]
        for of in pieces:
            _of_scores(
                call.part(of),
                dcontext[of],
                None if dweights is None else dweights[:, of].contiguous(),
                lse[:, of].contiguous(),
                delta[:, of].contiguous(),
                (need_query, need_keys, need_v),
                (dquery[of] if need_query else dquery, *made),
            )
            for total, t in zip(sums, made, strict=True):
                total += t
        return dquery, sums[0].to(query.dtype), dvalues, sums[1].to(query.dtype)


def _of_scores(
    call: Call,
    dcontext: Tensor,
    dweights: Tensor | None,
    lse: Tensor,
    delta: Tensor,  # [B, Tq] float32: the sum of a query's weights times their gradients
    needs: tuple[bool, bool, bool],
    results: Sequence[Tensor],
) -> None:
    """What goes through the scores: the gradients of queries, keys and v, of any type."""
    (need_query, need_keys, need_v), (dquery, dkeys, dv) = needs, results
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
        call.query if dweights is None else dweights,
        delta,
    )
    rest = (*call.sizes, call.V, call.scale, *call.strides)
    queries, positions = call.of_queries(options), call.of_positions(options)
    dscores = parts = delta
    if call.additive:
        dscores = delta.new_empty(call.B, call.Tq, call.S)
        parts = delta.new_empty(call.B, queries, call.K) if need_v else delta
        attend.attend_dscores[(call.B, queries, positions)](*common, dscores, *rest, **options)
    width = call.columns_of_keys
    tiles = triton.cdiv(call.K, width)
    if call.K and (need_query or need_v):
        attend.attend_dquery[(call.B, queries, tiles)](
            *common, dscores, dquery if need_query else call.query, parts, *rest,
            BLOCK_C=width, DQUERY=need_query, DV=need_v, **options,
        )  # fmt: skip
    if call.K and need_keys:
        attend.attend_dkeys[(call.B, positions, tiles)](
            *common, dscores, dkeys, *rest, BLOCK_C=width, **options
        )
    if need_v:
        dv.copy_(parts.sum((0, 1)))

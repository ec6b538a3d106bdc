"""Attention and its decoder by the compiled operators, and these operators' derivatives.

A *call* knows its kernels, the formula behind them (`reference`) and how a flat list of tensors falls into
the arguments of both. Eager, it goes through `FusedFunction`; in a graph stands the operator, whose Autograd
key holds the same Function; under torch.func's transforms and forward-mode AD all is the formula, and so is
every derivative after the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference, transforms
from ._checks import same_device
from .kernels import LOADED, compute_dtype, present
from .ops import below_autograd, in_graph, is_batched, no_transforms, register_flops, wants_grad
from .reference import CELLS

Flat = Sequence[Tensor | None]


def _dense(grads: Flat, outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(o) if g is None else g for g, o in zip(grads, outputs, strict=True)]


@dataclass(frozen=True)
class Attention:
    """flat: query, keys, values, v; then mask, without a gradient. Outputs: context and, with need_weights,
    weights."""

    scale: float
    need_weights: bool

    primals = 4

    def reference(self, flat: Flat) -> tuple[Tensor, ...]:
        query, keys, values, v, mask = flat
        assert query is not None
        assert keys is not None
        assert values is not None
        # As the kernels have it: 16 bits are for what is kept, the arithmetic is float32's.
        wide = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
        outputs = reference.attention(
            query.to(wide),
            keys.to(wide),
            values.to(wide),
            None if v is None else v.to(wide),
            mask,
            self.scale,
        )
        context, weights = (t.to(query.dtype) for t in outputs)
        return (context, weights) if self.need_weights else (context,)

    def forward(self, flat: Flat, save: bool) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        context, weights, lse = torch.ops.fastrnn.attention.default(*flat, self.scale, self.need_weights)
        return (context, weights) if self.need_weights else (context,), [lse]

    def kept(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (outputs[0],)

    def shaped(self, flat: Flat, kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
        query, keys = flat[:2]
        assert query is not None
        assert keys is not None
        (Tq, B, _), S = query.shape, keys.shape[0]
        # Expanded: for its shape alone.
        return (kept[0], query.new_zeros(()).expand(B, Tq, S)) if self.need_weights else (kept[0],)

    def backward(
        self,
        flat: Flat,
        outputs: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Flat,
        needs: Sequence[bool],
    ) -> list[Any]:
        op, dweights = torch.ops.fastrnn.attention_backward.default, grads[1] if self.need_weights else None
        given = op(grads[0], dweights, *flat, self.scale, outputs[0], *saved, *needs)
        return [g if need else None for g, need in zip(given, needs, strict=True)]


@dataclass(frozen=True)
class Decoder:
    """flat: x, *states, feed, *params, w_h, keys, values, w_q, v; then mask, *drops, without gradients.
    Outputs: out, *last, weights."""

    cell: str
    layers: int
    scale: float

    @property
    def primals(self) -> int:
        return 7 + CELLS[self.cell].states + 4 * self.layers

    def arguments(self, flat: Sequence[Any]) -> list[Any]:
        """As the operator takes them, without scale."""
        S, P = CELLS[self.cell].states, 4 * self.layers
        x, *rest = flat
        states, (feed, *rest) = rest[:S], rest[S:]
        params, (w_h, keys, values, w_q, v, mask, *drops) = rest[:P], rest[P:]
        return [x, states, feed, params, w_h, keys, values, w_q, v, mask, drops]

    def reference(self, flat: Flat) -> tuple[Tensor, ...]:
        x, states, feed, params, *rest, mask, drops = self.arguments(flat)
        by_layer = [params[4 * k : 4 * k + 4] for k in range(self.layers)]
        run: Any = reference.decoder
        out, last, weights = run(self.cell, x, states, feed, by_layer, *rest, mask, drops, self.scale)
        return (out, *last, weights)

    def forward(self, flat: Flat, save: bool) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        op = torch.ops.fastrnn.decoder.default
        out, last, weights, saved = op(self.cell, *self.arguments(flat), self.scale, save)
        return (out, *last, weights), saved

    def shaped(self, flat: Flat, kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Tensors shaped like the outputs, with those that `backward` reads. It does not read the last
        states: callers edit them in place."""
        return (kept[0], *self.arguments(flat)[1], kept[1])

    def kept(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return outputs[0], outputs[-1]

    def backward(
        self,
        flat: Flat,
        outputs: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Flat,
        needs: Sequence[bool],
    ) -> list[Any]:
        out, *last, weights = outputs
        dout, *dlast, dweights = grads
        given = _dense(dlast, last) if any(g is not None for g in dlast) else []
        op = torch.ops.fastrnn.decoder_backward.default
        need_x, _, _, params, w_h, need_keys, need_values, *additive, _, _ = self.arguments([*needs, None])
        asked = need_x, any((*params, w_h, *additive)), need_keys, need_values
        dx, dstates, dfeed, dparams, *rest = op(
            self.cell, dout, given, dweights, *self.arguments(flat), self.scale, out, weights, saved, *asked
        )
        computed = [dx, *dstates, dfeed, *(dparams or [None] * len(params)), *rest]
        return [g if need else None for g, need in zip(computed, needs, strict=True)]


def _gradients(
    call: Any, flat: Flat, outputs: Sequence[Tensor], grads: Flat, needs: Sequence[bool]
) -> list[Tensor | None]:
    """By the formula: they can be differentiated, and go under vmap. needs: for each of the primals."""
    primals, others = flat[: call.primals], flat[call.primals :]
    wanted = [p for p, need in zip(primals, needs, strict=True) if need]
    if not wanted:
        return [None] * len(primals)

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        filled = [next(given) if need else p for p, need in zip(primals, needs, strict=True)]
        result: tuple[Tensor, ...] = call.reference((*filled, *others))
        return result

    vjp: Any = torch.func.vjp(forward, *wanted)[1]
    given = iter(vjp(tuple(_dense(grads, outputs))))
    return [next(given) if need else None for need in needs]


class FusedFunction(torch.autograd.Function):
    """outputs = apply(call, *flat)."""

    @staticmethod
    def forward(ctx: Any, call: Any, *flat: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs, saved = call.forward(flat, True)
        kept = call.kept(outputs)
        ctx.call, ctx.counts = call, (len(flat), len(kept))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*flat, *kept, *saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call, (count, results) = ctx.call, ctx.counts
        if all(g is None for g in grads):
            return (None,) * (1 + count)
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[1 : 1 + call.primals]
        flat, saved = tensors[:count], tensors[count + results :]
        outputs = call.shaped(flat, tensors[count : count + results])
        if torch.is_grad_enabled() or transforms.active() or any(map(is_batched, grads)):
            given = _gradients(call, flat, outputs, grads, needs)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                given = call.backward(flat, outputs, saved, grads, needs)
        return (None, *given, *(None,) * (count - call.primals))


class _OperatorFunction(FusedFunction):
    """FusedFunction with what it kept among the results: (*outputs, *saved)."""

    @staticmethod
    def forward(ctx: Any, call: Any, *flat: Tensor | None) -> Any:
        outputs = FusedFunction.forward(ctx, call, *flat)
        saved = ctx.to_save[sum(ctx.counts) :]
        ctx.mark_non_differentiable(*saved)
        ctx.results = len(outputs)
        return (*outputs, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return FusedFunction.backward(ctx, *grads[: ctx.results])


def run(call: Any, flat: Flat) -> tuple[Tensor, ...]:
    """The outputs of a call, by its kernels."""
    if transforms.active():
        outputs: tuple[Tensor, ...] = call.reference(flat)
        return outputs
    if in_graph():
        outputs, _ = call.forward(flat, False)  # the operator, to which the Function is opaque
    elif wants_grad(*present(flat)):
        apply: Any = FusedFunction.apply
        outputs = apply(call, *flat)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            outputs, _ = call.forward(flat, False)
    return outputs


# --- fakes and the registered rules


def _decoder_device(x: Tensor, rows: Sequence[Any], weights: Sequence[Any], mask: Tensor | None) -> None:
    same_device(x, present(rows), present(weights), (mask,))


def _fake_decoder(cell: str, *args: Any) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    x, states, feed, params, w_h, keys, values, w_q, v, mask, drops, _, save = args
    _decoder_device(x, (*states, feed, keys, values, *drops), (*params, w_h, w_q, v), mask)
    (T, B, _), H = x.shape, feed.shape[1]
    saved = []
    if save:
        for _ in range(len(params) // 4):
            saved += [x.new_empty(T * B, H) for _ in states]
            if not CELLS[cell].saves_h:
                saved.append(x.new_empty(T * B, CELLS[cell].saved * H))
        if w_q is not None:
            saved.append(x.new_empty(T * B, keys.shape[2]))
    last = [s.new_empty(s.shape) for s in states]
    return x.new_empty(T, B, H), last, x.new_empty(B, T, keys.shape[0]), saved


def _fake_decoder_backward(cell: str, *args: Any) -> Any:
    dout, dlast, dweights, x, states, feed, params, w_h, keys, values, w_q, v, mask, _, _, *rest = args
    *kept, saved, need_x, need_params, need_keys, need_values = rest
    rows = (*states, feed, keys, values, *kept, *saved, *dlast, dout, dweights)
    _decoder_device(x, rows, (*params, w_h, w_q, v), mask)

    def like(t: Tensor | None, need: bool = True) -> Tensor:
        empty: Tensor = x.new_empty(t.shape if need and t is not None else 0)
        return empty

    dparams = [like(p) for p in params] if need_params else []
    of_memory = like(w_h, need_params), like(keys, need_keys), like(values, need_values)
    additive = like(w_q, need_params), like(v, need_params)
    return like(x, need_x), [like(s) for s in states], like(feed), dparams, *of_memory, *additive


def _fake_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    same_device(query, [keys, values], present((v,)), (mask,))
    (Tq, B, _), S = query.shape, keys.shape[0]
    weights = query.new_empty((B, Tq, S) if need_weights else 0)
    lse = query.new_empty(B, Tq, dtype=compute_dtype(query))
    return query.new_empty(Tq, B, values.shape[2]), weights, lse


def _fake_attention_backward(
    dcontext: Tensor | None, dweights: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, keys, values, v, mask, _, context, lse, *needs = args
    rows = [keys, values, context, lse, *present((dcontext, dweights))]
    same_device(query, rows, present((v,)), (mask,))
    dquery, dkeys, dvalues, dv = (
        query.new_empty(t.shape if need and t is not None else 0)
        for t, need in zip((query, keys, values, v), needs, strict=True)
    )
    return dquery, dkeys, dvalues, dv


def _autograd_attention(keyset: Any, *args: Any) -> Any:
    *flat, scale, need_weights = args
    no_transforms(*flat)
    if not wants_grad(*present(flat)):
        return below_autograd(keyset, torch.ops.fastrnn.attention.default, *args)
    apply: Any = _OperatorFunction.apply
    context, *results = apply(Attention(scale, need_weights), *flat)
    return context, results[0] if need_weights else context.new_empty(0), results[-1]


def _autograd_attention_backward(keyset: Any, *args: Any) -> Any:
    dcontext, dweights, query, keys, values, v, mask, scale, context, _, *needs = args
    flat = (query, keys, values, v, mask)
    no_transforms(*flat, dcontext, dweights)
    if not wants_grad(*present((*flat, dcontext, dweights))):
        return below_autograd(keyset, torch.ops.fastrnn.attention_backward.default, *args)
    call = Attention(scale, True)
    needs[3] &= v is not None
    given = _gradients(call, flat, call.shaped(flat, (context,)), (dcontext, dweights), needs)
    return tuple(context.new_empty(0) if g is None else g for g in given)


def _autograd_decoder(keyset: Any, cell: str, *args: Any) -> Any:
    x, states, feed, params, *rest, mask, drops, scale, save = args
    flat = [x, *states, feed, *params, *rest, mask, *drops]
    no_transforms(*flat)
    if not wants_grad(*present(flat)):
        return below_autograd(keyset, torch.ops.fastrnn.decoder.default, cell, *args)
    apply: Any = _OperatorFunction.apply
    out, *results = apply(Decoder(cell, len(params) // 4, scale), *flat)
    S = len(states)
    return out, results[:S], results[S], results[S + 1 :] if save else []


def _autograd_decoder_backward(keyset: Any, cell: str, *args: Any) -> Any:
    dout, dlast, dweights, x, states, feed, params, *rest, mask, drops, scale, out, weights = args[:-5]
    need_x, need_params, need_keys, need_values = args[-4:]
    flat = [x, *states, feed, *params, *rest, mask, *drops]
    no_transforms(*flat, dout, *dlast, dweights)
    if not wants_grad(*present((*flat, dout, *dlast, dweights))):
        return below_autograd(keyset, torch.ops.fastrnn.decoder_backward.default, cell, *args)
    S, P = len(states), len(params)
    grads = (dout, *(dlast or [None] * S), dweights)
    call = Decoder(cell, P // 4, scale)
    of_weights = [need_params] * (P + 1)
    needs = [need_x, *[True] * (S + 1), *of_weights, need_keys, need_values, *[need_params] * 2]
    needs = [need and t is not None for need, t in zip(needs, flat, strict=False)]
    given = _gradients(call, flat, call.shaped(flat, (out, weights)), grads, needs)
    dx, *others = (x.new_empty(0) if g is None else g for g in given)
    dstates, (dfeed, *others) = others[:S], others[S:]
    return (dx, dstates, dfeed, others[:P] if need_params else [], *others[P:])


def _attention_flops(query: Any, keys: Any, values: Any, *rest: Any, **options: Any) -> int:
    """Of the products, for torch.utils.flop_counter."""
    return int(2 * query[0] * query[1] * keys[0] * (keys[2] + values[2]))


def _attention_backward_flops(dcontext: Any, dweights: Any, *inputs: Any, **options: Any) -> int:
    """The scores again, the gradients of the weights where any but the values' rests on them, and a product
    for each gradient that is needed but v's."""
    (query, keys, values), (need_query, need_keys, need_values, need_v) = inputs[:3], inputs[-4:]
    of_keys = 1 + need_query + need_keys
    of_values = (need_query or need_keys or need_v) + need_values
    return int(2 * query[0] * query[1] * keys[0] * (of_keys * keys[2] + of_values * values[2]))


def _matrices(params: Any, w_h: Any, w_q: Any) -> int:
    """The elements of all weights' shapes."""
    return sum(math.prod(shape) for shape in (*params, w_h, w_q or ()) if len(shape) == 2)


def _decoder_flops(cell: Any, *args: Any, **options: Any) -> int:
    """Of the products, for torch.utils.flop_counter."""
    (T, B, _), _, _, params, w_h, keys, values, w_q = args[:8]
    return int(2 * T * B * (_matrices(params, w_h, w_q) + keys[0] * (keys[2] + values[2])))


def _decoder_backward_flops(
    cell: Any, dout: Any, dlast: Any, dweights: Any, *inputs: Any, **options: Any
) -> int:
    """As of a layer and of attention; the gradients of the queries and of what was fed always are needed."""
    need_x, need_params, need_keys, need_values = inputs[-4:]
    (T, B, width), _, _, params, w_h, keys, values, w_q = inputs[:8]
    products = (1 + need_params) * _matrices(params, w_h, w_q) - (not need_x) * params[0][0] * width
    products += keys[0] * ((1 + need_keys) * keys[2] + (1 + need_values) * values[2])
    return int(2 * T * B * products)


def _triton(name: str) -> Any:
    """A kernel of triton_kernels.attention, imported at its first call."""

    def call(*args: Any) -> Any:
        try:
            from .triton_kernels import attention
        except ImportError as error:
            raise RuntimeError(
                f"attention's kernels for GPUs need Triton (pip install triton): {error}"
            ) from error
        return getattr(attention, name)(*args)

    return call


if LOADED:
    _LIBRARY = torch.library.Library("fastrnn", "IMPL")
    for _name, _fake, _rule, _flops in (
        ("attention", _fake_attention, _autograd_attention, _attention_flops),
        (
            "attention_backward",
            _fake_attention_backward,
            _autograd_attention_backward,
            _attention_backward_flops,
        ),
        ("decoder", _fake_decoder, _autograd_decoder, _decoder_flops),
        ("decoder_backward", _fake_decoder_backward, _autograd_decoder_backward, _decoder_backward_flops),
    ):
        torch.library.register_fake(f"fastrnn::{_name}", _fake)
        _LIBRARY.impl(_name, _rule, "Autograd", with_keyset=True)
        register_flops(_name, _flops)
    for _key in ("CUDA", "XPU"):
        _LIBRARY.impl("attention", _triton("forward"), _key)
        _LIBRARY.impl("attention_backward", _triton("backward"), _key)

"""Layers as functions: one layer, all its directions, on the backend in force.

y, h_n        = fastrnn.functional.gru(x, h0, params)
y, (h_n, c_n) = fastrnn.functional.lstm(x, (h0, c0), params)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state, _is_any_autocast_enabled, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from . import _checks, fused, kernels, ops, reference, transforms
from .backends import (
    AUTOCAST_DTYPES,
    autocast_dtype,
    choose,
    choose_fused,
    decide_attention,
    decide_cell,
    takes_cpu,
)
from .kernels import KERNEL_DTYPES
from .reference import CELLS


class _Recorder(threading.local):
    """While this thread exports a model, what takes every call of `layer`."""

    take: Callable[..., Any] | None = None


RECORDER = _Recorder()


def plain(x: Tensor) -> bool:
    """True where a call with x is one of the operator in eager mode and nothing else: no transform, trace,
    cast or other backend."""
    return (
        not is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in KERNEL_DTYPES
        and not transforms.active()
        and not _is_any_autocast_enabled()
        and _len_torch_dispatch_stack() == 0
        and _get_tracing_state() is None
        and RECORDER.take is None
        and takes_cpu()
    )


def stack(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """All layers of one direction as one operator, which runs them at once where that is faster; the bits are
    those of one `layer` after another.

    states   [L, B, .], as h_n of a module
    params   those of each layer in one list, or the one packed tensor of each
    others   as of `layer`
    returns  (y, last states), or None where the call is anything but inference by the CPU's kernels
    Raises what `layer` raises for the first layer that is wrong; and where there is no memory for what all
    layers need at once.
    """
    args = (cell, x, list(states), list(params), lengths, batch_sizes, reset)
    if torch.compiler.is_compiling():
        known = not torch.is_grad_enabled() and x.is_cpu and x.dtype in KERNEL_DTYPES
        other = RECORDER.take is not None or transforms.active() or torch._C._is_any_autocast_enabled()
        # An exported program may be called where gradients are wanted, whatever was so when it was made.
        # is_exporting() is True of whatever the compiler of torch 2.11 traces.
        other = other or torch.compiler._is_exporting_flag
        differ = any(t.dtype != x.dtype for t in (*states, *params))
        if not known or other or differ or choose(x) != "cpu":
            return None
        y, last = torch.ops.fastrnn.stack.default(*args)
        return y, tuple(last)
    if is_grad_enabled() or not plain(x):
        return None
    try:
        y, last = kernels.stack(*args)
    except kernels.REFUSALS:
        check(kernels.Inputs(*args))
        raise
    return y, tuple(last)


def check(inputs: kernels.Inputs) -> None:
    """`kernels.check` of a layer, or of a stack's [L, B, .]; packed weights only their kernel can check."""
    _, x, states, params, *_ = inputs
    layers, P = states[0].shape[0], states[0].shape[-1]
    each = len(params) // max(1, layers)
    for k in range(layers if each > 1 else 0):
        one, own = [s[k : k + 1] for s in states], list(params[k * each : (k + 1) * each])
        kernels.check(inputs._replace(x=x, states=one, params=own))
        x = x.new_empty(()).expand(*x.shape[:-1], P)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """As autocast does it: what it leaves alone is then refused, rather than rounded in silence."""
    return [t.to(dtype) if t.dtype in AUTOCAST_DTYPES else t for t in tensors]


def layer(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One layer of any registered cell.

    cell        a name of `fastrnn.reference.CELLS`
    x           [T, B, I], or packed [N, I] with batch_sizes
    states      h0 [D, B, P] (P = H without projection) and, for the LSTM, c0 [D, B, H]; D = 1 or 2
    params      for each direction (w_ih [G*H, I], w_hh [G*H, P][, b_ih, b_hh [G*H]][, w_hr [P, H]])
    lengths     LongTensor [B], on any device; clamped to [0, T]
    batch_sizes LongTensor [T] on the CPU, as a PackedSequence has it (rows sorted by length)
    reset       BoolTensor [T, B]: the state is zeroed before step t
    returns     (y [T, B, D*P], last states like `states`, sequences of the states after the first,
                each [D, T, B, H], packed [D, N, H]; empty unless return_states)
    Raises ValueError for sizes that do not agree, RuntimeError for dtypes that differ, BackendError where
    the backend asked for cannot serve.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, states, params = x.to(dtype), _cast(states, dtype), _cast(params, dtype)
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    inputs = kernels.Inputs(cell, x, list(states), list(params), lengths, batch_sizes, reset)
    if RECORDER.take is not None:
        kernels.check(inputs)
        recorded: tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]] = RECORDER.take(
            *inputs, return_states
        )
        return recorded
    backend = choose(x, lambda x: decide_cell(x, cell))
    if backend == "reference":
        kernels.check(inputs, heads=True)
        y, last, seq = reference.layer(*inputs)
        return y, last, seq if return_states else ()
    return ops.layer(inputs, return_states, backend)


def lstm(
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One LSTM layer: (y, (h_n, c_n)) from (h0, c0). Gates i, f, g, o; w_hr [P, H] projects. See `layer`."""
    y, (h, c), _ = layer("lstm", x, states, params, lengths=lengths, batch_sizes=batch_sizes, reset=reset)
    return y, (h, c)


def gru(
    x: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    *,
    reset_after: bool = True,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One GRU layer: (y, h_n). Gates r, z, n; reset_after=False is Cho 2014 v3's form. See `layer`."""
    cell = "gru" if reset_after else "gru_reset_before"
    y, (h,), _ = layer(cell, x, (h0,), params, lengths=lengths, batch_sizes=batch_sizes, reset=reset)
    return y, h


def rnn(
    x: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One vanilla (Elman) layer: (y, h_n); nonlinearity "tanh" or "relu". See `layer`."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    cell = f"rnn_{nonlinearity}"
    y, (h,), _ = layer(cell, x, (h0,), params, lengths=lengths, batch_sizes=batch_sizes, reset=reset)
    return y, h


def _narrow(flat: Sequence[Tensor | None], widen: bool = True) -> tuple[torch.dtype, list[Tensor | None]]:
    """The type of the results, that of the first tensor or autocast's, and all in that of the arithmetic.

    16 bits are for what is kept, as in `layer`: the arithmetic is float32's, rounded once; kernels that see
    to that themselves need no wide copies.
    """
    first = flat[0]
    assert first is not None
    autocast = autocast_dtype(first)
    dtype = autocast or first.dtype
    cast: list[Tensor | None] = []
    for t in flat:
        if t is None or t.dtype == torch.bool:
            cast.append(t)
            continue
        same = t.to(dtype) if autocast is not None and t.dtype in AUTOCAST_DTYPES else t
        if same.dtype != dtype:
            raise RuntimeError(f"all tensors must be {dtype} like the first, got {t.dtype}")
        cast.append(same.float() if widen and dtype in (torch.float16, torch.bfloat16) else same)
    return dtype, cast


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of every query over all keys, after the products with weights that make them.

    query    [Tq, B, K], keys [S, B, K], values [S, B, V]
    v        None: score = query . key; [K]: score = v . tanh(query + key). Either times scale
    mask     bool [B, S] or [B, Tq, S], True where a query may attend; what none may attend to is not read
    returns  (context [Tq, B, V], weights [B, Tq, S]; None unless need_weights): softmax over S, and zero
             where a query may attend to nothing
    Raises ValueError for sizes that do not agree, RuntimeError for dtypes and devices that differ,
    BackendError where the backend asked for has no such kernel.
    """
    _checks.attention_sizes(query, keys, values, v, mask)
    backend = choose(query, decide_attention)
    kernel = backend != "reference" and RECORDER.take is None  # an exported model has plain operations
    dtype, flat = _narrow([query, keys, values, v, mask], widen=not (kernel and backend == "triton"))
    call = fused.Attention(scale, need_weights)
    context, *weights = fused.run(call, flat) if kernel else call.reference(flat)
    return context.to(dtype), weights[0].to(dtype) if need_weights else None


def decoder(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    feed: Tensor,
    params: Sequence[Sequence[Tensor]],
    w_h: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    w_q: Tensor | None = None,
    v: Tensor | None = None,
    mask: Tensor | None = None,
    drops: Sequence[Tensor] = (),
    scale: float = 1.0,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """All steps of Luong's decoder with input feeding; arguments and results as of `reference.decoder`.

    Raises ValueError for a mask that is not [B, S], RuntimeError for other sizes, dtypes and devices that do
    not agree, BackendError where the backend asked for has no such kernel. `fastrnn.AttentionDecoder` checks
    before it, in its own words.
    """
    if mask is not None:  # one that is each query's own would broadcast in the formula
        _checks.shape("mask", mask, "[B, S]", (x.shape[1], keys.shape[0]))
    flat = [
        x,
        *states,
        feed,
        *(p for layer in params for p in layer),
        w_h,
        keys,
        values,
        w_q,
        v,
        mask,
        *drops,
    ]
    dtype, wide = _narrow(flat)
    call = fused.Decoder(cell, len(params), scale)
    # An exported model has plain operations.
    kernel = choose_fused(x, "the decoder") == "cpu" and RECORDER.take is None
    out, *last, weights = fused.run(call, wide) if kernel else call.reference(wide)
    return out.to(dtype), tuple(s.to(dtype) for s in last), weights.to(dtype)

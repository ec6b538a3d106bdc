"""A layer whose weights were packed beforehand: the operators `fastrnn::pack` and `fastrnn::layer_packed`.

The layers of `inference` call them. What is packed is one tensor of the inputs' dtype that only the kernels
can read, in the layout of the instruction set in force when it was packed; another refuses it. There are no
derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import transforms
from ._checks import same_device
from .backends import PACKED_ON_CPU, BackendError, autocast_dtype, choose
from .functional import RECORDER
from .kernels import LOADED, compute_dtype
from .ops import below_autograd, in_graph, layer_flops, register_flops, wants_grad
from .reference import CELLS, rounded

_LAYER: Any = torch.ops.fastrnn.layer_packed.default if LOADED else None

_NO_GRADIENT = (
    "a frozen or quantized layer is for inference and has no derivatives: call it under torch.no_grad(), or "
    "train the layer it was made from and make it again"
)
_NO_TRANSFORM = (
    "a frozen or quantized layer knows no transforms of torch.func: call the layer that it was made from; "
    "vmap's dimension can be a part of the batch"
)


def pack(cell: str, params: Sequence[Tensor], scales: Sequence[Tensor], directions: int) -> Tensor:
    """One layer's weights, as `call` wants them.

    params  of each direction, as for `functional.layer`; the weights of int8 where there are scales
    scales  float32 [rows] of each int8 weight, or none
    """
    packed: Tensor = torch.ops.fastrnn.pack(cell, list(params), list(scales), directions)
    return packed


def call(
    cell: str,
    x: Tensor,
    states: list[Tensor],
    weights: Tensor,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    return_states: bool = False,
) -> Any:
    """The kernel, past the registered rule, which is Python."""
    with torch._C._AutoDispatchBelowAutograd():
        return _LAYER(cell, x, states, weights, lengths, batch_sizes, reset, return_states)


def _refuse_derivatives(*tensors: Tensor) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(_NO_TRANSFORM)
    if wants_grad(*tensors) or transforms.differentiates(*tensors):
        raise RuntimeError(_NO_GRADIENT)


def layer(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Tensor,
    *,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    return_states: bool,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`functional.layer` with packed weights.

    Under autocast the arithmetic stays that of the weights; the results are of the autocast type. Raises
    RuntimeError where a derivative is wanted, BackendError where another backend was asked for.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, states = x.to(weights.dtype), [s.to(weights.dtype) for s in states]
    if RECORDER.take is not None or choose(x) != "cpu":
        raise BackendError(f"{PACKED_ON_CPU}, and is not exported to ONNX")
    _refuse_derivatives(x, *states)
    args = (cell, x, list(states), weights, lengths, batch_sizes, reset, return_states)
    y, last, seq = torch.ops.fastrnn.layer_packed(*args) if in_graph() else call(*args)
    result = y, tuple(last), tuple(s.to(x.dtype) for s in seq)
    return result if dtype is None else rounded(result, dtype)


def _fake(
    cell: str,
    x: Tensor,
    states: list[Tensor],
    weights: Tensor,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    return_states: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    same_device(x, states, [weights], (lengths, reset))
    D, _, P = states[0].shape
    y = x.new_empty((*x.shape[:-1], D * P))
    seq = [x.new_empty((D, *x.shape[:-1], s.shape[-1]), dtype=compute_dtype(x)) for s in states[1:]]
    return y, [s.new_empty(s.shape) for s in states], seq if return_states else []


def _autograd(
    keyset: Any, cell: str, x: Tensor, states: list[Tensor], weights: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    _refuse_derivatives(x, *states, weights)
    args = (cell, x, states, weights, *rest)
    result: tuple[Tensor, list[Tensor], list[Tensor]] = below_autograd(
        keyset, torch.ops.fastrnn.layer_packed.default, *args
    )
    return result


def _flops(cell: Any, x: Any, states: Any, weights: Any, *rest: Any, **options: Any) -> int:
    """As of `fastrnn::layer`, int8 products too; the sizes are those of input and states."""
    (*rows, I), (D, _, P), H = x, states[0], states[-1][-1]
    products = CELLS[cell].gates * H * (I + P) + (P * H if P != H else 0)
    return int(2 * torch.Size(rows).numel() * D * products)


def _stack_flops(cell: Any, x: Any, states: Any, params: Any, *rest: Any, **options: Any) -> int:
    """Of `fastrnn::stack`, whose layers have their params, or one packed tensor each."""
    if len(params) != states[0][0]:
        return layer_flops(cell, x, states, params)
    one = [(1, *s[1:]) for s in states]
    inputs = [x, *[(*x[:-1], states[0][-1])] * (len(params) - 1)]
    return sum(_flops(cell, x, one, weights) for x, weights in zip(inputs, params, strict=True))


if LOADED:
    register_flops("layer_packed", _flops)
    register_flops("stack", _stack_flops)
    torch.library.register_fake("fastrnn::layer_packed", _fake)
    _LIBRARY = torch.library.Library("fastrnn", "IMPL")
    _LIBRARY.impl("layer_packed", _autograd, "Autograd", with_keyset=True)

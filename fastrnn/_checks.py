"""Argument checks of the layers and the cells.

Where torch.nn raises, so do these, with torch.nn's exception type and text, so that a program's
`except` clauses and a reader's memory go on working. They also stop what torch.nn computes garbage
from: a replaced weight of the wrong shape and a PackedSequence of the wrong width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_SCALAR_NAMES = {
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.int64: "Long",
    torch.int32: "Int",
}


def no_projection(owner: str, options: dict[str, Any]) -> None:
    """GRU and RNN: ValueError for `proj_size=`, TypeError for any other unknown keyword."""
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for name in options:
        raise TypeError(f"{owner}.__init__() got an unexpected keyword argument '{name}'")


def bool_option(name: str, value: object) -> None:
    """TypeError unless value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def layer_ranks(owner: str, x: Tensor, hx: Sequence[Tensor] | None) -> None:
    """x is [T, B, I] with every hx [L*D, B, .], or [T, I] with [L*D, .]."""
    if x.dim() not in (2, 3):
        noun = " tensor" if owner == "RNN" else ""
        raise ValueError(f"{owner}: Expected input to be 2D or 3D, got {x.dim()}D{noun} instead")
    if hx is None:
        return
    expected = x.dim()
    if all(h.dim() == expected for h in hx):
        return
    kind = "batched" if expected == 3 else "unbatched"
    found = ", ".join(f"{h.dim()}-D" for h in hx)
    if len(hx) > 1:
        raise RuntimeError(
            f"For {kind} {expected}-D input, hx and cx should also be {expected}-D but got ({found}) tensors"
        )
    raise RuntimeError(
        f"For {kind} {expected}-D input, hx should also be {expected}-D but got {found} tensor"
    )


def two_states(hx: Any, owner: str = "lstm") -> None:
    """The hx of an LSTM is a tuple or list of two tensors."""
    if isinstance(hx, Tensor):
        raise TypeError(f"{owner}(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
    if len(hx) != 2:
        raise RuntimeError(f"{owner} expects two hidden states")


def layer_input(x: Tensor, weight: Tensor, input_size: int, packed: bool) -> None:
    """x [T, B, I], packed [N, I], is of the weight's dtype and of width input_size."""
    if x.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    input_shape(x, input_size, packed)


def input_shape(x: Tensor, input_size: int, packed: bool) -> None:
    """As layer_input, of any dtype."""
    expected = 2 if packed else 3
    if x.dim() != expected:
        raise RuntimeError(f"input must have {expected} dimensions, got {x.dim()}")
    if x.size(-1) != input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {input_size}, got {x.size(-1)}"
        )


def layer_hidden(hx: Sequence[Tensor], sizes: Sequence[tuple[int, int, int]]) -> None:
    """Each state has its size (L*D, B, P) or (L*D, B, H)."""
    for k, (h, size) in enumerate(zip(hx, sizes, strict=True)):
        if h.shape != size:
            which = f"[{k}]" if len(hx) > 1 else ""
            raise RuntimeError(f"Expected hidden{which} size {size}, got {list(h.size())}")


def same_device(
    x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], masks: Sequence[Tensor | None] = ()
) -> None:
    """Input, states and parameters lie on one device; masks there or on the CPU."""
    device = x.device
    far = [mask for mask in masks if mask is not None and mask.device.type != "cpu"]
    for kind, tensors in (("hidden", hx), ("parameter", params), ("mask", far)):
        for tensor in tensors:
            if tensor.device != device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at {device} "
                    f"and {kind} tensor at {tensor.device}"
                )


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """As a message has them: "float32, bfloat16"."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def same_dtype(name: str, tensor: Tensor, weight: Tensor) -> None:
    """The tensor is of the weight's dtype; autocast casts, so under it anything goes."""
    if tensor.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        left, right = (_SCALAR_NAMES.get(t.dtype, str(t.dtype)) for t in (tensor, weight))
        raise RuntimeError(
            f"mat1 and mat2 must have the same dtype, but got {left} and {right} "
            f"({name} is {tensor.dtype}, the weights are {weight.dtype})"
        )


def some_steps(T: int) -> None:
    """T > 0."""
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def packed_sizes(batch_sizes: Tensor, B: int, N: int) -> list[int]:
    """A PackedSequence's batch sizes, whose values say where a row stands; ValueError where they cannot."""
    sizes: list[int] = batch_sizes.tolist()
    fall = all(0 < size <= most for size, most in zip(sizes, [B, *sizes], strict=False))
    if not fall or sum(sizes) != N:
        raise ValueError(
            f"batch_sizes must be positive, not above the batch of {B}, not increasing, and sum up "
            f"to the input's {N} rows, got {sizes if len(sizes) <= 8 else [*sizes[:8], '...']}"
        )
    return sizes


def weight_shapes(
    names: Sequence[str], params: Sequence[Tensor], gates: int, width: int, hidden: int, proj: int
) -> None:
    """One layer's parameters: w_ih [G*H, width], w_hh [G*H, P], the biases [G*H], w_hr [P, H]."""
    rows, out = gates * hidden, proj or hidden
    for name, param in zip(names, params, strict=True):
        expected: tuple[int, ...]
        if name.startswith("weight_ih"):
            expected, symbols = (rows, width), f"[{gates}*H, I]"
        elif name.startswith("weight_hh"):
            expected, symbols = (rows, out), f"[{gates}*H, {'P' if proj else 'H'}]"
        elif name.startswith("weight_hr"):
            expected, symbols = (proj, hidden), "[P, H]"
        else:
            expected, symbols = (rows,), f"[{gates}*H]"
        if param.shape != expected:
            raise RuntimeError(f"{name} must be {symbols} = {list(expected)}, got {list(param.shape)}")


def is_module(model: Any) -> torch.nn.Module:
    """The model; TypeError where it is no module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def padded_only(lengths: Tensor | None, reset: Tensor | None) -> None:
    """A PackedSequence has its lengths already, and its rows are no [T, B] for `reset`."""
    if lengths is not None:
        raise ValueError("lengths cannot be combined with a PackedSequence, which has its own")
    if reset is not None:
        raise ValueError("reset cannot be combined with a PackedSequence: pass a padded input with lengths")


def values_readable(tensor: Tensor) -> bool:
    """Whether reading values costs no device sync and breaks no trace, fake tensor or transform."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


def sequence_lengths(
    lengths: Tensor, T: int, B: int, device: torch.device, batched: bool, symbol: str = "T"
) -> Tensor:
    """Checks `lengths` ([B], integers in [0, T]) and returns it as int64 on the input's device.

    The range is checked where that is free: for a CPU tensor outside of any trace. Elsewhere the
    backends clamp.
    """
    if not batched:
        raise ValueError("lengths needs a batched input, got an unbatched one")
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a LongTensor of shape [B], got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be a LongTensor, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"lengths must be [B] = [{B}], got {list(lengths.shape)}")
    if B > 0 and values_readable(lengths):
        low, high = (int(v) for v in lengths.aminmax())
        if low < 0 or high > T:
            raise ValueError(f"lengths must lie in [0, {symbol}] = [0, {T}], got {low if low < 0 else high}")
    return moved("lengths", lengths, device).to(torch.int64)


def moved(name: str, mask: Tensor, device: torch.device) -> Tensor:
    """A mask of a call on the input's device."""
    if mask.device.type == "meta" and device.type != "meta":
        raise ValueError(f"{name} must be on the input's device, {device}, or on the CPU, got one on meta")
    return mask.to(device)


def reset_mask(
    reset: Tensor, T: int, B: int, device: torch.device, batched: bool, batch_first: bool
) -> Tensor:
    """Checks `reset` (bool, as the input lies) and returns it as [T, B] on the input's device."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a BoolTensor, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise ValueError(f"reset must be a BoolTensor, got {reset.dtype}")
    expected, symbols = (
        ((T,), "[T]") if not batched else ((B, T), "[B, T]") if batch_first else ((T, B), "[T, B]")
    )
    if reset.shape != expected:
        raise ValueError(f"reset must be {symbols} = {list(expected)}, got {list(reset.shape)}")
    if not batched:
        reset = reset.unsqueeze(1)
    elif batch_first:
        reset = reset.transpose(0, 1)
    return moved("reset", reset, device)


def cell_ranks(owner: str, x: Tensor, hx: Any, named: Sequence[str]) -> None:
    """x is [B, I] or [I]; each entry of hx (named for the message) is 1-D or 2-D."""
    if x.dim() not in (1, 2):
        raise ValueError(f"{owner}: Expected input to be 1D or 2D, got {x.dim()}D instead")
    if hx is not None:
        for name, h in zip(named, hx, strict=False):
            if h.dim() not in (1, 2):
                raise ValueError(f"{owner}: Expected {name} to be 1D or 2D, got {h.dim()}D instead")


def cell_sizes(x: Tensor, hx: Sequence[Tensor], input_size: int, hidden_size: int) -> None:
    """x [B, I] and every state [B, H] agree with each other and with the cell."""
    if x.size(1) != input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {input_size}")
    for k, h in enumerate(hx):
        if h.size(0) != x.size(0):
            raise RuntimeError(f"Input batch size {x.size(0)} doesn't match hidden{k} batch size {h.size(0)}")
        if h.dim() != 2 or h.size(1) != hidden_size:
            found = h.size(1) if h.dim() > 1 and h.size(1) != hidden_size else list(h.shape)
            raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {found}, expected {hidden_size}")


def is_tensor(name: str, value: object) -> None:
    """TypeError unless value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def finite(name: str, value: object) -> None:
    """TypeError unless value is a number (a tensor would lose its gradient), ValueError unless finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """ValueError unless value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def integer(name: str, value: object, least: int) -> None:
    """TypeError unless value is an int, ValueError for one below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")


def positive(**sizes: int) -> None:
    """`integer` of 1 or more for each."""
    for name, size in sizes.items():
        integer(name, size, 1)


def shape(name: str, tensor: Tensor, symbols: str, expected: tuple[int, ...]) -> None:
    """The tensor has the expected shape, named by its symbols in the message."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must be {symbols} = {list(expected)}, got {list(tensor.shape)}")


def float_like(name: str, tensor: Tensor, weight: Tensor, owner: str) -> None:
    """The tensor is floating point and, outside autocast, of the weight's (or query's) dtype; same device."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}")
    if tensor.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(f"{name} must be {weight.dtype} like {owner}, got {tensor.dtype}")
    if tensor.device != weight.device:
        raise RuntimeError(f"{name} must be on {weight.device} like {owner}, got {tensor.device}")


def attention_sizes(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor | None, mask: Tensor | None
) -> None:
    """query [Tq, B, K], keys [S, B, K], values [S, B, V], v [K], mask bool [B, S] or [B, Tq, S]."""
    for name, tensor in (("query", query), ("keys", keys), ("values", values)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions, got {tensor.dim()}")
    (Tq, B, K), (S, _, _) = query.shape, keys.shape
    shape("keys", keys, "[S, B, K]", (S, B, K))
    shape("values", values, "[S, B, V]", (S, B, values.shape[2]))
    if v is not None:
        shape("v", v, "[K]", (K,))
    attention_mask(None, mask, (B, Tq, S), query.device if mask is None else mask.device, True)


def attention_mask(
    lengths: Tensor | None,
    mask: Tensor | None,
    sizes: tuple[int, int, int],
    device: torch.device,
    batched: bool,
) -> Tensor | None:
    """lengths [B] and mask [B, S] or [B, Tq, S] (unbatched [S], [Tq, S]) as one mask, by "and"; None: all may
    be attended to. sizes: B, Tq, S."""
    B, Tq, S = sizes
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a BoolTensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be a BoolTensor, True where memory may be attended to, got {mask.dtype}"
            )
        wanted = ((B, S), (B, Tq, S)) if batched else ((S,), (Tq, S))
        # Not "shape in wanted": of sizes that torch.compile holds as symbols, dynamo finds none in a tuple.
        if not any(mask.shape == shape for shape in wanted):
            symbols = "[B, S] or [B, Tq, S]" if batched else "[S] or [Tq, S]"
            raise ValueError(
                f"mask must be {symbols} = {list(wanted[0])} or {list(wanted[1])}, got {list(mask.shape)}"
            )
        mask = moved("mask", mask if batched else mask.unsqueeze(0), device)
    if lengths is None:
        return mask
    lengths = sequence_lengths(lengths, S, B, device, batched, "S")
    within = torch.arange(S, device=device) < lengths[:, None]  # [B, S]
    if mask is None:
        return within
    return mask & (within if mask.dim() == 2 else within[:, None])

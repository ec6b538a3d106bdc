"""Which backend runs a call, and why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _checks, cuda, kernels
from ._checks import dtype_names
from .gpu import TRAITS, capability
from .reference import CELLS, under_autocast
from .tree_reference import TREE_CELLS

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is what torch calls AMD's too
TRITON_CAPABILITY = 80  # below, Triton has no tensor cores and ptxas no bfloat16
# What torch's autocast casts; float64 it leaves alone.
AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


PACKED_ON_CPU = "a frozen or quantized layer runs on the cpu backend alone"


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot serve the call."""


class _Choice(threading.local):
    def __init__(self) -> None:
        self.blocks: list[str] = []
        # Made in this thread, and not known yet to be a plain call or the head of a block.
        self.fresh: dict[int, str] = {}


_choice = _Choice()
_process_default: list[str | None] = [None]


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# What FASTRNN_BACKEND says, once read: os.environ takes a step's twentieth.
_environment: list[str] = []


def current_backend() -> str:
    """The backend in force: the innermost `with fastrnn.backend(...)`, else the last plain call of
    `fastrnn.backend(...)`, else the environment's FASTRNN_BACKEND at the first call, else "auto"."""
    if _choice.fresh:  # nothing runs between a block's head and its entry: these were plain calls
        _process_default[0] = list(_choice.fresh.values())[-1]
        _choice.fresh.clear()
    if _choice.blocks:
        return _choice.blocks[-1]
    if _process_default[0] is not None:
        return _process_default[0]
    if not _environment:
        _environment.append(_checked(os.environ.get("FASTRNN_BACKEND", "auto")))
    return _environment[0]


class backend:
    """Chooses the backend: `fastrnn.backend("cpu")` for the process, `with fastrnn.backend("cpu"):` for a
    block, in this thread.

    name: "auto" (the fastest that can serve the call), "cuda", "triton", "cpu" or "reference".
    An explicit backend that cannot serve a call raises `BackendError` naming the reason; only
    "auto" falls back. Raises ValueError for an unknown name.
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name)
        # A block must reach no other thread, not even for a moment: the process learns of a plain call when
        # its object is dropped, or at this thread's next call.
        _choice.fresh[id(self)] = name

    def __del__(self) -> None:
        name = _choice.fresh.pop(id(self), None) if _choice is not None else None
        if name is not None:
            _process_default[0] = name

    def __enter__(self) -> backend:
        _choice.fresh.pop(id(self), None)
        _choice.blocks.append(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _choice.blocks.pop()


@dataclass(frozen=True)
class Decision:
    """`backend` is None where the backend asked for cannot serve the call."""

    backend: str | None
    reason: str


def _why_not_cpu(x: Tensor) -> str | None:
    if not kernels.LOADED:
        return f"the compiled library is not loaded ({kernels.LOAD_ERROR})"
    if x.device.type not in ("cpu", "meta"):
        return f"it takes CPU tensors, the input is on {x.device}"
    if x.dtype not in CPU_DTYPES:
        return f"it takes {dtype_names(CPU_DTYPES)}, the input is {dtype_names([x.dtype])}"
    return None


def _triton_missing() -> str | None:
    if not kernels.LOADED:
        return f"the compiled library is not loaded ({kernels.LOAD_ERROR})"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


# Why Triton's kernels cannot be had at all.
TRITON_MISSING = _triton_missing()


@functools.cache
def _too_old_for_triton(index: int | None) -> str | None:
    found = capability(torch.device("cuda", torch.cuda.current_device() if index is None else index))
    if found is not None and found < TRITON_CAPABILITY:
        return f"it takes NVIDIA GPUs of compute capability 8.0 or newer, this one has {found / 10}"
    return None


def _why_not_triton(x: Tensor) -> str | None:
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    kind = x.device.type
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "it takes GPU tensors, the input is on cpu (TRITON_INTERPRET=1, set at the start, interprets it)"
        )
    if kind not in (*TRITON_DEVICES, "cpu", "meta"):
        return f"it takes GPU tensors, the input is on {x.device}"
    if x.dtype not in TRITON_DTYPES:
        return f"it takes {dtype_names(TRITON_DTYPES)}, the input is {dtype_names([x.dtype])}"
    # Not of a traced one: the device may not be there.
    if type(x) in (Tensor, torch.nn.Parameter) and kind == "cuda":
        return _too_old_for_triton(x.device.index)
    return None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast, where it is on, wants x in."""
    if not torch._C._is_any_autocast_enabled():
        return None
    if not under_autocast(x.device) or x.dtype not in AUTOCAST_DTYPES:
        return None
    return torch.get_autocast_dtype(x.device.type)


def decide(x: Tensor) -> Decision:
    """Chooses the backend for a call whose input is x."""
    asked = current_backend()
    if asked == "reference":
        return Decision("reference", "asked for")
    if asked == "cuda" or (asked == "auto" and x.device.type == "cuda"):
        why_not = cuda.why_not(x)
        if why_not is None:
            return Decision("cuda", "asked for" if asked == "cuda" else "the fastest backend for this input")
        if asked == "cuda":
            return Decision(None, why_not)
    if asked == "triton" or (asked == "auto" and x.device.type in TRITON_DEVICES):
        why_not = _why_not_triton(x)
        if why_not is None:
            return Decision(
                "triton", "asked for" if asked == "triton" else "the fastest backend for this input"
            )
        if asked == "triton":
            return Decision(None, why_not)
        return Decision("reference", f"the triton backend cannot serve it: {why_not}")
    why_not = _why_not_cpu(x)
    if why_not is None:
        return Decision("cpu", "asked for" if asked == "cpu" else "the fastest backend for this input")
    if asked == "cpu":
        return Decision(None, why_not)
    return Decision("reference", f"the cpu backend cannot serve it: {why_not}")


def takes_cpu() -> bool:
    """Whether the backend of a CPU tensor of a type that the kernels know is "cpu"."""
    return kernels.LOADED and current_backend() in ("auto", "cpu")


def choose(x: Tensor, decide: Callable[[Tensor], Decision] = decide) -> str:
    """The backend's name; raises BackendError where the one asked for cannot serve the call."""
    # The usual case first, without the words: they would take 5 us of a step's 20.
    if x.is_cpu and x.dtype in CPU_DTYPES and takes_cpu():
        return "cpu"
    decision = decide(x)
    if decision.backend is None:
        raise BackendError(f'backend="{current_backend()}" cannot serve this call: {decision.reason}')
    return decision.backend


def decide_fused(x: Tensor, what: str) -> Decision:
    """`decide` for what has kernels for the CPU alone."""
    if current_backend() in ("cuda", "triton"):
        return Decision(None, f"it has no kernel for {what}")
    decision = decide(x)
    if decision.backend in ("cuda", "triton"):
        return Decision("reference", f"the {decision.backend} backend has no kernel for {what}")
    return decision


def decide_cell(x: Tensor, cell: str) -> Decision:
    """`decide` for a layer of this cell: one that a program has added need not have kernels for GPUs."""
    return decide(x) if cell in TRAITS else decide_fused(x, f"the cell {cell!r}")


def decide_attention(x: Tensor) -> Decision:
    """`decide` for attention, which has kernels for the CPU, and in Triton, those for GPU tensors alone."""
    asked = current_backend()
    if asked == "cuda":
        return Decision(None, "it has no kernel for attention")
    if asked == "triton" and x.device.type == "cpu":
        return Decision(None, "its kernels of attention take GPU tensors, the input is on cpu")
    if asked in ("auto", "triton") and x.device.type in TRITON_DEVICES and _why_not_triton(x) is None:
        return Decision("triton", "asked for" if asked == "triton" else "it keeps no matrix of scores")
    decision = decide(x)
    if decision.backend == "cuda":
        return Decision("reference", "the cuda backend has no kernel for attention")
    return decision


def choose_fused(x: Tensor, what: str) -> str:
    """ "cpu" or "reference": the backend of what has kernels for the CPU alone."""
    return choose(x, lambda x: decide_fused(x, what))


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: `backend` and `kernel` would run, split so over threads or programs, because of
    `reason`."""

    backend: str | None
    kernel: str | None
    reason: str
    split: str | None = None

    def __repr__(self) -> str:
        if self.backend is None:
            return f"cannot run: {self.reason}"
        split = f", {self.split}" if self.split else ""
        return f"backend {self.backend}, kernel {self.kernel}{split}: {self.reason}"


def _sizes(layer: torch.nn.Module, input: Tensor | PackedSequence) -> tuple[int, int]:
    """T and B of a call, whose input has the dimensions and the width that the layer takes."""
    size = cast(int, layer.input_size)
    if isinstance(input, PackedSequence):
        _checks.input_shape(input.data, size, True)
        return len(input.batch_sizes), int(input.batch_sizes[0])
    if isinstance(layer, torch.nn.RNNCellBase):
        _checks.cell_ranks(type(layer).__name__, input, None, ())
        x = input if input.dim() == 2 else input.unsqueeze(0)
        _checks.cell_sizes(x, (), size, 0)
        return 1, x.shape[0]
    _checks.layer_ranks(type(layer).__name__, input, None)
    x = input if input.dim() == 3 else input.unsqueeze(1)
    _checks.input_shape(x, size, False)
    T, B = x.shape[:2]
    return (B, T) if input.dim() == 3 and layer.batch_first else (T, B)


def _parts(threads: int, parts: Sequence[int], more: str = "") -> str:
    """A pass whose directions, rows and units fall into these parts."""
    names = ("directions", "rows of the batch", "units")
    shares = [f"{name} in {n} parts" for name, n in zip(names, parts, strict=True) if n > 1]
    return "1 thread" if threads == 1 else f"{threads} threads ({', '.join(shares)}{more})"


def _split(layer: torch.nn.Module, T: int, B: int, rows: int, x: Tensor, packed: str) -> str:
    """How the first layer's passes over so many rows fall into threads; docs/cpu.md says why. packed: of a
    frozen or quantized layer, which has no backward pass, its kernel's note."""
    H = layer.hidden_size
    D = 2 if getattr(layer, "bidirectional", False) else 1
    P = getattr(layer, "proj_size", 0) or H
    stacks = x.dtype in kernels.KERNEL_DTYPES and not torch._C._is_any_autocast_enabled()
    L = getattr(layer, "num_layers", 1) if stacks else 1  # as functional.stack has it
    found = torch.ops.fastrnn.plan(layer._cell, x, T, B, rows, H, P, D, "int8" in packed, L)
    forward, cache, joint, backward = found[:4], found[4], found[8], found[9:]
    groups, units, steps = found[5:8]
    each = f"; {cache >> 10} KB of second-level cache each"
    split = _parts(forward[0], forward[1:], each)
    if groups > 1:
        of_units = f", units in {units} parts" if units > 1 else ""
        wave = f"{groups * units} threads (layers in {groups} groups, {steps} steps apart{of_units}{each})"
        split = f"in inference {wave}, else {split}"
    split += "; x and h in one product" * joint
    return split if packed else f"{split}; training: backward scan by {_parts(backward[0], backward[1:])}"


def explained(
    decision: Decision, x: Tensor, name: str, how: str, multiplies_bf16: bool = False
) -> Explanation:
    """Of what plain torch, or a kernel that runs it in this way, computes for x.

    multiplies_bf16: whether the CPU's kernel takes bfloat16 to the instructions that multiply it, where the
    processor has them.
    """
    if decision.backend is None:
        return Explanation(None, None, decision.reason)
    if decision.backend == "reference":
        return Explanation("reference", f"{name} by plain torch operations", decision.reason)
    if decision.backend == "triton":
        kernel = f"{name} {how} in Triton, {dtype_names([x.dtype])} products"
        return Explanation("triton", kernel, decision.reason)
    instructions = kernels.instruction_set()
    arithmetic = "float64 arithmetic" if x.dtype == torch.float64 else "float32 arithmetic"
    if multiplies_bf16 and x.dtype == torch.bfloat16 and instructions in kernels.BFLOAT16_SETS:
        arithmetic = "products of bfloat16, float32 sums"
    kernel = f"{name} {how} in C++, {instructions}, {arithmetic}"
    return Explanation("cpu", kernel, decision.reason)


def in_autocast(x: Tensor) -> Tensor:
    """x, or where autocast would cast it something of the type that it would have."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.new_empty(0, dtype=dtype)


def explain(layer: torch.nn.Module, input: Tensor | PackedSequence | None) -> Explanation:
    """Which kernel would run for layer(input), and why; nothing is run.

    layer: a layer, cell or attention of fastrnn's; input: what would be passed to it first, a tensor, a
    PackedSequence, or None to a recursive layer. Raises TypeError where the layer is not one of fastrnn's,
    ValueError or RuntimeError where a layer or cell would refuse the input's dimensions or width.
    """
    cell, own = getattr(layer, "_cell", None), getattr(layer, "_explain", None)
    if own is None and cell not in CELLS:
        raise TypeError(f"explain takes a fastrnn layer or cell, got {type(layer).__name__}")
    if input is None and cell not in TREE_CELLS:
        raise TypeError(f"a {type(layer).__name__} needs an input")
    if own is not None:
        found: Explanation = own(input)
        return found
    assert input is not None
    assert cell is not None
    T, B = _sizes(layer, input)
    given = input.data if isinstance(input, PackedSequence) else input
    x, packed = in_autocast(given), getattr(layer, "kernel_note", "")
    if packed and x is not given:  # packed weights keep their type under autocast
        weights: Any = layer.packed_l0
        x = given.new_empty(0, dtype=weights.dtype)
    decision = decide_cell(x, cell)
    if decision.backend is not None and packed and decision.backend != "cpu":
        return Explanation(None, None, f"{PACKED_ON_CPU} ({decision.reason})")
    if decision.backend in ("cuda", "triton"):
        describe: Callable[..., tuple[str, str]] = cuda.describe
        if decision.backend == "triton":
            describe = importlib.import_module("fastrnn.triton_kernels").describe

        D = 2 if getattr(layer, "bidirectional", False) else 1
        kernel, split = describe(cell, layer.hidden_size, getattr(layer, "proj_size", 0), B, D, x)
        return Explanation(decision.backend, kernel, decision.reason, split)
    said = explained(decision, x, cell, "scan", multiplies_bf16=True)
    if said.backend != "cpu":
        return said
    rows = len(given) if isinstance(input, PackedSequence) else T * B
    split = _split(layer, T, B, rows, x, packed)
    return replace(said, kernel=f"{said.kernel}{packed}", split=split)

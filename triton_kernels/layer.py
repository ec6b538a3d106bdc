"""A layer's recurrence by Triton's kernels: the engine that fastrnn.gpu calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrnn._checks import dtype_names
from fastrnn.gpu import TRAITS, Backward, Call, Forward, allows_tf32, capability

from . import heuristics, scan, step
from .heuristics import Shape

# TRITON_INTERPRET=1 at import: kernels run on the CPU, in numpy.
INTERPRETED = not isinstance(scan.scan_forward, triton.runtime.JITFunction)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def shape_of(cell: str, x: Tensor, H: int, P: int, B: int, D: int, heads: int, projected: bool) -> Shape:
    """What the configuration of a layer of D directions depends on, on the device of x."""
    found = capability(x.device)
    # Programs that meet must all be there: CUDA starts them together or not at all (cooperative launch).
    together = 0 if found is None else torch.cuda.get_device_properties(x.device).multi_processor_count
    sizes = (H // heads, P // heads, D * heads, B)
    return Shape(cell, *sizes, x.element_size(), projected, found, together, precision(x))


def precision(x: Tensor) -> str:
    """Of float32 products: TF32 where torch lets cuDNN do so, else as good as float32's own."""
    if x.dtype != torch.float32 or x.device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if allows_tf32(x.device) else "tf32x3"


class Triton:
    """See fastrnn.gpu.Engine."""

    name, finds_before = "triton", False

    def check(self, call: Call) -> None:
        if call.x.dtype not in DTYPES or (call.x.device.type == "cpu" and not INTERPRETED):
            raise RuntimeError(
                f"the Triton kernels take {dtype_names(DTYPES)} on a GPU (with TRITON_INTERPRET=1 on a CPU), "
                f"got {call.x.dtype} on {call.x.device}"
            )
        weights = [w for p in call.params for w in (p.w_hh, p.w_hr) if w is not None]
        if max(w.numel() for w in weights) >= 1 << 31:
            found = ", ".join(str(list(w.shape)) for w in weights)
            raise RuntimeError(
                f"the Triton kernels take fewer than 2**31 numbers of w_hh and w_hr, got {found}"
            )

    def forward(self, call: Call, tensors: Forward) -> Callable[[int, int, tuple[int, int]], None]:
        config, x, gates = configure(call), call.x, tensors.gates
        in_stages = stages(call.cell, config, call.projected)
        mid = tensors.mid
        if mid is None:
            mid = x.new_empty(call.D, tensors.rows, call.H) if len(in_stages) == 2 else gates
        states = [s.to(torch.float32, copy=True).contiguous() for s in call.states]
        seq = gates if tensors.seq is None else tensors.seq
        names = ("w_hh", "b_ih", "b_hh", "w_hr")
        pointers = (states[0], states[-1], *(p for name in names for p in of(call, name, gates)))
        masks = tuple(gates if m is None else m for m in (tensors.offsets, tensors.flags))
        given = {
            **options_of(call, config),
            **forward_options(config),
            "BIAS": call.params[0].b_ih is not None,
            "SAVE": tensors.save,
            "SEQ": tensors.seq is not None,
        }
        exchange = states[0]
        if config.kernel != "scan":
            exchange = x.new_empty(2, call.D, call.B, call.P)
            exchange[0].copy_(call.states[0])
        HH = call.H // call.heads
        columns = (HH, call.P if call.projected else HH)[: len(in_stages)]

        def run(begin: int, end: int, bases: tuple[int, int]) -> None:
            sizes = (*bases, tensors.rows, call.T, call.B, call.N, call.H, call.P, call.D)
            if config.kernel == "scan":
                grid = (triton.cdiv(call.B, config.block_b), call.D * call.heads)
                scan.scan_forward[grid](
                    gates, tensors.y, seq, mid, *pointers, *masks, *sizes, begin, end, **given
                )
            else:
                all_pointers = (gates, tensors.y, seq, mid, exchange, *pointers, *masks)
                launch_steps(
                    call, config, step.step_forward, columns, all_pointers, gates, sizes, begin, end, **given
                )
            if end == call.T:
                for last, state in zip(tensors.last, states, strict=True):
                    last.copy_(state)

        return run

    def backward(self, call: Call, tensors: Backward) -> None:
        config, gates = configure(call), tensors.gates
        grads = [s.to(torch.float32, copy=True).contiguous() for s in tensors.dlast or call.states]
        if not tensors.dlast:
            for g in grads:
                g.zero_()
        pointers = tuple(
            gates if t is None else t
            for t in (
                tensors.dy,
                tensors.dseq,
                gates,
                tensors.seq,
                tensors.h_before,
                tensors.c_before,
                tensors.dg,
                tensors.dmid,
                grads[0],
                grads[-1],
                *of(call, "w_hh", gates),
                *of(call, "w_hr", gates),
                tensors.offsets,
                tensors.flags,
            )
        )
        sizes = (call.T, call.B, call.N, call.H, call.P, call.D)
        given = {
            **options_of(call, config),
            **backward_options(call.cell),
            "DY": tensors.dy is not None,
            "DSEQ": tensors.dseq is not None,
        }
        if config.kernel == "scan":
            grid = (triton.cdiv(call.B, config.block_b), call.D * call.heads)
            scan.scan_backward[grid](*pointers, *sizes, **given)
        else:
            in_stages = stages(call.cell, config, call.projected)
            columns = (call.P // call.heads, call.H // call.heads)[: len(in_stages)]
            kernel = step.step_backward
            launch_steps(
                call, config, kernel, columns, pointers, gates, sizes, 0, call.T, FINAL=False, **given
            )
            kernel[step_grid(call, config, columns[0])](
                *pointers,
                gates,
                *sizes,
                call.T,
                call.T + 1,
                FIRST=0,
                LAST=0,
                GRID=False,
                FINAL=True,
                **given,
            )
        for first, grad in zip(tensors.dfirst, grads, strict=True):
            first.copy_(grad)


def configure(call: Call) -> heuristics.Config:
    shape = shape_of(call.cell, call.x, call.H, call.P, call.B, call.D, call.heads, call.projected)
    return heuristics.configure(shape)


def of(call: Call, name: str, nothing: Tensor) -> tuple[Tensor, Tensor]:
    """A parameter of both directions; where there is none `nothing`, a pointer that no kernel reads. That is
    of memory just allocated: for one that is no multiple of 16 a kernel would be compiled anew."""
    found = [getattr(p, name) for p in call.params]
    first = nothing if found[0] is None else found[0]
    return first, first if found[-1] is None else found[-1]


def options_of(call: Call, config: heuristics.Config) -> dict[str, Any]:
    """The kernels' compile-time arguments that forward and backward share."""
    return options(
        call.cell,
        config,
        call.x.dtype,
        precision(call.x),
        heads=call.heads,
        projected=call.projected,
        packed=call.packed,
        masked=call.masked,
    )


def step_grid(call: Call, config: heuristics.Config, columns: int) -> tuple[int, int, int]:
    """Of a step's programs, for so many columns of a head."""
    return (
        triton.cdiv(call.B, config.block_b),
        triton.cdiv(columns, config.block_u),
        call.D * call.heads,
    )


def launch_steps(
    call: Call, config: heuristics.Config, kernel: Any, columns: Sequence[int], pointers: Sequence[Tensor],
    nothing: Tensor, sizes: Sequence[int], begin: int, end: int, **options: Any,
) -> None:  # fmt: skip
    """Steps begin to end of all groups, by one launch each stage, which has so many columns of a head; or
    by one in all, of programs that meet. nothing: see `of`."""
    in_stages = stages(call.cell, config, call.projected)
    if config.kernel == "grid":
        grid = step_grid(call, config, max(columns))
        arrived = torch.zeros(grid[2], grid[0], step.APART.value, dtype=torch.int32, device=call.x.device)
        options |= {"FIRST": in_stages[0], "LAST": in_stages[-1], "GRID": True}
        kernel[grid](*pointers, arrived, *sizes, begin, end, launch_cooperative_grid=True, **options)
        return
    for i in range(begin, end):
        for stage, width in zip(in_stages, columns, strict=True):
            kernel[step_grid(call, config, width)](
                *pointers, nothing, *sizes, i, i + 1, FIRST=stage, LAST=stage, GRID=False, **options
            )


def options(
    cell: str,
    config: heuristics.Config,
    dtype: torch.dtype,
    precision: str,
    *,
    heads: int = 1,
    projected: bool = False,
    packed: bool = False,
    masked: bool = False,
) -> dict[str, Any]:
    """The kernels' compile-time arguments that forward and backward share."""
    traits, scans = TRAITS[cell], config.kernel == "scan"
    return {
        "CELL": cell,
        "GATES": traits.gates,
        "SAVED": traits.saved,
        "HEADS": heads,
        "CELL_STATE": traits.cell_state,
        "PROJECTED": projected,
        "MID": traits.mid,
        "PACKED": packed,
        "MASKED": masked,
        "BLOCK_B": config.block_b,
        "BLOCK_H" if scans else "BLOCK_U": config.block_u,
        "BLOCK_P" if scans else "BLOCK_K": config.block_k,
        # Interpreted products of 16-bit floats are wrong (Triton 3.6 to 3.9); of the same numbers in float32
        # they are right.
        "OPERAND": tl.float32 if INTERPRETED else DTYPES[dtype],
        "PRECISION": precision,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def forward_options(config: heuristics.Config) -> dict[str, Any]:
    """Those that only the forward kernels have, of a configuration."""
    return {} if config.kernel == "scan" else {"EARLY": config.early}


def backward_options(cell: str) -> dict[str, Any]:
    """Those that only the backward kernels have, of a cell."""
    traits = TRAITS[cell]
    return {"GRADS": traits.grads, "HIDDEN": traits.hidden_grads, "STATE": traits.state}


def stages(cell: str, config: heuristics.Config, projected: bool) -> tuple[int, ...]:
    """The STAGEs of a step, a launch each."""
    return (1, 2) if config.kernel != "scan" and (TRAITS[cell].mid or projected) else (0,)

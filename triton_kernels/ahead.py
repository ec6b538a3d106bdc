"""Compiling the kernels for an architecture, whether or not such a GPU is there: what `fastrnn.explain` says
of shared memory, and what the tests hold against the architectures' limits."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrnn._checks import dtype_names
from fastrnn.gpu import alone

from . import attend, attention, heuristics, layer, scan, step

_FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Arguments that are float32 whatever the layer's type is; others that are not of the layer's type.
FLOAT32 = ("seq", "h_state", "c_state", "dseq", "c_before", "h_grad", "c_grad")
FLOAT32 += ("lse", "delta", "dscores", "dv")
_OTHERS = {
    "offsets": "*i64",
    "flags": "*u8",
    "arrived": "*i32",
    "mask": "*u8",
    "attended": "*u8",
    "scale": "fp32",
}
_KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        *(scan.scan_forward, scan.scan_backward, step.step_forward, step.step_backward),
        *(attend.attend_forward, attend.attend_weights, attend.attend_dscores),
        *(attend.attend_dquery, attend.attend_dkeys, attend.attend_dvalues),
    )
}
_LAUNCHES = {
    "scan": "a launch for many steps",
    "grid": "a launch of programs that meet, for many steps",
    "step": "a launch a step",
}
_SIZES = (*scan.FREE, "H", "P", "D", *attend.FREE, "K", "V", "mask_b", "mask_q")


def describe(cell: str, H: int, proj_size: int, B: int, D: int, x: Tensor) -> tuple[str, str]:
    """Of a layer's forward pass: its kernel, and its tiles with the shared memory of a program."""
    shape = layer.shape_of(cell, x, H, proj_size or H, B, D, 1, proj_size > 0)
    config = heuristics.configure(shape)
    launches = _LAUNCHES[config.kernel]
    if config.kernel == "step" and len(layer.stages(cell, config, proj_size > 0)) == 2:
        launches = "two launches a step"
    kernel = f"{cell} {config.kernel} in Triton, {launches}, {dtype_names([x.dtype])} products"
    if layer.INTERPRETED:
        return kernel, f"tiles of {config}, interpreted"
    if type(x) is not Tensor or x.device.type == "meta":  # no GPU to compile for
        return kernel, f"tiles of {config}"
    name, special = kernels(cell, config, projected=proj_size > 0)[0]
    shared = layer.options(cell, config, x.dtype, layer.precision(x), projected=proj_size > 0)
    aligned = heuristics.aligned(H, proj_size or H)
    compiled = compile(name, x.dtype, target_of(x), {**shared, **special}, aligned)
    return kernel, f"tiles of {config}, {compiled.metadata.shared / 1024:.0f} KB of shared memory"


def describe_attention(x: Tensor, additive: bool, values: int) -> str:
    """Of attention's forward pass over values so wide: its tiles with the shared memory of a program."""
    given = attention.options(x.dtype, attention.precision(x), additive, False)
    width = attention.columns(values)
    tiles = f"tiles of {given['BLOCK_Q']} queries x {given['BLOCK_S']} positions, {width} columns of values"
    if layer.INTERPRETED or type(x) is not Tensor or x.device.type == "meta":
        return tiles
    aligned = heuristics.aligned(values)
    compiled = compile("attend_forward", x.dtype, target_of(x), {**given, "BLOCK_V": width}, aligned)
    return f"{tiles}, {compiled.metadata.shared / 1024:.0f} KB of shared memory"


def target_of(x: Tensor) -> GPUTarget:
    """The architecture of the GPU that x is on."""
    with alone(x.device):
        return triton.runtime.driver.active.get_current_target()


def precision(dtype: torch.dtype, target: GPUTarget) -> str:
    """The most demanding one of the target's kernels."""
    return "tf32x3" if dtype == torch.float32 and target.backend == "cuda" else "ieee"


def kernels(
    cell: str, config: heuristics.Config, *, projected: bool = False, final: bool = False, **given: Any
) -> list[tuple[str, dict[str, Any]]]:
    """The kernels of a training step, by name, with the compile-time arguments that differ between them;
    final: with the launch that makes the gradients of the first states in all but a scan."""
    saves = {**layer.forward_options(config), "BIAS": True, "SAVE": True, "SEQ": cell == "lstm", **given}
    backs = {**layer.backward_options(cell), "DY": True, "DSEQ": False, **given}
    if config.kernel == "scan":
        return [("scan_forward", saves), ("scan_backward", backs)]
    stages, grid = layer.stages(cell, config, projected), config.kernel == "grid"
    launches = [(stages[0], stages[-1])] if grid else [(stage, stage) for stage in stages]
    found = []
    for first, last in launches:
        common = {"FIRST": first, "LAST": last, "GRID": grid}
        found.append(("step_forward", {**saves, **common}))
        found.append(("step_backward", {**backs, **common, "FINAL": False}))
    if final:
        last = {"FIRST": 0, "LAST": 0, "GRID": False, "FINAL": True}
        found.append(("step_backward", {**backs, **last}))
    return found


def attention_kernels(
    dtype: torch.dtype, target: GPUTarget, additive: bool, masked: bool, width: int
) -> list[tuple[str, dict[str, Any]]]:
    """Those of a training step with queries, keys and values so wide, and all compile-time arguments."""
    common = attention.options(dtype, precision(dtype, target), additive, masked)
    back = {**common, "DWEIGHTS": True}
    of_keys = {"BLOCK_C": heuristics.ADDITIVE_PIECE if additive else attention.columns(width)}
    of_values = {"BLOCK_V": attention.columns(width)}
    # The gradient of v comes with that of the queries, or alone.
    of_queries = [(True, False), (True, True), (False, True)] if additive else [(True, False)]
    return [
        ("attend_forward", {**common, **of_values}),
        ("attend_weights", common),
        *([("attend_dscores", back)] if additive else []),
        *(("attend_dquery", {**back, **of_keys, "DQUERY": dquery, "DV": dv}) for dquery, dv in of_queries),
        ("attend_dkeys", {**back, **of_keys}),
        ("attend_dvalues", {**common, **of_values}),
    ]


def compile(
    name: str,
    dtype: torch.dtype,
    target: GPUTarget,
    options: dict[str, Any],
    aligned: bool = True,
    beyond: Container[str] = (),
    float32: Container[str] = FLOAT32,
) -> Any:
    """Triton's CompiledKernel. options: all compile-time arguments; aligned: whether H and P are multiples of
    16; beyond: the sizes that are 2**31 and more; float32: the tensors of that type whatever the layer is."""
    kernel = _KERNELS[name]
    options = dict(options)
    compiler = {key: options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    signature, attributes, constants = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in _SIZES:
            signature[argument] = "i64" if argument in beyond else "i32"
        elif argument.isupper():
            signature[argument], constants[argument] = "constexpr", options[argument]
        else:
            of = "fp32" if argument in float32 else _FLOATS[dtype]
            signature[argument] = _OTHERS.get(argument, f"*{of}")
        if signature[argument].startswith("*") or (aligned and argument in ("H", "P", "K", "V")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=compiler)

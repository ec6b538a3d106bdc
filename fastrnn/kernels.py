"""The operators: loading them, checking what they are given, and calling their kernels.

One pair of operators serves every cell: `torch.ops.fastrnn.layer` and `layer_backward` (csrc/ops.cpp). Each
backend but the CPU's has a pair of its own with the same arguments, named after it: `triton_layer` ...
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import packed_sizes, same_device, some_steps, values_readable
from .reference import CELLS, split_params


def _load() -> str | None:
    path = Path(__file__).parent / "_C.abi3.so"
    if not path.exists():
        return f"{path.name} is not built: run `pip install .` in fastrnn's sources"
    try:
        torch.ops.load_library(os.fspath(path))
    except OSError as error:
        return str(error)
    return None


LOAD_ERROR = _load()
LOADED = LOAD_ERROR is None
# What the names of a backend's operators begin with.
PREFIXES = {"cpu": "", "cuda": "cuda_", "triton": "triton_"}


def operator(backend: str, name: str) -> Any:
    """`layer` or `layer_backward` of a backend."""
    return getattr(torch.ops.fastrnn, PREFIXES[backend] + name).default


def _define() -> None:
    """The other backends' operators, with the arguments and results of the compiled ones."""
    library = torch.library.Library("fastrnn", "FRAGMENT")
    for name in ("layer", "layer_backward"):
        schema = str(operator("cpu", name)._schema).removeprefix("fastrnn::")
        for prefix in PREFIXES.values():
            if prefix:
                library.define(prefix + schema)
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []  # their operators live as long as they do
if LOADED:
    _define()
_OPERATORS: dict[tuple[str, str], Any] = (
    {(backend, name): operator(backend, name) for backend in PREFIXES for name in ("layer", "layer_backward")}
    if LOADED
    else {}
)


# float16 is widened first.
KERNEL_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16))
# The instruction sets whose scans multiply bfloat16 as it is; on others it is widened to float32.
BFLOAT16_SETS = frozenset(("amx", "avx512bf16"))


def instruction_sets() -> list[str]:
    """The instruction sets that this build has kernels for and that this processor runs, best last."""
    return list(torch.ops.fastrnn.instruction_sets()) if LOADED else []


def instruction_set() -> str:
    """The instruction set in force: the best, or the one that FASTRNN_CPU_ISA named at the first question."""
    return str(torch.ops.fastrnn.instruction_set()) if LOADED else "none"


class Inputs(NamedTuple):
    """The arguments of a layer, as the operators take them; see `functional.layer`."""

    cell: str
    x: Tensor
    states: list[Tensor]
    params: list[Tensor]
    lengths: Tensor | None
    batch_sizes: Tensor | None
    reset: Tensor | None

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.lengths, self.batch_sizes, self.reset

    def wide(self) -> Inputs:
        """The same in float32. The kernels read no float16, and make their sums in float32 anyway."""
        return self._replace(
            x=self.x.float(), states=[s.float() for s in self.states], params=[p.float() for p in self.params]
        )


class Outputs(NamedTuple):
    y: Tensor
    last: list[Tensor]
    seq: list[Tensor]  # sequences of the states after h
    saved: list[Tensor]


def check(inputs: Inputs, heads: bool = False) -> None:
    """Says what was expected and what came: a ValueError, for dtypes a RuntimeError as in torch.

    heads: whether w_hh may be the blocks of a block-diagonal matrix, [G*H, H/n] for n heads.
    """
    cell, x, states, params, lengths, batch_sizes, reset = inputs
    spec = CELLS[cell]
    if x.dim() != (2 if batch_sizes is not None else 3):
        raise ValueError(
            f"{cell}: the input must be [T, B, I], or [N, I] with batch_sizes, got {list(x.shape)}"
        )
    some_steps(x.shape[0] if batch_sizes is None else batch_sizes.numel())
    if len(states) != spec.states or states[0].dim() != 3:
        found = ", ".join(str(list(s.shape)) for s in states)
        raise ValueError(f"{cell}: states must be {spec.states} of shape [D, B, .], got {found or 'none'}")
    directions, batch = states[0].shape[0], states[0].shape[1]
    if directions not in (1, 2) or len(params) % directions or not 2 <= len(params) // directions <= 5:
        raise ValueError(
            "params must be (w_ih, w_hh[, b_ih, b_hh][, w_hr]) for each of 1 or 2 directions, "
            f"got {len(params)} tensors for {directions} directions"
        )
    if batch_sizes is None and x.shape[1] != batch:
        raise ValueError(f"{cell}: the input is of {x.shape[1]} sequences, the states are of {batch}")
    for name, mask, shape, dtype in (
        ("lengths", lengths, (batch,), torch.int64),
        ("batch_sizes", batch_sizes, (batch_sizes.numel() if batch_sizes is not None else 0,), torch.int64),
        ("reset", reset, tuple(x.shape[:2]), torch.bool),
    ):
        if mask is not None and (tuple(mask.shape) != shape or mask.dtype != dtype):
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    if batch_sizes is not None and (lengths is not None or reset is not None):
        raise ValueError("batch_sizes cannot be combined with lengths or reset")
    same_device(x, states, params, (lengths, reset))
    if params[0].dim() != 2:
        raise ValueError(f"{cell}: w_ih must have 2 dimensions, got {list(params[0].shape)}")
    rows, H = params[0].shape[0], params[0].shape[0] // spec.gates
    for p in split_params(params, directions):
        if p.w_hr is not None and not spec.projectable:
            raise ValueError(f"{cell} takes no projection")
        if p.w_hr is not None and (p.w_hr.dim() != 2 or p.w_hr.shape[0] == 0):
            raise ValueError(f"{cell}: w_hr must be [P, {H}] with P of at least 1, got {list(p.w_hr.shape)}")
        P = K = H if p.w_hr is None else p.w_hr.shape[0]
        if heads and p.w_hr is None and p.w_hh.dim() == 2 and p.w_hh.shape[1] and H % p.w_hh.shape[1] == 0:
            K = params[1].shape[1]  # as many heads in both directions
        wanted = [
            ("w_ih", p.w_ih, (H * spec.gates, x.shape[-1])),
            ("w_hh", p.w_hh, (rows, K)),
            ("b_ih", p.b_ih, (rows,)),
            ("b_hh", p.b_hh, (rows,)),
            ("w_hr", p.w_hr, (P, H)),
        ]
        wanted += [(f"state {i}", s, (directions, batch, H if i else P)) for i, s in enumerate(states)]
        for name, tensor, shape in wanted:
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{cell}: {name} must be {list(shape)}, got {list(tensor.shape)}")
            if tensor is not None and tensor.dtype != x.dtype:
                under = " (autocast leaves float64 as it is)" if torch._C._is_any_autocast_enabled() else ""
                raise RuntimeError(
                    f"{cell}: {name} must be {x.dtype} like the input, got {tensor.dtype}{under}"
                )
    if batch_sizes is not None and values_readable(batch_sizes):
        packed_sizes(batch_sizes, batch, x.shape[0])


def present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Those that are there, of arguments or gradients."""
    return [t for t in tensors if t is not None]


class Plan(NamedTuple):
    """How the flat arguments of an autograd.Function fall into inputs, and whose kernels run them."""

    cell: str
    states: int
    params: int
    backend: str = "cpu"

    @property
    def outputs(self) -> int:
        """How many (y, *last, *seq) are."""
        return 2 * self.states

    def inputs(self, flat: Sequence[Tensor | None]) -> Inputs:
        # (lengths, batch_sizes, reset, x, *states, *params)
        lengths, batch_sizes, reset, x = flat[:4]
        states = present(flat[4 : 4 + self.states])
        params = present(flat[4 + self.states : 4 + self.states + self.params])
        assert x is not None
        return Inputs(self.cell, x, states, params, lengths, batch_sizes, reset)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of the kernels' arithmetic, and of the sequences of states after h."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# What the operators raise: for arguments that their checks refuse, before they begin, but also where there is
# no memory, say, which looks alike. So whoever looks for better words, by checks in Python, raises it where
# these find nothing, and runs nothing twice.
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError)


def call(inputs: Inputs, save: bool, return_states: bool, backend: str = "cpu") -> Outputs:
    """The kernel, past the registered autograd rule: that is Python, and takes 15 us to do nothing."""
    with torch._C._AutoDispatchBelowAutograd():
        return Outputs(*_OPERATORS[backend, "layer"](*inputs, save, return_states))


# (y, h_n, c_n or None) of (cell, x, h, c or None, *params): one direction, no masks, no gradient. Past the
# overload's own __call__, a tenth of what is left of Python.
stream: Any = torch.ops.fastrnn.stream.default._op if LOADED else None


def stack(*args: Any) -> tuple[Tensor, list[Tensor]]:
    """`torch.ops.fastrnn.stack`, past the search for an autograd rule."""
    with torch._C._AutoDispatchBelowAutograd():
        y, last = torch.ops.fastrnn.stack.default(*args)
    return y, last


def stream_weights(module: Any, names: Sequence[str], gates: int) -> list[Tensor]:
    """A module's parameters of these names, for `ops.streamed`.

    Raises LookupError where one is no Parameter of its own, as under a parametrization, or None, or is of
    other sizes than the module's, and the kernel could not tell: its forward then reads them with all its
    checks.
    """
    own = module._parameters
    params = list(map(own.__getitem__, names))
    for p in params:
        if p is None:
            raise LookupError
    if params[0].shape != (gates * module.hidden_size, module.input_size):
        raise LookupError
    if len(params) in (3, 5) and len(params[-1]) != module.proj_size:
        raise LookupError
    return params


def run_backward(
    inputs: Inputs,
    dy: Tensor | None,
    dlast: list[Tensor],
    dseq: list[Tensor],
    saved: Sequence[Tensor],
    need_x: bool,
    need_params: bool,
    backend: str = "cpu",
) -> tuple[Tensor | None, ...]:
    """The gradients of x, states and params, None where not asked for; saved: y, seq, then the gates."""
    cell, x, states, params, *masks = inputs
    y, seq, gates = saved[0], list(saved[1 : len(states)]), list(saved[len(states) :])
    with torch._C._AutoDispatchBelowAutograd():
        dx, dstates, dparams = _OPERATORS[backend, "layer_backward"](
            cell, dy, dlast, dseq, x, states, params, *masks, y, seq, gates, need_x, need_params
        )
    return (dx if need_x else None, *dstates, *(dparams if need_params else [None] * len(params)))

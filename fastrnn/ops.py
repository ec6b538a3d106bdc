"""The compiled operators: loading, fakes, checks and autograd.

One pair of operators serves every cell: `torch.ops.fastrnn.layer` and `layer_backward` (csrc/ops.cpp).
They are reached in two ways. Eager calls go through an `autograd.Function` with `forward(ctx, ...)`, the
cheapest there is; calls inside torch.compile or torch.export take the operator itself, whose autograd rule
is registered below. The backward pass is differentiable too: its derivative is that of the plain reference,
taken by `torch.func.vjp`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
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


def instruction_sets() -> list[str]:
    """The instruction sets that this build has kernels for and that this processor runs, best last."""
    return list(torch.ops.fastrnn.instruction_sets()) if LOADED else []


def instruction_set() -> str:
    """The instruction set in force: the best, or the one that FASTRNN_CPU_ISA names."""
    return str(torch.ops.fastrnn.instruction_set()) if LOADED else "none"


def transforms_active() -> bool:
    """True under torch.func transforms or forward-mode AD, which need plain torch operations."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


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


class Outputs(NamedTuple):
    y: Tensor
    last: list[Tensor]
    seq: list[Tensor]  # sequences of the states after h
    saved: list[Tensor]


def check(inputs: Inputs) -> None:
    """Says what was expected and what came: a ValueError, for dtypes a RuntimeError as in torch."""
    cell, x, states, params, lengths, batch_sizes, reset = inputs
    spec = CELLS[cell]
    if x.dim() != (2 if batch_sizes is not None else 3):
        raise ValueError(
            f"{cell}: the input must be [T, B, I], or [N, I] with batch_sizes, got {list(x.shape)}"
        )
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
    rows, H = params[0].shape[0], params[0].shape[0] // spec.gates
    for p in split_params(params, directions):
        P = H if p.w_hr is None else p.w_hr.shape[0]
        if p.w_hr is not None and not spec.projectable:
            raise ValueError(f"{cell} takes no projection")
        wanted = [
            ("w_ih", p.w_ih, (H * spec.gates, x.shape[-1])),
            ("w_hh", p.w_hh, (rows, P)),
            ("b_ih", p.b_ih, (rows,)),
            ("b_hh", p.b_hh, (rows,)),
            ("w_hr", p.w_hr, (P, H)),
        ]
        wanted += [(f"state {i}", s, (directions, batch, H if i else P)) for i, s in enumerate(states)]
        for name, tensor, shape in wanted:
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{cell}: {name} must be {list(shape)}, got {list(tensor.shape)}")
            if tensor is not None and tensor.dtype != x.dtype:
                raise RuntimeError(f"{cell}: {name} must be {x.dtype} like the input, got {tensor.dtype}")


# --- autograd


def _call(inputs: Inputs, save: bool, return_states: bool) -> Outputs:
    """The kernel, past the registered autograd rule: that is Python, and takes 15 us to do nothing."""
    with torch._C._AutoDispatchBelowAutograd():
        return Outputs(*torch.ops.fastrnn.layer.default(*inputs, save, return_states))


class _Plan(NamedTuple):
    """How the flat arguments of the Functions fall into inputs."""

    cell: str
    states: int
    params: int

    def inputs(self, flat: Sequence[Tensor | None]) -> Inputs:
        # (lengths, batch_sizes, reset, x, *states, *params)
        lengths, batch_sizes, reset, x = flat[:4]
        states = [s for s in flat[4 : 4 + self.states] if s is not None]
        params = [p for p in flat[4 + self.states : 4 + self.states + self.params] if p is not None]
        assert x is not None
        return Inputs(self.cell, x, states, params, lengths, batch_sizes, reset)


def _backward_reference(
    plan: _Plan, masks: tuple[Tensor | None, ...], count: int, *flat: Tensor
) -> tuple[Tensor, ...]:
    """The backward pass by plain torch; flat: `count` gradients (dy, dlast, dseq), x, states, params."""
    grads, primals = flat[:count], flat[count:]

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        y, last, seq = reference.layer(*plan.inputs((*masks, *values)))
        return (y, *last, *seq)

    vjp: Any = torch.func.vjp(forward, *primals)[1]
    return tuple(vjp(grads))


def _double_backward(
    plan: _Plan, masks: tuple[Tensor | None, ...], count: int, flat: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The derivative of _backward_reference by `flat`; grads: those of x, states and params."""

    def formula(*values: Tensor) -> tuple[Tensor, ...]:
        return _backward_reference(plan, masks, count, *values)

    vjp: Any = torch.func.vjp(formula, *flat)[1]
    return tuple(vjp(tuple(grads)))


def _is_batched(t: Tensor) -> bool:
    """True under the vmap of torch.autograd.grad(..., is_grads_batched=True)."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(t))


def _unpack(plan: _Plan, flat: Sequence[Tensor]) -> tuple[Inputs, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a forward pass kept: its inputs; tensors shaped like y, last, seq; then y, seq, gates ..."""
    S = plan.states
    inputs = plan.inputs(flat)
    kept = tuple(flat[4 + S + plan.params :])
    # The last states are shaped like the first.
    return inputs, (kept[0], *inputs.states, *kept[1:S]), kept


def _split_grads(
    states: int, grads: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """dy, dlast and dseq for layer_backward: a group that got no gradient at all stays empty."""

    def group(begin: int, end: int) -> list[Tensor]:
        if all(g is None for g in grads[begin:end]):
            return []
        return [
            torch.zeros_like(o) if g is None else g
            for g, o in zip(grads[begin:end], outputs[begin:end], strict=True)
        ]

    return grads[0], group(1, 1 + states), group(1 + states, 2 * states)


class _LayerBackward(torch.autograd.Function):
    """The backward pass as a function that can be differentiated; only under create_graph=True."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, saved: tuple[Tensor, ...], masks: Any, *flat: Tensor) -> Any:
        # flat: dy, dlast, dseq (dense), x, states, params. saved: y, seq, gates ...
        S = plan.states
        count = 2 * S
        ctx.plan, ctx.masks, ctx.count = plan, masks, count
        ctx.save_for_backward(*flat)
        inputs = plan.inputs((*masks, *flat[count:]))
        return _run_backward(
            inputs, flat[0], list(flat[1 : 1 + S]), list(flat[1 + S : count]), saved, S, True, True
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, None, None, *_double_backward(ctx.plan, ctx.masks, ctx.count, ctx.saved_tensors, grads))


def _run_backward(
    inputs: Inputs,
    dy: Tensor | None,
    dlast: list[Tensor],
    dseq: list[Tensor],
    saved: Sequence[Tensor],
    states: int,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor | None, ...]:
    y, seq, gates = saved[0], list(saved[1:states]), list(saved[states:])
    dx, dstates, dparams = torch.ops.fastrnn.layer_backward.default(
        inputs.cell,
        dy,
        dlast,
        dseq,
        inputs.x,
        inputs.states,
        inputs.params,
        *inputs.masks,
        y,
        seq,
        gates,
        need_x,
        need_params,
    )
    return (dx if need_x else None, *dstates, *(dparams if need_params else [None] * len(inputs.params)))


class _LayerFunction(torch.autograd.Function):
    """(y, *last, *seq) = apply(plan, lengths, batch_sizes, reset, x, *states, *params)."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *flat: Tensor | None) -> Any:
        out = _call(plan.inputs(flat), True, False)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        # Not the last states: the backward pass does not read them, and callers edit them in place.
        ctx.save_for_backward(*flat, out.y, *out.seq, *out.saved)
        return (out.y, *out.last, *out.seq)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan: _Plan = ctx.plan
        S, flat = plan.states, ctx.saved_tensors
        if all(g is None for g in grads):
            return (None,) * (5 + S + plan.params)
        inputs, outputs, saved = _unpack(plan, flat)
        primals = flat[3 : 4 + S + plan.params]
        batched = transforms_active() or any(g is not None and _is_batched(g) for g in grads)
        if torch.is_grad_enabled() or batched:
            dense = [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True)]
            if batched:  # gradients under vmap, which the kernel does not take
                given: Any = _backward_reference(plan, inputs.masks, 2 * S, *dense, *primals)
            else:
                apply: Any = _LayerBackward.apply
                given = apply(plan, saved, inputs.masks, *dense, *primals)
        else:
            needs = ctx.needs_input_grad[1:]
            given = _run_backward(
                inputs, *_split_grads(S, grads, outputs), saved, S, needs[3], any(needs[4 + S :])
            )
        return (None, None, None, None, *given)


class LSTMFunction(_LayerFunction):
    """What `functional.lstm` applies; plan is internal.

    apply(plan, lengths, batch_sizes, reset, x, h0, c0, *params) -> (y, h_n, c_n, c).
    """


class GRUFunction(_LayerFunction):
    """What `functional.gru` applies, for both forms of the reset gate; plan is internal.

    apply(plan, lengths, batch_sizes, reset, x, h0, *params) -> (y, h_n).
    """


class RNNFunction(_LayerFunction):
    """What `functional.rnn` applies; plan is internal.

    apply(plan, lengths, batch_sizes, reset, x, h0, *params) -> (y, h_n).
    """


_FUNCTIONS: dict[str, type[_LayerFunction]] = {
    "lstm": LSTMFunction,
    "gru": GRUFunction,
    "gru_reset_before": GRUFunction,
    "rnn_tanh": RNNFunction,
    "rnn_relu": RNNFunction,
}


def layer(inputs: Inputs, return_states: bool) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`functional.layer` by the compiled operators."""
    cell, x, states, params, *masks = inputs
    tracing = torch._C._get_tracing_state() is not None
    in_graph = tracing or torch.compiler.is_compiling()
    # torch.jit.trace checks its graph by tracing again without gradients: what is saved must not differ.
    needs_grad = (tracing or torch.is_grad_enabled()) and (
        x.requires_grad or any(t.requires_grad for t in (*states, *params))
    )
    if in_graph:
        check(inputs)
        y, last, seq, _ = torch.ops.fastrnn.layer(*inputs, needs_grad, return_states)
    else:
        try:
            if needs_grad:
                # A graph keeps the operator, to which this Function is opaque.
                plan = _Plan(cell, len(states), len(params))
                apply: Any = _FUNCTIONS.get(cell, _LayerFunction).apply
                y, *rest = apply(plan, *masks, x, *states, *params)
                last, seq = rest[: len(states)], rest[len(states) :]
            else:
                y, last, seq, _ = _call(inputs, False, return_states)
        except (RuntimeError, IndexError):
            # The kernel has checked all before it began; the words are better here.
            check(inputs)
            raise
    if not return_states:
        return y, tuple(last), ()
    # The cell state is kept in the arithmetic's type; the caller sees the input's.
    return y, tuple(last), tuple(s.to(x.dtype) for s in seq)


# --- fakes and the registered rules


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_layer(
    cell: str,
    x: Tensor,
    states: list[Tensor],
    params: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    save: bool,
    return_states: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    D, _, P = states[0].shape
    spec = CELLS[cell]
    H = params[0].shape[0] // spec.gates
    N = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
    dtype = _compute_dtype(x)
    y = x.new_empty((*x.shape[:-1], D * P))
    last = [s.new_empty(s.shape) for s in states]
    seq, saved = [], []
    if save or return_states:
        seq = [x.new_empty((D, *x.shape[:-1], H), dtype=dtype) for _ in states[1:]]
    if save:
        saved = [x.new_empty((D, N, spec.saved * H), dtype=dtype)]
        if len(params) // D in (3, 5):
            saved.append(x.new_empty((D, N, H), dtype=dtype))
    return y, last, seq, saved


def _fake_backward(
    cell: str,
    dy: Tensor | None,
    dlast: list[Tensor],
    dseq: list[Tensor],
    x: Tensor,
    states: list[Tensor],
    params: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    seq: list[Tensor],
    saved: list[Tensor],
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dx = x.new_empty(x.shape if need_x else (0,))
    dparams = [p.new_empty(p.shape) for p in params] if need_params else []
    return dx, [s.new_empty(s.shape) for s in states], dparams


def _setup_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    cell, x, states, params, lengths, batch_sizes, reset, save, _ = inputs
    y, _, seq, saved = output
    ctx.plan = _Plan(cell, len(states), len(params))
    ctx.save, ctx.dtype = save, x.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(lengths, batch_sizes, reset, x, *states, *params, y, *seq, *saved)


def _registered_backward(ctx: Any, dy: Any, dlast: Any, dseq: Any, dsaved: Any) -> tuple[Any, ...]:
    plan: _Plan = ctx.plan
    if not ctx.save:
        raise RuntimeError("fastrnn::layer was called with save=False: there is nothing to differentiate")
    S = plan.states
    inputs, outputs, kept = _unpack(plan, ctx.saved_tensors)
    grads = [dy, *(dlast or [None] * S), *(dseq or [None] * (S - 1))]
    dy, dlast, dseq = _split_grads(S, grads, outputs)
    needs_x = ctx.needs_input_grad[1]
    needs_params = any(p.requires_grad for p in inputs.params)
    given = _run_backward(inputs, dy, dlast, dseq, kept, S, needs_x, needs_params)
    dparams = list(given[1 + S :]) if needs_params else [None] * plan.params
    return None, given[0], list(given[1 : 1 + S]), dparams, None, None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    cell, dy, dlast, dseq, x, states, params, lengths, batch_sizes, reset, y, seq, saved, *_ = inputs
    ctx.plan = _Plan(cell, len(states), len(params))
    ctx.given = [dy is not None, bool(dlast), bool(dseq)]
    ctx.shapes = [y.shape, *(s.shape for s in states), *(s.shape for s in seq)]
    ctx.none = [None] * len(seq), [None] * len(saved)
    ctx.set_materialize_grads(False)
    grads = [g for g in (dy, *dlast, *dseq) if g is not None]
    ctx.save_for_backward(lengths, batch_sizes, reset, x, *states, *params, *grads)


def _registered_double_backward(ctx: Any, ddx: Any, ddstates: Any, ddparams: Any) -> tuple[Any, ...]:
    plan: _Plan = ctx.plan
    S, flat = plan.states, ctx.saved_tensors
    primals, given = flat[3 : 4 + S + plan.params], list(flat[4 + S + plan.params :])
    # A gradient that did not come is zero.
    present = [ctx.given[0]] + [ctx.given[1]] * S + [ctx.given[2]] * (S - 1)
    dense = [
        given.pop(0) if there else primals[0].new_zeros(shape)
        for there, shape in zip(present, ctx.shapes, strict=True)
    ]
    # One that was not asked for came back with no elements.
    asked = [ddx, *(ddstates or [None] * S), *(ddparams or [None] * plan.params)]
    grads = [
        torch.zeros_like(p) if g is None or g.shape != p.shape else g
        for g, p in zip(asked, primals, strict=True)
    ]
    out = list(_double_backward(plan, flat[:3], 2 * S, (*dense, *primals), grads))
    dy = out[0] if ctx.given[0] else None
    dlast = out[1 : 1 + S] if ctx.given[1] else []
    dseq = out[1 + S : 2 * S] if ctx.given[2] else []
    dx, dstates, dparams = out[2 * S], out[2 * S + 1 : 3 * S + 1], out[3 * S + 1 :]
    return None, dy, dlast, dseq, dx, dstates, dparams, None, None, None, None, *ctx.none, None, None


def _layer_flops(cell: Any, x: Any, states: Any, params: Any, *rest: Any, **options: Any) -> int:
    """Of the matrix products, for torch.utils.flop_counter; masks count as if every step ran."""
    return sum(2 * math.prod(x[:-1]) * math.prod(shape) for shape in params if len(shape) == 2)


def _backward_flops(
    cell: Any, dy: Any, dlast: Any, dseq: Any, x: Any, states: Any, params: Any, *rest: Any, **options: Any
) -> int:
    """Each weight's product once for its own gradient and once for what it was multiplied with."""
    return 2 * _layer_flops(cell, x, states, params)


def _register_flops() -> None:
    log = logging.getLogger("torch.utils.flop_counter")
    level = log.level
    log.setLevel(logging.ERROR)  # torch 2.11 warns on import where triton is missing
    try:
        from torch.utils.flop_counter import register_flop_formula
    finally:
        log.setLevel(level)
    register_flop_formula(torch.ops.fastrnn.layer)(_layer_flops)
    register_flop_formula(torch.ops.fastrnn.layer_backward)(_backward_flops)


if LOADED:
    _register_flops()
    torch.library.register_fake("fastrnn::layer", _fake_layer)
    torch.library.register_fake("fastrnn::layer_backward", _fake_backward)
    torch.library.register_autograd("fastrnn::layer", _registered_backward, setup_context=_setup_layer)
    torch.library.register_autograd(
        "fastrnn::layer_backward", _registered_double_backward, setup_context=_setup_backward
    )

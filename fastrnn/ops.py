"""The operators' derivatives, and the call of a layer by them.

A call reaches the kernels in one of three ways. Eager, through an `autograd.Function` with
`forward(ctx, ...)`, the cheapest there is. In torch.compile, torch.export and torch.jit.trace, by the
operator, whose Autograd key holds the same Function. Under torch.func's transforms and forward-mode AD, by
the Functions of `transforms`, which also serve every derivative after the first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from . import cuda, gpu, transforms
from ._checks import same_device
from .kernels import (
    LOADED,
    PREFIXES,
    REFUSALS,
    Inputs,
    Outputs,
    Plan,
    call,
    check,
    compute_dtype,
    operator,
    present,
    run_backward,
    stream,
)
from .reference import CELLS, rounded
from .transforms import MASKS, backward_reference


def is_batched(t: Tensor | None) -> bool:
    """True under the vmap of torch.autograd.grad(..., is_grads_batched=True); it knows no rule of ours."""
    return t is not None and bool(torch._C._functorch.is_legacy_batchedtensor(t))


def _unpack(plan: Plan, flat: Sequence[Tensor]) -> tuple[Inputs, tuple[Tensor, ...], tuple[Tensor, ...]]:
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


def _composed(
    plan: Plan,
    needs: Sequence[bool],
    flat: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, states and params in a form that can be differentiated, and goes under vmap."""
    dtype = flat[MASKS].dtype
    dense = [
        torch.zeros_like(o, dtype=dtype) if g is None else g.to(dtype)
        for o, g in zip(outputs, grads, strict=True)
    ]
    if any(map(is_batched, dense)):
        return backward_reference(plan, flat[:MASKS], *dense, *flat[MASKS:])
    return transforms.gradients(plan, needs, flat, dense)


def _kept(ctx: Any, plan: Plan, flat: Sequence[Tensor | None]) -> Outputs:
    """The forward pass, with all that its backward pass needs kept in ctx."""
    out = call(plan.inputs(flat), True, False, plan.backend)
    ctx.plan = plan
    ctx.set_materialize_grads(False)
    # Not the last states: the backward pass does not read them, and callers edit them in place.
    ctx.save_for_backward(*flat, out.y, *out.seq, *out.saved)
    return out


class _LayerFunction(torch.autograd.Function):
    """(y, *last, *seq) = apply(plan, lengths, batch_sizes, reset, x, *states, *params)."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *flat: Tensor | None) -> Any:
        out = _kept(ctx, plan, flat)
        return (out.y, *out.last, *out.seq)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan: Plan = ctx.plan
        S, flat = plan.states, ctx.saved_tensors
        if all(g is None for g in grads):
            return (None,) * (5 + S + plan.params)
        needs = ctx.needs_input_grad[1:]
        inputs, outputs, saved = _unpack(plan, flat)
        if torch.is_grad_enabled() or transforms.active() or any(map(is_batched, grads)):
            given = _composed(plan, needs, flat[: 4 + S + plan.params], grads, outputs)
        else:
            given = run_backward(
                inputs, *_split_grads(S, grads, outputs), saved, needs[3], any(needs[4 + S :]), plan.backend
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


def wants_grad(*tensors: Tensor) -> bool:
    if is_grad_enabled():
        for t in tensors:  # a generator would take longer than all of it
            if t.requires_grad:
                return True
    return False


def in_graph() -> bool:
    """While a program is traced or compiled, which keeps operators: Functions are opaque to it."""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()


def streamed(
    check: Callable[..., object],
    asked: Sequence[Any],
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    *weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n or None) of a call that is `functional.plain`, by one direction without masks.

    weights  the layer's parameters, or in inference the packed tensor of them
    Where the kernel refuses, raises what `check(*asked)` raises, else the same.
    """
    refused: Exception | None = None
    try:
        states = (h,) if c is None else (h, c)
        if not is_grad_enabled() or not wants_grad(*weights, x, *states):
            found: tuple[Tensor, Tensor, Tensor | None] = stream(cell, x, h, c, *weights)
            return found
        apply: Any = _FUNCTIONS.get(cell, _LayerFunction).apply
        y, h_n, *more = apply(Plan(cell, len(states), len(weights)), None, None, None, x, *states, *weights)
        return y, h_n, more[0] if more else None
    except (*REFUSALS, AttributeError) as error:  # a state may be anything
        refused = error  # out of this block: the check's words are no consequence
    try:
        check(*asked)
        raise refused
    finally:
        del refused  # whose traceback has this frame: a cycle would keep the call's tensors


def layer(
    inputs: Inputs, return_states: bool, backend: str
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`functional.layer` by a backend's operators."""
    cell, x, states, params, *masks = inputs
    heads = backend != "cpu"
    if x.dtype == torch.float16 and backend == "cpu":
        check(inputs)
        return rounded(layer(inputs.wide(), return_states, backend), x.dtype)
    plan = Plan(cell, len(states), len(params), backend)
    if transforms.active():
        check(inputs, heads)
        y, *rest = transforms.forward(plan, *masks, x, *states, *params)
        last, seq = rest[: len(states)], rest[len(states) :]
    elif in_graph():
        check(inputs, heads)
        y, last, seq, _ = operator(backend, "layer")(*inputs, False, return_states)
    else:
        try:
            if wants_grad(x, *states, *params):
                apply: Any = _FUNCTIONS.get(cell, _LayerFunction).apply
                y, *rest = apply(plan, *masks, x, *states, *params)
                last, seq = rest[: len(states)], rest[len(states) :]
            else:
                y, last, seq, _ = call(inputs, False, return_states, backend)
        except REFUSALS:
            check(inputs, heads)
            raise
    if not return_states:
        return y, tuple(last), ()
    # The cell state is kept in the arithmetic's type; the caller sees the input's.
    return y, tuple(last), tuple(s.to(x.dtype) for s in seq)


# --- fakes and the registered rules, of one backend


def _fake_layer(
    backend: str,
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
    # One meta tensor among others brings a call here, where outputs like x would be memory nobody fills.
    same_device(x, states, params, (lengths, reset))
    D, _, P = states[0].shape
    spec = CELLS[cell]
    H = params[0].shape[0] // spec.gates
    N = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
    dtype = compute_dtype(x)
    y = x.new_empty((*x.shape[:-1], D * P))
    last = [s.new_empty(s.shape) for s in states]
    seq, saved = [], []
    if save or return_states:
        seq = [x.new_empty((D, *x.shape[:-1], H), dtype=dtype) for _ in states[1:]]
    if save and not (backend == "cpu" and spec.saves_h):
        kept = dtype if backend == "cpu" else x.dtype
        saved = [x.new_empty((D, N, spec.saved * H), dtype=kept)]
        if len(params) // D in (3, 5):
            saved.append(x.new_empty((D, N, H), dtype=kept))
    return y, last, seq, saved


def _fake_stack(
    cell: str,
    x: Tensor,
    states: list[Tensor],
    params: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    same_device(x, states, params, (lengths, reset))
    return x.new_empty((*x.shape[:-1], states[0].shape[-1])), [s.new_empty(s.shape) for s in states]


def _autograd_stack(
    keyset: Any, cell: str, x: Tensor, states: list[Tensor], params: list[Tensor], *masks: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """For graphs and direct calls: `kernels.stack` goes past it."""
    no_transforms(x, *states, *params)
    if wants_grad(x, *states, *params):
        raise RuntimeError(
            "torch.ops.fastrnn.stack is for inference and has no derivatives: call it under torch.no_grad(). "
            "Where gradients are wanted, a fastrnn module runs its layers one by one"
        )
    result: tuple[Tensor, list[Tensor]] = below_autograd(
        keyset, torch.ops.fastrnn.stack.default, cell, x, states, params, *masks
    )
    return result


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
    given = present((dy, *dlast, *dseq))
    same_device(x, [*states, *given, *seq, *saved, y], params, (lengths, reset))
    dx = x.new_empty(x.shape if need_x else (0,))
    dparams = [p.new_empty(p.shape) for p in params] if need_params else []
    return dx, [s.new_empty(s.shape) for s in states], dparams


class _OperatorFunction(_LayerFunction):
    """_LayerFunction with what it kept among the results: (y, *last, *seq, *saved)."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *flat: Tensor | None) -> Any:
        out = _kept(ctx, plan, flat)
        ctx.mark_non_differentiable(*out.saved)
        return (out.y, *out.last, *out.seq, *out.saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _LayerFunction.backward(ctx, *grads[: ctx.plan.outputs])


def no_transforms(*tensors: Tensor | None) -> None:
    if transforms.differentiates(*tensors):  # forward-mode AD would drop the tangents without a word
        raise RuntimeError(
            "torch.ops.fastrnn knows no transforms of torch.func and no forward-mode AD. A fastrnn module "
            "and fastrnn.functional do; where they are compiled, the transform goes inside the graph"
        )


def below_autograd(keyset: Any, op: Any, *args: Any) -> Any:
    """The operator without its Autograd key, as the same call: a profile shows it once."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd_layer(
    backend: str,
    keyset: Any,
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
    no_transforms(x, *states, *params)
    inputs = Inputs(cell, x, states, params, lengths, batch_sizes, reset)
    if not wants_grad(x, *states, *params):
        unchanged: tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]
        unchanged = below_autograd(keyset, operator(backend, "layer"), *inputs, save, return_states)
        return unchanged
    plan = Plan(cell, len(states), len(params), backend)
    apply: Any = _OperatorFunction.apply
    y, *rest = apply(plan, *inputs.masks, x, *states, *params)
    S = plan.states
    last, seq, saved = rest[:S], rest[S : plan.outputs - 1], rest[plan.outputs - 1 :]
    return y, last, seq if save or return_states else [], saved if save else []


def _autograd_backward(
    backend: str,
    keyset: Any,
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
    given = present((dy, *dlast, *dseq))
    no_transforms(*given, x, *states, *params)
    if not wants_grad(*given, x, *states, *params):
        args = (dy, dlast, dseq, x, states, params, lengths, batch_sizes, reset, y, seq, saved)
        unchanged: tuple[Tensor, list[Tensor], list[Tensor]]
        unchanged = below_autograd(
            keyset, operator(backend, "layer_backward"), cell, *args, need_x, need_params
        )
        return unchanged
    S, plan, none = len(states), Plan(cell, len(states), len(params), backend), [None]
    needs = (False,) * MASKS + (need_x,) + (True,) * S + (need_params,) * plan.params
    grads: Any = (dy, *(dlast or none * S), *(dseq or none * (S - 1)))
    flat: Any = (lengths, batch_sizes, reset, x, *states, *params)
    result: Any = _composed(plan, needs, flat, grads, (y, *states, *seq))
    dx, *others = result
    return x.new_empty(0) if dx is None else dx, others[:S], others[S:] if need_params else []


def layer_flops(cell: Any, x: Any, states: Any, params: Any, *rest: Any, **options: Any) -> int:
    """Of the matrix products, for torch.utils.flop_counter; masks count as if every step ran."""
    return sum(2 * math.prod(x[:-1]) * math.prod(shape) for shape in params if len(shape) == 2)


def _backward_flops(
    cell: Any,
    dy: Any,
    dlast: Any,
    dseq: Any,
    x: Any,
    states: Any,
    params: Any,
    lengths: Any,
    batch_sizes: Any,
    reset: Any,
    y: Any,
    seq: Any,
    saved: Any,
    need_x: bool,
    need_params: bool,
    **options: Any,
) -> int:
    """Each weight's product once for its own gradient and once for what it was multiplied with, where these
    are needed: the states' gradients always are."""
    whole, per = layer_flops(cell, x, states, params), len(params) // states[0][0]
    of_input = layer_flops(cell, x, states, params[::per])
    return (1 + need_params) * whole - (not need_x) * of_input


def register_flops(name: str, formula: Any) -> None:
    """For torch.utils.flop_counter."""
    log = logging.getLogger("torch.utils.flop_counter")
    level = log.level
    log.setLevel(logging.ERROR)  # torch 2.11 warns on import where triton is missing
    try:
        from torch.utils.flop_counter import register_flop_formula
    finally:
        log.setLevel(level)
    register_flop_formula(getattr(torch.ops.fastrnn, name))(formula)


def engine(backend: str) -> gpu.Engine:
    """What runs a GPU backend's recurrence; Triton is imported at the first call."""
    if backend == "cuda":
        return cuda.ENGINE
    from .triton_kernels import Triton

    triton: gpu.Engine = Triton()
    return triton


def _gpu_layer(backend: str, *args: Any) -> Any:
    return gpu.forward(engine(backend), *args)


def _gpu_backward(backend: str, *args: Any) -> Any:
    return gpu.backward(engine(backend), *args)


if LOADED:
    _LIBRARY = torch.library.Library("fastrnn", "IMPL")
    for _backend, _prefix in PREFIXES.items():
        for _name, _fake, _rule, _flops in (
            ("layer", partial(_fake_layer, _backend), partial(_autograd_layer, _backend), layer_flops),
            ("layer_backward", _fake_backward, partial(_autograd_backward, _backend), _backward_flops),
        ):
            torch.library.register_fake(f"fastrnn::{_prefix}{_name}", _fake)
            _LIBRARY.impl(_prefix + _name, _rule, "Autograd", with_keyset=True)
            register_flops(_prefix + _name, _flops)
    for _backend in ("cuda", "triton"):
        for _name, _run in (("layer", _gpu_layer), ("layer_backward", _gpu_backward)):
            name = PREFIXES[_backend] + _name
            _LIBRARY.impl(name, partial(_run, _backend), "CompositeExplicitAutograd")
    torch.library.register_fake("fastrnn::stack", _fake_stack)
    _LIBRARY.impl("stack", _autograd_stack, "Autograd", with_keyset=True)
    # Torch's own fallback for operators without a rule takes time to find that there is no gradient.
    _LIBRARY.impl("stream", torch.library.fallthrough_kernel, "Autograd")

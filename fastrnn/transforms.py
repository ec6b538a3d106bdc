"""The layer as a function that every transform of torch.func composes with, a kernel's call at its heart.

torch.func (grad, vmap, jvp and all that is made of them) takes a nest of transforms apart and asks for one
rule at a time: a derivative, a tangent, or what to do with one more dimension. Forward and backward are
each an `autograd.Function` with these rules, so that under any nest the innermost call is a kernel's:

    rule       LayerForward                     LayerBackward
    backward   LayerBackward                    the plain reference
    jvp        the plain reference              the plain reference
    vmap       one call with the new dimension folded into the batch, where the weights are shared (and no
               gradients of them are wanted); else a call for each entry

LayerBackward runs the forward kernel again: what that saves is laid out its own way, which no vmap could
split. Under two forward modes, one in the other, all is the plain reference: torch calls a Function's jvp
with forward mode off, so that the outer one would see nothing of it. And so it is under functionalize, for
which torch's Functions have no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import kernels, reference
from .kernels import Plan, present

# A call's tensors in the order of the Functions: masks (lengths, batch_sizes, reset), then those with rows
# (gradients, x, states), then params.
Flat = Sequence[Tensor | None]
MASKS = 3


def active() -> bool:
    """True inside a transform of torch.func, or a dual_level of torch.autograd.forward_ad."""
    if _are_functorch_transforms_active():
        return True
    return not is_compiling() and forward_ad._current_level >= 0


def differentiates(*tensors: Tensor | None) -> bool:
    """True inside a transform of torch.func, or where one of the tensors has a tangent (a dual_level may be
    another thread's)."""
    if _are_functorch_transforms_active():
        return True
    return active() and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _plain_alone() -> bool:
    """Whether no Function of torch's may stand here."""
    keys = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    return TransformType.Functionalize in keys or keys.count(TransformType.Jvp) > 1


# --- the rules by plain torch


def _forward(plan: Plan, masks: Flat, *primals: Tensor) -> tuple[Tensor, ...]:
    """(y, *last, *seq) of x, states, params."""
    y, last, seq = reference.layer(*plan.inputs((*masks, *primals)))
    return (y, *last, *seq)


def backward_reference(plan: Plan, masks: Flat, *flat: Tensor) -> tuple[Tensor, ...]:
    """The gradients of x, states and params by plain torch; flat: dy, dlast, dseq, x, states, params."""
    count = plan.outputs
    vjp: Any = torch.func.vjp(lambda *primals: _forward(plan, masks, *primals), *flat[count:])[1]
    return tuple(vjp(tuple(flat[:count])))


def double_backward(
    plan: Plan, masks: Flat, flat: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The derivative of `backward_reference` by flat; grads: those of the gradients that it gave."""
    vjp: Any = torch.func.vjp(lambda *values: backward_reference(plan, masks, *values), *flat)[1]
    return tuple(vjp(tuple(grads)))


def _tangents(
    function: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The tangents of function(*primals): the transpose of its vjp, which is linear. (torch.func.jvp does not
    nest in the graphs of the compiler, nor in a dual_level of torch.autograd.forward_ad.)"""
    dense = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True))
    pullback: Any = torch.func.vjp(function, *primals)
    outputs, vjp = pullback
    transposed: Any = torch.func.vjp(vjp, tuple(torch.zeros_like(o) for o in outputs))[1]
    return tuple(transposed(dense)[0])


# --- vmap


def _fold(t: Tensor | None, dim: int | None, size: int, axis: int) -> Tensor | None:
    """Folds `dim`, of `size`, into the rows along `axis`: entry e of row i becomes row i*size + e.

    The new dimension lies inside, so that the rows of packed sequences stay sorted by length.
    """
    if t is None:
        return None
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, axis).flatten(axis - 1, axis)


def _one_call(
    apply: Callable[..., Any], plan: Plan, size: int, dims: Sequence[int | None], flat: Flat
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """All entries as one batch; neither params nor batch_sizes have the new dimension."""
    lengths, batch_sizes, reset = flat[:MASKS]
    masks = (
        _fold(lengths, dims[0], size, -1),
        None if batch_sizes is None else batch_sizes * size,
        _fold(reset, dims[2], size, -1),
    )
    end = len(flat) - plan.params
    rows = [_fold(t, d, size, -2) for t, d in zip(flat[MASKS:end], dims[MASKS:end], strict=True)]
    out = apply(*masks, *rows, *flat[end:])
    return tuple(t.unflatten(-2, (t.shape[-2] // size, size)) for t in out), tuple(t.dim() - 1 for t in out)


def _call_each(
    apply: Callable[..., Any], size: int, dims: Sequence[int | None], flat: Flat
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    def entry(e: int) -> list[Tensor | None]:
        return [t if t is None or d is None else t.select(d, e) for t, d in zip(flat, dims, strict=True)]

    out = tuple(torch.stack(column) for column in zip(*(apply(*entry(e)) for e in range(size)), strict=True))
    return out, (0,) * len(out)


def _vmap(
    apply: Callable[..., Any], plan: Plan, size: int, dims: Sequence[int | None], flat: Flat, shared: bool
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """`shared`: no result is a gradient of params."""
    if size == 0:
        one = [
            t if t is None or d is None else t.movedim(d, 0).new_zeros(t.movedim(d, 0).shape[1:])
            for t, d in zip(flat, dims, strict=True)
        ]
        out = apply(*one)
        return tuple(t.new_empty(0, *t.shape) for t in out), (0,) * len(out)
    if shared and dims[1] is None and all(d is None for d in dims[len(dims) - plan.params :]):
        return _one_call(apply, plan, size, dims, flat)
    return _call_each(apply, size, dims, flat)


# --- the Functions


def gradients(
    plan: Plan, needs: Sequence[bool], flat: Flat, grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Those of x, states and params, by LayerBackward; flat: masks, x, states, params; needs: for each."""
    need_x, need_params = needs[MASKS], any(needs[MASKS + 1 + plan.states :])
    if _plain_alone():
        return backward_reference(plan, flat[:MASKS], *grads, *present(flat[MASKS:]))
    apply: Any = LayerBackward.apply
    given = list(apply(plan, need_x, need_params, *flat[:MASKS], *grads, *flat[MASKS:]))
    dx = given.pop(0) if need_x else None
    dparams = given[plan.states :] if need_params else [None] * plan.params
    return (dx, *given[: plan.states], *dparams)


class LayerForward(torch.autograd.Function):
    """(y, *last, *seq) = apply(plan, lengths, batch_sizes, reset, x, *states, *params), all of x's dtype."""

    @staticmethod
    def forward(plan: Plan, *flat: Tensor | None) -> Any:
        out = kernels.call(plan.inputs(flat), False, True, plan.backend)
        return (out.y, *out.last, *(s.to(out.y.dtype) for s in out.seq))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan: Plan = ctx.plan
        return (None,) * (1 + MASKS) + gradients(plan, ctx.needs_input_grad[1:], ctx.saved_tensors, grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        plan, masks, primals = ctx.plan, ctx.saved_tensors[:MASKS], ctx.saved_tensors[MASKS:]
        return _tangents(lambda *p: _forward(plan, masks, *p), primals, tangents[1 + MASKS :])

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, *flat: Tensor | None) -> Any:
        def apply(*values: Tensor | None) -> Any:
            function: Any = LayerForward.apply
            return function(plan, *values)

        return _vmap(apply, plan, info.batch_size, in_dims[1:], flat, True)


class LayerBackward(torch.autograd.Function):
    """The gradients of x (if asked for), states and params (if asked for), that can be differentiated again.

    apply(plan, need_x, need_params, lengths, batch_sizes, reset, dy, *dlast, *dseq, x, *states, *params)
    """

    @staticmethod
    def forward(plan: Plan, need_x: bool, need_params: bool, *flat: Tensor | None) -> Any:
        S, masks, primals = plan.states, flat[:MASKS], flat[MASKS + plan.outputs :]
        dy, *others = flat[MASKS : MASKS + plan.outputs]
        inputs = plan.inputs((*masks, *primals))
        out = kernels.call(inputs, True, False, plan.backend)
        dtype = kernels.compute_dtype(inputs.x)
        dseq: Any = [d.to(dtype) for d in present(others[S:])]
        dlast: Any = others[:S]
        saved = (out.y, *out.seq, *out.saved)
        given = kernels.run_backward(inputs, dy, dlast, dseq, saved, need_x, need_params, plan.backend)
        return tuple(present(given))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan, *ctx.needs = inputs[:3]
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan: Plan = ctx.plan
        need_x, need_params = ctx.needs
        masks, flat = ctx.saved_tensors[:MASKS], ctx.saved_tensors[MASKS:]
        # What was not asked for has no gradient of its own.
        x, params = flat[plan.outputs], flat[len(flat) - plan.params :]
        dense = grads if need_x else (torch.zeros_like(x), *grads)
        dense = dense if need_params else (*dense, *(torch.zeros_like(p) for p in params))
        return (None,) * (3 + MASKS) + double_backward(plan, masks, flat, dense)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        plan: Plan = ctx.plan
        need_x, need_params = ctx.needs
        masks, flat = ctx.saved_tensors[:MASKS], ctx.saved_tensors[MASKS:]
        given = _tangents(lambda *v: backward_reference(plan, masks, *v), flat, tangents[3 + MASKS :])
        return given[0 if need_x else 1 : len(given) if need_params else 1 + plan.states]

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, need_x: bool, need_params: bool, *flat: Any) -> Any:
        def apply(*values: Tensor | None) -> Any:
            function: Any = LayerBackward.apply
            return function(plan, need_x, need_params, *values)

        return _vmap(apply, plan, info.batch_size, in_dims[3:], flat, not need_params)


# torch gives this decorator no types.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def forward(plan: Plan, *flat: Tensor | None) -> tuple[Tensor, ...]:
    """The layer under any transforms: (y, *last, *seq) of masks, x, states and params."""
    if _plain_alone():
        return _forward(plan, flat[:MASKS], *present(flat[MASKS:]))
    apply: Any = LayerForward.apply
    return tuple(apply(plan, *flat))

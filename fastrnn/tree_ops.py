"""The recursive cells' operators: their call, their derivatives, and what torch.compile needs of them.

As in `ops`: eager calls go through an `autograd.Function`, graphs keep the operator, whose Autograd key holds
the same Function, and torch.func's transforms and forward-mode AD take the plain reference. So does every
derivative after the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import transforms, tree_reference
from ._checks import same_device
from .backends import choose_fused
from .forest import Forest, schedule_steps
from .kernels import LOADED, present
from .ops import below_autograd, in_graph, is_batched, no_transforms, register_flops, wants_grad
from .tree_reference import TREE_CELLS

Grads = Sequence[Tensor | None]


def _run(
    cell: str, x: Tensor | None, params: Sequence[Tensor], schedule: Tensor, save: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(h, states, saved) by the kernels, past the registered rule."""
    with torch._C._AutoDispatchBelowAutograd():
        h, states, saved = torch.ops.fastrnn.tree.default(cell, x, list(params), schedule, save)
    return h, states, saved


def _run_backward(
    cell: str,
    grads: Grads,
    x: Tensor | None,
    params: Sequence[Tensor],
    schedule: Tensor,
    kept: Sequence[Tensor],
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of x and params, None where not asked for or not there; kept: h, states, saved."""
    S = TREE_CELLS[cell].states
    dstates = [torch.zeros_like(kept[1]) if g is None else g for g in grads[1:S]]
    if all(g is None for g in grads[1:S]):
        dstates = []
    states, saved = list(kept[1:S]), list(kept[S:])
    with torch._C._AutoDispatchBelowAutograd():
        dx, dparams = torch.ops.fastrnn.tree_backward.default(
            cell, grads[0], dstates, x, list(params), schedule, kept[0], states, saved, need_x, need_params
        )
    if not need_params:
        return (dx if need_x else None, *[None] * len(params))
    # Without an input its weight is not used.
    return (dx if need_x else None, dparams[0] if x is not None else None, *dparams[1:])


def _backward_reference(
    cell: str, schedule: Tensor, with_x: bool, grads: Sequence[Tensor], primals: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of primals ([x,] *params) by plain torch."""

    def forward(*flat: Tensor) -> tuple[Tensor, ...]:
        steps = schedule_steps(schedule, flat[0].device)
        return tree_reference.tree(cell, flat[0] if with_x else None, flat[with_x:], steps)

    vjp: Any = torch.func.vjp(forward, *primals)[1]
    return tuple(vjp(tuple(grads)))


class _TreeBackward(torch.autograd.Function):
    """The kernels' backward pass, that can be differentiated again, by the reference.

    apply(cell, with_x, need_x, schedule, kept, *grads, [x,] *params) -> gradients of [x,] *params
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        with_x: bool,
        need_x: bool,
        schedule: Tensor,
        kept: Sequence[Tensor],
        *flat: Tensor,
    ) -> Any:
        S = TREE_CELLS[cell].states
        ctx.cell, ctx.with_x = cell, with_x
        ctx.save_for_backward(schedule, *flat)
        grads, primals = flat[:S], flat[S:]
        x = primals[0] if with_x else None
        dx, dw, *others = _run_backward(cell, grads, x, primals[with_x:], schedule, kept, need_x, True)
        dx, dw = (
            torch.zeros_like(p) if g is None else g for g, p in ((dx, primals[0]), (dw, primals[with_x]))
        )
        return (dx, dw, *others) if with_x else (dw, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        schedule, *flat = ctx.saved_tensors
        S = TREE_CELLS[ctx.cell].states

        def backward(*values: Tensor) -> tuple[Tensor, ...]:
            return _backward_reference(ctx.cell, schedule, ctx.with_x, values[:S], values[S:])

        vjp: Any = torch.func.vjp(backward, *flat)[1]
        return (None,) * 5 + tuple(vjp(tuple(grads)))


class TreeFunction(torch.autograd.Function):
    """apply(cell, schedule, x or None, *params) -> (h, *states, *saved); saved has no gradient."""

    @staticmethod
    def forward(ctx: Any, cell: str, schedule: Tensor, x: Tensor | None, *params: Tensor) -> Any:
        h, states, saved = _run(cell, x, params, schedule, True)
        ctx.cell, ctx.params = cell, len(params)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(schedule, x, *params, h, *states, *saved)
        return (h, *states, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        cell, (schedule, x, *flat) = ctx.cell, ctx.saved_tensors
        S, params, kept = TREE_CELLS[cell].states, flat[: ctx.params], flat[ctx.params :]
        given, needs = grads[:S], ctx.needs_input_grad[2:]
        if all(g is None for g in given):
            return (None,) * (3 + len(params))
        need_x = x is not None and needs[0]
        plain = transforms.active() or any(map(is_batched, given))
        if plain or torch.is_grad_enabled():
            dense = [torch.zeros_like(k) if g is None else g for g, k in zip(given, kept[:S], strict=True)]
            with_x = x is not None
            primals = [x, *params] if with_x else params
            found: Any
            if plain:
                found = _backward_reference(cell, schedule, with_x, dense, primals)
            else:
                apply: Any = _TreeBackward.apply
                found = apply(cell, with_x, need_x, schedule, kept, *dense, *primals)
            return (None, None, *(found if with_x else (None, None, *found[1:])))
        found = _run_backward(cell, given, x, params, schedule, kept, need_x, any(needs[1:]))
        return (None, None, *found)


def tree(
    cell: str, x: Tensor | None, params: Sequence[Tensor], forest: Forest, direction: str
) -> tuple[Tensor, ...]:
    """h and, by cell, c, each [N, H], on the backend in force; the arguments are checked already."""
    if choose_fused(params[0], "recursive cells") == "reference" or transforms.active():
        return tree_reference.tree(cell, x, params, forest.steps(direction))
    dtype = params[0].dtype
    if dtype in (torch.float16, torch.bfloat16):
        # 16 bits are for what is kept: the arithmetic is float32's, rounded once.
        wide = None if x is None else x.float()
        return tuple(s.to(dtype) for s in tree(cell, wide, [p.float() for p in params], forest, direction))
    schedule, S = forest.schedule(direction), TREE_CELLS[cell].states
    if in_graph():
        h, states, _ = torch.ops.fastrnn.tree(cell, x, list(params), schedule, False)
    elif wants_grad(*params, *([] if x is None else [x])):
        apply: Any = TreeFunction.apply
        h, *states = apply(cell, schedule, x, *params)[:S]
    else:
        h, states, _ = _run(cell, x, params, schedule, False)
    return (h, *states)


# --- fakes and the registered rules


def _fake_tree(
    cell: str, x: Tensor | None, params: list[Tensor], schedule: Tensor, save: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    same_device(params[0] if x is None else x, [], params)
    spec, w = TREE_CELLS[cell], params[0]
    N, H = schedule.shape[1] - 1, w.shape[0] // spec.gates
    states = [w.new_empty((N, H)) for _ in range(spec.states - 1)]
    saved = []
    if save and spec.states > 1:
        saved = [w.new_empty((N, spec.gates * H)), w.new_empty((N, H))]
    return w.new_empty((N, H)), states, saved


def _fake_tree_backward(
    cell: str, dh: Tensor | None, dstates: list[Tensor], x: Tensor | None, params: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    _, h, states, saved, need_x, need_params = rest
    given = present((dh, *dstates, h, *states, *saved))
    same_device(params[0] if x is None else x, given, params)
    dx = x.new_empty(x.shape) if need_x and x is not None else params[0].new_empty(0)
    return dx, [p.new_empty(p.shape) for p in params] if need_params else []


def _fake_slots(parents: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
    return parents.new_empty(parents.shape), parents.new_empty(3)


def _fake_schedule(parents: Tensor, slots: Tensor, down: bool) -> Tensor:
    return parents.new_empty((5, parents.shape[0] + 1))


def _autograd_tree(
    keyset: Any, cell: str, x: Tensor | None, params: list[Tensor], schedule: Tensor, save: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    no_transforms(x, *params)
    if not wants_grad(*params, *([] if x is None else [x])):
        unchanged: tuple[Tensor, list[Tensor], list[Tensor]]
        unchanged = below_autograd(keyset, torch.ops.fastrnn.tree.default, cell, x, params, schedule, save)
        return unchanged
    S = TREE_CELLS[cell].states
    apply: Any = TreeFunction.apply
    out = apply(cell, schedule, x, *params)
    return out[0], list(out[1:S]), list(out[S:]) if save else []


def _autograd_backward(
    keyset: Any,
    cell: str,
    dh: Tensor | None,
    dstates: list[Tensor],
    x: Tensor | None,
    params: list[Tensor],
    schedule: Tensor,
    h: Tensor,
    states: list[Tensor],
    saved: list[Tensor],
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, list[Tensor]]:
    given = present((dh, *dstates))
    no_transforms(*given, x, *params)
    if not wants_grad(*given, *params, *([] if x is None else [x])):
        unchanged: tuple[Tensor, list[Tensor]] = below_autograd(
            keyset,
            torch.ops.fastrnn.tree_backward.default,
            *(cell, dh, dstates, x, params, schedule, h, states, saved, need_x, need_params),
        )
        return unchanged
    with_x = x is not None
    dense = [torch.zeros_like(h) if dh is None else dh, *(dstates or map(torch.zeros_like, states))]
    primals = [x, *params] if with_x else params
    apply: Any = _TreeBackward.apply
    found = apply(cell, with_x, need_x and with_x, schedule, [h, *states, *saved], *dense, *primals)
    dx = found[0] if need_x and with_x else params[0].new_empty(0)
    return dx, list(found[with_x:]) if need_params else []


def _tree_flops(cell: Any, x: Any, params: Any, schedule: Any, *rest: Any, **options: Any) -> int:
    """Of the matrix products, for torch.utils.flop_counter, as if every node were another's child."""
    rows = 2 * (schedule[1] - 1)
    slots = 1 if TREE_CELLS[cell].summed else params[1][1] // (params[0][0] // TREE_CELLS[cell].gates)
    return int(rows * ((math.prod(params[0]) if x is not None else 0) + math.prod(params[1]) // slots))


def _tree_backward_flops(
    cell: Any, dh: Any, dstates: Any, x: Any, params: Any, schedule: Any, *rest: Any, **options: Any
) -> int:
    return 2 * _tree_flops(cell, x, params, schedule)


if LOADED:
    register_flops("tree", _tree_flops)
    register_flops("tree_backward", _tree_backward_flops)
    _LIBRARY = torch.library.Library("fastrnn", "IMPL")
    torch.library.register_fake("fastrnn::tree", _fake_tree)
    torch.library.register_fake("fastrnn::tree_backward", _fake_tree_backward)
    torch.library.register_fake("fastrnn::tree_slots", _fake_slots)
    torch.library.register_fake("fastrnn::tree_schedule", _fake_schedule)
    _LIBRARY.impl("tree", _autograd_tree, "Autograd", with_keyset=True)
    _LIBRARY.impl("tree_backward", _autograd_backward, "Autograd", with_keyset=True)

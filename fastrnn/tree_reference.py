"""The plain reference of the recursive cells: level by level in readable PyTorch, on any device and dtype.

It is the last fallback and the formula behind double backward, and shares none of the kernels' code; the
tests set it beside a recursion over nodes. Made of out-of-place torch operations only, so autograd and
`torch.func` pass through it.

Dimensions: N nodes, E edges, I input, H hidden, G gates, A slots (the arity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .forest import Steps
from .reference import under_autocast


@dataclass(frozen=True)
class TreeCell:
    """What the outside knows of a recursive cell."""

    gates: int  # of the input: w_ih [G*H, I]
    states: int
    summed: bool  # children are summed, whatever their slots; else each slot has weights of its own

    def hidden(self, w_ih: Tensor) -> int:
        return w_ih.shape[0] // self.gates

    def arity(self, w_ih: Tensor, w_hh: Tensor) -> int:
        """The slots that w_hh has weights for; 0: any number."""
        return 0 if self.summed else w_hh.shape[1] // max(1, self.hidden(w_ih))

    def weight_hh(self, hidden: int, arity: int) -> tuple[int, int]:
        """The shape of w_hh."""
        if self.summed:
            return self.gates * hidden, hidden
        return (hidden if self.states == 1 else (3 + arity) * hidden), arity * hidden


# csrc/cpu/tree_kernels.h has the names on the C++ side.
TREE_CELLS: dict[str, TreeCell] = {
    "child_sum_lstm": TreeCell(4, 2, True),
    "nary_lstm": TreeCell(4, 2, False),
    "tree_rnn_tanh": TreeCell(1, 1, False),
    "tree_rnn_relu": TreeCell(1, 1, False),
}


@dataclass(frozen=True)
class _Edges:
    """The edges into one level."""

    states: tuple[Tensor, ...]  # of their sources, [E, H]
    target: Tensor  # [E] the place in the level
    slot: Tensor  # [E]


def _summed(values: Tensor, edges: _Edges, count: int) -> Tensor:
    """[E, H] -> [count, H], over the edges into each node."""
    return values.new_zeros(count, values.shape[1]).index_add(0, edges.target, values)


def _by_slot(values: Tensor, edges: _Edges, count: int, arity: int) -> Tensor:
    """[E, H] -> [count, A*H], zeros where a child is missing."""
    H = values.shape[1]
    rows = values.new_zeros(count * arity, H).index_copy(0, edges.target * arity + edges.slot, values)
    return rows.view(count, arity * H)


def _lstm(gx: Tensor, gates: Tensor, forget: Tensor, edges: _Edges | None) -> tuple[Tensor, ...]:
    """Tai 2015, eq. 3 to 8, 9 to 14: h, c. Recurrent parts: gates [n, 3*H] of i, g, o; forget [E, H]."""
    xi, xf, xg, xo = gx.chunk(4, -1)
    i, g, o = (torch.stack((xi, xg, xo)) + gates.unflatten(1, (3, -1)).movedim(1, 0)).unbind()
    c = i.sigmoid() * g.tanh()
    if edges is not None:
        f = (xf.index_select(0, edges.target) + forget).sigmoid()
        c = c + _summed(f * edges.states[1], edges, gx.shape[0])
    return o.sigmoid() * c.tanh(), c


def _child_sum_lstm(gx: Tensor, R: Tensor, arity: int, edges: _Edges | None) -> tuple[Tensor, ...]:
    H = R.shape[1]
    if edges is None:
        return _lstm(gx, gx.new_zeros(gx.shape[0], 3 * H), gx, None)
    i, f, go = R.split((H, H, 2 * H))
    total = _summed(edges.states[0], edges, gx.shape[0])
    return _lstm(gx, linear(total, torch.cat((i, go))), linear(edges.states[0], f), edges)


def _nary_lstm(gx: Tensor, R: Tensor, arity: int, edges: _Edges | None) -> tuple[Tensor, ...]:
    n, H = gx.shape[0], gx.shape[1] // 4
    if edges is None:
        return _lstm(gx, gx.new_zeros(n, 3 * H), gx, None)
    gates = linear(_by_slot(edges.states[0], edges, n, arity), R)  # [n, (3+A)*H]
    i, f, go = gates.split((H, arity * H, 2 * H), 1)
    forget = f.reshape(n * arity, H).index_select(0, edges.target * arity + edges.slot)
    return _lstm(gx, torch.cat((i, go), 1), forget, edges)


def _tree_rnn(gx: Tensor, R: Tensor, arity: int, edges: _Edges | None) -> Tensor:
    """What Socher's network applies its function to."""
    return gx if edges is None else gx + linear(_by_slot(edges.states[0], edges, gx.shape[0], arity), R)


def _step(cell: str, gx: Tensor, R: Tensor, arity: int, edges: _Edges | None) -> tuple[Tensor, ...]:
    if cell == "child_sum_lstm":
        return _child_sum_lstm(gx, R, arity, edges)
    if cell == "nary_lstm":
        return _nary_lstm(gx, R, arity, edges)
    pre = _tree_rnn(gx, R, arity, edges)
    return (pre.tanh() if cell == "tree_rnn_tanh" else pre.relu(),)


def tree(cell: str, x: Tensor | None, params: Sequence[Tensor], steps: Steps) -> tuple[Tensor, ...]:
    """The states of every node: h and, by cell, c, each [N, H].

    cell     a name of TREE_CELLS
    x        [N, I], or None where nodes have no input
    params   w_ih [G*H, I], w_hh and, where there are biases, b_ih, b_hh [G*H]
    """
    device = params[0].device
    if under_autocast(device):
        with torch.autocast(device.type, enabled=False):
            return tree(cell, x, params, steps)
    if params[0].dtype in (torch.float16, torch.bfloat16):
        # As in the kernels: 16 bits are for what is kept, the arithmetic is float32's, rounded once.
        wide = tree(cell, None if x is None else x.float(), [p.float() for p in params], steps)
        return tuple(s.to(params[0].dtype) for s in wide)
    spec, (w_ih, R, *biases) = TREE_CELLS[cell], params
    N, H, arity = steps.inverse.numel(), spec.hidden(w_ih), spec.arity(w_ih, R)
    bias = biases[0] + biases[1] if biases else None
    if x is not None:
        gx = linear(x, w_ih, bias)
    else:
        row = w_ih.new_zeros(w_ih.shape[0]) if bias is None else bias
        gx = row.expand(N, w_ih.shape[0])
    if N == 0:
        return (gx[:, :H],) * spec.states
    levels: list[tuple[Tensor, ...]] = []
    arrived: list[list[tuple[Tensor, ...]]] = [[] for _ in steps.nodes]
    for level, nodes in enumerate(steps.nodes):
        edges = None
        if arrived[level]:
            sources = tuple(torch.cat(parts) for parts in zip(*arrived[level], strict=True))
            edges = _Edges(sources, steps.targets[level], steps.slots[level])
            arrived[level] = []
        new = _step(cell, gx.index_select(0, nodes), R, arity, edges)
        levels.append(new)
        sent = [s.index_select(0, steps.send[level]).split(steps.pieces[level]) for s in new]
        for to, *parts in zip(steps.to[level], *sent, strict=True):
            arrived[to].append(tuple(parts))
    return tuple(torch.cat(column).index_select(0, steps.inverse) for column in zip(*levels, strict=True))

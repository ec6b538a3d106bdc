"""Forests: any number of trees of any shape as flat arrays, and the order in which cells visit their nodes.

Dimensions: N nodes, L levels, E edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import kernels

DIRECTIONS = ("up", "down")


def is_direction(direction: object) -> str:
    """ "up" or "down"; ValueError for anything else."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be 'up' or 'down', got {direction!r}")
    return str(direction)


def _indices(name: str, values: Tensor | Sequence[int], count: int | None = None, of: str = "node") -> Tensor:
    """`values` as a LongTensor [count] on the CPU."""
    if not isinstance(values, Tensor):
        if not isinstance(values, Iterable):
            raise ValueError(f"{name} must be a LongTensor [N] or integers, got {type(values).__name__}")
        numbers = list(values)
        for i, value in enumerate(numbers):
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise ValueError(f"{name} must be integers: that of {of} {i} is {value!r}")
            numbers[i] = int(value)
            if abs(numbers[i]) >= 2**63:
                raise ValueError(f"{name} must be integers of 64 bits: that of {of} {i} is {value!r}")
        values = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    if values.dim() != 1:
        several = f": node 0 has {values[0].numel()}" if values.dim() > 1 and values.shape[0] else ""
        raise ValueError(f"{name} must be [N], one for each node, got {list(values.shape)}{several}")
    if values.dtype != torch.int64:
        first = f" (that of node 0 is {values[0].item()})" if values.numel() else ""
        raise ValueError(f"{name} must be a LongTensor [N], got {values.dtype}{first}")
    if count is not None and values.numel() != count:
        raise ValueError(
            f"{name} must be [{count}], one for each node, got [{values.numel()}]: "
            f"node {min(count, values.numel())} has "
            + ("none" if values.numel() < count else "one, and does not exist")
        )
    return values.detach().cpu().clone(memory_format=torch.contiguous_format)  # the caller's may change


def _rows(name: str, values: Tensor, count: int, of: str) -> None:
    """ValueError unless there is a row for each."""
    if values.dim() == 0 or values.shape[0] != count:
        raise ValueError(f"{name} takes a row for each of {count} {of}, got {list(values.shape)}")


def _local(parents: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
    """Parents that are counted within each tree, as rows of the forest."""
    sizes = _indices("lengths", lengths, of="tree")
    if sizes.numel() and int(sizes.min()) < 1:
        tree = int((sizes < 1).nonzero()[0])
        raise ValueError(f"lengths must be at least 1, that of tree {tree} is {int(sizes[tree])}")
    if int(sizes.sum()) != parents.numel():
        raise ValueError(f"lengths must sum to the {parents.numel()} nodes, got {int(sizes.sum())}")
    starts = sizes.cumsum(0) - sizes
    own = sizes.repeat_interleave(sizes)
    outside = ((parents < -1) | (parents >= own)).nonzero()
    if outside.numel():
        node = int(outside[0])
        tree = int(torch.searchsorted(starts, node, right=True)) - 1
        raise ValueError(
            f"the parent of node {node} is {int(parents[node])}, tree {tree} has nodes 0 to "
            f"{int(sizes[tree]) - 1} (-1: a root)"
        )
    shifted = torch.where(parents < 0, parents, parents + starts.repeat_interleave(sizes))
    roots = (parents < 0).nonzero().squeeze(1)
    trees = torch.searchsorted(starts, roots, right=True) - 1
    extra = (trees[1:] == trees[:-1]).nonzero()
    if extra.numel():
        node, tree = int(roots[extra[0] + 1]), int(trees[extra[0] + 1])
        raise ValueError(f"node {node} is a second root of tree {tree}, whose root is {int(roots[extra[0]])}")
    return shifted


@dataclass(frozen=True)
class Steps:
    """A schedule as the plain reference reads it, level by level; lists are one entry a level.

    The rows of a level's outgoing edges are taken from its states at once (`send`), and fall into pieces by
    the level that receives them; a level's incoming edges are the pieces that came, one after another. So
    nothing is copied twice, however many levels there are.
    """

    nodes: list[Tensor]  # the rows of x
    send: list[Tensor]  # of each outgoing edge, the place of its source in the level
    pieces: list[list[int]]  # how many of them go to each level of `to`
    to: list[list[int]]
    targets: list[Tensor]  # of each incoming edge, the place of its target in the level
    slots: list[Tensor]
    inverse: Tensor  # [N] where the rows, level after level, go


def schedule_steps(schedule: Tensor, device: torch.device) -> Steps:
    N = schedule.shape[1] - 1
    order, first = schedule[0, :N], schedule[2]
    offsets = torch.unique(schedule[1])  # [L + 1], N at the end; of no nodes [0]
    E = int(first[N])
    source, slots = schedule[3, :E], schedule[4, :E]
    sizes = offsets.diff()
    L = sizes.numel()
    position = torch.empty_like(order)
    position[order] = torch.arange(N, device="cpu")
    level = torch.arange(L, device="cpu").repeat_interleave(sizes)  # of a position
    start = position[source]
    end = torch.arange(N, device="cpu").repeat_interleave(first.diff())
    leaves_from, goes_to = level[start], level[end]
    sent = torch.argsort(leaves_from * L + goes_to, stable=True)
    received = torch.argsort(goes_to * L + leaves_from, stable=True)
    outgoing = torch.bincount(leaves_from, minlength=L).tolist()
    incoming = torch.bincount(goes_to, minlength=L).tolist()
    pairs, counts = torch.unique_consecutive((leaves_from * L + goes_to)[sent], return_counts=True)
    pieces: list[list[int]] = [[] for _ in range(L)]
    to: list[list[int]] = [[] for _ in range(L)]
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        pieces[pair // L].append(count)
        to[pair // L].append(pair % L)

    def split(values: Tensor, counts: list[int]) -> list[Tensor]:
        return list(values.to(device).split(counts)) if counts else []

    return Steps(
        nodes=split(order, sizes.tolist()),
        send=split(start[sent] - offsets[leaves_from[sent]], outgoing),
        pieces=pieces,
        to=to,
        targets=split(end[received] - offsets[goes_to[received]], incoming),
        slots=split(slots[received], incoming),
        inverse=position.to(device),
    )


class Forest:
    """Any number of trees of any shape and arity, made by `from_parents`, `from_nested` or `batch`.

    Rows of x and h are in the order of the nodes. The schedules (the levels of either direction, computed in
    C++ in O(N) without recursion) belong to the forest: make one once and use it often. Nothing changes a
    forest.

    parents    LongTensor [N], -1 at a root
    slots      LongTensor [N]: which child of its parent a node is, from 0
    roots      LongTensor [trees]: the roots' rows, in increasing order
    leaves     LongTensor [leaves]: the rows of nodes without children, in increasing order
    arity      what a cell needs at least: one more than the highest slot; 0 where all nodes are roots
    device     where these tensors lie, and the inputs of a call are expected
    num_nodes  N
    num_trees  how many roots there are
    """

    def __init__(self, parents: Tensor, slots: Tensor | None) -> None:
        """parents, slots: LongTensor [N] on the CPU. Use `from_parents`, which checks its arguments."""
        if not kernels.LOADED:
            raise RuntimeError(
                f"a Forest needs fastrnn's compiled library, which is not loaded: {kernels.LOAD_ERROR}"
            )
        slots, problem = torch.ops.fastrnn.tree_slots(parents, slots)
        kind, node, other = problem.tolist()
        if kind:
            raise ValueError(
                (
                    f"the parent of node {node} is {other}, there are nodes 0 to {parents.numel() - 1} "
                    "(-1: a root)",
                    f"node {node} lies on a cycle: following the parents from it (first {other}) leads back",
                    f"the slot of node {node} is {other}, it must be at least 0",
                    f"nodes {other} and {node} have the same parent {int(parents[node])} and the same slot "
                    f"{int(slots[node])}",
                )[kind - 1]
            )
        children = parents[parents >= 0]
        inner = torch.zeros_like(parents, dtype=torch.bool).index_fill(0, children, True)
        self.parents, self.slots = parents, slots
        self.roots = (parents < 0).nonzero().squeeze(1)
        self.leaves = (~inner).nonzero().squeeze(1)
        self.arity = int(slots[parents >= 0].max()) + 1 if children.numel() else 0
        self._own = parents, slots  # on the CPU
        # Both now: at the first call a tracer might be at work, whose tensors must not be kept.
        self._schedules = {d: torch.ops.fastrnn.tree_schedule(*self._own, d == "down") for d in DIRECTIONS}
        self._steps: dict[tuple[str, torch.device], Steps] = {}

    @staticmethod
    def from_parents(
        parents: Tensor | Sequence[int],
        *,
        lengths: Tensor | Sequence[int] | None = None,
        slots: Tensor | Sequence[int] | None = None,
    ) -> Forest:
        """A forest from each node's parent.

        parents  LongTensor [N], -1 at a root; nodes in any order, any number of trees
        lengths  LongTensor [trees]: parents counts within each tree, the trees stand one after another
        slots    LongTensor [N]: which child of its parent a node is, from 0 (what stands at a root is not
                 read); default: children in increasing node number
        Raises ValueError, naming the node, for a parent out of range, a cycle, two children in one slot, a
        tree of `lengths` with two roots, and anything but integers.
        """
        own = _indices("parents", parents)
        if lengths is not None:
            own = _local(own, lengths)
        return Forest(own, None if slots is None else _indices("slots", slots, own.numel()))

    @staticmethod
    def from_nested(nested: Any) -> Forest:
        """A forest from nested tuples, (((a, b), c), d): a tuple is an inner node, anything else a leaf.

        nested: one such tree, or a list of them. Nodes are numbered in post-order, so `leaves` are the
        leaves from left to right. Raises ValueError for a tuple without children, naming its node.
        """
        parents: list[int] = []
        for tree in nested if isinstance(nested, list) else [nested]:
            # The tuples that are open, each with its children's numbers so far; no recursion: trees are deep.
            todo: list[tuple[tuple[Any, ...], list[int]]] = []
            item = tree
            while True:
                if isinstance(item, tuple) and item:
                    todo.append((item, []))
                    item = item[0]
                    continue
                if isinstance(item, tuple):
                    raise ValueError(f"node {len(parents)} is (): an inner node needs a child")
                node = len(parents)
                parents.append(-1)
                while todo:
                    open_tuple, numbers = todo[-1]
                    numbers.append(node)
                    if len(numbers) < len(open_tuple):
                        break
                    todo.pop()
                    node = len(parents)
                    parents.append(-1)
                    for child in numbers:
                        parents[child] = node
                if not todo:
                    break
                item = todo[-1][0][len(todo[-1][1])]
        return Forest(torch.tensor(parents, dtype=torch.int64, device="cpu"), None)

    @staticmethod
    def batch(forests: Sequence[Forest]) -> Forest:
        """One forest of several: their nodes one after another, on the first one's device.

        Raises TypeError for what is no Forest, ValueError where they lie on different devices.
        """
        forests = list(forests)
        for i, forest in enumerate(forests):
            if not isinstance(forest, Forest):
                raise TypeError(f"batch takes Forests, that at {i} is a {type(forest).__name__}")
            if forest.device != forests[0].device:
                raise ValueError(f"forest {i} is on {forest.device}, forest 0 on {forests[0].device}")
        parents, start = [], 0
        for forest in forests:
            own = forest._own[0]
            parents.append(torch.where(own < 0, own, own + start))
            start += own.numel()
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        batched = Forest(torch.cat([none, *parents]), torch.cat([none, *(f._own[1] for f in forests)]))
        return batched.to(forests[0].device) if forests else batched

    def to(self, device: torch.device | str) -> Forest:
        """This forest with what `roots`, `leaves` and the like return on a device; itself if they are there.

        The schedules are shared.
        """
        parents = self.parents.to(device)
        if parents is self.parents:
            return self
        moved = copy(self)
        moved.parents = parents
        for name in ("slots", "roots", "leaves"):
            setattr(moved, name, getattr(self, name).to(parents.device))
        return moved

    @property
    def device(self) -> torch.device:
        return self.parents.device

    @property
    def num_nodes(self) -> int:
        return self.parents.shape[0]

    @property
    def num_trees(self) -> int:
        return self.roots.shape[0]

    @property
    def levels(self) -> list[Tensor]:
        """The nodes by height, a LongTensor a level: the leaves first, then those whose highest child is one
        below."""
        schedule = self.schedule("up")
        sizes = torch.unique(schedule[1]).diff().tolist()
        return list(schedule[0, :-1].to(self.device).split(sizes)) if sizes else []

    def check_arity(self, arity: int) -> None:
        """ValueError, naming the node, where a node has a child in slot `arity` or higher."""
        if self.arity <= arity:
            return
        parents, slots = self._own
        child = int(((slots >= arity) & (parents >= 0)).nonzero()[0])
        raise ValueError(
            f"node {int(parents[child])} has a child, node {child}, in slot {int(slots[child])}; "
            f"a cell of arity {arity} has slots 0 to {arity - 1}"
        )

    def at_roots(self, h: Tensor) -> Tensor:
        """[N, ...] -> [trees, ...]: each tree's root, in the order of `roots`. ValueError for
        other than N rows."""
        _rows("at_roots", h, self.num_nodes, "nodes")
        return h.index_select(0, self.roots)

    def at_leaves(self, h: Tensor) -> Tensor:
        """[N, ...] -> [leaves, ...], in the order of `leaves`. ValueError for other than N rows."""
        _rows("at_leaves", h, self.num_nodes, "nodes")
        return h.index_select(0, self.leaves)

    def from_leaves(self, x: Tensor) -> Tensor:
        """[leaves, ...] in the order of `leaves` -> [N, ...], zeros at inner nodes. ValueError for another
        number of rows."""
        _rows("from_leaves", x, self.leaves.shape[0], "leaves")
        return x.new_zeros(self.num_nodes, *x.shape[1:]).index_copy(0, self.leaves, x)

    def schedule(self, direction: str) -> Tensor:
        """LongTensor [5, N + 1] on the CPU, as csrc/tree.h lays it out."""
        schedule: Tensor = self._schedules[is_direction(direction)]
        return schedule

    def steps(self, direction: str) -> Steps:
        """The schedule as the plain reference reads it, on this forest's device; computed at the first call,
        which must not stand in a compiled graph (RuntimeError)."""
        key = (direction, self.device)
        if key not in self._steps:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "torch.func and the reference take a forest level by level, which no compiled graph can "
                    f"work out: call forest.steps({direction!r}) before"
                )
            # What is kept outlives a transform of torch.func that asks first: it must be none of its tensors.
            with torch._C._DisableFuncTorch():
                self._steps[key] = schedule_steps(self.schedule(direction), self.device)
        return self._steps[key]

    def __reduce__(self) -> Any:
        return _restored, (*self._own, self.device)

    def __copy__(self) -> Forest:
        other = object.__new__(Forest)
        other.__dict__.update(self.__dict__)
        return other

    def __repr__(self) -> str:
        device = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return f"Forest(num_trees={self.num_trees}, num_nodes={self.num_nodes}{device})"


def _restored(parents: Tensor, slots: Tensor, device: torch.device) -> Forest:
    """What pickle makes of a forest: what it computes is computed again."""
    return Forest(parents, slots).to(device)

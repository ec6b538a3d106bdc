"""Recursive cells beside what people write without them: a Python recursion over torch.nn modules."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench import rivals
from fastrnn.bench.grid import MODES, Case, Shape
from fastrnn.bench.machine import CpuClock
from fastrnn.bench.records import Probe, standard_error

SHAPE = Shape(40, 256, 150, 150)  # nodes of a tree, trees
CELLS = {"lstm": fastrnn.ChildSumTreeLSTM, "rnn": fastrnn.TreeRNN}
RECURSION = "recursion"


class Recursion(nn.Module):
    """A ChildSumTreeLSTM or binary TreeRNN as a recursion over nodes, of torch.nn's modules, with a layer's
    weights."""

    def __init__(self, layer: fastrnn.ChildSumTreeLSTM | fastrnn.TreeRNN) -> None:
        super().__init__()
        self.hidden_size, self.lstm = layer.hidden_size, isinstance(layer, fastrnn.ChildSumTreeLSTM)
        bias = layer.bias_ih + layer.bias_hh
        if self.lstm:
            W, U, b = (t.detach().chunk(4) for t in (layer.weight_ih, layer.weight_hh, bias))
            self.gates = self.linear(torch.cat((W[0], *W[2:])), torch.cat((b[0], *b[2:])))
            self.recurrent = self.linear(torch.cat((U[0], *U[2:])))
            self.forget, self.recurrent_forget = self.linear(W[1], b[1]), self.linear(U[1])
        else:
            self.gates = self.linear(layer.weight_ih.detach(), bias.detach())
            self.recurrent = self.linear(layer.weight_hh.detach())

    @staticmethod
    def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
        made.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        return made

    def node(self, x: Tensor, children: Sequence[Sequence[int]], n: int, found: list[Any]) -> Any:
        below = [self.node(x, children, k, found) for k in children[n]]
        found[n] = self.lstm_node(x[n], below) if self.lstm else self.rnn_node(x[n], below)
        return found[n]

    def lstm_node(self, x: Tensor, below: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        gates = self.gates(x)
        if below:
            h, c = (torch.stack(states) for states in zip(*below, strict=True))
            gates = gates + self.recurrent(h.sum(0))
        i, g, o = gates.chunk(3)
        cell = torch.sigmoid(i) * torch.tanh(g)
        if below:
            cell = cell + (torch.sigmoid(self.forget(x) + self.recurrent_forget(h)) * c).sum(0)
        return torch.sigmoid(o) * torch.tanh(cell), cell

    def rnn_node(self, x: Tensor, below: list[Tensor]) -> Tensor:
        total = self.gates(x)
        if below:
            missing = [x.new_zeros(self.hidden_size)] * (2 - len(below))
            total = total + self.recurrent(torch.cat([*below, *missing]))
        return torch.tanh(total)

    def forward(self, x: Tensor, children: Sequence[Sequence[int]], roots: Sequence[int]) -> Tensor:
        """h of every node, [N, H]."""
        found: list[Any] = [None] * len(children)
        for root in roots:
            self.node(x, children, root, found)
        return torch.stack([s[0] for s in found] if self.lstm else found)


def children_of(forest: fastrnn.Forest) -> tuple[list[list[int]], list[int]]:
    """Each node's children, and the roots: what a program with trees of objects has at hand."""
    children: list[list[int]] = [[] for _ in range(forest.num_nodes)]
    for node, parent in enumerate(forest.parents.tolist()):
        if parent >= 0:
            children[parent].append(node)
    return children, forest.roots.tolist()


def random_forest(nodes: int, trees: int, seed: int = 0) -> fastrnn.Forest:
    """Trees of so many nodes that have at most two children, each grown at a random free place."""
    rng, parents = random.Random(seed), []
    for _ in range(trees):
        start, free = len(parents), [0, 0]
        parents.append(-1)
        for node in range(1, nodes):
            parents.append(start + free.pop(rng.randrange(len(free))))
            free += [node, node]
    return fastrnn.Forest.from_parents(parents)


class Pass:
    """Forward, or forward and backward to the parameters and the input."""

    def __init__(self, case: Case, module: nn.Module, *arguments: Any) -> None:
        self.module, self.arguments, self.training = module, arguments, case.mode == "training"
        rows = case.shape.T * case.shape.B
        self.x = torch.randn(rows, case.shape.I, generator=torch.Generator().manual_seed(1))
        self.x.requires_grad_(self.training)

    def __call__(self) -> Tensor:
        with torch.set_grad_enabled(self.training):
            out = self.module(self.x, *self.arguments)
            h: Tensor = out[0] if isinstance(out, tuple) else out
            if self.training:
                for leaf in (self.x, *self.module.parameters()):
                    leaf.grad = None
                h.sum().backward()
        return h


def calls(case: Case) -> dict[str, rivals.Call]:
    torch.manual_seed(0)
    layer = CELLS[case.cell](case.shape.I, case.shape.H)
    forest = random_forest(case.shape.T, case.shape.B)
    return {
        rivals.OURS: Pass(case, layer, forest),
        RECURSION: Pass(case, Recursion(layer), *children_of(forest)),
    }


def measure(cells: tuple[str, ...], seconds: float = 12.0) -> list[Probe]:
    """How many times as fast a forest is as the recursion over its nodes."""
    probes = []
    for case in (Case(*row, SHAPE, "trees") for row in product(CELLS, MODES) if row[0] in cells):
        made = calls(case)
        torch.testing.assert_close(made[rivals.OURS](), made[RECURSION](), rtol=1e-4, atol=1e-5)
        clock = CpuClock()
        took = rivals.alternate(made, seconds)
        ours, theirs = took[rivals.OURS], took[RECURSION]
        gain = statistics.median(theirs) / statistics.median(ours)
        probes.append(Probe("trees", case, gain, 1.0, clock.read(), standard_error(theirs, ours)))
    return probes

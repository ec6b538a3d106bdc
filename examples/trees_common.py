"""What the examples of recursive networks share: a classifier of trees, its training, and the same layer as a
Python recursion beside it."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench.trees import Recursion, children_of


@dataclass(frozen=True)
class Tree:
    """Nodes with their parents (-1: the root, which is node 0), tokens, and labels (-1: none)."""

    parents: list[int]
    tokens: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    forest: fastrnn.Forest
    tokens: Tensor  # [N]
    labels: Tensor  # [N]

    @staticmethod
    def of(trees: Sequence[Tree]) -> Batch:
        forest = fastrnn.Forest.from_parents(
            torch.tensor([parent for tree in trees for parent in tree.parents]),
            lengths=torch.tensor([len(tree.parents) for tree in trees]),
        )
        tokens, labels = (
            torch.tensor([value for tree in trees for value in getattr(tree, name)])
            for name in ("tokens", "labels")
        )
        return Batch(forest, tokens, labels)


class Classifier(nn.Module):
    """A label for every node, from its subtree: embedding, ChildSumTreeLSTM, a linear layer."""

    def __init__(self, vocabulary: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.tree = fastrnn.ChildSumTreeLSTM(hidden, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, batch: Batch) -> Tensor:
        h, _ = self.tree(self.embedding(batch.tokens), batch.forest)
        return self.head(h)  # [N, classes]


def batches(trees: Sequence[Tree], size: int, rng: random.Random | None = None) -> Iterator[Batch]:
    order = list(range(len(trees)))
    if rng:
        rng.shuffle(order)
    for i in range(0, len(order), size):
        yield Batch.of([trees[k] for k in order[i : i + size]])


@torch.no_grad()
def root_accuracy(model: Classifier, trees: Sequence[Tree], size: int = 256) -> float:
    """The share of trees whose root gets exactly its label."""
    right = 0
    for batch in batches(trees, size):
        at = batch.forest.roots
        right += int((model(batch)[at].argmax(1) == batch.labels[at]).sum())
    return right / len(trees)


def train(
    model: Classifier, trees: Sequence[Tree], held_out: Sequence[Tree], epochs: int, size: int, rate: float
) -> float:
    """Trains on every labelled node; returns the accuracy on the held-out roots."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    steps = epochs * -(-len(trees) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    rng, accuracy = random.Random(0), 0.0
    for epoch in range(epochs):
        start, nodes, total = time.perf_counter(), 0, 0.0
        for batch in batches(trees, size, rng):
            loss = nn.functional.cross_entropy(model(batch), batch.labels, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            nodes += batch.forest.num_nodes
            total += loss.item() * len(batch.labels)
        took = time.perf_counter() - start
        accuracy = root_accuracy(model, held_out)
        print(
            f"epoch {epoch + 1}: loss {total / nodes:.3f}, held-out accuracy {accuracy:.3f}, "
            f"{nodes / took:,.0f} nodes/s",
            flush=True,
        )
    return accuracy


def beside_recursion(model: Classifier, trees: Sequence[Tree], rounds: int = 3) -> None:
    """The layer beside a Python recursion over torch.nn modules: the same numbers, and how long both take for
    forward and backward. Raises RuntimeError where the numbers differ."""
    batch = Batch.of(trees)
    x = model.embedding(batch.tokens).detach().requires_grad_()
    recursion, arguments = Recursion(model.tree), children_of(batch.forest)

    def ours() -> tuple[Tensor, Tensor]:
        h = model.tree(x, batch.forest)[0]
        return h.detach(), torch.autograd.grad(h.square().sum(), [x, *model.tree.parameters()])[0]

    def theirs() -> tuple[Tensor, Tensor]:
        h = recursion(x, *arguments)
        return h.detach(), torch.autograd.grad(h.square().sum(), [x, *recursion.parameters()])[0]

    took: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, call in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
    for name, a, b in zip(("h", "its gradient"), ours(), theirs(), strict=True):
        difference = float((a - b).abs().max() / b.abs().max())
        if not difference < 1e-4:
            raise RuntimeError(f"{name} differs from the recursion's by {difference}")
    fast, slow = (statistics.median(took[name]) for name in ("ours", "theirs"))
    print(
        f"{len(trees)} trees, {batch.forest.num_nodes} nodes, forward and backward: Python recursion "
        f"{slow * 1e3:.1f} ms, fastrnn {fast * 1e3:.1f} ms: {slow / fast:.0f} times as fast, the same numbers"
    )

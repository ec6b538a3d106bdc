"""Recursive cells: a plain recursion over nodes, torch.nn's sequences, and the plain reference agree."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import TIGHT, Fresh
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trees import (
    CELLS,
    F64,
    SHAPES,
    caterpillar,
    derivatives,
    forest,
    forests,
    make,
    random_tree,
    recursion,
    states,
)

import fastrnn
from fastrnn import kernels

cells = pytest.mark.parametrize("cell", CELLS)
directions = pytest.mark.parametrize("direction", ["up", "down"])


def inputs(n, width, grad=True):
    return torch.randn(n, width, dtype=F64, generator=torch.Generator().manual_seed(n)).requires_grad_(grad)


def agree(ours, theirs, leaves, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or TIGHT))
    # One side may be looked at again.
    for a, b in zip(derivatives(ours, leaves, True), derivatives(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or TIGHT))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@directions
@cells
@settings(max_examples=15, deadline=None)
@given(shape=forests(), bias=st.booleans(), with_x=st.booleans(), H=st.sampled_from([1, 3, 9]))
@example(shape=([], []), bias=True, with_x=True, H=3)
@example(shape=([-1], [0]), bias=True, with_x=False, H=3)
@example(shape=([1, 2, -1], [2, 2, 0]), bias=False, with_x=False, H=3)
def test_parity_with_recursion(cell, direction, backend, shape, bias, with_x, H):
    """Values and gradients to 1e-12 on chains, stars, binary trees, caterpillars and random trees."""
    layer = make(cell, 2, H, bias=bias, direction=direction)
    x = inputs(len(shape[0]), 2) if with_x else None
    leaves = [*layer.parameters(), *([x] if with_x else [])]
    with fastrnn.backend(backend):
        ours = states(layer, x, forest(*shape))
        theirs = recursion(layer, x, *shape)
        agree(ours, theirs, leaves)


@directions
@cells
@settings(max_examples=10, deadline=None)
@given(shape=forests(), rng=st.randoms(use_true_random=False))
def test_numbering_does_not_matter(cell, direction, shape, rng):
    """Nodes renumbered with their slots get the same states."""
    parents, slots = shape
    new = list(range(len(parents)))
    rng.shuffle(new)
    renumbered, moved = [0] * len(new), [0] * len(new)
    for node, number in enumerate(new):
        renumbered[number] = -1 if parents[node] < 0 else new[parents[node]]
        moved[number] = slots[node]
    layer, x = make(cell, 2, 5, direction=direction), inputs(len(new), 2, grad=False)
    places = torch.tensor(new, dtype=torch.int64)
    shuffled = torch.empty_like(x).index_copy(0, places, x)
    for a, b in zip(
        states(layer, x, forest(*shape)), states(layer, shuffled, forest(renumbered, moved)), strict=True
    ):
        torch.testing.assert_close(a, b[places], **TIGHT)


@pytest.mark.parametrize("H", [1, 33, 80])
@pytest.mark.parametrize("isa", kernels.instruction_sets() or ["none"])
@directions
@cells
def test_each_instruction_set(cell, direction, isa, H, use_isa):
    """Beside the reference, with rows for several tiles, a node of many children, and a wide arity."""
    use_isa(isa)
    rng = random.Random(1)
    parents, slots = random_tree(150, rng)
    # A root of a hundred children, for the cell that takes them.
    extra = 100 if cell == "child_sum" else 3
    parents += [-1, *[150] * extra]
    slots += [0, *range(extra)]
    layer = make(cell, 7, H, direction=direction)
    x, trees = inputs(len(parents), 7), forest(parents, slots)
    leaves = [*layer.parameters(), x]
    ours = states(layer, x, trees)
    with fastrnn.backend("reference"):
        theirs = states(layer, x, trees)
    agree(ours, theirs, leaves, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@cells
def test_float32_errs_no_more_than_the_reference(cell, shape):
    """At most twice the error of the plain reference's float32, both beside float64."""
    trees, wide = forest(*SHAPES[shape](60)), make(cell, 8, 48)
    narrow = make(cell, 8, 48, dtype=torch.float32)
    narrow.load_state_dict(wide.state_dict())
    x = inputs(60, 8)

    def run(layer, backend):
        own = x.detach().to(layer.weight_ih.dtype).requires_grad_()
        with fastrnn.backend(backend):
            out = states(layer, own, trees)
        return [t.detach().double() for t in (*out, *derivatives(out, [*layer.parameters(), own]))]

    for truth, ours, plain in zip(
        run(wide, "reference"), run(narrow, "cpu"), run(narrow, "reference"), strict=True
    ):
        allowed = 2 * (plain - truth).abs().max() + 1e-6 * truth.abs().max()
        assert (ours - truth).abs().max() <= allowed


@directions
@pytest.mark.parametrize("kind", ["child_sum", "nary", "rnn"])
def test_chains_are_sequences(kind, direction):
    """On chains, with the state dict of torch.nn's cell, the layers of fastrnn."""
    I, H, T, B = 3, 5, 7, 4
    tree, sequence, cell = {
        "child_sum": (fastrnn.ChildSumTreeLSTM(I, H), fastrnn.LSTM(I, H), torch.nn.LSTMCell(I, H)),
        "nary": (fastrnn.NaryTreeLSTM(I, H, arity=1), fastrnn.LSTM(I, H), torch.nn.LSTMCell(I, H)),
        "rnn": (fastrnn.TreeRNN(I, H, arity=1), fastrnn.RNN(I, H), torch.nn.RNNCell(I, H)),
    }[kind]
    tree.load_state_dict(cell.state_dict())
    sequence.load_state_dict({f"{name}_l0": p for name, p in cell.state_dict().items()})
    tree.direction = direction
    tree, sequence = tree.double(), sequence.double()
    x = torch.randn(T, B, I, dtype=F64, requires_grad=True)
    # Node t*B + b is step t of sequence b. Up, the state comes from the child: the step before.
    steps = torch.arange(T * B)
    if direction == "up":
        parents = torch.where(steps < (T - 1) * B, steps + B, -1)
    else:
        parents = torch.where(steps >= B, steps - B, -1)
    out = tree(x.flatten(0, 1), fastrnn.Forest.from_parents(parents))
    h = out if kind == "rnn" else out[0]
    y, _ = sequence(x)
    torch.testing.assert_close(h.view(T, B, H), y, **TIGHT)
    ours = derivatives((h.view(T, B, H),), [x, *tree.parameters()])
    theirs = derivatives((y,), [x, *sequence.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@directions
@cells
def test_many_nodes(cell, direction):
    """10^5 nodes in trees of every shape: all beside the reference, some trees beside the recursion."""
    rng, lengths, parents, slots = random.Random(5), [], [], []
    while len(parents) < 100_000:
        n = rng.randrange(1, 20)
        own = rng.choice([*SHAPES.values(), lambda n: random_tree(n, rng)])(n)
        lengths.append(n)
        parents += own[0]
        slots += own[1]
    trees = fastrnn.Forest.from_parents(
        torch.tensor(parents), lengths=torch.tensor(lengths), slots=torch.tensor(slots)
    )
    layer, x = make(cell, 3, 4, direction=direction), inputs(len(parents), 3)
    assert trees.num_trees == len(lengths)
    ours = states(layer, x, trees)
    with torch.no_grad():  # chunk by chunk, nothing kept
        assert all(torch.equal(a, b) for a, b in zip(states(layer, x, trees), ours, strict=True))
    with fastrnn.backend("reference"):
        theirs = states(layer, x, trees)
    agree(ours, theirs, [*layer.parameters(), x], rtol=1e-12, atol=1e-9)  # sums of 10^5 terms
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    for tree in rng.sample(range(len(lengths)), 5):
        rows = slice(int(starts[tree]), int(starts[tree]) + lengths[tree])
        alone = recursion(layer, x[rows], parents[rows], slots[rows])
        agree([s[rows] for s in ours], alone, [*layer.parameters(), x])


def a_long_chain(direction):
    """10^6 nodes, forward and backward."""
    n = 1_000_000
    steps = torch.arange(n)
    trees = fastrnn.Forest.from_parents(torch.where(steps < n - 1, steps + 1, -1))
    layer = fastrnn.ChildSumTreeLSTM(1, 2, direction=direction)
    h, c = layer(torch.randn(n, 1), trees)
    assert torch.equal(trees.schedule(direction)[1], torch.arange(n + 1))  # a level each
    (h.sum() + c.sum()).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@directions
def test_a_chain_of_a_million_nodes(direction):
    """No stack overflows: a process of its own, with the usual 8 MB of stack."""
    Fresh("test_trees.a_long_chain", direction).finish()


def peak_memory(n):
    """Bytes that forward and backward of a caterpillar of n nodes took beyond what there was."""
    import resource

    small = forest(*caterpillar(10))
    layer = fastrnn.NaryTreeLSTM(16, 16)
    layer(torch.randn(10, 16), small)[0].sum().backward()
    trees, x = forest(*caterpillar(n)), torch.randn(n, 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer(x, trees)[0].sum().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def peak_memory_of_slots(arity):
    """The same of the backward pass alone, where each two slots are some node's first and last."""
    import resource

    parents, slots = [], []
    for low in range(arity):
        for high in range(low, arity):
            own = sorted({low, high})
            parents += [-1, *[len(parents)] * len(own)]
            slots += [0, *own]
    h = fastrnn.NaryTreeLSTM(8, 256, arity)(torch.randn(len(parents), 8), forest(parents, slots))[0].sum()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    h.backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def test_memory_is_linear_in_nodes():
    few, many = (int(Fresh("test_trees.peak_memory", n).finish()) for n in (40_000, 160_000))
    # h, c, gates, forget gates and the gradients of all: 20 values of H a node, some of them twice.
    assert many < 160_000 * 16 * 4 * 40
    assert many < 5 * max(few, 40_000 * 16 * 4 * 15)


def test_scratch_is_of_the_widest_pattern_of_slots_not_of_all():
    """Of 136 patterns: 417 MB where each had its own, now 91, of which the weight's gradient is 76."""
    assert int(Fresh("test_trees.peak_memory_of_slots", 16, OMP_NUM_THREADS="1").finish()) < 200 * 2**20


@directions
@cells
def test_bits_do_not_depend_on_threads(cell, direction):
    trees = forest(*random_tree(800, random.Random(2)))
    layer, x = make(cell, 32, 64, dtype=torch.float32, direction=direction), torch.randn(800, 32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            own = x.clone().requires_grad_()
            out = states(layer, own, trees)
            with torch.no_grad():
                inference = states(layer, own, trees)
            found.append([*out, *inference, *derivatives(out, [own, *layer.parameters()])])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_leaves_and_roots_read_out():
    """x at the leaves alone, h of the roots: a sentence's vectors and its meaning."""
    trees = fastrnn.Forest.from_nested([((("the", "cat"), "sat"),), ("it", "rains"), "yes"])
    assert trees.num_trees == 3
    layer = fastrnn.TreeRNN(4, 6).double()
    words = torch.randn(trees.leaves.numel(), 4, dtype=F64)
    x = trees.from_leaves(words)
    torch.testing.assert_close(trees.at_leaves(x), words)
    assert x.count_nonzero() == words.numel()
    h = layer(x, trees)
    torch.testing.assert_close(trees.at_roots(h), h[trees.roots])
    # One tree is what it is alone.
    alone = fastrnn.Forest.from_nested(("it", "rains"))
    torch.testing.assert_close(layer(alone.from_leaves(words[3:5]), alone)[-1], trees.at_roots(h)[1], **TIGHT)
    with pytest.raises(ValueError, match="a row for each of 6 leaves"):
        trees.from_leaves(words[1:])

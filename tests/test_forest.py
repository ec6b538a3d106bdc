"""Forests: from parents, from nested tuples, in batches; what is wrong is named."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from trees import SHAPES, forest, forests, make, states

import fastrnn
from fastrnn import Forest


def heights(parents):
    """By the definition."""
    children = [[n for n, p in enumerate(parents) if p == node] for node in range(len(parents))]

    def height(node):
        return 1 + max((height(k) for k in children[node]), default=-1)

    return [height(node) for node in range(len(parents))]


@settings(max_examples=60, deadline=None)
@given(shape=forests())
def test_levels_are_heights(shape):
    parents, slots = shape
    trees = forest(*shape)
    expected = heights(parents)
    found = {int(node): level for level, nodes in enumerate(trees.levels) for node in nodes}
    assert found == dict(enumerate(expected))
    assert all(nodes.dtype == torch.int64 for nodes in trees.levels)
    assert trees.num_nodes == len(parents)
    assert trees.num_trees == parents.count(-1)
    assert trees.roots.tolist() == [n for n, p in enumerate(parents) if p < 0]
    assert trees.leaves.tolist() == [n for n in range(len(parents)) if n not in parents]
    assert trees.parents.tolist() == parents
    assert trees.arity == max((s + 1 for p, s in zip(parents, slots, strict=True) if p >= 0), default=0)


@settings(max_examples=60, deadline=None)
@given(shape=forests())
def test_schedules_lead_from_level_to_level(shape):
    """The arrays that csrc/tree.h describes, for either direction."""
    parents, slots = shape
    trees = forest(*shape)
    N = len(parents)
    for direction in ("up", "down"):
        order, levels, first, source, slot = trees.schedule(direction).tolist()
        assert sorted(order[:N]) == list(range(N))
        edges, level = set(), {}
        bounds = sorted(set(levels))
        for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
            level |= dict.fromkeys(order[begin:end], number)
        for position, node in enumerate(order[:N]):
            for e in range(first[position], first[position + 1]):
                assert level[source[e]] < level[node]
                child, parent = (source[e], node) if direction == "up" else (node, source[e])
                assert slot[e] == slots[child]
                edges.add((child, parent))
        assert edges == {(n, p) for n, p in enumerate(parents) if p >= 0}


def test_slots_by_default_count_children():
    assert forest([3, 3, 3, -1, 2]).slots.tolist() == [0, 1, 2, 0, 0]


def test_lengths_count_within_each_tree():
    """What a data set holds: trees one after another, each with its own numbers."""
    one = Forest.from_parents([1, -1, -1, 0, 0], lengths=[2, 3])
    assert one.parents.tolist() == [1, -1, -1, 2, 2]
    assert one.roots.tolist() == [1, 2]


def test_integers_of_any_kind():
    for kind in (np.int64, torch.tensor, int):
        assert Forest.from_parents([kind(-1), kind(0)]).parents.tolist() == [-1, 0]
    assert Forest.from_parents(np.array([-1, 0])).num_nodes == 2


def test_rows_that_are_not_the_forests():
    trees = forest([-1, 0, 0])
    for call, count in (
        (trees.at_roots, "3 nodes"),
        (trees.at_leaves, "3 nodes"),
        (trees.from_leaves, "2 lea"),
    ):
        for shape in ((4, 1), (1, 3), ()):
            with pytest.raises(ValueError, match=f"a row for each of {count}.*got"):
                call(torch.zeros(shape))


def test_nested_trees_are_numbered_in_post_order():
    """Leaves from left to right, a list of trees, one leaf alone, names that are lists."""
    trees = Forest.from_nested([((("a", "b"), [1, 2]), None), "alone", ("x",)])
    assert trees.parents.tolist() == [2, 2, 4, 4, 6, 6, -1, -1, 9, -1]
    assert trees.slots.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 0, 0]
    assert trees.leaves.tolist() == [0, 1, 3, 5, 7, 8]
    assert trees.roots.tolist() == [6, 7, 9]
    assert Forest.from_nested([]).num_nodes == 0
    pair = ("a", "b")  # the same tuple twice is two subtrees
    assert Forest.from_nested((pair, pair)).num_nodes == 7


def test_deep_tuples_need_no_recursion():
    deep = "leaf"
    for _ in range(20_000):
        deep = (deep, "leaf")
    trees = Forest.from_nested(deep)
    assert trees.num_nodes == 40_001
    assert len(trees.levels) == 20_001
    while isinstance(deep, tuple):  # freed one by one: the interpreter's own recursion is no part of this
        deep = deep[0]


def test_a_batch_is_its_trees():
    parts = [forest(*shape(n)) for n, shape in zip((1, 5, 9, 12), SHAPES.values(), strict=True)]
    batch = Forest.batch([*parts, forest([])])
    assert batch.num_nodes == 27
    assert batch.num_trees == 4
    assert batch.roots.tolist() == [0, 1, 6, 15]
    layer = make("nary", 2, 3)
    x = torch.randn(27, 2, dtype=torch.float64)
    alone = [states(layer, rows, part) for rows, part in zip(x.split([1, 5, 9, 12]), parts, strict=True)]
    for whole, pieces in zip(states(layer, x, batch), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(pieces), rtol=1e-12, atol=1e-12)
    assert Forest.batch([]).num_nodes == 0


def test_copies_and_moves():
    trees = forest(*SHAPES["binary"](7))
    for other in (copy.deepcopy(trees), pickle.loads(pickle.dumps(trees))):
        assert torch.equal(other.schedule("up"), trees.schedule("up"))
        assert torch.equal(other.slots, trees.slots)
    assert trees.to("cpu") is trees
    moved = trees.to("meta")
    assert moved.device.type == "meta"
    assert moved.roots.is_meta
    assert moved.schedule("up") is trees.schedule("up")  # computed once, kept
    assert repr(trees) == "Forest(num_trees=1, num_nodes=7)"


F, I32 = torch.float32, torch.int32


@pytest.mark.parametrize(
    ("make_forest", "words"),
    [
        (lambda: forest([1, 0]), r"node \d lies on a cycle"),
        (lambda: forest([-1, 1]), "node 1 lies on a cycle"),
        (lambda: forest([1, 2, 3, 1, -1]), r"node [123] lies on a cycle"),
        (lambda: forest([1, 2, 3, 4, 3]), r"node [34] lies on a cycle"),  # to which the others lead
        (lambda: forest([-1, 0, 3]), "the parent of node 2 is 3, there are nodes 0 to 2"),
        (lambda: forest([-1, -2]), "the parent of node 1 is -2"),
        (lambda: forest([-1, 2**40]), "the parent of node 1 is 1099511627776"),
        (lambda: Forest.from_parents(torch.tensor([-1.0, 0.5])), r"LongTensor .*float32 .*node 0 is -1.0"),
        (lambda: Forest.from_parents(torch.tensor([-1, 0], dtype=I32)), "LongTensor .* got torch.int32"),
        (lambda: Forest.from_parents([-1, "a"]), "must be integers: that of node 1 is 'a'"),
        (lambda: Forest.from_parents([-1, True]), "that of node 1 is True"),
        (lambda: Forest.from_parents([-1, 2**70]), "of 64 bits: that of node 1 is 1180591620717411303424"),
        (lambda: Forest.from_parents([-1, 2**63]), "of 64 bits: that of node 1 is 9223372036854775808"),
        (lambda: Forest.from_parents(3), "parents must be a LongTensor \\[N\\] or integers, got int"),
        (lambda: Forest.from_parents([[-1], [0, 1]]), r"that of node 0 is \[-1\]"),
        (lambda: Forest.from_parents([-1], lengths=["a"]), "lengths must be integers: that of tree 0 is 'a'"),
        (lambda: Forest.from_parents(torch.tensor([[-1, 0], [0, 0]])), r"got \[2, 2\]: node 0 has 2"),
        (lambda: forest([-1, 0, 0], [0, 1, 1]), "nodes 1 and 2 have the same parent 0 and the same slot 1"),
        (lambda: forest([-1, 0, 0, 0], [0, 1, 0, 1]), "nodes 1 and 3 have the same parent 0"),
        (lambda: forest([-1, 0], [0, -1]), "the slot of node 1 is -1"),
        (lambda: forest([-1, 0], [0]), r"slots must be \[2\].*node 1 has none"),
        (lambda: forest([-1, 0], [0, 0, 1]), "node 2 has one, and does not exist"),
        (lambda: Forest.from_parents([-1, 0], slots=torch.zeros(2)), "slots must be a LongTensor"),
        (lambda: Forest.from_parents([-1, 0, -1], lengths=[2, 2]), "lengths must sum to the 3 nodes, got 4"),
        (lambda: Forest.from_parents([-1, 0, -1], lengths=[3, 0]), "that of tree 1 is 0"),
        (lambda: Forest.from_parents([-1, 0, -1, 2], lengths=[2, 2]), "parent of node 3 is 2, tree 1 has"),
        (lambda: Forest.from_parents([-1, 0, -1, -1], lengths=[2, 2]), "node 3 is a second root of tree 1"),
        (
            lambda: Forest.from_parents([-1, 0, 3, -1, 0], lengths=[2, 3]),
            "of node 2 is 3, tree 1 has nodes 0",
        ),
        (
            lambda: Forest.from_parents([-1, 0, -1, 0, -1], lengths=[2, 3]),
            "node 4 is a second root of tree 1, whose root is 2",
        ),
        (lambda: Forest.from_parents([1, 0], lengths=[2]), r"node \d lies on a cycle"),
        (lambda: Forest.from_nested((("a", ()), "b")), r"node 1 is \(\)"),
    ],
)
def test_errors_name_the_node(make_forest, words):
    with pytest.raises(ValueError, match=words):
        make_forest()


def test_another_device_is_kept():
    trees = forest([-1, 0, 0, 1])
    far = trees.to("meta")
    for moved in (far, Forest.batch([far, far]), copy.deepcopy(far)):
        assert all(t.is_meta for t in (moved.parents, moved.slots, moved.roots, moved.leaves, *moved.levels))
    assert trees.steps("up").inverse.device.type == "cpu"
    assert far.steps("up").inverse.is_meta


def test_slots_are_kept():
    trees = forest([-1, 0, 0], [0, 2, 5])
    for other in (copy.deepcopy(trees), pickle.loads(pickle.dumps(trees))):
        assert other.slots.tolist() == [0, 2, 5]
        assert other.arity == 6
    assert Forest.batch([trees, forest([-1, 0]), trees]).slots.tolist() == [0, 2, 5, 0, 0, 0, 2, 5]


def test_batch_takes_forests_of_one_device():
    trees = forest([-1])
    with pytest.raises(TypeError, match="that at 1 is a int"):
        Forest.batch([trees, 3])
    with pytest.raises(ValueError, match="forest 1 is on meta, forest 0 on cpu"):
        Forest.batch([trees, trees.to("meta")])


@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("value", [-1, 3, 10**12])
def test_the_operators_trust_no_schedule(row, value):
    """A broken one is an error, or at least no way out of the tensors."""
    layer = fastrnn.NaryTreeLSTM(2, 3)
    good = forest([1, 4, 1, 4, -1]).schedule("up")
    params = list(layer.parameters())
    for column in range(good.shape[1]):
        broken = good.clone()
        broken[row, column] = value
        if torch.equal(broken, good):
            continue
        # What is left is another schedule, of edges that are in bounds.
        with contextlib.suppress(RuntimeError):
            h, *_ = torch.ops.fastrnn.tree("nary_lstm", None, params, broken, True)
            assert h.shape == (5, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.tensor([[0]]), torch.tensor([0])), "parents must be a LongTensor"),
        ((torch.tensor([-1, 0]), torch.tensor([0])), "slots must be a LongTensor"),
        ((torch.tensor([1, 0]), torch.tensor([0, 0])), "needs parents and slots of a forest"),
    ],
)
def test_the_schedule_trusts_nobody(arguments, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastrnn.tree_schedule(*arguments, False)


def test_no_node_has_two_edges_in_one_slot():
    """Such a schedule left an edge's index as scratch memory had it."""
    schedule = torch.tensor(
        [[1, 2, 3, 0, 0], [0, 3, 4, 4, 4], [0, 0, 0, 0, 3], [1, 2, 3, 0, 0], [0, 1, 2, 0, 0]]
    )
    params = [torch.ones(12, 2), torch.ones(18, 9)]
    h, *_ = torch.ops.fastrnn.tree("nary_lstm", None, params, schedule, True)
    assert h.shape == (4, 3)
    for slots in ([0, 2, 2], [1, 1, 2], [0, 1, 0]):
        schedule[4, :3] = torch.tensor(slots)
        with pytest.raises(RuntimeError, match="schedule is not one that tree_schedule made"):
            torch.ops.fastrnn.tree("nary_lstm", None, params, schedule, True)


def test_a_forest_keeps_no_tensor_of_its_callers():
    parents, slots, found = torch.empty(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), []
    for tree in ([1, 2, -1], [-1, 0, 1]):
        parents.copy_(torch.tensor(tree))
        found.append(Forest.from_parents(parents, slots=slots))
    slots.fill_(7)
    assert Forest.batch(found).parents.tolist() == [1, 2, -1, -1, 3, 4]
    assert copy.deepcopy(found[0]).slots.tolist() == [0, 0, 0]


def test_the_largest_slot():
    far, near = (Forest.from_parents([-1, 0], slots=[0, slot]) for slot in (2**63 - 1, 7))
    for way in ("up", "down"):
        assert torch.equal(far.schedule(way)[:4], near.schedule(way)[:4])


def test_under_a_default_device():
    """A forest's own tensors lie on the CPU, whatever others' do."""
    with torch.device("meta"):
        for made in (
            Forest.from_parents([-1, 0, 0]),
            Forest.from_parents(torch.tensor([-1, 0, 0], device="cpu"), lengths=[3]),
            Forest.from_nested(("a", ("b", "c"))),
            Forest.batch([Forest.from_parents([-1, 0, 0])]),
        ):
            tensors = (
                made.parents,
                made.slots,
                made.roots,
                made.leaves,
                *made.levels,
                made.steps("down").inverse,
            )
            assert all(t.device.type == "cpu" for t in tensors)
    with torch.device("meta"):
        x = torch.randn(3, 2, dtype=torch.float64, device="cpu")
        with fastrnn.backend("reference"):
            make("nary", 2, 3).to_empty(device="cpu")(x, Forest.from_parents([-1, 0, 0]))


@pytest.mark.parametrize("direction", ["up", "down"])
def test_an_exported_model_leaves_nothing_in_its_forest(direction):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.trees = fastrnn.TreeRNN(3, 4, direction=direction), forest([-1, 0, 0])

        def forward(self, x):
            return self.layer(x, self.trees)

    model, x = Model(), torch.randn(3, 3)
    with torch.no_grad():
        expected = Model.forward(copy.deepcopy(model), x)
        program = torch.export.export(model, (x,), strict=False).module()
        torch.testing.assert_close(program(x), expected)
        torch.testing.assert_close(model(x), expected)


def test_a_schedule_whose_level_reads_itself():
    """What was not yet computed would be what memory holds."""
    schedule, params = forest([1, -1]).schedule("up").clone(), [torch.ones(12, 2), torch.ones(15, 6)]
    torch.ops.fastrnn.tree("nary_lstm", None, params, schedule, True)
    schedule[1] = torch.tensor([0, 2, 2])  # both nodes
    with pytest.raises(RuntimeError, match="schedule is not one that tree_schedule made"):
        torch.ops.fastrnn.tree("nary_lstm", None, params, schedule, True)


def test_indices_that_lie_apart():
    def apart(t):
        return torch.stack([t, torch.full_like(t, -7)], -1)[..., 0]

    trees, params = forest(*SHAPES["binary"](7)), [torch.randn(12, 2), torch.randn(15, 6)]
    given = trees.parents, trees.slots
    for down in (False, True):
        schedule = torch.ops.fastrnn.tree_schedule(*given, down)
        assert torch.equal(torch.ops.fastrnn.tree_schedule(*map(apart, given), down), schedule)
        found = [
            torch.ops.fastrnn.tree("nary_lstm", None, params, s, False)[0]
            for s in (schedule, apart(schedule))
        ]
        assert torch.equal(*found)

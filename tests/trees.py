"""What the tests of recursive cells share: random forests, and the cells as a plain recursion over nodes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

import fastrnn

F64 = torch.float64
# id: (class, options); arity 3 where slots have weights.
CELLS = {
    "child_sum": (fastrnn.ChildSumTreeLSTM, {}),
    "nary": (fastrnn.NaryTreeLSTM, {"arity": 3}),
    "rnn_tanh": (fastrnn.TreeRNN, {"arity": 3}),
    "rnn_relu": (fastrnn.TreeRNN, {"arity": 3, "nonlinearity": "relu"}),
}


def make(cell, *sizes, dtype=F64, **options):
    kind, own = CELLS[cell]
    torch.manual_seed(3)
    return kind(*sizes, dtype=dtype, **{**own, **options})


# Parents and slots of one tree whose root is node 0 and whose nodes have at most three children.


def chain(n):
    return [i - 1 for i in range(n)], [0] * n


def star(n):
    """Every node has as many leaves as fit: the shallowest tree."""
    return [-1, *((i - 1) // 3 for i in range(1, n))], [0, *((i - 1) % 3 for i in range(1, n))]


def binary(n):
    return [-1, *((i - 1) // 2 for i in range(1, n))], [0, *((i - 1) % 2 for i in range(1, n))]


def caterpillar(n):
    """A chain with a leaf at every node."""
    return [-1, *(max(0, i - 2 + i % 2 - 1) for i in range(1, n))], [0, *((i + 1) % 2 for i in range(1, n))]


SHAPES = {"chain": chain, "star": star, "binary": binary, "caterpillar": caterpillar}


def random_tree(n, rng):
    parents, slots, free = [-1], [0], [(0, 0), (0, 1), (0, 2)]
    for node in range(1, n):
        parent, slot = free.pop(rng.randrange(len(free)))
        parents.append(parent)
        slots.append(slot)
        free += [(node, k) for k in range(3)]
    return parents, slots


@st.composite
def forests(draw):
    """(parents, slots) of no to five trees, their nodes numbered at random."""
    rng = draw(st.randoms(use_true_random=False))
    parents, slots = [], []
    for _ in range(draw(st.integers(0, 5))):
        shape = draw(st.sampled_from([*SHAPES.values(), None]))
        n = draw(st.integers(1, 24))
        own = random_tree(n, rng) if shape is None else shape(n)
        parents += [p if p < 0 else p + len(slots) for p in own[0]]
        slots += own[1]
    names = list(range(len(parents)))
    rng.shuffle(names)
    shuffled, moved = [-1] * len(parents), [0] * len(parents)
    for node, (parent, slot) in enumerate(zip(parents, slots, strict=True)):
        shuffled[names[node]] = -1 if parent < 0 else names[parent]
        moved[names[node]] = slot
    return shuffled, moved


def forest(parents, slots=None):
    as_tensor = None if slots is None else torch.tensor(slots, dtype=torch.int64)
    return fastrnn.Forest.from_parents(torch.tensor(parents, dtype=torch.int64), slots=as_tensor)


def recursion(layer, x, parents, slots):
    """The states of every node by a recursion over nodes, in the papers' notation: [N, H] each."""
    sources = [[] for _ in parents]  # (slot, node) that the state of a node comes from
    for node, parent in enumerate(parents):
        if parent >= 0:
            target, source = (parent, node) if layer.direction == "up" else (node, parent)
            sources[target].append((slots[node], source))
    H, known = layer.hidden_size, {}

    def part(node, gate):
        rows = slice(gate * H, (gate + 1) * H)
        total = torch.zeros(H, dtype=F64)
        if x is not None:
            total = total + layer.weight_ih[rows] @ x[node]
        if layer.bias:
            total = total + layer.bias_ih[rows] + layer.bias_hh[rows]
        return total

    def child_sum(node):
        U = layer.weight_hh.split(H)
        states = [state(k) for _, k in sources[node]]
        h_sum = sum((h for h, _ in states), torch.zeros(H, dtype=F64))
        i, o = (torch.sigmoid(part(node, g) + U[g] @ h_sum) for g in (0, 3))
        u = torch.tanh(part(node, 2) + U[2] @ h_sum)
        c = i * u + sum(torch.sigmoid(part(node, 1) + U[1] @ h) * c for h, c in states)
        return o * torch.tanh(c), c

    def nary(node):
        A = layer.arity
        U = [list(rows.split(H, 1)) for rows in layer.weight_hh.split(H)]
        states = {slot: state(k) for slot, k in sources[node]}

        def recurrent(row):
            return sum((U[row][slot] @ h for slot, (h, _) in states.items()), torch.zeros(H, dtype=F64))

        i = torch.sigmoid(part(node, 0) + recurrent(0))
        o = torch.sigmoid(part(node, 3) + recurrent(A + 2))
        u = torch.tanh(part(node, 2) + recurrent(A + 1))
        c = i * u
        for slot, (_, c_k) in states.items():
            c = c + torch.sigmoid(part(node, 1) + recurrent(1 + slot)) * c_k
        return o * torch.tanh(c), c

    def rnn(node):
        W = layer.weight_hh.split(H, 1)
        total = part(node, 0) + sum(W[slot] @ state(k)[0] for slot, k in sources[node])
        return (torch.tanh(total) if layer.nonlinearity == "tanh" else torch.relu(total),)

    step = {fastrnn.ChildSumTreeLSTM: child_sum, fastrnn.NaryTreeLSTM: nary, fastrnn.TreeRNN: rnn}[
        type(layer)
    ]

    def state(node):
        if node not in known:
            known[node] = step(node)
        return known[node]

    rows = [state(node) for node in range(len(parents))]
    count = 1 if isinstance(layer, fastrnn.TreeRNN) else 2
    if not rows:
        return (torch.zeros(0, H, dtype=F64),) * count
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def states(layer, x, forest):
    """What the layer gives, always a tuple."""
    out = layer(x, forest)
    return out if isinstance(out, tuple) else (out,)


def derivatives(outputs, leaves, retain_graph=False):
    """Gradients of a loss that weighs every number differently; zeros where there is none, even of a node
    alone, which uses no recurrent weight."""
    loss = sum((s * torch.linspace(-1, 2, s.numel(), dtype=s.dtype).view(s.shape)).sum() for s in outputs)
    loss = loss + sum(0 * leaf.sum() for leaf in leaves)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": retain_graph}
    return torch.autograd.grad(loss, leaves, **options)

"""torch.compile, torch.export, AOTInductor and torch.jit.trace: one graph, any T and B."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from helpers import F64, assert_same, randn
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

KINDS = ("LSTM", "GRU", "RNN")


class Tagger(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = getattr(fastrnn, kind)(4, 6, num_layers=2, bidirectional=True, **options)
        self.head = nn.Linear(12, 3)

    def forward(self, x, lengths=None):
        return self.head(self.layer(x, lengths=lengths)[0])


@pytest.fixture
def counter():
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


def assert_same_training(compiled, plain, *args):
    ours, theirs = compiled(*args), plain(*args)
    torch.testing.assert_close(ours, theirs)
    parameters = list(plain.parameters())
    a = torch.autograd.grad(ours.square().sum(), parameters)
    b = torch.autograd.grad(theirs.square().sum(), parameters)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_compile_once_each(kind, counter):
    """T, then B, each becomes dynamic at its second value; nothing is compiled after that."""
    model = Tagger(kind)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for T, B in ((10, 3), (500, 3), (7, 5), (12, 2), (90, 9), (2, 4)):
        assert_same_training(compiled, model, torch.randn(T, B, 4))
    assert counter.frame_count == 3


@pytest.mark.parametrize("kind", KINDS)
def test_no_warnings(kind):
    """Programs that turn warnings into errors compile too."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(Tagger(kind), fullgraph=True, backend="eager")(torch.randn(5, 2, 4))


def test_states_are_saved():
    class States(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.GRU(4, 6)

        def forward(self, x):
            return self.layer(x, return_states=True)[2]

    model, file = States(), io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.randn(5, 2, 4),)), file)
    file.seek(0)
    x = torch.randn(5, 2, 4)
    loaded = torch.export.load(file).module()(x)
    assert type(loaded) is type(model(x))
    torch.testing.assert_close(loaded.h, model(x).h)


def test_the_graph_does_not_grow_with_time(counter):
    """One operator a layer, however long the sequence."""
    sizes = []
    for T in (3, 300):
        torch._dynamo.reset()
        counter.graphs.clear()
        torch.compile(Tagger("LSTM"), fullgraph=True, backend=counter)(torch.randn(T, 2, 4))
        sizes.append(len(counter.graphs[0].graph.nodes))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind, counter):
    model = Tagger(kind)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for T, B in ((6, 3), (9, 4), (5, 2), (8, 7)):
        assert_same_training(compiled, model, torch.randn(T, B, 4), torch.randint(0, T + 1, (B,)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_input(kind, enforce_sorted, counter):
    layer = getattr(fastrnn, kind)(4, 6)

    def data(packed):
        return layer(packed)[0].data

    compiled = torch.compile(data, fullgraph=True, backend=counter)
    for lengths in ([5, 3, 2], [7, 7, 1, 1], [4, 2], [6, 6, 6, 6, 1]):
        x = torch.randn(max(lengths), len(lengths), 4)
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
        torch.testing.assert_close(compiled(packed), data(packed))


@pytest.mark.parametrize("kind", KINDS)
def test_export_with_dynamic_time_and_batch(kind):
    model = Tagger(kind).eval()
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    program = torch.export.export(model, (torch.randn(6, 3, 4),), dynamic_shapes={"x": {0: T, 1: B}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for T, B in ((6, 3), (50, 2), (3, 9)):
        x = torch.randn(T, B, 4)
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.slow
def test_inductor_and_its_packages(tmp_path):
    torch._dynamo.reset()
    model = Tagger("LSTM").eval()
    compiled = torch.compile(model, fullgraph=True)
    assert_same_training(compiled, model, torch.randn(7, 3, 4))
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    program = torch.export.export(model, (torch.randn(6, 3, 4),), dynamic_shapes={"x": {0: T, 1: B}})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
    runner = torch._inductor.aoti_load_package(package)
    for T, B in ((6, 3), (40, 8)):
        x = torch.randn(T, B, 4)
        torch.testing.assert_close(runner(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_traced(kind, gradients):
    """The trace holds the operator, so that T is not baked in; it trains, and goes through a file."""
    model = Tagger(kind)
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, torch.randn(5, 2, 4))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for T, B in ((5, 2), (9, 3)):
        x = torch.randn(T, B, 4)
        assert_same_training(traced, model, x)
        torch.testing.assert_close(loaded(x), model(x))


class Packed(torch.nn.Module):
    """The rows of a batch of sorted sequences, and their last states."""

    def __init__(self, kind):
        super().__init__()
        self.layer = getattr(fastrnn, kind)(4, 6, dtype=F64)

    def forward(self, x, lengths):
        y, hidden = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=self.training))
        return y.data, hidden


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_traced_with_a_packed_sequence(kind, is_sorted):
    """B is not baked in, either."""
    model = Packed(kind).train(is_sorted)
    traced = torch.jit.trace(model, (torch.randn(5, 3, 4, dtype=F64), torch.tensor([5, 3, 2])))
    for lengths in ([5, 3], [6, 4, 4, 1]):
        x = torch.randn(lengths[0], len(lengths), 4, dtype=F64)
        args = (x, torch.tensor(lengths if is_sorted else lengths[::-1]))
        torch.testing.assert_close(traced(*args), model(*args))


def attention_and_decoder():
    torch.manual_seed(0)
    decoder = fastrnn.AttentionDecoder(4, 6, 6, num_layers=2, dtype=F64)
    return [(fastrnn.Attention(6, dtype=F64), 6), (decoder, 4)]


def test_attention_exports_with_dynamic_sizes():
    T, B, S = (torch.export.Dim(name, min=2) for name in "TBS")
    for module, width in attention_and_decoder():
        shapes = ({0: T, 1: B}, {0: S, 1: B})
        program = torch.export.export(module, (randn(5, 3, width), randn(7, 3, 6)), dynamic_shapes=shapes)
        other = randn(9, 2, width), randn(30, 2, 6)
        assert_same(program.module()(*other), module(*other))


def test_attention_and_trees_compile_twice_for_any_size():
    """Once for the first size, once for all others."""
    lengths = torch.tensor([2, 1])
    bi, tree = fastrnn.Bidirectional(fastrnn.GRU(4, 6, dtype=F64)), fastrnn.NaryTreeLSTM(4, 6, dtype=F64)
    calls = [
        *((m, lambda n, w=w: ((randn(n, 2, w), randn(2 * n, 2, 6)), {})) for m, w in attention_and_decoder()),
        (bi, lambda n: ((randn(n, 2, 4),), {"lengths": lengths})),
        (
            tree,
            lambda n: ((randn(n, 4), fastrnn.Forest.from_parents([-1, *(i // 2 for i in range(n - 1))])), {}),
        ),
    ]
    for module, given in calls:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for n in (5, 9, 12, 20):
            args, options = given(n)
            assert_same(compiled(*args, **options), module(*args, **options))
        assert counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_other_operators_traced():
    """The trace holds the operator, and trains."""
    tree, trees = fastrnn.NaryTreeLSTM(6, 4, dtype=F64), fastrnn.Forest.from_parents([-1, 0, 0, 1, 1])
    attention, decoder = (module for module, _ in attention_and_decoder())
    memory = randn(7, 2, 6)
    for module in (tree, attention, decoder):
        module.requires_grad_(False)  # a trace takes none that does as a constant
    for name, call, shape in (
        ("attention", lambda x: attention(x, memory)[0], (5, 2, 6)),
        ("decoder", lambda x: decoder(x, memory)[0], (5, 2, 4)),
        ("tree", lambda x: tree(x, trees)[0], (5, 6)),
    ):
        traced = torch.jit.trace(call, randn(*shape, grad=True), check_trace=False)
        assert f"fastrnn::{name}" in str(traced.graph)
        x = randn(*shape, seed=3, grad=True)
        ours, theirs = traced(x), call(x)
        assert_same(ours, theirs)
        assert_same(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x))

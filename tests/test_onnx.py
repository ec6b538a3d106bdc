"""export_onnx: one node a layer, every size dynamic, and onnxruntime's numbers equal to ours."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fastrnn

onnx = pytest.importorskip("onnx")
onnxscript = pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

LAYERS = {
    "lstm": lambda **o: fastrnn.LSTM(5, 7, **o),
    "gru": lambda **o: fastrnn.GRU(5, 7, **o),
    "gru_reset_before": lambda **o: fastrnn.GRU(5, 7, reset_after=False, **o),
    "rnn_tanh": lambda **o: fastrnn.RNN(5, 7, **o),
    "rnn_relu": lambda **o: fastrnn.RNN(5, 7, nonlinearity="relu", **o),
}
NODE = {"lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
OPTIONS = (
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "bidirectional": True},
)


class Tagger(nn.Module):
    """A layer among others, as a model holds it."""

    def __init__(self, layer):
        super().__init__()
        self.embed = nn.Linear(4, 5)
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, x):
        y, last = self.layer(self.embed(x))
        return self.head(y), last


def export(model, args, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx's own
        fastrnn.export_onnx(model.eval(), args, path, verbose=False, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*values):
        names = [i.name for i in session.get_inputs()]
        feed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return [torch.from_numpy(out) for out in session.run(None, feed)]

    return run, [node.op_type for node in onnx.load(path).graph.node]


class Attends(nn.Module):
    """A decoder whose steps' outputs attend once more."""

    def __init__(self, **options):
        super().__init__()
        self.decoder = fastrnn.AttentionDecoder(3, 6, 5, score="general", **options)
        self.attention = fastrnn.Attention(6, 5, score="additive")

    def forward(self, x, memory, lengths):
        out, state, weights = self.decoder(x, memory, lengths=lengths)
        return out, *state, weights, *self.attention(out, memory, lengths=lengths)


def assert_same(ours, theirs):
    leaves = torch.utils._pytree.tree_leaves(theirs)
    assert len(ours) == len(leaves)
    for a, b in zip(ours, leaves, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "deep", "nobias"])
@pytest.mark.parametrize("cell", LAYERS)
def test_layers(cell, options, tmp_path):
    model = Tagger(LAYERS[cell](**options))
    run, nodes = export(model, torch.randn(6, 3, 4), tmp_path / "m.onnx")
    assert nodes.count(NODE[cell]) == options.get("num_layers", 1)
    for size in ((6, 3), (11, 2), (1, 1)):
        x = torch.randn(*size, 4)
        assert_same(run(x), model(x))


def test_one_sequence_in_the_example_fixes_nothing(tmp_path):
    model = Tagger(fastrnn.GRU(5, 7))
    run, _ = export(model, (torch.randn(8, 1, 4),), tmp_path / "m.onnx")
    x = torch.randn(3, 5, 4)
    assert_same(run(x), model(x))


def test_states_and_lengths(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.LSTM(4, 6, bidirectional=True)

        def forward(self, x, h, c, lengths):
            return self.layer(x, (h, c), lengths=lengths)

    model = Model()

    def inputs(T, B):
        return torch.randn(T, B, 4), torch.randn(2, B, 6), torch.randn(2, B, 6), torch.randint(1, T + 1, (B,))

    run, _ = export(model, inputs(5, 3), tmp_path / "m.onnx")
    for size in ((5, 3), (9, 4), (2, 2)):
        values = inputs(*size)
        assert_same(run(*values), model(*values))


def test_cells(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.gru = fastrnn.LSTMCell(4, 6), fastrnn.GRUCell(6, 5)
            self.rnn = fastrnn.RNNCell(5, 5)

        def forward(self, x):
            h, c = self.lstm(x)
            return self.rnn(self.gru(h)), c

    model = Model()
    run, nodes = export(model, torch.randn(3, 4), tmp_path / "m.onnx")
    assert {"LSTM", "GRU", "RNN"} <= set(nodes)
    for B in (3, 1, 8):
        x = torch.randn(B, 4)
        assert_same(run(x), model(x))


def test_what_onnx_lacks(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got NoneType"):
        fastrnn.export_onnx(None, torch.randn(3, 2, 4), path)
    with pytest.raises(ValueError, match=r"^0: ONNX's LSTM has no equal of proj_size"):
        fastrnn.export_onnx(nn.Sequential(fastrnn.LSTM(4, 6, proj_size=2)), torch.randn(3, 2, 4), path)

    with pytest.raises(ValueError, match=r"^the model: ONNX has no equal of a recursive layer"):
        fastrnn.export_onnx(fastrnn.TreeRNN(4, 6), torch.randn(3, 4), path)

    for pack, word in ((fastrnn.freeze, "frozen"), (fastrnn.quantize, "quantized")):
        with pytest.raises(ValueError, match=rf"^0: a {word} layer is not exported"):
            fastrnn.export_onnx(pack(nn.Sequential(fastrnn.GRU(4, 6))), torch.randn(3, 2, 4), path)

    class Reset(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.GRU(4, 6)

        def forward(self, x, reset):
            return self.layer(x, reset=reset)[0]

    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.LSTM(4, 6)

        def forward(self, x):
            return self.layer(x, return_states=True)[2].c

    with pytest.raises(ValueError, match=r"^ONNX's GRU has no equal of reset=$"):
        export(Reset(), (torch.randn(3, 2, 4), torch.zeros(3, 2, dtype=torch.bool)), path)
    with pytest.raises(ValueError, match=r"^ONNX's LSTM has no equal of return_states=$"):
        export(Cells(), torch.randn(3, 2, 4), path)
    assert not path.exists()
    assert fastrnn.functional.RECORDER.take is None


def test_a_cell_that_onnx_has_no_node_for(tmp_path, monkeypatch):
    monkeypatch.delitem(fastrnn.onnx._NODES, "gru")
    with pytest.raises(ValueError, match=r"^ONNX has no equal of the cell 'gru', only of lstm, "):
        export(fastrnn.GRU(4, 6), torch.randn(3, 2, 4), tmp_path / "m.onnx")


def test_keyword_arguments(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.GRU(4, 6)

        def forward(self, x, scale=None, *, h=None):
            return self.layer(x, h)[0]

    model = Model().eval()
    path = tmp_path / "m.onnx"
    fastrnn.export_onnx(model, torch.randn(3, 2, 4), path, kwargs={"h": torch.randn(1, 2, 6)}, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for T, B in ((3, 2), (5, 1), (1, 4)):
        x, h = torch.randn(T, B, 4), torch.randn(1, B, 6)
        names = [i.name for i in session.get_inputs()]
        got = session.run(None, dict(zip(names, (x.numpy(), h.numpy()), strict=True)))
        assert_same([torch.from_numpy(got[0])], model(x, h=h))


@torch.library.custom_op("fastrnn_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


def test_a_table_of_the_callers_own(tmp_path):
    """Beside the layers' translation, not in its place."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.GRU(4, 6)

        def forward(self, x):
            return twice(self.layer(x)[0])

    table = {torch.ops.fastrnn_tests.twice.default: lambda x: onnxscript.opset18.Add(x, x)}
    model = Model()
    run, nodes = export(model, torch.randn(3, 2, 4), tmp_path / "m.onnx", custom_translation_table=table)
    assert nodes.count("GRU") == 1
    assert len(table) == 1
    x = torch.randn(5, 3, 4)
    assert_same(run(x), [2 * model.layer(x)[0]])


@pytest.mark.parametrize("feeding", [True, False])
def test_attention_and_its_decoder(tmp_path, feeding):
    """The attention as plain operations, every size but input feeding's T dynamic."""
    model = Attends(cell="lstm", input_feeding=feeding)
    x, memory, lengths = torch.randn(4, 2, 3), torch.randn(7, 2, 5), torch.tensor([7, 3])
    run, _ = export(model, (x, memory, lengths), tmp_path / "model.onnx")
    assert_same(run(x, memory, lengths), model(x, memory, lengths))
    x, memory, lengths = torch.randn(4, 3, 3), torch.randn(9, 3, 5), torch.tensor([1, 9, 2])
    assert_same(run(x, memory, lengths), model(x, memory, lengths))


def test_both_directions(tmp_path):
    """Each sequence from its own end, T and B dynamic."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.Bidirectional(fastrnn.LSTM(4, 5), merge="sum")

        def forward(self, x, lengths):
            return self.layer(x, lengths=lengths)[0]

    model = Both()
    run, _ = export(model, (torch.randn(5, 3, 4), torch.tensor([5, 2, 3])), tmp_path / "model.onnx")
    x, lengths = torch.randn(8, 2, 4), torch.tensor([3, 8])
    assert_same(run(x, lengths), [model(x, lengths)])

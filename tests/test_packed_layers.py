"""Frozen and quantized layers in programs: whole models, graphs, moves, and all that they refuse."""

from __future__ import annotations

import pytest
import torch
from helpers import MASKS, random_case, random_masks
from made import LAYERS, MAKERS, OFF, ROUNDED, each_maker, layer, products_of_bfloat16, rounded
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastrnn
from fastrnn import inference, packed
from fastrnn.reference import CELLS


@each_maker
def test_training_raises(make):
    made = make(layer("lstm", 4, 8))
    x = torch.randn(3, 2, 4)
    assert made.eval() is made
    for train in (made.train, nn.Sequential(made).train):
        with pytest.raises(RuntimeError, match="is for inference and cannot be trained"):
            train()
    assert not made(x)[0].requires_grad
    h = torch.zeros(1, 2, 8, requires_grad=True)
    for call in (
        lambda: made(x.clone().requires_grad_()),
        lambda: made(x, (h, h)),
        lambda: torch.ops.fastrnn.layer_packed("lstm", x, [h, h], made.packed_l0, None, None, None, False),
    ):
        with pytest.raises(RuntimeError, match="has no derivatives"):
            call()
    with torch.no_grad():
        made(x, (h, h))


def test_moves():
    frozen, quantized = (make(layer("lstm", 4, 8)) for make in MAKERS.values())
    x = torch.randn(5, 8, 4)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        plain = layer("lstm", 4, 8).to(dtype)
        # Few rows are summed in another order where weights lie as torch has them.
        tolerance = ROUNDED if dtype == torch.bfloat16 and products_of_bfloat16() else {"rtol": 0, "atol": 0}
        expected = plain(x.to(dtype))[0]
        torch.testing.assert_close(fastrnn.freeze(plain)(x.to(dtype))[0], expected, **tolerance)
        frozen = fastrnn.freeze(layer("lstm", 4, 8)).to(dtype)
        torch.testing.assert_close(frozen(x.to(dtype))[0], expected, **tolerance)
    y = quantized(x)[0]
    assert torch.equal(quantized.to("cpu").float()(x)[0], y)
    for move in (
        frozen.half,
        quantized.half,
        quantized.double,
        lambda: frozen.to("meta"),
        lambda: quantized.to("meta"),
    ):
        with pytest.raises(RuntimeError, match="layer cannot be moved to"):
            move()
    assert torch.equal(quantized(x)[0], y)


class Model(nn.Module):
    """A shared layer, a list of layers, a cell, a user's subclass, dropout."""

    class Mine(fastrnn.GRU):
        def forward(self, x):
            return super().forward(x)[0]

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = fastrnn.LSTM(6, 6, batch_first=True)
        self.again = self.first
        self.rest = nn.ModuleList([nn.Dropout(), fastrnn.GRU(6, 6), fastrnn.RNN(6, 6)])
        self.mine = self.Mine(6, 6)
        self.cell = fastrnn.GRUCell(6, 6)

    def forward(self, tokens):
        x = self.again(self.first(self.embed(tokens))[0])[0]
        x = self.rest[0](x)
        for one in self.rest[1:]:
            x = one(x)[0]
        return self.cell(self.mine(x)[0])


@each_maker
def test_a_whole_model(make):
    model = Model()
    made = make(model)
    assert made.first is made.again
    assert isinstance(made.first, inference.Packed)
    assert {type(m) for m in made.rest} == {nn.Dropout, type(made.first)}
    assert type(made.mine) is Model.Mine
    assert type(model.first) is fastrnn.LSTM
    assert model.training
    tokens = torch.arange(12).view(3, 4) % 11
    model.eval()
    with torch.no_grad():
        # int8 rounds a weight by up to 1/254 of its row's largest; float32's sums have another order.
        tolerance = 0.01 if make is fastrnn.quantize else 1e-6
        torch.testing.assert_close(made(tokens), model(tokens), rtol=0, atol=tolerance)
    with pytest.raises(ValueError, match=r"^first: a \w+ layer has no torch\.nn equal"):
        fastrnn.revert(made)
    with pytest.raises(ValueError, match=r"has no torch\.nn equal"):
        made.first.to_torch()


@each_maker
def test_what_cannot_be_made(make):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        make([])
    with pytest.raises(ValueError, match=r"LSTM holds no fastrnn\.LSTM, GRU or RNN"):
        make(nn.LSTM(2, 3))
    with pytest.raises(ValueError, match=r"^1: weight_ih_l0 must be .*, got torch.float16 on cpu$"):
        make(nn.Sequential(nn.Linear(2, 2), layer("gru", 2, 3).half()))
    with pytest.raises(ValueError, match=r"on meta$"):
        make(layer("gru", 2, 3, device="meta"))
    with pytest.raises(ValueError, match="frozen or quantized already do not count"):
        make(fastrnn.freeze(layer("gru", 2, 3)))
    if make is fastrnn.quantize:
        with pytest.raises(ValueError, match=r"must be torch.float32 on the CPU, got torch.float64"):
            make(layer("gru", 2, 3).double())


@each_maker
def test_parametrized(make):
    plain = parametrizations.weight_norm(layer("lstm", 4, 8), "weight_hh_l0")
    x = torch.randn(5, 2, 4)
    made = make(plain)
    assert not list(made.parameters())
    assert not list(made.children())
    with torch.no_grad():
        # As in a whole model, of one layer.
        torch.testing.assert_close(
            made(x)[0], plain(x)[0], rtol=0, atol=0.005 if make is fastrnn.quantize else 1e-6
        )
    pruned = layer("gru", 4, 8)
    prune.random_unstructured(pruned, "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match=r"^the layer: weight_hh_l0 is no Parameter"):
        make(pruned)


@each_maker
@pytest.mark.parametrize("name", LAYERS)
def test_graphs(name, make, tmp_path):
    """One graph of any T and B in torch.compile, torch.export and torch.jit.trace; its FLOPs."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make(layer(name, 4, 6, 2, bidirectional=True))

        def forward(self, x):
            return self.layer(x)[0]

    model, x = First(), torch.randn(5, 3, 4)
    others = [torch.randn(9, 3, 4), torch.randn(2, 7, 4)]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    traced = torch.jit.trace(model, x)
    dims = {0: torch.export.Dim("T", min=1, max=100), 1: torch.export.Dim("B", min=1, max=100)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(dims,))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for given in (x, *others):
        for run in (compiled, traced, loaded):
            assert torch.equal(run(given), model(given))
    plain = layer(name, 4, 6, 2, bidirectional=True)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as ours:
        model(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as theirs:
        plain(x)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, mask):
    x, states, params = random_case(cell, 3, 2, 2, 3, D=2, dtype=torch.float32)
    x, masks = random_masks(mask, x)
    q, scales, _ = rounded(params, 2)
    for weights in (packed.pack(cell, params, [], 2), packed.pack(cell, q, scales, 2)):
        args = (cell, x, states, weights, *{**OFF, **masks}.values(), True)
        torch.library.opcheck(torch.ops.fastrnn.layer_packed.default, args)


def test_the_operator_trusts_nobody():
    x, states, params = random_case("lstm", 3, 2, 4, 5, dtype=torch.float32)
    weights = packed.pack("lstm", params, [], 1)
    q, scales, _ = rounded(params, 1)
    wrong = [
        lambda: packed.call("lstm", x, states, weights[:-16]),
        lambda: packed.call("lstm", x, states, weights[:3]),
        lambda: packed.call("lstm", x, states, torch.zeros(1000)),
        lambda: packed.call("gru", x, states[:1], weights),
        lambda: packed.call("lstm", x[:, :, :3], states, weights),
        lambda: packed.call("lstm", x, [s.expand(2, 2, 5) for s in states], weights),
        lambda: packed.call("lstm", x, [s[:, :, :4] for s in states], weights),
        lambda: packed.call("lstm", x.double(), [s.double() for s in states], weights),
        lambda: packed.call("lstm", x, [], weights),
        lambda: packed.call("lstm", x.bfloat16(), [s.bfloat16() for s in states], weights),
        lambda: packed.pack("lstm", params[:1], [], 1),
        lambda: packed.pack("lstm", [params[0], params[1][:, :3], *params[2:]], [], 1),
        lambda: packed.pack("lstm", params, [], 3),
        lambda: packed.pack("lstm", params, scales, 1),
        lambda: packed.pack("lstm", q, [], 1),
        lambda: packed.pack("lstm", q, scales[:1], 1),
        lambda: packed.pack("lstm", q, [s[:3] for s in scales], 1),
        lambda: packed.pack("lstm", q, [s.double() for s in scales], 1),
        lambda: packed.pack("lstm", q, [torch.stack([s, s], 1)[:, 0] for s in scales], 1),
        lambda: packed.pack("elman", params, [], 1),
        lambda: packed.pack(
            "rnn_tanh", [q[0].new_zeros(1, 131073), q[0].new_zeros(1, 1)], [torch.ones(1), torch.ones(1)], 1
        ),
    ]
    for call in wrong:
        with pytest.raises(RuntimeError):
            call()
    with pytest.raises(RuntimeError, match="were packed for the cell lstm, got gru"):
        packed.call("gru", x, states[:1], weights)


@each_maker
def test_explain_and_backends(make):
    made, x = make(layer("lstm", 4, 8)), torch.randn(3, 2, 4)
    note = "frozen: weights packed once" if make is fastrnn.freeze else "int8 weights"
    assert note in repr(fastrnn.explain(made, x))
    with fastrnn.backend("reference"):
        assert "cpu backend alone" in repr(fastrnn.explain(made, x))
        with pytest.raises(fastrnn.BackendError, match="cpu backend alone"):
            made(x)


@each_maker
def test_autocast(make):
    made, x = make(layer("lstm", 4, 8)), torch.randn(3, 2, 4)
    y, (_, c) = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        z, (h_n, c_n) = made(x)
        again, _, states = made(x.bfloat16(), (h_n, c_n), return_states=True)
    assert {t.dtype for t in (z, h_n, c_n, again, states.h, states.c)} == {torch.bfloat16}
    assert torch.equal(z, y.bfloat16())
    assert torch.equal(c_n, c.bfloat16())


def test_packed_weights_that_pack_did_not_give():
    """Whatever became of the bytes, none is read that is not there."""
    layer = fastrnn.freeze(fastrnn.GRU(4, 6))
    x, h = torch.randn(3, 2, 4), torch.randn(1, 2, 6)
    good = layer.packed_l0

    def call(weights):
        return torch.ops.fastrnn.layer_packed("gru", x, [h], weights, None, None, None, False)

    torch.testing.assert_close(call(good)[0], layer(x, h)[0])
    changed = []
    for word in range(7):  # magic, bytes, vector bytes, I, H, P, directions
        for value in (-1, 0, 2, 5, 1 << 20, 1 << 62):
            bad = good.clone()
            bad[2 * word : 2 * word + 2] = torch.tensor([value]).view(torch.float32)
            if not torch.equal(bad, good):
                changed.append(bad)
    for flag in (56, 65, 66):  # projected, int8, of 0 or 1; the first byte of the name
        for value in (1, 2, 255):
            changed.append(good.clone())
            changed[-1].view(torch.uint8)[flag] = value
    for bad in (*changed, good[:-1], good[:3], torch.zeros(0), torch.zeros(64), good.to("meta")):
        with pytest.raises(RuntimeError, match=r"fastrnn::pack gave|were packed for|same device"):
            call(bad)


def test_sizes_that_have_changed_places():
    """As many bytes as there are, for a state of another width than h."""
    weights = fastrnn.freeze(fastrnn.GRU(4, 6)).packed_l0.clone()
    words = weights.view(torch.int64)
    assert words[3:6].tolist() == [4, 6, 6]  # I, H, P
    words[3], words[5] = 6, 4
    with pytest.raises(RuntimeError, match=r"must be what fastrnn::pack gave"):
        packed.call("gru", torch.randn(3, 2, 6), [torch.randn(1, 2, 4)], weights)


def test_packed_weights_that_lie_apart():
    layer, x, h = fastrnn.freeze(fastrnn.GRU(4, 6)), torch.randn(3, 2, 4), torch.randn(1, 2, 6)
    apart = torch.stack([layer.packed_l0, torch.zeros_like(layer.packed_l0)], 1)[:, 0]
    assert torch.equal(packed.call("gru", x, [h], apart)[0], layer(x, h)[0])

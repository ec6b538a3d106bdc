"""convert and revert: models as they are found, trained on one side and continued on the other."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import F64, each_cell, each_layer, pair, randn
from torch import nn
from torch.nn.utils import parametrizations, parametrize, rnn, weight_norm

import fastrnn


class Translator(nn.Module):
    """Encoder-decoder with packed input and a shared embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.encoder = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(16, 8)
        self.decoder = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, source, lengths, target):
        packed = rnn.pack_padded_sequence(self.embed(source), lengths, batch_first=True, enforce_sorted=False)
        _, (h, c) = self.encoder(packed)
        h, c = (self.bridge(torch.cat([s[-2], s[-1]], -1))[None] for s in (h, c))
        return self.head(self.decoder(self.embed(target), (h, c))[0])


class SpeechModel(nn.Module):
    """Convolution, bidirectional GRU, CTC."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(5, 6, 3, padding=1), nn.ReLU())
        self.rnns = nn.ModuleList([nn.GRU(6, 7, bidirectional=True), nn.GRU(14, 7, bidirectional=True)])
        self.head = nn.Linear(14, 4)

    def forward(self, audio):
        x = self.conv(audio).permute(2, 0, 1)
        for layer in self.rnns:
            x = layer(x)[0]
        return self.head(x).log_softmax(-1)


class ActorCritic(nn.Module):
    """Cells stepped in a Python loop, as reinforcement learning does."""

    def __init__(self):
        super().__init__()
        self.memory = nn.LSTMCell(4, 6)
        self.fast = nn.GRUCell(6, 5)
        self.plain = nn.RNNCell(5, 5, nonlinearity="relu")
        self.policy, self.value = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, observations):
        state, fast, plain = None, None, None
        out = []
        for x in observations:
            state = self.memory(x, state)
            fast = self.fast(state[0], fast)
            plain = self.plain(fast, plain)
            out.append(torch.cat([self.policy(plain), self.value(plain)], -1))
        return torch.stack(out)


def translate(model):
    source, target = torch.arange(15).view(3, 5) % 11, torch.arange(12).view(3, 4) % 11
    logits = model(source, torch.tensor([3, 5, 2]), target)
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def transcribe(model):
    targets = torch.tensor([[1, 2, 3], [2, 2, 1]])
    return nn.functional.ctc_loss(
        model(randn(2, 5, 12)), targets, torch.tensor([12, 10]), torch.tensor([3, 2])
    )


def play(model):
    return model(randn(6, 3, 4)).square().mean()


WILD = {
    "translator": (Translator, translate),
    "speech": (SpeechModel, transcribe),
    "actor": (ActorCritic, play),
}


def train(model, optimizer, loss, steps=3):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("name", WILD)
def test_training_goes_on_across(name):
    """Three steps in torch.nn, three converted, three reverted, with one optimizer: nine of torch.nn's."""
    make, loss = WILD[name]
    torch.manual_seed(0)
    model = make().double()
    rival = copy.deepcopy(model)
    theirs = train(rival, torch.optim.Adam(rival.parameters(), 0.01), loss, 9)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    before = [type(m) for m in model.modules()]
    ours = train(model, optimizer, loss)
    assert fastrnn.convert(model) is model
    assert not {type(m) for m in model.modules()} & {nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell}
    ours += train(model, optimizer, loss)
    assert fastrnn.revert(model) is model
    assert [type(m) for m in model.modules()] == before
    ours += train(model, optimizer, loss)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-10, atol=0)
    assert ours[-1] < ours[0]


@each_layer
def test_a_bare_layer_keeps_all_it_has(cell):
    ours, theirs = pair(cell, 3, 4, 2, bidirectional=True, dropout=0.1)
    theirs.eval()
    theirs.weight_hh_l0.requires_grad_(False)
    parameters, before = list(theirs.parameters()), list(theirs.__dict__)
    seen = []
    handle = theirs.register_forward_hook(lambda *a: seen.append(1))
    layer = fastrnn.convert(theirs)
    assert type(layer) is type(ours)
    assert repr(layer) == repr(ours)
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert not layer.training
    assert not layer.weight_hh_l0.requires_grad
    layer(randn(5, 2, 3))
    handle.remove()
    layer(randn(5, 2, 3))
    assert seen == [1]
    back = fastrnn.revert(layer)
    assert type(back) is not type(ours)
    assert list(back.__dict__) == before
    fastrnn.revert(fastrnn.convert(ours))
    assert type(ours) is type(back)


@each_cell
def test_cells(cell):
    from helpers import CELLS

    ours, theirs = pair(cell, 3, 4, table=CELLS)
    converted = fastrnn.convert(copy.deepcopy(theirs))
    assert type(converted) is type(ours)
    torch.testing.assert_close(converted(randn(2, 3)), theirs(randn(2, 3)))
    assert type(fastrnn.revert(converted)) is type(theirs)


def test_shared_modules_stay_shared():
    shared = nn.LSTM(3, 3)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": nn.ModuleList([shared])})
    fastrnn.convert(model)
    assert model["a"][0] is model["b"] is model["c"][0]
    assert isinstance(model["b"], fastrnn.LSTM)


def test_subclasses_are_left_alone_and_rebound_names_do_not_matter(monkeypatch):
    class Mine(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    model = nn.Sequential(Mine(3, 4), nn.Linear(4, 2))
    fastrnn.convert(model)
    assert type(model[0]) is Mine
    theirs = nn.GRU(3, 4)
    monkeypatch.setattr(torch.nn, "GRU", fastrnn.GRU)
    assert isinstance(fastrnn.convert(theirs), fastrnn.GRU)
    assert type(fastrnn.revert(theirs)) is torch.nn.modules.rnn.GRU


@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_parametrized(norm):
    theirs = norm(nn.LSTM(3, 4, dtype=F64), "weight_hh_l0")
    x = randn(5, 2, 3)
    expected = theirs(x)[0]
    layer = fastrnn.convert(theirs)
    assert isinstance(layer, fastrnn.LSTM)
    torch.testing.assert_close(layer(x)[0], expected)
    names = {n for n, _ in layer.named_parameters()}
    assert any("hh_l0" in n and n != "weight_hh_l0" for n in names)
    torch.testing.assert_close(fastrnn.revert(layer)(x)[0], expected)
    assert isinstance(layer, nn.LSTM)
    if norm is parametrizations.weight_norm:
        parametrize.remove_parametrizations(layer, "weight_hh_l0")
        torch.testing.assert_close(layer(x)[0], expected)


def test_revert_lays_out_the_weights(monkeypatch):
    """cuDNN wants them in one piece; on a CPU torch's method does nothing."""
    flattened = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda layer: flattened.append(layer))
    model = fastrnn.revert(nn.ModuleList([fastrnn.LSTM(3, 4), fastrnn.LSTMCell(3, 4), fastrnn.GRU(3, 4)]))
    assert [id(layer) for layer in flattened] == [id(model[0]), id(model[2])]


def test_revert_names_what_torch_lacks_and_changes_nothing():
    model = nn.ModuleDict(
        {"ok": fastrnn.LSTM(3, 4), "deep": nn.Sequential(fastrnn.GRU(3, 4, reset_after=False))}
    )
    with pytest.raises(ValueError, match=r"^deep\.0: GRU with reset_after=False has no torch\.nn equal$"):
        fastrnn.revert(model)
    assert isinstance(model["ok"], fastrnn.LSTM)
    with pytest.raises(ValueError, match=r"^the model: GRUCell"):
        fastrnn.revert(fastrnn.GRUCell(3, 4, reset_after=False))


def test_no_module():
    for function in (fastrnn.convert, fastrnn.revert):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
            function([nn.LSTM(1, 1)])


def test_a_forward_of_its_own_is_left_alone():
    """As of hooks that patch an instance: it holds on to its class's."""
    for library, change in ((torch.nn, fastrnn.convert), (fastrnn, fastrnn.revert)):
        model = torch.nn.ModuleList([library.GRU(4, 5), library.GRU(4, 5)])
        old = model[0].forward
        model[0].forward = lambda *args, old=old: old(*args)
        change(model)
        other = fastrnn if library is torch.nn else torch.nn
        assert [type(layer) for layer in model] == [library.GRU, other.GRU]
        assert model[0](torch.randn(2, 3, 4))[0].shape == (2, 3, 5)


def test_torch_keeps_no_option_of_ours():
    assert "reset_after" not in vars(fastrnn.revert(fastrnn.GRU(3, 4)))
    assert "reset_after" not in vars(fastrnn.GRU(3, 4).to_torch())

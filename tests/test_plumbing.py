"""What programs do with a layer besides calling it: weights, copies, files, hooks, tracers, compilers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers import CELLS, F64, LAYERS, assert_same, each_layer, grads, hidden, pair, randn, tensors
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.modules import GRU, LSTM, RNN

T, B, IN, H = 4, 2, 3, 5
ATTRIBUTES = (
    "mode",
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
)


@each_layer
@pytest.mark.parametrize("bias", [True, False])
def test_names_and_lists_of_weights(cell, bias):
    ours, theirs = pair(cell, IN, H, 2, bias=bias, bidirectional=True)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights
    assert_same(tuple(ours._flat_weights), tuple(theirs._flat_weights))
    assert [[p.shape for p in group] for group in ours.all_weights] == [
        [p.shape for p in group] for group in theirs.all_weights
    ]
    assert all(
        getattr(ours, n) is w for n, w in zip(ours._flat_weights_names, ours._flat_weights, strict=True)
    )
    for name in (*ATTRIBUTES, "proj_size"):
        assert getattr(ours, name) == getattr(theirs, name)


@each_layer
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "dropout": 0.5}, {"bias": False, "batch_first": True, "bidirectional": True}],
    ids=["plain", "deep", "odd"],
)
def test_repr(cell, options):
    ours, theirs = pair(cell, IN, H, **options)
    assert repr(ours) == repr(theirs)


@each_layer
def test_setattr_keeps_flat_weights_in_step(cell):
    ours, theirs = pair(cell, IN, H)
    new = torch.nn.Parameter(torch.full_like(ours.weight_hh_l0, 0.3))
    ours.weight_hh_l0 = new
    theirs.weight_hh_l0 = new
    assert ours._flat_weights[1] is new
    x = randn(T, B, IN)
    assert_same(ours(x), theirs(x))


@each_layer
def test_flatten_parameters_never_warns(cell):
    ours, _ = pair(cell, IN, H, 2)
    shared = copy.deepcopy(ours)
    shared.weight_hh_l1 = shared.weight_hh_l0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.flatten_parameters() is None
        shared.flatten_parameters()
        shared(randn(T, B, IN))


@each_layer
def test_moves_and_casts(cell):
    ours, _ = pair(cell, IN, H)
    ours.float()
    assert all(w.dtype == torch.float32 for w in ours._flat_weights)
    ours(randn(T, B, IN).float())
    ours.double()
    assert all(
        getattr(ours, n) is w for n, w in zip(ours._flat_weights_names, ours._flat_weights, strict=True)
    )
    ours(randn(T, B, IN))


@each_layer
def test_functional_call(cell):
    ours, theirs = pair(cell, IN, H)
    x = randn(T, B, IN)
    other = {name: torch.full_like(p, 0.1) for name, p in ours.named_parameters()}
    before = ours(x)
    assert_same(torch.func.functional_call(ours, other, x), torch.func.functional_call(theirs, other, x))
    assert_same(ours(x), before)


@each_layer
def test_parametrizations_and_both_weight_norms(cell):
    for wrap in (parametrizations.weight_norm, parametrizations.orthogonal, torch.nn.utils.weight_norm):
        ours, theirs = pair(cell, IN, H)
        for layer in (ours, theirs):
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                wrap(layer, "weight_hh_l0")
        x = randn(T, B, IN)
        a, b = ours(x), theirs(x)
        assert_same(a, b)
        assert_same(grads(a, list(ours.parameters())), grads(b, list(theirs.parameters())))
        twin = ours.to_torch()
        assert {id(p) for p in twin.parameters()} == {id(p) for p in ours.parameters()}
        assert_same(twin(x), b)


@each_layer
def test_prune(cell):
    ours, theirs = pair(cell, IN, H)
    for layer in (ours, theirs):
        prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    x = randn(T, B, IN)
    assert_same(ours(x), theirs(x))
    prune.remove(ours, "weight_hh_l0")
    assert_same(ours(x), theirs(x))
    assert (ours.weight_hh_l0 == 0).sum() >= ours.weight_hh_l0.numel() // 2 - 1


@each_layer
def test_weight_tying(cell):
    ours, theirs = pair(cell, H, H, 2) if cell != "lstm_proj" else pair(cell, 2, H, 2)
    for layer in (ours, theirs):
        layer.weight_ih_l1, layer.weight_hh_l1 = layer.weight_ih_l0, layer.weight_hh_l0
    x = randn(T, B, ours.input_size)
    a, b = ours(x), theirs(x)
    assert_same(a, b)
    assert_same(grads(a, list(ours.parameters())), grads(b, list(theirs.parameters())))


def through_file(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIERS = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": through_file,
}


@each_layer
@pytest.mark.parametrize("copier", COPIERS)
def test_copies(cell, copier):
    ours, _ = pair(cell, IN, H, 2, bidirectional=True)
    other = COPIERS[copier](ours)
    x = randn(T, B, IN)
    assert type(other) is type(ours)
    assert repr(other) == repr(ours)
    assert_same(other(x), ours(x))
    if copier != "copy":
        with torch.no_grad():
            other.weight_ih_l0.add_(1)
        assert not torch.equal(tensors(other(x))[0], tensors(ours(x))[0])


@each_layer
def test_weights_only_file_of_the_state_dict(cell):
    ours, theirs = pair(cell, IN, H)
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    torch.nn.init.zeros_(ours.weight_hh_l0)
    ours.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    x = randn(T, B, IN)
    assert_same(ours(x), theirs(x))


@each_layer
def test_legacy_state(cell):
    ours, _ = pair(cell, IN, H, 2, bidirectional=True)
    state = ours.__getstate__()
    state["all_weights"] = [[getattr(ours, n) for n in names] for names in state.pop("_all_weights")]
    for name in (
        "_flat_weights_names",
        "_flat_weights",
        "reset_after",
        *([] if ours.proj_size else ["proj_size"]),
    ):
        state.pop(name, None)
    old = type(ours).__new__(type(ours))
    old.__setstate__(state)
    x = randn(T, B, IN)
    assert old.proj_size == ours.proj_size
    assert repr(old) == repr(ours)
    assert_same(old(x), ours(x))


@each_layer
def test_hooks(cell):
    ours, _ = pair(cell, IN, H)
    seen = []
    ours.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    ours.register_forward_hook(lambda m, args, out: seen.append("forward"))
    ours.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    x = randn(T, B, IN, grad=True)
    ours(x)[0].sum().backward()
    assert seen == ["forward", "backward"]
    assert x.grad.any()


@each_layer
def test_data_parallel_replica(cell):
    ours, _ = pair(cell, IN, H)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours.named_parameters():
        setattr(replica, name, p.detach() * 0)
    x = randn(T, B, IN)
    assert not replica(x)[0].any()
    assert ours(x)[0].any()
    assert ours._flat_weights[1] is ours.weight_hh_l0


@each_layer
def test_meta_device(cell):
    kind, _, extra = LAYERS[cell]
    layer = kind(IN, H, 2, bidirectional=True, device="meta", dtype=F64, **extra)
    x = torch.empty(T, B, IN, device="meta", dtype=F64)
    output, last = layer(x)
    D_P = 2 * (layer.proj_size or H)
    assert output.device.type == "meta"
    assert output.shape == (T, B, D_P)
    assert tensors(last)[-1].shape == (4, B, H)
    layer.to_empty(device="cpu").reset_parameters()
    expected = kind(IN, H, 2, bidirectional=True, dtype=F64, **extra)
    expected.load_state_dict(layer.state_dict())
    assert_same(layer(randn(T, B, IN)), expected(randn(T, B, IN)))


@each_layer
def test_to_torch_shares_parameters_and_nothing_else(cell):
    ours, theirs = pair(cell, IN, H, 2, bidirectional=True, dropout=0.2)
    twin = ours.eval().to_torch()
    assert type(twin) is type(theirs)
    assert repr(twin) == repr(theirs)
    assert not twin.training
    assert dict(twin.named_parameters()).keys() == dict(ours.named_parameters()).keys()
    assert all(a is b for a, b in zip(twin.parameters(), ours.parameters(), strict=True))
    assert not hasattr(twin, "reset_after")
    twin.register_forward_hook(lambda *a: pytest.fail("a hook of the twin ran"))
    twin.train()
    assert not ours.training
    ours(randn(T, B, IN))


def test_to_torch_refuses_what_torch_lacks():
    with pytest.raises(ValueError, match="reset_after"):
        GRU(IN, H, reset_after=False).to_torch()


class Tagger(torch.nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.head = torch.nn.Linear(rnn.hidden_size, 2, dtype=F64)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_torchscript_as_a_submodule(cell):
    model = Tagger(pair(cell, IN, H)[0])
    scripted = torch.jit.script(copy.deepcopy(model))
    x = randn(T, B, IN)
    assert_same(scripted(x), model(x))
    assert type(model.rnn) is LAYERS[cell][0]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_fx_keeps_the_layer_a_leaf(cell):
    model = Tagger(pair(cell, IN, H)[0])
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn", "head"]
    x = randn(T + 3, B, IN)
    assert_same(traced(x), model(x))


def test_fx_keeps_options_and_states():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = LSTM(IN, H, dtype=F64)

        def forward(self, x, h, c, lengths):
            return self.rnn(x, (h, c), lengths=lengths, return_states=True)

    model = Wrapper()
    traced = torch.fx.symbolic_trace(model)
    args = (randn(T, B, IN), *hidden(model.rnn, B), torch.tensor([1, 4]))
    assert_same(traced(*args), model(*args))


# Modules that are more than a layer, and what they are called with.
MODULES = {
    "attention": (
        fastrnn.Attention(IN, dtype=F64),
        (randn(T, B, IN), randn(2, B, IN)),
        {"need_weights": False},
    ),
    "attention, lengths": (
        fastrnn.Attention(IN, 4, score="general", dtype=F64),
        (randn(T, B, IN), randn(2, B, 4)),
        {"lengths": torch.tensor([2, 1])},
    ),
    "decoder": (fastrnn.AttentionDecoder(IN, H, H, dtype=F64), (randn(T, B, IN), randn(2, B, H)), {}),
    "decoder, state": (
        fastrnn.AttentionDecoder(IN, H, H, cell="gru", dtype=F64),
        (randn(T, B, IN), randn(2, B, H), randn(1, B, H)),
        {},
    ),
    "bidirectional": (
        fastrnn.Bidirectional(GRU(IN, H, dtype=F64)),
        (randn(T, B, IN),),
        {"lengths": torch.tensor([1, 4])},
    ),
    "attention, values and mask": (
        fastrnn.Attention(IN, dtype=F64),
        (randn(T, B, IN), randn(2, B, IN), randn(2, B, 4)),
        {"mask": torch.arange(2) < torch.arange(1, B + 1)[:, None]},
    ),
    "decoder, lengths": (
        fastrnn.AttentionDecoder(IN, H, H, dtype=F64),
        (randn(T, B, IN), randn(2, B, H)),
        {"lengths": torch.tensor([2, 1])},
    ),
    "bidirectional, states": (
        fastrnn.Bidirectional(GRU(IN, H, dtype=F64)),
        (randn(T, B, IN), (None, randn(1, B, H))),
        {},
    ),
    "gru": (GRU(IN, H, dtype=F64), (randn(T, B, IN), randn(1, B, H)), {}),
    "gru cell": (fastrnn.GRUCell(IN, H, dtype=F64), (randn(B, IN), randn(B, H)), {}),
    "tree": (fastrnn.TreeRNN(IN, H, dtype=F64), (None, fastrnn.Forest.from_parents([-1, 0, 0])), {}),
}


@pytest.mark.parametrize("name", MODULES)
def test_fx_keeps_these_leaves_too(name):
    """Whichever of the arguments is the traced one."""
    module, args, options = MODULES[name]

    class Wrapper(torch.nn.Module):
        def __init__(self, place):
            super().__init__()
            self.inner, self.place = module, place

        def forward(self, given):
            return self.inner(*args[: self.place], given, *args[self.place + 1 :], **options)

    for place in [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor | fastrnn.Forest)]:
        traced = torch.fx.symbolic_trace(Wrapper(place))
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["inner"]
        assert_same(traced(args[place]), module(*args, **options))


def test_fx_where_the_mask_alone_is_traced():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = fastrnn.Attention(4, dtype=F64)

        def forward(self, mask):
            return self.inner(randn(5, 4, 4), randn(6, 4, 4), mask=mask)

    model, mask = Wrapper(), torch.arange(6) < torch.tensor([1, 0, 6, 2])[:, None]
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["inner"]
    assert_same(traced(mask), model(mask))


@pytest.mark.parametrize("place", [0, 1, None], ids=["h", "c", "both"])
@pytest.mark.parametrize("kind", ["layer", "cell"])
def test_fx_looks_into_pairs(kind, place):
    """Of a call whose input is no traced one, and whichever of the pair is."""

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = (LSTM if kind == "layer" else fastrnn.LSTMCell)(IN, H, dtype=F64)
            self.x = randn(T, B, IN) if kind == "layer" else randn(B, IN)
            self.h = randn(1, B, H) if kind == "layer" else randn(B, H)

        def forward(self, h, c):
            given = (h, c) if place is None else (h, self.h) if place == 0 else (self.h, c)
            return self.inner(self.x, given)

    model = Wrapper()
    traced = torch.fx.symbolic_trace(model)
    nodes = [n for n in traced.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    assert [n.target for n in nodes] == ["inner"]
    args = (torch.tanh(model.h), torch.sigmoid(model.h))
    assert_same(traced(*args), model(*args))


def test_fx_looks_at_options():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.x = GRU(IN, H, dtype=F64), randn(T, B, IN)

        def forward(self, lengths):
            return self.inner(self.x, lengths=lengths)

    model, lengths = Wrapper(), torch.tensor([1, 4])
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["inner"]
    assert_same(traced(lengths), model(lengths))


@each_layer
def test_compiler_sees_no_graph_break(cell):
    torch._dynamo.reset()
    ours, _ = pair(cell, IN, H, 2, bidirectional=True)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x, ends = randn(T, B, IN), torch.tensor([4, 2])
    assert_same(compiled(x), ours(x))
    assert_same(compiled(x, hidden(ours, B)), ours(x, hidden(ours, B)))
    options = {"lengths": ends, "reset": torch.ones(T, B, dtype=torch.bool), "return_states": True}
    assert_same(compiled(x, **options), ours(x, **options))


def test_exact_classes():
    for kind in (LSTM, GRU, RNN):
        assert issubclass(kind, torch.nn.RNNBase)
        assert kind.__mro__[-1] is object
        assert not issubclass(kind, torch.nn.LSTM | torch.nn.GRU | torch.nn.RNN)
    for ours, theirs, _ in CELLS.values():
        assert issubclass(ours, torch.nn.RNNCellBase)
        assert not issubclass(ours, theirs)


@each_layer
def test_the_inherited_helpers_answer_as_torchs(cell):
    ours, theirs = pair(cell, IN, H)
    x, hx = randn(T, B, IN), hidden(ours, B)
    packed = pack_padded_sequence(x, torch.tensor([4, 2]))
    for args in ((x, None), (packed.data, packed.batch_sizes)):
        assert ours.get_expected_hidden_size(*args) == theirs.get_expected_hidden_size(*args)
        ours.check_forward_args(args[0], hx, args[1])
    with pytest.raises(RuntimeError, match="Expected hidden"):
        ours.check_forward_args(x[:, :1], hx, None)
    order = torch.tensor([1, 0])
    assert_same(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order))
    assert ours.permute_hidden(hx, None) is hx

"""`freeze` and `quantize`: packed weights, int8 weights, and all that a layer for inference refuses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import MASKS, random_case, random_masks
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import functional, inference, kernels, packed, reference
from fastrnn.reference import CELLS

MAKERS = {"freeze": fastrnn.freeze, "quantize": fastrnn.quantize}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
each_isa = pytest.mark.parametrize("isa", kernels.instruction_sets())
LAYERS = {
    "lstm": (fastrnn.LSTM, {}),
    "lstm_proj": (fastrnn.LSTM, {"proj_size": 5}),
    "gru": (fastrnn.GRU, {}),
    "gru_reset_before": (fastrnn.GRU, {"reset_after": False}),
    "rnn_tanh": (fastrnn.RNN, {}),
    "rnn_relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
}
# T, B, I, H, P: single elements, odd sizes, units beyond a vector, one row a step, many rows.
SHAPES = (
    (1, 1, 1, 1, 0),
    (5, 3, 4, 3, 0),
    (7, 13, 5, 33, 0),
    (3, 2, 3, 257, 0),
    (40, 1, 33, 130, 0),
    (9, 40, 17, 64, 0),
)
CASES = [(cell, *shape) for cell in CELLS for shape in SHAPES]
CASES += [("lstm", 6, 7, 3, 41, P) for P in (1, 5, 40)]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
ROUNDED = {"rtol": 0.02, "atol": 0.02}  # h, where sums in another order round it to another bfloat16
OFF = {"lengths": None, "batch_sizes": None, "reset": None}


def layer(name="lstm", *args, **options):
    kind, own = LAYERS[name]
    torch.manual_seed(3)
    return kind(*args, **own, **options)


def rounded(params, D):
    """int8 params and their scales, as `packed.pack` wants them, and the float64 weights they stand for."""
    q, scales, exact = [], [], []
    for p in params:
        if p.dim() == 1:
            q.append(p)
            exact.append(p.double())
            continue
        weight, scale = inference.rounded_rows(p)
        assert ((weight * scale[:, None] - p).abs() <= scale[:, None] * 0.5001).all()
        q.append(weight)
        scales.append(scale)
        exact.append(weight.double() * scale.double()[:, None])
    return q, scales, exact


def products_of_bfloat16():
    return kernels.instruction_set() in ("amx", "avx512bf16")


def flat(result):
    y, last, seq = result
    return [y, *last, *seq]


def quantized_error(cell, x, states, params, masks, D):
    """The largest difference to float64 with the same rounded weights, relative to the largest value."""
    q, scales, exact = rounded(params, D)
    weights = packed.pack(cell, q, scales, D)
    ours = flat(packed.layer(cell, x, states, weights, **{**OFF, **masks}, return_states=True))
    theirs = flat(reference.layer(cell, x.double(), [s.double() for s in states], exact, **masks))
    return max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mask", MASKS)
@each_case
def test_frozen_is_plain(case, mask):
    """The same bits where the plain call packs its weights too: from more than 16 rows (256) on."""
    cell, T, B, I, H, P = case
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, states, params = random_case(cell, T, B, I, H, D=2, P=P, dtype=dtype)
        x, masks = random_masks(mask, x)
        plain = flat(functional.layer(cell, x, states, params, **masks, return_states=True))
        weights = packed.pack(cell, params, [], 2)
        frozen = flat(packed.layer(cell, x, states, weights, **{**OFF, **masks}, return_states=True))
        for a, b in zip(frozen, plain, strict=True):
            if (dtype == torch.bfloat16 and not products_of_bfloat16()) or (B > 4 and T * B > 16):
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b, **(ROUNDED if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("mask", MASKS)
@each_case
def test_quantized_is_float64_with_rounded_weights(case, mask):
    cell, T, B, I, H, P = case
    x, states, params = random_case(cell, T, B, I, H, D=2, P=P, dtype=torch.float32)
    x, masks = random_masks(mask, x)
    assert quantized_error(cell, x, states, params, masks, 2) < 2e-4


@each_isa
@pytest.mark.parametrize("cell", CELLS)
def test_each_instruction_set(cell, isa, monkeypatch):
    monkeypatch.setenv("FASTRNN_CPU_ISA", isa)
    for T, B, H in ((9, 11, 37), (20, 1, 200), (3, 2, 64), (4, 4, 31), (2, 50, 70)):
        x, states, params = random_case(cell, T, B, 5, H, D=2, dtype=torch.float32)
        masks = {"lengths": torch.randint(0, T + 1, (B,))}
        assert quantized_error(cell, x, states, params, masks, 2) < 2e-4
        plain = flat(functional.layer(cell, x, states, params, **masks, return_states=True))
        weights = packed.pack(cell, params, [], 2)
        frozen = flat(packed.layer(cell, x, states, weights, **{**OFF, **masks}, return_states=True))
        for a, b in zip(frozen, plain, strict=True):
            torch.testing.assert_close(a, b)


@each_isa
@pytest.mark.parametrize("K", [1, 3, 516, 517, 4099, 20000])
def test_the_largest_sums(K, isa, monkeypatch):
    """Weights and inputs all at their largest, of either sign: what would overflow, would here."""
    monkeypatch.setenv("FASTRNN_CPU_ISA", isa)
    x = torch.ones(1, 3, K)
    x[0, 1] = -1
    params = [torch.ones(2, K), torch.zeros(2, 2)]
    params[0][1] = -1
    q, scales, _ = rounded(params, 1)
    weights = packed.pack("rnn_relu", q, scales, 1)
    y, _, _ = packed.call("rnn_relu", x, [torch.zeros(1, 3, 2)], weights)
    expected = torch.tensor([[K, 0.0], [0.0, K], [K, 0.0]])
    torch.testing.assert_close(y[0], expected)


@each_isa
def test_rows_that_are_not_finite(isa, monkeypatch):
    monkeypatch.setenv("FASTRNN_CPU_ISA", isa)
    quantized = fastrnn.quantize(layer("lstm", 21, 33))
    x = torch.randn(3, 5, 21)
    expected = quantized(x)[0]
    x[1, 0, 20], x[1, 1, 3], x[1, 2] = float("nan"), float("-inf"), 0.0
    x[0, 3] = 1e-38
    y = quantized(x)[0]
    assert y[1:, :2].isnan().all()
    assert y[:, 2:].isfinite().all()
    assert torch.equal(y[:, 4], expected[:, 4])


@each_maker
@pytest.mark.parametrize("name", LAYERS)
def test_bits_do_not_depend_on_threads(name, make):
    made = make(layer(name, 96, 300, 2, bidirectional=True))
    before = torch.get_num_threads()
    try:
        for T, B in ((20, 1), (6, 33)):
            x, results = torch.randn(T, B, 96), []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(made(x)[0])
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


@each_maker
@pytest.mark.parametrize("name", LAYERS)
def test_called_as_the_layer(name, make):
    """Every form of input and state, against the plain layer with the very weights."""
    plain = layer(name, 6, 9, 2, bidirectional=True, batch_first=True, dropout=0.5)
    made = make(plain)
    plain.eval()
    with torch.no_grad():
        for n, p in plain.named_parameters():
            if make is fastrnn.quantize and p.dim() == 2:
                p.copy_(getattr(made, f"{n}_int8") * getattr(made, f"{n}_scale")[:, None])
    x, lengths = torch.randn(4, 7, 6), torch.tensor([7, 0, 3, 5])
    some = torch.tensor([7, 1, 3, 5])
    _, hx = plain(x)
    calls = [
        lambda m: m(x),
        lambda m: m(x, hx),
        lambda m: m(x[0]),
        lambda m: m(x[:0]),
        lambda m: m(x, lengths=lengths, return_states=True),
        lambda m: m(x, reset=torch.arange(28).view(4, 7) % 3 == 1),
        lambda m: m(
            pack_padded_sequence(x, some, batch_first=True, enforce_sorted=False), return_states=True
        ),
    ]
    for call in calls:
        with torch.no_grad():
            ours, theirs = call(made), call(plain)
        torch.testing.assert_close(
            ours, theirs, **({"rtol": 1e-3, "atol": 1e-3} if make is fastrnn.quantize else {})
        )


@each_maker
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_streamed(name, make):
    """A step by the short way gives what the long one gives, and errors have their words."""
    made = make(layer(name, 6, 40))
    x = torch.randn(8, 2, 6)
    whole, last = made(x)
    state = made(x[:1])[1]
    with torch.no_grad():
        for t in range(1, 8):
            y, state = made(x[t : t + 1], state)
            torch.testing.assert_close(y[0], whole[t])
        torch.testing.assert_close(state, last)
        with pytest.raises(RuntimeError, match=r"input_size\. Expected 6, got 5"):
            made(x[:1, :, :5], state)


@each_maker
@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_and_copies(name, make):
    plain, other = layer(name, 6, 40, 2, bidirectional=True), layer(name, 6, 40, 2, bidirectional=True)
    for p in other.parameters():
        nn.init.normal_(p)
    x = torch.randn(9, 3, 6)
    made, target = make(plain), make(other)
    y = made(x)[0]
    assert not torch.equal(target(x)[0], y)
    target.load_state_dict(made.state_dict())
    assert torch.equal(target(x)[0], y)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x)[0], y)
        assert repr(twin) == repr(made)
    if make is fastrnn.freeze:
        other.load_state_dict(made.state_dict())
        assert torch.equal(make(other)(x)[0], y)
        target.load_state_dict(plain.state_dict())
        assert torch.equal(target(x)[0], y)
    else:
        with pytest.raises(RuntimeError, match="weight_ih_l0_int8"):
            target.load_state_dict(plain.state_dict())


def test_the_copy_is_on_its_own():
    plain = layer("lstm", 4, 8)
    made = fastrnn.freeze(plain)
    x = torch.randn(3, 2, 4)
    y = made(x)[0]
    with torch.no_grad():
        plain.weight_hh_l0.mul_(2)
    assert torch.equal(made(x)[0], y)
    assert plain.training
    assert not made.training
    assert not list(made.parameters())


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_error_beside_float32(name):
    """What the docstring of `quantize` says of random weights."""
    root_mean_square, most = {"lstm": (0.0006, 0.005), "gru": (0.0012, 0.008), "rnn_tanh": (0.0022, 0.013)}[
        name
    ]
    plain, x = layer(name, 256, 256), torch.randn(100, 8, 256)
    with torch.no_grad():
        error = fastrnn.quantize(plain)(x)[0] - plain(x)[0]
    assert error.square().mean().sqrt() < 1.2 * root_mean_square
    assert error.abs().max() < 1.2 * most


def test_size_is_a_quarter():
    def size(module):
        file = io.BytesIO()
        torch.save(module, file)
        state = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        return state, file.tell()

    plain = fastrnn.LSTM(512, 512)
    for ours, theirs in zip(size(fastrnn.quantize(plain)), size(plain), strict=True):
        assert ours < 0.26 * theirs


@pytest.mark.skipif(
    len(kernels.instruction_sets()) < 2, reason="compares instruction sets, and here is but one"
)
@each_maker
def test_another_machine(make, monkeypatch):
    """Packed for one instruction set: refused by one of other vectors; what is saved is packed anew."""
    monkeypatch.setenv("FASTRNN_CPU_ISA", "baseline")
    made = make(layer("gru", 4, 8))
    state, file, x = made.state_dict(), pickle.dumps(made), torch.randn(3, 2, 4)
    y = made(x)[0]
    monkeypatch.delenv("FASTRNN_CPU_ISA")
    with pytest.raises(RuntimeError, match="packed for vectors of 16 bytes"):
        made(x)
    torch.testing.assert_close(pickle.loads(file)(x)[0], y)
    made.load_state_dict(state)
    torch.testing.assert_close(made(x)[0], y)


@pytest.mark.skipif(
    not {"avx512", "avx512bf16"} <= {*kernels.instruction_sets()}, reason="needs AVX-512 with bfloat16"
)
def test_packed_singly_or_in_pairs(monkeypatch):
    monkeypatch.setenv("FASTRNN_CPU_ISA", "avx512")
    frozen = fastrnn.freeze(layer("lstm", 4, 8).bfloat16())
    x = torch.randn(3, 2, 4, dtype=torch.bfloat16)
    y = frozen(x)[0]
    monkeypatch.setenv("FASTRNN_CPU_ISA", "avx512bf16")
    with pytest.raises(RuntimeError, match="packed for another instruction set than avx512bf16: freeze"):
        frozen(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(frozen))(x)[0], y, **ROUNDED)


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
        lambda: torch.func.jvp(lambda x: made(x)[0], (x,), (x,)),
        lambda: torch.func.vmap(lambda x: made(x)[0])(x[None]),
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
        lambda: packed.pack("lstm", params[:1], [], 1),
        lambda: packed.pack("lstm", [params[0], params[1][:, :3], *params[2:]], [], 1),
        lambda: packed.pack("lstm", params, [], 3),
        lambda: packed.pack("lstm", params, scales, 1),
        lambda: packed.pack("lstm", q, [], 1),
        lambda: packed.pack("lstm", q, scales[:1], 1),
        lambda: packed.pack("lstm", q, [s[:3] for s in scales], 1),
        lambda: packed.pack("lstm", q, [s.double() for s in scales], 1),
        lambda: packed.pack("elman", params, [], 1),
        lambda: packed.pack(
            "rnn_tanh", [q[0].new_zeros(1, 131073), q[0].new_zeros(1, 1)], [torch.ones(1), torch.ones(1)], 1
        ),
    ]
    for call in wrong:
        with pytest.raises(RuntimeError):
            call()


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
    for bad in (*changed, good[:-1], good[:3], torch.zeros(0), torch.zeros(64), good.to("meta")):
        with pytest.raises(RuntimeError, match=r"fastrnn::pack gave|were packed for|same device"):
            call(bad)

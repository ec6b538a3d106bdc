"""fastrnn.init: what each function leaves, for layers and cells, ours and torch.nn's."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils import prune

import fastrnn
from fastrnn import init

H = 6
LAYERS = {
    "lstm": lambda package, **o: package.LSTM(4, H, num_layers=2, bidirectional=True, **o),
    "gru": lambda package, **o: package.GRU(4, H, num_layers=2, bidirectional=True, **o),
    "rnn": lambda package, **o: package.RNN(4, H, num_layers=2, bidirectional=True, **o),
    "lstm cell": lambda package, **o: package.LSTMCell(4, H, **o),
    "gru cell": lambda package, **o: package.GRUCell(4, H, **o),
    "rnn cell": lambda package, **o: package.RNNCell(4, H, **o),
}
each_package = pytest.mark.parametrize("package", [fastrnn, torch.nn], ids=["fastrnn", "torch"])
each_layer = pytest.mark.parametrize("name", LAYERS)


def named(layer, prefix):
    found = {k: p.detach() for k, p in layer.named_parameters() if k.startswith(prefix)}
    assert found
    return found


def others(layer, *prefixes):
    return {k: p.detach().clone() for k, p in layer.named_parameters() if not k.startswith(prefixes)}


def assert_kept(layer, before):
    for k, p in layer.named_parameters():
        assert k not in before or torch.equal(p, before[k]), k


@each_package
@each_layer
def test_orthogonal(name, package):
    layer = LAYERS[name](package)
    before = others(layer, "weight_hh")
    assert init.orthogonal_(layer, 2.0) is layer
    for p in named(layer, "weight_hh").values():
        for block in p.split(H):
            torch.testing.assert_close(block.mT @ block, 4 * torch.eye(H))
    assert_kept(layer, before)
    assert all(p.requires_grad and p.grad_fn is None for p in layer.parameters())


def test_orthogonal_of_a_projection():
    layer = init.orthogonal_(fastrnn.LSTM(4, H, proj_size=3))
    for block in layer.weight_hh_l0.detach().split(H):
        torch.testing.assert_close(block.mT @ block, torch.eye(3))


@each_package
@pytest.mark.parametrize("name", ["rnn", "rnn cell"])
def test_identity_hands_on_its_state(name, package):
    layer = init.identity_(LAYERS[name](package, nonlinearity="relu"), 0.5)
    for p in named(layer, "weight_hh").values():
        assert torch.equal(p, 0.5 * torch.eye(H))
    assert all((p == 0).all() for p in named(layer, "bias").values())
    cell = init.identity_(fastrnn.RNNCell(4, H, nonlinearity="relu"))
    h = torch.rand(2, H)
    assert torch.equal(cell(torch.zeros(2, 4), h), h)


@each_package
@pytest.mark.parametrize("name", ["lstm", "lstm cell"])
def test_forget_bias(name, package):
    layer = LAYERS[name](package)
    before = others(layer, "bias")
    biases = {k: p.clone() for k, p in named(layer, "bias").items()}
    init.forget_bias_(layer, 1.5)
    for k, p in named(layer, "bias").items():
        assert (p[H : 2 * H] == (1.5 if "bias_ih" in k else 0)).all()
        for gate in (0, 2, 3):
            assert torch.equal(p[gate * H : (gate + 1) * H], biases[k][gate * H : (gate + 1) * H])
    assert_kept(layer, before)


@each_package
@pytest.mark.parametrize("name", ["lstm", "lstm cell", "gru", "gru cell"])
def test_chrono_keeps_for_up_to_t_max_steps(name, package):
    layer = init.chrono_(LAYERS[name](package), 100)
    for k, p in named(layer, "bias_ih").items():
        keeps = p[H : 2 * H].exp()  # a sigmoid's x with e^x = u forgets 1 / (1 + u) a step
        assert ((keeps >= 1) & (keeps <= 99)).all()
        assert keeps.unique().numel() == H
        hh = layer.get_parameter(k.replace("_ih", "_hh")).detach()
        assert (hh[H : 2 * H] == 0).all()
        if "lstm" in name:
            assert torch.equal(p[:H], -p[H : 2 * H])
            assert (hh[:H] == 0).all()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_chrono_is_uniform_in_steps(kind):
    """u of U(1, t_max - 1): its ends, and its mean to 5 standard errors."""
    n, t_max = 4000, 50
    torch.manual_seed(0)
    cell = init.chrono_(getattr(fastrnn, f"{kind}Cell")(1, n), t_max)
    u = cell.bias_ih.detach()[n : 2 * n].double().exp()
    assert 1 <= u.min() < 1 + 48 * 10 / n
    assert 49 - 48 * 10 / n < u.max() <= 49 * (1 + 1e-6)
    assert abs(u.mean() - 25) < 5 * 48 / math.sqrt(12 * n)


@each_package
@each_layer
def test_recommended(name, package):
    layer = init.recommended_(LAYERS[name](package))
    for p in named(layer, "weight_hh").values():
        torch.testing.assert_close(p[:H].mT @ p[:H], torch.eye(H))
    for k, p in named(layer, "weight_ih").items():
        assert p.abs().max() <= (6 / (H + p.shape[1])) ** 0.5
        assert (p != 0).all(), k
    for k, p in named(layer, "bias").items():
        forget = torch.zeros_like(p)
        if "lstm" in name and "bias_ih" in k:
            forget[H : 2 * H] = 1
        assert torch.equal(p, forget)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_glorot_bound_is_that_of_each_gate(kind):
    """Of all gates together it would be less."""
    n = 300
    torch.manual_seed(0)
    layer = init.recommended_(getattr(fastrnn, kind)(40, n))
    bound = math.sqrt(6 / (n + 40))
    for block in layer.weight_ih_l0.detach().split(n):
        assert 0.99 * bound < block.abs().max() <= bound


def test_recommended_without_biases_and_with_relu():
    assert torch.equal(
        init.recommended_(fastrnn.RNN(4, H, nonlinearity="relu")).weight_hh_l0.detach(), torch.eye(H)
    )
    init.recommended_(fastrnn.LSTM(4, H, bias=False))


def test_a_subclass_is_what_it_extends():
    class Mine(fastrnn.GRU):
        pass

    init.chrono_(Mine(4, H), 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_every_type(kind, dtype):
    layer = init.recommended_(getattr(fastrnn, kind)(4, H, dtype=dtype))
    for block in layer.weight_hh_l0.detach().double().split(H):
        exact = dtype == torch.float64
        torch.testing.assert_close(
            block.mT @ block, torch.eye(H).double(), atol=1e-12 if exact else 1e-2, rtol=0
        )
    if kind != "RNN":
        init.chrono_(layer, 100_000)  # above float16's largest
        keeps = layer.bias_ih_l0.detach()[H : 2 * H]
        assert ((keeps >= 0) & (keeps <= 11.53)).all()


@pytest.mark.parametrize(
    "function", [init.orthogonal_, init.recommended_, lambda layer: init.chrono_(layer, 9)]
)
def test_complex_layers_are_refused(function):
    with pytest.raises(TypeError, match="draws real numbers, and this GRU is complex"):
        function(fastrnn.GRU(2, 3, dtype=torch.complex64))


COMPUTED = {
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
    "pruned": lambda layer, name: prune.l1_unstructured(layer, name, amount=0.5),
}


@each_package
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("name", ["rnn", "rnn cell"])
def test_computed_weights_are_an_error_and_nothing_is_changed(name, package, how):
    """Else they would stay as they are."""
    layer = LAYERS[name](package)
    COMPUTED[how](layer, "weight_hh" if "cell" in name else "weight_hh_l1")
    before = others(layer, "none")
    for function in (init.orthogonal_, init.identity_, init.recommended_):
        with pytest.raises(TypeError, match=r"cannot set weight_hh.* initialise the layer before"):
            function(layer)
    assert_kept(layer, before)


def test_what_is_not_set_may_be_computed():
    layer = fastrnn.LSTM(4, H)
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_ih_l0")
    init.chrono_(init.orthogonal_(layer), 9)
    block = layer.weight_hh_l0.detach()[:H]
    torch.testing.assert_close(block.mT @ block, torch.eye(H))


def test_a_class_of_that_name_is_not_that_layer():
    class LSTM(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Linear(2, 2)

    for function in (init.orthogonal_, init.recommended_, init.forget_bias_):
        with pytest.raises(TypeError, match=r"of fastrnn or torch\.nn, got LSTM"):
            function(LSTM())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: init.orthogonal_(torch.nn.Linear(2, 2)),
            TypeError,
            "takes an LSTM, GRU, RNN layer .*got Linear",
        ),
        (
            lambda: init.identity_(fastrnn.LSTM(2, 2)),
            TypeError,
            "identity_ takes an RNN layer or cell .*got LSTM",
        ),
        (lambda: init.forget_bias_(fastrnn.GRU(2, 2)), TypeError, "forget_bias_ takes an LSTM .*got GRU"),
        (lambda: init.chrono_(fastrnn.RNN(2, 2), 9), TypeError, "chrono_ takes an LSTM, GRU .*got RNN"),
        (lambda: init.chrono_(fastrnn.LSTM(2, 2), 1), ValueError, "t_max must be at least 2 steps, got 1"),
        (lambda: init.chrono_(fastrnn.LSTM(2, 2), math.nan), ValueError, "at least 2 steps, got nan"),
        (lambda: init.chrono_(fastrnn.LSTM(2, 2), math.inf), ValueError, "at least 2 steps, got inf"),
        (
            lambda: init.chrono_(fastrnn.LSTM(2, 2, bias=False), 9),
            ValueError,
            r"LSTM has none \(bias=False\)",
        ),
        (lambda: init.forget_bias_(fastrnn.LSTM(2, 2, bias=False)), ValueError, "has none"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_wrong_scale_changes_nothing():
    layer = fastrnn.RNN(4, H, nonlinearity="relu")
    before = layer.weight_hh_l0.detach().clone()
    for scale, error in (("x", TypeError), (math.nan, ValueError)):
        with pytest.raises(error, match="scale must be"):
            init.identity_(layer, scale)
    assert torch.equal(layer.weight_hh_l0, before)

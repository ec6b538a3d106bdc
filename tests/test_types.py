"""Types: autocast, float16, complex numbers, the default dtype, casts of a module, beside torch.nn."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from helpers import CELLS, LAYERS, hidden, randn, tensors
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import cells, modules, reference
from fastrnn.reference import CELLS as REGISTRY

T, B, IN, H = 20, 6, 16, 24
REDUCED = (torch.bfloat16, torch.float16)
FLOATS = (torch.float64, torch.float32, *REDUCED)
COMPLEX = (torch.complex64, torch.complex128)
FORMS = ("TB", "BT", "unbatched", "packed", "lengths")

# "reset_before" has no equal in torch.nn: its rival is what a user writes instead.
ALL_LAYERS = {**LAYERS, "gru_reset_before": (modules.GRU, None, {"reset_after": False})}
ALL_CELLS = {**CELLS, "gru_reset_before": (cells.GRUCell, None, {"reset_after": False})}
by_name = {"ids": lambda v: str(v).removeprefix("torch.")}
each_reduced = pytest.mark.parametrize("dtype", REDUCED, **by_name)
each_any_layer = pytest.mark.parametrize("name", ALL_LAYERS)
each_any_cell = pytest.mark.parametrize("name", ALL_CELLS)
# torch warns of all complex modules, of a projection in the types that oneDNN has no kernel for, and,
# from its switch for oneDNN, of TF32 that this machine lacks.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Complex modules", "ignore:LSTM with projections", "ignore:TF32 acceleration"
)


class Textbook(nn.Module):
    """The GRU whose reset gate acts before the product, as one writes it on top of torch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        step, y = REGISTRY["gru_reset_before"].step, x
        groups = self.layer.all_weights
        directions, last = 2 if self.layer.bidirectional else 1, []
        for k in range(0, len(groups), directions):
            outputs = []
            for d in range(directions):
                w, r, b, c = groups[k + d]
                h, steps = x.new_zeros(x.shape[1], self.layer.hidden_size), []
                for v in y.flip(0) if d else y:
                    (h,) = step(nn.functional.linear(v, w, b), h, (h,), r, c)
                    steps.append(h)
                outputs.append(torch.stack(steps[::-1] if d else steps))
                last.append(h)
            y = torch.cat(outputs, -1)
        return y, torch.stack(last)


class Loop(nn.Module):
    """A cell stepped over a sequence."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state, steps = None, []
        for v in x:
            state = self.cell(v, state)
            steps.append(tensors(state)[0])
        return torch.stack(steps), state


class TextbookCell(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, h):
        c = self.cell
        h = x.new_zeros(x.shape[0], c.hidden_size) if h is None else h
        gx = nn.functional.linear(x, c.weight_ih, c.bias_ih)
        return REGISTRY["gru_reset_before"].step(gx, h, (h,), c.weight_hh, c.bias_hh)[0]


def duel(name, seed, **options):
    """Ours and its rival with the same weights."""
    torch.manual_seed(seed)
    if name.startswith("cell:"):
        kind, theirs, extra = ALL_CELLS[name.removeprefix("cell:")]
        ours = kind(IN, H, **extra)
        rival = ours.to_torch() if theirs else TextbookCell(ours)
        return Loop(ours), Loop(copy.deepcopy(rival))
    kind, theirs, extra = ALL_LAYERS[name]
    ours = kind(IN, H, **{**extra, "proj_size": 12} if "proj_size" in extra else extra, **options)
    return ours, copy.deepcopy(ours.to_torch() if theirs else Textbook(ours))


def results(module, x, autocast=None):
    """Outputs, and the gradients of x and of the parameters for fixed ones of the outputs.

    Those are numbers that every type holds exactly, else the errors of two losses would be compared.
    """
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = tensors(module(x))
    given = [(randn(*y.shape, seed=3 + k) * 8).round() / 8 for k, y in enumerate(outputs)]
    loss = sum((y.double() * g).sum() for y, g in zip(outputs, given, strict=True))
    gradients = torch.autograd.grad(loss, [x, *module.parameters()])
    return [*(y.detach() for y in outputs), *gradients]


def onednn_trains_lstms_of(dtype):
    """Whether oneDNN can: never of float16; of bfloat16 where the processor has instructions for it."""
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def ratios(name, dtype, autocast, **options):
    """For every output and gradient our root mean square error over the rival's: the median of some draws.

    Relu needs more: where an error takes a unit past its kink, all that hangs on it is off by a whole step.
    """
    found = []
    for seed in range(41 if "relu" in name else 9):
        ours, theirs = duel(name, seed, **options)
        x = randn(T, B, IN, seed=seed).to(torch.float32 if autocast else dtype)
        if not autocast:
            ours, theirs = ours.to(dtype), theirs.to(dtype)
        exact = results(copy.deepcopy(theirs).double(), x.double())

        def squares(module, x, autocast, exact=exact):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = results(module, x, autocast)
            return torch.stack([(a.double() - e).square().mean() for a, e in zip(got, exact, strict=True)])

        mine = squares(ours, x, autocast and dtype)
        # torch.nn's LSTM goes to oneDNN under autocast, and fails there, unless told not to.
        fails = autocast and name == "lstm" and not onednn_trains_lstms_of(dtype)
        with torch.backends.mkldnn.flags(enabled=False) if fails else contextlib.nullcontext():
            found.append(mine / squares(theirs, x, autocast and dtype))
    return torch.stack(found).median(0).values.sqrt()


DEEP = {"num_layers": 2, "bidirectional": True}


@each_reduced
@pytest.mark.parametrize("options", [{}, DEEP], ids=["one", "deep"])
@each_any_layer
def test_autocast_errs_no_more_than_torch(name, options, dtype):
    assert (ratios(name, dtype, True, **options) <= 1.05).all()


@each_reduced
@each_any_cell
def test_cells_under_autocast_err_no_more_than_torchs(name, dtype):
    assert (ratios(f"cell:{name}", dtype, True) <= 1.05).all()


@each_reduced
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
@each_any_layer
def test_the_reference_errs_no_more_than_torch(name, autocast, dtype):
    """It serves what has no kernels: tensors of other devices."""
    with fastrnn.backend("reference"):
        assert (ratios(name, dtype, autocast) <= 1.05).all()


@pytest.mark.parametrize("options", [{}, DEEP], ids=["one", "deep"])
@each_any_layer
def test_float16_errs_no_more_than_torch(name, options):
    assert (ratios(name, torch.float16, False, **options) <= 1.05).all()


@each_any_cell
def test_float16_cells_err_no_more_than_torchs(name):
    assert (ratios(f"cell:{name}", torch.float16, False) <= 1.05).all()


def given(form, x, batch_first):
    ends = torch.tensor([5, 2, 4])
    if form == "packed":
        return pack_padded_sequence(x, ends, enforce_sorted=False), {}
    if form == "unbatched":
        return x[:, 0], {}
    return x.transpose(0, 1) if batch_first else x, {"lengths": ends} if form == "lengths" else {}


@each_reduced
@pytest.mark.parametrize("form", FORMS)
@each_any_layer
def test_autocast_gives_one_dtype(name, form, dtype):
    """To every result, from an input and states of any type; the parameters' gradients are of theirs."""
    kind, _, extra = ALL_LAYERS[name]
    layer = kind(3, 5, 2, bidirectional=True, batch_first=form == "BT", **extra)
    x, options = given(form, torch.randn(5, 3, 3), form == "BT")
    states = hidden(layer, None if form == "unbatched" else 3)
    for x_dtype in (torch.float32, *REDUCED):
        for s_dtype in (None, torch.float32, *REDUCED):
            hx = None if s_dtype is None else tuple(s.to(s_dtype).requires_grad_() for s in tensors(states))
            with torch.autocast("cpu", dtype):
                call = hx if hx is None or layer.mode == "LSTM" else hx[0]
                output, last, states_all = layer(x.to(x_dtype), call, return_states=True, **options)
            y = output.data if form == "packed" else output
            got = [y, *tensors(last), *tensors(states_all)]
            assert {t.dtype for t in got} == {dtype}
            leaves = [*layer.parameters(), *(hx or ())]
            gradients = torch.autograd.grad(sum(t.float().sum() for t in got), leaves)
            assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
            assert all(g.any() for g in gradients)


@each_reduced
@each_any_cell
def test_autocast_gives_cells_one_dtype(name, dtype):
    kind, _, extra = ALL_CELLS[name]
    cell, two = kind(3, 5, **extra), name == "lstm"
    for shape in ((4,), ()):
        for x_dtype in (torch.float32, *REDUCED):
            for s_dtype in (None, torch.float32, *REDUCED):
                states = (
                    ()
                    if s_dtype is None
                    else tuple(torch.randn(*shape, 5).to(s_dtype).requires_grad_() for _ in range(1 + two))
                )
                with torch.autocast("cpu", dtype):
                    got = tensors(
                        cell(
                            torch.randn(*shape, 3).to(x_dtype),
                            (states if two else states[0]) if states else None,
                        )
                    )
                assert {t.dtype for t in got} == {dtype}
                leaves = [*cell.parameters(), *states]
                gradients = torch.autograd.grad(sum(t.float().sum() for t in got), leaves)
                assert [g.dtype for g in gradients] == [t.dtype for t in leaves]


@each_reduced
@each_any_layer
def test_autocast_ends_and_nests(name, dtype):
    """enabled=False computes as without autocast; on the reference only what comes in and what goes out is
    rounded, no product on the way."""
    kind, _, extra = ALL_LAYERS[name]
    layer, x = kind(3, 5, 2, **extra), torch.randn(5, 3, 3)
    expected = tensors(layer(x))
    with torch.autocast("cpu", dtype):
        with torch.autocast("cpu", enabled=False):
            inside = tensors(layer(x))
        with fastrnn.backend("reference"):
            plain = tensors(layer(x))
    for a, b in zip(inside, expected, strict=True):
        assert torch.equal(a, b)
    with fastrnn.backend("reference"):
        rounded = tensors(layer.to(dtype)(x.to(dtype)))
    for a, b in zip(plain, rounded, strict=True):
        assert torch.equal(a, b)


@each_any_layer
def test_autocast_leaves_float64_and_complex_alone(name):
    kind, _, extra = ALL_LAYERS[name]
    types = [torch.float64] if name == "rnn_relu" else [torch.float64, *COMPLEX]
    for dtype in types:
        layer, x = kind(3, 5, dtype=dtype, **extra), torch.randn(5, 3, 3, dtype=dtype)
        expected = tensors(layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            for a, b in zip(tensors(layer(x)), expected, strict=True):
                assert torch.equal(a, b)


@each_any_layer
def test_autocast_refuses_to_round_float64(name):
    """As torch does; and so it is on either side of the call."""
    kind, theirs, extra = ALL_LAYERS[name]
    wide = torch.randn(5, 3, 3, dtype=torch.float64)
    for library in filter(None, (kind, theirs)):
        options = extra if library is kind or name != "gru_reset_before" else {}
        with torch.autocast("cpu", torch.bfloat16):
            layer = library(3, 5, **options)
            h = torch.zeros(1, 3, layer.proj_size or 5, dtype=torch.float64)
            hx = (h, torch.zeros(1, 3, 5, dtype=torch.float64)) if layer.mode == "LSTM" else h
            for call in (
                lambda layer=layer: layer(wide),
                lambda layer=layer, hx=hx: layer(wide.float(), hx),
                lambda layer=layer: layer.double()(wide.float()),
            ):
                with pytest.raises(RuntimeError):
                    call()


def test_double_backward_inside_autocast():
    """Its formula is plain torch, whose products autocast may round; no two types meet in it."""
    layer, x = modules.GRU(3, 5), torch.randn(5, 3, 3, requires_grad=True)

    def penalty():
        (g,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), layer.weight_hh_l0)[0]

    y = layer(x)[0].square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        ours = torch.autograd.grad(g.square().sum(), layer.weight_hh_l0)[0]
    torch.testing.assert_close(ours, penalty(), rtol=0.05, atol=0.05 * penalty().abs().max().item())


def on_fake_cuda(mode, tensor):
    """A CUDA tensor that needs no device: its operations know shapes, types and devices only."""
    return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cuda:0"))


@each_reduced
@each_any_layer
def test_autocast_on_cuda_gives_one_dtype(name, dtype, monkeypatch):
    """The device is read off the input. Without a GPU only the types that reach the backend are proven."""
    kind, _, extra = ALL_LAYERS[name]
    seen = []

    def backend(cell, x, states, params, *masks):
        seen.append({t.dtype for t in (x, *states, *params)})
        D, _, P = states[0].shape
        return x.new_empty(*x.shape[:2], D * P), tuple(torch.empty_like(s) for s in states), ()

    monkeypatch.setattr(reference, "layer", backend)
    with FakeTensorMode() as mode, torch.no_grad(), fastrnn.backend("reference"):
        layer = kind(3, 5, 2, bidirectional=True, device="meta", **extra)
        for key, parameter in layer._parameters.items():
            layer._parameters[key] = on_fake_cuda(mode, parameter)
        x = on_fake_cuda(mode, torch.empty(4, 2, 3, device="meta"))
        h = on_fake_cuda(mode, torch.empty(4, 2, layer.proj_size or 5, device="meta"))
        hx = (h, on_fake_cuda(mode, torch.empty(4, 2, 5, device="meta"))) if layer.mode == "LSTM" else h
        assert fastrnn.explain(layer, x).backend == "reference"
        plain = tensors(layer(x, hx))
        with torch.autocast("cpu", dtype):  # another device's
            plain += tensors(layer(x, hx))
        assert seen == [{torch.float32}] * 4
        # torch.autocast("cuda") turns itself off where there is no GPU.
        before = torch.get_autocast_dtype("cuda")
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            cast = tensors(layer(x, hx))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)
    assert seen[4:] == [{dtype}] * 2
    assert {t.dtype for t in plain} == {torch.float32}
    assert {t.dtype for t in cast} == {dtype}
    assert {t.device.type for t in cast} == {"cuda"}


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def assert_as_torch(ours, theirs, tolerances):
    """Types, and numbers within the table's tolerance."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(
            a, b, rtol=tolerances[a.dtype].grad_rtol, atol=tolerances[a.dtype].grad_atol
        )


def loss(nest):
    return sum(t.abs().square().sum() for t in tensors(nest))


@pytest.mark.parametrize("dtype", FLOATS, **by_name)
@pytest.mark.parametrize("name", LAYERS)
def test_default_dtype(name, dtype, default_dtype, tolerances):
    default_dtype(dtype)
    kind, theirs, extra = LAYERS[name]
    got = []
    for library in (kind, theirs):
        torch.manual_seed(0)
        layer = library(3, 5, 2, bidirectional=True, **extra)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        y = layer(torch.randn(4, 2, 3))
        got.append([*tensors(y), *torch.autograd.grad(loss(y), list(layer.parameters()))])
    assert_as_torch(*got, tolerances)


@pytest.mark.parametrize("dtype", FLOATS, **by_name)
@pytest.mark.parametrize("name", CELLS)
def test_default_dtype_of_cells(name, dtype, default_dtype, tolerances):
    default_dtype(dtype)
    kind, theirs, extra = CELLS[name]
    got = []
    for library in (kind, theirs):
        torch.manual_seed(0)
        cell = library(3, 5, **extra)
        assert {p.dtype for p in cell.parameters()} == {dtype}
        got.append(tensors(cell(torch.randn(2, 3))))
    assert_as_torch(*got, tolerances)


CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "float": (lambda m: m.double().float(), torch.float32),
    "type": (lambda m: m.type(torch.bfloat16), torch.bfloat16),
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "to_complex": (lambda m: m.to(torch.complex64), torch.complex64),
    "to_tensor": (lambda m: m.to(torch.zeros(1, dtype=torch.float64)), torch.float64),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", [*LAYERS, *(f"cell:{name}" for name in CELLS)])
def test_casts_of_a_module(name, cast, tolerances):
    """Parameters and results as torch.nn's after the same cast; on the way back, the weights that were."""
    if cast == "to_complex" and "relu" in name:
        pytest.skip("relu takes no complex numbers")
    ours, theirs = duel(name, 0)
    before = [p.detach().clone() for p in ours.parameters()]
    convert, dtype = CASTS[cast]
    got = []
    for module in (ours, theirs):
        assert convert(module) is module
        assert {p.dtype for p in module.parameters()} == {dtype}
        y = module(torch.linspace(-1, 1, 5 * 2 * IN).view(5, 2, IN).to(dtype))
        got.append([*tensors(y), *torch.autograd.grad(loss(y), list(module.parameters()))])
    assert_as_torch(*got, tolerances)
    ours.float()  # complex numbers stay
    for a, b in zip(ours.parameters(), before, strict=True):
        kept = b.to(dtype)
        torch.testing.assert_close(a, kept.float() if dtype.is_floating_point else kept, rtol=0, atol=0)
    ours(torch.randn(5, 2, IN).to(next(ours.parameters()).dtype))


@pytest.mark.parametrize("name", [*LAYERS, *(f"cell:{name}" for name in CELLS)])
def test_to_meta(name):
    ours, theirs = duel(name, 0)
    for module in (ours, theirs):
        module.to(device="meta", dtype=torch.bfloat16)
    x = torch.empty(5, 2, IN, device="meta", dtype=torch.bfloat16)
    for a, b in zip(tensors(ours(x)), tensors(theirs(x)), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@pytest.mark.parametrize("dtype", COMPLEX, **by_name)
@pytest.mark.parametrize(
    "name", ["lstm", "lstm_proj", "gru", "rnn_tanh", "cell:lstm", "cell:gru", "cell:rnn_tanh"]
)
def test_complex(name, dtype, tolerances):
    """Built so, with weights that have an imaginary part; values and gradients."""
    ours, theirs = duel(name, 0)
    torch.manual_seed(1)
    weights = [torch.randn(p.shape, dtype=dtype) / 5 for p in ours.parameters()]
    x, got = torch.randn(5, 2, IN, dtype=dtype), []
    for module in (ours, theirs):
        module.to(dtype)
        with torch.no_grad():
            for p, w in zip(module.parameters(), weights, strict=True):
                p.copy_(w)
        y = module(x)
        got.append([*tensors(y), *torch.autograd.grad(loss(y), list(module.parameters()))])
    assert_as_torch(*got, tolerances)


def test_float16_runs_the_kernels():
    """In float32 arithmetic; and a graph holds one operator, however long the sequence."""
    layer, x = modules.LSTM(3, 5).half(), torch.randn(9, 2, 3).half()
    assert fastrnn.explain(layer, x).backend == "cpu"
    assert "float32 arithmetic" in fastrnn.explain(layer, x).kernel
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(tensors(compiled(x)), tensors(layer(x)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="must have the same dtype, but got Float and Half"):
        layer(x, (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)))
    with pytest.raises(RuntimeError, match=r"w_hh must be torch\.float16 like the input"):
        fastrnn.functional.lstm(
            x, (x.new_zeros(1, 2, 5),) * 2, [layer.weight_ih_l0, layer.weight_hh_l0.float()]
        )

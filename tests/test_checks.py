"""Every error: torch.nn's own, raised beside ours, and what torch.nn lets through."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import (
    CELLS,
    F64,
    LAYERS,
    assert_same,
    assert_same_error,
    each_cell,
    each_layer,
    hidden,
    pair,
    randn,
    random_case,
)
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastrnn
from fastrnn import cells, functional, modules

T, B, IN, H = 5, 2, 3, 4

CONSTRUCTIONS = {
    "bias": {"bias": 1},
    "batch_first": {"batch_first": 0},
    "input_size_float": {"input_size": 3.0},
    "hidden_size_float": {"hidden_size": 4.0},
    "input_size_zero": {"input_size": 0},
    "hidden_size_zero": {"hidden_size": 0},
    "hidden_size_negative": {"hidden_size": -2},
    "num_layers_zero": {"num_layers": 0},
    "num_layers_float": {"num_layers": 1.5},
    "dropout_high": {"dropout": 1.1},
    "dropout_negative": {"dropout": -0.1},
    "dropout_bool": {"dropout": True},
    "dropout_str": {"dropout": "a"},
}


@each_layer
@pytest.mark.parametrize("case", CONSTRUCTIONS)
def test_construction(cell, case):
    ours, theirs, extra = LAYERS[cell]
    options = {"input_size": IN, "hidden_size": H, **extra, **CONSTRUCTIONS[case]}
    assert_same_error(lambda: ours(**options), lambda: theirs(**options))


@pytest.mark.parametrize("proj_size", [-1, 4, 5])
def test_projection_size(proj_size):
    assert_same_error(
        lambda: modules.LSTM(IN, H, proj_size=proj_size), lambda: torch.nn.LSTM(IN, H, proj_size=proj_size)
    )


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_only_the_lstm_projects(name):
    ours, theirs = getattr(modules, name), getattr(torch.nn, name)
    for size in (0, 2):
        assert_same_error(lambda s=size: ours(IN, H, proj_size=s), lambda s=size: theirs(IN, H, proj_size=s))
    with pytest.raises(TypeError, match="unexpected keyword argument 'projsize'"):
        ours(IN, H, projsize=2)
    with pytest.raises(TypeError, match="positional"):
        modules.GRU(IN, H, 1, True, False, 0.0, False, 2)
    with pytest.raises(TypeError, match="reset_after should be of type bool"):
        modules.GRU(IN, H, reset_after=1)


def test_unknown_nonlinearity():
    assert_same_error(
        lambda: modules.RNN(IN, H, nonlinearity="gelu"), lambda: torch.nn.RNN(IN, H, nonlinearity="gelu")
    )


@each_layer
def test_dropout_with_one_layer_warns(cell):
    ours, theirs, extra = LAYERS[cell]
    texts = []
    for kind in (ours, theirs):
        with pytest.warns(UserWarning, match="dropout option") as caught:
            kind(IN, H, dropout=0.5, **extra)
        texts.append([str(w.message) for w in caught])
    assert texts[0] == texts[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(IN, H, 2, dropout=0.5, **extra)


def z(*shape, **options):
    return torch.zeros(shape, **{"dtype": F64, **options})


def state_cases(layer):
    """Wrong hx for an input [T, B, I] of a layer [K, B, P], [K, B, H]."""
    P = layer.proj_size or H
    shapes = [(1, 3, P), (2, B, P), (1, B, 9), (B, P), (P,), (1, 1, B, P), (1, 0, P)]
    if layer.mode != "LSTM":
        return [z(*s) for s in shapes]
    pairs = [(z(*s), z(1, B, H)) for s in shapes]
    return [*pairs, (z(1, B, P), z(1, 3, H)), (z(1, B, P), z(B, H)), (z(1, B, P),), (z(1, B, P),) * 3]


@each_layer
def test_wrong_states(cell):
    ours, theirs = pair(cell, IN, H)
    for hx in state_cases(ours):
        assert_same_error(lambda h=hx: ours(z(T, B, IN), h), lambda h=hx: theirs(z(T, B, IN), h))
        assert_same_error(lambda h=hx: ours(z(T, IN), h), lambda h=hx: theirs(z(T, IN), h))
    whole = z(2, 1, B, ours.proj_size or H)
    if ours.mode == "LSTM":
        assert_same_error(lambda: ours(z(T, B, IN), whole), lambda: theirs(z(T, B, IN), whole), text=False)
        assert_same_error(lambda: ours(z(T, B, IN), whole[0]), lambda: theirs(z(T, B, IN), whole[0]))
    else:
        assert_same_error(lambda: ours(z(T, B, IN), (whole[0],)), lambda: theirs(z(T, B, IN), (whole[0],)))


@each_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_wrong_inputs(cell, batch_first):
    ours, theirs = pair(cell, IN, H, batch_first=batch_first)
    inputs = [
        z(IN),
        z(1, T, B, IN),
        z(T, B, IN + 1),
        z(T, IN + 1),
        z(T, B, IN, dtype=torch.float32),
        z(T, B, IN, dtype=torch.int64),
        z(B, 0, IN) if batch_first else z(0, B, IN),
        z(0, IN),
        z(T, B, IN, device="meta"),
        None,
        [z(B, IN)],
    ]
    for x in inputs:
        assert_same_error(
            lambda v=x: ours(v), lambda v=x: theirs(v), text=getattr(x, "device", None) != "meta"
        )


@each_layer
def test_states_of_another_dtype_or_device(cell):
    ours, theirs = pair(cell, IN, H)
    for options, text in (({"dtype": torch.float32}, "same dtype"), ({"device": "meta"}, "same device")):
        h, c = z(1, B, ours.proj_size or H, **options), z(1, B, H)
        hx = (h, c) if ours.mode == "LSTM" else h
        assert_same_error(lambda v=hx: ours(z(T, B, IN), v), lambda v=hx: theirs(z(T, B, IN), v), text=False)
        with pytest.raises(RuntimeError, match=text):
            ours(z(T, B, IN), hx)
    hx = hidden(ours, B)
    ours.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours(randn(T, B, IN).float(), tuple(h.float() for h in hx) if ours.mode == "LSTM" else hx.float())


@each_layer
@pytest.mark.parametrize("sort", [True, False])
def test_packed_sequences_of_the_wrong_size(cell, sort):
    ours, _ = pair(cell, IN, H)
    ends = [5, 2] if sort else [2, 5]
    packed = pack_padded_sequence(randn(T, B, IN), torch.tensor(ends), enforce_sorted=sort)
    with pytest.raises(RuntimeError, match="Expected 3, got 7"):
        ours(pack_sequence([z(5, 7)]))
    with pytest.raises(RuntimeError, match="must have 2 dimensions, got 1"):
        ours(pack_sequence([z(5)]))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        ours(pack_sequence([z(5, IN).float()]))
    P = ours.proj_size or H
    for shape in ((1, 3, P), (1, 1, P), (2, B, P), (1, B, 9), (B, P), (1, 1, B, P)):
        hx = (z(*shape), z(1, B, H)) if ours.mode == "LSTM" else z(*shape)
        with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(1, 2, "):
            ours(packed, hx)


@each_layer
def test_replaced_weights_of_the_wrong_shape(cell):
    for name in pair(cell, IN, H)[0]._flat_weights_names:
        ours, _ = pair(cell, IN, H)
        rows = list(getattr(ours, name).shape)
        for wrong in ([rows[0] + 1, *rows[1:]], [*rows[:-1], rows[-1] + 1], [*rows, 1]):
            setattr(ours, name, torch.nn.Parameter(z(*wrong)))
            with pytest.raises(RuntimeError, match=rf"{name} must be \[.*\] = .*, got \["):
                ours(z(T, B, IN))


def test_unknown_options_of_forward():
    with pytest.raises(TypeError):
        modules.LSTM(IN, H)(torch.zeros(T, B, IN), None, torch.tensor([1, 2]))


@each_cell
def test_cells(cell):
    ours, theirs = pair(cell, IN, H, table=CELLS)
    lstm = cell == "lstm"

    def hx(*shape):
        return (z(*shape), z(*shape)) if lstm else z(*shape)

    for x in (z(), z(2, B, IN)):
        assert_same_error(lambda v=x: ours(v), lambda v=x: theirs(v))
    for x in (z(B, 11), z(11)):
        assert_same_error(lambda v=x: ours(v), lambda v=x: theirs(v))
        assert_same_error(lambda v=x: ours(v, hx(B, 9)), lambda v=x: theirs(v, hx(B, 9)))
    for shape in ((), (1, B, H), (3, H), (1, H), (B, 6), (H,), (3, 6)):
        # For a 1-D state torch 2.15 has other words.
        assert_same_error(
            lambda s=shape: ours(z(B, IN), hx(*s)),
            lambda s=shape: theirs(z(B, IN), hx(*s)),
            text=len(shape) != 1,
        )
    for shape in ((), (1, B, H), (B, H), (6,)):
        assert_same_error(lambda s=shape: ours(z(IN), hx(*s)), lambda s=shape: theirs(z(IN), hx(*s)))
    assert_same_error(lambda: ours(z(B, IN).float()), lambda: theirs(z(B, IN).float()), text=False)
    wrong = (z(B, H), z(B, H).float()) if lstm else z(B, H).float()
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        ours(z(B, IN), wrong)
    with pytest.raises(RuntimeError, match="same device"):
        ours(z(B, IN, device="meta"))
    if lstm:
        for c in (z(3, H), z(B, 6), z(H), z(2, B, H)):
            assert_same_error(
                lambda v=c: ours(z(B, IN), (z(B, H), v)), lambda v=c: theirs(z(B, IN), (z(B, H), v))
            )
        h = z(B, H)
        for hx_wrong in ((h,), (h, h, h)):
            assert_same_error(lambda v=hx_wrong: ours(z(B, IN), v), lambda v=hx_wrong: theirs(z(B, IN), v))
        both = torch.stack([h, h])
        assert_same_error(lambda: ours(z(B, IN), both), lambda: theirs(z(B, IN), both), text=False)


@each_cell
def test_cells_refuse_what_torch_computes_garbage_from(cell):
    ours, _ = pair(cell, IN, H, table=CELLS)
    with pytest.raises(RuntimeError, match="inconsistent hidden_size"):  # torch.nn takes [H, H] here
        ours(z(IN), (z(H, H), z(H, H)) if cell == "lstm" else z(H, H))
    ours.weight_hh = torch.nn.Parameter(z(ours.weight_hh.shape[0], 9))
    with pytest.raises(RuntimeError, match=r"weight_hh must be \[.\*H, H\] = \[\d+, 4\], got \[\d+, 9\]"):
        ours(z(B, IN))


def test_cells_check_no_constructor_argument():
    assert_same_error(
        lambda: cells.RNNCell(IN, H, nonlinearity="gelu")(torch.zeros(B, IN)),
        lambda: torch.nn.RNNCell(IN, H, nonlinearity="gelu")(torch.zeros(B, IN)),
    )


@pytest.mark.parametrize("states", [3, 2])
def test_the_first_two_states_of_whatever_it_is_where_torch_takes_them(states):
    """Of unbatched inputs and of sequences that were not sorted it takes hx[0] and hx[1]."""
    ours, theirs = pair("lstm", IN, H)
    hx = (z(1, H),) * 3 if states == 3 else z(2, 1, H)
    assert_same(ours(z(T, IN), hx), theirs(z(T, IN), hx))
    x = pack_sequence([z(2, IN), z(3, IN)], enforce_sorted=False)
    hx = (z(1, 2, H),) * 3 if states == 3 else z(2, 1, 2, H)
    (y, last), (expected, wanted) = ours(x, hx), theirs(x, hx)
    assert_same((y.data, last), (expected.data, wanted))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_the_function_refuses(backend):
    x, states, params = random_case("lstm", 3, 2, 2, 4, D=2)
    three = ([s.repeat(2, 1, 1)[:3] for s in states], [*params, *params[:4]])
    sizes, lengths = torch.tensor([2, 1]), torch.tensor([1, 2])
    narrow = [params[0], params[1][:, :2], *params[2:]]
    cases = [
        (x, *three, {}, "for each of 1 or 2 directions, got 12 tensors for 3 directions"),
        (
            x,
            states,
            params,
            {"lengths": lengths.int()},
            r"lengths must be torch\.int64 \[2\], got torch\.int32",
        ),
        (x[:, 0], states, params, {"batch_sizes": sizes.int()}, r"batch_sizes must be torch\.int64 \[2\]"),
        (
            x[:, 0],
            states,
            params,
            {"batch_sizes": sizes, "lengths": lengths},
            "batch_sizes cannot be combined",
        ),
        (x, states, [params[0], params[1][:, :0], *params[2:]], {}, r"w_hh must be \[16, 4\], got \[16, 0\]"),
        # As many heads in both directions, where there may be any.
        (x, states, narrow, {}, r"w_hh must be \[16, (2\], got \[16, 4|4\], got \[16, 2)\]"),
    ]
    for x_, states_, params_, masks, words in cases:
        with fastrnn.backend(backend), pytest.raises(ValueError, match=words):
            functional.layer("lstm", x_, states_, params_, **masks)
    x, (_, c), params = random_case("lstm", 3, 2, 2, 4, P=2)
    for wrong, words in ((params[4][:0], r"got \[0, 4\]"), (params[4][0, 0], r"got \[\]")):
        args = (x, [c[..., :0], c], [params[0], params[1][:, :0], *params[2:4], wrong])
        with fastrnn.backend(backend), pytest.raises(ValueError, match=f"P of at least 1, {words}"):
            functional.layer("lstm", *args)
        if backend == "cpu":
            with pytest.raises(RuntimeError, match=f"P of at least 1, {words}"):
                torch.ops.fastrnn.layer("lstm", *args, None, None, None, False, True)
    with fastrnn.backend(backend), pytest.raises(ValueError, match=r"w_ih must have 2 dimensions, got \[\]"):
        functional.layer("lstm", x, [c, c], [params[0][0, 0], *params[1:4]])
    x, states, params = random_case("gru", 3, 2, 2, 4, P=4)
    with fastrnn.backend(backend), pytest.raises(ValueError, match="gru takes no projection"):
        functional.layer("gru", x, states, params)


def test_an_unknown_nonlinearity_of_the_function():
    x, (h,), params = random_case("rnn_tanh", 3, 2, 2, 4)
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        functional.rnn(x, h, params, nonlinearity="gelu")


@pytest.mark.parametrize("grad", [True, False])
@each_layer
def test_replaced_weights_of_an_input_of_their_width(cell, grad):
    """The layer's own sizes count, not those that its weights agree on."""
    for ours in pair(cell, IN, H):
        ours.weight_ih_l0 = torch.nn.Parameter(z(len(ours.weight_ih_l0), IN + 1))
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="must be"):
            ours(z(T, B, IN + 1))


@pytest.mark.parametrize("grad", [True, False])
def test_a_replaced_projection(grad):
    ours, _ = pair("lstm_proj", IN, H)
    ours.weight_hr_l0, ours.weight_hh_l0 = (torch.nn.Parameter(z(*s)) for s in ((3, H), (4 * H, 3)))
    for hx in (None, (z(1, B, 3), z(1, B, H))):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"must be|Expected hidden"):
            ours(z(T, B, IN), hx)


@pytest.mark.parametrize("grad", [True, False])
@each_cell
def test_a_cells_replaced_weight_of_its_inputs_width(cell, grad):
    """Of which torch.nn's does not ask."""
    ours, _ = pair(cell, IN, H, table=CELLS)
    ours.weight_ih = torch.nn.Parameter(z(len(ours.weight_ih), IN + 1))
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="input_size"):
        ours(z(B, IN + 1))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_states_that_nobody_asked_for(backend, grad):
    x, states, params = random_case("lstm", 3, 2, 2, 4)
    with fastrnn.backend(backend):
        x.requires_grad_(grad)
        assert functional.layer("lstm", x, states, params)[2] == ()
        assert len(functional.layer("lstm", x, states, params, return_states=True)[2]) == 1

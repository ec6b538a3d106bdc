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
)
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from fastrnn import cells, modules

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

"""`lengths`, `reset` and `return_states` against torch.nn run on each sequence, segment and step alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import F64, LAYERS, assert_same, each_layer, grads, hidden, pair, randn, tensors
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastrnn.modules import States

T, B, IN, H = 5, 4, 3, 4
ENDS = [3, 0, 5, 1]
shapes = pytest.mark.parametrize(
    ("layers", "bidirectional"), [(1, False), (1, True), (2, False), (2, True)], ids=["1", "1bi", "2", "2bi"]
)


def column(hx, b):
    """Sequence b's own hx."""
    return tuple(h[:, b : b + 1] for h in hx) if isinstance(hx, tuple) else hx[:, b : b + 1]


def batch(hiddens):
    """The inverse of `column`."""
    if isinstance(hiddens[0], tuple):
        return tuple(torch.cat(part, 1) for part in zip(*hiddens, strict=True))
    return torch.cat(hiddens, 1)


def alone(layer, x, hx, ends):
    """(output, hidden) where torch.nn's layer runs each sequence alone."""
    D = 2 if layer.bidirectional else 1
    outputs, hiddens = [], []
    for b, end in enumerate(ends):
        out, h = x.new_zeros(0, 1, D * (layer.proj_size or layer.hidden_size)), column(hx, b)
        if end:
            out, h = layer(x[:end, b : b + 1], h)
        outputs.append(torch.cat([out, out.new_zeros(T - end, 1, out.shape[2])]))
        hiddens.append(h)
    return torch.cat(outputs, 1), batch(hiddens)


@each_layer
@shapes
def test_lengths_equal_each_sequence_alone(cell, layers, bidirectional):
    ours, theirs = pair(cell, IN, H, layers, bidirectional=bidirectional)
    x, hx = randn(T, B, IN, grad=True), hidden(ours, B, grad=True)
    inputs = [x, *tensors(hx)]
    a, b = ours(x, hx, lengths=torch.tensor(ENDS)), alone(theirs, x, hx, ENDS)
    assert_same(a, b)
    assert_same(grads(a, [*inputs, *ours.parameters()]), grads(b, [*inputs, *theirs.parameters()]))


@each_layer
@pytest.mark.parametrize("padding", [float("nan"), float("inf")])
def test_padding_reaches_nothing(cell, padding):
    ours, _ = pair(cell, IN, H, 2, bidirectional=True)
    ends = torch.tensor(ENDS)
    past = torch.arange(T)[:, None] >= ends
    clean, dirty = randn(T, B, IN), randn(T, B, IN)
    dirty[past] = padding
    results = []
    for x in (clean.requires_grad_(), dirty.requires_grad_()):
        result = ours(x, lengths=ends, return_states=True)
        results.append((result, grads(result, [x, *ours.parameters()])))
    assert_same(*results)
    (output, _, states), (dx, *_) = results[1]
    assert not output[past].any()
    assert not dx[past].any()
    assert not states.h[:, past].any()


@each_layer
def test_lengths_batch_first_and_other_dtypes(cell):
    ours, _ = pair(cell, IN, H, batch_first=True)
    x, ends = randn(B, T, IN), torch.tensor(ENDS)
    ours_bt = ours(x, lengths=ends)
    ours.batch_first = False
    ours_tb = ours(x.transpose(0, 1), lengths=ends.int())
    assert_same(ours_bt, (ours_tb[0].transpose(0, 1), ours_tb[1]))


def by_segments(layer, x, hx, reset):
    """(output, hidden) where torch.nn's layer runs each piece between resets from a zero state."""
    D = 2 if layer.bidirectional else 1
    outputs, hiddens = [], []
    for b in range(x.shape[1]):
        cuts = [0, *[t for t in range(1, T) if reset[t, b]], T]
        pieces, lasts = [], []
        for start, stop in itertools.pairwise(cuts):
            keep = torch.zeros(layer.num_layers * D, 1, 1, dtype=F64)
            keep[::D] = float(start == 0 and not reset[0, b])
            if D == 2:
                keep[1::2] = float(stop == T)
            h = column(hx, b)
            h = tuple(part * keep for part in h) if isinstance(h, tuple) else h * keep
            out, last = layer(x[start:stop, b : b + 1], h)
            pieces.append(out)
            lasts.append(last)
        first = torch.zeros(layer.num_layers * D, 1, 1, dtype=torch.bool)
        first[1::2] = D == 2  # the reverse direction ends in the first piece
        ends = zip(tensors(lasts[0]), tensors(lasts[-1]), strict=True)
        merged = tuple(torch.where(first, a, z) for a, z in ends)
        outputs.append(torch.cat(pieces))
        hiddens.append(merged if len(merged) > 1 else merged[0])
    return torch.cat(outputs, 1), batch(hiddens)


@each_layer
@shapes
def test_reset_equals_separate_segments(cell, layers, bidirectional):
    ours, theirs = pair(cell, IN, H, layers, bidirectional=bidirectional)
    x, hx = randn(T, B, IN, grad=True), hidden(ours, B, grad=True)
    reset = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    inputs = [x, *tensors(hx)]
    a, b = ours(x, hx, reset=reset), by_segments(theirs, x, hx, reset)
    assert_same(a, b)
    assert_same(grads(a, [*inputs, *ours.parameters()]), grads(b, [*inputs, *theirs.parameters()]))


@each_layer
def test_reset_lies_as_the_input_lies(cell):
    ours, _ = pair(cell, IN, H, 2, bidirectional=True)
    x, hx, reset = randn(T, 1, IN), hidden(ours, 1), torch.tensor([[0], [1], [0], [1], [0]]).bool()
    expected = ours(x, hx, reset=reset)
    flat = tuple(h[:, 0] for h in hx) if ours.mode == "LSTM" else hx[:, 0]
    output, last = ours(x[:, 0], flat, reset=reset[:, 0])
    assert_same((output, last), (expected[0][:, 0], [h[:, 0] for h in tensors(expected[1])]))
    ours.batch_first = True
    output, last = ours(x.transpose(0, 1), hx, reset=reset.T)
    assert_same((output.transpose(0, 1), last), expected)


@each_layer
def test_reset_past_the_end_does_nothing(cell):
    ours, _ = pair(cell, IN, H, bidirectional=True)
    x, hx, ends = randn(T, B, IN), hidden(ours, B), torch.tensor(ENDS)
    reset = torch.arange(T)[:, None] >= ends
    assert_same(ours(x, hx, lengths=ends, reset=reset), ours(x, hx, lengths=ends))


def by_steps(layer, x, hx, ends):
    """States of torch.nn's layer, one (layer, direction) and one step at a time."""
    D, kind = (2 if layer.bidirectional else 1), type(layer)
    extra = {"nonlinearity": layer.nonlinearity} if layer.mode.startswith("RNN") else {}
    if layer.proj_size:
        extra["proj_size"] = layer.proj_size
    sequences = []
    for k in range(layer.num_layers):
        outputs = []
        for d in range(D):
            single = kind(x.shape[2], layer.hidden_size, dtype=F64, **extra)
            names = layer._all_weights[k * D + d]
            single._flat_weights = [getattr(layer, n) for n in names]
            single._flat_weight_refs = [None] * len(names)
            rows = []
            for b, end in enumerate(ends):
                i = k * D + d
                own = column(hx, b)
                s = tuple(h[i : i + 1] for h in own) if isinstance(own, tuple) else own[i : i + 1]
                steps = {}
                for t in range(end) if d == 0 else range(end - 1, -1, -1):
                    s = single(x[t : t + 1, b : b + 1], s)[1]
                    steps[t] = tensors(s)
                zeros = [torch.zeros_like(part) for part in tensors(s)]
                rows.append(
                    [torch.cat(part) for part in zip(*[steps.get(t, zeros) for t in range(T)], strict=True)]
                )
            parts = [torch.cat(part, 1) for part in zip(*rows, strict=True)]  # each [T, B, .]
            sequences.append(parts)
            outputs.append(parts[0])
        x = torch.cat(outputs, 2)
    stacked = [torch.stack(part) for part in zip(*sequences, strict=True)]
    return States(stacked[0], stacked[1] if len(stacked) > 1 else None)


@each_layer
@shapes
@pytest.mark.parametrize("form", ["TB", "BT", "lengths", "packed", "unbatched"])
def test_states(cell, layers, bidirectional, form):
    ours, theirs = pair(cell, IN, H, layers, bidirectional=bidirectional, batch_first=form == "BT")
    ends = {"lengths": ENDS, "packed": [3, 2, 5, 1]}.get(form, [T] * B)
    x, hx = randn(T, B, IN, grad=True), hidden(ours, B, grad=True)
    expected = by_steps(theirs, x, hx, ends)
    given, state, options = x, hx, {}
    if form == "BT":
        given = x.transpose(0, 1)
    elif form == "lengths":
        options["lengths"] = torch.tensor(ends)
    elif form == "packed":
        given = pack_padded_sequence(x, torch.tensor(ends), enforce_sorted=False)
    elif form == "unbatched":
        given = x[:, 0]
        state = tuple(h[:, 0] for h in hx) if isinstance(hx, tuple) else hx[:, 0]
        expected = States(*(None if s is None else s[:, :, 0] for s in expected))
    result = ours(given, state, **options, return_states=True)
    assert len(result) == 3
    assert_same(result[:2], ours(given, state, **options))
    states = result[2]
    assert (states.c is None) == (ours.mode != "LSTM")
    assert_same(states, expected)
    inputs = [x, *tensors(hx)]
    ours_all, theirs_all = [*inputs, *ours.parameters()], [*inputs, *theirs.parameters()]
    assert_same(grads(tuple(states), ours_all), grads(tuple(expected), theirs_all))


def test_packed_states_with_sorted_lengths():
    ours, _ = pair("lstm", IN, H)
    x = randn(T, 3, IN)
    packed = pack_padded_sequence(x, torch.tensor([5, 2, 1]))
    output, _, states = ours(packed, return_states=True)
    assert_same(states.h[0], pad_packed_sequence(output)[0])


def test_states_are_before_dropout():
    ours, _ = pair("gru", IN, H, 2, dropout=0.9)
    x = randn(T, B, IN)
    dropped = ours(x, return_states=True)[2]
    kept = ours.eval()(x, return_states=True)[2]
    assert_same(dropped.h[0], kept.h[0])
    assert not torch.allclose(dropped.h[1], kept.h[1])


def test_vmap_over_a_layers_lengths():
    layer, _ = pair("gru", IN, H)
    x, many = randn(T, B, IN), torch.tensor([[1, 2, 3, 4], [5, 0, 2, 1]])
    found = torch.func.vmap(lambda ends: layer(x, lengths=ends)[0])(many)
    assert_same(found, torch.stack([layer(x, lengths=ends)[0] for ends in many]))


def test_a_compiled_sorted_packed_sequence_with_states():
    layer, _ = pair("lstm", IN, H, 3)
    packed = pack_padded_sequence(randn(T, B, IN), torch.tensor([5, 3, 2, 1]))
    hx = randn(3, B, H), randn(3, B, H, seed=1)
    assert_same(torch.compile(layer, fullgraph=True, backend="eager")(packed, hx), layer(packed, hx))


@pytest.mark.parametrize("cell", LAYERS)
def test_errors(cell):
    ours, _ = pair(cell, IN, H)
    x, packed = randn(T, B, IN), pack_padded_sequence(randn(T, B, IN), torch.tensor([5, 4, 3, 2]))
    ends, reset = torch.tensor(ENDS), torch.zeros(T, B, dtype=torch.bool)
    cases = [
        (x, {"lengths": torch.tensor([3, 0, 6, 1])}, r"\[0, 5\], got 6"),
        (x, {"lengths": torch.tensor([3, -1, 5, 1])}, r"\[0, 5\], got -1"),
        (x, {"lengths": ends[:3]}, r"\[B\] = \[4\], got \[3\]"),
        (x, {"lengths": ends[None]}, r"\[B\] = \[4\], got \[1, 4\]"),
        (x, {"lengths": ends.double()}, "LongTensor, got torch.float64"),
        (x, {"lengths": ends.bool()}, "LongTensor, got torch.bool"),
        (x, {"reset": reset.to("meta")}, "reset must be on the input's device, cpu, .* got one on meta"),
        (x[:, 0], {"lengths": ends[:1]}, "unbatched"),
        (packed, {"lengths": ends}, "PackedSequence"),
        (packed, {"reset": reset}, "PackedSequence"),
        (x, {"reset": reset.T}, r"\[T, B\] = \[5, 4\], got \[4, 5\]"),
        (x, {"reset": reset.int()}, "BoolTensor, got torch.int32"),
        (x[:, 0], {"reset": reset}, r"\[T\] = \[5\], got \[5, 4\]"),
    ]
    for given, options, text in cases:
        with pytest.raises(ValueError, match=text):
            ours(given, **options)
    for name, value in (("lengths", ENDS), ("reset", [True] * T)):
        with pytest.raises(TypeError, match=name):
            ours(x, **{name: value})
    ours.batch_first = True
    with pytest.raises(ValueError, match=r"\[B, T\] = \[4, 5\], got \[5, 4\]"):
        ours(x.transpose(0, 1), reset=reset)


def test_lengths_that_lie_apart():
    layer, x = pair("gru", IN, H)[0], randn(T, B, IN)
    lengths = torch.tensor([[end, T] for end in ENDS])[:, 0]
    assert not lengths.is_contiguous()
    assert_same(layer(x, lengths=lengths), layer(x, lengths=torch.tensor(ENDS)))

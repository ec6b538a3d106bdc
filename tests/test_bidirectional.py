"""`fastrnn.Bidirectional` beside layers of two directions, and beside each sequence run alone."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from helpers import F64, assert_same, grads, hidden, pair, randn, tensors
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import Bidirectional
from fastrnn.bidirectional import MERGES

T, B, IN, H = 5, 4, 3, 4
ENDS = [3, 0, 5, 1]
KINDS = {
    "lstm": fastrnn.LSTM,
    "lstm_proj": functools.partial(fastrnn.LSTM, proj_size=2),
    "gru": fastrnn.GRU,
    "gru_reset_before": functools.partial(fastrnn.GRU, reset_after=False),
    "rnn": fastrnn.RNN,
    "torch_lstm": nn.LSTM,
    "torch_lstm_proj": functools.partial(nn.LSTM, proj_size=2),
    "torch_gru": nn.GRU,
    "torch_rnn": nn.RNN,
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_library = pytest.mark.parametrize("kind", ["lstm", "torch_lstm", "gru", "torch_gru"])


def wrapped(kind, layers=1, merge="concat", dtype=F64, **options):
    torch.manual_seed(3)
    return Bidirectional(KINDS[kind](IN, H, layers, dtype=dtype, **options), merge=merge)


def states(bi, batch=B, grad=False):
    layers = bi.forward_layer, bi.backward_layer
    return tuple(hidden(layer, batch, seed=1 + 4 * d, grad=grad) for d, layer in enumerate(layers))


def each(f, state):
    return tuple(map(f, state)) if isinstance(state, tuple) else f(state)


def alone(layer, x, hx, ends, reverse):
    """(output, state) of one direction where every sequence runs by itself, turned by hand."""
    outputs, lasts = [], []
    for b, end in enumerate(ends):
        out, h = (
            x.new_zeros(0, 1, layer.proj_size or layer.hidden_size),
            each(lambda s, b=b: s[:, b : b + 1], hx),
        )
        if end:
            steps = x[:end, b : b + 1]
            out, h = layer(steps.flip(0) if reverse else steps, h)
            out = out.flip(0) if reverse else out
        outputs.append(torch.cat([out, out.new_zeros(len(x) - end, 1, out.shape[2])]))
        lasts.append(tensors(h))
    return torch.cat(outputs, 1), [torch.cat(part, 1) for part in zip(*lasts, strict=True)]


def both_alone(bi, x, hx, ends):
    """(concatenated output, (state_f, state_b))."""
    layers = zip((bi.forward_layer, bi.backward_layer), hx, (False, True), strict=True)
    found = [alone(layer, x, state, ends, reverse) for layer, state, reverse in layers]
    return torch.cat([out for out, _ in found], 2), tuple(last for _, last in found)


@pytest.mark.parametrize("cell", ["lstm", "lstm_proj", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("library", [0, 1], ids=["fastrnn", "torch"])
def test_equals_one_layer_of_two_directions(cell, library):
    both, _ = pair(cell, IN, H, bidirectional=True)
    bi = Bidirectional(pair(cell, IN, H)[library])
    for p, q in zip(bi.parameters(), both.parameters(), strict=True):
        assert torch.equal(p, q)  # one seed, the same draws
    x, hx, lengths = randn(T, B, IN, grad=True), hidden(both, B, grad=True), torch.tensor(ENDS)
    given = [each(lambda h, d=d: h[d : d + 1], hx) for d in (0, 1)]
    packed, again = (
        pack_padded_sequence(x, torch.tensor([3, 2, 5, 1]), enforce_sorted=False) for _ in range(2)
    )
    for value, same, options in ((x, x, {}), (x, x, {"lengths": lengths}), (packed, again, {})):
        expected, last = both(value, hx, **options)
        output, found = bi(same, given, **options)
        joined = [torch.cat(parts) for parts in zip(*map(tensors, found), strict=True)]
        assert_same((output, joined), (expected, last))
        inputs = [x, *tensors(hx)]
        ours = grads((output, joined), [*inputs, *bi.parameters()])
        assert_same(ours, grads((expected, last), [*inputs, *both.parameters()]))


@each_kind
@pytest.mark.parametrize("layers", [1, 2])
def test_lengths_equal_each_sequence_alone(kind, layers):
    bi = wrapped(kind, layers)
    x, hx = randn(T, B, IN, grad=True), states(bi, grad=True)
    wanted = [x, *tensors(hx), *bi.parameters()]
    a, b = bi(x, hx, lengths=torch.tensor(ENDS)), both_alone(bi, x, hx, ENDS)
    assert_same(a, b)
    assert_same(grads(a, wanted), grads(b, wanted))
    assert_same(bi(x, hx), both_alone(bi, x, hx, [T] * B))
    # Without a first state: zeros.
    zeros = tuple(each(torch.zeros_like, state) for state in hx)
    assert_same(bi(x, lengths=torch.tensor(ENDS)), bi(x, zeros, lengths=torch.tensor(ENDS)))


@each_kind
def test_padding_reaches_nothing(kind):
    bi = wrapped(kind, 2)
    ends = torch.tensor(ENDS)
    past = torch.arange(T)[:, None] >= ends
    results = []
    for padding in (0.0, float("nan")):
        x = randn(T, B, IN).masked_fill(past[..., None], padding).requires_grad_()
        result = bi(x, lengths=ends)
        results.append((result, grads(result, [x, *bi.parameters()])))
    assert_same(*results)
    assert not results[1][0][0][past].any()
    assert not results[1][1][0][past].any()


@each_library
def test_batch_first_and_unbatched(kind):
    bi, lengths = wrapped(kind, 2, batch_first=True), torch.tensor(ENDS)
    x, hx = randn(B, T, IN), states(bi)
    expected = both_alone(wrapped(kind, 2), x.transpose(0, 1), hx, ENDS)
    output, last = bi(x, hx, lengths=lengths.int())
    assert_same((output.transpose(0, 1), last), expected)
    assert_same(bi(x, hx)[0].transpose(0, 1), both_alone(wrapped(kind, 2), x.transpose(0, 1), hx, [T] * B)[0])
    flat = [each(lambda h: h[:, 0], state) for state in hx]
    output, last = bi(x[0], flat)
    batched = bi(x[:1], [each(lambda h: h[:, :1], state) for state in hx])
    assert_same((output, last), (batched[0][0], [h[:, 0] for h in tensors(batched[1])]))


@each_library
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(kind, enforce_sorted):
    bi = wrapped(kind, 2)
    ends = sorted([2, 1, 5, 3], reverse=True) if enforce_sorted else [2, 1, 5, 3]
    x, hx = randn(T, B, IN, grad=True), states(bi, grad=True)
    packed = pack_padded_sequence(x, torch.tensor(ends), enforce_sorted=enforce_sorted)
    output, last = bi(packed, hx)
    padded, expected = both_alone(bi, x, hx, ends)
    wanted = pack_padded_sequence(padded, torch.tensor(ends), enforce_sorted=enforce_sorted)
    assert isinstance(output, PackedSequence)
    assert_same((output, last), (wanted, expected))
    inputs = [x, *tensors(hx), *bi.parameters()]
    assert_same(grads((output.data, last), inputs), grads((wanted.data, expected), inputs))
    bi.merge = None
    f, b = bi(packed, hx)[0]
    assert_same(torch.cat((f.data, b.data), 1), wanted.data)


BY_HAND = {
    "concat": lambda f, b: torch.cat((f, b), -1),
    "sum": lambda f, b: f + b,
    "mul": lambda f, b: f * b,
    "mean": lambda f, b: 0.5 * f + 0.5 * b,
    None: lambda f, b: (f, b),
}


@pytest.mark.parametrize("merge", BY_HAND)
def test_merge(merge):
    assert set(BY_HAND) == {*MERGES, None}
    bi, x, lengths = wrapped("gru", merge=merge), randn(T, B, IN), torch.tensor(ENDS)
    plain = both_alone(bi, x, states(bi), ENDS)[0]
    assert_same(bi(x, states(bi), lengths=lengths)[0], BY_HAND[merge](*plain.split(H, 2)))
    assert repr(merge) in repr(bi)


def test_two_different_layers():
    bi = Bidirectional(fastrnn.LSTM(IN, H, dtype=F64), nn.GRU(IN, 7, 2, dtype=F64))
    x = randn(T, B, IN)
    output, (f, b) = bi(x, (None, None), lengths=torch.tensor(ENDS))
    assert output.shape == (T, B, H + 7)
    assert [tuple(s.shape) for s in (*f, b)] == [(1, B, H), (1, B, H), (2, B, 7)]
    assert_same(b, alone(bi.backward_layer, x, torch.zeros(2, B, 7, dtype=F64), ENDS, True)[1])


def test_the_fresh_layer():
    options = {"dropout": 0.3, "batch_first": True, "bias": False, "dtype": F64}
    forward = fastrnn.GRU(IN, H, 2, reset_after=False, **options).eval()
    forward.weight_hh_l0.requires_grad_(False)
    fresh = Bidirectional(forward).backward_layer
    assert type(fresh) is fastrnn.GRU
    assert repr(fresh) == repr(forward)
    assert not fresh.training
    for (name, p), (_, q) in zip(fresh.named_parameters(), forward.named_parameters(), strict=True):
        assert p.shape == q.shape
        assert p.dtype == q.dtype
        assert p.requires_grad, name
        assert not torch.equal(p, q)


def test_inside_converted_and_frozen_models():
    bi, x = wrapped("torch_lstm", 2), randn(T, B, IN)
    lengths = torch.tensor(ENDS)
    expected = bi(x, lengths=lengths)
    names = list(bi.state_dict())
    assert_same(fastrnn.convert(bi)(x, lengths=lengths), expected)
    assert list(bi.state_dict()) == names
    with torch.no_grad():
        assert_same(fastrnn.freeze(bi)(x, lengths=lengths), expected)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_compiled(kind):
    torch._dynamo.reset()
    bi, lengths = wrapped(kind, 2), torch.tensor(ENDS)
    compiled = torch.compile(bi, fullgraph=True, backend="aot_eager")
    packed = pack_padded_sequence(randn(T, B, IN), torch.tensor([2, 1, 5, 3]), enforce_sorted=False)
    for value, options in ((randn(T, B, IN), {}), (randn(T, B, IN), {"lengths": lengths}), (packed, {})):
        expected, found = bi(value, **options), compiled(value, **options)
        assert_same(found, expected)
        wanted = list(bi.parameters())
        assert_same(grads(found, wanted), grads(expected, wanted))


def test_sizes_compile_once_each():
    """T and B become dynamic at their second value; nothing is compiled after that."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    bi = wrapped("gru")
    compiled = torch.compile(bi, fullgraph=True, backend=counter)
    for steps, batch in ((10, 3), (50, 3), (7, 5), (12, 2), (9, 7)):
        x, lengths = randn(steps, batch, IN), torch.arange(batch)
        assert_same(compiled(x, lengths=lengths), bi(x, lengths=lengths))
    assert counter.frame_count == 3


@each_library
def test_autocast(kind):
    """With lengths the results are of the types that a PackedSequence gives."""
    bi = wrapped(kind, dtype=torch.float32)
    x, hx = randn(T, B, IN).float(), tuple(each(lambda h: h.float(), s) for s in states(bi))
    packed = pack_padded_sequence(x, torch.tensor([3, 2, 5, 1]), enforce_sorted=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = bi(packed, hx), bi(x, hx, lengths=torch.tensor(ENDS))
    assert found[0].dtype == expected[0].data.dtype
    assert [t.dtype for t in tensors(found[1])] == [t.dtype for t in tensors(expected[1])]


def test_compiled_lengths_out_of_range_stay_in_bounds():
    torch._dynamo.reset()
    bi, x = wrapped("gru"), randn(T, B, IN)
    found = torch.compile(bi, fullgraph=True, backend="eager")(x, lengths=torch.tensor([9, -4, 5, 1]))
    assert_same(found, bi(x, lengths=torch.tensor([5, 0, 5, 1])))


def test_exported_and_traced():
    bi, x = wrapped("lstm", dtype=torch.float32), randn(T, B, IN).float()
    program = torch.export.export(bi, (x,)).module()
    assert_same(program(x), bi(x), rtol=1e-5, atol=1e-6)
    traced = torch.fx.symbolic_trace(nn.Sequential(bi))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_same(traced(x), bi(x))


def test_gradgradcheck():
    bi, lengths = wrapped("gru"), torch.tensor([2, 0])

    def run(x):
        return bi(x, lengths=lengths)[0]

    assert torch.autograd.gradcheck(run, (randn(3, 2, IN, grad=True),))
    assert torch.autograd.gradgradcheck(run, (randn(3, 2, IN, grad=True),))


def test_an_empty_batch():
    for kind in ("lstm", "torch_lstm"):
        output, _ = wrapped(kind)(randn(T, 0, IN), lengths=torch.zeros(0, dtype=torch.long))
        assert output.shape == (T, 0, 2 * H)


def gru(*sizes, **options):
    return fastrnn.GRU(*sizes, **options)


def older_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its age
        return weight_norm(layer, "weight_hh_l0")


BAD_LAYERS = [
    (
        (nn.Linear(3, 4),),
        {},
        TypeError,
        "forward_layer must be a recurrent layer of fastrnn or torch.nn, got Linear",
    ),
    (
        (gru(3, 4), 5),
        {},
        TypeError,
        "backward_layer must be a recurrent layer of fastrnn or torch.nn, got int",
    ),
    (
        (gru(3, 4),),
        {"merge": "add"},
        ValueError,
        "merge must be one of concat, sum, mul, mean or None, got 'add'",
    ),
    ((gru(3, 4),), {"merge": ["sum"]}, ValueError, r"or None, got \['sum'\]"),
    ((gru(3, 4), gru(5, 4)), {}, ValueError, "one input_size, got 3 and 5"),
    ((gru(3, 4), gru(3, 4, batch_first=True)), {}, ValueError, "one batch_first, got False and True"),
    (
        (gru(3, 4), gru(3, 5)),
        {"merge": "mul"},
        ValueError,
        "merge='mul' needs outputs of one width, got 4 and 5",
    ),
    ((parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0"),), {}, ValueError, "parametrized layer"),
    ((older_weight_norm(nn.GRU(3, 4)),), {}, ValueError, "parametrized layer"),
    (
        (prune.l1_unstructured(gru(3, 4), "weight_hh_l0", 0.5),),
        {},
        ValueError,
        "pruned or parametrized layer",
    ),
    ((fastrnn.freeze(gru(3, 4)),), {}, ValueError, "frozen layer"),
]


@pytest.mark.parametrize(("layers", "options", "error", "text"), BAD_LAYERS)
def test_layers_that_do_not_go_together(layers, options, error, text):
    with pytest.raises(error, match=text):
        Bidirectional(*layers, **options)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_no_sequence_is_as_long_as_the_padding(kind):
    bi, x, ends = Bidirectional(kind(IN, H, dtype=F64)), randn(T, B, IN), torch.tensor([3, 0, 2, 1])
    output, last = bi(x, lengths=ends)
    assert output.shape == (T, B, 2 * H)
    assert_same((output[:3], last), bi(x[:3], lengths=ends))
    assert not output[3:].any()


def test_widths_of_projections_and_directions():
    projected, plain = fastrnn.LSTM(3, 4, proj_size=2), fastrnn.LSTM(3, 2)
    assert Bidirectional(projected, plain, merge="sum")(torch.randn(5, 1, 3))[0].shape == (5, 1, 2)
    with pytest.raises(ValueError, match="one width, got 2 and 4"):
        Bidirectional(projected, fastrnn.LSTM(3, 4), merge="sum")
    both, wide = fastrnn.GRU(3, 2, bidirectional=True), fastrnn.GRU(3, 4)
    assert Bidirectional(both, wide, merge="mul")(torch.randn(5, 1, 3))[0].shape == (5, 1, 4)
    with pytest.raises(ValueError, match="one width, got 4 and 2"):
        Bidirectional(both, fastrnn.GRU(3, 2), merge="mul")


@pytest.mark.parametrize("merge", ["sum", "mul", "mean"])
def test_widths_that_would_broadcast(merge):
    with pytest.raises(ValueError, match=f"merge='{merge}' needs outputs of one width, got 4 and 1"):
        Bidirectional(fastrnn.GRU(3, 4), fastrnn.GRU(3, 1), merge=merge)


def test_explain_says_which_of_the_two_cannot_run():
    with fastrnn.backend("cuda"):
        bi = Bidirectional(nn.GRU(2, 3), fastrnn.GRU(2, 3))
        assert fastrnn.explain(bi, torch.randn(4, 3, 2)).backend is None


@each_library
def test_bad_inputs(kind):
    bi, x = wrapped(kind), randn(T, B, IN)
    packed = pack_padded_sequence(x, torch.tensor([5, 3, 2, 1]))
    cases = [
        (x, {"hx": x}, TypeError, r"a pair \(hx of forward_layer, hx of backward_layer\), got Tensor"),
        (x, {"hx": (x,)}, TypeError, "got 1 entries"),
        (x, {"hx": (None, None, None)}, TypeError, "got 3 entries"),
        (x, {"lengths": torch.tensor([1, 2, 3])}, ValueError, r"lengths must be \[B\] = \[4\], got \[3\]"),
        (x, {"lengths": torch.tensor([1, 2, 6, 0])}, ValueError, r"\[0, T\] = \[0, 5\], got 6"),
        (x, {"lengths": ENDS}, TypeError, "lengths must be a LongTensor"),
        (x, {"lengths": torch.tensor(ENDS, device="meta")}, ValueError, "device, cpu, .* got one on meta"),
        (x[0, 0], {}, ValueError, "Expected input to be 2D or 3D, got 1D"),
        (x[:, 0], {"lengths": torch.tensor([2])}, ValueError, "lengths needs a batched input"),
        (packed, {"lengths": torch.tensor(ENDS)}, ValueError, "cannot be combined with a PackedSequence"),
        (x.tolist(), {}, TypeError, "input must be a Tensor, got list"),
        (x[:0], {}, RuntimeError, "sequence length to be larger than 0"),
        (x[..., :2], {}, RuntimeError, "Expected 3, got 2"),
    ]
    for value, options, error, text in cases:
        with pytest.raises(error, match=text):
            bi(value, **options)
    bi.backward_layer.batch_first = True
    with pytest.raises(ValueError, match="one batch_first"):
        bi(x)

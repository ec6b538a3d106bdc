"""fastrnn.AttentionDecoder beside a Python loop over torch.nn's cells, in float64, and its own steps."""

from __future__ import annotations

import pytest
import torch
from helpers import F64, Fresh, assert_same, grads, randn
from torch import nn

import fastrnn
from fastrnn import kernels
from fastrnn.attention import SCORES
from fastrnn.fused import Decoder

CELLS = ("lstm", "gru", "rnn")
each_cell = pytest.mark.parametrize("cell", CELLS)
each_score = pytest.mark.parametrize("score", SCORES)
each_feeding = pytest.mark.parametrize("feeding", [True, False], ids=["feeding", "plain"])
# T, B, S, I, H, M; M of "dot" is H. Vectors that are whole and not, rows of more than one tile.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (4, 3, 5, 2, 6, 7),
    (3, 2, 20, 5, 33, 12),
    (6, 17, 9, 8, 48, 40),
    (2, 3, 4, 3, 16, 16),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def case(cell, score, shape, feeding=True, layers=1, grad=True, **options):
    T, B, S, I, H, M = shape
    M = H if score == "dot" else M
    torch.manual_seed(5)
    decoder = fastrnn.AttentionDecoder(
        I, H, M, cell=cell, score=score, input_feeding=feeding, num_layers=layers, dtype=F64, **options
    )
    x, memory = randn(T, B, I, seed=1, grad=grad), randn(S, B, M, seed=2, grad=grad)
    states = [randn(layers, B, H, seed=3 + j, grad=grad) for j in range(1 + (cell == "lstm"))]
    feed = [randn(B, H, seed=6).tanh().detach().requires_grad_(grad)] if feeding else []
    lengths = torch.tensor([S, 0, *(1 + b % S for b in range(2, B))][:B])
    return decoder, x, memory, [*states, *feed], lengths


def packed(states):
    return tuple(states) if len(states) > 1 else states[0]


def textbook(decoder, x, memory, states, lengths):
    """A loop over torch.nn's cells and single sequences."""
    T, B, _ = x.shape
    H, L, two = decoder.hidden_size, decoder.num_layers, decoder.cell == "lstm"
    kind = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[decoder.cell]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def cell(k, v, state):
        w = {name: getattr(decoder, f"{name}_l{k}") for name in names}
        made = kind(w["weight_ih"].shape[1], H, dtype=F64)
        return torch.func.functional_call(made, w, (v, state))

    layers = [tuple(s[k] for s in states[: 1 + two]) for k in range(L)]
    a = states[-1] if decoder.input_feeding else None
    outs, columns = [], []
    for t in range(T):
        v = torch.cat([x[t], a], -1) if decoder.input_feeding else x[t]
        for k in range(L):
            new = cell(k, v, layers[k] if two else layers[k][0])
            layers[k] = new if two else (new,)
            v = layers[k][0]
        contexts, rows = [], []
        for b in range(B):
            m = memory[: lengths[b], b]
            attention = decoder.attention
            if decoder.attention.score == "dot":
                scores = m @ v[b]
            elif decoder.attention.score == "general":
                scores = m @ (attention.weight.mT @ v[b])
            else:
                scores = torch.tanh(m @ attention.weight_m.mT + attention.weight_q @ v[b]) @ attention.v
            w = scores.softmax(0)
            contexts.append(w @ m)
            rows.append(nn.functional.pad(w, (0, memory.shape[0] - len(w))))
        a = torch.tanh(torch.cat([torch.stack(contexts), v], -1) @ decoder.weight_c.mT)
        outs.append(a)
        columns.append(torch.stack(rows))
    last = [torch.stack(column) for column in zip(*layers, strict=True)]
    return torch.stack(outs), (*last, a) if decoder.input_feeding else packed(last), torch.stack(columns, 1)


@each_feeding
@pytest.mark.parametrize("layers", [1, 2])
@each_score
@each_cell
def test_equals_the_textbook(cell, score, layers, feeding):
    decoder, x, memory, states, lengths = case(cell, score, SHAPES[1], feeding, layers)
    ours = decoder(x, memory, packed(states), lengths=lengths)
    theirs = textbook(decoder, x, memory, states, lengths)
    assert_same(ours, theirs)
    leaves = [x, memory, *states, *decoder.parameters()]
    assert_same(grads(ours, leaves), grads(theirs, leaves), rtol=1e-10, atol=1e-11)


@each_shape
@each_score
@each_cell
def test_kernels_equal_the_reference(cell, score, shape):
    decoder, x, memory, states, lengths = case(cell, score, shape, layers=2)
    leaves, results = [x, memory, *states, *decoder.parameters()], []
    for backend in ("cpu", "reference"):
        for given in (None, lengths):
            with fastrnn.backend(backend):
                out = decoder(x, memory, packed(states), lengths=given)
                with torch.no_grad():
                    plain = decoder(x, memory, packed(states), lengths=given)
                results.append((out, plain, grads(out, leaves)))
    assert_same(results[:2], results[2:], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_each_instruction_set(isa, use_isa):
    use_isa(isa)
    for cell, score in zip(CELLS, SCORES, strict=True):
        test_kernels_equal_the_reference(cell, score, SHAPES[2])


def test_every_cell_of_the_registry():
    """The decoder's operator takes any of them, the two-stage GRU too."""
    T, B, S, I, H = 4, 3, 5, 2, 20
    for cell, spec in fastrnn.reference.CELLS.items():
        G = spec.gates * H
        shapes = [
            (T, B, I),
            *[(1, B, H)] * spec.states,
            (B, H),
            (G, I + H),
            (G, H),
            (G,),
            (G,),
            (H, H),
            (S, B, H),
            (S, B, H),
        ]
        flat = [0.5 * randn(*shape, seed=i, grad=True) for i, shape in enumerate(shapes)]
        leaves = [t.detach().requires_grad_() for t in flat]
        call, given = Decoder(cell, 1, 1.0), [*leaves, None, None, None]
        ours, theirs = fastrnn.fused.run(call, given), call.reference(given)
        assert_same((ours, grads(ours, leaves)), (theirs, grads(theirs, leaves)), rtol=1e-10, atol=1e-11)


@each_feeding
@each_score
@each_cell
def test_steps_equal_teacher_forcing(cell, score, feeding):
    decoder, x, memory, _, lengths = case(cell, score, SHAPES[1], feeding, 2, grad=False)
    out, last, weights = decoder(x, memory, lengths=lengths)
    state, outs, columns = None, [], []
    for t in range(len(x)):
        a, state, w = decoder.step(x[t], memory, state, lengths=lengths)
        outs.append(a)
        columns.append(w)
    assert_same((torch.stack(outs), state, torch.stack(columns, 1)), (out, last, weights))


@each_feeding
@each_cell
def test_a_state_goes_on(cell, feeding):
    """What a call returned continues it; an encoder's state begins one."""
    decoder, x, memory, states, lengths = case(cell, "general", SHAPES[3], feeding, 2, grad=False)
    whole = decoder(x, memory, packed(states), lengths=lengths)
    first = decoder(x[:4], memory, packed(states), lengths=lengths)
    second = decoder(x[4:], memory, first[1], lengths=lengths)
    assert_same(torch.cat([first[0], second[0]]), whole[0])
    assert_same(second[1], whole[1])
    encoder = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}[cell](8, 48, 2, dtype=F64)
    hidden = encoder(x)[1]
    zero = torch.zeros_like(states[0][0])
    begun = (*hidden, zero) if cell == "lstm" else (hidden, zero)
    assert_same(decoder(x, memory, hidden), decoder(x, memory, begun if feeding else hidden))


@each_cell
def test_padding_reaches_nothing(cell):
    for score in SCORES:
        decoder, x, memory, states, lengths = case(cell, score, SHAPES[2])
        padded = torch.arange(len(memory))[:, None] >= lengths
        dirty = memory.detach().masked_fill(padded[:, :, None], torch.nan).requires_grad_()
        leaves = [x, *states, *decoder.parameters()]
        clean = decoder(x, memory, packed(states), lengths=lengths)
        ours = decoder(x, dirty, packed(states), lengths=lengths)
        ours_grads = grads(ours, [*leaves, dirty])
        assert_same((ours, ours_grads), (clean, grads(clean, [*leaves, memory])))
        assert not ours_grads[-1][padded].any()
        assert not ours[2][1].any()  # of length 0


@each_score
@each_cell
def test_gradcheck_and_gradgradcheck(cell, score):
    decoder, x, memory, states, lengths = case(cell, score, (2, 2, 2, 1, 2, 2))
    names = [n for n, _ in decoder.named_parameters()]

    def f(x, memory, *rest):
        weights = dict(zip(names, rest[len(states) :], strict=True))
        out, last, w = torch.func.functional_call(
            decoder, weights, (x, memory, packed(rest[: len(states)])), {"lengths": lengths}
        )
        return (out, *last, w)

    leaves = (x, memory, *states, *decoder.parameters())
    with fastrnn.backend("cpu"):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


def test_each_output_alone():
    decoder, x, memory, states, _ = case("lstm", "dot", SHAPES[1])
    leaves = [x, memory, *states, *decoder.parameters()]

    def run():
        out, last, weights = decoder(x, memory, packed(states))
        return [out, *last, weights]

    for i in range(5):
        ours = torch.autograd.grad(run()[i].square().sum(), leaves, allow_unused=True)
        out = run()
        dense = [torch.zeros_like(o) for o in out]
        dense[i] = 2 * out[i].detach()
        for a, b in zip(ours, torch.autograd.grad(out, leaves, dense), strict=True):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


def test_last_states_may_be_edited_before_backward():
    decoder, x, memory, states, _ = case("gru", "dot", SHAPES[1])
    out, (h, _), _ = decoder(x, memory, packed(states))
    expected = grads(out, [x, memory])
    out, (h, _), _ = decoder(x, memory, packed(states))
    with torch.no_grad():
        h.zero_()
    assert_same(grads(out, [x, memory]), expected)


@each_feeding
def test_dropout_draws_what_torch_draws(feeding):
    """Between the layers, in training alone; the kernels' run is the reference's with the same seed."""
    decoder, x, memory, states, _ = case("lstm", "dot", SHAPES[1], feeding, 3, dropout=0.5)
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        with fastrnn.backend(backend):
            out = decoder(x, memory, packed(states))
        results.append((out, grads(out, [x, memory, *states, *decoder.parameters()])))
    assert_same(*results, rtol=1e-10, atol=1e-11)
    assert not torch.equal(decoder(x, memory)[0], decoder(x, memory)[0])
    if not feeding:
        lstm = nn.LSTM(2, 6, 3, dropout=0.5, dtype=F64)
        lstm.load_state_dict({k: v for k, v in decoder.state_dict().items() if "_l" in k})
        torch.manual_seed(0)
        theirs = lstm(x, packed(states))[1]
        assert_same(results[0][0][1], theirs)
    decoder.eval()
    assert torch.equal(decoder(x, memory)[0], decoder(x, memory)[0])
    with pytest.warns(UserWarning, match="dropout=0.5 falls between layers, and there is one"):
        one = fastrnn.AttentionDecoder(2, 6, 6, dropout=0.5, input_feeding=feeding, dtype=F64)
    assert torch.equal(one(x, memory)[0], one.eval()(x, memory)[0])  # the last layer's output is not dropped


@each_feeding
def test_an_empty_batch_trains(feeding):
    decoder, x, memory, _, _ = case("lstm", "dot", (3, 0, 4, 2, 6, 6), feeding)
    out = decoder(x, memory)
    assert out[0].shape == (3, 0, 6)
    assert not any(g.any() for g in grads(out, list(decoder.parameters())))
    decoder, x, _, _, _ = case("gru", "dot", (3, 2, 4, 2, 6, 6), feeding)
    out, _, weights = decoder(x, x.new_empty(0, 2, 6))  # no memory at all
    assert weights.shape == (2, 3, 0)
    assert grads(out, [x])[0].isfinite().all()


def test_layouts():
    decoder, x, memory, states, _ = case("gru", "additive", SHAPES[1], grad=False)
    out, (h, a), weights = decoder(x, memory, packed(states))
    assert torch.equal(a, out[-1])
    one = decoder(x[:, 1], memory[:, 1], (states[0][:, 1], states[1][1]))
    assert_same(one, (out[:, 1], (h[:, 1], a[1]), weights[1]))
    step = decoder.step(x[0, 1], memory[:, 1])
    assert_same(step[0], decoder.step(x[0], memory)[0][1])
    assert step[2].shape == (5,)
    out_of_step = decoder.step(x[0], memory)[0]
    decoder.batch_first = True
    swapped = decoder(x.transpose(0, 1), memory.transpose(0, 1), packed(states))
    assert_same((swapped[0].transpose(0, 1), *swapped[1:]), (out, (h, a), weights))
    assert_same(decoder.step(x[0], memory.transpose(0, 1))[0], out_of_step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_cell
def test_types(cell, dtype, tolerances):
    decoder, x, memory, states, lengths = case(cell, "general", SHAPES[3], layers=2, grad=False)
    true = decoder(x, memory, packed(states), lengths=lengths)
    decoder.to(dtype)
    ours = decoder(x.to(dtype), memory.to(dtype), packed([s.to(dtype) for s in states]), lengths=lengths)
    for a, b in zip((ours[0], *ours[1], ours[2]), (true[0], *true[1], true[2]), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, **tolerances[dtype].output)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@each_feeding
@each_cell
def test_autocast_gives_one_dtype(cell, feeding, kind):
    decoder, x, memory, states, _ = case(cell, "general", SHAPES[1], feeding)
    decoder.float()
    with torch.autocast("cpu", kind):
        for call, given in ((decoder, x), (decoder.step, x[0])):
            out, last, weights = call(given.float(), memory.float(), packed([s.float() for s in states]))
            last = last if isinstance(last, tuple) else (last,)
            assert {t.dtype for t in (out, *last, weights)} == {kind}
    grads(out.float(), [x, memory])


def operator(cell="lstm", additive=False, layers=2, T=3, B=2, S=4, I=2, H=3, K=5):
    spec = fastrnn.reference.CELLS[cell]
    G, K = spec.gates * H, K if additive else H
    params = []
    for k in range(layers):
        params += [randn(G, H if k else I + H, seed=k), randn(G, H, seed=k + 9), randn(G), randn(G, seed=1)]
    states = [randn(layers, B, H, seed=j) for j in range(spec.states)]
    leaves = [
        randn(T, B, I),
        *states,
        randn(B, H),
        *params,
        randn(H, H),
        randn(S, B, K),
        randn(S, B, H, seed=4),
    ]
    leaves += [randn(K, H), randn(K)] if additive else [None, None]
    leaves = [t if t is None else t.requires_grad_() for t in leaves]
    drops = [1 + randn(T, B, H) for _ in range(layers - 1)]
    return Decoder(cell, layers, 0.5), [*leaves, torch.rand(B, S) < 0.7, *drops]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck(cell, additive):
    call, flat = operator(cell, additive)
    args = (cell, *call.arguments(flat), 0.5, True)
    torch.library.opcheck(torch.ops.fastrnn.decoder.default, args)
    with torch.no_grad():
        out, last, weights, saved = torch.ops.fastrnn.decoder(*args)
    plain = call.arguments([t if t is None else t.detach() for t in flat])
    back = (cell, out, last, weights, *plain, 0.5, out, weights, saved)
    for needs in ((True, True, True, True), (True, False, True, False), (False, True, False, True)):
        torch.library.opcheck(torch.ops.fastrnn.decoder_backward.default, (*back, *needs))


@pytest.mark.parametrize("additive", [False, True])
def test_registered_rules_gradgradcheck(additive):
    """The operator itself, as compiled graphs call it."""
    call, flat = operator("gru", additive, 1, 2, 2, 2, 1, 2, 2)
    leaves = [t for t in flat[: call.primals] if t is not None]

    def f(*values):
        filled = [*values, *flat[len(leaves) :]]
        out, last, weights, _ = torch.ops.fastrnn.decoder("gru", *call.arguments(filled), 0.5, True)
        return (out, *last, weights)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.slow
@each_feeding
@each_cell
def test_compiles_whole(cell, feeding):
    decoder, x, memory, states, lengths = case(cell, "general", SHAPES[1], feeding, 2)
    leaves = [x, memory, *states, *decoder.parameters()]
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    ours = compiled(x, memory, packed(states), lengths=lengths)
    plain = decoder(x, memory, packed(states), lengths=lengths)
    assert_same((ours, grads(ours, leaves)), (plain, grads(plain, leaves)))


def test_transforms():
    decoder, x, memory, states, _ = case("gru", "dot", SHAPES[1], grad=False)
    many = torch.stack([x, 2 * x])
    each = torch.stack([decoder(v, memory, packed(states))[0] for v in many])
    assert_same(torch.func.vmap(lambda v: decoder(v, memory, packed(states))[0])(many), each)
    tangent = torch.func.jvp(lambda v: decoder(v, memory)[0], (x,), (x,))[1]
    slope = (decoder(x * (1 + 1e-6), memory)[0] - decoder(x * (1 - 1e-6), memory)[0]) / 2e-6
    assert_same(tangent, slope, rtol=1e-6, atol=1e-8)
    x.requires_grad_()
    out = decoder(x, memory)[0]
    rows = torch.eye(3, dtype=F64)[:, None, :, None].expand(3, 4, 3, 6)
    batched = torch.autograd.grad(out, x, rows, is_grads_batched=True, retain_graph=True)[0]
    for row, g in zip(rows, batched, strict=True):
        assert_same(g, torch.autograd.grad(out, x, row, retain_graph=True)[0])


@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
@each_score
@each_cell
def test_bits_do_not_depend_on_threads(cell, score, save):
    H = 96
    call, flat = operator("rnn_tanh" if cell == "rnn" else cell, score == "additive", 2, 12, 13, 20, 24, H, H)
    leaves = [
        t if t is None else (0.1 * t.detach()).float().requires_grad_(save) for t in flat[: call.primals]
    ]
    flat = [*leaves, flat[call.primals], *(t.float() for t in flat[call.primals + 1 :])]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            out = fastrnn.fused.run(call, flat)
            results.append([*out, *(grads(out, [t for t in leaves if t is not None]) if save else [])])
    finally:
        torch.set_num_threads(before)
    for r in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], r, strict=True))


def poisoned():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for cell in CELLS:
        for score in SCORES:
            test_kernels_equal_the_reference(cell, score, SHAPES[2])


def test_every_element_is_written():
    Fresh("test_decoder.poisoned", seconds=300, MALLOC_PERTURB_="128").finish()


BAD = {
    "inputs of another width": (
        lambda x, m, s: (x[..., :1], m, s),
        ValueError,
        r"inputs must be \[Tq, B, I\]",
    ),
    "memory of another width": (
        lambda x, m, s: (x, m[..., :1], s),
        ValueError,
        r"memory must be \[S, B, M\]",
    ),
    "memory of another batch": (lambda x, m, s: (x, m[:, :1], s), ValueError, r"memory must be \[S, B, M\]"),
    "no steps": (lambda x, m, s: (x[:0], m, s), RuntimeError, "larger than 0"),
    "one state": (
        lambda x, m, s: (x, m, s[0]),
        TypeError,
        r"\(h_n, c_n\) or \(h_n, c_n, a\), got \(Tensor\)",
    ),
    "states of both directions": (
        lambda x, m, s: (x, m, [t.repeat(2, 1, 1) for t in s[:2]]),
        ValueError,
        r"h_n must be \[L, B, H\]",
    ),
    "another a": (lambda x, m, s: (x, m, (*s[:2], s[2][:1])), ValueError, r"a must be \[B, H\]"),
    "dtypes": (lambda x, m, s: (x.float(), m, s), RuntimeError, "inputs must be torch.float64"),
    "ranks": (lambda x, m, s: (x[0, 0], m, s), ValueError, "inputs must have 3 dimensions"),
    "tokens": (lambda x, m, s: (x[..., 0].long(), m, s), ValueError, "inputs must be a floating point"),
    "lists": (lambda x, m, s: (x, m.tolist(), s), TypeError, "memory must be a Tensor, got list"),
    "a number": (lambda x, m, s: (x, m, 3), TypeError, r"\(h_n, c_n\) or .*, got \(int\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, text = BAD[name]
    decoder, x, memory, states, _ = case("lstm", "dot", SHAPES[1], grad=False)
    with pytest.raises(error, match=text):
        decoder(*make(x, memory, states))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"cell": "LSTM"}, ValueError, "cell must be one of 'lstm', 'gru', 'rnn', got 'LSTM'"),
        ({"score": "general", "dropout": 2}, ValueError, r"dropout must be a number in \[0, 1\], got 2"),
        ({"score": "general", "dropout": True}, ValueError, "number in .*, got True"),
        ({}, ValueError, "query_size == memory_size"),
        ({"num_layers": 0}, ValueError, "num_layers must be 1 or more, got 0"),
        ({"input_feeding": 1}, TypeError, "input_feeding should be of type bool"),
    ],
)
def test_bad_constructions(options, error, text):
    with pytest.raises(error, match=text):
        fastrnn.AttentionDecoder(2, 3, 4, **options)


def test_parameters():
    decoder = fastrnn.AttentionDecoder(2, 3, 4, num_layers=2, score="general")
    shapes = {n: tuple(p.shape) for n, p in decoder.named_parameters()}
    assert shapes == {
        "weight_ih_l0": (12, 5), "weight_hh_l0": (12, 3), "bias_ih_l0": (12,), "bias_hh_l0": (12,),
        "weight_ih_l1": (12, 3), "weight_hh_l1": (12, 3), "bias_ih_l1": (12,), "bias_hh_l1": (12,),
        "weight_c": (3, 7), "attention.weight": (3, 4),
    }  # fmt: skip
    assert repr(decoder).startswith("AttentionDecoder(\n  2, 3, 4, num_layers=2\n")

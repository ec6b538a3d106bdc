"""`fastrnn.generate`: its three strategies against searches written as plain lists."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import F64
from torch import nn

import fastrnn
from fastrnn.generation import choose

B, V, END, STEPS = 3, 4, 2, 4
ENDS = pytest.mark.parametrize("end", [None, END], ids=["endless", "end"])


class Model(nn.Module):
    """Every step reads all kinds of state, so that a row out of its place changes the scores."""

    def __init__(self, dtype=F64):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(V, 6, dtype=dtype)
        self.layer = fastrnn.LSTM(6, 6, 2, dtype=dtype)
        self.head = nn.Linear(6, V, dtype=dtype)

    def state(self, batch=B):
        g = torch.Generator().manual_seed(1)
        memory = torch.randn(5, batch, 6, dtype=self.head.weight.dtype, generator=g)  # [S, B, M]
        hidden = (torch.tanh(memory[:2]), torch.tanh(memory[2:4]))  # [L, B, H] each
        return {"hidden": hidden, "memory": memory, "rows": torch.arange(batch) % 3, "more": [None, 3, 0.5]}

    def forward(self, token, state):
        x = self.embedding(token) + state["memory"].mean(0) + state["rows"][:, None]
        output, hidden = self.layer(x[None], state["hidden"])
        return 4 * self.head(output[0]), {**state, "hidden": hidden}


def row(state, b):
    """Row b of the state, with a batch of one."""

    def pick(t):
        return t[b : b + 1] if t.dim() <= 2 else t[:, b : b + 1]

    hidden = tuple(pick(h) for h in state["hidden"])
    return {**state, "hidden": hidden, "memory": pick(state["memory"]), "rows": pick(state["rows"])}


@torch.no_grad()
def score(model, b, start, tokens, end):
    """The sum of log-probabilities of `tokens`, a list, up to its end, one step at a time."""
    state, total, token = row(model.state(), b), 0.0, start
    for following in tokens:
        logits, state = model(torch.tensor([token]), state)
        total += torch.log_softmax(logits[0], 0)[following].item()
        token = following
        if token == end:
            break
    return total


def steps_until(tokens, end):
    return tokens.index(end) + 1 if end in tokens else len(tokens)


def padded(tokens, end, steps):
    """What stands in a row of the result."""
    cut = list(tokens[: steps_until(list(tokens), end)])
    return cut + [end] * (steps - len(cut))


@pytest.fixture
def model():
    return Model()


START = torch.tensor([0, 1, 3])


@ENDS
@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_beams_are_the_exhaustive_search(model, end, penalty):
    every = {tuple(padded(s, end, STEPS)) for s in itertools.product(range(V), repeat=STEPS)}
    K = len(every)
    tokens, scores = fastrnn.generate(
        model, START, model.state(), max_steps=STEPS, end=end, strategy="beam", beam_size=K,
        length_penalty=penalty,
    )  # fmt: skip
    for b in range(B):
        found = [(score(model, b, int(START[b]), s, end), list(s)) for s in every]
        found.sort(key=lambda pair: -pair[0] / steps_until(pair[1], end) ** penalty)
        assert tokens[b].tolist() == [s for _, s in found]
        torch.testing.assert_close(scores[b], torch.tensor([p for p, _ in found], dtype=F64))


def by_lists(model, b, start, steps, end, K, penalty):
    """Beam search of one row as everybody writes it: (score, tokens), ended beams kept as they are."""

    def rank(beam):
        return beam[0] / steps_until(beam[1], end) ** penalty

    beams = [(0.0, [])]
    for _ in range(steps):
        longer = []
        for total, tokens in beams:
            if end in tokens:
                longer.append((total, tokens))
            else:
                longer += [(score(model, b, start, [*tokens, v], end), [*tokens, v]) for v in range(V)]
        beams = sorted(longer, key=rank, reverse=True)[:K]
    return beams


@ENDS
@pytest.mark.parametrize("penalty", [0.0, 0.7])
@pytest.mark.parametrize("K", [1, 2, 3, 7])
def test_few_beams(model, end, penalty, K):
    steps = 6
    tokens, scores = fastrnn.generate(
        model, START, model.state(), max_steps=steps, end=end, strategy="beam", beam_size=K,
        length_penalty=penalty,
    )  # fmt: skip
    for b in range(B):
        beams = by_lists(model, b, int(START[b]), steps, end, K, penalty)
        assert tokens[b].tolist() == [padded(s, end, tokens.shape[2]) for _, s in beams]
        torch.testing.assert_close(scores[b], torch.tensor([p for p, _ in beams], dtype=F64))


@ENDS
def test_one_beam_is_greedy(model, end):
    options = {"max_steps": 7, "end": end}
    greedy = fastrnn.generate(model, START, model.state(), **options)
    beams = fastrnn.generate(model, START, model.state(), strategy="beam", **options)
    torch.testing.assert_close((beams[0][:, 0], beams[1][:, 0]), greedy)
    for b in range(B):
        token, state = START[b : b + 1], row(model.state(), b)
        for found in greedy[0][b]:
            logits, state = model(token, state)
            assert int(found) == int(logits.argmax())
            if found == end:
                break
            token = found[None]


@ENDS
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.3}, {"top_k": 2}, {"temperature": 3.0, "top_k": 3}]
)
def test_scores_are_untempered_sums(model, end, options):
    g = torch.Generator().manual_seed(4)
    tokens, scores = fastrnn.generate(
        model, START, model.state(), max_steps=9, end=end, strategy="sample", generator=g, **options
    )
    for b in range(B):
        row_tokens = tokens[b].tolist()
        assert row_tokens == padded(row_tokens, end, len(row_tokens))
        assert scores[b].item() == pytest.approx(score(model, b, int(START[b]), row_tokens, end), rel=1e-9)


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0], [3.0, -torch.inf, 0.0, 0.0]], dtype=F64)
    n, temperature, k = 20_000, 1.7, 3
    g = torch.Generator().manual_seed(0)
    tokens, _ = fastrnn.generate(
        lambda token, state: (logits.repeat(n, 1), state), torch.zeros(2 * n, dtype=torch.long), max_steps=1,
        strategy="sample", temperature=temperature, top_k=k, generator=g,
    )  # fmt: skip
    kept = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)
    expected = torch.softmax(kept / temperature, 1)
    for r in range(2):
        found = torch.bincount(tokens[r::2, 0], minlength=4) / n
        torch.testing.assert_close(found.to(F64), expected[r], atol=0.02, rtol=0)


def test_a_seed_repeats_the_draws(model):
    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return fastrnn.generate(model, START, model.state(), max_steps=20, strategy="sample", generator=g)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)  # without one, torch's own
    first = fastrnn.generate(model, START, model.state(), max_steps=20, strategy="sample")[0]
    torch.manual_seed(1)
    assert torch.equal(
        first, fastrnn.generate(model, START, model.state(), max_steps=20, strategy="sample")[0]
    )


def test_choose():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert int(choose(logits, 0.0, 0, generator)) == 1
    assert int(choose(logits, 1e-30, 0, generator)) == 1  # no overflow
    drawn = {int(choose(logits, 5.0, 2, generator)) for _ in range(100)}
    assert drawn == {1, 2}
    drawn = {int(choose(logits, 5.0, 99, generator)) for _ in range(200)}
    assert drawn == {0, 1, 2, 3}
    # No float16 holds this difference, which such a temperature makes 0.8.
    wide = torch.tensor([40000.0, -40000.0], dtype=torch.float16)
    drawn = {int(choose(wide, 1e5, 0, generator)) for _ in range(200)}
    assert drawn == {0, 1}


def scripted(*columns):
    """A step function whose likeliest tokens for row b are columns[b]; state: the steps so far [N]."""
    script = torch.tensor(columns)

    def step(token, state):
        wanted = script[torch.arange(len(token)), state]
        return 5 * nn.functional.one_hot(wanted, V).float(), state + 1

    return step, torch.zeros(len(columns), dtype=torch.long)


def test_stops_where_all_rows_have_ended():
    step, state = scripted([0, END, 1, 1, 1], [1, 0, 3, END, 1])
    tokens, scores = fastrnn.generate(step, torch.zeros(2, dtype=torch.long), state, max_steps=5, end=END)
    assert tokens.tolist() == [[0, END, END, END], [1, 0, 3, END]]
    assert scores[0].item() == pytest.approx(scores[1].item() / 2)
    # A start that looks like the end is none.
    tokens, _ = fastrnn.generate(step, torch.full((2,), END), state, max_steps=2, end=END)
    assert tokens.tolist() == [[0, END], [1, 0]]


@pytest.mark.parametrize("end", [0, None])
def test_more_beams_than_sequences(end):
    """Those left over say so by their score, and after an end they hold it too."""
    tokens, scores = fastrnn.generate(
        lambda token, state: (torch.zeros(len(token), 2), state), torch.ones(1, dtype=torch.long),
        max_steps=2, end=end, strategy="beam", beam_size=6,
    )  # fmt: skip
    real = [(0, 0), (1, 0), (1, 1)] if end == 0 else list(itertools.product(range(2), repeat=2))
    assert sorted(tuple(s) for s in tokens[0][scores[0].isfinite()].tolist()) == real
    assert scores[0].isneginf().sum() == 6 - len(real)
    assert bool((scores[0].diff().nan_to_num(0) <= 0).all())
    if end == 0:
        assert all(s[1] == 0 for s in tokens[0].tolist() if s[0] == 0)


@pytest.mark.parametrize(("penalty", "steps"), [(1e3, 3), (-1e3, 3), (1e308, 8), (-1e308, 8)])
def test_a_large_penalty_makes_nothing_possible(penalty, steps):
    """Its powers overflow, and of 8 steps its product with their logarithm too: no sequence with a forbidden
    token may come before one without."""
    logits = torch.tensor([0.0, 1.0, -torch.inf])
    tokens, scores = fastrnn.generate(
        lambda token, state: (logits.repeat(len(token), 1), state), torch.zeros(1, dtype=torch.long),
        max_steps=steps, strategy="beam", beam_size=2**steps, length_penalty=penalty,
    )  # fmt: skip
    assert sorted(map(tuple, tokens[0].tolist())) == list(itertools.product(range(2), repeat=steps))
    assert scores.isfinite().all()


@pytest.mark.parametrize("penalty", [1e3, -1e3, 1e17, -1e17, 1e308, -1e308])
def test_a_large_penalty_ranks(penalty):
    """By length before all else, though its powers are 0 or infinite; of equally long ones by score."""
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    tokens, scores = fastrnn.generate(
        lambda token, state: (logits[state], state + 1), torch.zeros(1, dtype=torch.long),
        torch.zeros(1, dtype=torch.long), max_steps=3, end=0, strategy="beam", beam_size=4,
        length_penalty=penalty,
    )  # fmt: skip
    lengths = [steps_until(s, 0) for s in tokens[0].tolist()]
    assert lengths == ([3, 3, 2, 1] if penalty > 0 else [1, 2, 3, 3])
    assert tokens[0, lengths.index(2)].tolist() == [1, 0, 0]
    assert scores.isfinite().all()


@pytest.mark.parametrize("penalty", [0.0, 1e3, 1e17, 1e300, -1e300])
def test_of_equally_long_beams_the_likelier_is_first(penalty):
    logits = torch.tensor([0.0, 0.3, 0.1])
    tokens, _ = fastrnn.generate(
        lambda token, state: (logits.repeat(len(token), 1), state), torch.zeros(1, dtype=torch.long),
        max_steps=2, strategy="beam", beam_size=3, length_penalty=penalty,
    )  # fmt: skip
    assert tokens[0, 0].tolist() == [1, 1]
    assert sorted(tokens[0, 1:].tolist()) == [[1, 2], [2, 1]]


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1e3])
def test_what_is_certain_is_the_best_beam(penalty):
    certain = torch.tensor([-torch.inf, 0.0])
    tokens, scores = fastrnn.generate(
        lambda token, state: (certain.repeat(len(token), 1), state), torch.zeros(1, dtype=torch.long),
        max_steps=3, strategy="beam", beam_size=2, length_penalty=penalty,
    )  # fmt: skip
    assert tokens[0, 0].tolist() == [1, 1, 1]
    assert scores[0].tolist() == [0, -torch.inf]


def test_beams_stop_where_all_have_ended():
    calls = 0

    def step(token, state):
        nonlocal calls
        calls += 1
        ends = torch.tensor([0.0, 1.0]) if calls == 1 else torch.tensor([0.0, -torch.inf])
        return ends.repeat(len(token), 1), state

    tokens, _ = fastrnn.generate(
        step, torch.zeros(2, dtype=torch.long), max_steps=9, end=0, strategy="beam", beam_size=2
    )
    assert calls == 2
    assert tokens.tolist() == [[[1, 0], [0, 0]]] * 2


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
def test_forbidden_tokens(model, strategy):
    forbidden = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf], dtype=F64)

    def step(token, state):
        logits, state = model(token, state)
        return logits + forbidden, state

    beams = {"beam_size": 2} if strategy == "beam" else {}
    tokens, scores = fastrnn.generate(step, START, model.state(), max_steps=5, strategy=strategy, **beams)
    assert set(tokens.unique().tolist()) <= {0, 2}
    assert scores.isfinite().all()


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_shapes(strategy, dtype):
    model = Model(dtype)
    beams = {"beam_size": 2} if strategy == "beam" else {}
    for batch, steps in ((B, 5), (1, 1), (B, 0)):
        tokens, scores = fastrnn.generate(
            model, torch.zeros(batch, dtype=torch.long), model.state(batch), max_steps=steps,
            strategy=strategy, **beams,
        )  # fmt: skip
        rows = (batch, 2) if strategy == "beam" else (batch,)
        assert tokens.shape == (*rows, steps)
        assert tokens.dtype == torch.long
        assert scores.shape == rows
        assert scores.dtype == torch.float32
        assert not scores.requires_grad
        if steps == 0 and strategy != "beam":
            assert not scores.any()


def test_an_empty_batch():
    for how in ({"strategy": "greedy"}, {"strategy": "beam", "beam_size": 2}):
        tokens, _ = fastrnn.generate(
            lambda token, state: (torch.zeros(len(token), V), state), torch.zeros(0, dtype=torch.long),
            max_steps=3, end=END, **how,
        )  # fmt: skip
        assert tokens.shape[0] == 0


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("input_feeding", [True, False])
def test_with_the_attention_decoder(cell, input_feeding):
    """Beams by `step`, memory and lengths among the state, score what teacher forcing gives them."""
    torch.manual_seed(5)
    K, H, S = 4, 6, 5
    decoder = fastrnn.AttentionDecoder(
        3, H, H, cell=cell, num_layers=2, input_feeding=input_feeding, dtype=F64
    )
    embed, head = nn.Embedding(V, 3, dtype=F64), nn.Linear(H, V, dtype=F64)
    memory, lengths = torch.randn(S, B, H, dtype=F64), torch.tensor([5, 2, 3])
    h = torch.randn(2, B, H, dtype=F64)
    first = (h, h.flip(0)) if cell == "lstm" else h

    def step(token, state):
        hidden, memory, lengths = state
        output, hidden, _ = decoder.step(embed(token), memory, hidden, lengths=lengths)
        return 5 * head(output), (hidden, memory, lengths)

    # The decoder's own state: it must go through `generate` whatever is in it.
    hidden = decoder.step(embed(START), memory, first, lengths=lengths)[1]
    tokens, scores = fastrnn.generate(
        step, START, (hidden, memory, lengths), max_steps=STEPS, end=END, strategy="beam", beam_size=K
    )
    for k in range(K):
        before = torch.cat([START[:, None], tokens[:, k, :-1]], 1).T  # [T, B]
        output, _, _ = decoder(embed(before), memory, hidden, lengths=lengths)
        gained = torch.log_softmax(5 * head(output), -1).gather(2, tokens[:, k].T[..., None])[..., 0]
        live = torch.cat([torch.ones(1, B, dtype=torch.bool), (before[1:] != END)])
        torch.testing.assert_close(scores[:, k], (gained * live).sum(0))


BAD_OPTIONS = [
    ({"strategy": "best"}, ValueError, "strategy must be one of greedy, sample, beam, got 'best'"),
    ({"max_steps": -1}, ValueError, "max_steps must be 0 or more, got -1"),
    ({"max_steps": 2.0}, TypeError, "max_steps must be an int, got float"),
    ({"beam_size": 0}, ValueError, "beam_size must be 1 or more, got 0"),
    ({"top_k": -2}, ValueError, "top_k must be 0 or more"),
    ({"temperature": -1.0}, ValueError, "temperature must be 0 or more, got -1.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite, got nan"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
    ({"length_penalty": float("inf")}, ValueError, "length_penalty must be finite, got inf"),
    ({"length_penalty": None}, TypeError, "length_penalty must be a number, got NoneType"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    ({"end": V}, ValueError, r"end must be a token in \[0, V\) = \[0, 4\), got 4"),
    ({"end": -1}, ValueError, "end must be 0 or more"),
    ({"start": START.int()}, ValueError, r"start must be a LongTensor \[B\], got torch.int32"),
    ({"start": START[None]}, ValueError, r"got torch.int64 of shape \[1, 3\]"),
    ({"start": [0, 1]}, TypeError, r"start must be a LongTensor \[B\], got list"),
    (
        {"strategy": "beam", "state": torch.zeros(2, 5, 6)},
        ValueError,
        r"3 rows in dimension 1, got \[2, 5, 6\]",
    ),
    ({"strategy": "beam", "state": object()}, TypeError, "nest of tensors, got a object"),
    ({"step_fn": 3}, TypeError, "step_fn must be callable, got int"),
    ({"beam_size": 3}, ValueError, "beam_size is of strategy='beam', got strategy='greedy'"),
    ({"length_penalty": 0.5}, ValueError, "length_penalty is of strategy='beam', got strategy='greedy'"),
    ({"temperature": 0.5}, ValueError, "temperature is of strategy='sample', got strategy='greedy'"),
    ({"top_k": 3, "strategy": "beam"}, ValueError, "top_k is of strategy='sample', got strategy='beam'"),
    ({"generator": torch.Generator()}, ValueError, "generator is of strategy='sample'"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD_OPTIONS)
def test_bad_options(options, error, text):
    def step(token, state):
        return torch.zeros(len(token), V), state

    with pytest.raises(error, match=text):
        fastrnn.generate(**{"step_fn": step, "start": START, "max_steps": 3, **options})


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_distribution(strategy, value):
    for logits in (torch.full((3, V), value), torch.full((3, V), -torch.inf)):
        with pytest.raises(ValueError, match="logits"):
            fastrnn.generate(lambda token, state, x=logits: (x, state), START, max_steps=2, strategy=strategy)


@pytest.mark.parametrize(
    ("made", "error", "text"),
    [
        ((torch.zeros(2, V), None), ValueError, r"N = 3 and V > 0, got \[2, 4\]"),
        ((torch.zeros(3, 0), None), ValueError, r"N = 3 and V > 0, got \[3, 0\]"),
        (
            (torch.zeros(3, V), None, None),
            TypeError,
            r"\(logits \[N, V\], state\), got \(Tensor, NoneType, NoneType\)",
        ),
        (torch.zeros(3, V), TypeError, r"got \(Tensor\)"),
        ((torch.zeros(3, V, dtype=torch.long), None), ValueError, "floating-point type, got torch.int64"),
    ],
)
def test_what_a_step_must_return(made, error, text):
    with pytest.raises(error, match=text):
        fastrnn.generate(lambda token, state: made, START, max_steps=2)

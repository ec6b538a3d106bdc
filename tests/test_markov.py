"""MarkovModel against counts made by hand in plain Python."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from fastrnn.markov import MarkovModel


def expected_log_prob(train, tokens, vocab_size, order, smoothing):
    """The definition, one n-gram at a time."""
    grams = Counter(tuple(train[i : i + order + 1]) for i in range(len(train) - order))
    totals = Counter()
    for gram, count in grams.items():
        totals[gram[:-1]] += count
    result = 0.0
    for i in range(len(tokens) - order):
        gram = tuple(tokens[i : i + order + 1])
        result += math.log((grams[gram] + smoothing) / (totals[gram[:-1]] + smoothing * vocab_size))
    return result


def random_tokens(n, vocab_size, seed):
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("smoothing", [1.0, 0.01, 3.5])
@pytest.mark.parametrize("order", [0, 1, 2, 4])
@pytest.mark.parametrize("vocab_size", [1, 2, 7])
def test_log_prob_is_the_definition(vocab_size, order, smoothing):
    train, test = random_tokens(200, vocab_size, 0), random_tokens(90, vocab_size, 1)
    model = MarkovModel(vocab_size, order, smoothing).fit(train)
    want = expected_log_prob(train.tolist(), test.tolist(), vocab_size, order, smoothing)
    assert float(model.log_prob(test)) == pytest.approx(want, rel=1e-12)
    assert float(model.perplexity(test)) == pytest.approx(math.exp(-want / (90 - order)), rel=1e-12)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_probabilities_of_a_context_sum_to_one(order):
    model = MarkovModel(5, order, 0.3).fit(random_tokens(60, 5, 2))
    for context in itertools.product(range(5), repeat=order):
        total = sum(math.exp(model.log_prob([*context, token])) for token in range(5))
        assert total == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 6])
def test_large_vocabulary_and_order(order):
    vocab_size = 100_000  # a dense table would need 1e10 entries for order 1; 1e35 pass 64 bits
    train = random_tokens(20_000, vocab_size, 3)
    model = MarkovModel(vocab_size, order).fit(train)
    assert model.stored == len({tuple(gram) for gram in train.unfold(0, order + 1, 1).tolist()})
    assert model.dense_size == vocab_size ** (order + 1)
    test = torch.cat([train[500:700], random_tokens(100, vocab_size, 4)])
    want = expected_log_prob(train.tolist(), test.tolist(), vocab_size, order, 1.0)
    assert float(model.log_prob(test)) == pytest.approx(want, rel=1e-12)
    assert model.sample(50, generator=torch.Generator().manual_seed(0)).shape == (50,)


def test_without_smoothing_unseen_is_impossible():
    model = MarkovModel(3, 1, 0.0).fit([0, 1, 0, 1])
    assert float(model.log_prob([0, 1, 0])) == pytest.approx(0.0)
    assert float(model.log_prob([0, 2])) == -math.inf
    assert float(model.log_prob([2, 0])) == -math.inf  # the context itself is unseen
    assert float(model.perplexity([0, 1, 2])) == math.inf
    assert model.sample(6, start=[0]).tolist() == [1, 0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="smoothing is 0"):
        model.sample(1, start=[2])


def test_fit_replaces_and_returns_the_model():
    model = MarkovModel(4)
    assert model.fit([0, 1, 2, 3]) is model
    once = MarkovModel(4).fit([3, 2, 1]).log_prob([3, 2, 1])
    assert torch.equal(model.fit([3, 2, 1]).log_prob([3, 2, 1]), once)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_samples_follow_the_probabilities(order):
    generator = torch.Generator().manual_seed(5)
    model = MarkovModel(3, order, 0.5).fit(random_tokens(80, 3, 6))
    start = [2, 1][:order]
    drawn = model.sample(1, start=start, num_sequences=20_000, generator=generator)
    assert drawn.shape == (20_000, 1)
    share = torch.bincount(drawn.flatten(), minlength=3) / 20_000
    want = torch.tensor([math.exp(model.log_prob([*start, token])) for token in range(3)])
    torch.testing.assert_close(share, want, atol=0.015, rtol=0)


def test_sample_begins_in_a_seen_context_and_repeats_by_seed():
    model = MarkovModel(10, 2, 0.0).fit([1, 2, 3, 1, 2, 3, 1, 2, 3])
    draws = [model.sample(9, generator=torch.Generator().manual_seed(s)).tolist() for s in (7, 7)]
    assert draws[0] == draws[1]
    assert all(b == a % 3 + 1 for a, b in itertools.pairwise(draws[0]))
    assert model.sample(0).shape == (0,)
    assert model.sample(1).shape == (1,)  # shorter than the context


def test_a_start_counts_by_its_last_tokens():
    model = MarkovModel(4, 2, 0.0).fit([0, 1, 2, 3, 0, 1, 2, 3, 0])
    assert model.sample(4, start=[3, 0, 1, 2]).tolist() == [3, 0, 1, 2]


def test_contexts_are_drawn_as_often_as_the_text_has_them():
    model = MarkovModel(3, 1, 0.0).fit([0, 0, 0, 0, 0, 0, 0, 1, 2, 0])
    n, want = 20_000, torch.tensor([7 / 9, 1 / 9, 1 / 9])
    drawn = model.sample(1, num_sequences=n, generator=torch.Generator().manual_seed(3))
    share = torch.bincount(drawn.flatten(), minlength=3) / n
    assert ((share - want).abs() < 5 * (want * (1 - want) / n).sqrt()).all()  # standard errors


def test_a_generator_leaves_torchs_own_alone():
    model = MarkovModel(5, 2, 0.5).fit(random_tokens(60, 5, 8))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    first = model.sample(40, num_sequences=3, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model.sample(40, num_sequences=3, generator=generator), first)
    assert torch.equal(model.sample(40, num_sequences=3, generator=torch.Generator().manual_seed(1)), first)


def test_the_largest_vocabulary():
    n = 2**31 - 1
    model = MarkovModel(n, 1, 0.0).fit([n - 1, n - 2] * 3)
    assert model.sample(3, start=[n - 1]).tolist() == [n - 2, n - 1, n - 2]
    assert float(model.log_prob([n - 2, n - 1])) == 0
    with pytest.raises(ValueError, match=r"vocab_size must be below 2\*\*31, got 2147483648"):
        MarkovModel(n + 1)


@pytest.mark.parametrize(
    "arguments", [(0,), (-1,), (3, -1), (3, 1, -0.5), (3, 1, math.nan), (3, 1, math.inf)]
)
def test_bad_construction(arguments):
    with pytest.raises(ValueError, match="must be"):
        MarkovModel(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (3, 1.5),
        (3, 1.0),
        (3.5,),
        ("abc",),
        (torch.tensor(3.7),),
        (3, torch.tensor(1.9)),
        (np.array(3.7),),
        (True,),
    ],
)
def test_what_is_no_integer_is_not_rounded(arguments):
    with pytest.raises(TypeError, match="must be an int, got"):
        MarkovModel(*arguments)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 1, 3], r"\[0, 3\)"),
        ([0, -1], r"\[0, 3\)"),
        ([], "at least 2"),
        ([1], "at least 2"),
        ([[0, 1], [1, 2]], "1-D"),
        ([0.5, 1.0], "integers"),
        ("hello", "1-D integers, a text's characters or words by number, got a str"),
        (["a", "b"], "1-D integers, .* got a list"),
        ([[0], [1, 2]], "1-D integers, .* got a list"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        MarkovModel(3).fit(tokens)
    with pytest.raises(ValueError, match=message):
        MarkovModel(3).fit([0, 1, 2]).log_prob(tokens)


def test_bad_sample_arguments():
    model = MarkovModel(3, 2).fit([0, 1, 2, 0])
    with pytest.raises(ValueError, match="at least 2"):
        model.sample(3, start=[1])
    with pytest.raises(ValueError, match="n must be"):
        model.sample(-1)
    with pytest.raises(ValueError, match="num_sequences"):
        model.sample(1, num_sequences=0)


def test_before_fit():
    with pytest.raises(RuntimeError, match="fit"):
        MarkovModel(3).log_prob([0, 1])
    with pytest.raises(RuntimeError, match="fit"):
        MarkovModel(3).sample(1)
    with pytest.raises(RuntimeError, match="fit"):
        _ = MarkovModel(3).stored

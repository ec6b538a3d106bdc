"""The textbook's baseline: Markov models of growing order beside a network, by perplexity and by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..markov import MarkovModel
from .corpus import Corpus

ORDERS = (1, 2, 3, 4)
# Each order takes the best of these on the validation text itself: that favours it, and no one else.
SMOOTHINGS = (1.0, 0.3, 0.1, 0.03, 0.01)
COUNTED = 20_000_000  # characters: what is counted of a longer text, for the memory that sorting takes


@dataclass(frozen=True)
class Counted:
    """A Markov model of one order, counted on so many characters. stored: n-grams in its sparse table; dense:
    V ** (order + 1)."""

    order: int
    smoothing: float
    perplexity: float
    stored: int
    dense: int
    characters: int


@dataclass(frozen=True)
class Comparison:
    """Networks by name with their perplexity, all of `size` parameters, beside the Markov models."""

    perplexities: Mapping[str, float]
    size: int
    counted: Sequence[Counted]
    vocab_size: int


def compare(perplexities: Mapping[str, float], model: nn.Module, corpus: Corpus) -> Comparison:
    """Networks like `model`, trained on the text, beside Markov models of it."""
    return Comparison(perplexities, parameters(model), count(corpus), len(corpus.vocabulary))


def count(corpus: Corpus, orders: Sequence[int] = ORDERS) -> list[Counted]:
    """The models of these orders, fitted to the training text, on the validation text; orders for which a
    text is too short are left out."""
    found = []
    text = corpus.train[:COUNTED]
    shortest = min(text.numel(), corpus.valid.numel())
    for order in (n for n in orders if n < shortest):
        model = MarkovModel(len(corpus.vocabulary), order).fit(text)
        reached = []
        for smoothing in SMOOTHINGS:
            model.smoothing = smoothing
            reached.append((float(model.perplexity(corpus.valid)), smoothing))
        best, smoothing = min(reached)
        found.append(Counted(order, smoothing, best, model.stored, model.dense_size, text.numel()))
    return found


def parameters(model: nn.Module) -> int:
    """How many numbers a network is, whatever text it has seen and however far back it looks."""
    return sum(p.numel() for p in model.parameters())


def table(comparison: Comparison) -> str:
    """Lines: the networks, then the Markov models."""
    perplexities, counted = comparison.perplexities, comparison.counted
    lines = ["perplexity per character of the validation text, and the size of what gives it:"]
    for name, value in perplexities.items():
        lines.append(f"  {name:14s} {value:9.3f} {comparison.size:>13,} parameters, the same for any context")
    if counted:
        lines.append(
            f"  counted on {counted[0].characters:,} characters, vocabulary {comparison.vocab_size}; "
            "smoothing picked on the validation text, in counting's favour:"
        )
    for c in counted:
        dense = f"{c.dense:,} = {comparison.vocab_size}^{c.order + 1} in a dense table"
        line = f"  {f'Markov order {c.order}':14s} {c.perplexity:9.3f} {c.stored:>13,} counts stored; {dense}"
        lines.append(f"{line} (smoothing {c.smoothing:g})")
    ahead = [c for c in counted if c.perplexity < min(perplexities.values())]
    if ahead:
        orders = ", ".join(str(c.order) for c in ahead)
        more = "it wants more training (demo --seconds, lm train --steps)"
        lines.append(f"  not yet ahead of counting (order {orders}): {more}")
    return "\n".join(lines)

"""A picture of a training run: loss curves, tokens per second, and the baseline's size."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from dataclasses import dataclass
from typing import Any

from .baseline import Comparison
from .errors import UserError, os_reason

MISSING = "matplotlib is not installed: in fastrnn's clone, pip install -e '.[lm]'"


@dataclass(frozen=True)
class Curve:
    """One model's history: a loss in nats per character and a time in seconds for each step."""

    name: str
    losses: list[float]
    seconds: list[float]
    tokens: list[int]  # of each step, as the others

    @property
    def tokens_per_second(self) -> float:
        """By the median step, which a hiccup of the machine does not move."""
        return statistics.median(n / s for n, s in zip(self.tokens, self.seconds, strict=True))


def available() -> bool:
    """Whether a plot can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(path: str, curves: list[Curve], title: str, comparison: Comparison | None = None) -> None:
    """Writes a PNG with the loss of every curve beside its tokens per second, and what Markov models store.

    Raises UserError where matplotlib is missing or the file cannot be written.
    """
    try:
        figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise UserError(MISSING) from error
    widths = (3, 2) if comparison is None else (3, 2, 3)
    figure = figure_class(figsize=(2.2 * sum(widths), 4))
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    left, right = panels[:2]
    if comparison is not None:
        _draw_sizes(panels[2], comparison)
    # Curves that agree hide each other: the first is drawn broad, the next ones thin upon it.
    for index, curve in enumerate(curves):
        width, alpha = (4.0, 0.45) if index == 0 and len(curves) > 1 else (1.2, 1.0)
        steps = range(1, len(curve.losses) + 1)
        left.plot(steps, curve.losses, linewidth=width, alpha=alpha, label=curve.name)
    left.set(xlabel="step", ylabel="loss, nats per character", title=title)
    left.grid(alpha=0.3)
    left.legend()
    rates = [curve.tokens_per_second for curve in curves]
    bars = right.bar([curve.name for curve in curves], rates, color=[f"C{i}" for i in range(len(curves))])
    right.bar_label(bars, labels=[f"{rate:,.0f}" for rate in rates])
    right.margins(y=0.12)  # room for the numbers
    right.set(ylabel="tokens/s", title="training speed, median step")
    figure.tight_layout()
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {path}: {os_reason(error)}") from error


def _draw_sizes(axes: Any, comparison: Comparison) -> None:
    """How many numbers each model is made of, by how far back it looks, with its perplexity."""
    counted = comparison.counted
    orders = [c.order for c in counted]
    dense = [float(c.dense) for c in counted]  # V ** 5 may take more than the 64 bits that numpy has
    axes.plot(orders, dense, "C7--", label="Markov, a table of every possible n-gram")
    axes.plot(orders, [c.stored for c in counted], "C1o-", label="Markov, the n-grams of the text")
    for c in counted:
        axes.annotate(
            f"perplexity\n{c.perplexity:.2f}",
            (c.order, c.stored),
            xytext=(0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
            color="C1",
        )
    best = min(comparison.perplexities, key=lambda name: comparison.perplexities[name])
    perplexity = f"perplexity {comparison.perplexities[best]:.2f}"
    axes.axhline(comparison.size, color="C0", label=f"{best}, any context: {perplexity}")
    axes.set(yscale="log", xlabel="characters of context", ylabel="numbers stored", xticks=orders)
    axes.set_title("size and perplexity by context")
    # Room for the words: the perplexities below, the legend above.
    sizes = [comparison.size, *(c.stored for c in counted), *dense]
    axes.set_ylim(min(sizes) / 100, max(sizes) * 3000)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=9)

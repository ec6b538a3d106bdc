"""LSTM against GRU on the same text: parameters, time, and bits a character on text held out.

    python -m examples.lstm_gru                 # some minutes on one core; --quick: seconds

The text is what Python's help() reads, 465 thousand characters of English and code, of which every tenth
piece of 4,000 is held out. Three character models are trained alike: an LSTM, a GRU of as many hidden
units, and a GRU with as many parameters as the LSTM. Beside them stands the best of `fastrnn.MarkovModel`,
which counts, with additive smoothing of 0.01. Better smoothing counts better (README.md).

Expected: with as many units the GRU's layer has 3/4 of the parameters and takes less time a step; at the end
of a short training it is no worse than the LSTM; all three beat that counting.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastrnn

from . import common

T, B, H = 128, 32, 128
SAME = 151  # hidden units of the GRU with the LSTM's parameters: 3 (I + H + 2) H = 4 (64 + 128 + 2) 128

SMOOTHING = 0.01  # of 1, 0.3, 0.1 ... 0.001 the best is 0.003, by 0.005 bits


class Writer(nn.Module):
    """A character model: embedding, recurrent layer, softmax."""

    def __init__(self, characters: int, rnn: nn.Module) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(characters, 64), rnn
        self.head = nn.Linear(rnn.hidden_size, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T, B] -> logits [T, B, V]."""
        return self.head(self.rnn(self.embed(tokens))[0])

    def loss(self, tokens: Tensor) -> Tensor:
        """tokens [T+1, B] -> nats per character."""
        return nn.functional.cross_entropy(self(tokens[:-1]).flatten(0, 1), tokens[1:].flatten())

    @property
    def parameters_of_layer(self) -> int:
        return sum(p.numel() for p in self.rnn.parameters())


def text() -> tuple[Tensor, Tensor, int]:
    """Tokens to train on, tokens held out, and how many different ones there are."""
    whole = "\n".join(page for _, page in sorted(topics.items()))
    pieces = [whole[i : i + 4000] for i in range(0, len(whole), 4000)]
    held = "".join(pieces[9::10])
    del pieces[9::10]
    train = "".join(pieces)
    symbols = common.Symbols([train])
    return *(symbols.encode([t])[0][:, 0] for t in (train, held)), len(symbols)


def step_times(models: dict[str, Writer], tokens: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward over T steps; the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            began = time.perf_counter()
            model.loss(tokens).backward()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def train(model: Writer, tokens: Tensor, held: Tensor, steps: int) -> list[tuple[int, float]]:
    """(step, bits a character of the text held out), ten times on the way."""
    torch.manual_seed(common.SEED)  # the same batches for every model
    rows = held[: len(held) // 50 * 50].view(50, -1).T  # [T, 50]
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    curve = []
    for step in range(1, steps + 1):
        begin = torch.randint(len(tokens) - T, (B,))
        optimizer.zero_grad()
        model.loss(tokens[begin + torch.arange(T + 1)[:, None]]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 10) == 0:
            with torch.no_grad():
                curve.append((step, model.loss(rows).item() / math.log(2)))
    return curve


def picture(path: Path, curves: dict[str, list[tuple[int, float]]], counted: float) -> None:
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for (name, curve), style in zip(curves.items(), ("-o", "--s", ":^"), strict=True):
        axes.plot(*zip(*curve, strict=True), style, label=name, markersize=4)
    axes.axhline(counted, color="gray", label="counting (Markov)")
    axes.set(xlabel="update", ylabel="bits a character, held out", title="LSTM and GRU on the same text")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def lstm_gru(quick: bool, out: Path) -> list[common.Figure]:
    tokens, held, characters = text()
    print(f"{len(tokens):,} characters to train on, {len(held):,} held out, {characters} different ones")
    models = {}
    for name, layer, hidden in (
        ("LSTM", fastrnn.LSTM, H),
        ("GRU", fastrnn.GRU, H),
        ("GRU, the LSTM's parameters", fastrnn.GRU, SAME),
    ):
        torch.manual_seed(common.SEED)
        models[name] = Writer(characters, fastrnn.init.recommended_(layer(64, hidden)))
    counts = [fastrnn.MarkovModel(characters, order, SMOOTHING).fit(tokens) for order in range(1, 7)]
    counted = min(math.log2(model.perplexity(held)) for model in counts)
    print(
        f"counting with additive smoothing of {SMOOTHING}, the best of order 1 to 6: "
        f"{counted:.3f} bits a character"
    )
    seconds = step_times(models, tokens[: (T + 1) * B].view(T + 1, B), 5 if quick else 30)
    curves = {name: train(model, tokens, held, 80 if quick else 1500) for name, model in models.items()}
    picture(out / "lstm_gru.png", curves, counted)
    for name, model in models.items():
        print(
            f"{name:27s} H = {model.rnn.hidden_size}, {model.parameters_of_layer:,} parameters in the layer, "
            f"{seconds[name] / T * 1e6:.0f} us a step of training, {curves[name][-1][1]:.3f} bits a character"
        )
    bits = {name: curve[-1][1] for name, curve in curves.items()}
    sizes = {name: model.parameters_of_layer for name, model in models.items()}
    return [
        common.Figure("GRU's parameters over LSTM's", sizes["GRU"] / sizes["LSTM"], 0.75, at_most=True),
        # 0.8 to 0.9 is usual; the bound leaves room for a machine with other work.
        common.Figure("GRU's time over LSTM's", seconds["GRU"] / seconds["LSTM"], 1.2, at_most=True),
        common.Figure(
            "GRU less LSTM, bits a character", bits["GRU"] - bits["LSTM"], 0.05, at_most=True, percent=False
        ),
        common.Figure(
            "bits a character, the worst of three",
            max(bits.values()),
            4.0 if quick else counted,
            at_most=True,
            percent=False,
        ),
    ]


if __name__ == "__main__":
    sys.exit(common.main("lstm_gru", lstm_gru, __doc__))

"""Many to many: dates as people write them into ISO 8601, by an encoder and a decoder with attention.

    wednesday, the third of march nineteen eighty-seven  ->  1987-03-03

A bidirectional LSTM reads the letters, Luong's decoder writes the date, and a heat map shows where it looked.
No date of the test occurs in training, in whatever form.
"""

from __future__ import annotations

import calendar
import functools
import random
import sys
from datetime import date, timedelta
from pathlib import Path

import torch
from matplotlib.figure import Figure
from num2words import num2words
from torch import Tensor, nn

import fastrnn

from . import common

START, END = "<", ">"
FIRST, DAYS = date(1900, 1, 1), 73_049  # to the end of 2099
words = functools.cache(num2words)


def written(day: date) -> str:
    """The date in one of a hundred forms."""
    n, month, weekday = day.day, calendar.month_name[day.month], calendar.day_name[day.weekday()]
    d = random.choice([str(n), words(n, to="ordinal_num"), words(n, to="ordinal")])
    m = random.choice([month, month[:3]])
    y = random.choice([str(day.year), words(day.year, to="year")])
    w = random.choice(["", "", f"{weekday}, ", f"{weekday[:3]} "])
    form = random.choice([f"{w}{d} {m} {y}", f"{w}{m} {d}, {y}", f"{w}the {d} of {m} {y}", f"{y}, {m} {d}"])
    return form.lower()


class Translator(nn.Module):
    def __init__(self, sources: common.Symbols, targets: common.Symbols, hidden: int) -> None:
        super().__init__()
        self.read = nn.Embedding(len(sources), 32)
        self.encoder = fastrnn.Bidirectional(fastrnn.LSTM(32, hidden), merge="sum")
        self.write = nn.Embedding(len(targets), 32)
        self.decoder = fastrnn.AttentionDecoder(32, hidden, hidden)
        self.head = nn.Linear(hidden, len(targets))

    def forward(self, source: Tensor, lengths: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """source [S, B], the output one step late [T, B] -> logits [T, B, V], weights [B, T, S]."""
        memory, (state, _) = self.encoder(self.read(source), lengths=lengths)
        output, _, weights = self.decoder(self.write(before), memory, state, lengths=lengths)
        return self.head(output), weights

    @torch.no_grad()
    def translate(
        self, source: Tensor, lengths: Tensor, start: int, end: int, **options
    ) -> tuple[Tensor, Tensor]:
        """source [S, B] -> what `fastrnn.generate` returns: tokens [B, T], or [B, beams, T], and scores."""
        memory, (hidden, _) = self.encoder(self.read(source), lengths=lengths)

        def step(token, state):
            hidden, memory, lengths = state
            output, hidden, _ = self.decoder.step(self.write(token), memory, hidden, lengths=lengths)
            return self.head(output), (hidden, memory, lengths)

        first = torch.full(lengths.shape, start)
        return fastrnn.generate(step, first, (hidden, memory, lengths), max_steps=12, end=end, **options)


def heat_map(path: Path, source: str, target: str, weights: Tensor) -> None:
    """weights [T, S] as a picture: each row shows where the decoder looked to write one character."""
    figure = Figure(figsize=(0.2 * len(source) + 1.2, 0.2 * len(target) + 1))
    axes = figure.subplots()
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), source.replace(" ", "\u2423"), family="monospace")
    axes.set_yticks(range(len(target)), target, family="monospace")
    axes.set(xlabel="read", ylabel="written", title="attention")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def translation(quick: bool, out: Path) -> common.Figure:
    days = [FIRST + timedelta(days=n) for n in random.sample(range(DAYS), 10_000 if quick else DAYS)]
    texts = [written(day) for day in days]
    isos = [day.isoformat() + END for day in days]
    sources, targets = common.Symbols(texts), common.Symbols([START, *isos])
    held = 500 if quick else 2000  # the first ones are held out
    model = Translator(sources, targets, hidden=64 if quick else 128)
    stream = common.batches(len(days) - held, 64)

    def loss() -> Tensor:
        chosen = [held + i for i in next(stream).tolist()]
        source, lengths = sources.encode(texts[i] for i in chosen)
        target, _ = targets.encode(isos[i] for i in chosen)
        before, _ = targets.encode(START + isos[i][:-1] for i in chosen)
        logits, _ = model(source, lengths, before)
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    common.fit(model, loss, steps=200 if quick else 600, lr=5e-3)

    source, lengths = sources.encode(texts[:held])
    start, end = targets.number[START], targets.number[END]
    tokens, _ = model.translate(source, lengths, start, end)
    found = ["".join(targets.decode(row, END)) for row in tokens]
    right = sum(f + END == iso for f, iso in zip(found, isos[:held], strict=True))
    shown = max(range(held), key=lambda i: len(texts[i]))
    for i in (0, 1, 2, shown):
        print(f"{texts[i]:65s} {found[i]}")
    beams, scores = model.translate(source[:, :1], lengths[:1], start, end, strategy="beam", beam_size=3)
    for row, score in zip(beams[0], scores[0], strict=True):
        print(f"  a beam of the first: {''.join(targets.decode(row, END))}, log-probability {score:.2f}")

    source, lengths = sources.encode([texts[shown]])
    before, _ = targets.encode([START + found[shown]])
    with torch.no_grad():
        _, weights = model(source, lengths, before)
    heat_map(out / "translation.png", texts[shown], found[shown] + END, weights[0])
    return common.Figure("dates translated without a mistake", right / held, 0.3 if quick else 0.99)


if __name__ == "__main__":
    sys.exit(common.main("translation", translation, __doc__))

"""One to many: an image of a handwritten digit to its name, letter by letter.

scikit-learn ships 1,797 scans of 8 x 8 points. A small convolutional network makes the first state of a GRU,
which writes "seven" until it writes the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastrnn

from . import common

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
START, END = "<", ">"


class Captioner(nn.Module):
    def __init__(self, letters: common.Symbols, hidden: int) -> None:
        super().__init__()
        self.see = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * 4 * 4, hidden),
            nn.LayerNorm(
                hidden
            ),  # images differ little before training, and what tells them apart must count
            nn.Tanh(),
        )
        self.embed = nn.Embedding(len(letters), 16)
        self.rnn = fastrnn.GRU(16, hidden)
        self.head = nn.Linear(hidden, len(letters))

    def forward(self, images: Tensor, before: Tensor) -> Tensor:
        """images [B, 1, 8, 8], the name one letter late [T, B] -> logits [T, B, V]."""
        output, _ = self.rnn(self.embed(before), self.see(images)[None])
        return self.head(output)

    @torch.no_grad()
    def caption(self, images: Tensor, start: int, end: int) -> Tensor:
        """images [B, 1, 8, 8] -> tokens [B, T]."""

        def step(token, state):
            output, state = self.rnn(self.embed(token)[None], state)
            return self.head(output[0]), state

        first = torch.full((len(images),), start)
        tokens, _ = fastrnn.generate(step, first, self.see(images)[None], max_steps=6, end=end)
        return tokens


def captioning(quick: bool, out: Path) -> common.Figure:
    digits = load_digits()
    order = torch.randperm(len(digits.target))  # those who wrote them follow one another
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16  # [N, 1, 8, 8]
    names = [NAMES[label] for label in digits.target[order]]
    letters = common.Symbols([START + END, *NAMES])
    held = 500
    before, _ = letters.encode(START + name for name in names)  # [T, N]
    after, _ = letters.encode(name + END for name in names)
    model = Captioner(letters, hidden=64)
    stream = common.batches(len(names) - held, 64)

    def loss() -> Tensor:
        chosen = next(stream)
        logits = model(images[chosen], before[:, chosen])
        return nn.functional.cross_entropy(logits.flatten(0, 1), after[:, chosen].flatten(), ignore_index=0)

    common.fit(model, loss, steps=300 if quick else 1000, lr=3e-3)
    tokens = model.caption(images[-held:], letters.number[START], letters.number[END])
    found = ["".join(letters.decode(row, END)) for row in tokens]
    for i in range(3):
        print("\n".join("".join(" .:-=+*#%@"[int(9 * v)] * 2 for v in line) for line in images[i - held, 0]))
        print(f"{found[i]} (it is a {names[i - held]})")
    right = sum(f == name for f, name in zip(found, names[-held:], strict=True))
    return common.Figure("digits named to the letter", right / held, 0.9 if quick else 0.97)


if __name__ == "__main__":
    sys.exit(common.main("captioning", captioning, __doc__))

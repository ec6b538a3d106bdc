"""The four shapes of use, on waves: one to one, one to many, many to one, many to many.

    python -m examples.shapes            # seconds

    one to one      a frequency to its period               one step of a GRUCell
    one to many     a frequency to the wave                 the frequency makes the first state, no input
    many to one     a noisy wave to its frequency           the last state answers
    many to many    a noisy wave to the wave without noise  both directions answer at every step

The figure of each is the share of the answers' variance that it explains, on waves held out. Expected: 95 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastrnn

from . import common

T, H = 40, 48
LOW, HIGH = 0.02, 0.08  # cycles a step


def waves(B: int, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Frequencies [B, 1] in [0, 1], waves [T, B, 1] of any phase, the same with noise."""
    f = torch.rand(B, 1)
    phase = 2 * torch.pi * torch.rand(B, 1)
    wave = torch.sin(2 * torch.pi * steps(f) + phase)
    return f, wave, wave + noise * torch.randn_like(wave)


def steps(f: Tensor) -> Tensor:
    """[T, B, 1]: how many cycles each wave has turned."""
    return torch.arange(T)[:, None, None] * (LOW + (HIGH - LOW) * f)


class OneToOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = fastrnn.GRUCell(1, H), nn.Linear(H, 1)

    def forward(self, f: Tensor) -> Tensor:
        """[B, 1] -> [B, 1]."""
        return self.head(self.cell(f))

    @staticmethod
    def batch(B: int) -> tuple[Tensor, Tensor]:
        f, _, _ = waves(B)
        return f, LOW / (LOW + (HIGH - LOW) * f)


class OneToMany(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(1, H), nn.Tanh(), nn.Linear(H, 2 * H))
        self.rnn, self.head = fastrnn.LSTM(1, H), nn.Linear(H, 1)

    def forward(self, f: Tensor) -> Tensor:
        """[B, 1] -> [T, B, 1]."""
        h, c = self.first(f)[None].chunk(2, -1)  # [1, B, H]
        return self.head(self.rnn(f.new_zeros(T, len(f), 1), (h.contiguous(), c.contiguous()))[0])

    @staticmethod
    def batch(B: int) -> tuple[Tensor, Tensor]:
        f, _, _ = waves(B)
        return f, torch.sin(2 * torch.pi * steps(f))


class ManyToOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = fastrnn.LSTM(1, H), nn.Linear(H, 1)

    def forward(self, wave: Tensor) -> Tensor:
        """[T, B, 1] -> [B, 1]."""
        _, (h, _) = self.rnn(wave)
        return self.head(h[-1])

    @staticmethod
    def batch(B: int) -> tuple[Tensor, Tensor]:
        f, _, noisy = waves(B)
        return noisy, f


class ManyToMany(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = fastrnn.GRU(1, H, bidirectional=True), nn.Linear(2 * H, 1)

    def forward(self, wave: Tensor) -> Tensor:
        """[T, B, 1] -> [T, B, 1]."""
        return self.head(self.rnn(wave)[0])

    @staticmethod
    def batch(B: int) -> tuple[Tensor, Tensor]:
        _, wave, noisy = waves(B)
        return noisy, wave


SHAPES: dict[str, type] = {
    "one to one": OneToOne,
    "one to many": OneToMany,
    "many to one": ManyToOne,
    "many to many": ManyToMany,
}


def explained(answer: Tensor, target: Tensor) -> float:
    """1 less the error's variance over the target's."""
    return 1 - float((answer - target).square().mean() / target.var())


def picture(path: Path, shown: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """shown: input, answer and target of waves held out."""
    figure = Figure(figsize=(9, 6.5))
    axes = figure.subplots(2, 2)
    for ax, (name, (x, answer, target)) in zip(axes.flat, shown.items(), strict=True):
        if target.dim() == 2:  # one number each: against the right one
            ax.plot(target[:, 0], answer[:, 0], ".", markersize=4, label="waves held out")
            low, high = float(target.min()), float(target.max())
            ax.plot([low, high], [low, high], "k-", linewidth=1, label="right")
            what = "period" if name == "one to one" else "frequency"
            ax.set(xlabel=what, ylabel=f"{what} answered")
        else:
            if x.dim() == 3:
                ax.plot(x[:, 0, 0], "x", color="gray", markersize=4, label="input")
            ax.plot(target[:, 0, 0], "k-", linewidth=1, label="right")
            ax.plot(answer[:, 0, 0], "o", markersize=3, label="answer")
            ax.set(xlabel="step", ylabel="wave")
        ax.set_title(name)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def shapes(quick: bool, out: Path) -> list[common.Figure]:
    figures, shown = [], {}
    for name, shape in SHAPES.items():
        model = shape()
        batch: Callable[[int], tuple[Tensor, Tensor]] = shape.batch

        def loss(model=model, batch=batch) -> Tensor:
            x, target = batch(64)
            return nn.functional.mse_loss(model(x), target)

        common.fit(model, loss, 200 if quick else 800, 1e-2)
        x, target = batch(500)
        with torch.no_grad():
            answer = model(x)
        shown[name] = x, answer, target
        figures.append(
            common.Figure(f"{name}: variance explained", explained(answer, target), 0.6 if quick else 0.95)
        )
    picture(out / "shapes.png", shown)
    return figures


if __name__ == "__main__":
    sys.exit(common.main("shapes", shapes, __doc__))

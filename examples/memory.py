"""The long lag: two tasks at 500 steps that gated cells solve and the vanilla cell does not.

    python -m examples.memory            # minutes on one core; --quick: seconds, adding alone, at 50 steps

Adding (Hochreiter & Schmidhuber 1997): of 500 random numbers two are marked, and the answer is their
sum. Who always answers 1 has a mean squared error of 1/6. Copying: ten symbols of eight, 500 steps of
nothing, then the ten again in order. Who remembers nothing, and guesses, has a cross-entropy a step of
10 ln 8 / 520. Both as in Arjovsky, Shah & Bengio 2016 (arXiv:1511.06464).

Training draws 100 to 500 steps anew for each batch, and weighs the ten answers of copying as much as all
the steps before them; the figures are of 500 steps and unweighted. Every cell has the same units,
batches, updates and orthogonal recurrent weights; LSTM and GRU have chrono biases (Tallec & Ollivier
2018).

Expected: of adding, LSTM and GRU are left with less than a tenth of the error without memory, the
vanilla cell with more than nine tenths. Of the copied symbols the LSTM recalls half or more, the GRU 80 %
or more, the vanilla cell, as a guess does, an eighth.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastrnn
from fastrnn.init import chrono_, orthogonal_

from . import common

SYMBOLS, COPIED = 8, 10
RECALLED = {"LSTM": 0.5, "GRU": 0.8, "vanilla tanh": 0.2}  # of the symbols; guessing finds an eighth
LOSSES = {"adding": "mean squared error", "copying": "cross-entropy"}
CELLS = {"LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU, "vanilla tanh": fastrnn.RNN}


def adding(T: int, B: int) -> tuple[Tensor, Tensor]:
    """Numbers and marks [T, B, 2], sums [1, B, 1] of the one marked in each half."""
    half = T // 2
    marks = torch.zeros(T, B)
    marks.scatter_(0, torch.stack([torch.randint(half, (B,)), torch.randint(half, T, (B,))]), 1)
    values = torch.rand(T, B)
    return torch.stack([values, marks], -1), (values * marks).sum(0)[None, :, None]


def copying(T: int, B: int) -> tuple[Tensor, Tensor]:
    """Symbols as rows of the identity [T + 20, B, 10] (0: nothing, 9: now), answers [T + 20, B]."""
    symbols = torch.randint(1, SYMBOLS + 1, (COPIED, B))
    tokens = torch.zeros(T + 2 * COPIED, B, dtype=torch.long)
    answers = torch.zeros_like(tokens)
    tokens[:COPIED], answers[-COPIED:] = symbols, symbols
    tokens[T + COPIED - 1] = SYMBOLS + 1
    return torch.eye(SYMBOLS + 2)[tokens], answers


def error(output: Tensor, sums: Tensor) -> Tensor:
    return nn.functional.mse_loss(output[-1:], sums)


def entropy(output: Tensor, answers: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), answers.flatten())


def balanced(output: Tensor, answers: Tensor) -> Tensor:
    return entropy(output[-COPIED:], answers[-COPIED:]) + entropy(output[:-COPIED], answers[:-COPIED])


@dataclass(frozen=True)
class Task:
    """batch(T, B) -> input, answers; the output's width; learning rate; losses to train and to measure by."""

    batch: Callable[[int, int], tuple[Tensor, Tensor]]
    width: int
    lr: float
    trained: Callable[[Tensor, Tensor], Tensor]
    measured: Callable[[Tensor, Tensor], Tensor]


TASKS = {
    "adding": Task(adding, 1, 1e-2, error, error),
    "copying": Task(copying, SYMBOLS + 2, 2e-2, balanced, entropy),
}
Curve = list[tuple[int, float]]  # (update, loss)


def train(cell: str, task: Task, T: int, hidden: int, steps: int) -> tuple[Curve, Tensor, Tensor]:
    """The loss at T steps on the way, and the output and answers of 500 sequences at the end."""
    torch.manual_seed(common.SEED)
    rnn = orthogonal_(CELLS[cell](task.batch(2, 1)[0].shape[-1], hidden))
    # torch.nn's, at most 1/sqrt(H) where one input in ten is not zero, are too small to be noticed.
    nn.init.normal_(rnn.weight_ih_l0)
    if cell != "vanilla tanh":
        chrono_(rnn, T)
    head = nn.Linear(hidden, task.width)
    parameters = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=steps, pct_start=0.1)
    curve = []
    for step in range(1, steps + 1):
        x, answers = task.batch(int(torch.randint(T // 5, T + 1, ())), 20)
        optimizer.zero_grad()
        task.trained(head(rnn(x)[0]), answers).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 20) == 0:
            x, answers = task.batch(T, 500 if step == steps else 100)
            with torch.no_grad():
                output = head(rnn(x)[0])
            curve.append((step, task.measured(output, answers).item()))
    return curve, output, answers


def without_memory(task: str, T: int) -> float:
    """What the task's loss is for the best answer that needs no memory."""
    return 1 / 6 if task == "adding" else COPIED * math.log(SYMBOLS) / (T + 2 * COPIED)


def picture(path: Path, curves: dict[tuple[str, str], Curve], T: int) -> None:
    figure = Figure(figsize=(9, 3.8))
    axes = figure.subplots(1, len({task for task, _ in curves}), squeeze=False)[0]
    styles = {"LSTM": "-o", "GRU": "-s", "vanilla tanh": "--^"}
    for ax, (task, name) in zip(axes, LOSSES.items(), strict=False):
        for cell, style in styles.items():
            ax.semilogy(*zip(*curves[task, cell], strict=True), style, label=cell, markersize=4)
        ax.axhline(without_memory(task, T), color="gray", linestyle=":", label="without memory")
        ax.set(title=f"{task}, {T} steps", xlabel="update", ylabel=name)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def memory(quick: bool, out: Path) -> list[common.Figure]:
    T = 50 if quick else 500
    if quick:
        print("copying is left out: it takes minutes")
    plan = {"adding": (32, 300)} if quick else {"adding": (64, 800), "copying": (128, 2500)}
    curves, figures = {}, []
    for name, (hidden, steps) in plan.items():
        for cell in CELLS:
            curve, output, answers = train(cell, TASKS[name], T, hidden, steps)
            curves[name, cell] = curve
            print(
                f"{name}, {cell}: {LOSSES[name]} {curve[-1][1]:.4f}, "
                f"without memory {without_memory(name, T):.4f}",
                flush=True,
            )
            gated = cell != "vanilla tanh"
            if name == "adding":
                share = curve[-1][1] / without_memory(name, T)
                figure = common.Figure(
                    f"adding, {cell}: error over that without memory",
                    share,
                    0.1 if gated else 0.9,
                    at_most=gated,
                )
            else:
                right = (output[-COPIED:].argmax(-1) == answers[-COPIED:]).float().mean().item()
                figure = common.Figure(
                    f"copying, {cell}: symbols recalled", right, RECALLED[cell], at_most=not gated
                )
            figures.append(figure)
    picture(out / "memory.png", curves, T)
    return figures


if __name__ == "__main__":
    sys.exit(common.main("memory", memory, __doc__))

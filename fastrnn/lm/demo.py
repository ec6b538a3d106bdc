"""The demonstration: the same model on fastrnn.LSTM and on torch.nn.LSTM, trained side by side."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .._version import __version__
from . import baseline, checkpoint, generate, report
from .corpus import Corpus, read_text
from .errors import UserError, os_reason
from .model import CELLS, IMPLEMENTATIONS, Config
from .progress import Progress
from .train import Interrupt, Trainer, interrupts, random_state, set_random_state

BLOCK_STEPS = 4
FIRST_STEPS = 50
GENERATED = 400
MOST_SPREAD = 3  # of the ratios, on a machine that does nothing else
FEW_PAIRS = 10  # of which a median says little


@dataclass(frozen=True)
class Outcome:
    """What the demonstration measured."""

    ratios: list[float]  # torch's time over fastrnn's, one for each pair of blocks
    losses: dict[str, list[float]]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def difference(self, steps: int | None = None) -> float:
        """The largest relative difference of the two loss curves over the first `steps` steps.

        NaN where one has no number.
        """
        curves = (self.losses[name][:steps] for name in ("fastrnn", "torch"))
        ours, theirs = (torch.tensor(curve, dtype=torch.double) for curve in curves)
        return ((ours - theirs).abs() / theirs.abs().clamp(min=1e-12)).max().item()


def alternate(trainers: dict[str, Trainer], seconds: float, interrupt: Interrupt) -> Outcome:
    """Trains both in turns, in blocks of steps, for about `seconds`.

    Turns make the comparison fair: a machine that slows down slows both, and who goes first changes from
    pair to pair. The first pair warms up and does not count.
    """
    ratios: list[float] = []
    progress = Progress(None)
    began = time.monotonic()
    order = list(trainers)
    # Of each its own, from one beginning: both draw the same dropout.
    states = {name: random_state(trainer.device) for name, trainer in trainers.items()}
    try:
        # Three pairs at least: one to warm up, and one with each of the two first.
        while len(ratios) < 3 or time.monotonic() - began < seconds:
            if interrupt.pressed:
                raise KeyboardInterrupt
            spent: dict[str, float] = {}
            for name in order:
                trainer = trainers[name]
                set_random_state(states[name], trainer.device)
                for _ in range(BLOCK_STEPS):
                    trainer.train_step()
                states[name] = random_state(trainer.device)
                spent[name] = sum(trainer.seconds[-BLOCK_STEPS:])
            ratios.append(spent["torch"] / spent["fastrnn"])
            last = (
                f"{shown} loss {trainers[name].losses[-1]:.4f}" for name, shown in IMPLEMENTATIONS.items()
            )
            progress.update(", ".join(last), BLOCK_STEPS)
            order.reverse()
    finally:
        progress.close()
    return Outcome(ratios[1:], {name: trainer.losses for name, trainer in trainers.items()})


def demo(
    config: Config, data: str | None, out: str, seconds: float, valid_max: int, device: torch.device
) -> None:
    """Trains, compares, generates, and leaves a checkpoint, a text and a plot in `out`."""
    if config.dropout and config.layers > 1 and device.type != "cpu":
        raise UserError(f"--dropout: torch.nn draws other masks on {device}, the curves would not compare")
    folder = Path(out)
    files = {name: str(folder / name) for name in ("demo.pt", "sample.txt", "demo.png")}
    for path in files.values():
        checkpoint.check_writable(path)
    corpus = Corpus.from_text(read_text(data), valid_max)
    corpus.check_size(config.batch, config.bptt, data or "the standard library")
    config.check(len(corpus.vocabulary))
    if not report.available():
        print(f"fastrnn: no plot will be drawn, {report.MISSING}", file=sys.stderr)

    layer = CELLS[config.cell]
    print(
        f"text: {data or 'the Python standard library'}, {corpus.train.numel():,} characters to train, "
        f"{corpus.valid.numel():,} to validate, vocabulary {len(corpus.vocabulary)}"
    )
    print(
        f"model: embedding, {config.layers} x {layer}({config.hidden}), linear; batch {config.batch}, "
        f"{config.bptt} steps of backpropagation, Adam {config.lr:g}; {device}, "
        f"{torch.get_num_threads()} threads, fastrnn {__version__}, torch {torch.__version__}",
        flush=True,
    )
    print(
        f"both are trained in turns, {seconds:g} s in all, then validated and compared with counting",
        flush=True,
    )
    trainers = {
        name: Trainer(replace(config, implementation=name), corpus, device) for name in IMPLEMENTATIONS
    }
    with interrupts() as interrupt:
        outcome = alternate(trainers, seconds, interrupt)
    curves = [trainer.curve(f"{IMPLEMENTATIONS[name]}.{layer}") for name, trainer in trainers.items()]
    _print_outcome(outcome, curves)
    print("validating, and counting for the Markov models", flush=True)
    reached = {
        curve.name: trainer.validate() for curve, trainer in zip(curves, trainers.values(), strict=True)
    }
    comparison = baseline.compare(reached, trainers["fastrnn"].model, corpus)
    print(baseline.table(comparison), flush=True)

    ours = trainers["fastrnn"]
    text = generate.generate(ours.model, corpus.vocabulary, GENERATED, temperature=0.7, seed=config.seed)
    print(f"\n--- {GENERATED} characters generated at temperature 0.7 ---\n{text}\n---")
    checkpoint.save(files["demo.pt"], ours.fields())
    try:
        Path(files["sample.txt"]).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {files['sample.txt']}: {os_reason(error)}") from error
    written = ["demo.pt", "sample.txt"]
    if report.available():
        title = f"{config.layers} x {layer}({config.hidden}) on characters"
        report.plot(files["demo.png"], curves, title, comparison)
        written.append("demo.png")
    print(f"written to {folder}: {', '.join(written)}")


def _print_outcome(outcome: Outcome, curves: list[report.Curve]) -> None:
    steps = len(outcome.losses["fastrnn"])
    first = min(FIRST_STEPS, steps)
    print(f"\n{steps} steps each, in alternating blocks of {BLOCK_STEPS}")
    for curve in curves:
        print(
            f"{curve.name:14s} {curve.tokens_per_second:>10,.0f} tokens/s   last loss {curve.losses[-1]:.4f}"
        )
    theirs, ours = curves[1].name, curves[0].name
    low, high = min(outcome.ratios), max(outcome.ratios)
    print(f"{theirs} / {ours} training time: {outcome.ratio:.2f}x")
    print(f"  median of {len(outcome.ratios)} pairs of blocks, from {low:.2f}x to {high:.2f}x")
    if high > MOST_SPREAD * low:
        print("  note: so wide a range means that other programs run here; times are not to be trusted")
    elif len(outcome.ratios) < FEW_PAIRS:
        print("  note: of so few pairs the times are not to be trusted; --seconds gives more of them")
    print(
        f"largest relative difference of the loss curves: {outcome.difference(first):.1e} "
        f"in the first {first} steps, {outcome.difference():.1e} in all {steps}"
    )
    if steps > first:
        print("  training amplifies rounding: so would torch.nn's curves part, begun 1e-7 apart")

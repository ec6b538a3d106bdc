"""What the examples share: options, training, symbols as numbers, and the verdict."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

SEED = 0


@dataclass(frozen=True)
class Figure:
    """What an example reached, and what it must reach: `expected` or more, with at_most=True or less.

    Most are shares, of data held out, in [0, 1]; with percent=False a plain number.
    """

    name: str
    value: float
    expected: float
    at_most: bool = False
    percent: bool = True

    @property
    def reached(self) -> bool:
        return self.value <= self.expected if self.at_most else self.value >= self.expected

    def __str__(self) -> str:
        verdict = "reached" if self.reached else "NOT REACHED"
        value, expected = (
            (f"{self.value:.2%}", f"{self.expected:.1%}")
            if self.percent
            else (f"{self.value:.3g}", f"{self.expected:.3g}")
        )
        return f"{self.name} {value}, expected {expected} or {'less' if self.at_most else 'more'}: {verdict}"


Example = Callable[[bool, Path], "Figure | list[Figure]"]


def _folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    return path


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of every example."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few seconds of training, and a lower figure")
    parser.add_argument("--out", type=_folder, default=Path("out"), help="for pictures (default %(default)s)")
    return parser


def run(name: str, example: Example, quick: bool, out: Path) -> list[Figure]:
    """Runs one example from its seed, and says what came of it."""
    print(f"=== {name}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    random.seed(SEED)
    torch.manual_seed(SEED)
    began, before = time.perf_counter(), _files(out)
    found = example(quick, out)
    figures = found if isinstance(found, list) else [found]
    print(*figures, sep="\n")
    for path in sorted(_files(out) - before):
        print(f"wrote {path[0]}")
    print(f"({time.perf_counter() - began:.0f} s)\n", flush=True)
    return figures


def _files(folder: Path) -> set[tuple[Path, int]]:
    """Each with the time it was written."""
    return {(path, path.stat().st_mtime_ns) for path in folder.iterdir()}


def main(name: str, example: Example, description: str | None) -> int:
    """The command line of one example: its exit code says whether every figure was reached."""
    args = options(description).parse_args()
    return 0 if all(figure.reached for figure in run(name, example, args.quick, args.out)) else 1


class Symbols:
    """Characters or words as numbers from 1 on. 0 is padding, and whatever was not there to be numbered."""

    def __init__(self, sequences: Iterable[Sequence[str]]) -> None:
        self.names = ["\ufffd", *sorted({symbol for sequence in sequences for symbol in sequence})]
        self.number = {symbol: i for i, symbol in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, sequences: Iterable[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Tokens [T, B] and lengths [B]."""
        rows = [torch.tensor([self.number.get(symbol, 0) for symbol in row]) for row in sequences]
        return pad_sequence(rows), torch.tensor([len(row) for row in rows])

    def decode(self, tokens: Tensor, end: str | None = None) -> list[str]:
        """The symbols of tokens [T] before the end."""
        found = [self.names[i] for i in tokens.tolist()]
        return found[: found.index(end)] if end in found else found


def batches(count: int, size: int) -> Iterator[Tensor]:
    """Indices [size] of a training set, epoch after epoch, each in a new order."""
    while True:
        yield from torch.randperm(count).split(size)


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    """Adam, a learning rate that falls to nothing, and gradients of a norm of at most 1."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with trange(steps, disable=None) as progress:  # None: silent where there is no terminal
        for _ in progress:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix_str(f"loss {value.item():.4f}", refresh=False)
    model.eval()

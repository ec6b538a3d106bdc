"""The model: embedding, recurrent layers of fastrnn or torch.nn, linear head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

IMPLEMENTATIONS = {"fastrnn": "fastrnn", "torch": "torch.nn"}  # and what reports call them
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
MAX_PARAMETERS = 1_000_000_000

State = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    """What makes a run: the same Config, text and device give the same loss curve."""

    implementation: str = "fastrnn"
    cell: str = "lstm"
    layers: int = 2
    hidden: int = 256
    dropout: float = 0.0
    batch: int = 32
    bptt: int = 100
    lr: float = 2e-3
    clip: float = 1.0
    seed: int = 0

    def check(self, vocab_size: int) -> None:
        """Raises UserError naming the option that is out of range."""
        for name, choices in (("implementation", tuple(IMPLEMENTATIONS)), ("cell", tuple(CELLS))):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("layers", "hidden", "batch", "bptt"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"--{name} must be an integer of 1 or more, got {value}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not (isinstance(value, float) and value > 0 and math.isfinite(value)):
                raise UserError(f"--{name} must be a finite number above 0, got {value}")
        if not (isinstance(self.dropout, float) and 0 <= self.dropout < 1):
            raise UserError(f"--dropout must be in [0, 1), got {self.dropout}")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise UserError(f"--seed must be in [0, 2**63), got {self.seed}")
        size = GATES[self.cell] * self.layers * 2 * self.hidden**2 + 2 * vocab_size * self.hidden
        if size > MAX_PARAMETERS:
            raise UserError(
                f"--hidden {self.hidden} with --layers {self.layers} makes {size:,} parameters, "
                f"at most {MAX_PARAMETERS:,} are supported"
            )


class CharacterModel(nn.Module):
    """Predicts the next character. Embedding and hidden size are the same."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        if config.implementation == "fastrnn":
            import fastrnn as library
        else:
            import torch.nn as library  # type: ignore[no-redef]
        layer: Any = getattr(library, CELLS[config.cell])
        # torch.nn warns about dropout on a single layer, where it has no place to act; the command line has.
        dropout = config.dropout if config.layers > 1 else 0.0
        self.embedding = nn.Embedding(vocab_size, config.hidden)
        self.rnn: nn.Module = layer(config.hidden, config.hidden, config.layers, dropout=dropout)
        self.head = nn.Linear(config.hidden, vocab_size)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens [T, B] and the state before them -> logits [T, B, V] and the state after them."""
        output, state = self.rnn(self.embedding(tokens), state)
        return self.head(output), state


def build(config: Config, vocab_size: int, device: torch.device) -> CharacterModel:
    """A model whose start depends on config.seed alone, not on the device or on what ran before."""
    torch.manual_seed(config.seed)
    return CharacterModel(config, vocab_size).to(device)


def each(state: State | None, f: Callable[[Tensor], Tensor]) -> State | None:
    """f of every tensor of a recurrent state."""
    if state is None:
        return None
    return f(state) if isinstance(state, Tensor) else (f(state[0]), f(state[1]))

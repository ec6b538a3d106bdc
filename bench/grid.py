"""The one home of the benchmarks' shapes, cells and counts of operations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    T: int
    B: int
    I: int
    H: int

    @property
    def id(self) -> str:
        return f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"


GRID = (
    Shape(100, 1, 128, 128),
    Shape(100, 1, 512, 512),
    Shape(1000, 4, 64, 64),
    Shape(100, 32, 128, 128),
    Shape(100, 32, 256, 256),
    Shape(100, 32, 512, 512),
    Shape(100, 64, 512, 512),
    Shape(50, 64, 1024, 1024),
)
QUICK = (GRID[0], GRID[2], GRID[4])

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
MODES = ("forward", "training")


def flop(cell: str, shape: Shape, mode: str) -> int:
    """Operations of the matrix products alone, a multiply-add being two; training is three times forward."""
    forward = 2 * shape.T * shape.B * GATES[cell] * shape.H * (shape.I + shape.H)
    return forward * (3 if mode == "training" else 1)

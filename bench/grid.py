"""The one home of the benchmarks' rows: shapes, cells, kinds of layer, counts of operations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Shape:
    T: int
    B: int
    I: int
    H: int

    @property
    def id(self) -> str:
        return f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"


@dataclass(frozen=True)
class Case:
    """What one row measures.

    mode   forward; training (forward, and backward to the parameters and the input); last (training whose
           loss sees the last step alone: gradients vanish); step (one step of a stream, the state carried)
    kind   plain, bidirectional, two layers, projection (P = H/2), packed (a PackedSequence) or batch first
    dtype  of weights and input; int8: `fastrnn.quantize` of a float32 layer, whose input is float32
    """

    cell: str
    mode: str
    shape: Shape
    kind: str = "plain"
    dtype: str = "float32"

    @property
    def id(self) -> str:
        more = [part for part in (self.kind, self.dtype) if part not in ("plain", "float32")]
        return "-".join([self.cell, self.mode, self.shape.id, *more]).replace(" ", "-")

    @property
    def calls(self) -> int:
        """Calls of the layer in one sample."""
        return STREAM if self.mode == "step" else 1

    @property
    def proj_size(self) -> int:
        return self.shape.H // 2 if self.kind == "projection" else 0

    @property
    def num_layers(self) -> int:
        return 2 if self.kind == "two layers" else 1

    @property
    def directions(self) -> int:
        return 2 if self.kind == "bidirectional" else 1

    @property
    def lengths(self) -> list[int]:
        """Steps of each sequence, falling evenly from T to T/4 where they are packed."""
        T, B = self.shape.T, self.shape.B
        if self.kind != "packed":
            return [T] * B
        return [T - (T - T // 4) * b // max(1, B - 1) for b in range(B)]


GATES = {"lstm": 4, "gru": 3, "rnn": 1}
STREAM = 100  # steps of a stream in one sample: one alone is too short for the clock
MODES = ("forward", "training")
TRAINING = ("training", "last")

SMALL = Shape(100, 1, 128, 128)
WIDE = Shape(100, 1, 512, 512)  # weights beyond a core's cache, and a wait for the other cores every step
LONG = Shape(1000, 4, 64, 64)
MEDIUM = Shape(100, 32, 256, 256)
LARGE = Shape(100, 32, 512, 512)
LARGER = (LARGE, Shape(100, 64, 512, 512), Shape(50, 64, 1024, 1024))
SHAPES = (SMALL, WIDE, LONG, Shape(100, 32, 128, 128), MEDIUM, *LARGER)
STEPS = tuple(Shape(1, 1, H, H) for H in (128, 256, 512))
VANISHING = Shape(1000, 16, 256, 256)
KINDS = {
    "bidirectional": (SMALL, MEDIUM),
    "two layers": (SMALL, MEDIUM),
    "projection": (SMALL, MEDIUM),
    "packed": (MEDIUM,),
}
BFLOAT16 = (WIDE, MEDIUM, *LARGER)
INT8 = (WIDE, Shape(100, 1, 1024, 1024))


def rows() -> list[Case]:
    """Every row of the full run."""
    cases = [Case(*row) for row in product(GATES, MODES, SHAPES)]
    cases += [Case(cell, "step", shape) for cell, shape in product(GATES, STEPS)]
    cases += [
        Case(cell, mode, shape, kind)
        for kind, shapes in KINDS.items()
        for cell, mode, shape in product(GATES if kind != "projection" else ["lstm"], MODES, shapes)
    ]
    cases += [Case(cell, "last", VANISHING) for cell in GATES]
    cases += [Case(*row, dtype="bfloat16") for row in product(GATES, MODES, BFLOAT16)]
    cases += [Case(cell, "forward", shape, dtype="int8") for cell, shape in product(GATES, INT8)]
    return cases


def quick_rows() -> list[Case]:
    """Three shapes, and one streaming step."""
    cases = [Case(*row) for row in product(GATES, MODES, (SMALL, LONG, MEDIUM))]
    return cases + [Case(cell, "step", STEPS[1]) for cell in GATES]


def weights(case: Case) -> int:
    """Elements of all weights; every step of a sequence multiplies each once."""
    H, D, P = case.shape.H, case.directions, case.proj_size
    out = P or H
    found = 0
    for layer in range(case.num_layers):
        inputs = D * out if layer else case.shape.I
        found += D * (GATES[case.cell] * H * (inputs + out) + P * H)
    return found


def flop(case: Case) -> int:
    """Operations of one call's matrix products, a multiply-add being two.

    Training has three of each: y's, and the gradients of its weights and of its inputs, x and h.
    """
    return 2 * sum(case.lengths) * weights(case) * (3 if case.mode in TRAINING else 1)

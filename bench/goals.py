"""The one home of the speed goals: what the report sets beside what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastrnn.bench import limits
from fastrnn.bench.grid import GATES
from fastrnn.bench.records import Probe, Record
from fastrnn.bench.rivals import FLOAT32, ONNX, TORCH

ANY = (1, math.inf)
ALL = tuple(GATES)
OTHERS = ("gru", "rnn")
# Figures beside the ratios to a rival, which go by its name.
MICROSECONDS, PEAK, MEMORY = "us a call", "of the FMA peak", "of torch.nn's memory"
SPEED = "the speed of torch's operations"
LEAST_ERROR = 0.02  # of a figure: a smaller one is not shown


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of every row that it is about, or on the geometric mean of those rows.

    figure     a rival's name: its time over ours; or one of the names above; or a section's name
    modes      of the rows, as in grid.Case
    B, H       the least and the most
    rival_us   only rows where the rival takes longer, in microseconds
    section    "" for the rows of the grid
    """

    about: str
    figure: str
    bound: float
    modes: tuple[str, ...]
    cells: tuple[str, ...] = ALL
    B: tuple[float, float] = ANY
    H: tuple[float, float] = ANY
    dtype: str = "float32"
    rival_us: float = 0
    mean: bool = False
    at_most: bool = False
    section: str = ""

    def concerns(self, row: Record | Probe) -> bool:
        case = row.case
        return (
            (row.section if isinstance(row, Probe) else "") == self.section
            and (case.mode in self.modes and case.cell in self.cells and case.dtype == self.dtype)
            and self.B[0] <= case.shape.B <= self.B[1]
            and self.H[0] <= case.shape.H <= self.H[1]
        )

    def of(self, row: Record | Probe, peaks: limits.Peaks | None) -> float | None:
        """The row's figure; None where it has none."""
        if isinstance(row, Probe):
            return row.figure
        if self.figure == MICROSECONDS:
            return row.ours * 1e6
        if self.figure == PEAK:
            return row.gflops / peaks.gflops[self.dtype] if peaks else None
        if row.rivals.get(self.figure, 0) * 1e6 <= self.rival_us:
            return None
        return row.ratio(self.figure)

    def error(self, row: Record | Probe) -> float:
        """The standard error of the row's figure, as a share of it; 0 where it is not known."""
        return row.error if isinstance(row, Probe) else row.error.get(self.figure, 0.0)

    @property
    def text(self) -> str:
        bound = f"{'at most' if self.at_most else 'at least'} {self.number(self.bound)} {self.figure}"
        return f"{' and '.join(self.modes)}, {self.about}: {bound}"

    def number(self, value: float) -> str:
        if self.figure in (PEAK, MEMORY):
            return f"{value:.0%}"
        return f"{value:.4g}" + "x" * (self.figure != MICROSECONDS)

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True)
class Found:
    """A goal's figure of one row, and what it would be were the row's time what limits.py counts.

    error    the figure's standard error, as a share of it; 0 where it is not known
    at_pace  the same were products as fast as torch.mm's in the row's rounds, where it has them
    """

    row: str
    measured: float
    unquiet: bool
    error: float = 0.0
    at_limit: float | None = None
    at_pace: float | None = None
    count: str = "no count: the machine's peaks were not measured, for want of a compiler"


@dataclass(frozen=True)
class Outcome:
    """A goal beside what was measured: the worst row, or the geometric mean as if it were one."""

    goal: Goal
    rows: int
    worst: Found | None
    unmet: tuple[Found, ...]

    @property
    def met(self) -> bool | None:
        """None: nothing that it is about was measured."""
        return not self.unmet if self.worst else None


def goal(about: str, figure: str, forward: float | None, training: float | None, **more: Any) -> list[Goal]:
    """The same goal forward and in training, as the two columns of a table."""
    bounds = {"forward": forward, "training": training}
    return [
        Goal(about, figure, bound, (mode,), **more) for mode, bound in bounds.items() if bound is not None
    ]


def under(limit: int) -> tuple[float, float]:
    return (1, limit - 1)


FEW, MANY = (1, 4), (32, 64)
STEP = {"modes": ("step",), "B": (1, 1)}
GOALS: tuple[Goal, ...] = (
    Goal("any cell, any shape", TORCH, 1.0, ("forward", "step")),
    Goal("any cell, any shape", TORCH, 1.0, ("training",)),
    *goal("LSTM, B=1..4, H<512", TORCH, 2.0, 2.0, cells=("lstm",), B=FEW, H=under(512)),
    *goal("LSTM, B=1..4, H=512", TORCH, 1.5, 1.5, cells=("lstm",), B=FEW, H=(512, 512)),
    *goal("LSTM, B=32..64, H=256..1024", TORCH, 1.05, None, cells=("lstm",), B=MANY, H=(256, 1024)),
    *goal("LSTM, B=32..64, H=256..512", TORCH, None, 1.25, cells=("lstm",), B=MANY, H=(256, 512)),
    *goal("LSTM, B=32..64, H=1024", TORCH, None, 1.1, cells=("lstm",), B=MANY, H=(1024, 1024)),
    *goal("GRU, RNN, B=1..4, H<512", TORCH, 4.0, 5.0, cells=OTHERS, B=FEW, H=under(512)),
    *goal("GRU, B=1..4, H=512", TORCH, 2.5, 3.0, cells=("gru",), B=FEW, H=(512, 512)),
    *goal("RNN, B=1..4, H=512", TORCH, 3.0, 3.0, cells=("rnn",), B=FEW, H=(512, 512)),
    *goal("GRU, RNN, B=32..64, H<1024", TORCH, 1.4, 1.4, cells=OTHERS, B=MANY, H=under(1024)),
    *goal("GRU, RNN, B=32..64, H=1024", TORCH, 1.15, 1.15, cells=OTHERS, B=MANY, H=(1024, 1024)),
    Goal("loss on the last step only", TORCH, 3.0, ("last",)),
    *goal("B>1", ONNX, 1.2, None, B=(2, math.inf)),
    *goal("B=1, H<512", ONNX, 1.2, None, B=(1, 1), H=under(512)),
    *goal("B=1, H=512", ONNX, 1.1, None, B=(1, 1), H=(512, 512)),
    Goal("one streaming step, H=256", MICROSECONDS, 20.0, H=(256, 256), at_most=True, **STEP),
    Goal("one streaming step", ONNX, 1.0, **STEP),
    Goal("one streaming step where onnxruntime takes over 15 us", ONNX, 1.2, rival_us=15.0, **STEP),
    *goal("bfloat16", TORCH, 1.5, 1.5, dtype="bfloat16"),
    *goal("int8 weights, B=1, H=512..1024", FLOAT32, 2.0, None, dtype="int8", B=(1, 1), H=(512, 1024)),
    *goal("bfloat16, B>=32", FLOAT32, 4.0, 2.5, dtype="bfloat16", B=(32, math.inf)),
    Goal("geometric mean over the grid", TORCH, 2.0, ("forward", "step"), mean=True),
    Goal("geometric mean over the grid", TORCH, 2.0, ("training",), mean=True),
    *goal("B>=32, H>=512", PEAK, 0.67, 0.62, B=(32, math.inf), H=(512, math.inf)),
    *goal("peak memory", MEMORY, 0.6, 0.55, section="memory", at_most=True),
    *goal("one busy neighbour a core", "quiet times", 3.0, 3.0, section="crowded", at_most=True),
    *goal("two threads", "one thread's speed", 1.7, 1.7, section="scaling"),
    *goal("decoder with attention, teacher forcing", SPEED, 1.0, 3.0, section="decoder"),
    *goal("attention without weights", SPEED, 1.0, 1.0, section="attention", cells=("dot",)),
    *goal("recursive cells", "a Python recursion's speed", 20.0, 15.0, section="trees"),
)


def limit(row: Record | Probe, peaks: limits.Peaks | None) -> limits.Limit | None:
    if isinstance(row, Probe):
        return limits.of_probe(row.section, row.case, peaks)
    return limits.of(row.case, peaks) if peaks else None


def limit_of_float32(row: Record | Probe, peaks: limits.Peaks | None) -> float | None:
    """The seconds that a count gives the row's own call in float32."""
    best = limit(replace(row, case=replace(row.case, dtype="float32")), peaks)
    return best and best.ours


def find(goal: Goal, row: Record | Probe, peaks: limits.Peaks | None) -> Found | None:
    measured = goal.of(row, peaks)
    if measured is None:
        return None
    found = Found(row.case.id, measured, row.conditions.unquiet, goal.error(row))
    if best := limit(row, peaks):
        at_limit = goal.of(replace(row, ours=best.ours), peaks)
        if goal.figure == FLOAT32 and (rival := limit_of_float32(row, peaks)):
            at_limit = rival / best.ours  # else what float32 itself falls short of would be to gain here
        found = replace(found, at_limit=at_limit, count=best.explain(row.ours))
        if peaks and isinstance(row, Record) and row.product is not None:
            gflops = {**peaks.gflops, row.case.dtype: row.product}
            paced = limits.of(row.case, replace(peaks, gflops=gflops)).ours
            count = f"{found.count}; at the {row.product:.0f} GFLOP/s of torch.mm in the same rounds "
            count += f"the count is {limits.si(paced)}s"
            return replace(found, at_pace=goal.of(replace(row, ours=paced), peaks), count=count)
    return found


def mean(found: Sequence[Found]) -> Found:
    def best(each: Sequence[float | None]) -> float | None:
        known = [figure for figure in each if figure is not None]
        return statistics.geometric_mean(known) if len(known) == len(each) else None

    paced = [f.at_limit if f.at_pace is None else f.at_pace for f in found]
    return Found(
        f"geometric mean of {len(found)} rows",
        statistics.geometric_mean([f.measured for f in found]),
        any(f.unquiet for f in found),
        math.hypot(*(f.error for f in found)) / len(found),
        best([f.at_limit for f in found]),
        best(paced) if any(f.at_pace is not None for f in found) else None,
        "every row as fast as its own count allows",
    )


def outcome(goal: Goal, rows: Sequence[Record | Probe], peaks: limits.Peaks | None) -> Outcome:
    found = [f for row in rows if goal.concerns(row) and (f := find(goal, row, peaks))]
    if not found:
        return Outcome(goal, 0, None, ())
    judged = [mean(found)] if goal.mean else sorted(found, key=lambda f: f.measured, reverse=goal.at_most)
    return Outcome(goal, len(found), judged[0], tuple(f for f in judged if not goal.holds(f.measured)))


def evaluate(records: Sequence[Record], probes: Sequence[Probe], peaks: limits.Peaks | None) -> list[Outcome]:
    """Every goal beside what was measured."""
    return [outcome(goal, [*records, *probes], peaks) for goal in GOALS]


def lines(o: Outcome) -> list[str]:
    """A goal and its worst row; where it is not met, each row that misses it with its count."""
    if o.worst is None:
        return [f"  not measured  {o.goal.text}"]
    number = o.goal.number

    def measured(f: Found) -> str:
        return number(f.measured) + f" ± {f.error:.0%}" * (f.error >= LEAST_ERROR)

    head = f"  {'met' if o.met else 'NOT MET':14}{o.goal.text}, measured {measured(o.worst)}"
    head += f" ({o.rows} rows)" if o.goal.mean else f" ({o.rows} rows; worst {o.worst.row})"
    found = [head + " *" * o.worst.unquiet]
    for f in o.unmet:
        best = ""
        if f.at_limit is not None:
            if o.goal.holds(f.at_limit):
                reach = "which does not explain the miss"
            else:
                reach = "the goal is beyond this machine"
            pace = "" if f.at_pace is None else f" ({number(f.at_pace)} at torch.mm's pace)"
            best = f"{number(f.at_limit)} by the count at best, {reach}{pace}: "
        found.append(f"    {f.row}: {measured(f)}{' *' * f.unquiet}; {best}{f.count}")
    return found


def report(outcomes: Sequence[Outcome]) -> str:
    """Each goal beside what was measured."""

    def beyond(best: Callable[[Found], float | None]) -> int:
        missed = [(o.goal, list(map(best, o.unmet))) for o in outcomes if o.met is False]
        return sum(all(f is not None and not goal.holds(f) for f in found) for goal, found in missed)

    by_count = beyond(lambda f: f.at_limit)
    by_pace = beyond(lambda f: f.at_limit if f.at_pace is None else f.at_pace)
    count = {met: sum(o.met is met for o in outcomes) for met in (True, False, None)}
    unmet = f"{count[False]} not met (each row beyond this machine by its count: {by_count}; with products "
    unmet += f"at torch.mm's pace: {by_pace})"
    head = f"goals: {count[True]} met, {unmet}, {count[None]} not measured"
    return "\n".join([head, *(line for o in outcomes for line in lines(o))])


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [{**asdict(o), "goal": o.goal.text, "met": o.met} for o in outcomes]

"""What one row of a run was, and the JSON file of a run."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastrnn.bench.grid import Case, Shape, flop
from fastrnn.bench.machine import UNKNOWN, Conditions
from fastrnn.bench.rivals import OURS, TORCH
from fastrnn.lm.errors import UserError, os_reason


@dataclass
class Record:
    """A measured case: medians in seconds a call over alternating rounds.

    spread  a rival's: the interquartile range of its rounds' ratios (its time / ours) over their median
    """

    case: Case
    rounds: int
    ours: float
    rivals: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)
    conditions: Conditions = UNKNOWN

    @classmethod
    def of(cls, case: Case, samples: dict[str, list[float]], conditions: Conditions) -> Record:
        """Of the seconds of every round; one sample is case.calls calls."""
        ours = samples[OURS]
        rivals = {name: values for name, values in samples.items() if name != OURS}
        ratios = {
            name: [theirs / mine for theirs, mine in zip(values, ours, strict=True)]
            for name, values in rivals.items()
        }
        return cls(
            case,
            len(ours),
            statistics.median(ours) / case.calls,
            {name: statistics.median(values) / case.calls for name, values in rivals.items()},
            {name: relative_spread(values) for name, values in ratios.items()},
            conditions,
        )

    @property
    def gflops(self) -> float:
        return flop(self.case) / self.ours / 1e9

    def ratio(self, rival: str) -> float:
        """The rival's time over ours: above 1 we are faster."""
        return self.rivals[rival] / self.ours


@dataclass
class Probe:
    """What a section beside the rows measured: one figure of ours, and torch.nn's.

    memory   bytes at the peak of one call, over those before it
    crowded  how many times as long a call takes with one busy neighbour process per core
    scaling  how many times as fast a call is on two threads as on one
    trees    how many times as fast recursive cells are as a Python recursion (theirs: 1)
    """

    section: str
    case: Case
    ours: float
    theirs: float
    conditions: Conditions = UNKNOWN


@dataclass
class Run:
    """Of the rows: what to spend on each, and what was found.

    seconds  all rounds of a row take so long, where `least` rounds do not take longer
    """

    seconds: float
    least: int
    records: list[Record] = field(default_factory=list)


def relative_spread(values: list[float]) -> float:
    """Interquartile range over median; of fewer than four values the whole range."""
    if len(values) < 4:
        width = max(values) - min(values)
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        width = high - low
    return width / statistics.median(values)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def rival_names(records: list[Record]) -> list[str]:
    return sorted({name for r in records for name in r.rivals}, key=lambda name: name != TORCH)


def means(records: list[Record]) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios: {"lstm forward": {"torch.nn": 1.7}}."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        dtype = "" if r.case.dtype == "float32" else f" {r.case.dtype}"
        groups.setdefault(f"{r.case.cell} {r.case.mode}{dtype}", []).append(r)
    return {
        group: {
            name: geometric_mean([r.ratio(name) for r in members if name in r.rivals])
            for name in rival_names(members)
        }
        for group, members in groups.items()
    }


def as_row(case: Case) -> dict[str, Any]:
    row = asdict(case)
    return {**row, **row.pop("shape")}


def as_case(row: dict[str, Any]) -> Case:
    return Case(row["cell"], row["mode"], Shape(*(row[n] for n in "TBIH")), row["kind"], row["dtype"])


def write_json(
    path: Path,
    records: list[Record],
    about: dict[str, Any],
    probes: list[Probe],
    goals: list[dict[str, Any]],
) -> None:
    rows = [
        {
            **as_row(r.case),
            **{"rounds": r.rounds, "gflops": r.gflops, **asdict(r.conditions)},
            **{"seconds": {OURS: r.ours, **r.rivals}, "spread": r.spread},
        }
        for r in records
    ]
    sections = [
        {"section": p.section, **as_row(p.case), "ours": p.ours, TORCH: p.theirs, **asdict(p.conditions)}
        for p in probes
    ]
    content = {
        "machine": about,
        "goals": goals,
        "geometric_means": means(records),
        "results": rows,
        "sections": sections,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def read_json(path: Path) -> tuple[list[Record], dict[str, Any]]:
    """The rows of a run and its machine. Raises UserError where this version wrote no such file."""
    try:
        content = json.loads(path.read_text())
        records = []
        for row in content["results"]:
            rivals = dict(row["seconds"])
            ours = rivals.pop(OURS)
            conditions = Conditions(row["load"], row["steal"], row["others"])
            records.append(Record(as_case(row), row["rounds"], ours, rivals, row["spread"], conditions))
        return records, dict(content["machine"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {os_reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file that this version's bench --json wrote") from error

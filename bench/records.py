"""What one row of a run was, and the JSON file of a run."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastrnn.bench.grid import Case, Shape, flop
from fastrnn.bench.machine import UNKNOWN, Conditions
from fastrnn.bench.rivals import OURS, PRODUCT, SIDE, TORCH, product_gflops
from fastrnn.lm.errors import UserError, os_reason

UNKNOWN_ERROR = 0.05  # of one sample


@dataclass
class Record:
    """A measured case: medians in seconds a call over alternating rounds.

    spread  a rival's: the interquartile range of its rounds' ratios (its time / ours) over their median
    error   a rival's: the standard error of the ratio of the medians, as a share of it
    product  GFLOP/s of a torch.mm in the same rounds, the median; None where `rivals.pace` has none
    wrong   rivals that were not timed, as their answer was wrong

    A rival that was called once (`rivals.far_behind`) has neither spread nor error.
    """

    case: Case
    rounds: int
    ours: float
    rivals: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    conditions: Conditions = UNKNOWN
    product: float | None = None
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, case: Case, samples: dict[str, list[float]], conditions: Conditions) -> Record:
        """Of the seconds of every round; one sample is case.calls calls."""
        ours = samples[OURS]
        rivals = {name: values for name, values in samples.items() if name not in (OURS, PRODUCT)}
        products = samples.get(PRODUCT)
        ratios = {
            name: [theirs / mine for theirs, mine in zip(values, ours, strict=True)]
            for name, values in rivals.items()
            if len(values) > 1
        }
        return cls(
            case,
            len(ours),
            statistics.median(ours) / case.calls,
            {name: statistics.median(values) / case.calls for name, values in rivals.items()},
            {name: relative_spread(values) for name, values in ratios.items()},
            {name: standard_error(rivals[name], ours) for name in ratios},
            conditions,
            product_gflops(SIDE, statistics.median(products)) if products else None,
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
    others   seconds of a call

    error    the standard error of `merit`, as a share of it
    """

    section: str
    case: Case
    ours: float
    theirs: float
    conditions: Conditions = UNKNOWN
    error: float = 0.0

    @property
    def figure(self) -> float:
        """What goals are about: ours of torch.nn's bytes, torch.nn's seconds over ours; else ours alone."""
        if self.section == "memory":
            return self.ours / self.theirs
        return self.theirs / self.ours if self.section in ("decoder", "attention") else self.ours

    @property
    def merit(self) -> float:
        """What is more where we are better."""
        return 1 / self.figure if self.section in ("memory", "crowded") else self.figure


@dataclass
class Run:
    """Of the rows: what to spend on each, and what was found.

    seconds  all rounds of a row take so long, where `least` rounds do not take longer
    error    of a row's ratio to torch.nn: where it is more, there are up to three times as many rounds
    """

    seconds: float
    least: int
    error: float = math.inf
    records: list[Record] = field(default_factory=list)


def relative_spread(values: list[float]) -> float:
    """Interquartile range over median; of fewer than four values the whole range."""
    if len(values) < 4:
        width = max(values) - min(values)
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        width = high - low
    return width / statistics.median(values)


def standard_error(theirs: list[float], ours: list[float], resamples: int = 200) -> float:
    """Of the ratio of their medians, as a share of it: by the bootstrap, of rounds with both their sides.

    Rounds are drawn in runs of neighbours, which share what the machine was busy with (Künsch 1989).
    """
    n, rng = len(ours), random.Random(0)
    run = math.isqrt(n)

    def ratio_of_a_draw() -> float:
        starts = (rng.randrange(n) for _ in range(-(-n // run)))
        drawn = [(start + k) % n for start in starts for k in range(run)][:n]
        a, b = (statistics.median(values[i] for i in drawn) for values in (theirs, ours))
        return math.log(a / b)

    return statistics.stdev(ratio_of_a_draw() for _ in range(resamples))


def median_error(samples: list[float]) -> float:
    """The standard error of one median, as a share of it."""
    return standard_error(samples, [1.0] * len(samples))


def rival_names(records: list[Record]) -> list[str]:
    return sorted({name for r in records for name in (*r.rivals, *r.wrong)}, key=lambda name: name != TORCH)


def means(records: list[Record]) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios: {"lstm forward": {"torch.nn": 1.7}}."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        dtype = "" if r.case.dtype == "float32" else f" {r.case.dtype}"
        groups.setdefault(f"{r.case.cell} {r.case.mode}{dtype}", []).append(r)
    return {
        group: {
            name: statistics.geometric_mean([r.ratio(name) for r in members if name in r.rivals])
            for name in rival_names(members)
            if any(name in r.rivals for r in members)
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
            **{"rounds": r.rounds, "gflops": r.gflops, "product": r.product, **asdict(r.conditions)},
            **{"seconds": {OURS: r.ours, **r.rivals}, "spread": r.spread, "error": r.error, "wrong": r.wrong},
        }
        for r in records
    ]
    sections = [
        {
            **{"section": p.section, **as_row(p.case), "ours": p.ours, TORCH: p.theirs, "error": p.error},
            **asdict(p.conditions),
        }
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


def read_conditions(row: dict[str, Any]) -> Conditions:
    return Conditions(row["load"], row["steal"], row["others"])


def read_json(path: Path) -> tuple[list[Record | Probe], dict[str, Any]]:
    """The rows and sections of a run, and its machine. Raises UserError where no bench wrote such a file."""
    try:
        content = json.loads(path.read_text())
        found: list[Record | Probe] = []
        for row in content["results"]:
            rivals = dict(row["seconds"])
            ours = rivals.pop(OURS)
            rounds, spread = row["rounds"], row["spread"]
            beside = read_conditions(row), row.get("product"), row.get("wrong", [])
            found.append(Record(as_case(row), rounds, ours, rivals, spread, row["error"], *beside))
        for row in content["sections"]:
            figures, share = (row["ours"], row[TORCH]), row["error"]
            found.append(Probe(row["section"], as_case(row), *figures, read_conditions(row), share))
        return found, dict(content["machine"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {os_reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file that this version's bench --json wrote") from error

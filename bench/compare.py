"""`--compare EARLIER.json`: which rows and sections became better or worse by more than the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastrnn.bench.grid import Case
from fastrnn.bench.records import UNKNOWN_ERROR, Probe, Record
from fastrnn.bench.rivals import TORCH

LEAST_NOISE = 0.03


Row = Record | Probe


def figure(row: Row) -> float:
    return row.merit if isinstance(row, Probe) else row.ratio(TORCH)


def error(row: Row) -> float:
    return row.error if isinstance(row, Probe) else row.error.get(TORCH, UNKNOWN_ERROR)


def key(row: Row) -> tuple[str, Case]:
    return row.section if isinstance(row, Probe) else "", row.case


def noise(*rows: Row) -> float:
    """How far two runs' figures may lie apart by chance, as a share: the rule.

    Three standard errors of the difference of the two, and at least `LEAST_NOISE`: two processes differ by
    some percent that the rounds of one do not show, as their memory lies elsewhere.
    """
    return max(LEAST_NOISE, 3 * math.hypot(*map(error, rows)))


def change(earlier: Row, now: Row) -> float:
    """By what share we became faster (above 0) or slower (below), as torch.nn in the same run sees it.

    Of ratios, not of times: the machine may be another one, and even the same one is faster on some days.
    """
    return figure(now) / figure(earlier) - 1


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("cpu", "cpus", "threads", "torch"))


def compare(
    earlier: Sequence[Row], machine_then: dict[str, Any], now: Sequence[Row], machine_now: dict[str, Any]
) -> str:
    """What changed by more than the noise, worst first, and how much did not; a section's by its `merit`."""
    earlier, now = ([r for r in rows if isinstance(r, Probe) or TORCH in r.rivals] for rows in (earlier, now))
    known = {key(r): r for r in earlier}
    pairs = [(known[key(r)], r) for r in now if key(r) in known]
    same = same_machine(machine_then, machine_now)
    lines = []
    for then, r in sorted(pairs, key=lambda pair: change(*pair)):
        by, beyond = change(then, r), noise(then, r)
        # Faster by 25 % and slower by 20 % are the same step: the noise is one of logarithms.
        if abs(math.log1p(by)) <= math.log1p(beyond):
            continue
        name = f"{r.section} {r.case.id}" if isinstance(r, Probe) else r.case.id
        line = f"  {'slower' if by < 0 else 'faster'} {by:+7.1%} (noise {beyond:.1%})  {name}: "
        line += f"{figure(then):.2f} -> {figure(r):.2f}"
        if same and isinstance(r, Record):
            line += f", ours {then.ours * 1e3:.4f} -> {r.ours * 1e3:.4f} ms"
        line += " *" * (then.conditions.unquiet or r.conditions.unquiet)
        lines.append(line)
    slower = sum(line.startswith("  slower") for line in lines)
    summary = f"{slower} slower, {len(lines) - slower} faster, {len(pairs) - len(lines)} within the noise"
    gone, new = len(known) - len(pairs), len(now) - len(pairs)
    if gone or new:
        summary += f"; {gone} rows only then, {new} only now"
    if not same:
        then, here = (
            f"{m.get('cpu')}, {m.get('threads')} threads, torch {m.get('torch')}"
            for m in (machine_then, machine_now)
        )
        summary += f"\n  not the same machine: {then}; now {here}"
    return "\n".join(
        [f"compared, rows by {TORCH}'s time over ours, sections by their own figure: {summary}", *lines]
    )

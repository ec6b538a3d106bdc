"""What a row must take on this machine: its operations, bytes and waits over the peaks of peaks.cpp."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastrnn.bench.grid import GATES, TRAINING, Case, flop, weights

WEIGHT = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes
# What training keeps besides y, in units of [T, B, H]: the gates, and an LSTM's c; a GRU's recurrent part
# of n is a fourth gate, an RNN's y is its gate. All of it float32, whatever the input is.
SAVED = {"lstm": 5, "gru": 4, "rnn": 0}
# Sigmoids and hyperbolic tangents of a unit's step, forward; the way back takes an LSTM's tanh(c) once more.
ACTIVATIONS = {"lstm": 5, "gru": 3, "rnn": 1}
ACTIVATIONS_BACK = {"lstm": 1, "gru": 0, "rnn": 0}
FEW = 4  # sequences up to which R may be read where torch keeps it: the least that a call must pack is W
TILES = 4  # times float32's rate: twice is what an instruction for pairs of bfloat16 reaches
SMALL = 0.02  # of a count; a part that is less goes without a name


@dataclass(frozen=True)
class Peaks:
    """Of `threads` cores together.

    gflops       of multiply-adds in registers; bfloat16's where the processor multiplies it
    read         (bytes, GB/s), the fewest bytes first: each core sweeps so many of its own, up and down
    dot          the same of a matrix whose rows meet a vector
    activations  sigmoids and hyperbolic tangents in 10^9 a second; bfloat16's need fewer digits
    copy         GB/s that are read and written again
    meet, wake   seconds of a barrier of all threads, after which each reads 512 bytes that every other one
                 wrote before it, and of a parallel region with nothing to do
    call         seconds of a call of the least module there is, by mode: `machine.least_calls`
    ours         the same of our layers of one unit, by cell and mode: `machine.least_layers`; no limit
    """

    threads: int
    gflops: dict[str, float]
    read: list[tuple[int, float]]
    dot: list[tuple[int, float]]
    activations: dict[str, float]
    copy: float
    meet: float
    wake: float
    call: dict[str, float] = field(default_factory=dict)
    ours: dict[str, float] = field(default_factory=dict)


def bandwidth(sweeps: list[tuple[int, float]], swept: float) -> float:
    """GB/s when each core sweeps so many bytes; that of somewhat fewer, as this is for a limit."""
    return next((gbps for size, gbps in reversed(sweeps) if size <= swept), sweeps[0][1])


def measure(
    threads: int, call: dict[str, float] | None = None, ours: dict[str, float] | None = None
) -> Peaks | None:
    """Compiles peaks.cpp and runs it for seconds; None where there is no compiler (CXX, or g++)."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(__file__).with_name("peaks.cpp"), Path(folder, "peaks")
        options = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-pthread"]
        command = [os.environ.get("CXX") or "g++", *options, str(source), "-o", str(program)]
        try:
            # A clang may have no OpenMP: then waking a team counts nothing.
            if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode:
                subprocess.run(command, check=True, capture_output=True)
            found = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError):
            return None
    values = json.loads(found.stdout)
    # What computes float32 does for bfloat16 too, and where the machine is busy may have been the faster.
    for rates in (values["gflops"], values["activations"]):
        rates["bfloat16"] = max(rates.get("bfloat16", 0.0), rates["float32"])
    for name in ("read", "dot"):
        values[name] = [(size, gbps) for size, gbps in values[name]]
    return Peaks(threads, **values, call=call or {}, ours=ours or {})


@dataclass(frozen=True)
class Limit:
    """The best that a row's figure of ours could be, and the count that says so.

    unit  s, B (bytes), or "" where the count is of no parts that a rest would be beside
    call  seconds that our call of the least layer takes more than the least module's: known, but no limit
    """

    ours: float
    count: str
    unit: str = ""
    call: float = 0

    def explain(self, measured: float) -> str:
        """What was measured, what of it is counted, and the rest."""
        if not self.unit:
            return self.count
        rest = measured - self.ours - self.call
        call = f"; our call's own part {si(self.call)}s" * (self.call > SMALL * self.ours)
        if rest < 0:
            call += "; LESS than was counted: a peak or the row was disturbed"
        whole, counted, left = (
            mib(value) if self.unit == "B" else f"{si(value)}s" for value in (measured, self.ours, rest)
        )
        return (
            f"measured {whole}, counted {counted}: {self.count}{call}; the rest {left}, {rest / measured:.0%}"
        )


def si(value: float) -> str:
    """Three digits and a prefix: 0.00125 is "1.25 m"."""
    thousands = math.floor(math.log10(abs(value)) / 3) if value else 0
    return f"{value / 1000**thousands:.3g} {'pnum kMGT'[thousands + 4].strip()}"


def mib(size: float) -> str:
    return f"{size / 2**20:.3g} MiB"


class Way(NamedTuple):
    """How threads share a call out: into streams that need nothing of each other's step (directions, or
    layers, each some steps behind the one below), parts of the rows, and parts of the units, which meet in
    each step."""

    streams: int
    rows: int
    units: int

    @property
    def threads(self) -> int:
        return self.streams * self.rows * self.units


def ways(case: Case, threads: int) -> Iterator[Way]:
    """One thread, and every way that all of them have work in."""
    yield Way(1, 1, 1)
    for streams in {1, case.directions * case.num_layers}:
        each = threads // streams
        for rows in range(1, min(each, case.shape.B) + 1):
            if streams * each == threads > 1 and each % rows == 0:
                yield Way(streams, rows, each // rows)


def swept(case: Case) -> int:
    """The elements of one layer's and direction's weights that every step reads: the recurrent ones, and in a
    single step the input's too, which over many steps are read once."""
    shape, P = case.shape, case.proj_size
    return GATES[case.cell] * shape.H * ((P or shape.H) + (shape.I if shape.T == 1 else 0)) + P * shape.H


def row_bytes(case: Case) -> int:
    """What comes or goes once for every step of every sequence: x and y; in training what is saved and dgates
    twice, x and y once more, for the gradients of weights, and dx."""
    H, D, G = case.shape.H, case.directions, GATES[case.cell]
    y = D * (case.proj_size or H)
    width, step = 2 if case.dtype == "bfloat16" else 4, 0
    for layer in range(case.num_layers):
        x = y if layer else case.shape.I
        step += width * (x + y)
        if case.mode in TRAINING:
            step += 2 * D * H * (4 * SAVED[case.cell] + width * G) + width * (x + y + x)
    return step * sum(case.lengths)


class Part(NamedTuple):
    name: str
    seconds: float
    count: str = ""

    @property
    def text(self) -> str:
        return f"{self.name} {si(self.seconds)}s" + f" ({self.count})" * bool(self.count)


def products(case: Case, peaks: Peaks, way: Way) -> Part:
    """The scan, whose operations and bytes of weights come at once, so that the longer counts; then the rest
    of the operations; or the bytes of the rows, which come beside it all, where they take longer."""
    scans, passes = case.num_layers * case.directions, 2 if case.mode in TRAINING else 1
    share, gflops = way.threads / peaks.threads, peaks.gflops.get(case.dtype)
    sweeps = case.shape.T * scans * passes // way.streams
    piece = WEIGHT[case.dtype] * swept(case) / way.units
    gbps = bandwidth(peaks.dot, piece) / peaks.threads
    scan, after = sweeps * piece / gbps / 1e9, 0.0
    count = f"{sweeps} x {mib(piece)} of weights at {gbps:.0f} GB/s a core"
    if gflops is not None:  # int8: sums of products of 16 bits, whose peak is not measured
        in_scan = 2 * sum(case.lengths) * scans * swept(case) * passes
        computing, after = (n / gflops / share / 1e9 for n in (in_scan, flop(case) - in_scan))
        if computing > scan:
            count = f"{si(in_scan)}FLOP at {gflops * share:.0f} GFLOP/s"
            scan = computing
        count += f" in the scan, {si(flop(case) - in_scan)}FLOP beside it" * (after > 0)
    rows = row_bytes(case)
    row_gbps = bandwidth(peaks.read, rows / way.threads) * share
    if rows / row_gbps / 1e9 > scan + after:
        return Part("rows", rows / row_gbps / 1e9, f"{mib(rows)} at {row_gbps:.0f} GB/s")
    return Part("products", scan + after, count)


def parts(case: Case, peaks: Peaks, way: Way) -> list[Part]:
    """What one call must spend, one after the other.

    Gates do not come at once with products: they take the units that multiply, and a step ends with some. But
    tiles of bfloat16 (AMX), told by their rate, are units of their own: the longer of both counts.
    Left out: sums and products beside the gates' functions, and that packing is more than a copy.
    """
    T, back = case.shape.T, case.mode in TRAINING
    scans, passes, share = case.num_layers * case.directions, 2 if back else 1, way.threads / peaks.threads
    found = [products(case, peaks, way)]

    each = ACTIVATIONS[case.cell] + back * ACTIVATIONS_BACK[case.cell]
    activations = sum(case.lengths) * scans * case.shape.H * each
    rate = share * peaks.activations["bfloat16" if case.dtype == "bfloat16" else "float32"]
    count = f"{si(activations).strip()} functions at {rate:.2g} G/s"
    gates = Part("gates", activations / rate / 1e9, count)
    if case.dtype != "bfloat16" or peaks.gflops["bfloat16"] < TILES * peaks.gflops["float32"]:
        found.append(gates)
    elif gates.seconds > found[0].seconds:
        found[0] = gates
    if way.units > 1:
        meetings = T * scans * passes // way.streams * (2 if case.proj_size else 1)
        meet = peaks.meet * math.log2(way.units) / math.log2(peaks.threads)
        found.append(Part("meetings", meetings * meet, f"{meetings} of {si(meet)}s"))
    if way.threads > 1:
        found.append(Part("waking threads", passes * peaks.wake))
    if T > 1 and case.dtype != "int8":
        kept = swept(case) * scans if case.shape.B <= FEW else 0
        packed, gbps = WEIGHT[case.dtype] * passes * (weights(case) - kept), peaks.copy * share
        found.append(Part("packing", packed / gbps / 1e9, f"{mib(packed)} at {gbps:.0f} GB/s"))
    called = peaks.call.get("training" if back else case.mode)
    if called is not None:
        found.append(Part("a module's call", called))
    return found


def of(case: Case, peaks: Peaks) -> Limit:
    """The seconds of one call, by the way to share it out that has the fewest."""
    counted = {way: parts(case, peaks, way) for way in ways(case, peaks.threads)}
    seconds = {way: sum(part.seconds for part in found) for way, found in counted.items()}
    way = min(seconds, key=lambda way: seconds[way])
    told = [part for part in counted[way] if part.seconds > SMALL * seconds[way]]
    left = [part.seconds for part in counted[way] if part not in told]
    told += [Part("the other parts", sum(left))] * bool(left)
    count = f"{way.threads} thread{'s' * (way.threads > 1)}, " + " + ".join(part.text for part in told)
    mode = "training" if case.mode in TRAINING else case.mode
    call = peaks.ours.get(f"{case.cell} {mode}", 0.0) - peaks.call.get(mode, 0.0)
    return Limit(seconds[way], count, "s", max(call, 0.0))


def of_memory(case: Case) -> Limit:
    """The bytes of a call, over those before it: y; in training what is saved, and the gradients."""
    T, B, I, H = case.shape.T, case.shape.B, case.shape.I, case.shape.H
    parts = {"y": T * B * H}
    if case.mode in TRAINING:
        parts["saved"] = SAVED[case.cell] * T * B * H
        parts["dx"] = T * B * I
        parts["gradients of weights"] = GATES[case.cell] * H * (I + H + 2)
    count = " + ".join(f"{name} {mib(4 * elements)}" for name, elements in parts.items() if elements)
    return Limit(4 * sum(parts.values()), count, "B")


def of_attention(section: str, case: Case, peaks: Peaks) -> Limit:
    """The operations of a decoder's products, three of each in training, or of attention's two, in training
    seven in all. Memory is as long as the queries, and as wide as I."""
    T, B, I, H = case.shape.T, case.shape.B, case.shape.I, case.shape.H
    attention = 2 * T * B * T * 2 * H
    if section == "decoder":
        layer = 2 * T * B * (GATES[case.cell] * H * (I + 2 * H) + H * (I + H))
        operations = (layer + attention) * (3 if case.mode in TRAINING else 1)
    else:
        operations = attention * 7 // 2 if case.mode in TRAINING else attention
    gflops = peaks.gflops[case.dtype]
    return Limit(operations / gflops / 1e9, f"{si(operations)}FLOP at {gflops:.0f} GFLOP/s", "s")


def of_probe(section: str, case: Case, peaks: Peaks | None) -> Limit | None:
    if section == "crowded":
        return Limit(2, "with a busy neighbour on each core half of the CPU time is left")
    if section == "scaling":
        return Limit(2, "two cores do twice one's operations and read twice its bytes")
    if section in ("decoder", "attention"):
        return of_attention(section, case, peaks) if peaks else None
    return of_memory(case) if section == "memory" else None

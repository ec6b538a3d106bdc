"""The least that a row can take on this machine: its operations and bytes over the peaks of peaks.cpp."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastrnn.bench.grid import GATES, TRAINING, Case, flop

WEIGHT = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes
# What training keeps besides y, in units of [T, B, H]: the gates, and an LSTM's c; a GRU's recurrent part
# of n is a fourth gate, an RNN's y is its gate.
SAVED = {"lstm": 5, "gru": 4, "rnn": 0}


@dataclass(frozen=True)
class Peaks:
    """Of `threads` cores together.

    gflops  of multiply-adds in registers; bfloat16's where the processor multiplies it
    read    (bytes, GB/s), the fewest bytes first: each core sweeps so many of its own, up and down in turns
    """

    threads: int
    gflops: dict[str, float]
    read: list[tuple[int, float]]

    def bandwidth(self, swept: float) -> float:
        """GB/s when each core sweeps so many bytes; that of somewhat fewer, as this is for a limit."""
        return next((gbps for size, gbps in reversed(self.read) if size <= swept), self.read[0][1])


def measure(threads: int) -> Peaks | None:
    """Compiles peaks.cpp and runs it for a second; None where there is no compiler (CXX, or g++)."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(__file__).with_name("peaks.cpp"), Path(folder, "peaks")
        options = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-pthread"]
        command = [os.environ.get("CXX") or "g++", *options, str(source), "-o", str(program)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            found = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError):
            return None
    values = json.loads(found.stdout)
    gflops = values["gflops"]
    gflops.setdefault("bfloat16", gflops["float32"])  # multiplied as float32
    return Peaks(threads, gflops, [(size, gbps) for size, gbps in values["read"]])


@dataclass(frozen=True)
class Limit:
    """The best that a row's figure of ours could be, and the count that says so."""

    ours: float
    count: str


def si(value: float) -> str:
    """Three digits and a prefix: 0.00125 is "1.25 m"."""
    thousands = math.floor(math.log10(value) / 3)
    return f"{value / 1000**thousands:.3g} {'pnum kMGT'[thousands + 4].strip()}"


def mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def swept_bytes(case: Case) -> int:
    """The weights of one layer and direction that every step reads: the recurrent ones, and in a single step
    the input's too, which over many steps are read once."""
    shape, P = case.shape, case.proj_size
    out = P or shape.H
    return WEIGHT[case.dtype] * (
        GATES[case.cell] * shape.H * (out + (shape.I if shape.T == 1 else 0)) + P * shape.H
    )


def row_bytes(case: Case) -> int:
    """What comes or goes once for every step of every sequence: x and y; in training saved and dgates twice,
    x and y once more, for the gradients of weights, and dx."""
    H, D, G = case.shape.H, case.directions, GATES[case.cell]
    y = D * (case.proj_size or H)
    elements = 0
    for layer in range(case.num_layers):
        x = y if layer else case.shape.I
        elements += x + y
        if case.mode in TRAINING:
            elements += 2 * D * H * (SAVED[case.cell] + G) + x + y + x
    return elements * sum(case.lengths) * (2 if case.dtype == "bfloat16" else 4)


def of(case: Case, peaks: Peaks) -> Limit:
    """The seconds of one call: those of its operations, or those of its bytes where they take longer.

    Every step reads the weights, training once more on the way back. A core's share stays in the nearest
    cache that holds it. Left out: the gates' own arithmetic, and the threads' waiting for each other.
    """
    weights, rows = swept_bytes(case), row_bytes(case)
    sweeps = case.shape.T * case.num_layers * case.directions * (2 if case.mode in TRAINING else 1)
    near, far = (peaks.bandwidth(size / peaks.threads) for size in (weights, rows))
    seconds = (weights * sweeps / near + rows / far) / 1e9
    count = (
        f"{sweeps} x {mib(weights)} of weights at {near:.0f} GB/s + {mib(rows)} at {far:.0f}, {si(seconds)}s"
    )
    gflops = peaks.gflops.get(case.dtype)
    if gflops is None:  # int8: sums of products of 16 bits, whose peak is not measured
        return Limit(seconds, count)
    computing = flop(case) / gflops / 1e9
    count = f"{si(flop(case))}FLOP at {gflops:.0f} GFLOP/s, {si(computing)}s; {count}"
    return Limit(max(computing, seconds), count)


def of_memory(case: Case) -> Limit:
    """The bytes of a call, over those before it: y; in training what is saved, and the gradients."""
    T, B, I, H = case.shape.T, case.shape.B, case.shape.I, case.shape.H
    parts = {"y": T * B * H}
    if case.mode in TRAINING:
        parts["saved"] = SAVED[case.cell] * T * B * H
        parts["dx"] = T * B * I
        parts["gradients of weights"] = GATES[case.cell] * H * (I + H + 2)
    count = " + ".join(f"{name} {mib(4 * elements)}" for name, elements in parts.items() if elements)
    return Limit(4 * sum(parts.values()), count)


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
    seconds = operations / peaks.gflops[case.dtype] / 1e9
    return Limit(seconds, f"{si(operations)}FLOP at {peaks.gflops[case.dtype]:.0f} GFLOP/s, {si(seconds)}s")


def of_probe(section: str, case: Case, peaks: Peaks | None) -> Limit | None:
    if section == "crowded":
        return Limit(2, "with a busy neighbour on each core half of the CPU time is left")
    if section == "scaling":
        return Limit(2, "two cores do twice one's operations and read twice its bytes")
    if section in ("decoder", "attention"):
        return of_attention(section, case, peaks) if peaks else None
    return of_memory(case) if section == "memory" else None

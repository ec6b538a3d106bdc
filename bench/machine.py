"""The machine beside every figure: its name, its best matrix product, and who else had its time."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench import rivals
from fastrnn.bench.grid import GATES, Case, Shape
from fastrnn.bench.limits import Peaks
from fastrnn.kernels import instruction_set

# A row is unquiet where others had more than this share of the CPU time: a neighbour on one core of two for a
# tenth of it. With one there all the time torch's spinning threads have been seen to take 1000 times as long.
UNQUIET = 0.05


@dataclass(frozen=True)
class Conditions:
    """Who had the CPUs while something was measured: shares of all the CPU time there was, from 0 to 1.

    None where the system does not tell (no /proc/stat). The load average counts this process too.
    """

    load: float | None = None
    steal: float | None = None
    others: float | None = None

    @property
    def unquiet(self) -> bool:
        return (self.steal or 0) + (self.others or 0) > UNQUIET

    def text(self) -> str:
        """Load, steal, others and a mark, in columns of the table."""
        cells = [
            "" if self.load is None else f"{self.load:.2f}",
            "" if self.steal is None else f"{self.steal:.1%}",
            "" if self.others is None else f"{self.others:.1%}",
        ]
        return "".join(f"{text:>7}" for text in cells) + (" *" if self.unquiet else "")


UNKNOWN = Conditions()


class CpuClock:
    """Who had the machine's CPU time since construction: the hypervisor's other guests, other processes."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self.root = root
        self.start, self.own_start = self.ticks(), time.process_time()

    def ticks(self) -> list[int]:
        """User, nice, system, idle, iowait, irq, softirq, steal: ticks of all CPUs; empty where unknown."""
        try:
            return [int(n) for n in (self.root / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return []

    def load(self) -> float | None:
        """Processes that ran or wanted to, averaged over a minute."""
        try:
            return float((self.root / "loadavg").read_text().split()[0])
        except OSError:
            return None

    def read(self) -> Conditions:
        spent = [b - a for a, b in zip(self.start, self.ticks(), strict=False)]
        if len(spent) < 8:
            return Conditions(self.load())
        total = max(1, sum(spent))
        busy = total - spent[3] - spent[4] - spent[7]
        own = (time.process_time() - self.own_start) * os.sysconf("SC_CLK_TCK")
        return Conditions(self.load(), round(spent[7] / total, 4), round(max(0.0, busy - own) / total, 4))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def product_peak() -> float:
    """GFLOP/s of the best of ten float32 products of 2048 x 2048, with the threads in force."""
    product = rivals.product(2048)
    return rivals.product_gflops(2048, min(rivals.timed(product) for _ in range(10)))


class Least(nn.Module):
    """As little as a layer's call can be: one operation, its result as the state too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = x * self.weight
        return y, y


def least_seconds(case: Case, module: nn.Module) -> float:
    """Of a call of one unit, one sequence and one step, the shortest of a hundred: what does not grow."""
    call = rivals.Pass(case, module, torch.float32)
    return min(rivals.timed(call) for _ in range(100)) / case.calls


CALLS = ("forward", "step", "training")
ONE = Shape(1, 1, 1, 1)


def least_calls() -> dict[str, float]:
    """Seconds of a call through Python and one operator, for each mode; in training with its gradients."""
    return {mode: least_seconds(Case("rnn", mode, ONE), Least()) for mode in CALLS}


def least_layers() -> dict[str, float]:
    """The same of our layers: {"lstm step": 8e-6}."""
    cases = [Case(cell, mode, ONE) for cell, mode in product(GATES, CALLS)]
    return {
        f"{case.cell} {case.mode}": least_seconds(case, rivals.layer(fastrnn, case, torch.float32))
        for case in cases
    }


def about(conditions: Conditions, product: float, peaks: Peaks | None) -> dict[str, Any]:
    """The machine, as the JSON file has it; peaks in GFLOP/s and GB/s of all the threads together."""
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "torch": torch.__version__,
        "fastrnn": fastrnn.__version__,
        "peaks": peaks and asdict(peaks),
        "product_gflops": round(product, 1),
        **asdict(conditions),
        "unquiet": conditions.unquiet,
    }

"""The machine beside every figure: its name, its best matrix product, and who else had its time."""

from __future__ import annotations

import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastrnn
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
    n = 2048
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b, out=c)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9


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

"""What the benchmarks read of the system: memory, and who else had the CPUs. None of these times anything."""

from __future__ import annotations

import pytest

pytest.importorskip("fastrnn.bench", reason="an in-place build links it")

from fastrnn.bench import machine, memory
from fastrnn.bench.grid import Case, Shape
from fastrnn.bench.machine import Conditions


def status(rss, peak):
    return f"Name:\tpython\nVmPeak:\t  999999 kB\nVmHWM:\t  {peak} kB\nVmRSS:\t  {rss} kB\n"


def test_growth_is_the_peak_over_what_was_there():
    assert memory.growth(status(1000, 9000), status(1200, 5000)) == 4000 * 1024
    assert memory.growth(status(1000, 1000), status(900, 990)) == 0
    with pytest.raises(ValueError, match="no VmHWM"):
        memory.growth(status(1, 1), "VmRSS: 3 kB")


def test_the_output_is_among_the_bytes():
    found = memory.in_a_process("fastrnn", Case("rnn", "forward", Shape(2000, 4, 8, 512)))
    assert 2000 * 4 * 512 * 4 * 0.9 < found < 100 * 2**20


@pytest.mark.parametrize("kind", memory.KINDS)
def test_inference_holds_no_copy_of_the_input(kind):
    """y takes 2 MiB, x 62: a chunk of steps of it is copied at a time, and it may lie batch first."""
    found = memory.in_a_process("fastrnn", Case("rnn", "forward", Shape(1000, 32, 512, 16), kind))
    assert found < 16 * 2**20


def proc(folder, ticks):
    folder.joinpath("stat").write_text("cpu " + " ".join(map(str, ticks)) + "\ncpu0 1 2 3\n")
    folder.joinpath("loadavg").write_text("1.50 0.70 0.30 2/90 3\n")


def test_conditions_of_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.time, "process_time", lambda: 5.0)
    proc(tmp_path, [0] * 8)
    clock = machine.CpuClock(tmp_path)
    proc(tmp_path, [100, 0, 50, 700, 50, 0, 0, 100])
    assert clock.read() == Conditions(1.5, 0.1, 0.15)
    assert clock.read().unquiet
    assert clock.read().text().split() == ["1.50", "10.0%", "15.0%", "*"]


def test_a_system_that_does_not_tell(tmp_path):
    conditions = machine.CpuClock(tmp_path / "none").read()
    assert conditions == Conditions(None, None, None)
    assert not conditions.unquiet
    assert conditions.text().strip() == ""

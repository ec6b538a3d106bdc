"""What a run of the benchmarks tells: a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrnn.bench import limits
from fastrnn.bench.grid import GATES
from fastrnn.bench.limits import Peaks
from fastrnn.bench.records import Record, means, rival_names
from fastrnn.bench.rivals import TORCH


def table(records: list[Record], peaks: Peaks | None) -> str:
    """One line a row, times in ms a call; "torch.mm" its GFLOP/s in the same rounds; "of limit" the least
    time by limits.py over ours."""
    rivals = rival_names(records)
    width = max(len(r.case.id) for r in records) + 1
    head = f"{'row':{width}}{'rounds':>6}{'ours ms':>10}{'GFLOP/s':>9}{'torch.mm':>9}{'of limit':>9}"
    head += "".join(f"{name + ' ms':>19}{'ratio':>7}" for name in rivals)
    lines = [f"{head}{'load':>7}{'steal':>7}{'others':>7}"]
    for r in sorted(records, key=lambda r: list(GATES).index(r.case.cell)):
        share = f"{limits.of(r.case, peaks).ours / r.ours:.1%}" if peaks else ""
        product = f"{r.product:.1f}" if r.product else ""
        line = f"{r.case.id:{width}}{r.rounds:6}{r.ours * 1e3:10.4f}{r.gflops:9.1f}{product:>9}{share:>9}"
        for name in rivals:
            absent = f"{'WRONG' if name in r.wrong else '':>19}{'':7}"
            line += f"{r.rivals[name] * 1e3:19.4f}{r.ratio(name):7.2f}" if name in r.rivals else absent
        lines.append(line + r.conditions.text())
    lines.append("geometric means of the ratios (rival's time / ours, above 1 is faster):")
    for group, by_rival in means(records).items():
        lines.append(f"  {group:24}" + "   ".join(f"{name} {mean:.2f}" for name, mean in by_rival.items()))
    unquiet = sum(r.conditions.unquiet for r in records)
    if unquiet:
        lines.append(f"* {unquiet} of {len(records)} rows were taken while others had the CPUs: run again")
    return "\n".join(lines)


def describe(about: dict[str, Any], peaks: Peaks | None) -> str:
    threads = about["threads"]
    text = (
        f"{about['cpu']}, {about['cpus']} CPUs, {about['instruction_set']}, torch {about['torch']}\n"
        f"float32 unless said, medians of alternating rounds, {threads} threads for everybody\n"
    )
    if peaks:
        rates = ", ".join(f"{name} {gflops:.0f}" for name, gflops in peaks.gflops.items())
        reads = ", ".join(f"{size >> 10} KiB {gbps:.0f}" for size, gbps in peaks.read[::2])
        text += f"peaks of {threads} cores: multiply-adds in GFLOP/s, {rates};\n"
        text += f"reads in GB/s by what each core sweeps, {reads};\n"
        dots = ", ".join(f"{size >> 10} KiB {gbps:.0f}" for size, gbps in peaks.dot[::2])
        text += f"the same of a matrix that meets a vector, {dots};\n"
        gates = ", ".join(f"{name} {rate:.2g}" for name, rate in peaks.activations.items())
        text += (
            f"gates' functions in G/s, {gates}; copies in GB/s, {peaks.copy:.0f}; a meeting of the threads "
        )
        text += f"{limits.si(peaks.meet)}s, waking them {limits.si(peaks.wake)}s;\n"
        calls = ", ".join(f"{mode} {limits.si(seconds)}s" for mode, seconds in peaks.call.items())
        text += f"the least call of a module, {calls}\n" * bool(calls)
    else:
        text += "the machine's peaks are not known, for want of a compiler\n"
    text += f"best torch.mm of 2048 x 2048: {about['product_gflops']} GFLOP/s"
    if about["steal"] is not None:
        text += f"\nload average {about['load']}, CPU steal {about['steal']:.1%}, "
        text += f"other processes had {about['others']:.1%} of the CPU time"
    if about["unquiet"]:
        text += "\nWARNING: the machine was busy with other things: these figures prove nothing, run again"
    return text


def write_plot(path: Path, records: list[Record], about: dict[str, Any]) -> None:
    """Bars of torch.nn's time over ours, one panel a mode; the plain layers in float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in records if (r.case.kind, r.case.dtype) == ("plain", "float32")]
    modes = list(dict.fromkeys(r.case.mode for r in records))
    cells = list(dict.fromkeys(r.case.cell for r in records))
    figure, axes = pyplot.subplots(
        len(modes), squeeze=False, figsize=(10, 3.5 * len(modes)), layout="constrained"
    )
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        shapes = list(dict.fromkeys(r.case.shape for r in records if r.case.mode == mode))
        for k, cell in enumerate(cells):
            chosen = [r for r in records if (r.case.cell, r.case.mode) == (cell, mode)]
            places = [shapes.index(r.case.shape) + (k - (len(cells) - 1) / 2) * 0.25 for r in chosen]
            axis.bar(places, [r.ratio(TORCH) for r in chosen], width=0.25, label=cell)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(shapes)), [f"T{s.T} B{s.B}\nH{s.H}" for s in shapes])
        axis.set_ylabel(f"{mode}: torch.nn's time / ours")
        axis.legend()
    warning = "\nThe machine was busy with other things: these figures prove nothing" * about["unquiet"]
    figure.suptitle(
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}{warning}", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""The CUDA kernels compiled for every architecture: the registers and the memory that they take."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated
import pytest

ROOT = Path(__file__).resolve().parents[1]
# All of setup.py's, where FASTRNN_ALL_ARCHS is set; a minute of two cores else does for two.
ARCHITECTURES = (
    ("80", "86", "89", "90a", "100", "120") if os.environ.get("FASTRNN_ALL_ARCHS") else ("80", "90a")
)
MOST_SPILLED = 64  # bytes a thread
# What nvcc gave: of each kernel registers, bytes that are spilled, and of static shared memory. Written anew
# by this test where FASTRNN_WRITE_REGISTERS is set.
TABLE = Path(__file__).parent / "cuda_registers.json"
VIA = {"0": "cache", "1": "alone", "2": "cluster"}


def compiled_kernels(source, report):
    """{kernel: what it takes} of ptxas -v."""
    found = {}
    for name, text in re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", report, re.S
    ):
        kernel = re.search(r"scan_[a-z]+_?[a-z]*ward|prepare", name)[0]
        via, projected = re.search(r"ViaE(\d)", name), "Lb1E" in name
        if kernel == "prepare":
            kind = re.search(r"BFloat16|Float16|Float32", name)[0]
        elif via:
            kind = VIA[via[1]]
        else:
            units, chunks, halves = re.findall(r"Li(\d+)E", name)
            kind = f"{units} units, {int(chunks) * 128} columns, {halves}"
        key = f"{source.stem}: {kernel} {kind}{' projected' if projected else ''}"
        shared = re.search(r"(\d+) bytes smem", text)
        registers = re.search(r"Used (\d+) registers", text)[1]
        spilled = re.search(r"(\d+) bytes spill stores", text)[1]
        assert int(spilled) <= MOST_SPILLED, f"{key}: {spilled} bytes"
        found[key] = f"{registers} registers, {spilled} bytes spilled, {shared[1] if shared else 0} shared"
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("nvcc") is None,
    reason="nvcc, NVIDIA's compiler, is not installed: fastrnn has no CUDA kernels on this machine either",
)
def test_compiled_ahead(tmp_path):
    """The kernels of one cell and a width, and what starts them, as setup.py would compile them."""
    flags = emulated.json_flags()
    one = ["-DFASTRNN_CELLS(X)=X(::fastrnn::Lstm)", "-Xptxas=-v"]

    def compile(job):
        source, arch = job
        units = 32 if "bfloat16" in source.stem else 16
        target = [
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            f"-DFASTRNN_UNITS={units}",
            "-c",
            str(source),
        ]
        out = ["-o", str(tmp_path / f"{source.stem}-{arch}.o")]
        return subprocess.run(["nvcc", *flags, *one, *target, *out], capture_output=True, text=True, cwd=ROOT)

    names = ("launch", "forward_bfloat16", "backward_bfloat16", "backward_float32")
    sources = [ROOT / f"csrc/cuda/{name}.cu" for name in names]
    jobs = [(source, arch) for source in sources for arch in ARCHITECTURES]
    found = {arch: {} for arch in ARCHITECTURES}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, arch), run in zip(jobs, pool.map(compile, jobs), strict=True):
            assert run.returncode == 0, run.stdout + run.stderr
            kernels = compiled_kernels(source, run.stdout + run.stderr)
            assert kernels
            found[arch] |= kernels
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    nvcc = re.search(r"release ([\d.]+)", said)[1]
    if os.environ.get("FASTRNN_WRITE_REGISTERS"):
        TABLE.write_text(json.dumps({"nvcc": nvcc, "kernels": found}, indent=1) + "\n")
    table = json.loads(TABLE.read_text())
    if nvcc == table["nvcc"]:  # another one shares registers out otherwise
        for arch in ARCHITECTURES:
            assert found[arch] == table["kernels"][arch]

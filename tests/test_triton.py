"""The Triton backend: its kernels interpreted on the CPU, compiled ahead for every architecture, and run on a
GPU where there is one."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata, util
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is not installed")

HERE = Path(__file__).parent


def version(package: str) -> tuple[int, ...]:
    return tuple(int(n) for n in metadata.version(package).split(".")[:2])


def run(name: str, expression: str, **environment: str) -> subprocess.Popen[str]:
    """pytest on a file, in a process of its own: Triton decides at import whether it interprets."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            str(HERE / name),
            "-k",
            expression,
        ],
        env={**kept, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        out = process.communicate()[0]
        assert process.returncode == 0, out
        assert re.search(r"\d+ passed", out), out


@pytest.mark.slow
def test_interpreted():
    if version("triton") < (3, 8) and version("numpy") >= (2, 4):
        pytest.skip("Triton before 3.8 interprets no loop with numpy 2.4 or newer")
    finish(
        run("triton_interpreted.py", "step", TRITON_INTERPRET="1"),
        run("triton_interpreted.py", "not step", TRITON_INTERPRET="1"),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_the_gpu():
    finish(run("triton_interpreted.py", "step or not step"))


# --- ahead of time

# Of a block's shared memory, in KB.
SHARED = {80: 163, 90: 227, 100: 227, 120: 99}
# The stack's bytes a thread that ptxas spends on registers it has not got.
MOST_SPILLED = 32


def compile_all(job):
    """Of one configuration, each kernel's (name, shared memory, registers, stack, local memory)."""
    from triton.backends.compiler import GPUTarget

    from fastrnn.triton_kernels import ahead, heuristics, layer

    capability, cell, dtype, H, P, B, options, special = job
    target = GPUTarget("cuda", capability, 32) if capability else GPUTarget("hip", "gfx942", 64)
    projected, heads = P > 0, options.get("heads", 1)
    config = heuristics.configure(
        cell, H // heads, (P or H) // heads, B, dtype.itemsize, projected, capability or None
    )
    common = layer.options(
        cell, config, dtype, ahead.precision(dtype, target), projected=projected, **options
    )
    found = []
    for name, more in ahead.kernels(cell, config, projected=projected, **special):
        compiled = ahead.compile(name, dtype, target, {**common, **more}, aligned=H % 16 == 0)
        usage = (0, 0, 0)
        if capability:
            usage = resources(compiled.asm["cubin"])
        found.append((name, compiled.metadata.shared, *usage))
    return job, str(config), found


def resources(cubin: bytes) -> tuple[int, ...]:
    """Registers, stack and local memory a thread."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", said)
    assert match, said
    return tuple(map(int, match.groups()))


def jobs():
    """Each cell, type and architecture with the smallest and the largest scan and the step; each option
    once."""
    from fastrnn.triton_kernels.heuristics import configure

    for capability in SHARED:
        for dtype in (torch.bfloat16, torch.float32):
            for cell in ("lstm", "gru", "gru_reset_before", "rnn_tanh"):
                sizes = [16, 32, 64, 128, 256, 512]
                configs = [configure(cell, H, H, 16, dtype.itemsize, False, capability) for H in sizes]
                scans = [H for H, config in zip(sizes, configs, strict=True) if config.kernel == "scan"]
                for H in (scans[0], scans[-1], 512):
                    yield capability, cell, dtype, H, 0, 16, {}, {}
    for H in (64, 500):
        for dtype in (torch.float16, torch.float32):
            yield 90, "rnn_relu", dtype, H, 0, 128, {}, {}
        for cell in ("lstm", "gru", "gru_reset_before"):
            yield 90, cell, torch.float16, H, 0, 128, {}, {"SAVE": False, "SEQ": False, "BIAS": False}
            yield 90, cell, torch.bfloat16, H, 0, 64, {"masked": True}, {"DY": False}
            yield 90, cell, torch.bfloat16, H, 0, 64, {"packed": True}, {}
            yield 90, cell, torch.bfloat16, 4 * H, 0, 64, {"heads": 4}, {}
        yield 90, "lstm", torch.bfloat16, H, H // 4, 64, {}, {"DSEQ": True}
        yield 0, "lstm", torch.bfloat16, H, 0, 64, {}, {}
        yield 0, "gru", torch.float32, H, 0, 64, {}, {}


def _without_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


@pytest.mark.slow
def test_compiled_ahead():
    """Every kernel for NVIDIA's capabilities 8.0, 9.0, 10.0, 12.0, some for AMD's gfx942, without a GPU."""
    seen = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_without_interpreter) as pool:
        for job, config, found in pool.map(compile_all, jobs()):
            for name, shared, registers, stack, local in found:
                assert shared <= SHARED.get(job[0], 64) * 1024, (job, config, name, shared)
                assert stack + local <= MOST_SPILLED, (job, config, name, registers, stack, local)
                seen.add(name)
    assert seen == {"scan_forward", "scan_backward", "step_forward", "step_backward"}

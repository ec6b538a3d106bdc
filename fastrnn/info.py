"""What this installation of fastrnn is and can run: `python -m fastrnn info`."""

from __future__ import annotations

import importlib
import platform
import sys
from pathlib import Path

import torch

from . import cuda
from ._version import __version__
from .backends import TRITON_MISSING
from .kernels import LOAD_ERROR, LOADED, instruction_set, instruction_sets


def report() -> str:
    """Versions, build, instruction sets, threads, GPUs and kernels, a line each."""
    lines = [
        ("fastrnn", f"{__version__}, {Path(__file__).resolve().parent}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("python", f"{platform.python_version()}, {sys.platform} {platform.machine()}"),
        ("build", _build()),
        ("instruction sets", _instruction_sets()),
        (
            "threads",
            f"{torch.get_num_threads()} within an operation, {torch.get_num_interop_threads()} between",
        ),
        ("GPUs", _gpus()),
        *((f"kernels: {name}", state) for name, state in _kernels().items()),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}s}  {value}" for name, value in lines)


def _build() -> str:
    if not LOADED:
        return f"the compiled library is not loaded: {_load_error()}"
    return str(torch.ops.fastrnn.build_info())


def _load_error() -> str:
    return str(LOAD_ERROR).strip().splitlines()[0]


def _instruction_sets() -> str:
    if not LOADED:
        return "unknown, the compiled library is not loaded"
    return f"{', '.join(instruction_sets())}; in force: {instruction_set()}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        names.append(f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)")
    return ", ".join(names)


def _kernels() -> dict[str, str]:
    missing = cuda.missing()
    cpu = "available" if LOADED else f"not available: {_load_error()}"
    triton = (
        f"not available: {TRITON_MISSING}"
        if TRITON_MISSING
        else f"available, Triton {importlib.import_module('triton').__version__}"  # whoever distributes it
    )
    return {
        "cpu": cpu,
        "cuda": f"not available: {missing}" if missing else "available",
        "triton": triton,
        "reference": "available",
    }

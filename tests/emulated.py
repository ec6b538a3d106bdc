"""Builds csrc/cuda for the CPU, by tests/cuda_on_cpu.h: the same sources, with the host's compiler."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc"
OPTIONS = [
    "-std=c++20",
    "-g1",
    "-fPIC",
    "-w",
    "-pthread",
    "-DFASTRNN_FEW_KERNELS",
    f"-I{HERE}",
    f"-I{SOURCES}",
]


def json_flags() -> list[str]:
    """setup.py's flags of nvcc."""
    flags: list[str] = json.loads((HERE.parent / "build_flags.json").read_text())["cuda"]
    return flags


def build() -> Path:
    """The library; kept, by a digest of all that it is made of. EMULATED_FLAGS: more for the compiler."""
    compiler = os.environ.get("CXX", "g++")
    options = [*OPTIONS, *os.environ.get("EMULATED_FLAGS", "").split()]
    files = [HERE / "cuda_on_cpu.h", *sorted(SOURCES.glob("cells/*.h")), *sorted(SOURCES.glob("cuda/*"))]
    digest = hashlib.sha256(" ".join([compiler, *options]).encode())
    for file in files:
        digest.update(file.read_bytes())
    folder = HERE.parent / "build" / "emulated" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "emulated.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other tests' processes build it too
        if target.exists():
            return target

        def compile(source: Path) -> str:
            out = str(folder / f"{source.stem}.o")
            subprocess.run([compiler, *options, "-x", "c++", "-c", str(source), "-o", out], check=True)
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile, sorted(SOURCES.glob("cuda/*.cu"))))
        part = folder / "part.so"
        subprocess.run([compiler, "-shared", *options, *objects, "-o", str(part)], check=True)
        part.replace(target)
    return target

"""fastrnn builds for another processor: `./run aarch64` runs the tests there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER} to compile with")
def test_builds_for_aarch64(tmp_path: Path) -> None:
    """Every source that setup.py takes for that processor, without a warning, linked with empty libraries."""
    theirs = Path(torch.__file__).parent
    (tmp_path / "torch/lib").mkdir(parents=True)
    (tmp_path / "torch/include").symlink_to(theirs / "include")
    shutil.copy(theirs / "version.py", tmp_path / "torch")
    for name in ("torch", "torch_cpu", "c10"):
        empty = [COMPILER, "-shared", "-nostdlib", "-x", "c", "/dev/null"]
        subprocess.run([*empty, "-o", str(tmp_path / f"torch/lib/lib{name}.so")], check=True)
    cross = {"CXX": COMPILER, "CXXFLAGS": "-O1 -Werror", "FASTRNN_CUDA": "0"}
    cross["FASTRNN_TORCH_DIR"] = str(tmp_path / "torch")
    options = ("--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "objects"))
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **cross},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    header = (tmp_path / "fastrnn/_C.abi3.so").read_bytes()[:20]
    assert header[:6] == b"\x7fELF\x02\x01"
    assert int.from_bytes(header[18:20], "little") == 183, "EM_AARCH64"

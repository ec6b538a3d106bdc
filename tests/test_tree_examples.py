"""The examples of recursive networks run, and give the numbers of a Python recursion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trees_listops", "trees_syntax"])
def test_quick(name):
    run = subprocess.run(
        [sys.executable, f"{EXAMPLES / name}.py", "--quick"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr
    assert "the same numbers" in run.stdout
    assert "a full run should reach" in run.stdout

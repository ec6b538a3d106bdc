"""What the examples say of themselves: a figure is checked, and the README has them all."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

common = pytest.importorskip("examples.common", reason="the examples, or tqdm, are not here")
program = pytest.importorskip("examples.__main__")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("value", "at_most", "reached"),
    [(0.5, False, True), (0.6, False, True), (0.4, False, False), (0.5, True, True), (0.6, True, False)],
)
def test_a_figure_is_reached_on_its_side_of_the_bound(value, at_most, reached):
    figure = common.Figure("a figure", value, 0.5, at_most)
    assert figure.reached is reached
    assert str(figure).endswith("NOT REACHED") is not reached


@pytest.mark.parametrize("at_most", [False, True])
def test_nan_reaches_nothing(at_most):
    assert not common.Figure("a figure", math.nan, 0.5, at_most).reached


def test_every_figure_of_an_example_counts(tmp_path, monkeypatch):
    """The exit code says whether all were reached, not the last one alone."""
    good, bad = common.Figure("good", 1.0, 0.5), common.Figure("bad", 0.0, 0.5)
    monkeypatch.setattr("sys.argv", ["example", "--out", str(tmp_path)])
    assert common.main("one", lambda quick, out: good, None) == 0
    assert common.main("two", lambda quick, out: [good, good], None) == 0
    assert common.main("two", lambda quick, out: [bad, good], None) == 1


def test_a_file_is_no_place_for_pictures(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        monkeypatch.setattr("sys.argv", ["example", "--out", str(tmp_path / out)])
        with pytest.raises(SystemExit):
            common.main("one", lambda quick, out: common.Figure("good", 1.0, 0.5), None)
        assert f"argument --out: {tmp_path / out}: " in capsys.readouterr().err


def test_the_readme_has_every_example():
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| \[(\w+)\]\(\1\.py\)", readme, re.M))
    assert listed == set(program.EXAMPLES)
    assert all((ROOT / "examples" / f"{name}.py").is_file() for name in listed)


def test_the_files_that_an_example_writes_are_named(tmp_path, capsys):
    (tmp_path / "older.png").touch()
    (tmp_path / "again.png").touch()
    os.utime(tmp_path / "again.png", (0, 0))

    def example(quick, out):
        for name in ("new.png", "again.png"):
            (out / name).write_bytes(b"")
        return common.Figure("a figure", 1.0, 0.5)

    common.run("one", example, True, tmp_path)
    wrote = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote")]
    assert wrote == [f"wrote {tmp_path / name}" for name in ("again.png", "new.png")]


def test_figures_of_memory_stand_once(tmp_path, capsys, monkeypatch):
    memory = pytest.importorskip("examples.memory", reason="matplotlib is not here")
    output, answers = torch.zeros(70, 2, 10), torch.zeros(70, 2, dtype=torch.long)
    monkeypatch.setattr(memory, "train", lambda *args: ([(1, 0.001)], output, answers))
    for quick in (True, False):
        figures = common.run("memory", memory.memory, quick, tmp_path)
        printed = capsys.readouterr().out
        assert [printed.count(figure.name) for figure in figures] == [1] * (3 if quick else 6)
        assert ("copying is left out" in printed) is quick
        assert f"wrote {tmp_path / 'memory.png'}" in printed


@pytest.mark.parametrize("names", [["shapes"], ["shapes", "memory"]])
def test_a_summary_is_of_several(names, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "load", lambda name: lambda quick, out: common.Figure("a figure", 1.0, 0.5))
    monkeypatch.setattr("sys.argv", ["examples", *names, "--out", str(tmp_path)])
    assert program.main() == 0
    assert capsys.readouterr().out.count("a figure 100.00%") == {1: 1, 2: 4}[len(names)]


def test_an_example_needs_only_what_it_imports(tmp_path):
    """shapes has nothing to do with scikit-learn; who lacks it learns of that before any training."""
    pytest.importorskip("matplotlib")
    script = (
        "import sys\n"
        "sys.modules.update({'sklearn': None, 'sklearn.datasets': None})\n"
        "import examples.__main__ as program\n"
        "assert program.load('shapes').__name__ == 'shapes'\n"
        "sys.argv = ['examples', 'shapes', 'captioning']\n"
        "program.main()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stdout == ""
    assert ran.stderr.endswith("is missing: pip install -e '.[examples]'\n")

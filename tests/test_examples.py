"""What the examples say of themselves: a figure is checked, and the README has them all."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

common = pytest.importorskip("examples.common", reason="the examples, or tqdm, are not here")
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


def test_the_readme_has_every_example():
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| \[(\w+)\]\(\1\.py\)", readme, re.M))
    source = (ROOT / "examples" / "__main__.py").read_text(encoding="utf-8")
    assert listed == set(re.findall(r"^from \.(\w+) import \1$", source, re.M))

"""The programs in the documents run as they stand, and print what the documents say.

A page's ```python blocks run one after another in one namespace. A ```text block right after one is what it
prints, where ... stands for anything. Where matplotlib is missing all runs but the lines that draw.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import re
import types
from pathlib import Path

import pytest
import torch

import fastrnn

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    if "```python\n" in page.read_text(encoding="utf-8")
)
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n?^```text\n(.*?)^```\n)?", re.M | re.S)
DRAWS = importlib.util.find_spec("matplotlib") is not None
NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


@pytest.fixture(autouse=True)
def as_before(tmp_path, monkeypatch):
    """Pages may write files and, as users do, rebind torch.nn's names."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.setattr(torch.nn, name, getattr(torch.nn, name))
    torch.manual_seed(0)
    yield
    fastrnn.backend("auto")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_run_and_print_what_the_page_says(page):
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        code, expected = block.groups()
        if not DRAWS:
            code = re.sub(r"^\w+\.plot\(.*$", "", code, flags=re.M)
        line = text[: block.start(1)].count("\n")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Blank lines before it, so that an error names the page's line.
            exec(compile("\n" * line + code, str(page), "exec"), names)
        if expected is not None:
            same = doctest.OutputChecker().check_output(
                expected, printed.getvalue(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            assert same, f"{page.name}:{line}: expected\n{expected}\ngot\n{printed.getvalue()}"


def test_every_public_name_has_its_words():
    """The API's page has it; it says what it is; and so does what a module is called by."""
    page = (ROOT / "docs" / "guide" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto\w+:: (?:fastrnn\.)?(\S+)", page, re.M)
    modules = [name for name in fastrnn.__all__ if isinstance(getattr(fastrnn, name), types.ModuleType)]
    for name in set(fastrnn.__all__) - {"__version__"}:
        inside = name in modules and any(found.startswith(f"{name}.") for found in documented)
        assert name in documented or inside, name
        thing = getattr(fastrnn, name)
        assert thing.__doc__, name
        if isinstance(thing, type) and issubclass(thing, torch.nn.Module):
            assert thing.forward.__doc__, name
    assert "diagnostics.plot" in documented


def test_a_forest_says_what_it_holds():
    forest = fastrnn.Forest.from_nested(((1, 2), 3))
    for name in ("num_nodes", "num_trees", *(name for name in vars(forest) if name[0] != "_")):
        assert re.search(rf"^    {name} ", fastrnn.Forest.__doc__, re.M), name


def test_no_block_is_left_out():
    """A block that is written in another way, indented say, would not be seen."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(BLOCK.findall(text)) == len(
            re.findall(r"^\s*[`~]{3,}\s*(?:python|py|pycon)\b", text, re.M)
        ), page

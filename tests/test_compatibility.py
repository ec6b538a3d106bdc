"""docs/compatibility.md and docs/features.md say what is so."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import compatibility
import probes_graphs
import pytest
import torch

import fastrnn

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
FEATURES = ROOT / "docs" / "features.md"
PROBES = [
    pytest.param(name, marks=pytest.mark.slow if entry.slow else ())
    for name, entry in compatibility.PROBES.items()
]


def table(path):
    """The cells of every table row but the headings."""
    lines = path.read_text().splitlines()
    pairs = itertools.zip_longest(lines, lines[1:], fillvalue="")
    found = [line for line, below in pairs if line.startswith("| ") and not below.startswith("|---")]
    return [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found]


@pytest.mark.parametrize("name", PROBES)
def test_ours_passes(name):
    if name.startswith("onnx"):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    found = compatibility.outcomes(name, "fastrnn")
    assert set(found.values()) == {"passes"}, found


def test_the_page_has_these_rows():
    found = table(PAGE)
    titles = [re.sub(r" \((LSTM|GRU|RNN)(, (LSTM|GRU|RNN))*\)$", "", row[0]) for row in found]
    assert titles == [entry.title for entry in compatibility.PROBES.values()], "write the page again"
    assert {row[2] for row in found} == {"passes"}


@pytest.mark.slow
def test_the_page_is_right_about_torch():
    """Where its release of torch runs: what passes, and for which layers; not the words of the errors."""
    release = torch.__version__.split("+")[0]
    if f"with torch {release} on" not in PAGE.read_text():
        pytest.skip(f"the page is not of torch {release}")
    for (name, entry), row in zip(compatibility.PROBES.items(), table(PAGE), strict=True):
        lines = row[1].split("<br>")
        passes = set()
        for line in lines:
            kinds = entry.kinds if len(lines) == 1 else line.split(":")[0].split(", ")
            passes |= set() if "**fails**" in line else set(kinds)
        found = {kind: compatibility.attempt(torch.nn, kind, entry.run) for kind in entry.kinds}
        # oneDNN has no LSTM of bfloat16 without AVX-512; torch calls it under autocast all the same.
        refused = {kind for kind in passes if "could not create a primitive descriptor" in found[kind]}
        assert not (refused and torch.ops.mkldnn._is_mkldnn_bf16_supported()), (name, found)
        assert passes - refused == {kind for kind, text in found.items() if text == "passes"}, (name, found)


def test_a_wrong_number_is_no_pass(monkeypatch):
    """The probes look at the result: a layer that is off passes none of those that compare."""

    def off(run):
        def forward(self, *args, **options):
            output, *rest = run(self, *args, **options)
            if isinstance(output, torch.Tensor):
                return output + 0.5, *rest
            return output._replace(data=output.data + 0.5), *rest

        return forward

    for kind in compatibility.KINDS:
        monkeypatch.setattr(getattr(fastrnn, kind), "forward", off(getattr(fastrnn, kind).forward))
    # These look at no output, or at what a shift of it leaves as it was.
    blind = {"same_bits", "wrong_width", "wrong_weight", "empty_batch", "all_states"}
    blind |= {"dual_numbers", "batched_gradients"}
    for name, entry in compatibility.PROBES.items():
        if entry.group != probes_graphs.COMPILERS and name not in blind:
            found = compatibility.outcomes(name, "fastrnn")
            assert all(text.startswith("wrong result") for text in found.values()), (name, found)


def test_every_feature_names_tests_that_exist():
    for row in table(FEATURES):
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row[-1])
        assert named, f"no test is named: {row[0]}"
        for file, function in named:
            source = (ROOT / "tests" / file).read_text()
            assert not function or f"def {function}(" in source, f"{file} has no {function}"

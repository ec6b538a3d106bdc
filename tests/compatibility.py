"""What programs do with a recurrent layer, tried on torch.nn's and on fastrnn's: docs/compatibility.md.

python tests/compatibility.py > docs/compatibility.md

A probe takes a library and a kind of layer, does what a user would, and checks the numbers against `plain`,
a step-by-step computation in float64. It passes by returning; whatever it raises is the page's text.
"""

from __future__ import annotations

import io
import itertools
import logging
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import probes_graphs  # noqa: F401
import probes_layers  # noqa: F401
import probes_transforms  # noqa: F401
import torch
from probing import KINDS, LIBRARIES, PROBES, Wrong


def attempt(library: Any, kind: str, run: Callable[[Any, str], None]) -> str:
    """ "passes", or what went wrong in one line."""
    said = io.StringIO()
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("ignore")
            run(library, kind)
    except Wrong as error:
        return str(error)
    except Exception as error:  # whatever it is, the page says it
        lines = str(error).strip().splitlines() or [""]
        # The same for every kind of layer, so that they share a line.
        said_of_all = re.sub(rf"\b({'|'.join(KINDS)})\.forward", "forward", lines[0])
        text = f"{type(error).__name__}: {re.sub(r'aten::(lstm|gru|rnn_tanh)', 'aten::*', said_of_all)}"
        return text if len(text) <= 110 else text[:107] + "..."
    finally:
        logging.disable(logging.NOTSET)
    return "passes"


def outcome(library: Any, kind: str, run: Callable[[Any, str], None]) -> str:
    """`attempt`, with a word where only oneDNN, on which torch.nn's LSTM runs, stands in the way."""
    text = attempt(library, kind, run)
    if text != "passes" and library is torch.nn:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the switch says what this build of torch has not
            with torch.backends.mkldnn.flags(enabled=False):
                again = attempt(library, kind, run)
        if again == "passes":
            return f"{text} (passes with oneDNN off)"
    return text


def outcomes(name: str, library: str) -> dict[str, str]:
    """By kind of layer."""
    entry = PROBES[name]
    return {kind: outcome(LIBRARIES[library], kind, entry.run) for kind in entry.kinds}


def cell(found: dict[str, str]) -> str:
    """A table's cell: kinds with the same outcome share a line."""
    by_text: dict[str, list[str]] = {}
    for kind, text in found.items():
        by_text.setdefault(text, []).append(kind)
    escaped = {text: text.replace("|", "\\|").replace("<", "&lt;") for text in by_text}
    shown = {text: text if text == "passes" else f"**fails**: {escaped[text]}" for text in by_text}
    if len(by_text) == 1:
        return next(iter(shown.values()))
    return "<br>".join(f"{', '.join(kinds)}: {shown[text]}" for text, kinds in by_text.items())


HEAD = """# What works with torch.nn's layers and with these

Written by `python tests/compatibility.py > docs/compatibility.md`; `tests/test_compatibility.py` runs the
rows again. Each was tried on `LSTM`, `GRU` and `RNN` of both libraries (one layer, float32 unless the row
says otherwise), on a CPU, with torch {torch} on {system}. A row passes where the numbers are right too: they
are compared with a step-by-step computation in float64. Compiled rows use `backend="aot_eager"`. "With oneDNN
off": inside `torch.backends.mkldnn.flags(enabled=False)`. Other releases of torch may do better or worse; on
a GPU torch.nn's layers run on cuDNN, which has limits of its own.

The processor had AVX-512. Without it oneDNN has no LSTM of bfloat16 either, and torch.nn's fails under that
`autocast` as under float16's.

DataParallel replicas, DistributedDataParallel and `fully_shard` work with both (for ours see
`tests/test_plumbing.py`, `tests/test_distributed.py`). [features.md](features.md): what of this runs in C++.
"""

TAIL = """
## Where torch.nn's layers do more

- Tools that ask for torch.nn's very classes (`isinstance`, `torch.ao.quantization.quantize_dynamic`) pass
  ours by; `fastrnn.revert(model)` gives them torch.nn's. A model whose own `forward` asks so (TorchRL's,
  OpenNMT-py's decoder) is not for `fastrnn.convert`: assign `torch.nn.LSTM = fastrnn.LSTM` before it is made.
- `torch.jit.script` takes torch.nn's layers in the place of ours, in the caller's model too: script a copy.
- Files of `torch.jit.trace` and `torch.export` that hold a layer of ours need `import fastrnn` where they
  are loaded; an ONNX file needs nothing.
- An operation in place on a layer's output (`y.relu_()`, `y += x`) makes `backward` raise, as it does for a
  float32 LSTM of torch.nn; on a CPU its GRU, RNN and other LSTMs keep no output and allow it.
- Under autocast h_n and the cells' results have autocast's dtype, where torch.nn's GRU, RNN and cells give
  float32.
- `torch.onnx.export` knows no operator of ours: `fastrnn.export_onnx` exports the model instead.
- CUDA tensors run on cuDNN in torch.nn's layers; on CUDA or Triton kernels in these.
"""


def rows() -> Iterator[tuple[str, str]]:
    """Group and table row of every probe, in order."""
    for name, entry in PROBES.items():
        kinds = "" if entry.kinds == KINDS else f" ({', '.join(entry.kinds)})"
        theirs, ours = (cell(outcomes(name, library)) for library in LIBRARIES)
        yield entry.group, f"| {entry.title}{kinds} | {theirs} | {ours} |"


def page() -> str:
    system = f"{platform.system()} {platform.machine()}"
    lines = [HEAD.format(torch=torch.__version__.split("+")[0], system=system)]
    for group, entries in itertools.groupby(rows(), key=lambda row: row[0]):
        lines += [f"## {group}", "", "| | torch.nn | fastrnn |", "|---|---|---|"]
        lines += [row for _, row in entries] + [""]
    return "\n".join(lines).rstrip("\n") + "\n" + TAIL


if __name__ == "__main__":
    sys.stdout.write(page())

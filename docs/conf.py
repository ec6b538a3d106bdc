"""The guide: `./run docs` builds it from the Markdown of the whole repository, whose links it checks."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fastrnn  # noqa: E402 (this checkout's, which the line above puts on the path)

project = "fastrnn"
version = release = fastrnn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]

# The source directory is the repository, so that a link means the same on a code host and here.
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "examples/README.md",
    "bench/results/README.md",
]
exclude_patterns = [".*", "build", "out", "dist", "fastrnn", "csrc", "tests", "triton_kernels"]

myst_heading_anchors = 4
default_role = "code"  # of a docstring's `name`
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature in the docstring's words; its annotations are in the source

html_theme = "furo"
html_title = f"fastrnn {release}"
html_copy_source = False
html_show_sphinx = False


def as_it_stands(app, what, name, obj, options, lines):
    """Docstrings are written to be read as they are, tables and equations by columns: a literal block."""
    if lines:
        lines[:] = ["::", "", *("    " + line for line in lines), ""]


def setup(app):
    app.connect("autodoc-process-docstring", as_it_stands)

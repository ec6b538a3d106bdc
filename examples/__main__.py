"""python -m examples [NAME ...] [--quick] [--out DIR]: all examples or those named, and their figures."""

from __future__ import annotations

import importlib
import sys
import time

import torch

import fastrnn

from . import common

# Imported when they run: not every one needs what the others do.
EXAMPLES = (
    "shapes",
    "vanishing",
    "memory",
    "lstm_gru",
    "translation",
    "captioning",
    "sentiment",
    "tagging",
    "speech",
    "trees_listops",
    "trees_syntax",
)


def load(name: str) -> common.Example:
    """The function of that name in the module of that name."""
    example: common.Example = getattr(importlib.import_module(f"examples.{name}"), name)
    return example


def main() -> int:
    """Exit code 1 where a figure was not reached."""
    parser = common.options("Train the examples, and check what each reaches.")
    parser.prog = "python -m examples"
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXAMPLES))
    args = parser.parse_args()
    unknown = set(args.names) - set(EXAMPLES)
    if unknown:
        parser.error(f"no example is named {', '.join(sorted(unknown))}: there are {', '.join(EXAMPLES)}")
    try:
        examples = {name: load(name) for name in args.names or EXAMPLES}
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is missing: pip install -e '.[examples]'")
    print(
        f"fastrnn {fastrnn.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"Python {sys.version.split()[0]}\n"
    )
    began = time.perf_counter()
    figures = {name: common.run(name, example, args.quick, args.out) for name, example in examples.items()}
    if len(figures) > 1:  # one example's stand right above
        width = max(map(len, figures))
        for name, found in figures.items():
            for figure in found:
                print(f"{name:{width}s} {figure}")
        print(f"in {time.perf_counter() - began:.0f} s")
    return 0 if all(figure.reached for found in figures.values() for figure in found) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What does a function do? The first word of its name, predicted from its syntax tree.

    python -m examples.trees_syntax             # some minutes on two cores; --quick: seconds

The trees are those of Python's standard library, which every machine has: each function's `ast`, a node for
each syntax node with its kind and, where it has one, its identifier. Its own name is taken out, wherever it
stands. The functions of one file are all in the training set or all held out. Expected: 0.65 of the held-out
functions (0.71 with Python 3.11), of which the most frequent word, "init", is a quarter.
"""

from __future__ import annotations

import ast
import collections
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from . import common
from .trees_common import Classifier, Tree, beside_recursion, train

EXPECTED = 0.65
WORDS, IDENTIFIERS, MOST_NODES = 12, 2000, 300
FIELDS = ("id", "attr", "arg", "name")  # what holds an identifier


def stem(name: str) -> str:
    """get of get_value, getValue and _get."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return words[0].lower() if words else ""


def functions(most_files: int | None) -> Iterator[tuple[Path, ast.AST]]:
    """Every function of the standard library, its tests left out, with its file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "idle_test", "lib2to3"}
    files = [f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]
    for file in files[:most_files]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):  # not every file there is meant to be parsed
            continue
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file.relative_to(root), node


def flat(function: ast.AST) -> tuple[list[int], list[str]]:
    """Parents and words of a function's nodes, without its name, docstring and the kinds of context."""
    parents: list[int] = []
    words: list[str] = []
    own = function.name
    todo: list[tuple[int, ast.AST]] = [(-1, function)]
    while todo:
        parent, node = todo.pop()
        number = len(parents)
        parents.append(parent)
        word = type(node).__name__
        identifier = next((getattr(node, f) for f in FIELDS if isinstance(getattr(node, f, None), str)), None)
        if identifier is not None and node is not function:
            word += ":" + ("<itself>" if identifier == own else identifier)
        elif isinstance(node, ast.Constant):
            word += ":" + type(node.value).__name__
        words.append(word)
        children = [k for k in ast.iter_child_nodes(node) if not isinstance(k, ast.expr_context)]
        todo += [(number, k) for k in reversed(children) if k is not docstring(node)]
    return parents, words


def docstring(node: ast.AST) -> ast.AST | None:
    body = getattr(node, "body", None)
    if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
        return None
    value = body[0].value
    return body[0] if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def data(most_files: int | None) -> tuple[list[Tree], list[Tree], list[str], int]:
    """Training set, held-out functions, the words to predict, and the size of the vocabulary."""
    found = [(file, stem(node.name), *flat(node)) for file, node in functions(most_files)]
    found = [f for f in found if len(f[2]) <= MOST_NODES]
    counts = collections.Counter(word for _, word, *_ in found if word)
    labels = [word for word, _ in counts.most_common(WORDS)]
    found = [f for f in found if f[1] in labels]
    kept_out = [zlib.crc32(str(file).encode()) % 5 == 0 for file, *_ in found]
    known = collections.Counter(
        word for f, out in zip(found, kept_out, strict=True) if not out for word in f[3]
    )
    vocabulary = {word: i + 1 for i, (word, _) in enumerate(known.most_common(IDENTIFIERS))}
    kinds = {word.split(":")[0] for word in known}
    vocabulary |= {kind: len(vocabulary) + 1 + i for i, kind in enumerate(sorted(kinds - vocabulary.keys()))}
    sets: tuple[list[Tree], list[Tree]] = [], []
    for (_, word, parents, words), out in zip(found, kept_out, strict=True):
        # An identifier that is not known is its kind alone.
        tokens = [vocabulary.get(w, vocabulary.get(w.split(":")[0], 0)) for w in words]
        sets[out].append(Tree(parents, tokens, [labels.index(word)] + [-1] * (len(tokens) - 1)))
    return *sets, labels, len(vocabulary) + 1


def trees_syntax(quick: bool, out: Path) -> common.Figure:
    trees, held_out, labels, vocabulary = data(150 if quick else None)
    nodes = sum(len(tree.parents) for tree in trees)
    share = sum(tree.labels[0] == 0 for tree in held_out) / len(held_out)
    print(f"{len(trees):,} functions of {nodes / len(trees):.1f} nodes, {len(held_out)} held out")
    print(f"words: {', '.join(labels)}; always {labels[0]!r} would be right about {share:.3f}")
    model = Classifier(vocabulary, len(labels), 64 if quick else 128)
    accuracy = train(model, trees, held_out, 4 if quick else 8, 64, 1e-2 if quick else 3e-3)
    beside_recursion(model, trees[: 20 if quick else 100])
    return common.Figure("functions whose first word is found", accuracy, 0.4 if quick else EXPECTED)


if __name__ == "__main__":
    sys.exit(common.main("trees_syntax", trees_syntax, __doc__))

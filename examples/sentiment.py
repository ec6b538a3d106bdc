"""Many to one: whether a sentence complains or explains.

The sentences are those of Python's standard library, and it labels them itself: what an exception is raised
with complains ("could not convert string to float"), a docstring's first paragraph explains ("Convert a
string to a float"). Only their words are read, without case, digits and punctuation, which would tell.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn

import fastrnn

from . import common

COMPLAINT, EXPLANATION = 1, 0
LONGEST = 30


def text_of(node: ast.expr) -> str:
    """The constant parts of a string, of a formatted one too; "" for what is none."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return " ".join(map(text_of, parts))
        case ast.BinOp(left=left, op=ast.Mod()):  # "..." % values
            return text_of(left)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return f"{text_of(left)} {text_of(right)}"
    return ""


def sentences(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(text, label) of one module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield text_of(node.exc.args[0]), COMPLAINT
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            yield (ast.get_docstring(node) or "").split("\n\n")[0], EXPLANATION


def standard_library(pattern: str) -> list[tuple[tuple[str, ...], int]]:
    """(words, label) of every sentence of two words or more, each once, in a fixed order."""
    found: dict[tuple[str, ...], int] = {}
    folder = Path(sysconfig.get_path("stdlib"))
    for file in sorted(folder.glob(pattern)):
        if {"site-packages", "test", "tests", "lib2to3"} & set(file.relative_to(folder).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in old modules
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for text, label in sentences(tree):
            words = tuple(re.findall(r"[a-z]+", re.sub(r"%\(?\w*\)?[srdic]", " ", text).lower()))[:LONGEST]
            if len(words) >= 2:
                found.setdefault(words, label)
    return sorted(found.items())


class Reader(nn.Module):
    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 64)
        self.rnn = fastrnn.LSTM(64, hidden, bidirectional=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(2 * hidden, 1)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens [T, B] -> logits [B] of a complaint, from the state at each sentence's own ends."""
        _, (h, _) = self.rnn(self.dropout(self.embed(tokens)), lengths=lengths)  # [2, B, H]
        return self.head(self.dropout(torch.cat(h.unbind(), -1))).squeeze(-1)


def counted(train: list[tuple[tuple[str, ...], int]], test: list[tuple[tuple[str, ...], int]]) -> float:
    """What the words tell without their order: the accuracy of naive Bayes."""
    bayes = make_pipeline(CountVectorizer(analyzer=list), MultinomialNB())
    bayes.fit(*zip(*train, strict=True))
    return float(bayes.score(*zip(*test, strict=True)))


def sentiment(quick: bool, out: Path) -> common.Figure:
    data = standard_library("*.py" if quick else "**/*.py")
    random.shuffle(data)
    counts = Counter(label for _, label in data)
    print(f"{counts[COMPLAINT]:,} complaints, {counts[EXPLANATION]:,} explanations")
    # As many of each, so that guessing is right in half of the cases.
    fewest = min(counts.values())
    data = [pair for label in counts for pair in [p for p in data if p[1] == label][:fewest]]
    random.shuffle(data)
    held = len(data) // 5
    train, test = data[held:], data[:held]
    seen = Counter(word for words, _ in train for word in set(words))
    vocabulary = common.Symbols([[word] for word, count in seen.items() if count > 1])
    model = Reader(len(vocabulary), hidden=64)
    stream = common.batches(len(train), 64)

    def loss() -> Tensor:
        chosen = [train[i] for i in next(stream).tolist()]
        tokens, lengths = vocabulary.encode(words for words, _ in chosen)
        labels = torch.tensor([float(label) for _, label in chosen])
        return nn.functional.binary_cross_entropy_with_logits(model(tokens, lengths), labels)

    common.fit(model, loss, steps=100 if quick else 800, lr=5e-3)
    tokens, lengths = vocabulary.encode(words for words, _ in test)
    with torch.no_grad():
        found = model(tokens, lengths).sigmoid()
    labels = torch.tensor([label for _, label in test])
    order = found.argsort(descending=True).tolist()
    for i in [*order[:3], *order[-3:]]:
        print(f"{found[i]:.3f} {' '.join(test[i][0])}")
    print(f"words counted, in any order (naive Bayes), tell {counted(train, test):.2%} apart")
    right = ((found > 0.5) == labels.bool()).double().mean().item()
    return common.Figure("sentences told apart", right, 0.7 if quick else 0.9)


if __name__ == "__main__":
    sys.exit(common.main("sentiment", sentiment, __doc__))

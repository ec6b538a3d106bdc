"""Many to many, step by step: what every character of a Python statement belongs to.

    return  n + 0x1F   # or None
    kkkkkk  n o dddd   ccccccccc

The statements are the standard library's, the labels those of Python's own `tokenize`. A character alone
tells little ("in" may be a keyword, part of a name, of a string or of a comment), so a bidirectional LSTM
reads both sides of it. The statements of the test are from modules that training never saw.
"""

from __future__ import annotations

import io
import keyword
import random
import sys
import sysconfig
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import fastrnn

from . import common

TAGS = {
    "space": " ",
    "keyword": "k",
    "name": "n",
    "number": "d",
    "string": "s",
    "comment": "c",
    "operator": "o",
}
KINDS = {"NUMBER": "number", "STRING": "string", "COMMENT": "comment", "OP": "operator"}
LONGEST = 120

Pairs = list[tuple[str, str]]  # text, tags


def tag_of(token: tokenize.TokenInfo) -> str | None:
    """The letter of TAGS for a token; None for those of no characters."""
    name = tokenize.tok_name[token.type]
    if name == "NAME":
        return TAGS["keyword" if keyword.iskeyword(token.string) else "name"]
    if name.startswith(("FSTRING", "TSTRING")):  # the parts of a formatted string, Python 3.12 and newer
        return TAGS["string"]
    return TAGS[KINDS[name]] if name in KINDS else None


def statements(source: str) -> Iterator[tuple[str, str]]:
    """(text, tags) of every statement, as long as each other."""
    lines = io.StringIO(source).readlines()
    begin, tags = 0, [[" "] * len(line) for line in lines]
    for token in tokenize.generate_tokens(iter(lines).__next__):
        tag, (row, column), (last, stop) = tag_of(token), token.start, token.end
        for r in range(row - 1, last) if tag else ():
            first = column if r == row - 1 else 0
            for c in range(first, stop if r == last - 1 else len(lines[r])):
                tags[r][c] = tag
        if token.type == tokenize.NEWLINE:
            text = "".join(lines[begin:row])
            yield text, "".join("".join(line) for line in tags[begin:row])
            begin = row


def of_modules(files: list[Path]) -> dict[str, str]:
    """{text: tags} of the statements of at most LONGEST characters, outer blanks left out."""
    found = {}
    for file in files:
        try:
            pairs = list(statements(file.read_text(encoding="utf-8")))
        except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):
            continue
        for text, tags in pairs:
            begin = len(text) - len(text.lstrip())
            end = len(text.rstrip())
            if 0 < end - begin <= LONGEST:
                found[text[begin:end]] = tags[begin:end]
    return found


class Tagger(nn.Module):
    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 32)
        self.rnn = fastrnn.LSTM(32, hidden, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 1 + len(TAGS))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens [T, B] -> logits [T, B, tags]."""
        return self.head(self.rnn(self.embed(tokens), lengths=lengths)[0])


def commonest(train: Pairs, test: Pairs) -> float:
    """How many characters of the test have the tag that they had most often in training."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text, tags in train:
        for character, tag in zip(text, tags, strict=True):
            counts[character][tag] += 1
    best = {character: count.most_common(1)[0][0] for character, count in counts.items()}
    right = [best.get(c) == tag for text, tags in test for c, tag in zip(text, tags, strict=True)]
    return sum(right) / len(right)


def tagging(quick: bool, out: Path) -> common.Figure:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.shuffle(files)
    files = files[:40] if quick else files
    held = len(files) // 5
    seen = of_modules(files[held:])
    train = list(seen.items())
    test = [(text, tags) for text, tags in of_modules(files[:held]).items() if text not in seen]
    print(f"{len(train):,} statements to train on, {len(test):,} of other modules to test")
    characters, tags = common.Symbols(text for text, _ in train), common.Symbols(TAGS.values())
    model = Tagger(len(characters), hidden=64)
    stream = common.batches(len(train), 64)

    def batch(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [T, B], lengths [B], labels [T, B]."""
        return *characters.encode(text for text, _ in pairs), tags.encode(line for _, line in pairs)[0]

    def loss() -> Tensor:
        tokens, lengths, labels = batch([train[i] for i in next(stream).tolist()])
        logits = model(tokens, lengths)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)

    common.fit(model, loss, steps=80 if quick else 600, lr=1e-2)

    right = total = 0
    for begin in range(0, len(test), 256):
        tokens, lengths, labels = batch(test[begin : begin + 256])
        with torch.no_grad():
            found = model(tokens, lengths).argmax(-1)  # [T, B]
        right += int((found == labels)[labels > 0].sum())
        total += int(lengths.sum())
        if begin == 0:
            for b in range(3):
                print(test[b][0], "".join(tags.decode(found[: lengths[b], b])), sep="\n")
    print(f"each character's commonest tag would be right in {commonest(train, test):.2%}")
    return common.Figure("characters tagged right", right / total, 0.8 if quick else 0.995)


if __name__ == "__main__":
    sys.exit(common.main("tagging", tagging, __doc__))

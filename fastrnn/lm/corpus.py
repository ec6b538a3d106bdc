"""Text, its vocabulary of characters, and the batches of truncated backpropagation through time."""

from __future__ import annotations

import hashlib
import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError, os_reason

DEFAULT_CHARACTERS = 4_000_000
VALID_FRACTION = 0.1
# Enough for two digits of a perplexity, and it keeps a validation to seconds on a CPU.
VALID_MAX = 100_000


def read_text(path: str | None) -> str:
    """The text of a UTF-8 file; without a path the Python standard library's own sources.

    Raises UserError where the file is missing, not a regular file, empty or not UTF-8.
    """
    if path is None:
        return _standard_library()
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path} is a directory, expected a text file")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path} is not a regular file")
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {os_reason(error)}") from error
    except ValueError as error:  # a NUL in the path
        raise UserError(f"cannot read {path!r}: {error}") from error
    if not data:
        raise UserError(f"{path} is empty")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise UserError(f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {error.start}") from error


def _standard_library() -> str:
    """The top-level modules by name, up to DEFAULT_CHARACTERS: the same text every time."""
    folder = Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    size = 0
    for file in sorted(folder.glob("*.py")):
        try:
            part = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        parts.append(part)
        size += len(part)
        if size >= DEFAULT_CHARACTERS:
            break
    if not parts:
        raise UserError(f"no Python sources in {folder}: name a text file with --data")
    return "".join(parts)[:DEFAULT_CHARACTERS]


def _code_points(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a text in code point order; a token is a character's index."""

    characters: str

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """LongTensor [len(text)]. Raises UserError for a character that the vocabulary lacks."""
        if not text:
            return torch.empty(0, dtype=torch.long)
        if any("\ud800" <= c <= "\udfff" for c in text):  # bytes of the command line that are no text
            raise UserError("the text holds bytes that are not valid in the terminal's encoding")
        table = _code_points(self.characters)
        points = _code_points(text)
        tokens = torch.searchsorted(table, points).clamp(max=len(self) - 1)
        known = table[tokens] == points
        if not bool(known.all()):
            character = chr(int(points[~known][0]))
            raise UserError(f"the character {character!r} does not occur in the text trained on")
        return tokens

    def decode(self, tokens: Tensor) -> str:
        """The text of a 1-D tensor of tokens."""
        return "".join(self.characters[i] for i in tokens.tolist())


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: `train` is its first nine tenths, `valid` what follows (so much as asked for)."""

    vocabulary: Vocabulary
    train: Tensor  # [N]
    valid: Tensor  # [M]
    digest: str

    @staticmethod
    def from_text(text: str, valid_max: int = VALID_MAX) -> Corpus:
        """Builds the vocabulary from the whole text, so that validation meets no unknown character."""
        vocabulary = Vocabulary("".join(sorted(set(text))))
        tokens = vocabulary.encode(text)
        cut = tokens.numel() - int(tokens.numel() * VALID_FRACTION)
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        return Corpus(vocabulary, tokens[:cut], tokens[cut : cut + valid_max], digest)

    def check_size(self, batch: int, bptt: int, name: str) -> None:
        """Raises UserError where the text is too short for one chunk of training and one of validation."""
        needed = batch * (bptt + 1)
        if self.train.numel() < needed:
            raise UserError(
                f"{name} is too short: --batch {batch} and --bptt {bptt} need {needed} characters "
                f"for training, it has {self.train.numel()}"
            )
        if self.valid.numel() < 2:
            raise UserError(f"{name} is too short: nothing is left for validation")


class Chunks:
    """A text cut into B parallel streams and these into chunks of T steps, the last one of what is left.

    Chunk k of an epoch continues chunk k-1 in every column, so a state carried from chunk to chunk sees
    the text in order.
    """

    def __init__(self, tokens: Tensor, batch: int, bptt: int) -> None:
        length = tokens.numel() // batch
        if length < 2:
            raise ValueError(f"batch {batch} needs at least {2 * batch} tokens, got {tokens.numel()}")
        self._streams = tokens[: length * batch].view(batch, length).t().contiguous()  # [length, B]
        self._bptt = min(bptt, length - 1)
        self._count = -(-(length - 1) // self._bptt)

    def __len__(self) -> int:
        return self._count

    def steps(self, index: int) -> int:
        """Of chunk `index`."""
        return min(self._bptt, self._streams.size(0) - 1 - index * self._bptt)

    def chunk(self, index: int) -> tuple[Tensor, Tensor]:
        """Input and target of chunk `index`, both [T, B]; the target is the input one character later."""
        begin = index * self._bptt
        end = begin + self.steps(index)
        return self._streams[begin:end], self._streams[begin + 1 : end + 1]

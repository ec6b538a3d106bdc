"""Which kernel a call takes and in what tiles: fixed by sizes, type and architecture, so that nothing is
tried out at a first call. tests/test_triton.py compiles every configuration of widths that are multiples
of 16, some of H = 500, and holds their shared memory and registers against the architectures' limits. What
`python -m fastrnn tune` has found goes before."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from fastrnn.gpu import TRAITS

# Attention's tiles of dot products, and what they load of K or V at once; those of additive scores; columns
# of a result that a program makes.
TILE_OF_QUERIES, TILE_OF_POSITIONS, PIECE = 16, 32, 64
ADDITIVE_TILE, ADDITIVE_PIECE = 16, 16
WIDEST = 128
# What of the gradients of scores, float32, is in memory at a time, where it has to be.
SCORE_BYTES = 32 << 20


@dataclass(frozen=True)
class Config:
    """kernel: "scan", a launch for many steps with R on the chip; "grid", the same whose programs meet after
    every stage of a step; "step", a launch a step and stage. block_b sequences and block_u units (in a scan
    all of a head's) a program; block_k: the piece of a product's sum that is loaded at once (in a scan all of
    h, padded); early: see step_forward."""

    kernel: str
    block_b: int
    block_u: int
    block_k: int
    warps: int
    stages: int
    early: bool = False

    def __str__(self) -> str:
        tiles = f"{self.block_b} sequences x {self.block_u} units"
        return f"{tiles}, {self.warps} warps" + (f", K by {self.block_k}" if self.kernel != "scan" else "")


@dataclass(frozen=True)
class Shape:
    """What a layer's configuration depends on: heads of H units and P columns of h, as many groups of them
    (directions x heads), B sequences, elements of itemsize bytes, on a GPU of this compute capability
    (major * 10 + minor; None: no NVIDIA GPU) and so many multiprocessors, 0 where programs cannot meet;
    float32 products of this precision, which `configure` does not ask for but what was tuned rests on."""

    cell: str
    H: int
    P: int
    groups: int
    B: int
    itemsize: int
    projected: bool
    capability: int | None
    processors: int = 0
    precision: str = "ieee"


# Bytes of R, padded, up to which a scan keeps it on the chip: with its other tiles it takes a little more of
# the 227 KB of shared memory that a block may have at compute capability 9.0 and 10.x, 163 KB at 8.0, and
# 99 KB at 8.6, 8.9 and 12.x. Beyond FEW_WARPS (LSTM, H = 32, 16 bits) eight warps are faster than four.
LARGE, SMALL, FEW_WARPS = 128 << 10, 64 << 10, 8 << 10
LARGE_CAPABILITIES = (80, 87, 90, 100, 101, 103)
# Those on which registers hold tiles of 64 sequences x 32 units, of rows that begin at multiples of 16.
WIDE_CAPABILITIES = (90, 100, 101, 103)


def padded(n: int) -> int:
    """The power of two that holds n; a product's sides are at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def resident_limit(capability: int | None) -> int:
    """Bytes of R that a scan keeps on the chip."""
    return LARGE if capability in LARGE_CAPABILITIES else SMALL


def programs(shape: Shape, block_b: int, block_u: int) -> int:
    """Of a launch over all tiles; of a projected layer's two stages the larger."""
    return shape.groups * -(-shape.B // block_b) * -(-max(shape.H, shape.P) // block_u)


def tiles(shape: Shape) -> tuple[tuple[int, int], ...]:
    """Of a grid's programs the sequences and units to choose from: the first of which all are there at once.
    Small ones: more programs share the reading of R. But float32 in tiles of 16 x 16, and any type in tiles
    of 32 sequences, leave warps without work of their own, or lack registers."""
    small: tuple[tuple[int, int], ...] = ((16, 16), (16, 32), (16, 64))
    if shape.itemsize == 4:
        small = small[1:]
    if shape.B <= 32 or (shape.itemsize == 4 and shape.capability not in LARGE_CAPABILITIES):
        return small
    large = ((64, 16), (64, 32)) if wide(shape) else ((64, 16),)
    return (*small[:1], *large) if shape.itemsize == 2 else large


def aligned(*widths: int) -> bool:
    """Whether rows so wide begin at multiples of 16: those of the gates, of h and of the weights."""
    return all(width % 16 == 0 for width in widths)


def wide(shape: Shape) -> bool:
    """Whether registers hold tiles of 64 sequences x 32 units."""
    return shape.capability in WIDE_CAPABILITIES and aligned(shape.H, shape.P)


def stepping(shape: Shape, kernel: str, block_b: int, block_u: int) -> Config:
    """A grid or step in these tiles.

    In 16 bits four warps were faster than eight on an H200 in tiles of 16 units, and large pieces, loaded two
    or three ahead, up to twice as fast as pieces of 32: what a step waits for is one piece after another.
    """
    large = shape.capability in LARGE_CAPABILITIES
    if shape.itemsize == 4:
        return Config(kernel, block_b, block_u, 32, 4 if block_b * block_u <= 512 else 8, 2)
    if block_b == 16:
        early = kernel == "grid" and block_u <= 32
        # Large pieces of rows that begin anywhere would take more registers than there are.
        block_k = 128 if block_u == 16 and aligned(shape.H, shape.P) else 32
        return Config(kernel, block_b, block_u, block_k, 4, 3 if large else 2, early)
    if not large or not aligned(shape.H, shape.P):
        return Config(kernel, block_b, block_u, 32, 8, 3 if large else 2)
    if block_u > 16:
        return Config(kernel, block_b, block_u, 64, 8, 3)
    # From four warps an LSTM's four gates spill 72 bytes a thread at 10.x (Triton 3.6), from eight none;
    # neither has been timed there.
    spills = shape.cell == "lstm" and shape.capability not in (80, 87, 90)
    return Config(kernel, block_b, block_u, 64, 8 if spills else 4, 4)


def resident_bytes(shape: Shape, block_h: int, block_p: int) -> int:
    """Of R and the projection on the chip, padded."""
    # float32 takes its size twice: 3xTF32 cuts each number into two parts.
    bytes_each = shape.itemsize * (2 if shape.itemsize == 4 else 1)
    return (TRAITS[shape.cell].gates + shape.projected) * block_h * block_p * bytes_each


def scan_blocks(shape: Shape) -> tuple[int, int]:
    """Units and columns of h of a scan's program."""
    # A projection's product of 16 columns would not go by tensor cores, but by registers that are not there.
    return padded(shape.H), max(padded(shape.P), 32 if shape.projected else 16)


def configure(shape: Shape) -> Config:
    """The fastest configuration known for a layer."""
    found = tuned().get(shape)
    if found is not None:
        return found
    block_h, block_p = scan_blocks(shape)
    size = resident_bytes(shape, block_h, block_p)
    if size <= resident_limit(shape.capability):
        return Config("scan", 16, block_h, block_p, 4 if size <= FEW_WARPS else 8, 1)
    for block_b, block_u in tiles(shape):
        if programs(shape, block_b, block_u) <= shape.processors:
            return stepping(shape, "grid", block_b, block_u)
    block_b = tiles(shape)[-1][0]
    return stepping(shape, "step", block_b, 32 if block_b == 16 or wide(shape) else 16)


# --- what tuning has found


def path() -> Path | None:
    """The file of tuned configurations: FASTRNN_TUNED, else in the user's cache folder, if there is one."""
    given = os.environ.get("FASTRNN_TUNED")
    if given:
        return Path(given)
    # Path.home() would raise where there is none, as in a container's user without a name.
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache or os.path.expanduser("~/.cache"))
    return folder / "fastrnn" / "triton.json" if folder.is_absolute() else None


def written(file: Path) -> list[dict[str, Any]]:
    """The entries of all of Triton's versions: what fits on the chip, and is fast, is the compiler's."""
    try:
        entries: list[dict[str, Any]] = json.loads(file.read_text() or "[]")
        return entries
    except (FileNotFoundError, NotADirectoryError):
        return []


@functools.cache
def tuned() -> dict[Shape, Config]:
    """By shape; read once, at the first call."""
    file = path()
    if file is None:
        return {}
    try:
        entries = written(file)
        ours = [entry for entry in entries if entry.get("triton") == triton.__version__]
        return {Shape(**entry["shape"]): Config(**entry["config"]) for entry in ours}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{file} is left out, `python -m fastrnn tune` writes it anew: {error}", stacklevel=2)
        return {}


def save() -> None:
    """Writes what is in `tuned()`, at once or not at all; RuntimeError where there is no place for it."""
    target = path()
    if target is None:
        raise RuntimeError("there is no home folder to keep tuned configurations in: set FASTRNN_TUNED")
    ours = triton.__version__
    entries = [
        {"triton": ours, "shape": asdict(shape), "config": asdict(config)}
        for shape, config in tuned().items()
    ]
    with contextlib.suppress(
        OSError, ValueError, TypeError, AttributeError
    ):  # what cannot be read is written anew
        entries += [entry for entry in written(target) if entry.get("triton", ours) != ours]
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(entries, indent=1) + "\n")
    fresh.replace(target)

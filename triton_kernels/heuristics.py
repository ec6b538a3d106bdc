"""Which kernel a call takes and in what tiles: fixed by sizes, type and architecture, so that nothing is
tried out at a first call. tests/test_triton.py compiles every configuration and holds its shared memory and
registers against the architectures' limits."""

from __future__ import annotations

from dataclasses import dataclass

from .cells import TRAITS


@dataclass(frozen=True)
class Config:
    """kernel: "scan", one launch with R on the chip, or "step", a launch a step and stage. block_b sequences
    and block_u units (in a scan all of a head's) a program; block_k: the piece of a product's sum that is
    loaded at once (in a scan all of h, padded)."""

    kernel: str
    block_b: int
    block_u: int
    block_k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        tiles = f"{self.block_b} sequences x {self.block_u} units"
        return f"{tiles}, {self.warps} warps" + (f", K by {self.block_k}" if self.kernel == "step" else "")


# Bytes of R, padded, up to which a scan keeps it on the chip: with its other tiles it takes a little more of
# the 227 KB of shared memory that a block may have at compute capability 9.0 and 10.x, 163 KB at 8.0, and
# 99 KB at 8.6, 8.9 and 12.x. Beyond FEW_WARPS four warps would spill registers.
LARGE, SMALL, FEW_WARPS = 128 << 10, 64 << 10, 32 << 10
LARGE_CAPABILITIES = (80, 87, 90, 100, 101, 103)


def padded(n: int) -> int:
    """The power of two that holds n; a product's sides are at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def resident_limit(capability: int | None) -> int:
    """capability: major * 10 + minor of an NVIDIA GPU; None for others."""
    return LARGE if capability in LARGE_CAPABILITIES else SMALL


def configure(
    cell: str, H: int, P: int, B: int, itemsize: int, projected: bool, capability: int | None
) -> Config:
    """For a head of H units and P columns of h, B sequences, elements of itemsize bytes."""
    # A projection's product of 16 columns would not go by tensor cores, but by registers that are not there.
    block_h, block_p = padded(H), max(padded(P), 32 if projected else 16)
    # float32 takes its size twice: 3xTF32 cuts each number into two parts.
    size = (TRAITS[cell].gates + projected) * block_h * block_p * itemsize * (2 if itemsize == 4 else 1)
    if size <= resident_limit(capability):
        return Config("scan", 16, block_h, block_p, 4 if size <= FEW_WARPS else 8, 1)
    # Of few units a program: more programs share the reading of R. In between, of 32 sequences, registers do
    # not hold the tiles. Pieces are loaded two ahead where there is shared memory for them.
    block_b, warps = (16, 4) if B <= 32 else (64, 8)
    return Config("step", block_b, 32, 32, warps, 3 if capability in LARGE_CAPABILITIES else 2)

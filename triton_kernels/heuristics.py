"""Which kernel a call takes and in what tiles: fixed by sizes, type and architecture, so that nothing is tried
out at a first call. tests/test_triton_compiled.py compiles every configuration and holds its shared memory and
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


# Bytes of R, padded to powers of two, up to which a scan keeps it on the chip. Blocks of these architectures
# have 99 KB of shared memory (compute capability 8.6, 8.9, 12.x), 163 KB (8.0) or 227 KB (9.0, 10.x); float32
# needs twice its own size there, for the two parts into which 3xTF32 cuts a number.
SMALL, LARGE = 64 << 10, 128 << 10


def padded(n: int) -> int:
    """The power of two that holds n; a product's sides are at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def resident_limit(capability: int | None) -> int:
    """capability: major * 10 + minor of an NVIDIA GPU; None for others."""
    return LARGE if capability in (80, 90, 100, 103) else SMALL


def configure(
    cell: str, H: int, P: int, B: int, itemsize: int, projected: bool, capability: int | None
) -> Config:
    """For a head of H units and P columns of h, B sequences, elements of itemsize bytes."""
    gates = TRAITS[cell].gates
    block_h, block_p = padded(H), padded(P)
    size = (gates + projected) * block_h * block_p * itemsize * (2 if itemsize == 4 else 1)
    if size <= resident_limit(capability) and max(block_h, block_p) <= 128:
        return Config("scan", 16, block_h, block_p, 4 if max(block_h, block_p) <= 64 else 8, 1)
    block_b = min(64, padded(B))
    # Few units a program: more programs share the read of R.
    return Config("step", block_b, 32 if block_b <= 32 else 64, 64 if itemsize == 2 else 32, 4, 3)

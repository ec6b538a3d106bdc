"""How a layer's sequences and states lie: packed or padded, by layer and direction.

Dimensions as in `modules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def batch_size(batch_sizes: Tensor, unsorted: Tensor | None, hx: Sequence[Tensor] | None) -> Any:
    """B of a PackedSequence. A trace follows the tensor; the compiler cannot read it, but knows its shape."""
    if torch._C._get_tracing_state() is not None:
        return batch_sizes[0]
    if torch.compiler.is_compiling():
        if unsorted is not None:
            return unsorted.size(0)
        if hx is not None:
            return hx[0].size(1)
    return int(batch_sizes[0])


def padded(seq: Tensor, batch_sizes: Tensor, unsorted: Tensor | None, B: int) -> Tensor:
    """Packed [K, N, H] to padded [K, T, B, H] in the caller's order, zero past each end."""
    sizes = batch_sizes.to(seq.device)
    columns = torch.arange(B, device=seq.device) if unsorted is None else unsorted
    first_row = sizes.cumsum(0) - sizes
    held = columns[None, :] < sizes[:, None]  # [T, B]
    rows = torch.where(held, first_row[:, None] + columns[None, :], 0)
    dense = seq.index_select(1, rows.flatten()).reshape(seq.size(0), -1, B, seq.size(2))
    return torch.where(held[None, :, :, None], dense, torch.zeros((), dtype=seq.dtype, device=seq.device))


def by_layer(states: tuple[Tensor, ...], L: int, D: int) -> list[tuple[Tensor, ...]]:
    """States [L*D, B, .] as each layer's [D, B, .]."""
    if L == 1:
        return [states]
    return list(zip(*(torch.split(s, D) for s in states), strict=True))


def by_direction(y: Tensor, D: int) -> Tensor:
    """A layer's output [.., D*P] as its hidden states [D, .., P]."""
    return y.unsqueeze(0) if D == 1 else y.reshape(*y.shape[:-1], D, -1).movedim(-2, 0)

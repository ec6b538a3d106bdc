"""The decoder beside the same as a Python loop over torch.nn's cells and torch operations, and attention
beside torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench import rivals
from fastrnn.bench.grid import MODES, Case, Shape
from fastrnn.bench.machine import CpuClock
from fastrnn.bench.records import Probe, standard_error

# As many queries, or steps, as there is memory; I is the memory's width too.
DECODER, ATTENTION = Shape(50, 32, 256, 256), Shape(512, 8, 64, 64)
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
SECONDS = 3.0

Function = Callable[[Tensor, Tensor], Tensor]


class Loop(nn.Module):
    """Luong's decoder with input feeding and the textbook's attention, as one writes it, on our weights."""

    def __init__(self, ours: fastrnn.AttentionDecoder) -> None:
        super().__init__()
        self.cell = CELLS[ours.cell](ours.input_size + ours.hidden_size, ours.hidden_size)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.cell, name, getattr(ours, f"{name}_l0"))
        self.weight_c = ours.weight_c

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        a = x.new_zeros(x.shape[1], self.cell.hidden_size)
        m, state, outputs = memory.transpose(0, 1), None, []  # [B, S, M]
        for x_t in x:
            state = self.cell(torch.cat([x_t, a], -1), state)
            h = state[0] if isinstance(state, tuple) else state
            weights = torch.bmm(m, h[:, :, None])[:, :, 0].softmax(-1)
            context = torch.bmm(weights[:, None], m)[:, 0]
            a = nn.functional.linear(torch.cat([context, h], -1), self.weight_c).tanh()
            outputs.append(a)
        return torch.stack(outputs)


def plain_attention(query: Tensor, memory: Tensor) -> Tensor:
    q, m = query.transpose(0, 1)[:, None], memory.transpose(0, 1)[:, None]  # [B, 1, ., H]
    out: Tensor = nn.functional.scaled_dot_product_attention(q, m, m, scale=1.0)
    return out[:, 0].transpose(0, 1)


def calls(case: Case, functions: dict[str, Function], leaves: list[Tensor]) -> dict[str, rivals.Call]:
    """Forward alone, or with the gradients of query or inputs, memory and `leaves`; all agree."""
    shape = case.shape
    torch.manual_seed(1)
    x, memory = (0.3 * torch.randn(shape.T, shape.B, width) for width in (shape.I, shape.H))
    leaves = [x, memory, *leaves]
    training = case.mode == "training"
    for leaf in leaves:
        leaf.requires_grad_(training)

    def call(function: Function) -> list[Tensor]:
        with torch.set_grad_enabled(training):
            y = function(x, memory)
            return [y.detach(), *(torch.autograd.grad(y.sum(), leaves) if training else ())]

    ours, theirs = (call(function) for function in functions.values())
    for a, b in zip(ours, theirs, strict=True):
        error = float((a - b).norm() / b.norm())
        assert error <= rivals.TOLERANCE["float32"], f"{case.id}: they disagree by {error:.2g}"
    return {name: lambda f=function: call(f) for name, function in functions.items()}


def probe(
    section: str, case: Case, functions: dict[str, Function], leaves: list[Tensor], seconds: float
) -> Probe:
    both, clock = calls(case, functions, leaves), CpuClock()
    samples = rivals.alternate(both, seconds)
    ours, theirs = (samples[name] for name in functions)
    error = standard_error(theirs, ours)
    return Probe(section, case, statistics.median(ours), statistics.median(theirs), clock.read(), error)


def decoder(cells: tuple[str, ...], shape: Shape = DECODER, seconds: float = SECONDS) -> list[Probe]:
    """Teacher forcing, forward and in training: seconds of a call, ours and the loop's."""
    probes = []
    for cell, mode in product(cells, MODES):
        torch.manual_seed(0)
        ours = fastrnn.AttentionDecoder(shape.I, shape.H, shape.H, cell=cell)
        functions: dict[str, Function] = {
            rivals.OURS: lambda x, memory, ours=ours: ours(x, memory)[0],  # type: ignore[misc]
            rivals.TORCH: Loop(ours),
        }
        probes.append(probe("decoder", Case(cell, mode, shape), functions, list(ours.parameters()), seconds))
    return probes


def attention(cells: tuple[str, ...], shape: Shape = ATTENTION, seconds: float = SECONDS) -> list[Probe]:
    """Dot scores, no weights wanted: seconds of a call, ours and scaled_dot_product_attention's."""
    attend = fastrnn.Attention(shape.H)
    functions: dict[str, Function] = {
        rivals.OURS: lambda query, memory: attend(query, memory, need_weights=False)[0],
        rivals.TORCH: plain_attention,
    }
    return [probe("attention", Case("dot", mode, shape), functions, [], seconds) for mode in MODES]

"""Why gates, initial values and clipping exist: how far back a gradient reaches, and how large it gets.

    python -m examples.vanishing                # seconds

The norm of the loss's gradient by the state of each of 200 steps, as `fastrnn.diagnostics.gradient_flow` has
it, for untrained cells of each kind with three initial values: torch.nn's, orthogonal recurrent weights, and
orthogonal ones with biases that keep the state (chrono; a vanilla cell has no such gate). Then a vanilla cell
whose gradients explode, trained with and without clipping.

Expected: with torch.nn's values a gradient vanishes in the LSTM and the GRU too, by more than a quarter a
step (their gates begin half closed), and orthogonal weights alone are no cure for them. With chrono biases a
twentieth or more of it is left after 200 steps. The exploding cell learns with clipping, and not without.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastrnn
from fastrnn.diagnostics import gradient_flow
from fastrnn.init import chrono_, orthogonal_

from . import common

T, B, I, H = 200, 8, 16, 64
GAIN = 1.6  # of the orthogonal weights that explode
TORCH, ORTHOGONAL, CHRONO = "torch.nn's", "orthogonal", "orthogonal, chrono"
EXPLODING = f"orthogonal times {GAIN}"
STYLES = {TORCH: "C0--", ORTHOGONAL: "C1-.", CHRONO: "C2-", EXPLODING: "C3-"}
CURVES = {
    "vanilla tanh": {
        TORCH: lambda: fastrnn.RNN(I, H),
        ORTHOGONAL: lambda: orthogonal_(fastrnn.RNN(I, H)),
        EXPLODING: lambda: orthogonal_(fastrnn.RNN(I, H), GAIN),
    },
    "LSTM": {
        TORCH: lambda: fastrnn.LSTM(I, H),
        ORTHOGONAL: lambda: orthogonal_(fastrnn.LSTM(I, H)),
        CHRONO: lambda: chrono_(orthogonal_(fastrnn.LSTM(I, H)), T),
    },
    "GRU": {
        TORCH: lambda: fastrnn.GRU(I, H),
        ORTHOGONAL: lambda: orthogonal_(fastrnn.GRU(I, H)),
        CHRONO: lambda: chrono_(orthogonal_(fastrnn.GRU(I, H)), T),
    },
}


def kept(layer: nn.Module) -> Tensor:
    """The gradient of the last output's sum by each state, over the last state's: [T], lag 0 first."""
    # float64: a vanilla cell's gradients leave the range of float32.
    flow = gradient_flow(layer.double(), torch.randn(T, B, I, dtype=torch.double))
    return flow.norms_state.flip(0) / flow.norms_state[-1]


def echo(steps: int, clip: float) -> tuple[list[float], list[float]]:
    """Trains the exploding cell to say what it heard a step ago: norms before clipping, losses."""
    torch.manual_seed(common.SEED)
    layer, head = orthogonal_(fastrnn.RNN(I, H), GAIN), nn.Linear(H, I)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    norms, losses = [], []
    for _ in range(steps):
        x = torch.randn(T, 2 * B, I)
        loss = nn.functional.mse_loss(head(layer(x)[0][1:]), x[:-1])
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, clip).item())
        losses.append(loss.item())
        optimizer.step()
    return norms, losses


def picture(
    path: Path, curves: dict[str, dict[str, Tensor]], training: dict[str, tuple[list[float], list[float]]]
) -> None:
    figure = Figure(figsize=(9, 7))
    axes = figure.subplots(2, 2)
    for ax, (cell, named) in zip(axes.flat, curves.items(), strict=False):
        for name, values in named.items():
            ax.semilogy(values, STYLES[name], label=name)
        ax.set(title=cell, xlabel="lag in steps", ylabel="gradient, over that at lag 0", ylim=(1e-60, 1e15))
        ax.legend(title="initial values", loc="lower left", fontsize=8, title_fontsize=8)
        ax.grid(alpha=0.3)
    ax = axes[1, 1]
    for (name, (norms, losses)), style in zip(training.items(), ("C3--", "C4-"), strict=True):
        ax.semilogy(norms, style, label=f"{name}: the loss ends at {losses[-1]:.2f}")
    ax.set(
        title=f"vanilla, orthogonal times {GAIN}, trained",
        xlabel="update",
        ylabel="norm of the whole gradient",
    )
    ax.legend(loc="upper right", fontsize=8)
    ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def vanishing(quick: bool, out: Path) -> list[common.Figure]:
    curves = {cell: {name: kept(make()) for name, make in named.items()} for cell, named in CURVES.items()}
    for cell, named in curves.items():
        for name, values in named.items():
            rate = float(values[-1]) ** (1 / (T - 1))
            print(f"{cell:13s} {name:22s} after {T - 1} steps {values[-1]:.1e}, {rate:.3f} a step")
    steps = 100 if quick else 300
    training = {"no clipping": echo(steps, float("inf")), "clipped to 1": echo(steps, 1.0)}
    for name, (norms, losses) in training.items():
        print(f"{name}: the gradient's norm {norms[0]:.1e}, then {norms[-1]:.1e}; loss {losses[-1]:.3f}")
    picture(out / "vanishing.png", curves, training)

    def left(what: str, cell: str, name: str, expected: float, at_most: bool = False) -> common.Figure:
        return common.Figure(what, float(curves[cell][name][-1]), expected, at_most, percent=False)

    def loss(what: str, name: str, expected: float, at_most: bool = False) -> common.Figure:
        return common.Figure(what, sum(training[name][1][-10:]) / 10, expected, at_most, percent=False)

    return [
        left("vanilla, torch.nn's: gradient left", "vanilla tanh", TORCH, 1e-40, at_most=True),
        left("LSTM, torch.nn's: gradient left", "LSTM", TORCH, 1e-30, at_most=True),
        left("GRU, torch.nn's: gradient left", "GRU", TORCH, 1e-30, at_most=True),
        left("vanilla, orthogonal: gradient left", "vanilla tanh", ORTHOGONAL, 1e-20),
        left("LSTM, orthogonal: gradient left", "LSTM", ORTHOGONAL, 1e-20, at_most=True),
        left("GRU, orthogonal: gradient left", "GRU", ORTHOGONAL, 1e-20, at_most=True),
        left("LSTM, orthogonal and chrono: gradient left", "LSTM", CHRONO, 0.05),
        left("GRU, orthogonal and chrono: gradient left", "GRU", CHRONO, 0.05),
        left(f"vanilla, {EXPLODING}: gradient grown to", "vanilla tanh", EXPLODING, 1e3),
        loss("trained without clipping: mean squared error", "no clipping", 0.7),
        loss(
            "trained with clipping: mean squared error", "clipped to 1", 0.4 if quick else 0.15, at_most=True
        ),
    ]


if __name__ == "__main__":
    sys.exit(common.main("vanishing", vanishing, __doc__))

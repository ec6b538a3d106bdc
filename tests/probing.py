"""What the probes of docs/compatibility.md share: their list, and the truth they are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastrnn

KINDS = ("LSTM", "GRU", "RNN")
LIBRARIES = {"torch.nn": nn, "fastrnn": fastrnn}
T, B, I, H = 6, 3, 4, 5
F64 = torch.float64


class Probe(NamedTuple):
    group: str
    title: str
    run: Callable[[Any, str], None]
    kinds: tuple[str, ...]
    slow: bool


class Wrong(Exception):
    """It ran, and did not do the right thing; the text says what it did."""


PROBES: dict[str, Probe] = {}


def probe(
    group: str, title: str, kinds: tuple[str, ...] = KINDS, slow: bool = False
) -> Callable[[Callable[[Any, str], None]], Callable[[Any, str], None]]:
    def register(run: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
        PROBES[run.__name__] = Probe(group, title, run, kinds, slow)
        return run

    return register


# --- the truth


def step(kind: str, gx: Tensor, state: tuple[Tensor, ...], r: Tensor, c: Tensor, after: bool) -> Any:
    h = state[0]
    if kind == "LSTM":
        i, f, g, o = (gx + h @ r.T + c).chunk(4, -1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
    if kind == "RNN":
        return ((gx + h @ r.T + c).tanh(),)
    n = h.shape[-1]
    reset, z = (gx[..., : 2 * n] + h @ r[: 2 * n].T + c[: 2 * n]).sigmoid().chunk(2, -1)
    inner = reset * (h @ r[2 * n :].T + c[2 * n :]) if after else (reset * h) @ r[2 * n :].T + c[2 * n :]
    return ((1 - z) * (gx[..., 2 * n :] + inner).tanh() + z * h,)


def plain(kind: str, weights: dict[str, Tensor], x: Tensor, reset: Any = None, after: bool = True) -> Any:
    """(y [T, B, H], the last states [B, H], all states [T, B, H]) of one layer in one direction."""
    w, r, b, c = (weights[f"{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    state = (x.new_zeros(*x.shape[1:-1], r.shape[1]),) * (2 if kind == "LSTM" else 1)
    steps = []
    for t, v in enumerate(x):
        if reset is not None:
            state = tuple(torch.where(reset[t][:, None], 0.0, s) for s in state)
        state = step(kind, v @ w.T + b, state, r, c, after)
        steps.append(state)
    sequences = tuple(torch.stack(s) for s in zip(*steps, strict=True))
    return sequences[0], state, sequences


def make(library: Any, kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(library, kind)(I, H, **options)


def wide(layer: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double() for n, p in layer.named_parameters()}


def example(time: int = T, batch: int = B, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(time * 100 + batch)
    return torch.randn(time, batch, I, generator=g).to(dtype)


def same(ours: Tensor, truth: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    if ours.shape != truth.shape:
        raise Wrong(f"wrong result: shape {list(ours.shape)} for {list(truth.shape)}")
    error = (ours.detach().to(truth.dtype) - truth.detach()).abs()
    if not (error <= atol + rtol * truth.abs()).all():
        raise Wrong(f"wrong result: off by up to {error.max().item():.1e}")


def trained(
    y: Tensor, layer: nn.Module, kind: str, x: Tensor, rtol: float = 1e-4, atol: float = 1e-4
) -> None:
    """y and the parameters' gradients of its sum of squares are right."""
    weights = {n: p.requires_grad_() for n, p in wide(layer).items()}
    truth = plain(kind, weights, x.double())[0]
    same(y, truth, rtol, atol)
    theirs = torch.autograd.grad(truth.square().sum(), list(weights.values()))
    for a, b in zip(
        torch.autograd.grad(y.double().square().sum(), list(layer.parameters())), theirs, strict=True
    ):
        same(a, b, rtol, atol)


def expect(error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any], else_: str) -> None:
    try:
        call()
    except error:
        return
    raise Wrong(else_)

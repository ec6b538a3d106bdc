"""Initial values for recurrent layers, in place, as torch.nn.init has them for tensors.

Each function takes one of fastrnn's or torch.nn's recurrent layers or cells, changes the parameters of all
its layers and directions, and returns it. torch.nn's defaults, U(-1/sqrt(H), 1/sqrt(H)) for all, are
`layer.reset_parameters()`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_FORGET = {"LSTM": 1, "GRU": 1}  # the gate whose sigmoid keeps the state: f, and z, which keeps h


def _kind(layer: torch.nn.Module, kinds: tuple[str, ...], what: str) -> str:
    """LSTM, GRU or RNN; a TypeError where `what` is for others."""
    name = next(
        (c.__name__ for c in type(layer).__mro__ if re.fullmatch(r"(LSTM|GRU|RNN)(Cell)?", c.__name__)), ""
    )
    kind = name.removesuffix("Cell")
    if kind not in kinds:
        raise TypeError(f"{what} takes an {', '.join(kinds)} layer or cell, got {type(layer).__name__}")
    return kind


def _parameters(layer: torch.nn.Module, name: str) -> Iterator[Tensor]:
    """Those whose names begin so: weight_ih_l0, weight_ih_l0_reverse ..., or a cell's weight_ih."""
    for key, p in layer.named_parameters(recurse=False):
        if re.fullmatch(rf"{name}(_l\d+(_reverse)?)?", key):
            yield p


def _gate(p: Tensor, kind: str, gate: int) -> Tensor:
    """Its rows of a weight or bias."""
    return p.detach().chunk(_GATES[kind])[gate]


@torch.no_grad()
def orthogonal_(layer: torch.nn.Module, gain: float = 1.0) -> torch.nn.Module:
    """Makes each gate's block of weight_hh, [H, H] (with a projection [H, P]), orthogonal times gain, so that
    what goes back through it keeps its norm (Saxe et al. 2014, arXiv:1312.6120).

    Raises TypeError for anything but an LSTM, GRU or RNN layer or cell.
    """
    kind = _kind(layer, ("LSTM", "GRU", "RNN"), "orthogonal_")
    for p in _parameters(layer, "weight_hh"):
        for gate in range(_GATES[kind]):
            torch.nn.init.orthogonal_(_gate(p, kind, gate), gain)
    return layer


@torch.no_grad()
def identity_(layer: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    """weight_hh = scale times the identity and biases of zero: with nonlinearity="relu" the IRNN (Le, Jaitly
    and Hinton 2015, arXiv:1504.00941), which at first hands on its state as it is.

    Raises TypeError for anything but an RNN layer or cell.
    """
    _kind(layer, ("RNN",), "identity_")
    for p in _parameters(layer, "weight_hh"):
        torch.nn.init.eye_(p).mul_(scale)
    for p in _parameters(layer, "bias_[ih]h"):
        p.zero_()
    return layer


@torch.no_grad()
def forget_bias_(layer: torch.nn.Module, value: float = 1.0) -> torch.nn.Module:
    """The bias of an LSTM's forget gate, bias_ih and bias_hh together: with 1 or more its sigmoid begins
    open, and c is kept (Gers et al. 2000; Jozefowicz et al. 2015). value: before the sigmoid.

    Raises TypeError for anything but an LSTM layer or cell, ValueError for one without biases.
    """
    _kind(layer, ("LSTM",), "forget_bias_")
    _biases(layer, "forget_bias_")
    for p in _parameters(layer, "bias_ih"):
        _gate(p, "LSTM", _FORGET["LSTM"]).fill_(value)
    for p in _parameters(layer, "bias_hh"):
        _gate(p, "LSTM", _FORGET["LSTM"]).zero_()
    return layer


@torch.no_grad()
def chrono_(layer: torch.nn.Module, t_max: int) -> torch.nn.Module:
    """Biases for dependencies of up to t_max steps (Tallec and Ollivier 2018, arXiv:1804.11188): an LSTM's
    forget gate ln(u), u of U(1, t_max - 1), and its input gate the negative of it; a GRU's z, which keeps h,
    ln(u). These gates' biases are bias_ih and bias_hh together.

    Raises TypeError for anything but an LSTM or GRU layer or cell, ValueError for one without biases and for
    t_max below 2.
    """
    kind = _kind(layer, ("LSTM", "GRU"), "chrono_")
    if t_max < 2:
        raise ValueError(f"chrono_: t_max must be at least 2 steps, got {t_max}")
    _biases(layer, "chrono_")
    for ih, hh in zip(_parameters(layer, "bias_ih"), _parameters(layer, "bias_hh"), strict=True):
        keeps = _gate(ih, kind, _FORGET[kind])
        torch.nn.init.uniform_(keeps, 1, max(1.0, t_max - 1)).log_()
        _gate(hh, kind, _FORGET[kind]).zero_()
        if kind == "LSTM":
            _gate(ih, kind, 0).copy_(-keeps)
            _gate(hh, kind, 0).zero_()
    return layer


@torch.no_grad()
def recommended_(layer: torch.nn.Module) -> torch.nn.Module:
    """What usually trains well: weight_ih by Glorot and Bengio 2010 gate by gate, weight_hh orthogonal,
    biases of zero, an LSTM's forget gate 1; a projection stays as it is. An RNN with relu gets the identity.

    Raises TypeError for anything but an LSTM, GRU or RNN layer or cell.
    """
    kind = _kind(layer, ("LSTM", "GRU", "RNN"), "recommended_")
    for p in _parameters(layer, "weight_ih"):
        for gate in range(_GATES[kind]):
            torch.nn.init.xavier_uniform_(_gate(p, kind, gate))
    for p in _parameters(layer, "bias_[ih]h"):
        p.zero_()
    if kind == "RNN" and getattr(layer, "nonlinearity", "tanh") == "relu":
        return identity_(layer)
    orthogonal_(layer)
    if kind == "LSTM" and next(_parameters(layer, "bias_ih"), None) is not None:
        forget_bias_(layer)
    return layer


def _biases(layer: torch.nn.Module, what: str) -> None:
    if next(_parameters(layer, "bias_ih"), None) is None:
        raise ValueError(f"{what} sets biases, and this {type(layer).__name__} has none (bias=False)")

"""Initial values for recurrent layers, in place, as torch.nn.init has them for tensors.

Each function takes one of fastrnn's or torch.nn's recurrent layers or cells, changes the parameters of all
its layers and directions, and returns it. Where one to be set is computed from others (parametrized, pruned)
it raises TypeError, and changes nothing. torch.nn's defaults, U(-1/sqrt(H), 1/sqrt(H)) for all, are
`layer.reset_parameters()`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.modules import rnn as torch_rnn

from . import _checks, cells, modules

_KINDS = {
    "LSTM": (modules.LSTM, cells.LSTMCell, torch_rnn.LSTM, torch_rnn.LSTMCell),
    "GRU": (modules.GRU, cells.GRUCell, torch_rnn.GRU, torch_rnn.GRUCell),
    "RNN": (modules.RNN, cells.RNNCell, torch_rnn.RNN, torch_rnn.RNNCell),
}
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_FORGET = {"LSTM": 1, "GRU": 1}  # the gate whose sigmoid keeps the state: f, and z, which keeps h


def _kind(layer: torch.nn.Module, kinds: tuple[str, ...], what: str) -> str:
    """LSTM, GRU or RNN; a TypeError where `what` is for others."""
    for kind in kinds:
        if isinstance(layer, _KINDS[kind]):
            return kind
    raise TypeError(
        f"{what} takes an {', '.join(kinds)} layer or cell of fastrnn or torch.nn, got {type(layer).__name__}"
    )


def _parameters(layer: torch.nn.Module, what: str, beginning: str) -> list[Tensor]:
    """Those whose names begin so: weight_ih_l0, weight_ih_l0_reverse ..., or a cell's weight_ih.

    Raises TypeError for one that is computed from others, which a change in place would not reach.
    """
    if isinstance(layer, torch_rnn.RNNBase):
        names = layer._flat_weights_names
    else:
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if layer.bias else [])]
    found: list[Tensor] = []
    for name in names:
        if name.startswith(beginning):
            p = layer._parameters.get(name)
            if p is None:
                raise TypeError(
                    f"{what} cannot set {name} of this {type(layer).__name__}, which is no parameter of it "
                    "(parametrized, weight-normed or pruned?): initialise the layer before that"
                )
            found.append(p)
    return found


def _real(layer: torch.nn.Module, what: str) -> None:
    if any(p.is_complex() for p in layer.parameters()):
        raise TypeError(f"{what} draws real numbers, and this {type(layer).__name__} is complex")


def _drawn(p: Tensor) -> Tensor:
    """Like p, to be filled, of float32 at least: neither QR nor the logarithm's argument is for 16 bits."""
    return torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


def _gate(p: Tensor, kind: str, gate: int) -> Tensor:
    """Its rows of a weight or bias."""
    return p.detach().chunk(_GATES[kind])[gate]


@torch.no_grad()
def orthogonal_(layer: torch.nn.Module, gain: float = 1.0) -> torch.nn.Module:
    """Makes each gate's block of weight_hh, [H, H] (with a projection [H, P]), orthogonal times gain, so that
    what goes back through it keeps its norm (Saxe et al. 2014, arXiv:1312.6120).

    Raises TypeError for anything but a real LSTM, GRU or RNN layer or cell.
    """
    kind = _kind(layer, ("LSTM", "GRU", "RNN"), "orthogonal_")
    _real(layer, "orthogonal_")
    for p in _parameters(layer, "orthogonal_", "weight_hh"):
        for gate in range(_GATES[kind]):
            block = _gate(p, kind, gate)
            block.copy_(torch.nn.init.orthogonal_(_drawn(block), gain))
    return layer


@torch.no_grad()
def identity_(layer: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    """weight_hh = scale times the identity and biases of zero: with nonlinearity="relu" the IRNN (Le, Jaitly
    and Hinton 2015, arXiv:1504.00941), which at first hands on its state as it is.

    Raises TypeError for anything but an RNN layer or cell.
    """
    _kind(layer, ("RNN",), "identity_")
    _checks.finite("scale", scale)
    weights, biases = (_parameters(layer, "identity_", name) for name in ("weight_hh", "bias_"))
    for p in weights:
        torch.nn.init.eye_(p).mul_(scale)
    for p in biases:
        p.zero_()
    return layer


@torch.no_grad()
def forget_bias_(layer: torch.nn.Module, value: float = 1.0) -> torch.nn.Module:
    """The bias of an LSTM's forget gate, bias_ih and bias_hh together: with 1 or more its sigmoid begins
    open, and c is kept (Gers et al. 2000; Jozefowicz et al. 2015). value: before the sigmoid.

    Raises TypeError for anything but an LSTM layer or cell, ValueError for one without biases.
    """
    _kind(layer, ("LSTM",), "forget_bias_")
    for ih, hh in _biases(layer, "forget_bias_"):
        _gate(ih, "LSTM", _FORGET["LSTM"]).fill_(value)
        _gate(hh, "LSTM", _FORGET["LSTM"]).zero_()
    return layer


@torch.no_grad()
def chrono_(layer: torch.nn.Module, t_max: int) -> torch.nn.Module:
    """Biases for dependencies of up to t_max steps (Tallec and Ollivier 2018, arXiv:1804.11188): an LSTM's
    forget gate ln(u), u of U(1, t_max - 1), and its input gate the negative of it; a GRU's z, which keeps h,
    ln(u). These gates' biases are bias_ih and bias_hh together.

    Raises TypeError for anything but a real LSTM or GRU layer or cell, ValueError for one without biases and
    for a t_max that is below 2 or not finite.
    """
    kind = _kind(layer, ("LSTM", "GRU"), "chrono_")
    if not (t_max >= 2 and math.isfinite(t_max)):
        raise ValueError(f"chrono_: t_max must be at least 2 steps, got {t_max}")
    _real(layer, "chrono_")
    for ih, hh in _biases(layer, "chrono_"):
        keeps = _gate(ih, kind, _FORGET[kind])
        keeps.copy_(_drawn(keeps).uniform_(1, t_max - 1).log_())
        _gate(hh, kind, _FORGET[kind]).zero_()
        if kind == "LSTM":
            _gate(ih, kind, 0).copy_(-keeps)
            _gate(hh, kind, 0).zero_()
    return layer


@torch.no_grad()
def recommended_(layer: torch.nn.Module) -> torch.nn.Module:
    """What usually trains well: weight_ih by Glorot and Bengio 2010 gate by gate, weight_hh orthogonal,
    biases of zero, an LSTM's forget gate 1; a projection stays as it is. An RNN with relu gets the identity.

    It is no cure for long lags: gates that begin at 1/2, or at sigmoid(1) = 0.73, keep next to nothing for
    some dozens of steps. `chrono_` is one, for LSTM and GRU.
    Raises TypeError for anything but a real LSTM, GRU or RNN layer or cell.
    """
    kind = _kind(layer, ("LSTM", "GRU", "RNN"), "recommended_")
    _real(layer, "recommended_")
    weights, biases, _ = (
        _parameters(layer, "recommended_", name) for name in ("weight_ih", "bias_", "weight_hh")
    )
    for p in weights:
        for gate in range(_GATES[kind]):
            torch.nn.init.xavier_uniform_(_gate(p, kind, gate))
    for p in biases:
        p.zero_()
    if kind == "RNN" and getattr(layer, "nonlinearity", "tanh") == "relu":
        return identity_(layer)
    orthogonal_(layer)
    if kind == "LSTM" and biases:
        forget_bias_(layer)
    return layer


def _biases(layer: torch.nn.Module, what: str) -> list[tuple[Tensor, Tensor]]:
    """bias_ih and bias_hh of each layer and direction."""
    ih, hh = (_parameters(layer, what, name) for name in ("bias_ih", "bias_hh"))
    if not ih:
        raise ValueError(f"{what} sets biases, and this {type(layer).__name__} has none (bias=False)")
    return list(zip(ih, hh, strict=True))

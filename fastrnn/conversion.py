"""Whole models from torch.nn's recurrent layers to ours, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils import parametrize

from . import _checks
from .cells import GRUCell, LSTMCell, RNNCell
from .inference import Packed
from .modules import GRU, LSTM, OWN, RNN, _Layer

_M = TypeVar("_M", bound=torch.nn.Module)

_OURS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    kind._torch: kind for kind in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
}


def _class_of(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class that was written; torch gives a parametrized module a class of its own."""
    kind: type[torch.nn.Module] = parametrize.type_before_parametrizations(module)
    return kind


def _become(module: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    """Makes the module a `kind`. The object stays, and with it all that refers to it: parents that share it,
    optimizers, the handles of its hooks."""
    module.__class__ = kind
    if parametrize.is_parametrized(module):
        parametrize._inject_new_class(module)
        for name in module.parametrizations:  # type: ignore[union-attr]
            parametrize._inject_property(module, name)


def convert(model: _M) -> _M:
    """Turns every torch.nn.LSTM, GRU, RNN and their cells inside the model into fastrnn's, in place.

    model    any module, or a bare layer; parametrized layers are converted. A user's subclasses of torch.nn's
             layers are left alone (their own `forward` would be lost), and so is a layer to which a program
             has given a `forward` of its own, which may hold on to the class's
    returns  the model itself. Every layer stays the same object with the very same Parameters, so that
             optimizers, sharing, hooks and flags go on

    Raises TypeError where the model is no module.
    """
    for module in _checks.is_module(model).modules():
        ours = _OURS.get(_class_of(module))
        if ours is not None and "forward" not in module.__dict__:
            if isinstance(module, torch_rnn.RNNBase):
                # What torch does before a call, where its list lags behind.
                renew: Callable[[], None] = module._update_flat_weights
                renew()
            _become(module, ours)
            if isinstance(module, _Layer):
                module._flat_weights = module._flat_weights  # so that it sees weights that are no Parameters
    return model


def revert(model: _M) -> _M:
    """The way back: every fastrnn layer and cell inside the model becomes torch.nn's, in place, but for one
    with a `forward` of its own, see `convert`.

    Raises ValueError that names the module where an option has no equal in torch.nn, before any is changed;
    TypeError where the model is no module.
    """
    found = []
    for name, module in _checks.is_module(model).named_modules():
        ours = _class_of(module) in _OURS.values() or isinstance(module, Packed)
        if ours and "forward" not in module.__dict__:
            try:
                found.append((module, module._torch_class()))  # type: ignore[operator]
            except ValueError as error:
                raise ValueError(f"{name or 'the model'}: {error}") from None
    for module, kind in found:
        for option in OWN:
            module.__dict__.pop(option, None)
        _become(module, kind)
        if isinstance(module, torch_rnn.RNNBase):
            module.flatten_parameters()  # for cuDNN; ours had nothing to do
    return model

"""LSTMCell, GRUCell and RNNCell: one fused step, standing in for torch.nn's cells.

Dimensions: B batch, I input, H hidden, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules import rnn as torch_rnn

from . import _checks, functional, kernels, ops
from ._fx import leaf_call, traced
from .modules import as_torch
from .reference import CELLS

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
# Of what nobody else has: to autograd the result is no view.
_unsafe_view = torch.ops.aten._unsafe_view.default


class _Cell(torch_rnn.RNNCellBase):
    """What the three cells share."""

    # torch.nn's, captured at import: programs rebind torch.nn.LSTMCell to fastrnn.LSTMCell.
    _torch: type[torch_rnn.RNNCellBase]
    _two = False  # whether the state is (h, c)

    @property
    def _cell(self) -> str:
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Tensor | Sequence[Tensor] | None = None) -> Any:
        """The state after one step; arguments, shapes and errors are the class's."""
        states: Any = hx if hx is None or self._two else (hx,)
        found: Sequence[Tensor] | None = self._streamed(input, states)
        if found is None:
            proxy = traced(input, hx)
            if proxy is not None:
                return leaf_call(self, proxy, (input, hx), {})
            found = self._step(input, states)
        return tuple(found) if self._two else found[0]

    def _check_ranks(self, input: Tensor, hx: Sequence[Tensor] | None) -> None:
        raise NotImplementedError

    def _step(
        self, input: Tensor, hx: Sequence[Tensor] | None, only_check: bool = False
    ) -> tuple[Tensor, ...]:
        """The new states, each [B, H], or [H] where the input is [I]."""
        self._check_ranks(input, hx)
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        H, cell = self.hidden_size, self._cell
        spec = CELLS[cell]
        if hx is None:
            states = (torch.zeros(x.size(0), H, dtype=x.dtype, device=x.device),) * spec.states
        else:
            states = tuple(hx) if batched else tuple(hx[k].unsqueeze(0) for k in range(spec.states))
        _checks.cell_sizes(x, states, self.input_size, H)
        params: list[Tensor] = [self.weight_ih, self.weight_hh]
        biases = (self.bias_ih, self.bias_hh)
        given = next((b for b in biases if b is not None), None)
        if given is not None:  # torch.nn's cells do without either
            params += [given.new_zeros(spec.gates * H) if b is None else b for b in biases]
        _checks.weight_shapes(_NAMES[: len(params)], params, spec.gates, self.input_size, H, 0)
        _checks.same_device(x, states, params)
        _checks.same_dtype("input", x, params[0])
        for h in states:
            _checks.same_dtype("hx", h, params[0])
        rows, firsts = x.unsqueeze(0), [h.unsqueeze(0) for h in states]
        if only_check:
            functional.check(kernels.Inputs(cell, rows, firsts, params, None, None, None))
            return ()
        _, last, _ = functional.layer(cell, rows, firsts, params)
        # The leading 1 is the one direction. No views: truncated backpropagation detaches states in place.
        return tuple(_unsafe_view(h, h.shape[1 if batched else 2 :]) for h in last)

    def _streamed(self, input: Any, hx: Any) -> list[Tensor] | None:
        """The new states by `fastrnn.LSTM._streamed`'s way."""
        if not functional.plain(input) or type(hx) not in (tuple, list, type(None)):
            return None
        try:
            spec = CELLS[self._cell]
            one = input.dim() == 1
            x = input.unsqueeze(0).unsqueeze(0) if one else input.unsqueeze(0)
            if hx is None:
                states = [x.new_zeros(1, x.shape[1], self.hidden_size)] * spec.states
            else:
                for h in hx:
                    if isinstance(h, Proxy):
                        return None
                states = [h.unsqueeze(0).unsqueeze(0) if one else h.unsqueeze(0) for h in hx]
            own = self._parameters
            without = own.get("bias_ih", own) is None and own.get("bias_hh", own) is None
            weights = kernels.stream_weights(self, _NAMES[:2] if without else _NAMES, spec.gates)
            h, c = states if spec.states == 2 else (*states, None)
        except (AttributeError, TypeError, ValueError, LookupError):
            return None
        _, h, c = ops.streamed(self._step, (input, hx, True), self._cell, x, h, c, *weights)
        return [s.squeeze_((0, 1) if one else 0) for s in (h, c) if s is not None]

    def _torch_class(self) -> type[torch_rnn.RNNCellBase]:
        """torch.nn's equal; ValueError where an option has none."""
        return self._torch

    def to_torch(self) -> torch_rnn.RNNCellBase:
        """This cell as torch.nn's, on the very same Parameter objects.

        Raises ValueError where an option has no equal in torch.nn.
        """
        return as_torch(self, self._torch_class())

    def __prepare_scriptable__(self) -> torch_rnn.RNNCellBase:
        # TorchScript cannot see through the library's calls, so it gets torch.nn's cell.
        return self.to_torch()


class LSTMCell(_Cell):
    """One LSTM step (Hochreiter & Schmidhuber 1997; forget gates, Gers 2000), as torch.nn.LSTMCell.

    input    [B, I] or [I], of the parameters' dtype (under autocast of any)
    hx       (h, c), each [B, H] or [H]; zeros where None
    returns  (h', c'), shaped like hx

    Parameters weight_ih [4*H, I], weight_hh [4*H, H], bias_ih, bias_hh [4*H]; gate order i, f, g, o.
    Raises ValueError for a wrong number of dimensions, RuntimeError for wrong sizes, dtypes and devices.
    """

    _torch = torch_rnn.LSTMCell
    _two = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    @property
    def _cell(self) -> str:
        return "lstm"

    def _check_ranks(self, input: Tensor, hx: Sequence[Tensor] | None) -> None:
        _checks.cell_ranks("LSTMCell", input, hx, ("hx[0]", "hx[1]"))
        if hx is not None and (input.dim() == 2 or len(hx) < 2):  # else torch.nn's takes the first two
            _checks.two_states(hx, "lstm_cell")


class GRUCell(_Cell):
    """One GRU step (Cho 2014, arXiv:1406.1078), as torch.nn.GRUCell; reset_after as in `fastrnn.GRU`.

    input    [B, I] or [I], of the parameters' dtype (under autocast of any)
    hx       h [B, H] or [H]; zeros where None
    returns  h', shaped like hx

    Parameters weight_ih [3*H, I], weight_hh [3*H, H], bias_ih, bias_hh [3*H]; gate order r, z, n.
    Raises ValueError for a wrong number of dimensions, RuntimeError for wrong sizes, dtypes and devices,
    TypeError for a reset_after that is no bool.
    """

    _torch = torch_rnn.GRUCell
    # On the class: a cell that `convert` made of torch.nn's has none of its own.
    reset_after: bool = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
    ) -> None:
        _checks.bool_option("reset_after", reset_after)
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        self.reset_after = reset_after

    @property
    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    def _check_ranks(self, input: Tensor, hx: Sequence[Tensor] | None) -> None:
        _checks.cell_ranks("GRUCell", input, hx, ("hidden",))

    def _torch_class(self) -> type[torch_rnn.RNNCellBase]:
        if not self.reset_after:
            raise ValueError("GRUCell with reset_after=False has no torch.nn equal")
        return super()._torch_class()

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class RNNCell(_Cell):
    """One step of Elman's network (1990), as torch.nn.RNNCell: h' = f(W x + b + R h + b_h), f tanh or relu.

    input    [B, I] or [I], of the parameters' dtype (under autocast of any)
    hx       h [B, H] or [H]; zeros where None
    returns  h', shaped like hx

    Parameters weight_ih [H, I], weight_hh [H, H], bias_ih, bias_hh [H].
    Raises ValueError for a wrong number of dimensions, RuntimeError for wrong sizes, dtypes and devices
    and, when called, for an unknown nonlinearity.
    """

    _torch = torch_rnn.RNNCell
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    @property
    def _cell(self) -> str:
        return f"rnn_{self.nonlinearity}"

    def _check_ranks(self, input: Tensor, hx: Sequence[Tensor] | None) -> None:
        _checks.cell_ranks("RNNCell", input, hx, ("hidden",))
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")

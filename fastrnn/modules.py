"""LSTM, GRU and RNN: layers that stand in for torch.nn's.

They derive from `torch.nn.RNNBase`, not from torch.nn's own layers: parameters, initialisation and
serialisation are thereby torch.nn's, while the compiler, which breaks its graph at instances of
torch.nn.LSTM and its sisters, traces these fully.

Dimensions: T time, B batch, N packed rows, I input, H hidden, P projection (the width of h; P = H
without one), G gates, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from . import _checks, functional, kernels, ops
from ._fx import leaf_call, traced
from ._sequences import batch_size, by_direction, by_layer, padded
from .reference import CELLS

_CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}

_M = TypeVar("_M", bound=torch.nn.Module)


class States(NamedTuple):
    """Every step's states. Never batch-first; index t is the input's step in both directions.

    h  [L*D, T, B, P], unbatched [L*D, T, P]; zero past a sequence's end
    c  [L*D, T, B, H] likewise; None but for the LSTM
    """

    h: Tensor
    c: Tensor | None


# torch.export saves a program with such outputs under this name.
pytree._register_namedtuple(States, serialized_type_name="fastrnn.States")

# What torch.nn's layers do not have: options, each off where torch.nn has an equal, and _Layer.__setattr__'s
# note.
OWN = ("reset_after", "_given_weights")


def as_torch(module: torch.nn.Module, torch_class: type[_M]) -> _M:
    """A torch_class with everything the module holds: the same Parameter objects, hooks, parametrizations."""
    twin = torch_class.__new__(torch_class)
    for name, value in module.__dict__.items():
        if name not in OWN:
            # Containers are copied: registering a hook on one module must not reach the other.
            twin.__dict__[name] = value.copy() if isinstance(value, dict | list | set) else value
    twin.__dict__["_compiled_call_impl"] = None
    if parametrize.is_parametrized(module):
        parametrize._inject_new_class(twin)
        for name in module.parametrizations:  # type: ignore[union-attr]
            parametrize._inject_property(twin, name)
    return twin


class _Layer(torch_rnn.RNNBase):
    """What LSTM, GRU and RNN share. Attributes are read at every call, as in torch.nn."""

    # torch.nn's, captured at import: programs rebind torch.nn.LSTM to fastrnn.LSTM.
    _torch: type[torch_rnn.RNNBase]

    @property
    def _cell(self) -> str:
        return _CELLS[self.mode]

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels take the parameters wherever they lie."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_flat_weights":
            # torch.nn's layers compute with this list, and subclasses put weights of their own there, as of
            # DropConnect. Otherwise it lags behind the parameters, see _layer_weights.
            own = self._parameters
            others = (
                w is not own[n] if n in own else w is not None and not hasattr(self, n)
                for n, w in zip(self._flat_weights_names, value, strict=False)
            )
            self.__dict__.pop("_given_weights", None)
            if any(others):
                self.__dict__["_given_weights"] = True

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """Reorders the batch of hx, a tensor [L*D, B, .] or a tuple of such."""
        if permutation is None:
            return hx
        if isinstance(hx, Tensor):
            return hx.index_select(1, permutation)
        return tuple(h.index_select(1, permutation) for h in hx)

    def _torch_class(self) -> type[torch_rnn.RNNBase]:
        """torch.nn's equal; ValueError where an option has none."""
        return self._torch

    def to_torch(self) -> torch_rnn.RNNBase:
        """This layer as torch.nn's, on the very same Parameter objects, with its hooks and parametrizations.

        Raises ValueError where an option has no equal in torch.nn.
        """
        twin = as_torch(self, self._torch_class())
        if "_given_weights" not in self.__dict__:
            twin._init_flat_weights()
        return twin

    def __prepare_scriptable__(self) -> torch_rnn.RNNBase:
        # TorchScript takes no keyword-only arguments, so it gets torch.nn's layer.
        return self.to_torch()

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """Runs the layers over whole sequences.

        input          [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence;
                       of the parameters' dtype (under autocast of any)
        hx             h0 [L*D, B, P], for the LSTM (h0, c0) with c0 [L*D, B, H]; without B where the
                       input is unbatched; zeros where None
        lengths        LongTensor [B], on any device, unsorted, zeros allowed: each sequence as if run
                       alone. Its padding reaches no value and no gradient; outputs there are 0
        reset          BoolTensor [T, B] as the input lies: the state is set to zero before step t; in
                       the reverse direction between steps t+1 and t where reset[t+1]
        return_states  also return every step's states (of one layer, states.h shares the output's memory)
        returns        (output, h_n), for the LSTM (output, (h_n, c_n)), then `States` where asked for:
                       output [T, B, D*P] as the input lies, h_n [L*D, B, P], c_n [L*D, B, H]

        Raises ValueError for a wrong number of dimensions or dtype of the input, for lengths outside
        [0, T] (on the CPU; clamped on a GPU, in a compiled graph and under vmap, where values are not
        known in time), for lengths or reset of a wrong shape or with an input
        they do not go with; RuntimeError for wrong sizes, devices and dtypes of states and weights,
        and for T = 0.
        """
        if lengths is None and reset is None and not return_states and self.num_layers == 1:
            result = self._streamed(input, hx)
            if result is not None:
                return result
        proxy = traced(input, hx, lengths, reset)
        if proxy is not None:
            options = {"lengths": lengths, "reset": reset, "return_states": return_states or None}
            return leaf_call(self, proxy, (input, hx), options)
        output, last, states = self._run(input, hx, lengths, reset, return_states)
        hidden = last if self.mode == "LSTM" else last[0]
        return (output, hidden, states) if return_states else (output, hidden)

    def _streamed(self, input: Any, hx: Any) -> Any:
        """One layer without masks: above all the step of a program that generates or controls.

        None where the call is any other: then `_run` does it all. Its checks in Python would take more time
        than such a step; the kernel makes the same before it begins; `_run` has words for what it refuses.
        """
        h: Any
        two = self.mode == "LSTM"
        if self.bidirectional or not functional.plain(input):
            return None
        if two and hx is not None and type(hx) is not tuple:
            return None
        try:
            unbatched = input.dim() == 2
            x = input.unsqueeze(1) if unbatched else input.transpose(0, 1) if self.batch_first else input
            if hx is None:
                h, c = (*self._zero_states(x, x.shape[1], 1)[0], None)[:2]
            else:
                h, c = hx if two else (hx, None)
                if isinstance(h, Proxy) or isinstance(c, Proxy):
                    return None
                if unbatched:
                    h, c = h.unsqueeze(1), c.unsqueeze(1) if c is not None else None
            weights = self._stream_weights()
        except (AttributeError, TypeError, ValueError, LookupError):
            return None
        asked = (input, hx, None, None, False, True)
        y, h, c = ops.streamed(self._run, asked, self._cell, x, h, c, *weights)
        if unbatched:
            y, h, c = y.squeeze(1), h.squeeze(1), c.squeeze(1) if c is not None else None
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, (h, c) if two else h

    def _stream_weights(self) -> Sequence[Any]:
        """The only layer's, as `ops.streamed` takes them."""
        if "_given_weights" in self.__dict__:
            raise LookupError
        return kernels.stream_weights(self, self._all_weights[0], CELLS[self._cell].gates)

    def _call_layer(
        self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], **options: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One layer on what `_layer_weights` gave of it."""
        return functional.layer(self._cell, x, states, weights, **options)

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | None,
        reset: Tensor | None,
        return_states: bool,
        only_check: bool = False,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...], States | None]:
        L, D = self.num_layers, 2 if self.bidirectional else 1
        H, P = self.hidden_size, self.proj_size or self.hidden_size
        two = self.mode == "LSTM"
        given: tuple[Tensor, ...] | None = None if hx is None else (hx[0], hx[1]) if two else (hx,)

        batched, batch_sizes, sort, unsort = True, None, None, None
        if isinstance(input, PackedSequence):
            x, batch_sizes, sort, unsort = input
            _checks.padded_only(lengths, reset)
            B = batch_size(batch_sizes, unsort, given)
        else:
            _checks.layer_ranks("RNN" if self.mode.startswith("RNN") else self.mode, input, given)
            batched = input.dim() == 3
            if not batched:
                x = input.unsqueeze(1)
                given = given and tuple(h.unsqueeze(1) for h in given)
            else:
                x = input.transpose(0, 1) if self.batch_first else input
            B = x.size(1)

        weights = [self._layer_weights(k, D) for k in range(L)]
        _checks.layer_input(x, weights[0][0], self.input_size, batch_sizes is not None)
        if given is not None:
            _checks.layer_hidden(given, ((L * D, B, P), (L * D, B, H))[: len(given)])
            if two and batched and sort is None:  # torch.nn takes the first two of whatever it is else
                _checks.two_states(hx)
            if sort is not None:
                given = tuple(h.index_select(1, sort) for h in given)
        for params in weights:
            _checks.same_device(x, given or (), params)
        if batch_sizes is None:
            _checks.some_steps(x.size(0))
        for h in given or ():
            _checks.same_dtype("hx", h, weights[0][0])
        if lengths is not None:
            lengths = _checks.sequence_lengths(lengths, x.size(0), B, x.device, batched)
        if reset is not None:
            reset = _checks.reset_mask(reset, x.size(0), B, x.device, batched, self.batch_first)

        masks = {"lengths": lengths, "batch_sizes": batch_sizes, "reset": reset}
        whole, dropped = None, self.dropout > 0 and self.training
        if L > 1 and D == 1 and not return_states and not dropped:
            firsts = self._zero_states(x, B, L)[0] if given is None else given
            whole = functional.stack(self._cell, x, firsts, [w for own in weights for w in own], **masks)
        starts: list[tuple[Tensor, ...]] = []
        if whole is None:
            starts = self._zero_states(x, B, D) if given is None else by_layer(given, L, D)
        lasts: list[tuple[Tensor, ...]] = []
        columns: list[list[Tensor]] = [[] for _ in range(1 + two)]
        for k, start in enumerate(starts):
            if only_check:
                functional.check(kernels.Inputs(self._cell, x, list(start), weights[k], None, None, None))
                return x, (), None
            y, last, seq = self._call_layer(x, start, weights[k], **masks, return_states=return_states)
            lasts.append(last)
            if return_states:
                for column, steps in zip(columns, (by_direction(y, D), *seq), strict=True):
                    column.append(steps)
            x = y
            if dropped and k < L - 1:
                x = torch.dropout(y, self.dropout, True)

        if whole is not None:
            y, hidden = whole
        else:
            hidden = lasts[0] if L == 1 else tuple(torch.cat(column) for column in zip(*lasts, strict=True))
        if unsort is not None:
            hidden = tuple(h.index_select(1, unsort) for h in hidden)
        elif not batched:
            hidden = tuple(h.squeeze(1) for h in hidden)
        states = None
        if return_states:
            steps_of = [column[0] if L == 1 else torch.cat(column) for column in columns]
            if batch_sizes is not None:
                steps_of = [padded(steps, batch_sizes, unsort, B) for steps in steps_of]
            elif not batched:
                steps_of = [steps.squeeze(2) for steps in steps_of]
            states = States(steps_of[0], steps_of[1] if two else None)
        if batch_sizes is not None:
            return PackedSequence(y, batch_sizes, sort, unsort), hidden, states
        if not batched:
            return y.squeeze(1), hidden, states
        return y.transpose(0, 1) if self.batch_first else y, hidden, states

    def _zero_states(self, x: Tensor, B: int, D: int) -> list[tuple[Tensor, ...]]:
        """Each layer's first states where hx is None: the same zeros for all."""
        H, P = self.hidden_size, self.proj_size or self.hidden_size
        h = torch.zeros(D, B, P, dtype=x.dtype, device=x.device)
        if self.mode != "LSTM":
            return [(h,)] * self.num_layers
        c = h if P == H else torch.zeros(D, B, H, dtype=x.dtype, device=x.device)
        return [(h, c)] * self.num_layers

    def _layer_weights(self, k: int, D: int) -> list[Tensor]:
        """Layer k's parameters, direction after direction, of the right shapes.

        They are read by name: under functional_call and parametrizations `_flat_weights` lags behind, unless
        somebody assigned it.
        """
        given: dict[str, Any] = {}
        if "_given_weights" in self.__dict__:
            given = dict(zip(self._flat_weights_names, self._flat_weights, strict=True))
        P = self.proj_size or self.hidden_size
        width = self.input_size if k == 0 else D * P
        params: list[Tensor] = []
        for names in self._all_weights[k * D : (k + 1) * D]:
            group: list[Tensor] = [given[name] if given else getattr(self, name) for name in names]
            _checks.weight_shapes(
                names, group, CELLS[self._cell].gates, width, self.hidden_size, self.proj_size
            )
            params += group
        return params


class LSTM(_Layer):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gates, Gers 2000), as torch.nn.LSTM.

        i, f, o = sigmoid(W_i x + b_i + R_i h + b_hi), ...f, ...o      g = tanh(W_g x + b_g + R_g h + b_hg)
        c' = f * c + i * g                                             h' = o * tanh(c')

    With proj_size=P > 0 the state h is W_hr h' (Sak 2014, arXiv:1402.1128).
    Parameters, for each layer k and with `_reverse` for the second direction: weight_ih_l{k} [4*H, I],
    weight_hh_l{k} [4*H, P], bias_ih_l{k}, bias_hh_l{k} [4*H], weight_hr_l{k} [P, H]; gate order i, f, g, o;
    drawn from U(-1/sqrt(H), 1/sqrt(H)). See `forward` for shapes and errors.

    Raises TypeError for a bias or batch_first that is no bool and for sizes that are no int, ValueError
    for a dropout outside [0, 1], sizes <= 0 and proj_size >= hidden_size.
    """

    _torch = torch_rnn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """(L*D, B, H) for an input that is padded, or packed where batch_sizes is given."""
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """torch.nn.LSTM's check of a batched or packed input against (h0, c0)."""
        self.check_input(input, batch_sizes)
        sizes = (
            self.get_expected_hidden_size(input, batch_sizes),
            self.get_expected_cell_size(input, batch_sizes),
        )
        _checks.layer_hidden(hidden, sizes)


class GRU(_Layer):
    """Gated recurrent unit (Cho 2014, arXiv:1406.1078), as torch.nn.GRU.

        r, z = sigmoid(W_r x + b_r + R_r h + b_hr), ...z        n = tanh(W_n x + b_n + r * (R_n h + b_hn))
        h' = (1 - z) * n + z * h

    reset_after=False is the paper's third version, the textbook form: the reset gate acts before the
    recurrent product, n = tanh(W_n x + b_n + R_n (r * h) + b_hn).
    Parameters as the LSTM's, [3*H, .], gate order r, z, n. See `forward` for shapes and errors.

    Raises what `LSTM` raises; TypeError for a reset_after that is no bool, ValueError for proj_size.
    """

    _torch = torch_rnn.GRU
    # On the class: a layer that `convert` made of torch.nn's has none of its own.
    reset_after: bool = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reset_after: bool = True,
        **unsupported: Any,
    ) -> None:
        _checks.no_projection("GRU", unsupported)
        _checks.bool_option("reset_after", reset_after)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.reset_after = reset_after

    @property
    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    def _torch_class(self) -> type[torch_rnn.RNNBase]:
        if not self.reset_after:
            raise ValueError("GRU with reset_after=False has no torch.nn equal")
        return super()._torch_class()

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class RNN(_Layer):
    """Elman's network (1990), as torch.nn.RNN: h' = f(W x + b + R h + b_h), f tanh or relu.

    Parameters as the LSTM's, [H, .]. See `forward` for shapes and errors.

    Raises what `LSTM` raises; ValueError for an unknown nonlinearity and for proj_size.
    """

    _torch = torch_rnn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unsupported: Any,
    ) -> None:
        _checks.no_projection("RNN", unsupported)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )

"""The decoder that attends to a memory at every step.

Dimensions: Tq steps, S memory, B batch, M memory features, I input, H hidden, L layers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks, functional
from ._fx import leaf_call, traced
from .attention import Attention, as_laid, attended, options_repr, sequence, steps_and_batch, uniform
from .backends import Explanation, decide, decide_fused, explained, in_autocast
from .reference import CELLS

_CELLS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh"}
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class AttentionDecoder(nn.Module):
    """Luong's decoder (2015, arXiv:1508.04025): a recurrent network that attends to a memory at every step.

        h_t = cell([x_t; a_{t-1}])      a_0 = 0; without input_feeding h_t = cell(x_t)
        c_t = attention of the top layer's h_t over the memory
        a_t = tanh(W_c [c_t; h_t])

    cell           "lstm", "gru" or "rnn" (tanh), as `fastrnn.LSTM`, `GRU` and `RNN`
    num_layers     layers of it; only the first reads a_{t-1}
    score          of the attention, see `Attention`: "dot" needs hidden_size == memory_size
    dropout        of the output of every layer but the last, in training, as in torch.nn
    batch_first    the batch is the first dimension of inputs, memory and output

    Parameters: weight_ih_l{k} [G*H, I + H] (layer 0 without input_feeding [G*H, I], the others [G*H, H]),
    weight_hh_l{k} [G*H, H], bias_ih_l{k}, bias_hh_l{k} [G*H] as in torch.nn, drawn from
    U(-1/sqrt(H), 1/sqrt(H)); weight_c [H, M + H], drawn as torch.nn.Linear's; and those of `attention`.
    See `forward` for shapes and errors.

    Raises ValueError for an unknown cell or score, sizes <= 0 and a dropout that is no number in [0, 1],
    TypeError for sizes that are no int and options that are no bool. Warns, as torch.nn, of a dropout in a
    single layer.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        memory_size: int,
        *,
        cell: str = "lstm",
        num_layers: int = 1,
        score: str = "dot",
        input_feeding: bool = True,
        dropout: float = 0.0,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        H, M = hidden_size, memory_size
        _checks.one_of("cell", cell, tuple(_CELLS))
        _checks.positive(input_size=input_size, hidden_size=H, memory_size=M, num_layers=num_layers)
        _checks.bool_option("input_feeding", input_feeding)
        _checks.bool_option("batch_first", batch_first)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a number in [0, 1], got {dropout!r}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(f"dropout={dropout} falls between layers, and there is one", stacklevel=2)
        self.input_size, self.hidden_size, self.memory_size = input_size, H, M
        self.cell, self.num_layers, self.input_feeding = cell, num_layers, input_feeding
        self.dropout, self.batch_first = dropout, batch_first
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = CELLS[_CELLS[cell]].gates * H
        for k in range(num_layers):
            width = H if k else input_size + (H if input_feeding else 0)
            for name, shape in zip(_NAMES, ((rows, width), (rows, H), (rows,), (rows,)), strict=True):
                self.register_parameter(f"{name}_l{k}", nn.Parameter(torch.empty(shape, **options)))
        self.weight_c = nn.Parameter(torch.empty(H, M + H, **options))
        self.attention = Attention(H, M, score=score, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew."""
        for params in self._layer_weights():
            uniform(1 / math.sqrt(self.hidden_size), *params)
        uniform(1 / math.sqrt(self.weight_c.shape[1]), self.weight_c)
        self.attention.reset_parameters()

    def extra_repr(self) -> str:
        options = options_repr(
            self, cell="lstm", num_layers=1, input_feeding=True, dropout=0.0, batch_first=False
        )
        return f"{self.input_size}, {self.hidden_size}, {self.memory_size}{options}"

    def _explain(self, inputs: Tensor) -> Explanation:
        x, steps = in_autocast(inputs), inputs.shape[inputs.dim() == 3 and self.batch_first]
        if self.input_feeding and steps > 1:
            return explained(decide_fused(x, "the decoder"), x, f"{self.cell} decoder", "scan")
        attention, layers = self.attention._explain(x), decide(x).backend
        if attention.backend is None:
            return attention
        kernels = {"cpu": "scan in C++", "triton": "scan by Triton", "cuda": "scan in CUDA"}
        how = kernels.get(str(layers), "by plain torch operations")
        return replace(attention, kernel=f"{self.cell} {how}, then {attention.kernel}")

    def _layer_weights(self) -> list[list[Tensor]]:
        return [[getattr(self, f"{name}_l{k}") for name in _NAMES] for k in range(self.num_layers)]

    def forward(
        self,
        inputs: Tensor,
        memory: Tensor,
        state: Tensor | Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any, Tensor]:
        """Teacher forcing: all steps, each with its own input.

        inputs   [Tq, B, I], [B, Tq, I] with batch_first, [Tq, I] unbatched
        memory   [S, B, M] likewise
        state    an encoder's h_n [L, B, H], for the LSTM (h_n, c_n), or what the decoder returned; zeros
                 where None
        lengths  LongTensor [B], each memory's own length
        returns  (output [Tq, B, H] as the inputs lie: every a_t; state; weights [B, Tq, S])

        The state is (h_n, c_n, a) for the LSTM, (h_n, a) for the others, with a [B, H] the last output;
        without input_feeding what an encoder has. Padding is read as little as by `Attention`.

        Raises ValueError for shapes that do not agree and lengths outside [0, S] (on the CPU; elsewhere they
        are clamped), TypeError for a state of another kind, RuntimeError for Tq = 0 and for dtypes and
        devices that differ.
        """
        proxy = traced(inputs, memory, state, lengths)
        if proxy is not None:
            options, args = {"lengths": lengths}, (inputs, memory, state)
            recorded: tuple[Tensor, Any, Tensor] = leaf_call(self, proxy, args, options)
            return recorded
        self._check_floats(inputs=inputs, memory=memory)
        if inputs.dim() not in (2, 3):
            raise ValueError(f"inputs must have 3 dimensions, or unbatched 2, got {inputs.dim()}")
        batched, first = inputs.dim() == 3, self.batch_first
        Tq, B = steps_and_batch(inputs, batched, first)
        x = sequence("inputs", inputs, ("Tq", "B", "I"), (Tq, B, self.input_size), batched, first)
        _checks.some_steps(Tq)
        out, state, weights = self._run(x, memory, state, lengths, batched)
        return as_laid(out, batched, first), state, weights

    def step(
        self,
        input_t: Tensor,
        memory: Tensor,
        state: Tensor | Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any, Tensor]:
        """One step, as of a program that generates: `forward` of a single step.

        input_t  [B, I], or [I] unbatched; the rest as in `forward`
        returns  (output [B, H], state, weights [B, S])
        """
        self._check_floats(input_t=input_t, memory=memory)
        if input_t.dim() not in (1, 2):
            raise ValueError(f"input_t must have 2 dimensions, or unbatched 1, got {input_t.dim()}")
        batched = input_t.dim() == 2
        symbols, sizes = (
            ("[B, I]", (len(input_t), self.input_size)) if batched else ("[I]", (self.input_size,))
        )
        _checks.shape("input_t", input_t, symbols, sizes)
        x = input_t[None] if batched else input_t[None, None]
        out, state, weights = self._run(x, memory, state, lengths, batched)
        return out.flatten(0, 1) if batched else out.flatten(), state, weights.squeeze(-2)

    def _check_floats(self, **given: Tensor) -> None:
        for name, t in given.items():
            _checks.is_tensor(name, t)
            _checks.float_like(name, t, self.weight_c, "the parameters")

    def _run(
        self,
        x: Tensor,
        memory: Tensor,
        state: Tensor | Sequence[Tensor] | None,
        lengths: Tensor | None,
        batched: bool,
    ) -> tuple[Tensor, Any, Tensor]:
        """(output [Tq, B, H], state, weights) of x [Tq, B, I], after the checks of all else."""
        Tq, B = x.shape[:2]
        if memory.dim() != 2 + batched:
            raise ValueError(f"memory must have {2 + batched} dimensions like the input, got {memory.dim()}")
        S = steps_and_batch(memory, batched, self.batch_first)[0]
        sizes = (S, B, self.memory_size)
        memory = sequence("memory", memory, ("S", "B", "M"), sizes, batched, self.batch_first)
        mask = _checks.attention_mask(lengths, None, (B, Tq, S), x.device, batched)
        states, feed = self._states(state, x, batched)
        run = self._scan if self.input_feeding and Tq > 1 else self._composed
        out, last, weights = run(x, memory, states, feed, mask)
        if self.input_feeding:
            last = (*last, out[-1].clone())  # the caller may change the output in place
        if not batched:
            weights, last = weights.squeeze(0), tuple(s.squeeze(-2) for s in last)
        return out, last if len(last) > 1 else last[0], weights

    def _states(
        self, state: Tensor | Sequence[Tensor] | None, x: Tensor, batched: bool
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The layers' states, each [L, B, H], and a [B, H], of what the caller has."""
        L, B, H = self.num_layers, x.shape[1], self.hidden_size
        count = CELLS[_CELLS[self.cell]].states
        names = ("h_n", "c_n")[:count]
        if state is None:
            return (x.new_zeros(L, B, H),) * count, x.new_zeros(B, H)
        given = tuple(state) if isinstance(state, tuple | list) else (state,)
        most = count + self.input_feeding
        if len(given) not in (count, most) or not all(isinstance(s, Tensor) for s in given):
            wanted = " or ".join(f"({', '.join((*names, 'a')[:n])})" for n in sorted({count, most}))
            kinds = ", ".join(type(s).__name__ for s in given)
            raise TypeError(f"the state of this decoder must be {wanted}, got ({kinds})")
        if not batched:
            given = tuple(s.unsqueeze(-2) if s.dim() else s for s in given)
        for name, s in zip(names, given, strict=False):
            _checks.shape(name, s, "[L, B, H]", (L, B, H))
        if len(given) > count:
            _checks.shape("a", given[count], "[B, H]", (B, H))
        for name, s in zip((*names, "a"), given, strict=False):
            _checks.float_like(name, s, self.weight_c, "the parameters")
        return given[:count], given[count] if len(given) > count else x.new_zeros(B, H)

    def _dropped(self, y: Tensor, k: int) -> Tensor:
        """Layer k's output as the layer above it reads it."""
        if self.dropout > 0 and self.training and k < self.num_layers - 1:
            return torch.dropout(y, self.dropout, True)
        return y

    def _composed(
        self, x: Tensor, memory: Tensor, states: tuple[Tensor, ...], feed: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """One step; or all, layer after layer, where none reads what came of the step before it."""
        y = torch.cat([x, feed[None]], -1) if self.input_feeding else x
        columns = []
        for k, params in enumerate(self._layer_weights()):
            first = [s[k : k + 1] for s in states]
            y, last, _ = functional.layer(_CELLS[self.cell], y, first, params)
            columns.append(last)
            y = self._dropped(y, k)
        context, weights = self.attention(y, memory, mask=mask)
        out = nn.functional.linear(torch.cat([context, y], -1), self.weight_c).tanh()
        return out, tuple(torch.cat(column) for column in zip(*columns, strict=True)), weights

    def _scan(
        self, x: Tensor, memory: Tensor, states: tuple[Tensor, ...], feed: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """All steps in one scan. What is one product for all of the memory is made before it: its keys, and
        W_c's part of it, since W_c c = sum_s w_s (W_c m_s)."""
        attention, M = self.attention, self.memory_size
        memory = attended(memory, mask)
        dropping = self.dropout > 0 and self.training
        ones = x.new_ones(()).expand(*x.shape[:2], self.hidden_size)
        return functional.decoder(
            _CELLS[self.cell],
            x,
            states,
            feed,
            self._layer_weights(),
            self.weight_c[:, M:],
            attention.project_memory(memory, None),
            nn.functional.linear(memory, self.weight_c[:, :M]),
            w_q=getattr(attention, "weight_q", None),
            v=getattr(attention, "v", None),
            mask=mask,
            drops=[self._dropped(ones, k) for k in range(self.num_layers - 1)] if dropping else [],
            scale=1.0 if attention.scale is None else attention.scale,
        )

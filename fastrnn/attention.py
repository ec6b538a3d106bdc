"""Attention over a memory, and the decoder that attends at every step.

Dimensions: Tq queries (the decoder's steps), S memory, B batch, Q query, M memory features, V features of the
values, I input, H hidden, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks, functional
from .backends import Explanation, decide, decide_fused, explained, in_autocast
from .modules import leaf_call, traced
from .reference import CELLS

SCORES = ("dot", "general", "additive")
_CELLS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh"}
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero, got {size}")


def _options(module: nn.Module, **usual: Any) -> str:
    """The options that are not as usual, for a repr."""
    given = {name: getattr(module, name) for name in usual}
    return "".join(f", {name}={value!r}" for name, value in given.items() if value != usual[name])


def _time_first(t: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """[T, B, .] of a sequence as the caller has it."""
    if not batched:
        return t.unsqueeze(1)
    return t.transpose(0, 1) if batch_first else t


def _as_laid(t: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """The way back."""
    if not batched:
        return t.squeeze(1)
    return t.transpose(0, 1) if batch_first else t


def _uniform(bound: float, *parameters: Tensor) -> None:
    for p in parameters:
        nn.init.uniform_(p, -bound, bound)


class Attention(nn.Module):
    """Attention of queries over a memory: softmax over s of a score, context = weighted sum of the values.

        "dot"       score = q . m (Luong 2015, arXiv:1508.04025, eq. 8)
        "general"   score = q^T W m (the same), weight [Q, M]
        "additive"  score = v^T tanh(W_q q + W_m m), weight_q [Q, Q], weight_m [Q, M], v [Q]
                    (Bahdanau 2015, arXiv:1409.0473, appendix A.1.2)

    query_size, memory_size  Q and M; M = Q where None
    scale                    the score is multiplied by it; None: 1. 1/sqrt(Q) makes "dot" the scaled
                             dot-product attention of Vaswani 2017
    batch_first              the batch is the first dimension of query, memory, values and context

    Parameters are drawn from U(-1/sqrt(n), 1/sqrt(n)) for n inputs, as torch.nn.Linear's. See `forward` for
    shapes and errors.

    Raises ValueError for an unknown score, sizes <= 0 and for "dot" with Q != M; TypeError for sizes that are
    no int and a batch_first that is no bool.
    """

    def __init__(
        self,
        query_size: int,
        memory_size: int | None = None,
        *,
        score: str = "dot",
        scale: float | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        Q, M = query_size, query_size if memory_size is None else memory_size
        _one_of("score", score, SCORES)
        _positive(query_size=Q, memory_size=M)
        _checks.bool_option("batch_first", batch_first)
        if score == "dot" and Q != M:
            raise ValueError(
                f'score="dot" needs query_size == memory_size, got {Q} and {M}: score="general" has a weight '
                "between them"
            )
        self.query_size, self.memory_size = Q, M
        self.score, self.scale, self.batch_first = score, scale, batch_first

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if score == "general":
            self.weight = parameter(Q, M)
        elif score == "additive":
            self.weight_q, self.weight_m, self.v = parameter(Q, Q), parameter(Q, M), parameter(Q)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew."""
        for p in self.parameters(recurse=False):
            _uniform(1 / math.sqrt(p.shape[-1]), p)

    def extra_repr(self) -> str:
        options = _options(self, score="dot", scale=None, batch_first=False)
        return f"{self.query_size}, {self.memory_size}{options}"

    def _explain(self, query: Tensor) -> Explanation:
        x = in_autocast(query)
        return explained(decide_fused(x, "attention"), x, f"{self.score} attention", "online softmax")

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from every query.

        query         [Tq, B, Q], [B, Tq, Q] with batch_first, [Tq, Q] unbatched
        memory        [S, B, M] likewise
        values        [S, B, V] likewise, what is summed; the memory where None
        lengths       LongTensor [B], each memory's own length
        mask          BoolTensor [B, S] or [B, Tq, S], True where a query may attend; with lengths, both must
                      allow it
        need_weights  False saves the memory of the weights, and their time
        returns       (context [Tq, B, V] as the query lies, weights [B, Tq, S] or None)

        A query that may attend to nothing has a zero context and zero weights. What no query may attend to,
        NaN included, reaches no value and no gradient; its own gradient is 0.

        Raises ValueError for shapes that do not agree, a mask that is not bool and lengths outside [0, S] (on
        the CPU; elsewhere they are clamped), RuntimeError for dtypes and devices that differ.
        """
        proxy = traced(query, memory, values, lengths, mask)
        if proxy is not None:
            options = {"lengths": lengths, "mask": mask, "need_weights": None if need_weights else False}
            recorded: tuple[Tensor, Tensor | None] = leaf_call(self, proxy, (query, memory, values), options)
            return recorded
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or memory.dim() != query.dim():
            raise ValueError(
                "query and memory must both have 3 dimensions, or unbatched 2, got "
                f"{query.dim()} and {memory.dim()}"
            )
        if values is not None and values.dim() != memory.dim():
            raise ValueError(
                f"values must have {memory.dim()} dimensions like the memory, got {values.dim()}"
            )
        query, memory = (_time_first(t, batched, self.batch_first) for t in (query, memory))
        values = memory if values is None else _time_first(values, batched, self.batch_first)
        Tq, B = query.shape[:2]
        S = memory.shape[0]
        _checks.shape("query", query, "[Tq, B, Q]", (Tq, B, self.query_size))
        _checks.shape("memory", memory, "[S, B, M]", (S, B, self.memory_size))
        _checks.shape("values", values, "[S, B, V]", (S, B, values.shape[-1]))
        owner = next(self.parameters(recurse=False), query)
        for name, tensor in (("query", query), ("memory", memory), ("values", values)):
            _checks.float_like(name, tensor, owner, "the query" if owner is query else "the parameters")
        mask = _checks.attention_mask(lengths, mask, (B, Tq, S), query.device, batched)
        query = self.project_query(query, Tq <= S)
        keys = self.project_memory(memory, mask, Tq <= S)
        context, weights = functional.attention(
            query,
            keys,
            values,
            getattr(self, "v", None),
            mask=mask,
            scale=1.0 if self.scale is None else self.scale,
            need_weights=need_weights,
        )
        if weights is not None and not batched:
            weights = weights.squeeze(0)
        return _as_laid(context, batched, self.batch_first), weights

    def project_query(self, query: Tensor, few: bool = False) -> Tensor:
        """[.., Q] as the scores of `functional.attention` take it. few: "general" multiplies its weight with
        the queries, as there are fewer of them, and not with the memory: q^T (W m) = (W^T q)^T m."""
        if self.score == "additive":
            return nn.functional.linear(query, self.weight_q)
        return query @ self.weight if self.score == "general" and few else query

    def project_memory(self, memory: Tensor, mask: Tensor | None, few: bool = False) -> Tensor:
        """The keys [S, B, .] of a memory [S, B, M] for such queries."""
        if self.score == "dot" or (self.score == "general" and few):
            return memory
        weight = self.weight if self.score == "general" else self.weight_m
        return nn.functional.linear(attended(memory, mask), weight)


def attended(memory: Tensor, mask: Tensor | None) -> Tensor:
    """The memory [S, B, .] with zeros where no query may attend: a NaN there would spoil the gradient of a
    weight that it is multiplied with."""
    if mask is None:
        return memory
    any_query = mask if mask.dim() == 2 else mask.any(1)  # [B, S]
    return torch.where(
        any_query.mT[:, :, None], memory, torch.zeros((), dtype=memory.dtype, device=memory.device)
    )


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

    Raises ValueError for an unknown cell or score, sizes <= 0 and a dropout outside [0, 1], TypeError for
    sizes that are no int and options that are no bool.
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
        _one_of("cell", cell, tuple(_CELLS))
        _positive(input_size=input_size, hidden_size=H, memory_size=M, num_layers=num_layers)
        _checks.bool_option("input_feeding", input_feeding)
        _checks.bool_option("batch_first", batch_first)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
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
            _uniform(1 / math.sqrt(self.hidden_size), *params)
        _uniform(1 / math.sqrt(self.weight_c.shape[1]), self.weight_c)
        self.attention.reset_parameters()

    def extra_repr(self) -> str:
        options = _options(
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
        how = {"cpu": "scan in C++", "triton": "scan by Triton"}.get(str(layers), "by plain torch operations")
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
        if inputs.dim() not in (2, 3):
            raise ValueError(f"inputs must have 3 dimensions, or unbatched 2, got {inputs.dim()}")
        batched = inputs.dim() == 3
        x = _time_first(inputs, batched, self.batch_first)
        _checks.some_steps(x.shape[0])
        out, state, weights = self._run("inputs", "[Tq, B, I]", x, memory, state, lengths, batched)
        return _as_laid(out, batched, self.batch_first), state, weights

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
        if input_t.dim() not in (1, 2):
            raise ValueError(f"input_t must have 2 dimensions, or unbatched 1, got {input_t.dim()}")
        batched = input_t.dim() == 2
        x = input_t[None] if batched else input_t[None, None]
        out, state, weights = self._run("input_t", "[1, B, I]", x, memory, state, lengths, batched)
        return out.flatten(0, 1) if batched else out.flatten(), state, weights.squeeze(-2)

    def _run(
        self,
        name: str,
        symbols: str,
        x: Tensor,
        memory: Tensor,
        state: Tensor | Sequence[Tensor] | None,
        lengths: Tensor | None,
        batched: bool,
    ) -> tuple[Tensor, Any, Tensor]:
        """(output [Tq, B, H], state, weights) of x [Tq, B, I], after all checks."""
        Tq, B = x.shape[:2]
        _checks.shape(name, x, symbols, (Tq, B, self.input_size))
        _checks.float_like(name, x, self.weight_c, "the parameters")
        if memory.dim() != 2 + batched:
            raise ValueError(f"memory must have {2 + batched} dimensions like the input, got {memory.dim()}")
        memory = _time_first(memory, batched, self.batch_first)
        S = memory.shape[0]
        _checks.shape("memory", memory, "[S, B, M]", (S, B, self.memory_size))
        _checks.float_like("memory", memory, self.weight_c, "the parameters")
        mask = _checks.attention_mask(lengths, None, (B, Tq, S), x.device, batched)
        states, feed = self._states(state, x, batched)
        run = self._scan if self.input_feeding and Tq > 1 else self._composed
        out, last, weights = run(x, memory, states, feed, mask)
        if self.input_feeding:
            last = (*last, out[-1])
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
        given = (state,) if isinstance(state, Tensor) else tuple(state)
        most = count + self.input_feeding
        if len(given) not in (count, most) or not all(isinstance(s, Tensor) for s in given):
            wanted = " or ".join(f"({', '.join((*names, 'a')[:n])})" for n in sorted({count, most}))
            kinds = ", ".join(type(s).__name__ for s in given)
            raise TypeError(f"the state of this decoder must be {wanted}, got ({kinds})")
        if not batched:
            given = tuple(s.unsqueeze(-2) for s in given)
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
        ones = x.new_ones(*x.shape[:2], self.hidden_size)
        dropping = self.dropout > 0 and self.training
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

"""Attention over a memory.

Dimensions: Tq queries, S memory, B batch, Q query, M memory features, V features of the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks, functional
from ._fx import leaf_call, traced
from .backends import Explanation, decide_attention, explained, in_autocast

SCORES = ("dot", "general", "additive")


def options_repr(module: nn.Module, **usual: Any) -> str:
    """The options that are not as usual, for a repr."""
    given = {name: getattr(module, name) for name in usual}
    return "".join(f", {name}={value!r}" for name, value in given.items() if value != usual[name])


def time_first(t: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """[T, B, .] of a sequence as the caller has it."""
    if not batched:
        return t.unsqueeze(1)
    return t.transpose(0, 1) if batch_first else t


def as_laid(t: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """The way back."""
    if not batched:
        return t.squeeze(1)
    return t.transpose(0, 1) if batch_first else t


def sequence(
    name: str,
    t: Tensor,
    symbols: Sequence[str],
    sizes: Sequence[int],
    batched: bool,
    batch_first: bool,
) -> Tensor:
    """[T, B, .] of a sequence, after a check in the caller's words; symbols, sizes: of T, B and width."""
    order = (0, 2) if not batched else (1, 0, 2) if batch_first else (0, 1, 2)
    wanted = tuple(sizes[i] for i in order)
    _checks.shape(name, t, f"[{', '.join(symbols[i] for i in order)}]", wanted)
    return time_first(t, batched, batch_first)


def steps_and_batch(t: Tensor, batched: bool, batch_first: bool) -> tuple[int, int]:
    """T and B of a sequence as the caller has it."""
    if not batched:
        return t.shape[0], 1
    return (t.shape[1], t.shape[0]) if batch_first else (t.shape[0], t.shape[1])


def uniform(bound: float, *parameters: Tensor) -> None:
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

    Raises ValueError for an unknown score, sizes <= 0, a scale that is not finite and for "dot" with Q != M;
    TypeError for sizes that are no int, a scale that is no number and a batch_first that is no bool.
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
        _checks.one_of("score", score, SCORES)
        _checks.positive(query_size=Q, memory_size=M)
        _checks.bool_option("batch_first", batch_first)
        if scale is not None:
            _checks.finite("scale", scale)
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
            uniform(1 / math.sqrt(p.shape[-1]), p)

    def extra_repr(self) -> str:
        options = options_repr(self, score="dot", scale=None, batch_first=False)
        return f"{self.query_size}, {self.memory_size}{options}"

    def _explain(self, query: Tensor) -> Explanation:
        x = in_autocast(query)
        decision = decide_attention(x)
        found = explained(decision, x, f"{self.score} attention", "online softmax")
        if decision.backend == "triton":
            from .triton_kernels.ahead import describe_attention

            return replace(found, split=describe_attention(x, self.score == "additive", self.memory_size))
        return found

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
        given = {"query": query, "memory": memory, "values": memory if values is None else values}
        owner = next(self.parameters(recurse=False), query)
        for name, t in given.items():
            _checks.is_tensor(name, t)
            _checks.float_like(name, t, owner, "the query" if owner is query else "the parameters")
        batched, first = query.dim() == 3, self.batch_first
        for name, t in given.items():
            if t.dim() not in (2, 3) or t.dim() != query.dim():
                raise ValueError(
                    "query, memory and values must all have 3 dimensions, or unbatched 2, got "
                    f"{', '.join(f'{t.dim()} ({name})' for name, t in given.items())}"
                )
        Tq, B = steps_and_batch(query, batched, first)
        S = steps_and_batch(memory, batched, first)[0]
        query = sequence("query", query, ("Tq", "B", "Q"), (Tq, B, self.query_size), batched, first)
        memory = sequence("memory", memory, ("S", "B", "M"), (S, B, self.memory_size), batched, first)
        sizes = (S, B, given["values"].shape[-1])
        values = sequence("values", given["values"], ("S", "B", "V"), sizes, batched, first)
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
        return as_laid(context, batched, self.batch_first), weights

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

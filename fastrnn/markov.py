"""The n-gram model with additive smoothing: the least that a recurrent language model has to beat."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks

Tokens = Tensor | Sequence[int]


def _integer(value: Any) -> Any:
    """numpy's and torch's integers as Python's; what would have to be rounded, and bools, as they are."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


class MarkovModel:
    """A Markov chain of the given order over tokens 0 .. vocab_size-1.

    p(token | context) = (count + smoothing) / (total + smoothing * vocab_size), where `count` is how often
    the token followed the context (the `order` tokens before it) in the text fitted, and `total` how often
    any token did. order=0 is the unigram model, order=1 the bigram model. Laplace's rule is smoothing=1,
    Lidstone's any other; see Jurafsky & Martin, "Speech and Language Processing", ch. 3.

    Smoothing is added for every token of the vocabulary: a context seen 10 times gives, with smoothing=1 and
    vocab_size=10**5, a 10,000th of its probability to what it has seen, and `sample` draws noise. To sample
    from a large vocabulary take far less than 1 / vocab_size.

    Only n-grams that were seen are stored, so memory grows with the text and not with
    vocab_size ** (order + 1).

    Raises ValueError for vocab_size < 1, order < 0, or a smoothing that is negative or not finite, TypeError
    for a vocab_size or order that is no integer.
    """

    def __init__(self, vocab_size: int, order: int = 1, smoothing: float = 1.0) -> None:
        vocab_size, order = map(_integer, (vocab_size, order))
        _checks.integer("vocab_size", vocab_size, 1)
        _checks.integer("order", order, 0)
        if vocab_size >= 2**31:
            raise ValueError(f"vocab_size must be below 2**31, got {vocab_size}")
        if not (smoothing >= 0 and math.isfinite(smoothing)):
            raise ValueError(f"smoothing must be a finite number, 0 or more, got {smoothing}")
        self.vocab_size = vocab_size
        self.order = order
        self.smoothing = float(smoothing)
        # A trie of contexts: a context of j+1 tokens is the pair (id of its first j tokens, last token),
        # stored as id * vocab_size + token and numbered by its rank in _levels[j]. Ranks stay below the
        # text's length, so the keys fit 64 bits at any order.
        self._levels: list[Tensor] = []
        self._grams: Tensor | None = None  # [M] sorted keys (context id, token)
        self._cumulative = torch.zeros(1, dtype=torch.long)  # [M+1] running counts of _grams, from 0
        self._offsets = torch.zeros(1, dtype=torch.long)  # [contexts+1] where a context's grams begin

    def __repr__(self) -> str:
        return f"MarkovModel(vocab_size={self.vocab_size}, order={self.order}, smoothing={self.smoothing})"

    @property
    def stored(self) -> int:
        """How many n-grams of order + 1 tokens the text fitted has, each stored with its count: no more than
        the text has tokens. Raises RuntimeError before `fit`."""
        return self._fitted().numel()

    @property
    def dense_size(self) -> int:
        """How many counts a dense table holds: vocab_size ** (order + 1), for the bigram model its square."""
        return int(self.vocab_size ** (self.order + 1))

    def fit(self, tokens: Tokens) -> MarkovModel:
        """Counts the n-grams of tokens, [N] integers; replaces what was fitted before. Returns the model.

        Raises ValueError where tokens is not 1-D, holds a token outside [0, vocab_size), or is not longer
        than `order`.
        """
        tokens = self._checked(tokens)
        windows = tokens.numel() - self.order
        levels: list[Tensor] = []
        ids = torch.zeros(windows, dtype=torch.long, device=tokens.device)
        for j in range(self.order):
            keys = ids * self.vocab_size + tokens[j : j + windows]
            level, ids = torch.unique(keys, return_inverse=True)
            levels.append(level)
        grams, counts = torch.unique(ids * self.vocab_size + tokens[self.order :], return_counts=True)
        contexts = levels[-1].numel() if levels else 1
        starts = torch.arange(contexts + 1, device=tokens.device) * self.vocab_size
        self._levels = levels
        self._grams = grams
        self._cumulative = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self._offsets = torch.searchsorted(grams, starts)
        return self

    def log_prob(self, tokens: Tokens) -> Tensor:
        """The sum of log p(token | context) over tokens[order:], in nats: a float64 scalar tensor.

        The first `order` tokens only serve as context. With smoothing=0 an unseen n-gram gives -inf.
        Raises ValueError as `fit` does, RuntimeError before `fit`.
        """
        return self._log_probs(tokens).sum()

    def perplexity(self, tokens: Tokens) -> Tensor:
        """exp of minus the mean of log p over tokens[order:]: a float64 scalar tensor."""
        return torch.exp(-self._log_probs(tokens).mean())

    def sample(
        self,
        n: int,
        *,
        start: Tokens | None = None,
        num_sequences: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws n tokens from the chain: LongTensor [n], or [num_sequences, n] where that is given.

        start: the tokens before the first one drawn (at least `order` of them; they are not repeated in
        the result). Without it a context is drawn from the text fitted, and the result begins with it.
        A context that was never seen goes on with any token, all alike: with a smoothing that is not far
        below 1 / vocab_size most contexts are soon such ones.
        generator: on the device of the tokens fitted. Raises ValueError for a short start, and for a
        context with no continuation where smoothing is 0.
        """
        grams = self._fitted()
        if n < 0:
            raise ValueError(f"n must be 0 or more, got {n}")
        if num_sequences is not None and num_sequences < 1:
            raise ValueError(f"num_sequences must be 1 or more, got {num_sequences}")
        rows = 1 if num_sequences is None else num_sequences
        if start is None:
            context = self._draw_contexts(rows, generator)
            drawn = context[:, :n]
        else:
            begin = self._checked(start, at_least=self.order).to(grams.device)
            context = begin[begin.numel() - self.order :].expand(rows, self.order)
            drawn = context[:, :0]
        result = torch.empty(rows, n, dtype=torch.long, device=grams.device)
        result[:, : drawn.size(1)] = drawn
        for i in range(drawn.size(1), n):
            token = self._draw_next(self._context_ids(list(context.unbind(1)), rows), generator)
            result[:, i] = token
            context = torch.cat([context, token[:, None]], dim=1)[:, 1:] if self.order else context
        return result[0] if num_sequences is None else result

    def _checked(self, tokens: Tokens, at_least: int | None = None) -> Tensor:
        try:
            tokens = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                "tokens must be 1-D integers, a text's characters or words by number, "
                f"got a {type(tokens).__name__}"
            ) from error
        at_least = self.order + 1 if at_least is None else at_least
        if tokens.numel() == 0:
            tokens = tokens.long()  # an empty list reads as float
        if tokens.dim() != 1 or tokens.is_floating_point() or tokens.is_complex():
            raise ValueError(f"tokens must be 1-D integers, got {tokens.dtype} {list(tokens.shape)}")
        if tokens.numel() < at_least:
            raise ValueError(f"order {self.order} needs at least {at_least} tokens, got {tokens.numel()}")
        tokens = tokens.long()
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size):
            low, high = int(tokens.min()), int(tokens.max())
            raise ValueError(f"tokens must be in [0, {self.vocab_size}), got values from {low} to {high}")
        return tokens

    def _fitted(self) -> Tensor:
        if self._grams is None:
            raise RuntimeError("the model has seen no text yet: call fit(tokens) first")
        return self._grams

    def _context_ids(self, context: list[Tensor], rows: int) -> Tensor:
        """The ids of contexts given token by token (`order` tensors [rows]); -1 where unseen."""
        ids = torch.zeros(rows, dtype=torch.long, device=self._offsets.device)
        for level, token in zip(self._levels, context, strict=True):
            # An unseen prefix stays unseen: its key would be negative, or name another context.
            ids = torch.where(ids >= 0, _rank(level, ids * self.vocab_size + token), ids)
        return ids

    def _log_probs(self, tokens: Tokens) -> Tensor:
        grams = self._fitted()
        tokens = self._checked(tokens).to(grams.device)
        windows = tokens.numel() - self.order
        ids = self._context_ids([tokens[j : j + windows] for j in range(self.order)], windows)
        gram = torch.where(ids >= 0, _rank(grams, ids * self.vocab_size + tokens[self.order :]), ids)
        count = torch.where(gram >= 0, self._cumulative[gram + 1] - self._cumulative[gram.clamp(min=0)], 0)
        total = self._totals(ids)
        smoothed = count.double() + self.smoothing
        # log(0) - log(0) would be NaN for an unseen context without smoothing: nothing is known, so -inf.
        log_p = smoothed.log() - (total.double() + self.smoothing * self.vocab_size).log()
        return torch.where(smoothed > 0, log_p, -math.inf)

    def _totals(self, ids: Tensor) -> Tensor:
        known = ids.clamp(min=0)
        total = self._cumulative[self._offsets[known + 1]] - self._cumulative[self._offsets[known]]
        return torch.where(ids >= 0, total, 0)

    def _draw_contexts(self, rows: int, generator: torch.Generator | None) -> Tensor:
        """Contexts as often as the text has them: [rows, order]."""
        grams = self._fitted()
        total = self._cumulative[-1].expand(rows)
        keys = grams[self._pick(torch.zeros_like(total), total, generator)]
        tokens: list[Tensor] = []
        for level in reversed(self._levels):
            keys = level[keys // self.vocab_size]
            tokens.append(keys % self.vocab_size)
        return torch.stack(tokens[::-1], dim=1) if tokens else grams.new_empty(rows, 0)

    def _draw_next(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        # The smoothed distribution is a mixture of the counts and the uniform one: no row of vocab_size
        # values is ever built.
        total = self._totals(ids)
        uniform_mass = self.smoothing * self.vocab_size
        if uniform_mass == 0 and bool((total == 0).any()):
            raise ValueError("a context has no continuation in the text fitted, and smoothing is 0")
        chance = torch.rand(ids.shape, dtype=torch.double, device=ids.device, generator=generator)
        from_counts = chance * (total + uniform_mass) < total
        begin = self._cumulative[self._offsets[ids.clamp(min=0)]]
        seen = self._fitted()[self._pick(begin, total, generator)] % self.vocab_size
        anything = torch.randint(self.vocab_size, ids.shape, device=ids.device, generator=generator)
        return torch.where(from_counts, seen, anything)

    def _pick(self, begin: Tensor, total: Tensor, generator: torch.Generator | None) -> Tensor:
        """Index of a gram drawn by its count among the running counts [begin, begin + total)."""
        chance = torch.rand(begin.shape, dtype=torch.double, device=begin.device, generator=generator)
        at = begin + torch.minimum((chance * total).long(), (total - 1).clamp(min=0))
        last = self._cumulative.numel() - 2
        return (torch.searchsorted(self._cumulative, at, right=True) - 1).clamp(max=last)


def _rank(table: Tensor, keys: Tensor) -> Tensor:
    """Positions of keys in the sorted table, -1 where absent."""
    at = torch.searchsorted(table, keys).clamp(max=table.numel() - 1)
    return torch.where(table[at] == keys, at, -1)

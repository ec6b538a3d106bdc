"""Sequences from a model, one symbol at a time: greedy, sampled, or by beam search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _checks

STRATEGIES = ("greedy", "sample", "beam")

StepFn = Callable[[Tensor, Any], tuple[Tensor, Any]]


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    """One token [N] drawn from each row of logits [N, V].

    temperature=0: the likeliest; top_k=0: all may be chosen. The draw is made on the generator's device, so
    that with one on the CPU a seed means the same everywhere.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.size(-1):
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    # The maximum is subtracted first, in double: a tiny temperature must not make inf - inf, nor be 0.
    wide = logits.double()
    weights = torch.softmax((wide - wide.amax(-1, keepdim=True)) / temperature, dim=-1)
    if generator is not None:
        weights = weights.to(generator.device)
    return torch.multinomial(weights, 1, generator=generator).squeeze(-1).to(logits.device)


def _check(
    step_fn: StepFn,
    start: Tensor,
    max_steps: int,
    end: int | None,
    strategy: str,
    temperature: float,
    top_k: int,
    beam_size: int,
    length_penalty: float,
    generator: torch.Generator | None,
) -> None:
    if not callable(step_fn):
        raise TypeError(f"step_fn must be callable, got {type(step_fn).__name__}")
    if not isinstance(start, Tensor):
        raise TypeError(f"start must be a LongTensor [B], got {type(start).__name__}")
    if start.dtype != torch.int64 or start.dim() != 1:
        raise ValueError(f"start must be a LongTensor [B], got {start.dtype} of shape {list(start.shape)}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    _checks.integer("max_steps", max_steps, 0)
    _checks.integer("top_k", top_k, 0)
    _checks.integer("beam_size", beam_size, 1)
    if end is not None:
        _checks.integer("end", end, 0)
    _checks.finite("temperature", temperature)
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    _checks.finite("length_penalty", length_penalty)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    for name, owner, given in (
        ("temperature", "sample", temperature != 1),
        ("top_k", "sample", top_k != 0),
        ("generator", "sample", generator is not None),
        ("beam_size", "beam", beam_size != 1),
        ("length_penalty", "beam", length_penalty != 0),
    ):
        if given and strategy != owner:
            raise ValueError(f"{name} is of strategy={owner!r}, got strategy={strategy!r}")


def _step(step_fn: StepFn, token: Tensor, state: Any, end: int | None) -> tuple[Tensor, Tensor, Any]:
    """(logits [N, V], their log_softmax in float32 or wider, state) of one checked call."""
    made = step_fn(token, state)
    N = token.size(0)
    if not isinstance(made, tuple | list) or len(made) != 2 or not isinstance(made[0], Tensor):
        entries = made if isinstance(made, tuple | list) else (made,)
        kinds = ", ".join(type(entry).__name__ for entry in entries)
        raise TypeError(f"step_fn must return (logits [N, V], state), got ({kinds})")
    logits, state = made
    if not logits.is_floating_point():
        raise ValueError(f"step_fn must give logits of a floating-point type, got {logits.dtype}")
    if logits.dim() != 2 or logits.size(0) != N or logits.size(1) < 1:
        raise ValueError(f"step_fn must give logits [N, V] with N = {N} and V > 0, got {list(logits.shape)}")
    if logits.device != token.device:
        raise ValueError(f"step_fn must give logits on start's {token.device}, got {logits.device}")
    if end is not None and end >= logits.size(1):
        raise ValueError(f"end must be a token in [0, V) = [0, {logits.size(1)}), got {end}")
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(logits, -1, dtype=wide)
    if log_probs.isnan().any():
        raise ValueError("step_fn gave logits with NaN, +inf, or nothing but -inf in a row")
    return logits, log_probs, state


def _single(
    step_fn: StepFn,
    token: Tensor,
    state: Any,
    max_steps: int,
    end: int | None,
    choice: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Greedy and sampled: `choice` takes logits [B, V] to tokens [B]."""
    tokens: list[Tensor] = []
    scores = torch.zeros(token.shape, dtype=torch.float32, device=token.device)
    ended = torch.zeros_like(token, dtype=torch.bool)
    while len(tokens) < max_steps and not (tokens and end is not None and ended.all()):
        logits, log_probs, state = _step(step_fn, token, state, end)
        token = choice(logits)
        gained = log_probs.gather(1, token[:, None]).squeeze(1)
        if end is not None:
            token = token.masked_fill(ended, end)
            gained = gained.masked_fill(ended, 0)
            ended = token == end
        scores = scores + gained
        tokens.append(token)
    return torch.stack(tokens, 1) if tokens else token.new_empty(token.size(0), 0), scores


def _select(state: Any, rows: Tensor, count: int) -> Any:
    """These rows of every tensor of the nest, each of which has `count`."""

    def select(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, bool | int | float):
            return leaf
        if not isinstance(leaf, Tensor):
            raise TypeError(f"state must be a nest of tensors, got a {type(leaf).__name__} in it")
        if leaf.dim() == 0:
            return leaf
        dim = 0 if leaf.dim() <= 2 else 1
        if leaf.size(dim) != count:
            raise ValueError(
                f"a state's tensor must have its {count} rows in dimension {dim}, got {list(leaf.shape)}"
            )
        return leaf.index_select(dim, rows.to(leaf.device))

    return pytree.tree_map(select, state)


def _best(totals: Tensor, lengths: Tensor, length_penalty: float) -> Tensor:
    """Indices of totals [B, K, k], flat, by totals / lengths [B, K] ** length_penalty, the largest first; on
    the CPU: not every device has float64."""
    wide = totals.cpu().double()
    # By logarithms, and these scaled, as such a power and even its logarithm may overflow; where nothing is
    # left of the totals beside it, by themselves.
    scale = max(1.0, abs(length_penalty))
    ranks = length_penalty / scale * lengths.cpu()[..., None].double().log() - (-wide).log() / scale
    by_total = torch.sort(wide.flatten(1), stable=True, descending=True).indices
    by_rank = torch.sort(ranks.flatten(1).gather(1, by_total), stable=True, descending=True).indices
    return by_total.gather(1, by_rank)


def _beam(
    step_fn: StepFn, start: Tensor, state: Any, max_steps: int, end: int | None, K: int, length_penalty: float
) -> tuple[Tensor, Tensor]:
    B, device = start.size(0), start.device
    column = torch.arange(B, device=device)
    state = _select(state, column.repeat_interleave(K), B)
    token = start[:, None].expand(B, K)
    # All beams are the same yet, and one of them must not be counted K times.
    scores = torch.full((B, K), -torch.inf, dtype=torch.float32, device=device)
    scores[:, 0] = 0
    lengths = torch.zeros(B, K, dtype=torch.int64, device=device)  # steps until `end`
    ended = torch.zeros(B, K, dtype=torch.bool, device=device)
    tokens: list[Tensor] = []  # of each step, [B, K]
    parents: list[Tensor] = []  # the beam of the step before that each goes on from, [B, K]
    while len(tokens) < max_steps and not (tokens and end is not None and ended.all()):
        _, log_probs, state = _step(step_fn, token.flatten(), state, end)
        V = log_probs.size(1)
        gains = log_probs.view(B, K, V)
        if end is not None:
            # An ended beam goes on in one way alone, by another `end` that changes nothing.
            stay = log_probs.new_full((V,), -torch.inf)
            stay[end] = 0
            gains = torch.where(ended[..., None], stay, gains)
        totals = scores[..., None] + gains  # [B, K, V]
        lengths = lengths + ~ended
        # What goes on from one beam is equally long: of it only the K likeliest can be among the K best.
        totals, tokens_of = totals.topk(min(K, V))
        best = _best(totals, lengths, length_penalty)[:, :K].to(device)  # of K * min(K, V)
        parent = best // totals.size(2)
        token, scores = (t.flatten(1).gather(1, best) for t in (tokens_of, totals))
        lengths = lengths.gather(1, parent)
        if end is not None:
            # Where there are fewer than K sequences, the beams left over have ended too.
            token = token.masked_fill(scores.isneginf(), end)
            ended = token == end
        state = _select(state, (column[:, None] * K + parent).flatten(), B * K)
        tokens.append(token)
        parents.append(parent)

    beam = torch.arange(K, device=device).expand(B, K)
    path = []
    for token, parent in zip(reversed(tokens), reversed(parents), strict=True):
        path.append(token.gather(1, beam))
        beam = parent.gather(1, beam)
    return torch.stack(path[::-1], 2) if path else start.new_empty(B, K, 0), scores


@torch.no_grad()
def generate(
    step_fn: StepFn,
    start: Tensor,
    state: Any = None,
    *,
    max_steps: int,
    end: int | None = None,
    strategy: str = "greedy",
    temperature: float = 1.0,
    top_k: int = 0,
    beam_size: int = 1,
    length_penalty: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Sequences of tokens, each step's put in at the next.

    step_fn         step_fn(token [N], state) -> (logits [N, V], state). What it reads for each row, such as
                    an encoder's memory [S, N, M] and its lengths [N], belongs in the state where beams are
                    searched for. -inf forbids a token
    start           LongTensor [B], the first step's tokens
    state           any nest of tensors, or None: what the first step gets. A tensor's batch lies in dimension
                    0 if it is 1-D or 2-D, else in 1, as in torch.nn's hidden states. For beams its rows are
                    repeated to N = B * beam_size before the first step, and reordered after each
    max_steps       how many steps at most
    end             the token with which a sequence ends; None: every one takes max_steps
    strategy        "greedy": the likeliest token; "sample": one drawn; "beam": the likeliest sequences found
                    by keeping, at each step, beam_size of them, ended ones among them
    temperature     of "sample": logits are divided by it; 0: the likeliest
    top_k           of "sample": only the k likeliest tokens are drawn from; 0: all
    generator       of "sample": where the draws come from, and on whose device they are made
    beam_size       of "beam"
    length_penalty  of "beam": they are ranked by score / steps_until_end ** length_penalty, `end` itself
                    counted (Wu 2016, arXiv:1609.08144, without its constant)
    returns         (tokens [B, steps], scores [B]); for beams (tokens [B, beam_size, steps], scores
                    [B, beam_size]), the best first. `start` is left out, `end` is kept; after it a row
                    repeats it, and scores nothing. steps <= max_steps, less where all rows have ended.
                    scores: sums of log_softmax(logits), whatever temperature and top_k, in float32 or wider.
                    Where there are fewer than beam_size sequences, the beams left over score -inf

    No gradients are kept. Raises TypeError and ValueError for options and tensors other than these, and
    ValueError for an option of another strategy and where logits are NaN.
    """
    _check(step_fn, start, max_steps, end, strategy, temperature, top_k, beam_size, length_penalty, generator)
    if strategy == "beam":
        return _beam(step_fn, start, state, max_steps, end, beam_size, length_penalty)
    heat = temperature if strategy == "sample" else 0.0
    return _single(
        step_fn, start, state, max_steps, end, lambda logits: choose(logits, heat, top_k, generator)
    )

"""Text from a trained model, one character at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .corpus import Vocabulary
from .errors import UserError
from .model import CharacterModel


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token [1] from logits [V]. temperature=0: the likeliest. top_k=0: all may be chosen."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if 0 < top_k < logits.numel():
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(0, kept.indices, kept.values)
    # The maximum is subtracted first, in double: a tiny temperature must not make inf - inf, nor be 0.
    weights = torch.softmax((logits - logits.max()).double() / temperature, dim=-1)
    return torch.multinomial(weights, 1, generator=generator)


@torch.no_grad()
def generate(
    model: CharacterModel,
    vocabulary: Vocabulary,
    length: int,
    *,
    prompt: str = "",
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> str:
    """The prompt and `length` characters after it. Raises UserError for a prompt outside the vocabulary.

    The draw is made on the CPU from a generator of its own, so a seed means the same on every device.
    """
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    # Without a prompt the model starts as after a line's end, which is not part of the result.
    start = prompt or ("\n" if "\n" in vocabulary.characters else vocabulary.characters[0])
    inputs = vocabulary.encode(start)[:, None]  # [T, 1]
    model.eval()
    state = None
    tokens: list[Tensor] = []
    for _ in range(length):
        logits, state = model(inputs.to(device), state)
        if not logits.isfinite().all():
            raise UserError("the model's outputs are not finite: its training has diverged")
        token = choose(logits[-1, 0].float().cpu(), temperature, top_k, generator)
        tokens.append(token)
        inputs = token[:, None]
    return prompt + (vocabulary.decode(torch.cat(tokens)) if tokens else "")

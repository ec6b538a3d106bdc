"""Text from a trained model, one character at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import generation
from .corpus import Vocabulary
from .errors import UserError
from .model import CharacterModel


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
    # Without a prompt the model starts as after a line's end, which is not part of the result.
    start = prompt or ("\n" if "\n" in vocabulary.characters else vocabulary.characters[0])
    inputs = vocabulary.encode(start).to(model.head.weight.device)  # [T]
    model.eval()
    state = model(inputs[:-1, None])[1] if len(inputs) > 1 else None

    def step(token: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = model(token[None], state)  # [1, 1, V]
        if not logits.isfinite().all():
            raise UserError("the model's outputs are not finite: its training has diverged")
        return logits[0], state

    tokens, _ = generation.generate(
        step,
        inputs[-1:],
        state,
        max_steps=length,
        strategy="sample",
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(seed),
    )
    return prompt + vocabulary.decode(tokens[0])

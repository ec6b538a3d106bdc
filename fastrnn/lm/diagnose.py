"""`python -m fastrnn diagnose`: how the gradient flows back through a trained model's layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import diagnostics
from ..flow import GradientFlow
from . import train
from .corpus import Vocabulary, read_text
from .errors import UserError, os_reason
from .model import CharacterModel

# As docs/guide/gradients.md has it; `lm train` itself begins with torch.nn's values.
VANISHING = {
    "LSTM": "in a program of your own, fastrnn.init.chrono_(layer, steps) before training",
    "GRU": "in a program of your own, fastrnn.init.chrono_(layer, steps) before training",
    "RNN": "lm train --cell lstm or gru; in a program of your own, fastrnn.init.chrono_ on such a layer",
}
EXPLODING = "lm train with a lower --clip or --lr"


def stretches(vocabulary: Vocabulary, text: str, steps: int, batch: int, name: str) -> Tensor:
    """Stretches of steps + 1 characters, evenly spread over the text: [steps + 1, B], B as far as it goes."""
    tokens = vocabulary.encode(text)
    spare = tokens.numel() - steps - 1
    if spare < 0:
        raise UserError(
            f"{name} is too short: --steps {steps} needs {steps + 1} characters, it has {tokens.numel()}"
        )
    begins = torch.linspace(0, spare, min(batch, spare + 1), dtype=torch.double).round().long()
    return tokens[begins + torch.arange(steps + 1)[:, None]]


def flows(model: CharacterModel, tokens: Tensor) -> tuple[list[GradientFlow], float]:
    """Of each layer, and the loss: that of the last character of tokens [T + 1, B], its mean over B."""
    losses = []

    def last(output: Tensor) -> Tensor:
        losses.append(F.cross_entropy(model.head(output[-1]), tokens[-1]))
        return losses[-1]

    with torch.no_grad():
        x = model.embedding(tokens[:-1])
    found = diagnostics.gradient_flow(model.rnn, x, loss=last)
    return [found] if isinstance(found, GradientFlow) else found, losses[-1].item()


def diagnose(
    path: str, data: str | None, steps: int, batch: int, plot: str | None, device: torch.device
) -> None:
    """Prints the summary of each layer of the checkpoint's model, and what helps; draws them to `plot`."""
    model, vocabulary = train.load_model(path, device)
    name = data or "the standard library"
    try:
        tokens = stretches(vocabulary, read_text(data), steps, batch, name).to(device)
    except UserError as error:
        if data is None:
            raise UserError(f"{error}; this text is {name}'s sources: name another with --data") from error
        raise
    found, loss = flows(model, tokens)
    if not math.isfinite(loss):
        raise UserError(f"the model of {path} has diverged: its loss is {loss}")
    print(
        f"{path}: L is the loss of the last character, {loss:.3f}, over {tokens.shape[1]} stretches of "
        f"{steps} characters of {name}"
    )
    for flow in found:
        print(flow.summary())
    verdicts = {flow.verdict for flow in found}
    if "vanish" in verdicts:
        print(f"against vanishing: {VANISHING[type(model.rnn).__name__]}")
    if "explode" in verdicts:
        print(f"against exploding: {EXPLODING}")
    if plot is not None:
        try:
            diagnostics.plot(found, plot)
        except OSError as error:
            raise UserError(f"cannot write {plot}: {os_reason(error)}") from error
        except ValueError as error:  # a suffix that names no format
            raise UserError(f"cannot write {plot}: {error}") from error
        print(f"written to {plot}")

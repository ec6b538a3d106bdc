"""Training with Adam, gradient clipping and truncated backpropagation with a carried state."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint
from .corpus import Chunks, Corpus, Vocabulary
from .errors import UserError
from .model import CharacterModel, Config, State, build, each
from .progress import Progress
from .report import Curve
from .world import World


class Trainer:
    """A model in training; `step` counts the chunks it has been trained on.

    losses [step] in nats per character and seconds [step] are the history, validations the pairs
    (step, perplexity). With several processes each trains on its share of the columns, and all of them hold
    the same parameters, losses and validations.
    """

    def __init__(
        self, config: Config, corpus: Corpus, device: torch.device, world: World | None = None
    ) -> None:
        self.world = world or World()
        self.world.check(config.batch)
        self.config = config
        self.corpus = corpus
        self.device = device
        self.model = build(config, len(corpus.vocabulary), device)
        self.parallel = self.world.wrap(self.model)
        self._own_random_numbers()
        self.interrupted = False  # in any of the processes
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.chunks = Chunks(corpus.train.to(device), config.batch, config.bptt)
        self.step = 0
        self.state: State | None = None
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validations: list[tuple[int, float]] = []

    def _own_random_numbers(self) -> None:
        """So that no two processes drop out alike; the first goes on as a process by itself would."""
        if not self.world.first:
            torch.manual_seed(self.config.seed + self.world.rank)

    def leave(self) -> None:
        """Lets go of the other processes, before the group that joins them is destroyed.

        Of all that hold that group only torch's `destroy_process_group` frees it without Python's lock. Where
        DistributedDataParallel is the last to hold it, freeing it waits for threads that wait for the lock.
        """
        self.parallel = self.model

    def tokens(self, step: int) -> int:
        """That step `step` was of; a pass's last chunk may be shorter than the others."""
        return self.config.batch * self.chunks.steps(step % len(self.chunks))

    def curve(self, name: str) -> Curve:
        """All steps so far, for a report."""
        return Curve(name, self.losses, self.seconds, [self.tokens(step) for step in range(self.step)])

    def train_step(self, interrupted: bool = False) -> float:
        """One chunk forward and backward and one step of Adam; returns the loss before that step.

        interrupted: whether this process was asked to stop, which all then learn of.
        """
        began = time.perf_counter()
        position = self.step % len(self.chunks)
        if position == 0:
            self.state = None  # a new pass over the text
        inputs, targets = map(self.world.columns, self.chunks.chunk(position))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        logits, state = self.parallel(inputs, self.state)
        loss = cross_entropy(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.state = each(state, Tensor.detach)  # the values go on to the next chunk, the gradient does not
        news = torch.stack([loss.detach(), loss.new_tensor(float(interrupted))])
        # Waits for the device, so that the time below is the step's.
        value, stop = self.world.mean(news).tolist()
        self.interrupted = stop > 0
        self.step += 1
        self.losses.append(value)
        self.seconds.append(time.perf_counter() - began)
        return float(value)

    def validate(self) -> float:
        """Perplexity on the validation text, with the state carried through it; kept in `validations`."""
        value = perplexity(self.model, self.corpus.valid.to(self.device), self.config)
        self.validations.append((self.step, value))
        return value

    def fields(self) -> dict[str, Any]:
        """All that a checkpoint needs to go on as if nothing had happened, on any number of processes that
        divides the batch.

        Called by all of them.
        """
        rng = {name: self._of_each(state) for name, state in random_state(self.device).items()}
        return {
            "config": asdict(self.config),
            "characters": self.corpus.vocabulary.characters,
            "digest": self.corpus.digest,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "position": self.step % len(self.chunks),
            "state": each(self.state, self.world.gathered),
            "rng": rng,
            "losses": torch.tensor(self.losses, dtype=torch.double),
            "seconds": torch.tensor(self.seconds, dtype=torch.double),
            "validations": self.validations,
        }

    def _of_each(self, state: Tensor) -> list[Tensor]:
        return [s.cpu() for s in self.world.each(state.to(self.device))]

    def restore(self, saved: dict[str, Any], path: str) -> None:
        """Takes over the fields of a checkpoint read from `path`."""
        if saved["digest"] != self.corpus.digest:
            raise UserError(f"{path} was trained on another text: give the --data that it was trained on")
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]
            if saved["position"] != self.step % len(self.chunks) or len(saved["losses"]) != self.step:
                raise ValueError("step, position and history disagree")
            self._check_sizes(saved["state"])
            self.state = each(saved["state"], lambda s: self.world.columns(s).to(self.device))
            rank, rng = self.world.rank, saved["rng"]
            if rank < len(rng["cpu"]):  # else one of more processes than before
                set_random_state({name: states[rank] for name, states in rng.items()}, self.device)
            self.losses = saved["losses"].tolist()
            self.seconds = saved["seconds"].tolist()
            self.validations = [(int(step), float(value)) for step, value in saved["validations"]]
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: its parts do not fit each other") from error

    def _check_sizes(self, state: Any) -> None:
        """ValueError or LookupError where Adam's moments or the carried state are not the model's."""
        parameters = list(self.model.parameters())
        if self.step and len(self.optimizer.state) != len(parameters):
            raise ValueError("moments are missing")
        for p, moments in self.optimizer.state.items():
            if any(moments[name].shape != p.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("moments are of other shapes")
        if self.step == 0:
            return
        pair = self.config.cell == "lstm"
        if pair and not (isinstance(state, tuple | list) and len(state) == 2):
            raise ValueError("the state is no pair")
        shape = (self.config.layers, self.config.batch, self.config.hidden)
        for s in state if pair else (state,):
            if s.shape != shape or s.dtype != parameters[0].dtype:
                raise ValueError("the state is of another shape or type")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch's own generators, from which a step on the device draws."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Goes on from what `random_state` gave, here or on another device."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over [T, B], in nats per character."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def perplexity(model: CharacterModel, tokens: Tensor, config: Config) -> float:
    """exp of the mean loss over tokens [M]; leaves the random state as it is."""
    columns = max(1, min(config.batch, tokens.numel() // (config.bptt + 1)))
    chunks = Chunks(tokens, columns, config.bptt)
    model.eval()
    state: State | None = None
    total, count = 0.0, 0
    for index in range(len(chunks)):
        inputs, targets = chunks.chunk(index)
        logits, state = model(inputs, state)
        total += cross_entropy(logits, targets).item() * targets.numel()
        count += targets.numel()
    # exp overflows for a model that has diverged; infinity is the honest answer.
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


def config_of(saved: dict[str, Any], path: str) -> Config:
    """The checked Config of a checkpoint's fields."""
    try:
        if set(saved["config"]) != {field.name for field in fields(Config)}:
            raise ValueError("unknown or missing options")
        config = Config(**saved["config"])
        config.check(len(saved["characters"]))
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: its configuration is not valid") from error
    return config


def load_model(path: str, device: torch.device) -> tuple[CharacterModel, Vocabulary]:
    """The model of a checkpoint, ready to sample from."""
    saved = checkpoint.load(path)
    config = config_of(saved, path)
    vocabulary = Vocabulary(saved["characters"])
    if not vocabulary.characters:
        raise UserError(f"{path} is damaged: its vocabulary is empty")
    model = build(config, len(vocabulary), device)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise UserError(f"{path} is damaged: its parts do not fit each other") from error
    return model.eval(), vocabulary


class Interrupt:
    """Whether Ctrl-C was pressed."""

    pressed = False


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Turns the first Ctrl-C into a flag, so that a step ends whole; the second one stops at once."""
    interrupt = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    # A background job of a shell ignores Ctrl-C, and only the main thread may set a handler.
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def press(number: int, frame: FrameType | None) -> None:
        interrupt.pressed = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def run(trainer: Trainer, steps: int, path: str, *, save_every: int, valid_every: int) -> bool:
    """Trains up to `steps` steps in all, saving to `path` on the way. Returns False where Ctrl-C left
    steps to do. UserError where the loss or the weights are no numbers any more, which are not saved."""
    progress = Progress(steps, trainer.step, silent=not trainer.world.first)
    saved_at = -1

    def diverged(what: str) -> UserError:
        kept = f"; {path} has step {saved_at}" if saved_at >= 0 else ""
        return UserError(f"step {trainer.step}: {what}: training has diverged, take a smaller --lr{kept}")

    def save() -> None:
        nonlocal saved_at
        if not all(p.isfinite().all() for p in trainer.model.parameters()):
            raise diverged("weights are not finite")
        fields = trainer.fields()
        if trainer.world.first:
            checkpoint.save(path, fields)
        saved_at = trainer.step

    try:
        with interrupts() as interrupt:
            while trainer.step < steps and not trainer.interrupted:
                loss = trainer.train_step(interrupt.pressed)
                if not math.isfinite(loss):
                    raise diverged(f"the loss is {loss}")
                rate = trainer.tokens(trainer.step - 1) / trainer.seconds[-1]
                progress.update(f"loss {loss:.4f}  {rate:,.0f} tokens/s")
                last = trainer.step == steps
                if last or trainer.step % valid_every == 0:
                    value = trainer.validate()
                    progress.write(f"step {trainer.step}: validation perplexity {value:.3f}")
                if last or trainer.step % save_every == 0:
                    save()
            if trainer.interrupted and saved_at != trainer.step:
                save()
            return trainer.step >= steps
    finally:
        progress.close()

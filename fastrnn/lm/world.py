"""The processes of a run: one by itself, or those that torchrun started, by torch.distributed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import LostProcessError, UserError

# What gloo and NCCL say when the other end has gone.
_LOST = ("closed by peer", "reset by peer", "connection refused", "broken pipe", "gloo", "nccl", "timed out")


@dataclass(frozen=True)
class World:
    """This process is number `rank` of `size`; each has its share of the batch's columns."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """True in the one process that speaks and writes."""
        return self.rank == 0

    def check(self, batch: int) -> None:
        """Raises UserError where the batch cannot be shared out evenly."""
        if batch % self.size:
            raise UserError(f"--batch {batch} must be a multiple of the {self.size} processes")

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the processes."""
        return model if self.size == 1 else nn.parallel.DistributedDataParallel(model)

    def columns(self, batched: Tensor) -> Tensor:
        """This process's share of the columns [.., B, ..]."""
        if self.size == 1:
            return batched
        share = batched.size(1) // self.size
        return batched.narrow(1, self.rank * share, share)

    def each(self, own: Tensor) -> list[Tensor]:
        """Every process's tensor of one shape, in the order of their ranks; called by all processes."""
        if self.size == 1:
            return [own]
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous())
        return parts

    def gathered(self, share: Tensor) -> Tensor:
        """All columns [.., B, ..] from every process's share; called by all processes."""
        return torch.cat(self.each(share), 1)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes; called by all."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size


def local_device(device: torch.device) -> torch.device:
    """`cuda` becomes the GPU of this process among those of its machine. UserError where several processes
    would share one."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    if torch.cuda.device_count() == 1:  # as where each process is shown its own
        return device
    if device.index is None:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UserError(f"--device {device}: each process takes a GPU of its own, give --device cuda")
    return device


def _identity(path: str) -> tuple[int, int] | None:
    """Of the file as it is now; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def joined(device: torch.device, path: str, resumed: bool = False) -> Iterator[World]:
    """The run's processes, joined while the block lasts; LostProcessError where one of them is lost.

    path: the checkpoint from which the run can go on then, if it is of this run: `resumed`, or written since.
    """
    found = _identity(path)

    def go_on() -> str:
        if _identity(path) not in (None, found) or resumed:
            return "its checkpoint is whole: start all again with --resume"
        return "it has saved no checkpoint yet: start all again"

    def asked_to_end(number: int, frame: FrameType | None) -> None:
        raise LostProcessError(
            f"asked to end (SIGTERM), as when another process of this run is gone; {go_on()}"
        )

    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # When a process is lost torchrun's agent sends this to the others, often before they notice.
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, asked_to_end) if main else None
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        if any(word in str(error).lower() for word in _LOST):
            cause = str(error).strip().splitlines()[0]
            raise LostProcessError(
                f"another process of this run is gone; {go_on()} (the cause: {cause})"
            ) from error
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()

"""`python -m fastrnn tune`: tries the configurations of given layers on this GPU, and keeps the fastest.

What it finds is written to `path()` and from then on taken for calls of just these shapes on such a GPU;
removing the file forgets it. Nothing else tries anything out.
"""

from __future__ import annotations

import itertools
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

import fastrnn
from fastrnn.backends import TRITON_DEVICES
from fastrnn.lm.errors import UserError

from . import heuristics, layer
from .heuristics import Config, Shape

LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (fastrnn.LSTM, {}),
    "gru": (fastrnn.GRU, {}),
    "gru_reset_before": (fastrnn.GRU, {"reset_after": False}),
    "rnn_tanh": (fastrnn.RNN, {}),
    "rnn_relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
}
SAMPLES, SAMPLE = 5, 0.02  # of each configuration, and seconds that one should take


def candidates(shape: Shape) -> Iterator[Config]:
    """The configurations worth trying, the one in force first."""
    first = heuristics.configure(shape)
    yield first
    block_h, block_p = heuristics.scan_blocks(shape)
    others = []
    if heuristics.resident_bytes(shape, block_h, block_p) <= heuristics.resident_limit(shape.capability):
        others += [
            Config("scan", block_b, block_h, block_p, warps, 1) for block_b in (16, 32) for warps in (4, 8)
        ]
    tiles = itertools.product((16, 32, 64), (16, 32, 64), (32, 64, 128), (4, 8), (2, 3, 4))
    for block_b, block_u, block_k, warps, stages in tiles:
        if block_b > 16 and block_b // 2 >= shape.B:
            continue  # half of it would hold the batch
        step = Config("step", block_b, block_u, block_k, warps, stages)
        if heuristics.programs(shape, block_b, block_u) <= shape.processors:
            others += [replace(step, kernel="grid", early=early) for early in (False, True)]
        else:
            others.append(step)
    yield from (config for config in others if config != first)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of a call's time, after one that compiles."""

    def sample(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        return (time.perf_counter() - start) / calls

    call()
    calls = max(1, round(SAMPLE / max(sample(1), 1e-6)))
    return statistics.median(sample(calls) for _ in range(SAMPLES))


def fastest(
    shape: Shape, call: Callable[[], Any], training: Callable[[], Any], device: torch.device
) -> list[tuple[float, Config]]:
    """Each candidate that this GPU runs, with its seconds a call, fastest first. training: a step of it,
    which takes the same configuration and must fit too, whatever is timed."""
    found = []
    before = heuristics.tuned().get(shape)
    try:
        for config in candidates(shape):
            heuristics.tuned()[shape] = config
            try:
                training()
                found.append((seconds(call, device), config))
            except OutOfResources:
                continue  # more shared memory or registers than a program may have
    finally:
        heuristics.tuned().pop(shape, None)
        if before is not None:
            heuristics.tuned()[shape] = before
    return sorted(found, key=lambda pair: pair[0])


def device() -> torch.device:
    """The GPU in force; UserError where there is none, unless kernels are interpreted."""
    if layer.INTERPRETED:
        return torch.device("cpu")
    for kind in TRITON_DEVICES:
        if torch.get_device_module(kind).is_available():
            return torch.device(kind)
    raise UserError("tune measures on a GPU, and torch sees none here")


def precisions(x: torch.Tensor) -> list[AbstractContextManager[Any]]:
    """In which products of x's type may be made: of float32 on NVIDIA's GPUs two, as torch's user says."""
    if layer.precision(x) == "ieee":
        return [nullcontext()]
    flags = torch.backends.cudnn.flags
    return [flags(enabled=True, allow_tf32=tf32) for tf32 in (True, False)]


def run(args: Namespace) -> None:
    """Tunes for every hidden size with every batch, and writes what it found."""
    where = device()
    if args.proj_size and args.cell != "lstm":
        raise UserError(f"--proj-size goes with --cell lstm alone, got --cell {args.cell}")
    D = 1 + args.bidirectional
    kind, options = LAYERS[args.cell]
    for H, B in itertools.product(args.hidden, args.batch):
        x = torch.randn(args.steps, B, H, device=where, dtype=getattr(torch, args.dtype), requires_grad=True)
        P = args.proj_size
        given = {**options, "bidirectional": args.bidirectional, **({"proj_size": P} if P else {})}
        module = kind(H, H, device=where, dtype=x.dtype, **given)

        def forward(module: Any = module, x: torch.Tensor = x) -> Any:
            with torch.no_grad():
                return module(x)

        def training(module: Any = module, x: torch.Tensor = x) -> Any:
            y = module(x)[0]
            return torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))

        for products in precisions(x):
            with fastrnn.backend("triton"), products:
                shape = layer.shape_of(args.cell, x, H, P or H, B, D, 1, P > 0)
                was = heuristics.configure(shape)
                found = fastest(shape, forward if args.forward else training, training, where)
            if not found:
                raise RuntimeError(f"no configuration ran for {shape}")
            best, config = found[0]
            told = {c: s for s, c in found}.get(was)
            gain = (
                f", {told / best:.2f}x the speed of {was.kernel} in {was}" if told and config != was else ""
            )
            name = f"{args.cell} H={H} B={B}" + (f" {shape.precision}" if shape.precision != "ieee" else "")
            step = best / args.steps * 1e6
            print(f"{name}: {step:.2f} us a step, {config.kernel} in {config}{gain}")
            heuristics.tuned()[shape] = config
            heuristics.save()
    print(f"written: {heuristics.path()}")

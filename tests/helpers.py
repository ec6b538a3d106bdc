"""What the tests of the layers and the cells share: twins of torch.nn's modules, comparisons, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn import cells, modules
from fastrnn.reference import CELLS as REGISTRY

F64 = torch.float64
TIGHT = {"rtol": 1e-12, "atol": 1e-12}

# id: (ours, torch.nn's, keyword arguments)
LAYERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lstm": (modules.LSTM, torch.nn.LSTM, {}),
    "lstm_proj": (modules.LSTM, torch.nn.LSTM, {"proj_size": 2}),
    "gru": (modules.GRU, torch.nn.GRU, {}),
    "rnn_tanh": (modules.RNN, torch.nn.RNN, {}),
    "rnn_relu": (modules.RNN, torch.nn.RNN, {"nonlinearity": "relu"}),
}
CELLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lstm": (cells.LSTMCell, torch.nn.LSTMCell, {}),
    "gru": (cells.GRUCell, torch.nn.GRUCell, {}),
    "rnn_tanh": (cells.RNNCell, torch.nn.RNNCell, {}),
    "rnn_relu": (cells.RNNCell, torch.nn.RNNCell, {"nonlinearity": "relu"}),
}
each_layer = pytest.mark.parametrize("cell", LAYERS)
each_cell = pytest.mark.parametrize("cell", CELLS)


def pair(cell: str, *args: Any, table: dict[str, Any] = LAYERS, **options: Any) -> tuple[Any, Any]:
    """Our module and torch.nn's, each built after the same seed, in float64."""
    ours, theirs, extra = table[cell]
    built = []
    for kind in (ours, theirs):
        torch.manual_seed(7)
        built.append(kind(*args, dtype=F64, **extra, **options))
    return built[0], built[1]


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=g).requires_grad_(grad)


def hidden(layer: Any, B: int | None, seed: int = 1, grad: bool = False) -> Any:
    """A random hx for the layer; B=None: unbatched."""
    K = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if B is None else (B,)
    h = randn(K, *batch, layer.proj_size or layer.hidden_size, seed=seed, grad=grad)
    if layer.mode != "LSTM":
        return h
    return h, randn(K, *batch, layer.hidden_size, seed=seed + 1, grad=grad)


def tensors(nest: Any) -> list[Tensor]:
    """The tensors of a nest of tuples (a PackedSequence is one), None left out."""
    if isinstance(nest, Tensor):
        return [nest]
    return [] if nest is None else [t for part in nest for t in tensors(part)]


def assert_same(ours: Any, theirs: Any, **tolerance: float) -> None:
    """The same tensors in the same places; a missing gradient equals only a missing gradient."""
    a, b = tensors(ours), tensors(theirs)
    assert len(a) == len(b)
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, **(tolerance or TIGHT))


def grads(outputs: Any, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of a loss that weighs every output differently."""
    floats = [t for t in tensors(outputs) if t.is_floating_point()]
    loss = sum((t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in floats)
    return torch.autograd.grad(loss, inputs, allow_unused=True)  # type: ignore[arg-type]


def assert_same_error(ours: Callable[[], Any], theirs: Callable[[], Any], text: bool = True) -> None:
    """Both raise: the same type and, unless text is False, the same words."""
    with pytest.raises(Exception) as t:  # noqa: PT011
        theirs()
    with pytest.raises(Exception) as o:  # noqa: PT011
        ours()
    assert type(o.value) is type(t.value), (o.value, t.value)
    if text:
        assert str(o.value) == str(t.value)


class Fresh:
    """A call of a tests' function, "module.function", in a process of its own. One that takes longer than
    `seconds` says where it hangs, and ends."""

    def __init__(self, function: str, *args: Any, seconds: int = 120, **environment: str) -> None:
        code = (
            f"import faulthandler; faulthandler.dump_traceback_later({seconds}, exit=True)\n"
            f"import {function.partition('.')[0]}; {function}(*{args!r})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), **environment),
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> str:
        """What it printed; fails with its messages where it failed."""
        out, errors = self.process.communicate()
        assert self.process.returncode == 0, errors
        return out


# Cases for the functional layer: inputs, states and flat parameters of any registered cell.
MASKS = ("none", "lengths", "reset", "lengths+reset", "packed")


def random_case(cell, T, B, I, H, D=1, P=0, bias=True, dtype=torch.float64):
    G = REGISTRY[cell].gates

    # Weights small enough that a long sequence is not chaotic: else rounding errors would grow with T.
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype) * (0.7 / max(1, shape[-1]) ** 0.5)

    params = []
    for _ in range(D):
        params += [randn(G * H, I), randn(G * H, P or H)]
        params += [randn(G * H), randn(G * H)] if bias else []
        params += [randn(P, H)] if P else []
    states = [randn(D, B, P or H), *(randn(D, B, H) for _ in range(REGISTRY[cell].states - 1))]
    return randn(T, B, I), states, params


def random_masks(mask, x):
    """The input (packed where the mask asks for it) and the keyword arguments."""
    T, B = x.shape[:2]
    if mask == "packed":
        lengths = torch.randint(1, T + 1, (B,)).sort(descending=True).values
        lengths[0] = T
        rows = torch.arange(T)[:, None] < lengths
        return x[rows], {"batch_sizes": rows.sum(1)}
    masks = {}
    if "lengths" in mask:
        masks["lengths"] = torch.randint(0, T + 1, (B,))
    if "reset" in mask:
        masks["reset"] = torch.rand(T, B) < 0.3
    return x, masks

"""What fastrnn is measured beside: torch.nn, and for inference onnxruntime where it is installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn.bench.grid import GATES, Shape

TORCH = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
# torch.nn's gates are i f g o and r z n; ONNX orders them i o f c and z r h.
ONNX_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
SETTLE, WAKE = 0.05, 0.02  # seconds


def forward(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)[0]


def training(module: nn.Module, x: Tensor) -> Tensor:
    """Forward and backward to the parameters; the input takes no gradient."""
    y: Tensor = module(x)[0]
    y.sum().backward()
    return y


STEPS = {"forward": forward, "training": training}


def why_no_onnxruntime() -> str | None:
    missing = [name for name in ("onnxruntime", "onnx", "numpy") if find_spec(name) is None]
    return f"onnxruntime is left out: {', '.join(missing)} not installed" if missing else None


def onnx_model(cell: str, module: nn.Module, shape: Shape) -> bytes:
    """The layer as one ONNX node with fixed T and B."""
    from onnx import TensorProto, helper, numpy_helper

    def in_order(name: str) -> Tensor:
        gates = getattr(module, name).detach().chunk(GATES[cell])
        return torch.cat([gates[k] for k in ONNX_ORDER[cell]])

    weights = {
        "W": in_order("weight_ih_l0")[None],
        "R": in_order("weight_hh_l0")[None],
        "B": torch.cat([in_order("bias_ih_l0"), in_order("bias_hh_l0")])[None],
    }
    options: dict[str, int] = {"linear_before_reset": 1} if cell == "gru" else {}
    node = helper.make_node(cell.upper(), ["X", "W", "R", "B"], ["Y"], hidden_size=shape.H, **options)
    graph = helper.make_graph(
        [node],
        cell,
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [shape.T, shape.B, shape.I])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [shape.T, 1, shape.B, shape.H])],
        [numpy_helper.from_array(w.contiguous().numpy(), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def onnxruntime_forward(cell: str, module: nn.Module, shape: Shape, x: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        onnx_model(cell, module, shape), options, providers=["CPUExecutionProvider"]
    )
    feed: dict[str, Any] = {"X": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])[:, 0]


def settle(wake: Callable[[], Tensor]) -> None:
    """Waits until another library's threads have stopped spinning, then wakes one's own with untimed calls.

    Measured on two cores: a torch.nn.LSTM of 4.5 ms took 9 ms right after an onnxruntime call, still so
    after a pause of 10 ms, and 4.7 ms after 50 ms; onnxruntime right after torch loses as much. The first
    calls after a pause wait for their threads: torch.relu of 300,000 numbers took 5 ms instead of 0.03.
    """
    time.sleep(SETTLE)
    end = time.perf_counter() + WAKE
    while time.perf_counter() < end:
        wake()

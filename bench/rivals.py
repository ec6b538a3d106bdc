"""What fastrnn is measured beside: torch.nn, for inference onnxruntime where it is installed, and in bfloat16
its own float32."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.bench.grid import GATES, STREAM, Case

TORCH, ONNX, FLOAT32 = "torch.nn", "onnxruntime", "fastrnn float32"
# torch.nn's gates are i f g o and r z n; ONNX orders them i o f c and z r h.
ONNX_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
SETTLE, WAKE = 0.05, 0.02  # seconds

Call = Callable[[], Any]


def layer(package: Any, case: Case, dtype: torch.dtype | None = None) -> nn.Module:
    """The case's layer of a package, torch.nn or fastrnn, with the weights of seed 0."""
    options = {"proj_size": case.proj_size} if case.proj_size else {}
    torch.manual_seed(0)
    module: nn.Module = getattr(package, case.cell.upper())(
        *(case.shape.I, case.shape.H, case.num_layers), bidirectional=case.directions == 2, **options
    )
    return module.to(dtype or getattr(torch, case.dtype))


def inputs(case: Case) -> Tensor:
    """[T, B, I], float32."""
    torch.manual_seed(1)
    return torch.randn(case.shape.T, case.shape.B, case.shape.I)


def values(y: Tensor | PackedSequence) -> Tensor:
    return y.data if isinstance(y, PackedSequence) else y


def forward(module: nn.Module, x: Any) -> Any:
    with torch.no_grad():
        return module(x)[0]


def training(module: nn.Module, x: Any) -> Any:
    """Forward and backward to the parameters; the input takes no gradient."""
    y = module(x)[0]
    values(y).sum().backward()
    return y


def last(module: nn.Module, x: Any) -> Any:
    """Training with a loss on the last step alone."""
    y = module(x)[0]
    y[-1].sum().backward()
    return y


def step(module: nn.Module, x: Any) -> Any:
    """STREAM calls one after the other, each with the state that the one before it gave."""
    state = None
    with torch.no_grad():
        for _ in range(STREAM):
            y, state = module(x, state)
    return y


PASSES = {"forward": forward, "training": training, "last": last, "step": step}


@dataclass
class Pass:
    """A call of a layer as the case wants it."""

    case: Case
    module: nn.Module
    x: Any

    def __call__(self) -> Any:
        return PASSES[self.case.mode](self.module, self.x)


def forget(call: Call) -> None:
    """Drops the gradients of an earlier call."""
    if isinstance(call, Pass):
        call.module.zero_grad(set_to_none=True)


def timed(call: Call) -> float:
    """Seconds of one call."""
    forget(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def why_no_onnxruntime() -> str | None:
    missing = [name for name in ("onnxruntime", "onnx", "numpy") if find_spec(name) is None]
    return f"onnxruntime is left out: {', '.join(missing)} not installed" if missing else None


def onnx_can(case: Case) -> bool:
    """Inference in float32; ONNX knows no projection."""
    return case.mode in ("forward", "step") and case.dtype == "float32" and case.kind != "projection"


def onnx_model(case: Case, module: nn.Module) -> bytes:
    """One ONNX node a layer, with fixed T and B: X [T, B, I] to Y [T, D, B, H], the last layer's.

    A stream's has the states h0 and c0, [D, B, H], as inputs too, and h1 and c1 as outputs.
    """
    from onnx import TensorProto, helper, numpy_helper

    T, B, H, D = case.shape.T, case.shape.B, case.shape.H, case.directions
    carried = {"lstm": ["h", "c"]}.get(case.cell, ["h"]) if case.mode == "step" else []
    lengths = "lengths" if case.kind == "packed" else ""
    nodes = []
    weights = {lengths: torch.tensor(case.lengths, dtype=torch.int32)} if lengths else {}
    options: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
    if case.cell == "gru":
        options["linear_before_reset"] = 1

    def in_order(name: str) -> Tensor:
        gates = getattr(module, name).detach().chunk(GATES[case.cell])
        return torch.cat([gates[k] for k in ONNX_ORDER[case.cell]])

    for k in range(case.num_layers):
        ends = [f"l{k}", f"l{k}_reverse"][:D]
        weights[f"W{k}"] = torch.stack([in_order(f"weight_ih_{end}") for end in ends])
        weights[f"R{k}"] = torch.stack([in_order(f"weight_hh_{end}") for end in ends])
        weights[f"B{k}"] = torch.stack(
            [torch.cat([in_order(f"bias_ih_{end}"), in_order(f"bias_hh_{end}")]) for end in ends]
        )
        if k:  # the layer below gave [T, 1, B, H]
            weights["direction"] = torch.tensor([1])
            nodes.append(helper.make_node("Squeeze", [f"Y{k - 1}", "direction"], [f"X{k}"]))
        taken = [f"X{k}", f"W{k}", f"R{k}", f"B{k}", lengths, *(f"{s}0" for s in carried)]
        nodes.append(
            helper.make_node(case.cell.upper(), taken, [f"Y{k}", *(f"{s}1" for s in carried)], **options)
        )

    def tensor(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        case.cell,
        [tensor("X0", T, B, case.shape.I), *(tensor(f"{s}0", D, B, H) for s in carried)],
        [tensor(f"Y{case.num_layers - 1}", T, D, B, H), *(tensor(f"{s}1", D, B, H) for s in carried)],
        [numpy_helper.from_array(w.contiguous().numpy(), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def onnxruntime_call(case: Case, module: nn.Module) -> Call:
    """The same pass in onnxruntime; it gives [T, B, D, H], also where our input is packed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        onnx_model(case, module), options, providers=["CPUExecutionProvider"]
    )
    x = inputs(case).numpy()
    if case.mode != "step":
        return lambda: torch.from_numpy(session.run(None, {"X0": x})[0]).transpose(1, 2)

    zero = torch.zeros(case.directions, case.shape.B, case.shape.H).numpy()
    names = [given.name for given in session.get_inputs()][1:]

    def stream() -> Tensor:
        states = [zero] * len(names)
        for _ in range(STREAM):
            y, *states = session.run(None, {"X0": x, **dict(zip(names, states, strict=True))})
        return torch.from_numpy(y).transpose(1, 2)

    return stream


def calls(case: Case) -> dict[str, Call]:
    """One sample of everybody's, ours under "fastrnn" and last; all have the same parameters and input."""
    x: Any = inputs(case)
    theirs, ours = layer(nn, case), layer(fastrnn, case)
    ours.load_state_dict(theirs.state_dict())
    found = {}
    if onnx_can(case) and why_no_onnxruntime() is None:
        found[ONNX] = onnxruntime_call(case, theirs)
    if case.kind == "packed":
        x = pack_padded_sequence(x, torch.tensor(case.lengths))
    if case.dtype != "float32":
        found[FLOAT32] = Pass(case, layer(fastrnn, case, torch.float32), x)
        x = x.to(getattr(torch, case.dtype))
    return {**found, TORCH: Pass(case, theirs, x), "fastrnn": Pass(case, ours, x)}


def check(case: Case, calls: dict[str, Call]) -> None:
    """Raises AssertionError where two disagree: a wrong answer must not be timed. Also the warm-up."""

    def padded(y: Any) -> Tensor:
        y = pad_packed_sequence(y)[0] if isinstance(y, PackedSequence) else y
        return y.detach().float().flatten(2)

    tolerance = 1e-3 if case.dtype == "float32" else 0.1
    ours = padded(calls["fastrnn"]())
    for name, call in calls.items():
        torch.testing.assert_close(
            padded(call()), ours, rtol=tolerance, atol=tolerance, msg=f"{name} disagrees"
        )


def settle(wake: Call) -> None:
    """Waits until another library's threads have stopped spinning, then wakes one's own with untimed calls.

    Measured on two cores: a torch.nn.LSTM of 4.5 ms took 9 ms right after an onnxruntime call, still so
    after a pause of 10 ms, and 4.7 ms after 50 ms; onnxruntime right after torch loses as much. The first
    calls after a pause wait for their threads: torch.relu of 300,000 numbers took 5 ms instead of 0.03.
    """
    time.sleep(SETTLE)
    end = time.perf_counter() + WAKE
    while time.perf_counter() < end:
        wake()

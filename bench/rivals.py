"""What fastrnn is measured beside: torch.nn, for inference onnxruntime where it is installed, and in bfloat16
and int8 its own float32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.bench.grid import GATES, STREAM, TRAINING, Case, flop

OURS = "fastrnn"
TORCH, ONNX, FLOAT32 = "torch.nn", "onnxruntime", "fastrnn float32"
PRODUCT = "torch.mm"  # no rival: how fast the machine multiplies in the same rounds
# torch.nn's gates are i f g o and r z n; ONNX orders them i o f c and z r h.
ONNX_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
SETTLE, WAKE = 0.05, 0.02  # seconds

Call = Callable[[], Any]


def dtype(case: Case) -> torch.dtype:
    """Of the input, and of a layer until it is quantized."""
    return torch.float32 if case.dtype == "int8" else getattr(torch, case.dtype)


def layer(package: Any, case: Case, dtype: torch.dtype) -> nn.Module:
    """The case's layer of a package, torch.nn or fastrnn, with the weights of seed 0."""
    options: dict[str, Any] = {"proj_size": case.proj_size} if case.proj_size else {}
    if case.kind == "batch first":
        options["batch_first"] = True
    torch.manual_seed(0)
    module: nn.Module = getattr(package, case.cell.upper())(
        *(case.shape.I, case.shape.H, case.num_layers), bidirectional=case.directions == 2, **options
    )
    return module.to(dtype).train(case.mode in TRAINING)


def numbers(case: Case) -> Tensor:
    """Everybody's input: [T, B, I], batch first [B, T, I]; float32."""
    torch.manual_seed(1)
    T, B, I = case.shape.T, case.shape.B, case.shape.I
    return torch.randn(B, T, I) if case.kind == "batch first" else torch.randn(T, B, I)


def inputs(case: Case, dtype: torch.dtype) -> Tensor | PackedSequence:
    """The numbers as a layer takes them, packed where the case is; in training they take a gradient."""
    x: Any = numbers(case).to(dtype)
    if case.kind == "packed":
        x = pack_padded_sequence(x, torch.tensor(case.lengths))
    data(x).requires_grad_(case.mode in TRAINING)
    return x


def data(x: Tensor | PackedSequence) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


class Pass:
    """A call of a layer of its own with an input of its own, as the case wants it and as a user writes it."""

    def __init__(self, case: Case, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.x = module, inputs(case, dtype)
        self.leaves = [*module.parameters(), data(self.x)]
        self.run = getattr(self, case.mode)

    def __call__(self) -> Any:
        return self.run()

    @torch.inference_mode()
    def forward(self) -> Any:
        return self.module(self.x)[0]

    def training(self) -> Any:
        y = self.module(self.x)[0]
        data(y).sum().backward()
        return y

    def last(self) -> Any:
        y = self.module(self.x)[0]
        y[-1].sum().backward()
        return y

    @torch.inference_mode()
    def step(self) -> Any:
        """STREAM calls one after the other, each with the state that the one before it gave."""
        state = None
        for _ in range(STREAM):
            y, state = self.module(self.x, state)
        return y

    def forget(self) -> None:
        """Drops the gradients of an earlier call."""
        for leaf in self.leaves:
            leaf.grad = None


def forget(call: Call) -> None:
    if isinstance(call, Pass):
        call.forget()


def timed(call: Call) -> float:
    """Seconds of one call."""
    forget(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeated(call: Call, count: int) -> float:
    """Seconds of one call, the median of so many."""
    return statistics.median(timed(call) for _ in range(count))


def repeats(slowest: float) -> int:
    """Of a call, once its threads have settled: what fits into the time that woke them; from 1 to 50."""
    return int(min(50, max(1, WAKE / slowest)))


MOST = 4  # times the seconds that a row should take, for the least rounds


def rounds(one: float, seconds: float, least: int) -> int:
    """How many, of `one` seconds each: what fits into `seconds`, or `least` within MOST times that; from 3 to
    1000."""
    fit = seconds / one
    return int(min(1000, max(3, fit, min(least, MOST * fit))))


def far_behind(theirs: float, ours: float, seconds: float) -> bool:
    """Is one call of a rival enough? Where it takes long and ten times ours, more change no verdict.

    As torch.nn's training in bfloat16 without AVX-512, which takes up to 100 s.
    """
    return theirs > MOST * seconds and theirs > 10 * ours


def alternate(
    calls: dict[Any, Call], seconds: float, prepare: Callable[[Any], Any] = lambda name: None
) -> dict[Any, list[float]]:
    """Seconds of each call, in at least three rounds; `prepare` gets a call's name before it is timed."""
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for done in range(200):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            prepare(name)
            samples[name].append(timed(call))
    return samples


def product(n: int) -> Call:
    """A torch.mm of two matrices [n, n] in float32."""
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return lambda: torch.mm(a, b, out=out)


def product_gflops(n: int, seconds: float) -> float:
    return 2 * n**3 / seconds / 1e9


SIDE = 1024  # with which torch.mm reaches what it does of larger ones, to a twentieth


def pace(case: Case) -> dict[str, Call]:
    """What the rounds of a float32 row have beside the rivals, where a call is no shorter than it."""
    long = flop(case) >= 2 * SIDE**3
    return {PRODUCT: product(SIDE)} if long and case.dtype == "float32" else {}


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
    """The same pass in onnxruntime; it gives [T, B, D, H], also where our input is packed.

    With the threads in force, as everybody; at B = 1, H = 128 one alone was up to a quarter faster. By `run`,
    which gives new arrays as our calls give new tensors; bound to buffers of the caller's, a step was some
    5 us faster.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        onnx_model(case, module), options, providers=["CPUExecutionProvider"]
    )
    given, got = ([end.name for end in ends] for ends in (session.get_inputs(), session.get_outputs()))
    feed = {"X0": numbers(case).numpy()}
    zero = torch.zeros(case.directions, case.shape.B, case.shape.H).numpy()

    def run() -> Tensor:
        states = [zero] * (len(given) - 1)
        for _ in range(case.calls):
            feed.update(zip(given[1:], states, strict=True))
            y, *states = session.run(got, feed)
        return torch.from_numpy(y).transpose(1, 2)

    return run


def calls(case: Case, onnx: bool = True) -> dict[str, Call]:
    """One sample of everybody's, ours last; all have the same parameters and input."""
    theirs, ours = layer(nn, case, dtype(case)), layer(fastrnn, case, dtype(case))
    ours.load_state_dict(theirs.state_dict())
    found: dict[str, Call] = {}
    if onnx and onnx_can(case) and why_no_onnxruntime() is None:
        found[ONNX] = onnxruntime_call(case, theirs)
    if case.dtype != "float32":
        found[FLOAT32] = Pass(case, layer(fastrnn, case, torch.float32), torch.float32)
    if case.dtype == "int8":
        ours = fastrnn.quantize(ours)
    return {**found, TORCH: Pass(case, theirs, dtype(case)), OURS: Pass(case, ours, dtype(case))}


# Of an output or a gradient: the norm of the difference over the norm.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.05}


def check(case: Case, calls: dict[str, Call]) -> list[str]:
    """Raises AssertionError where ours disagrees: a wrong answer must not be timed. Also the warm-up.

    In bfloat16 our own float32, which a row of its own compares, is the judge, and a rival that ours
    disagrees with the wrong one: returns their names. (torch.nn's LSTM by oneDNN's AMX kernels has other
    gradients of its input.)
    """

    def results(call: Call) -> list[Tensor]:
        """y, and the gradients that the call left."""
        forget(call)
        y = call()
        y = pad_packed_sequence(y)[0] if isinstance(y, PackedSequence) else y
        leaves = call.leaves if isinstance(call, Pass) else []
        return [t.detach().float() for t in (y.flatten(2), *(leaf.grad for leaf in leaves)) if t is not None]

    ours, wrong = results(calls[OURS]), []
    for name, call in calls.items():
        theirs = results(call)
        assert len(theirs) == len(ours), f"{name} has other gradients"
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
        if all(error <= TOLERANCE[case.dtype] for error in errors):  # not where one is no number
            continue
        judged = case.dtype == "bfloat16" and name != FLOAT32
        assert judged, f"{name} disagrees by {', '.join(f'{error:.2g}' for error in errors)}"
        wrong.append(name)
    return wrong


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

"""Probes of docs/compatibility.md: compilers, exporters and tracers."""

from __future__ import annotations

import copy
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from probing import B, T, Wrong, example, make, plain, probe, same, trained, wide
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

COMPILERS = "Compilers and exporters"


@contextmanager
def fresh_compiler(**config: Any) -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(**config):
        yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def compiled_at_sizes(library: Any, kind: str, fullgraph: bool, most: int, **config: Any) -> None:
    layer = make(library, kind)
    with fresh_compiler(**config) as counter:
        compiled = torch.compile(layer, fullgraph=fullgraph, backend=counter)
        for time, batch in ((6, 3), (9, 3), (12, 5), (20, 2), (7, 9)):
            x = example(time, batch)
            trained(compiled(x)[0], layer, kind, x)
    if counter.frame_count > most:
        raise Wrong(f"compiled {counter.frame_count} times for 5 sizes")


@probe(COMPILERS, "`torch.compile`, graph breaks allowed")
def compile_with_breaks(library: Any, kind: str) -> None:
    compiled_at_sizes(library, kind, False, 5)


@probe(COMPILERS, "`torch.compile(fullgraph=True)`: one graph, forward and backward")
def compile_whole(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()
    with fresh_compiler() as counter:
        trained(torch.compile(layer, fullgraph=True, backend=counter)(x)[0], layer, kind, x)


@probe(COMPILERS, "the same with `torch._dynamo.config.allow_rnn = True`")
def compile_whole_if_allowed(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()
    with fresh_compiler(allow_rnn=True) as counter:
        trained(torch.compile(layer, fullgraph=True, backend=counter)(x)[0], layer, kind, x)


@probe(COMPILERS, "... and T and B that change, in at most three compilations (`allow_rnn` too)")
def compile_sizes(library: Any, kind: str) -> None:
    compiled_at_sizes(library, kind, True, 3, allow_rnn=True)


@probe(COMPILERS, "`torch.compile(fullgraph=True)` of a PackedSequence (`allow_rnn` too)")
def compile_packed(library: Any, kind: str) -> None:
    layer = make(library, kind)
    with fresh_compiler(allow_rnn=True) as counter:

        def data(packed: Any) -> Tensor:
            return layer(packed)[0].data

        compiled = torch.compile(data, fullgraph=True, backend=counter)
        for lengths in ([6, 4, 1], [7, 7, 2, 1]):
            x = example(max(lengths), len(lengths))
            packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
            truth = plain(kind, wide(layer), x.double())[0]
            same(compiled(packed), pack_padded_sequence(truth, torch.tensor(lengths)).data)


class Model(nn.Module):
    """The layer inside a model: a tensor in, a tensor out."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


SIZES = ((6, 3), (15, 2), (1, 1))


def right_at_sizes(call: Callable[[Tensor], Tensor], layer: nn.Module, kind: str) -> None:
    for time, batch in SIZES:
        x = example(time, batch)
        same(call(x), plain(kind, wide(layer), x.double())[0])


@probe(COMPILERS, "`torch.export` with T and B dynamic, saved, loaded, run at other sizes")
def exported(library: Any, kind: str) -> None:
    layer = make(library, kind)
    dims = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    program = torch.export.export(Model(layer).eval(), (example(),), dynamic_shapes={"x": dims})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    right_at_sizes(lambda x: loaded(x), layer, kind)


def onnx_at_sizes(write: Callable[[nn.Module, str], None], layer: nn.Module, kind: str) -> None:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.onnx")
        write(Model(layer).eval(), path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        right_at_sizes(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), layer, kind)


def onnx_by_dynamo(model: nn.Module, path: str) -> None:
    dims = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    torch.onnx.export(model, (example(),), path, dynamo=True, dynamic_shapes={"x": dims}, verbose=False)


def onnx_by_trace(model: nn.Module, path: str) -> None:
    axes = {"x": {0: "T", 1: "B"}}
    torch.onnx.export(model, (example(),), path, dynamo=False, input_names=["x"], dynamic_axes=axes)


@probe(COMPILERS, "ONNX with T and B dynamic, by torch's default exporter (ours: `export_onnx`)", slow=True)
def onnx_default(library: Any, kind: str) -> None:
    write = (
        onnx_by_dynamo if library is nn else lambda m, p: fastrnn.export_onnx(m, example(), p, verbose=False)
    )
    onnx_at_sizes(write, make(library, kind), kind)


@probe(COMPILERS, "ONNX with T and B dynamic, by any exporter (torch.nn: `dynamo=False`)", slow=True)
def onnx_any(library: Any, kind: str) -> None:
    write = (
        onnx_by_trace if library is nn else lambda m, p: fastrnn.export_onnx(m, example(), p, verbose=False)
    )
    onnx_at_sizes(write, make(library, kind), kind)


@probe(COMPILERS, "`torch.jit.trace`, run at another T and B")
def jit_trace(library: Any, kind: str) -> None:
    layer = make(library, kind)
    right_at_sizes(torch.jit.trace(Model(layer), example()), layer, kind)


@probe(COMPILERS, "`torch.jit.script` of a copy of a model that holds the layer")
def jit_script(library: Any, kind: str) -> None:
    layer = make(library, kind)
    right_at_sizes(torch.jit.script(copy.deepcopy(Model(layer))), layer, kind)


@probe(COMPILERS, "`torch.fx.symbolic_trace`, the layer one node")
def fx_trace(library: Any, kind: str) -> None:
    layer = make(library, kind)
    traced = torch.fx.symbolic_trace(Model(layer))
    if [n.target for n in traced.graph.nodes if n.op == "call_module"] != ["layer"]:
        raise Wrong("wrong result: the layer is no node")
    right_at_sizes(traced, layer, kind)


@probe(COMPILERS, "`FlopCounterMode` counts the products of a forward pass")
def flops(library: Any, kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer = make(library, kind)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(example())
    expected = 2 * T * B * sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    if counter.get_total_flops() != expected:
        raise Wrong(f"wrong result: {counter.get_total_flops()} for {expected}")

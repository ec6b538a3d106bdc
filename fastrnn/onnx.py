"""Export to ONNX: each layer as one LSTM, GRU or RNN node, with T and B dynamic.

While a model is exported, `functional.layer` records one flat operator, `fastrnn_onnx::layer`, which the
exporter then translates. ONNX orders the gates i, o, f, g and z, r, n; torch.nn i, f, g, o and r, z, n.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_config
from torch.utils import _pytree as pytree

from . import _checks, functional, reference
from .inference import Packed
from .modules import LSTM
from .reference import CELLS, split_params
from .tree import ChildSumTreeLSTM, NaryTreeLSTM, TreeRNN

_NODES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", (1, 0, 2), {"linear_before_reset": 0}),
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}


@torch.library.custom_op("fastrnn_onnx::layer", mutates_args=())
def _operator(
    cell: str, x: Tensor, states: list[Tensor], params: list[Tensor], lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n and c_n (h_n again where the cell has no c)."""
    y, last, _ = reference.layer(cell, x, states, params, lengths)
    return y, last[0], last[-1].clone()


@_operator.register_fake
def _fake(
    cell: str, x: Tensor, states: list[Tensor], params: list[Tensor], lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    D, _, H = states[0].shape
    return (
        x.new_empty(x.shape[0], x.shape[1], D * H),
        torch.empty_like(states[0]),
        torch.empty_like(states[-1]),
    )


class _NoEqual(ValueError):
    """What the exporter wraps in errors of its own, and `export_onnx` raises after all."""


def _record(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    return_states: bool,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    if cell not in _NODES:
        raise _NoEqual(f"ONNX has no equal of the cell {cell!r}, only of {', '.join(_NODES)}")
    lacking = {"a PackedSequence": batch_sizes is not None, "reset=": reset is not None}
    lacking["return_states="] = return_states and CELLS[cell].states > 1
    lacking["proj_size"] = any(p.w_hr is not None for p in split_params(params, states[0].shape[0]))
    for name, used in lacking.items():
        if used:
            raise _NoEqual(f"ONNX's {_NODES[cell][0]} has no equal of {name}")
    y, h, c = _operator(cell, x, list(states), list(params), lengths)
    return y, (h, c)[: CELLS[cell].states], ()


@contextmanager
def _recording() -> Iterator[None]:
    functional.RECORDER.take = _record
    try:
        yield
    finally:
        functional.RECORDER.take = None


def _translate(cell: str, x: Any, states: Any, params: Any, lengths: Any = None) -> Any:
    from onnxscript import opset18 as op

    name, order, options = _NODES[cell]
    H = int(params[1].shape[1])
    per = 4 if len(params) > 2 and len(params[2].shape) == 1 else 2
    D = len(params) // per

    def in_order(w: Any) -> Any:
        if len(order) == 1:
            return w
        gates = [op.Slice(w, *(op.Constant(value_ints=[n]) for n in (k * H, (k + 1) * H, 0))) for k in order]
        return op.Concat(*gates, axis=0)

    def stacked(parts: list[Any]) -> Any:
        parts = [op.Unsqueeze(p, op.Constant(value_ints=[0])) for p in parts]
        return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=0)

    groups = [params[d * per : (d + 1) * per] for d in range(D)]
    W = stacked([in_order(g[0]) for g in groups])
    R = stacked([in_order(g[1]) for g in groups])
    biases = [op.Concat(in_order(g[2]), in_order(g[3]), axis=0) for g in groups] if per == 4 else []
    B = stacked(biases) if biases else None
    if "activations" in options:
        options = {"activations": options["activations"] * D}
    out = getattr(op, name)(
        x,
        W,
        R,
        B,
        None if lengths is None else op.Cast(lengths, to=6),  # int32
        *states,
        hidden_size=H,
        direction="forward" if D == 1 else "bidirectional",
        **options,
    )
    # [T, D, B, H] -> [T, B, D*H]
    y = op.Transpose(out[0], perm=[0, 2, 1, 3])
    y = op.Reshape(y, op.Constant(value_ints=[0, 0, D * H]))
    return y, out[1], out[-1]


def _by_parameter(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """args and kwargs by the names of forward's parameters, as torch.export takes them together."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return dict(bound.arguments)


def export_onnx(
    model: torch.nn.Module, args: tuple[Any, ...] | Tensor, path: str | os.PathLike[str], **options: Any
) -> None:
    """Writes model(*args) as an ONNX file in which every fastrnn layer and cell is an LSTM, GRU or RNN node.

    model    any module that holds fastrnn's layers, exported as it stands: call `model.eval()` for inference
    args     example inputs, tensors or nests of them; sizes that the model does not fix (T, B) stay dynamic,
             but the number of steps of an AttentionDecoder with input feeding, whose loop is written out
    path     the file to write
    options  go to torch.onnx.export (input_names, output_names, dynamic_shapes, opset_version ...)

    A `lengths=` argument becomes the node's sequence_lens: onnxruntime takes no zeros there.
    Needs the packages onnx and onnxscript (ImportError otherwise). Raises ValueError where ONNX has no equal:
    proj_size, reset=, a PackedSequence, the cell state under return_states=, recursive layers, a cell of
    your own; and for frozen and quantized layers.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export_onnx needs onnx and onnxscript: pip install onnx onnxscript") from error
    for name, module in _checks.is_module(model).named_modules():
        if isinstance(module, LSTM) and module.proj_size:
            raise ValueError(f"{name or 'the model'}: ONNX's LSTM has no equal of proj_size")
        if isinstance(module, ChildSumTreeLSTM | NaryTreeLSTM | TreeRNN):
            raise ValueError(f"{name or 'the model'}: ONNX has no equal of a recursive layer")
        if isinstance(module, Packed):
            raise ValueError(
                f"{name or 'the model'}: a {module.word} layer is not exported, the one it was made from is"
            )
    if isinstance(args, Tensor):
        args = (args,)
    table = {**(options.pop("custom_translation_table", None) or {})}
    table[torch.ops.fastrnn_onnx.layer.default] = _translate
    if "dynamic_shapes" not in options:
        dynamic = pytree.tree_map(
            lambda leaf: (
                dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO) if isinstance(leaf, Tensor) else None
            ),
            (args, options.get("kwargs") or {}),
        )
        options["dynamic_shapes"] = _by_parameter(model, *dynamic) if dynamic[1] else dynamic[0]
    try:
        # Else an example of one sequence would fix B = 1. (mypy cannot see it: torch makes it when imported.)
        with _recording(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            torch.onnx.export(model, args, path, dynamo=True, custom_translation_table=table, **options)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _NoEqual):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise ValueError(str(cause)) from error

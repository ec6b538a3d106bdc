"""Any two recurrent layers over one sequence, the second one from its end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import _checks
from ._fx import leaf_call, traced
from .backends import Explanation, explain
from .inference import Packed
from .modules import _Layer

MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concat": lambda f, b: torch.cat((f, b), -1),
    "sum": torch.add,
    "mul": torch.mul,
    "mean": lambda f, b: (f + b) / 2,
}


def _fresh(layer: RNNBase) -> RNNBase:
    """A layer of the same class, options, device and dtype, drawn anew; every parameter is trainable."""
    # Parametrizations, and the older weight_norm and pruning, take a weight out of the parameters.
    replaced = any(name not in layer._parameters for name in layer._flat_weights_names)
    if isinstance(layer, Packed) or replaced:
        kind = f"a {layer.word} layer" if isinstance(layer, Packed) else "a pruned or parametrized layer"
        raise ValueError(f"forward_layer is {kind}, which cannot be drawn anew: give a backward_layer too")
    fresh = copy.deepcopy(layer).requires_grad_(True)
    fresh.reset_parameters()  # type: ignore[no-untyped-call]
    return fresh


def _padded_rows(lengths: Tensor, T: int, batch_first: bool) -> Tensor:
    """The row of x.flatten(0, 1), x [T, B, .] or [B, T, .], that each row changes places with: step t of a
    sequence with its step length - 1 - t, padding with padding."""
    B = lengths.size(0)
    step = torch.arange(T, device=lengths.device)[:, None]  # [T, 1]
    column = torch.arange(B, device=lengths.device)  # [B]
    other = lengths - 1 - step  # [T, B]
    other = torch.where(other < 0, other + T, other)  # ONNX has no % of a T that it does not know
    return (column * T + other).t().flatten() if batch_first else (other * B + column).flatten()


def _packed_rows(packed: PackedSequence) -> Tensor:
    """The row of packed.data [N, .] that each row changes places with.

    Row (t, i), step t of the i-th longest sequence, stands at first[t] + i. No shape depends on a value.
    """
    row = torch.arange(packed.data.size(0), device=packed.data.device)  # [N]
    sizes = packed.batch_sizes.to(row.device)  # [T], descending
    ends = sizes.cumsum(0)
    first = ends - sizes
    step = torch.searchsorted(ends, row, right=True)
    column = row - first[step]
    length = sizes.size(0) - torch.searchsorted(sizes.flip(0), column, right=True)
    return first[length - 1 - step] + column


def _turned(x: Any, rows: Tensor | None, time: int) -> Any:
    """x, padded or packed, with every sequence reversed; rows None: all are as long as dimension `time`."""
    if rows is None:
        return x.flip(time)
    if isinstance(x, PackedSequence):
        data = x.data.index_select(0, rows)
        return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    return x.flatten(0, 1).index_select(0, rows).view(x.shape)


def _with_lengths(layer: RNNBase, x: Tensor, hx: Any, lengths: Tensor) -> Any:
    """A layer of torch.nn, which knows no lengths, by way of a PackedSequence, which knows no length of 0:
    such a sequence runs for a step of zeros, and its results are put right."""
    T = x.size(1 if layer.batch_first else 0)
    some = lengths > 0  # [B]
    held = some.view(-1, 1, 1) if layer.batch_first else some.view(-1, 1)
    ends = lengths.clamp(min=1).cpu()
    x = torch.where(held, x, x.new_zeros(()))
    packed = pack_padded_sequence(x, ends, layer.batch_first, enforce_sorted=False)
    output, last = layer(packed, hx)
    output, _ = pad_packed_sequence(output, layer.batch_first, total_length=T)
    output = torch.where(held, output, output.new_zeros(()))
    two = isinstance(last, tuple)
    given = (hx if two else (hx,)) if hx is not None else (None, None)
    # The states have their batch in dimension 1.
    kept = tuple(
        torch.where(some[:, None], h, h.new_zeros(()) if h0 is None else h0.to(h.dtype))
        for h, h0 in zip(last if two else (last,), given, strict=False)
    )
    return output, kept if two else kept[0]


def _run(layer: RNNBase, x: Tensor | PackedSequence, hx: Any, lengths: Tensor | None) -> Any:
    if lengths is None or lengths.size(0) == 0:
        return layer(x, hx)
    if isinstance(layer, _Layer):
        return layer(x, hx, lengths=lengths)
    assert isinstance(x, Tensor)
    return _with_lengths(layer, x, hx, lengths)


def _pair(hx: Any) -> tuple[Any, Any]:
    if hx is None:
        return None, None
    if not isinstance(hx, tuple | list) or len(hx) != 2:
        found = f"{len(hx)} entries" if isinstance(hx, tuple | list) else type(hx).__name__
        raise TypeError(f"hx must be a pair (hx of forward_layer, hx of backward_layer), got {found}")
    return hx[0], hx[1]


class Bidirectional(torch.nn.Module):
    """Two recurrent layers over one sequence, forward and from its end (Schuster & Paliwal 1997).

    With `lengths`, or a PackedSequence, the second layer starts at each sequence's own end.

    forward_layer   fastrnn.LSTM, GRU or RNN, frozen and quantized ones too, or torch.nn's; of any number of
                    layers: unlike `bidirectional=True`, where every layer reads both directions of the one
                    below, the two stacks meet in the output alone
    backward_layer  another one of the same input_size and batch_first; None: a fresh layer of forward_layer's
                    configuration
    merge           "concat", "sum", "mul" or "mean" of the two outputs at each step; None: both of them

    Parameters are the two layers' own, `forward_layer.*` and `backward_layer.*`. With one seed,
    Bidirectional(fastrnn.LSTM(I, H)) starts with the weights of fastrnn.LSTM(I, H, bidirectional=True), and
    computes the same.

    Raises TypeError for what is no recurrent layer, ValueError for an unknown merge, for layers that do not
    go together, and where backward_layer is None and forward_layer frozen, quantized, pruned or
    parametrized.
    """

    def __init__(
        self, forward_layer: RNNBase, backward_layer: RNNBase | None = None, *, merge: str | None = "concat"
    ) -> None:
        super().__init__()
        if merge not in (None, *MERGES):
            raise ValueError(f"merge must be one of {', '.join(MERGES)} or None, got {merge!r}")
        for name, layer in (("forward_layer", forward_layer), ("backward_layer", backward_layer)):
            if not isinstance(layer, RNNBase) and not (layer is None and name == "backward_layer"):
                raise TypeError(
                    f"{name} must be a recurrent layer of fastrnn or torch.nn, got {type(layer).__name__}"
                )
        self.forward_layer = forward_layer
        self.backward_layer = _fresh(forward_layer) if backward_layer is None else backward_layer
        self.merge = merge
        self._check_layers()

    def _check_layers(self) -> None:
        """ValueError unless both layers read the same input, and their outputs can be merged."""
        for name in ("input_size", "batch_first"):
            f, b = (getattr(layer, name) for layer in (self.forward_layer, self.backward_layer))
            if f != b:
                raise ValueError(f"both layers must have one {name}, got {f} and {b}")
        widths = [
            (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
            for layer in (self.forward_layer, self.backward_layer)
        ]
        if self.merge in ("sum", "mul", "mean") and widths[0] != widths[1]:
            raise ValueError(
                f"merge={self.merge!r} needs outputs of one width, got {widths[0]} and {widths[1]}"
            )

    def extra_repr(self) -> str:
        return f"merge={self.merge!r}"

    def _explain(self, input: Any) -> Explanation:
        """Of both layers, as of one where they run alike."""
        f, b = (
            explain(layer, input)
            if isinstance(layer, _Layer)
            else Explanation("torch", type(layer).__name__, "a layer of torch.nn")
            for layer in (self.forward_layer, self.backward_layer)
        )
        if f == b or f.backend is None or b.backend is None:
            return b if b.backend is None else f

        def both(name: str) -> str | None:
            first, second = getattr(f, name), getattr(b, name)
            return first if first == second else f"forward {first}, backward {second}"

        return Explanation(both("backend"), both("kernel"), both("reason") or "", both("split"))

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, *, lengths: Tensor | None = None
    ) -> Any:
        """Runs both layers over whole sequences.

        input    [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence
        hx       (hx of forward_layer, hx of backward_layer), each as its layer takes it or None. The second
                 is the state from which a sequence's end is read
        lengths  LongTensor [B], unsorted, zeros allowed: each sequence as if run alone, padding reaches
                 nothing, outputs there are 0. For torch.nn's layers they are copied to the CPU
        returns  (output, (state_f, state_b)): output as the input lies, with [.., P_f + P_b] for "concat",
                 or the pair of both where merge is None, each in the input's order; the states as each layer
                 returns them, state_b that at the sequence's first step

        In torch.compile(fullgraph=True) with fastrnn's layers; the compiler itself stops at torch.nn's.
        Raises what the layers raise; ValueError for lengths as `LSTM.forward` does; TypeError for an hx that
        is no pair.
        """
        proxy = traced(input, hx, lengths)
        if proxy is not None:
            return leaf_call(self, proxy, (input, hx), {"lengths": lengths})
        self._check_layers()
        hx_f, hx_b = _pair(hx)
        time, rows = 0, None
        if isinstance(input, PackedSequence):
            _checks.padded_only(lengths, None)
            rows = _packed_rows(input)
        else:
            _checks.is_tensor("input", input)
            _checks.layer_ranks("Bidirectional", input, None)
            batch_first = self.forward_layer.batch_first and input.dim() == 3
            time = 1 if batch_first else 0
            _checks.some_steps(input.size(time))
            if lengths is not None:
                T, B, batched = input.size(time), input.size(1 - time), input.dim() == 3
                lengths = _checks.sequence_lengths(lengths, T, B, input.device, batched).clamp(0, T)
                rows = _padded_rows(lengths, T, batch_first)

        output_f, state_f = _run(self.forward_layer, input, hx_f, lengths)
        output_b, state_b = _run(self.backward_layer, _turned(input, rows, time), hx_b, lengths)
        return self._merged(output_f, _turned(output_b, rows, time)), (state_f, state_b)

    def _merged(self, f: Any, b: Any) -> Any:
        if self.merge is None:
            return f, b
        if isinstance(f, PackedSequence):
            data = MERGES[self.merge](f.data, b.data)
            return PackedSequence(data, f.batch_sizes, f.sorted_indices, f.unsorted_indices)
        return MERGES[self.merge](f, b)

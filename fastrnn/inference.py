"""Layers for inference alone: `freeze` packs the weights once for good, `quantize` rounds them to int8."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from . import _checks, packed
from .kernels import KERNEL_DTYPES
from .modules import GRU, LSTM, RNN, _Layer

_M = TypeVar("_M", bound=torch.nn.Module)


class Packed(_Layer):
    """What `Frozen` and `Quantized` share: buffers instead of Parameters, and a packed copy of each layer.

    It is called as the layer that it was made from. The packed copies follow `load_state_dict`, `to`, copies
    and pickles, but no edit of a buffer in place; another tensor in its place is refused, in eager mode.
    """

    _own: list[str]  # its buffers, but for what a user has added
    _sources: dict[str, Tensor | None]  # these when they were packed
    _source_ids: tuple[int, ...]
    word: str  # for messages
    cell: str  # a name of `reference.CELLS`

    @property
    def _cell(self) -> str:
        return self.cell

    def _kept(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The buffers that stand for one of the plain layer's parameters."""
        raise NotImplementedError

    def _pack_layer(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and scales of the directions that `names` are of, for `packed.pack`."""
        raise NotImplementedError

    def _take(self, cell: str, weights: dict[str, Tensor]) -> None:
        """Makes these weights its own; it was a plain layer, perhaps a parametrized one, until now."""
        self.cell = cell
        for name in weights:  # and nothing that a user has added
            self._parameters.pop(name, None)
        self._modules.pop("parametrizations", None)
        # torch.nn's second list of the parameters.
        self._flat_weights_names, self._flat_weights, self._flat_weight_refs = [], [], []
        self._own = [f"packed_l{k}" for k in range(self.num_layers)]
        for name, weight in weights.items():
            for own, tensor in self._kept(name, weight).items():
                self.register_buffer(own, tensor)
                self._own.append(own)
        self._pack()

    def _pack(self) -> None:
        D = 2 if self.bidirectional else 1
        for k in range(self.num_layers):
            names = [name for group in self._all_weights[k * D : (k + 1) * D] for name in group]
            params, scales = self._pack_layer(names)
            self.register_buffer(f"packed_l{k}", packed.pack(self.cell, params, scales, D), persistent=False)
        self._sources = {name: self._buffers[name] for name in self._own}
        self._source_ids = self._ids()

    def _ids(self) -> tuple[int, ...]:
        return tuple(map(id, map(self._buffers.get, self._own)))

    def _forget(self) -> None:
        """Before others are packed: no two at a time take memory, and there are none where that fails."""
        for k in range(self.num_layers):
            self._buffers[f"packed_l{k}"] = None
        self._sources, self._source_ids = {}, ()

    def _weights(self, k: int) -> Tensor:
        weights = self._buffers[f"packed_l{k}"]
        if weights is None:
            raise RuntimeError(
                f"a {self.word} layer has no packed weights since a load or a move that failed: load another "
                "state, or make the layer again"
            )
        return weights

    def _check_sources(self) -> None:
        """RuntimeError where functional_call or an assignment has put another tensor in a buffer's place."""
        if self._ids() == self._source_ids:
            return
        for name, source in self._sources.items():
            now = self._buffers.get(name)
            same = now is source or (now is not None and source is not None and now.is_set_to(source))
            if not same:
                raise RuntimeError(
                    f"{name} of a {self.word} layer was replaced, whose weights are packed already: "
                    "load_state_dict packs others, functional_call and assignment cannot"
                )

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._forget()
        try:
            super()._load_from_state_dict(*args, **options)
        finally:
            self._pack()

    # no-untyped-call, here and below: torch does not annotate these methods of Module.
    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        derived = {*self._own} & self._non_persistent_buffers_set
        state["_buffers"] = {k: b for k, b in self._buffers.items() if k not in derived}
        del state["_sources"], state["_source_ids"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()  # perhaps on a machine of other instruction sets

    def _serves(self, like: Tensor) -> bool:
        """Whether the kernels take buffers of this device and dtype."""
        return like.is_cpu and like.dtype in KERNEL_DTYPES

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Behind `to`, `half`, `cuda` and their like: RuntimeError where the kernels could not follow."""
        mine = (self._buffers[name] for name in self._own)
        like = fn(next(b for b in mine if b is not None and b.is_floating_point()).new_empty(0))
        if not self._serves(like):
            raise RuntimeError(
                f"a {self.word} layer cannot be moved to {like.dtype} on {like.device}: move the layer it "
                "was made from, and make it again"
            )
        self._forget()
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch's, see above
        finally:
            self._pack()
        return self

    def train(self, mode: bool = True) -> Any:
        """RuntimeError unless mode is False."""
        if mode:
            raise RuntimeError(
                f"a {self.word} layer is for inference and cannot be trained: train the layer it was made "
                "from, and make it again"
            )
        return super().train(mode)

    def _torch_class(self) -> Any:
        raise ValueError(f"a {self.word} layer has no torch.nn equal: use the layer it was made from")

    def extra_repr(self) -> str:
        return f"{self.cell}, {super().extra_repr()}"

    def _layer_weights(self, k: int, D: int) -> list[Tensor]:
        if k == 0 and not torch.compiler.is_compiling():
            self._check_sources()
        return [self._weights(k)]

    def _call_layer(
        self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], **options: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        return packed.layer(self.cell, x, states, weights[0], **options)

    def _stream_weights(self) -> Sequence[Any]:
        if torch.is_grad_enabled():
            raise LookupError  # `_run` says what cannot be trained
        self._check_sources()
        return [self._weights(0)]


class Frozen(Packed):
    """A layer by `freeze`. Its state dict is the plain layer's, and loads into one and from one."""

    word = "frozen"
    kernel_note = ", frozen: weights packed once"

    def _kept(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        return {name: weight}

    def _pack_layer(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        return [getattr(self, name) for name in names], []


def rounded_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 q [rows, K] and scale [rows] with w = scale * q and an error of at most scale / 2."""
    scale = w.abs().amax(1) / 127
    q = (w / torch.where(scale > 0, scale, 1)[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scale


class Quantized(Packed):
    """A layer by `quantize`. Its state dict holds, for each weight, `{name}_int8` and `{name}_scale`, and the
    biases: a quarter of the plain layer's bytes. It loads into another quantized layer."""

    word = "quantized"
    kernel_note = ", int8 weights"

    def _kept(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        if not name.startswith("weight"):
            return {name: weight}
        q, scale = rounded_rows(weight)
        return {f"{name}_int8": q, f"{name}_scale": scale}

    def _pack_layer(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        weights = [name for name in names if name.startswith("weight")]
        params = [getattr(self, f"{name}_int8" if name in weights else name) for name in names]
        return params, [getattr(self, f"{name}_scale") for name in weights]

    def _serves(self, like: Tensor) -> bool:
        return like.is_cpu and like.dtype == torch.float32


def _is_ours(module: torch.nn.Module) -> bool:
    """A user's subclass is left alone, as by `convert`: its own `forward` would be lost."""
    return parametrize.type_before_parametrizations(module) in (LSTM, GRU, RNN)


def _copied(model: _M, kind: type[Packed], dtypes: frozenset[torch.dtype]) -> _M:
    """A copy of the model in eval mode whose layers are of `kind`."""

    def layers(of: torch.nn.Module) -> list[tuple[str, Any]]:
        return [(name or "the layer", m) for name, m in of.named_modules() if _is_ours(m)]

    found = layers(_checks.is_module(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no fastrnn.LSTM, GRU or RNN (fastrnn.convert makes them of "
            "torch.nn's); subclasses, cells, and layers that are frozen or quantized already do not count"
        )
    for where, layer in found:
        if "_given_weights" in layer.__dict__:
            raise ValueError(f"{where} has weights assigned to its _flat_weights, which no copy keeps")
        for name in layer._flat_weights_names:
            if name not in layer._parameters and not parametrize.is_parametrized(layer, name):
                raise ValueError(
                    f"{where}: {name} is no Parameter; where a hook makes it, as pruning's and the old "
                    "weight_norm's do, take that off first"
                )
        for name in getattr(layer, "parametrizations", ()):
            if name not in layer._flat_weights_names:
                raise ValueError(
                    f"{where}: {name} is parametrized and no weight of the layer: take that off first "
                    "(torch.nn.utils.parametrize.remove_parametrizations)"
                )
    # A parametrization may have a state, which reading changes: the copy's, in eval mode.
    made = copy.deepcopy(model).eval()
    for where, layer in layers(made):
        weights = {name: getattr(layer, name).detach() for name in layer._flat_weights_names}
        for name, tensor in weights.items():
            if not tensor.is_cpu or tensor.dtype not in dtypes:
                names = " or ".join(sorted(str(d) for d in dtypes))
                raise ValueError(
                    f"{where}: {name} must be {names} on the CPU, got {tensor.dtype} on {tensor.device}"
                )
        cell = layer._cell
        layer.__class__ = kind
        layer._take(cell, weights)
    return made


def freeze(model: _M) -> _M:
    """A copy for inference, whose weights are packed once for good into the layout that the kernels read.

    Its calls neither pack the weights, as a plain layer's do from a few rows (T * B) on, nor check them. The
    numbers are the plain layer's: the same bits where that packs, else to rounding.

    model    a fastrnn.LSTM, GRU or RNN, or any model that holds some, of float32, float64 or bfloat16 on the
             CPU. Cells and all other modules are copied as they are
    returns  the copy, in eval mode, its layers called as before. Its state dict is the model's, and loads
             both ways. The packed weights take their own memory beside it

    A model's `train()`, `half()` and the like raise when they come to such a layer: what stands before it in
    the model is changed by then, as torch goes from module to module.

    Raises TypeError where the model is no module, ValueError where it holds no such layer, or one of another
    dtype or device. The copy's layers raise RuntimeError on `train()`, and where a gradient of their input is
    wanted: they have none; in eager mode also where another tensor was put in a weight's place, as by
    functional_call.
    """
    return _copied(model, Frozen, KERNEL_DTYPES)


def quantize(model: _M) -> _M:
    """A copy for inference with int8 weights: a quarter of the memory traffic and of the state dict.

    Each row of a weight (one unit of one gate) is rounded to multiples of its largest value / 127. The input
    and the hidden state are rounded at each step, row by row, to 16 bits (fewer for rows of more than 512: 13
    at 4096). The products' sums are exact integers, and all else is float32, input and output too.

    model    a fastrnn.LSTM, GRU or RNN of float32 on the CPU, or any model that holds some. Cells and all
             other modules are copied as they are
    returns  the copy, in eval mode, its layers called as before. Its state dict holds int8 weights and their
             scales, and loads into another quantized copy, on a machine of any instruction set

    Beside float32, with torch.nn's initial weights, normal input, T = 100 and H = 128 to 1024, the
    outputs err by 0.0006 (LSTM), 0.0012 (GRU) and 0.0022 (RNN) in the root mean square, 0.45 % of the
    outputs' own, and by 0.005, 0.008 and 0.013 at most. A trained language model (`python -m fastrnn lm
    train --steps 1200`: two layers of LSTM, H = 256) has a validation perplexity of 5.470 for 5.469; its
    likeliest character is the same in 99.6 % of the places.

    Raises what `freeze` raises, and so do the copy's layers. A NaN or an infinity in a row of the input makes
    the step's whole row NaN.
    """
    return _copied(model, Quantized, frozenset({torch.float32}))

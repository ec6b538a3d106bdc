"""Whether gradients vanish or explode on their way back through time, at what rate, and by what Jacobians.

    flow = fastrnn.diagnostics.gradient_flow(layer, x)
    print(flow.summary())     # GRU: gradients vanish: ||dL/dh|| falls by 12 % a step on average over 199 ...
    flow.plot("flow.png")

The gradient of a loss by h_k is that by the last state times the Jacobians ds_t/ds_{t-1} of all steps between
(Bengio, Simard & Frasconi 1994, "Learning long-term dependencies with gradient descent is difficult"): it
vanishes where their singular values stay below 1, and can explode where they do not (Pascanu, Mikolov &
Bengio 2013, arXiv:1211.5063). What helps: against vanishing, a gated cell with `fastrnn.init.chrono_`, or
`orthogonal_` and `identity_` for one without gates; against exploding, `torch.nn.utils.clip_grad_norm_` and
`orthogonal_`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import _checks, functional
from .conversion import convert
from .flow import GradientFlow, Masks, Reading, draw, norm
from .inference import Packed
from .jacobians import STEPS
from .modules import _Layer
from .reference import DirectionParams, split_params

__all__ = ["GradientFlow", "gradient_flow", "plot"]


class _Pass(NamedTuple):
    """One layer of the forward pass, time first."""

    gx: Tensor  # [T, B, D*G*H] in the graph
    y: Tensor  # [T, B, D*P] in the graph
    c: Tensor | None  # [D, T, B, H]
    states: list[Tensor]  # the first ones, [D, B, .]
    params: list[DirectionParams]


class _Recorded(_Layer):
    """A layer whose input products are leaves of their own: their gradient is that of the gates.

    The kernels read the gates' input part gx as their input, and the identity as its weight.
    """

    passes: list[_Pass]

    def _streamed(self, input: Any, hx: Any) -> None:
        """Every call is to come by `_call_layer`."""

    def _call_layer(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        weights: list[Tensor],
        **options: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        masks = {name: options.pop(name) for name in ("lengths", "batch_sizes", "reset")}
        unknown = set(options) - {"return_states"}
        if unknown:  # their Jacobians would be wrong
            raise ValueError(f"gradient_flow does not know the layer's option {', '.join(sorted(unknown))}")
        D = states[0].shape[0]
        params = split_params([_leaf(w) for w in weights], D)
        first = [_leaf(s) for s in states]
        gx = torch.cat([linear(x, p.w_ih, p.b_ih) for p in params], -1)
        if not gx.requires_grad:
            gx.requires_grad_()
        flat: list[Tensor] = []
        for p, w in zip(
            params, torch.eye(gx.shape[-1], dtype=x.dtype, device=x.device).chunk(D), strict=True
        ):
            flat += [w, p.w_hh]
            if p.b_hh is not None:
                flat += [torch.zeros_like(p.b_hh), p.b_hh]
            flat += [] if p.w_hr is None else [p.w_hr]
        y, last, seq = functional.layer(self._cell, gx, first, flat, return_states=True, **masks)
        self.passes.append(_Pass(gx, y, seq[0] if seq else None, first, params))
        return y, last, seq


def _leaf(t: Tensor) -> Tensor:
    """Without a graph; what inference mode made, no backward pass may keep."""
    return t.detach().clone() if t.is_inference() else t.detach()


def _recorded(layer: Any) -> Any:
    """A copy of the layer that records its passes; parameters, hooks and parametrizations are the layer's."""
    twin: Any = None
    if isinstance(layer, RNNBase):
        twin = type(layer).__new__(type(layer))
        twin.__dict__.update(layer.__dict__)
        twin.__dict__["_compiled_call_impl"] = None
        convert(twin)
    if not isinstance(twin, _Layer) or isinstance(twin, Packed):
        text = (
            "layer must be a fastrnn.LSTM, GRU or RNN or torch.nn's, and not frozen or quantized, got "
            f"{type(layer).__name__}"
        )
        modules = layer.named_modules() if isinstance(layer, torch.nn.Module) else ()
        inside = [
            name for name, m in modules if name and isinstance(m, RNNBase) and not isinstance(m, Packed)
        ]
        raise TypeError(
            f"{text}; give it a layer inside this, get_submodule({inside[0]!r})" if inside else text
        )
    if twin._cell not in STEPS:
        raise ValueError(f"the Jacobian of the cell {twin._cell!r} is not known: {', '.join(STEPS)} are")
    twin.__class__ = type(type(twin).__name__, (_Recorded, type(twin)), {})
    twin.__dict__["passes"] = []
    return twin


def _last_step(output: Tensor, lengths: Tensor | None) -> Tensor:
    """The output [T, B, .] of each sequence's last step; of an empty one nothing."""
    if lengths is None:
        return output[-1]
    rows = torch.arange(output.shape[1], device=output.device)
    last = output[(lengths.to(output.device) - 1).clamp(0, output.shape[0] - 1), rows]
    return last[lengths.to(output.device) > 0]


def _loss_of(
    output: Any, loss: Callable[[Any], Tensor] | None, lengths: Tensor | None, batch_first: bool
) -> Tensor:
    """loss(output), or the sum of the last step's output."""
    if loss is None:
        timed = output.transpose(0, 1) if batch_first and output.dim() == 3 else output
        return _last_step(timed, lengths).sum()
    value = loss(output)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss(output) must be one real number, a tensor of one element, got {found}")
    if not value.requires_grad:
        raise ValueError("loss(output) does not depend on the output, or was detached from it")
    return value.sum()


# A compiled program calls it as it is. torch gives this decorator no types.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def gradient_flow(
    layer: torch.nn.Module,
    input: Tensor | PackedSequence,
    hx: Tensor | Sequence[Tensor] | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> GradientFlow | list[GradientFlow]:
    """How the gradient of a loss L flows back through a layer's steps, by one forward and one backward pass
    of the fused kernels, whatever T is.

    layer    a fastrnn.LSTM, GRU or RNN, with all their options, or torch.nn's (which then runs on the
             kernels). Nothing of it is changed, no parameter's `grad` either; its hooks run. Dropout between
             layers acts as the layer's mode says: call `eval()` first for the flow without it
    input    [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence
    hx       the first states, as the layer takes them
    loss     a function of the layer's output that gives a tensor of one element; the default is the sum of
             the last step's output, with lengths of each sequence's own last step. Where a loss reads many
             steps, gradients begin at all of them and add up: the norms are right, but have no rate
    lengths  LongTensor [B], and
    reset    BoolTensor [T, B] as the input lies: as the layer's forward takes them
    returns  a `GradientFlow`; for several layers or directions a list of them in torch.nn's order (layer 0,
             its reverse direction, layer 1, ...)

    It takes the time of 3 to 5 training steps of the layer (LSTM, H = 128 to 1024, T = 200, B = 16, one CPU
    thread; more where H and B are small), keeps the gates twice, and makes an identity of (D*G*H)^2 numbers,
    through which the kernels read the gates. The backward pass gives dL/dgates of all steps;
    dL/dh_k = dL/dy_k + R^T dL/dgates_{k+1} is one product for all k, and what passes by the gates (the LSTM's
    c, the GRU's z * h) an elementwise recursion.
    16-bit layers are diagnosed in float32, from the 16-bit values and gradients that they compute.

    Raises TypeError for another module (of a whole model, give the layer inside), ValueError for a loss that
    is no single number or does not depend on the output, and for complex layers; for input, hx and masks what
    the layer raises.
    """
    if not isinstance(input, Tensor | PackedSequence):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of the layer's output, got {type(loss).__name__}")
    given = input.data if isinstance(input, PackedSequence) else input
    if given.is_complex():
        raise ValueError(f"gradient_flow takes real layers only, got an input of {given.dtype}")
    twin = _recorded(layer)
    with torch.inference_mode(False), torch.enable_grad():
        order = None
        if isinstance(input, PackedSequence):
            _checks.padded_only(lengths, reset)
            order = (input.sorted_indices, input.unsorted_indices)
            x, lengths = pad_packed_sequence(input, batch_first=twin.batch_first)
        else:
            x = input
        x = _leaf(x)
        output = twin(x, hx, lengths=lengths, reset=reset)[0]
        if order is not None and loss is not None:
            output = _packed(output, cast(Tensor, lengths), order, twin.batch_first)
        passes: list[_Pass] = twin.passes
        value = _loss_of(output, loss, lengths, twin.batch_first)
        wanted = [t for p in passes for t in (p.gx, p.y)]
        grads = [
            torch.zeros_like(t) if g is None else g
            for t, g in zip(wanted, torch.autograd.grad(value, wanted, allow_unused=True), strict=True)
        ]
    batched = isinstance(input, PackedSequence) or input.dim() == 3
    if reset is not None:
        reset = reset if batched else reset.unsqueeze(1)
        reset = reset.transpose(0, 1) if batched and twin.batch_first else reset
    kind = type_before_parametrizations(layer).__name__
    flows = []
    with torch.no_grad(), torch.autocast(passes[0].gx.device.type, enabled=False):
        for k, p in enumerate(passes):
            for d in range(len(p.params)):
                name = kind if len(passes) == 1 else f"{kind} layer {k}"
                name += ", reverse" if d else ", forward" if len(p.params) > 1 else ""
                masks = _masks(p.gx, lengths, reset, d)
                dgx, dy = grads[2 * k], grads[2 * k + 1]
                reading = _reading(grads[-1], len(p.params), d, masks.active.sum(0), p is passes[-1])
                flows.append(_flow(name, twin._cell, p, dgx, dy, masks, reading, d, batched))
    return flows[0] if len(flows) == 1 else flows


def _packed(output: Tensor, lengths: Tensor, order: Any, batch_first: bool) -> PackedSequence:
    """The output as the layer gives it for a PackedSequence."""
    sort, unsort = order
    if sort is not None:
        output = output.index_select(0 if batch_first else 1, sort)
        lengths = lengths[sort.cpu()]
    packed = pack_padded_sequence(output, lengths, batch_first)
    return PackedSequence(packed.data, packed.batch_sizes, sort, unsort)


def _masks(gx: Tensor, lengths: Tensor | None, reset: Tensor | None, d: int) -> Masks:
    (T, B), device = gx.shape[:2], gx.device
    active = torch.ones(T, B, dtype=torch.bool, device=device)
    if lengths is not None:
        active = torch.arange(T, device=device)[:, None] < lengths.to(device).clamp(0, T)
    cut = torch.zeros_like(active) if reset is None else reset.to(device)
    if d == 0:
        first = torch.zeros_like(active)
        first[:1] = True
        return Masks(active, active & ~first & ~cut, active & first & ~cut)
    # In reverse step t continues t+1, unless the boundary before t+1 is cut; it begins where there is no t+1.
    none = torch.zeros_like(active[:1])
    later, cut = torch.cat([active[1:], none]), torch.cat([cut[1:], none])
    return Masks(*(m.flip(0) for m in (active, active & later & ~cut, active & ~later)))


def _backwards(v: Tensor, a: Tensor) -> Tensor:
    """u_k = v_k + a_{k+1} * u_{k+1}, all [T, B, H]."""
    steps = list(v)
    for k in range(len(steps) - 2, -1, -1):
        steps[k] = torch.addcmul(steps[k], a[k + 1], steps[k + 1])
    return torch.stack(steps)


def _reading(doutput: Tensor, D: int, d: int, lengths: Tensor, top: bool) -> Reading:
    """Of direction d's flows, from the gradient of the last layer's output [T, B, D*P]."""
    T = doutput.shape[0]
    step = torch.arange(T, device=doutput.device)[:, None]
    read = [(half != 0).any(-1) for half in doutput.chunk(D, -1)]
    last, first = torch.where(read[0], step, -1).amax(0), torch.where(read[-1], step, T).amin(0)
    # What a direction reads at the step with which it begins flows nowhere.
    forward, reverse = bool((last > 0).any()), D > 1 and bool((first < lengths - 1).any())
    later = reverse and (d == 1 or not forward)
    begin = torch.where(first < T, first, 0) if later else torch.where(last >= 0, last, lengths - 1)
    # The layers below get what both directions above them read.
    joined = read[d] if top else read[0] | read[-1]
    steps = max(joined.sum(0).tolist(), default=0)
    return Reading(begin, later, steps, bool(doutput.isfinite().all()))


def _flow(
    name: str,
    cell: str,
    run: _Pass,
    dgx: Tensor,
    dy: Tensor,
    masks: Masks,
    reading: Reading,
    d: int,
    batched: bool,
) -> GradientFlow:
    """Of direction d of one layer."""
    dtype = torch.float64 if run.gx.dtype == torch.float64 else torch.float32
    D = len(run.params)

    def steps(t: Tensor) -> Tensor:
        """What belongs to the direction of a [T, B, D*n], [T, B, n] in the order in which it runs."""
        return ordered(t.detach().chunk(D, -1)[d])

    def ordered(t: Tensor) -> Tensor:
        t = t.to(dtype)
        return torch.where(masks.active.unsqueeze(-1), t.flip(0) if d else t, t.new_zeros(()))

    new = [steps(run.y)]
    if run.c is not None:
        new.append(ordered(run.c[d].detach()))
    linked, begins = masks.linked.unsqueeze(-1), masks.begins.unsqueeze(-1)
    old = []
    for s, first in zip(new, run.states, strict=True):
        before = torch.where(begins, first[d].to(dtype), s.new_zeros(()))
        old.append(torch.cat([before[:1], torch.where(linked[1:], s[:-1], before[1:])]))
    p = run.params[d]
    params = replace(p, **{name: t.to(dtype) for name, t in vars(p).items() if t is not None})
    local = STEPS[cell](steps(run.gx), old, new, params)

    # From step k+1 to h_k, then along what passes by its gates.
    dh = steps(dy)
    dh[:-1] += torch.where(linked[1:], local.back(steps(dgx))[1:], dh.new_zeros(()))
    dc = None
    if local.carry is not None:
        carry = torch.where(linked, local.carry, dh.new_zeros(()))
        if run.c is None:
            dh = _backwards(dh, carry)
        else:
            dc = _backwards(local.of_cell(dh), carry)

    def norms(gradient: Tensor) -> Tensor:
        each = norm(gradient, (2,))
        return each.flip(0) if d else each

    bad = torch.stack([~s.isfinite().flatten(1).all(1) for s in new]).any(0).nonzero()
    broken = int(bad[0]) if bad.numel() else None
    if broken is not None and d:
        broken = run.gx.shape[0] - 1 - broken
    of_c = None if dc is None else norms(dc)
    return GradientFlow(name, norms(dh), of_c, local, masks, reading, broken, d == 1, batched)


def plot(flows: GradientFlow | Sequence[GradientFlow], path: str | Path) -> None:
    """Draws what `gradient_flow` gave, a row for each flow; see `GradientFlow.plot`."""
    draw([flows] if isinstance(flows, GradientFlow) else list(flows), path)

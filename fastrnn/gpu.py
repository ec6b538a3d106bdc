"""What the kernels for GPUs share on the host's side, whatever they are written in: sizes, masks, chunks of
time, and the products over all rows at once, which are torch's. The recurrence is an engine's."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _checks
from .kernels import Inputs, check, present
from .reference import CELLS, Cell, DirectionParams, split_params

# Inference keeps no more of the gates at a time.
CHUNK_BYTES = 32 << 20
# Of a launch's blocks along its second and third dimension.
GRID_LIMIT = (1 << 16) - 1


@dataclass(frozen=True)
class Traits:
    """What these kernels want to know of a cell beside `reference.Cell`. hidden_grads: which of the gradients
    made belongs to each gate's recurrent part (those of the input parts are the first ones); state: whether
    the cell itself, not only its product, reads h; mid: whether the last gate's product is one with r*h."""

    cell: Cell
    hidden_grads: tuple[int, ...]
    state: bool = True
    mid: bool = False

    @property
    def gates(self) -> int:
        return self.cell.gates

    @property
    def saved(self) -> int:
        return self.cell.saved

    @property
    def cell_state(self) -> bool:
        return self.cell.states == 2

    @property
    def grads(self) -> int:
        return max(self.hidden_grads) + 1


TRAITS = {
    "lstm": Traits(CELLS["lstm"], (0, 1, 2, 3), state=False),
    "gru": Traits(CELLS["gru"], (0, 1, 3)),
    "gru_reset_before": Traits(CELLS["gru_reset_before"], (0, 1, 2), mid=True),
    "rnn_tanh": Traits(CELLS["rnn_tanh"], (0,), state=False),
    "rnn_relu": Traits(CELLS["rnn_relu"], (0,), state=False),
}


def capability(device: torch.device) -> int | None:
    """major * 10 + minor of an NVIDIA GPU; None for others, and where there is none."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def allows_tf32(device: torch.device) -> bool:
    """Whether torch lets cuDNN's recurrent layers on this device multiply float32 as TF32, said in the old
    way (`torch.backends.cudnn.allow_tf32`, whose reading fails where the new one has been used) or in the
    new one."""
    rnn: Any = torch.backends.cudnn.rnn
    return device.type == "cuda" and bool(rnn.fp32_precision == "tf32")


@contextlib.contextmanager
def alone(device: torch.device) -> Any:
    """On this device, and without autocast, which would round the products."""
    with contextlib.ExitStack() as stack:
        if device.type != "cpu":
            stack.enter_context(torch.get_device_module(device).device(device))
        if torch._C._is_any_autocast_enabled():
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


class Call:
    """What forward and backward of a call have in common: sizes, parameters, masks."""

    def __init__(self, inputs: Inputs) -> None:
        check(inputs, heads=True)
        cell, x, states, params, lengths, batch_sizes, reset = inputs
        if batch_sizes is not None:
            batch_sizes = batch_sizes.cpu()
        self.cell, self.traits, self.x, self.states = cell, TRAITS[cell], x, states
        self.lengths, self.batch_sizes, self.reset = lengths, batch_sizes, reset
        self.D, self.B, self.P = states[0].shape
        self.H = params[0].shape[0] // self.traits.gates
        self.T = x.shape[0] if batch_sizes is None else batch_sizes.numel()
        self.params = [_contiguous(p) for p in split_params(params, self.D)]
        self.projected = self.params[0].w_hr is not None
        self.heads = self.P // (self.params[0].w_hh.shape[1] or 1)
        self.rows = x.flatten(0, -2)  # no reshape to -1: rows of no elements have no number
        self.N = self.rows.shape[0]
        self.packed, self.masked = batch_sizes is not None, lengths is not None or reset is not None
        # Of packed rows the first of each step, and past the last one.
        self.begins = []
        if batch_sizes is not None:
            sizes = _checks.packed_sizes(batch_sizes, self.B, self.N)
            self.begins = [0, *itertools.accumulate(sizes)]

    @property
    def empty(self) -> bool:
        return 0 in (self.N, self.B, self.H, self.P)

    def begin(self, t: int) -> int:
        """The first row of step t, or past the last one."""
        return self.begins[t] if self.packed else t * self.B

    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        """offsets [T + 1], the row at which each step of a PackedSequence begins; flags [D, T, B], bytes: 1
        where the sequence runs at t, 2 where its state is zeroed before."""
        offsets = flags = None
        if self.packed:
            offsets = torch.tensor(self.begins, device=self.x.device)
        if self.masked:
            on = self.active.to(torch.uint8)
            flags = torch.stack([on | cut.to(torch.uint8) << 1 for cut in self.cuts])
        return offsets, flags

    @functools.cached_property
    def active(self) -> Tensor:
        """[T, B]: whether the sequence runs at t."""
        if self.lengths is None:
            return torch.ones(self.T, self.B, dtype=torch.bool, device=self.x.device)
        steps = torch.arange(self.T, device=self.x.device)
        return steps[:, None] < self.lengths.to(self.x.device)[None, :]

    @functools.cached_property
    def cuts(self) -> list[Tensor]:
        """[T, B] of each direction: whether its state is zeroed before it runs t."""
        if self.reset is None:
            return [torch.zeros(self.T, self.B, dtype=torch.bool, device=self.x.device)] * self.D
        forward = self.reset.to(self.x.device) & self.active
        reverse = torch.cat([forward[1:], torch.zeros_like(forward[:1])])
        return [forward, reverse][: self.D]

    def before(self, seq: Tensor, first: Tensor, d: int) -> Tensor:
        """A state before each step [N, .], of the sequence of it after each [N, .] and its first [B, .]."""
        first = first.to(seq.dtype)
        if self.packed:
            return torch.cat([seq, first]).index_select(0, self._rows_before[d])
        steps = seq.unflatten(0, (self.T, self.B))
        if d == 0:
            shifted = torch.cat([first[None], steps[:-1]])
        else:
            shifted = torch.cat([steps[1:], first[None]])
            if self.lengths is not None:
                starts = torch.cat([~self.active[1:], torch.ones_like(self.active[:1])])
                shifted = torch.where(starts[:, :, None], first[None], shifted)
        if self.reset is not None:
            shifted = shifted.masked_fill(self.cuts[d][:, :, None], 0)
        return shifted.flatten(0, 1)

    def all_before(self, seqs: Sequence[Tensor], state: int) -> Tensor:
        """`before` of both directions, [D, N, .]."""
        firsts = self.states[state]
        found = [self.before(seq, firsts[d], d) for d, seq in enumerate(seqs)]
        return found[0].unsqueeze(0) if len(found) == 1 else torch.stack(found)

    @functools.cached_property
    def _rows_before(self) -> list[Tensor]:
        """Where, of the packed rows and then the first states, each row's state before lies, of each
        direction."""
        assert self.batch_sizes is not None
        sizes = self.batch_sizes
        begins = torch.tensor(self.begins)
        t = torch.repeat_interleave(torch.arange(self.T), sizes)
        i = torch.arange(self.N) - begins[t]
        after = torch.cat([sizes[1:], sizes.new_zeros(1)])
        found = (
            torch.where(t > 0, begins[(t - 1).clamp(min=0)] + i, self.N + i),
            torch.where(i < after[t], begins[t + 1] + i, self.N + i),
        )
        return [rows.to(self.x.device) for rows in found[: self.D]]


def _contiguous(p: DirectionParams) -> DirectionParams:
    optional = (None if t is None else t.contiguous() for t in (p.b_ih, p.b_hh, p.w_hr))
    return DirectionParams(p.w_ih.contiguous(), p.w_hh.contiguous(), *optional)


@dataclass(frozen=True)
class Forward:
    """What the forward pass of all steps works on. T time, B batch, N rows (T*B, or those of a
    PackedSequence), H units and P width of h of each of D directions."""

    gates: Tensor  # [D, rows, SAVED*H]: the gates' input parts; where save, the backward pass's comes out
    y: Tensor  # [N, D*P] or [T, B, D*P]
    seq: Tensor | None  # [D, N, H] float32: every step's c comes out
    mid: Tensor | None  # [D, rows, H]: what is projected comes out
    last: list[Tensor]  # [D, B, P], [D, B, H]: the last states come out
    offsets: Tensor | None
    flags: Tensor | None
    rows: int
    save: bool


@dataclass(frozen=True)
class Backward:
    """Likewise of the backward pass."""

    dy: Tensor | None  # [N, D*P]
    dlast: list[Tensor]  # [D, B, P], [D, B, H], or empty
    dseq: Tensor | None  # [D, N, H] float32
    gates: Tensor  # [D, N, SAVED*H]
    y: Tensor  # [N, D*P]
    seq: Tensor | None  # [D, N, H] float32
    # The states before each step, zeroed where it zeroes them, [D, N, P] and float32 [D, N, H]: where
    # sequences differ in their steps, else for an engine that does not find them itself, h where the cell
    # reads it.
    h_before: Tensor | None
    c_before: Tensor | None
    dg: Tensor  # [D, N, GRADS*H]: comes out
    dmid: Tensor | None  # [D, N, P]: where projected, the gradient of what the projection made comes out
    dfirst: list[Tensor]  # [D, B, P], [D, B, H]: come out
    offsets: Tensor | None
    flags: Tensor | None


class Engine(Protocol):
    """What runs the recurrence. finds_before: see Backward."""

    name: str
    finds_before: bool

    def check(self, call: Call) -> None:
        """Raises a RuntimeError where it cannot."""

    def forward(self, call: Call, tensors: Forward) -> Callable[[int, int, tuple[int, int]], None]:
        """Steps begin to end, whose rows of gates are those of N from a base on, of each direction."""

    def backward(self, call: Call, tensors: Backward) -> None:
        """All steps, last first."""


def _check(engine: Engine, call: Call) -> None:
    groups = call.D * call.heads
    if groups > GRID_LIMIT:
        raise RuntimeError(
            f"the {engine.name} backend takes at most {GRID_LIMIT} directions x heads, got {groups}"
        )
    engine.check(call)


def forward(
    engine: Engine,
    cell: str,
    x: Tensor,
    states: list[Tensor],
    params: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    save: bool,
    return_states: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """torch.ops.fastrnn.layer's arguments and results; saved is of x's type."""
    call = Call(Inputs(cell, x, states, params, lengths, batch_sizes, reset))
    with alone(x.device):
        return _forward(engine, call, save, save or return_states)


def _forward(
    engine: Engine, call: Call, save: bool, return_states: bool
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    traits, x, D, B, H, P, T = call.traits, call.x, call.D, call.B, call.H, call.P, call.T
    _check(engine, call)
    y = x.new_empty(*x.shape[:-1], D * P)
    keep_seq = traits.cell_state and return_states
    seq = [x.new_empty(D, *x.shape[:-1], H, dtype=torch.float32)] if keep_seq else []
    per_step = D * B * traits.saved * H * x.element_size()
    steps = T if save or per_step == 0 else max(1, min(T, CHUNK_BYTES // per_step))
    chunks = [(s, min(T, s + steps)) for s in range(0, T, steps)]
    # The rows of a chunk, forward and in reverse.
    spans = [((call.begin(s), call.begin(e)), (call.begin(T - e), call.begin(T - s))) for s, e in chunks]
    rows = max(end - begin for span in spans for begin, end in span[:D])
    gates = x.new_empty(D, rows, traits.saved * H)
    mid = x.new_empty(D, rows, H) if call.projected and save else None
    saved = [gates, *([] if mid is None else [mid])] if save else []
    if call.empty:
        return y.zero_(), [s.clone() for s in call.states], [s.zero_() for s in seq], saved
    last = [s.new_empty(s.shape) for s in call.states]
    tensors = Forward(gates, y, seq[0] if seq else None, mid, last, *call.masks(), rows, save)
    run = engine.forward(call, tensors)
    for (begin, end), span in zip(chunks, spans, strict=True):
        for d in range(D):
            first, past = span[d]
            out = gates[d, : past - first, : traits.gates * H]
            torch.mm(call.rows[first:past], call.params[d].w_ih.t(), out=out)
        run(begin, end, (span[0][0], span[1][0]))
    return y, last, seq, saved


def backward(
    engine: Engine,
    cell: str,
    dy: Tensor | None,
    dlast: list[Tensor],
    dseq: list[Tensor],
    x: Tensor,
    states: list[Tensor],
    params: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    seq: list[Tensor],
    saved: list[Tensor],
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """torch.ops.fastrnn.layer_backward's arguments and results."""
    call = Call(Inputs(cell, x, states, params, lengths, batch_sizes, reset))
    D, H, P, N = call.D, call.H, call.P, call.N
    if len(seq) != call.traits.cell_state or len(saved) != 1 + call.projected:
        raise ValueError(f"{cell}: seq and saved must be as {engine.name}_layer with save=True returned them")
    for name, given, of in (("dlast", dlast, states), ("dseq", dseq, seq)):
        if len(given) not in (0, len(of)):
            raise ValueError(f"{cell}: {name} must be {len(of)} tensors or none, got {len(given)}")
    shapes = [("y", y, (*x.shape[:-1], D * P))]
    shapes += [("seq", s, (D, *x.shape[:-1], H)) for s in seq]
    shapes += [("saved gates", saved[0], (D, N, call.traits.saved * H))]
    shapes += [("saved mid", s, (D, N, H)) for s in saved[1:]]
    shapes += [("dy", dy, tuple(y.shape))] if dy is not None else []
    shapes += [("dlast", g, tuple(s.shape)) for g, s in zip(dlast, states, strict=False)]
    shapes += [("dseq", g, tuple(s.shape)) for g, s in zip(dseq, seq, strict=False)]
    for name, tensor, shape in shapes:
        dtype = torch.float32 if name in ("seq", "dseq") else x.dtype
        if tuple(tensor.shape) != shape or tensor.device != x.device or tensor.dtype != dtype:
            raise ValueError(
                f"{cell}: {name} must be {dtype} {list(shape)} on {x.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    _check(engine, call)
    with alone(x.device):
        return _backward(engine, call, dy, dlast, dseq, y, seq, saved, need_x, need_params)


def _backward(
    engine: Engine,
    call: Call,
    dy: Tensor | None,
    dlast: list[Tensor],
    dseq: list[Tensor],
    y: Tensor,
    seq: list[Tensor],
    saved: list[Tensor],
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    traits, x, D, _, H, P, N = call.traits, call.x, call.D, call.B, call.H, call.P, call.N
    if call.empty:
        dx = torch.zeros_like(x) if need_x else x.new_empty(0)
        given = [g.to(x.dtype, copy=True) for g in dlast] or [torch.zeros_like(s) for s in call.states]
        flat = [getattr(p, name) for p in call.params for name in _NAMES]
        return dx, given, [torch.zeros_like(p) for p in present(flat)] if need_params else []
    y_rows, h_before, c_before = y.reshape(N, D, P), None, None
    differ = call.masked or call.packed  # else R's gradient finds each step's h in y, a step away
    told = differ or not engine.finds_before
    if (told and traits.state) or (differ and need_params):
        h_before = call.all_before(y_rows.unbind(1), 0)
    if told and traits.cell_state:
        c_before = call.all_before(seq[0].reshape(D, N, H).unbind(0), 1)
    dg = x.new_empty(D, N, traits.grads * H)
    dmid = x.new_empty(D, N, P) if call.projected else None
    tensors = Backward(
        None if dy is None else dy.contiguous(),
        [g.contiguous() for g in dlast],
        dseq[0].contiguous() if dseq else None,
        saved[0].contiguous(),
        y.contiguous(),
        seq[0].contiguous() if seq else None,
        h_before,
        c_before,
        dg,
        dmid,
        [s.new_empty(s.shape) for s in call.states],
        *call.masks(),
    )
    engine.backward(call, tensors)
    dx, dparams = _products(call, tensors, y_rows, saved, need_x, need_params)
    return dx, tensors.dfirst, dparams


_NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def _products(
    call: Call,
    tensors: Backward,
    y_rows: Tensor,
    saved: Sequence[Tensor],
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of the parameters, of those of the gates."""
    x, H, gates, dg, dmid, h_before = (
        call.x,
        call.H,
        call.traits.gates,
        tensors.dg,
        tensors.dmid,
        tensors.h_before,
    )
    of_inputs = dg[..., : gates * H]
    dx = x.new_empty(0)
    if need_x:
        total = torch.mm(of_inputs[0], call.params[0].w_ih)
        if call.D == 2:
            total.addmm_(of_inputs[1], call.params[1].w_ih)
        dx = total.view(x.shape)
    if not need_params:
        return dx, []
    shifts = h_before is None and call.heads == 1 and not call.traits.mid
    if h_before is None and not shifts:
        h_before = call.all_before(y_rows.unbind(1), 0)
    past = None if call.lengths is None else ~call.active.view(-1, 1)

    def held(t: Tensor) -> Tensor:
        """What lies past an end may be no number, and its gradient of 0 times that would be none either."""
        return t if past is None else t.masked_fill(past, 0)

    rows = held(call.rows)
    given: list[Tensor] = []
    for d, p in enumerate(call.params):
        given.append(torch.mm(of_inputs[d].t(), rows))
        mid = None
        if call.traits.mid:
            assert h_before is not None
            mid = held(saved[0][d, :, :H]) * h_before[d]
        h = y_rows[:, d] if h_before is None else h_before[d]
        given.append(_of_recurrent(call, dg[d], h, mid, d if shifts else None))
        if p.b_ih is not None:
            sums = dg[d].sum(0)  # in float32, rounded once
            given.append(sums[: gates * H])
            hidden = call.traits.hidden_grads
            same = hidden == tuple(range(gates))
            # Not by a list of indices, which would be copied to the device: CUDA graphs capture this.
            blocks = sums.view(-1, H)
            given.append(sums.clone() if same else torch.cat([blocks[k] for k in hidden]))
        if dmid is not None:
            given.append(torch.mm(dmid[d].t(), held(saved[1][d])))
    return dx, given


def _of_recurrent(call: Call, dg: Tensor, h: Tensor, mid: Tensor | None, shift: int | None) -> Tensor:
    """R's gradient [G*H, K]: for each gate its hidden part's gradients [N, H], transposed, times what R was
    multiplied with, head by head: h, and for the last gate mid where there is one. shift: h is y of this
    direction, of which each step read the one before; else it is what the steps read."""
    H, B, heads, hidden = call.H, call.B, call.heads, call.traits.hidden_grads
    last = len(hidden) - 1

    def product(first: int, end: int, operand: Tensor) -> Tensor:
        part = dg[:, hidden[first] * H : (hidden[end - 1] + 1) * H]
        if shift is not None:
            start = call.states[0][shift]
            if shift == 0:
                return torch.mm(part[B:].t(), operand[:-B]).addmm_(part[:B].t(), start)
            return torch.mm(part[:-B].t(), operand[B:]).addmm_(part[-B:].t(), start)
        if heads == 1:
            return torch.mm(part.t(), operand)
        by_head = part.unflatten(1, (end - first, heads, H // heads))
        return torch.einsum("nghu,nhk->ghuk", by_head, operand.unflatten(1, (heads, -1))).flatten(0, 2)

    if mid is not None:
        return torch.cat([product(0, last, h), product(last, last + 1, mid)])
    if hidden[last] != last:
        return torch.cat([product(0, last, h), product(last, last + 1, h)])
    return product(0, last + 1, h)

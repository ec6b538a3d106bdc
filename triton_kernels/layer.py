"""A layer by the kernels: what torch.ops.fastrnn.triton_layer and triton_layer_backward run.

Products over all rows at once are torch's; the recurrence is scan.py's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrnn.kernels import Inputs, check
from fastrnn.reference import DirectionParams, split_params

from . import heuristics, scan, step
from .cells import TRAITS
from .heuristics import Shape

# TRITON_INTERPRET=1 at import: kernels run on the CPU, in numpy.
INTERPRETED = not isinstance(scan.scan_forward, triton.runtime.JITFunction)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Inference keeps no more of the gates at a time.
CHUNK_BYTES = 32 << 20


def capability(device: torch.device) -> int | None:
    """major * 10 + minor of an NVIDIA GPU; None for others, and where there is none."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def shape_of(cell: str, x: Tensor, H: int, P: int, B: int, D: int, heads: int, projected: bool) -> Shape:
    """What the configuration of a layer of D directions depends on, on the device of x."""
    found = capability(x.device)
    # Programs that meet must all be there: CUDA starts them together or not at all (cooperative launch).
    together = 0 if found is None else torch.cuda.get_device_properties(x.device).multi_processor_count
    return Shape(cell, H // heads, P // heads, D * heads, B, x.element_size(), projected, found, together)


def precision(x: Tensor) -> str:
    """Of float32 products: TF32 where torch lets cuDNN do so, else as good as float32's own."""
    if x.dtype != torch.float32 or x.device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"


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
    """What forward and backward of a call have in common: sizes, parameters, masks, configuration."""

    def __init__(self, inputs: Inputs) -> None:
        check(inputs, heads=True)
        cell, x, states, params, lengths, batch_sizes, reset = inputs
        if x.dtype not in DTYPES or (x.device.type == "cpu" and not INTERPRETED):
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise RuntimeError(
                f"the Triton kernels take {known} on a GPU (with TRITON_INTERPRET=1 on a CPU), got {x.dtype} "
                f"on {x.device}"
            )
        self.cell, self.traits, self.x, self.states = cell, TRAITS[cell], x, states
        self.lengths, self.batch_sizes, self.reset = lengths, batch_sizes, reset
        self.D, self.B, self.P = states[0].shape
        self.H = params[0].shape[0] // self.traits.gates
        self.T = x.shape[0] if batch_sizes is None else batch_sizes.numel()
        self.params = [_contiguous(p) for p in split_params(params, self.D)]
        self.projected = self.params[0].w_hr is not None
        self.heads = self.P // self.params[0].w_hh.shape[1]
        self.rows = x.reshape(-1, x.shape[-1])
        self.N = self.rows.shape[0]
        self.packed, self.masked = batch_sizes is not None, lengths is not None or reset is not None
        # Of packed rows the first of each step, and past the last one.
        self.begins = [] if batch_sizes is None else [0, *batch_sizes.cumsum(0).tolist()]
        self.config = heuristics.configure(
            shape_of(cell, x, self.H, self.P, self.B, self.D, self.heads, self.projected)
        )

    @property
    def empty(self) -> bool:
        return 0 in (self.N, self.B, self.H, self.P)

    def begin(self, t: int) -> int:
        """The first row of step t, or past the last one."""
        return self.begins[t] if self.packed else t * self.B

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """A parameter of both directions; a pointer that no kernel reads where there is none."""
        found = [getattr(p, name) for p in self.params]
        first = self.rows if found[0] is None else found[0]
        return first, first if found[-1] is None else found[-1]

    def masks(self) -> tuple[Tensor, Tensor]:
        """offsets and flags, see scan.py; where not there, a pointer that no kernel reads."""
        offsets = flags = self.rows
        if self.packed:
            offsets = torch.tensor(self.begins, device=self.x.device)
        if self.masked:
            on, cuts = self.active(), self.cuts()
            flags = torch.stack([on.to(torch.uint8) | cut.to(torch.uint8) << 1 for cut in cuts])
        return offsets, flags

    def active(self) -> Tensor:
        """[T, B]: whether the sequence runs at t."""
        if self.lengths is None:
            return torch.ones(self.T, self.B, dtype=torch.bool, device=self.x.device)
        steps = torch.arange(self.T, device=self.x.device)
        return steps[:, None] < self.lengths.to(self.x.device)[None, :]

    def cuts(self) -> list[Tensor]:
        """[T, B] of each direction: whether its state is zeroed before it runs t."""
        if self.reset is None:
            return [torch.zeros(self.T, self.B, dtype=torch.bool, device=self.x.device)] * self.D
        forward = self.reset.to(self.x.device) & self.active()
        reverse = torch.cat([forward[1:], torch.zeros_like(forward[:1])])
        return [forward, reverse][: self.D]

    def before(self, seq: Tensor, first: Tensor, d: int) -> Tensor:
        """A state before each step [N, .], of the sequence of it after each [N, .] and its first [B, .]."""
        first = first.to(seq.dtype)
        if self.packed:
            return torch.cat([seq, first]).index_select(0, self._rows_before(d))
        steps = seq.unflatten(0, (self.T, self.B))
        if d == 0:
            shifted = torch.cat([first[None], steps[:-1]])
        else:
            shifted = torch.cat([steps[1:], first[None]])
            if self.lengths is not None:
                runs = self.active()
                starts = torch.cat([~runs[1:], torch.ones_like(runs[:1])])
                shifted = torch.where(starts[:, :, None], first[None], shifted)
        if self.reset is not None:
            shifted = shifted.masked_fill(self.cuts()[d][:, :, None], 0)
        return shifted.flatten(0, 1)

    def _rows_before(self, d: int) -> Tensor:
        """Where, of the packed rows and then the first states, each row's state before lies."""
        assert self.batch_sizes is not None
        sizes = self.batch_sizes
        begins = torch.tensor(self.begins)
        t = torch.repeat_interleave(torch.arange(self.T), sizes)
        i = torch.arange(self.N) - begins[t]
        if d == 0:
            found = torch.where(t > 0, begins[(t - 1).clamp(min=0)] + i, self.N + i)
        else:
            after = torch.cat([sizes[1:], sizes.new_zeros(1)])
            found = torch.where(i < after[t], begins[t + 1] + i, self.N + i)
        return found.to(self.x.device)

    def options(self) -> dict[str, Any]:
        """The kernels' compile-time arguments that forward and backward share."""
        return options(
            self.cell,
            self.config,
            self.x.dtype,
            precision(self.x),
            heads=self.heads,
            projected=self.projected,
            packed=self.packed,
            masked=self.masked,
        )

    def grid(self, columns: int) -> tuple[int, int, int]:
        """Of a step's programs, for so many columns of a head."""
        config = self.config
        return triton.cdiv(self.B, config.block_b), triton.cdiv(columns, config.block_u), self.D * self.heads

    def launch_steps(
        self, kernel: Any, columns: Sequence[int], pointers: Sequence[Tensor], sizes: Sequence[int],
        begin: int, end: int, **options: Any,
    ) -> None:  # fmt: skip
        """Steps begin to end of all groups, by one launch each stage, which has so many columns of a head; or
        by one in all, of programs that meet."""
        in_stages = stages(self.cell, self.config, self.projected)
        if self.config.kernel == "grid":
            grid = self.grid(max(columns))
            arrived = torch.zeros(grid[2], grid[0], step.APART.value, dtype=torch.int32, device=self.x.device)
            options |= {"FIRST": in_stages[0], "LAST": in_stages[-1], "GRID": True}
            kernel[grid](*pointers, arrived, *sizes, begin, end, launch_cooperative_grid=True, **options)
            return
        for i in range(begin, end):
            for stage, width in zip(in_stages, columns, strict=True):
                kernel[self.grid(width)](
                    *pointers, self.rows, *sizes, i, i + 1, FIRST=stage, LAST=stage, GRID=False, **options
                )


def _contiguous(p: DirectionParams) -> DirectionParams:
    given = (p.w_ih, p.w_hh, p.b_ih, p.b_hh, p.w_hr)
    return DirectionParams(*(None if t is None else t.contiguous() for t in given))  # type: ignore[arg-type]


def options(
    cell: str,
    config: heuristics.Config,
    dtype: torch.dtype,
    precision: str,
    *,
    heads: int = 1,
    projected: bool = False,
    packed: bool = False,
    masked: bool = False,
) -> dict[str, Any]:
    """The kernels' compile-time arguments that forward and backward share."""
    traits, scans = TRAITS[cell], config.kernel == "scan"
    return {
        "CELL": cell,
        "GATES": traits.gates,
        "SAVED": traits.saved,
        "HEADS": heads,
        "CELL_STATE": traits.cell_state,
        "PROJECTED": projected,
        "MID": traits.mid,
        "PACKED": packed,
        "MASKED": masked,
        "BLOCK_B": config.block_b,
        "BLOCK_H" if scans else "BLOCK_U": config.block_u,
        "BLOCK_P" if scans else "BLOCK_K": config.block_k,
        # Interpreted products of 16-bit floats are wrong (Triton 3.6 to 3.9); of the same numbers in float32
        # they are right.
        "OPERAND": tl.float32 if INTERPRETED else DTYPES[dtype],
        "PRECISION": precision,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def forward_options(config: heuristics.Config) -> dict[str, Any]:
    """Those that only the forward kernels have, of a configuration."""
    return {} if config.kernel == "scan" else {"EARLY": config.early}


def backward_options(cell: str) -> dict[str, Any]:
    """Those that only the backward kernels have, of a cell."""
    traits = TRAITS[cell]
    return {"GRADS": traits.grads, "HIDDEN": traits.hidden_grads, "STATE": traits.state}


def stages(cell: str, config: heuristics.Config, projected: bool) -> tuple[int, ...]:
    """The STAGEs of a step, a launch each."""
    return (1, 2) if config.kernel != "scan" and (TRAITS[cell].mid or projected) else (0,)


def forward(
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
        return _forward(call, save, save or return_states)


def _forward(
    call: Call, save: bool, return_states: bool
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    traits, x, D, B, H, P, N, T = call.traits, call.x, call.D, call.B, call.H, call.P, call.N, call.T
    y = x.new_empty(*x.shape[:-1], D * P)
    keep_seq = traits.cell_state and return_states
    seq = [x.new_empty(D, *x.shape[:-1], H, dtype=torch.float32)] if keep_seq else []
    in_stages = stages(call.cell, call.config, call.projected)
    per_step = D * B * traits.saved * H * x.element_size()
    steps = T if save or per_step == 0 else max(1, min(T, CHUNK_BYTES // per_step))
    chunks = [(s, min(T, s + steps)) for s in range(0, T, steps or 1)]
    # The rows of a chunk, forward and in reverse.
    spans = [((call.begin(s), call.begin(e)), (call.begin(T - e), call.begin(T - s))) for s, e in chunks]
    rows = max((end - begin for span in spans for begin, end in span[:D]), default=0)
    gates = x.new_empty(D, rows, traits.saved * H)
    mid = x.new_empty(D, rows, H) if call.projected or len(in_stages) == 2 else gates
    saved = [gates, *([mid] if call.projected else [])] if save else []
    if call.empty:
        return y.zero_(), [s.clone() for s in call.states], [s.zero_() for s in seq], saved
    h_state = call.states[0].to(torch.float32, copy=True).contiguous()
    c_state = h_state
    if traits.cell_state:
        c_state = call.states[1].to(torch.float32, copy=True).contiguous()
    exchange = h_state
    if call.config.kernel != "scan":
        exchange = x.new_empty(2, D, B, P)
        exchange[0].copy_(call.states[0])
    pointers = (h_state, c_state, *call.of("w_hh"), *call.of("b_ih"), *call.of("b_hh"), *call.of("w_hr"))
    masks = call.masks()
    options = {
        **call.options(),
        **forward_options(call.config),
        "BIAS": call.params[0].b_ih is not None,
        "SAVE": save,
        "SEQ": keep_seq,
    }
    of_batch = triton.cdiv(B, call.config.block_b)
    columns = (H // call.heads, P if call.projected else H // call.heads)[: len(in_stages)]
    for (begin, end), span in zip(chunks, spans, strict=True):
        for d in range(D):
            first, last = span[d]
            out = gates[d, : last - first, : traits.gates * H]
            torch.mm(call.rows[first:last], call.params[d].w_ih.t(), out=out)
        bases = (span[0][0], span[1][0])
        sizes = (*bases, rows, T, B, N, H, P, D)
        seq_or_none = seq[0] if seq else gates
        if call.config.kernel == "scan":
            grid = (of_batch, D * call.heads)
            scan.scan_forward[grid](
                gates, y, seq_or_none, mid, *pointers, *masks, *sizes, begin, end, **options
            )
        else:
            all_pointers = (gates, y, seq_or_none, mid, exchange, *pointers, *masks)
            call.launch_steps(step.step_forward, columns, all_pointers, sizes, begin, end, **options)
    last = [h_state.to(x.dtype)]
    if traits.cell_state:
        last.append(c_state.to(x.dtype))
    return y, last, seq, saved


def backward(
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
    shapes = [("y", y, (*x.shape[:-1], D * P))]
    shapes += [("seq", s, (D, *x.shape[:-1], H)) for s in seq]
    shapes += [("saved gates", saved[0], (D, N, call.traits.saved * H))]
    shapes += [("saved mid", s, (D, N, H)) for s in saved[1:]]
    shapes += [("dy", dy, tuple(y.shape))] if dy is not None else []
    shapes += [("dlast", g, tuple(s.shape)) for g, s in zip(dlast, states, strict=bool(dlast))]
    shapes += [("dseq", g, tuple(s.shape)) for g, s in zip(dseq, seq, strict=bool(dseq))]
    if len(seq) != call.traits.cell_state or len(saved) != 1 + call.projected:
        raise ValueError(f"{cell}: seq and saved must be as triton_layer with save=True returned them")
    for name, tensor, shape in shapes:
        if tuple(tensor.shape) != shape or tensor.device != x.device:
            raise ValueError(
                f"{cell}: {name} must be {list(shape)} on {x.device}, "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
    with alone(x.device):
        return _backward(call, dy, dlast, dseq, y, seq, saved, need_x, need_params)


def _backward(
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
    traits, x, D, B, H, P, N, T = call.traits, call.x, call.D, call.B, call.H, call.P, call.N, call.T
    if call.empty:
        dx = torch.zeros_like(x) if need_x else x.new_empty(0)
        given = [g.to(x.dtype, copy=True) for g in dlast] or [torch.zeros_like(s) for s in call.states]
        flat = [getattr(p, name) for p in call.params for name in _NAMES]
        return dx, given, [torch.zeros_like(p) for p in flat if p is not None] if need_params else []
    start = dlast or call.states
    grads = [s.to(torch.float32, copy=True).contiguous() for s in start]
    if not dlast:
        for g in grads:
            g.zero_()
    h_grad, c_grad = grads[0], grads[-1]
    gates, y_rows = saved[0], y.reshape(N, D, P)
    h_before = c_before = gates
    if traits.state or need_params:
        h_before = torch.stack([call.before(y_rows[:, d], call.states[0][d], d) for d in range(D)])
    if traits.cell_state:
        c_rows = seq[0].reshape(D, N, H)
        c_before = torch.stack([call.before(c_rows[d], call.states[1][d], d) for d in range(D)])
    dg = x.new_empty(D, N, traits.grads * H)
    dmid = x.new_empty(D, N, P) if call.projected else dg
    pointers = (
        gates if dy is None else dy.contiguous(),
        dseq[0].contiguous() if dseq else gates,
        gates.contiguous(),
        seq[0].contiguous() if seq else gates,
        h_before,
        c_before,
        dg,
        dmid,
        h_grad,
        c_grad,
        *call.of("w_hh"),
        *call.of("w_hr"),
        *call.masks(),
    )
    sizes = (T, call.B, N, H, P, D)
    options = {
        **call.options(),
        **backward_options(call.cell),
        "DY": dy is not None,
        "DSEQ": bool(dseq),
    }
    of_batch = triton.cdiv(B, call.config.block_b)
    if call.config.kernel == "scan":
        scan.scan_backward[(of_batch, D * call.heads)](*pointers, *sizes, **options)
    else:
        columns = (P // call.heads, H // call.heads)[: len(stages(call.cell, call.config, call.projected))]
        call.launch_steps(step.step_backward, columns, pointers, sizes, 0, T, FINAL=False, **options)
        step.step_backward[call.grid(columns[0])](
            *pointers, call.rows, *sizes, T, T + 1, FIRST=0, LAST=0, GRID=False, FINAL=True, **options
        )
    dx, dparams = _products(call, dg, dmid, h_before, saved, need_x, need_params)
    return dx, [g.to(x.dtype) for g in grads], dparams


_NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def _products(
    call: Call,
    dg: Tensor,
    dmid: Tensor,
    h_before: Tensor,
    saved: Sequence[Tensor],
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of the parameters, of those of the gates."""
    x, H, gates = call.x, call.H, call.traits.gates
    of_inputs = dg[..., : gates * H]
    dx = x.new_empty(0)
    if need_x:
        total = torch.mm(of_inputs[0], call.params[0].w_ih)
        if call.D == 2:
            total.addmm_(of_inputs[1], call.params[1].w_ih)
        dx = total.view(x.shape)
    if not need_params:
        return dx, []
    past = None if call.lengths is None else ~call.active().view(-1, 1)

    def held(t: Tensor) -> Tensor:
        """What lies past an end may be no number, and its gradient of 0 times that would be none either."""
        return t if past is None else t.masked_fill(past, 0)

    rows = held(call.rows)
    given: list[Tensor] = []
    for d, p in enumerate(call.params):
        given.append(torch.mm(of_inputs[d].t(), rows))
        mid = held(saved[0][d, :, :H]) * h_before[d] if call.traits.mid else None
        given.append(_of_recurrent(call, dg[d], h_before[d], mid))
        if p.b_ih is not None:
            sums = dg[d].sum(0, dtype=torch.float32).to(x.dtype).unflatten(0, (-1, H))
            given.append(sums[:gates].flatten())
            given.append(sums[list(call.traits.hidden_grads)].flatten())
        if call.projected:
            given.append(torch.mm(dmid[d].t(), held(saved[1][d])))
    return dx, given


def _of_recurrent(call: Call, dg: Tensor, h: Tensor, mid: Tensor | None) -> Tensor:
    """R's gradient [G*H, K]: for each gate its hidden part's gradients [N, H], transposed, times what R was
    multiplied with, head by head: h, and for the last gate mid where there is one."""
    H, heads, hidden = call.H, call.heads, call.traits.hidden_grads
    last = len(hidden) - 1

    def product(first: int, end: int, operand: Tensor) -> Tensor:
        part = dg[:, hidden[first] * H : (hidden[end - 1] + 1) * H]
        if heads == 1:
            return torch.mm(part.t(), operand)
        by_head = part.unflatten(1, (end - first, heads, H // heads))
        return torch.einsum("nghu,nhk->ghuk", by_head, operand.unflatten(1, (heads, -1))).flatten(0, 2)

    if mid is not None:
        return torch.cat([product(0, last, h), product(last, last + 1, mid)])
    if hidden[last] != last:
        return torch.cat([product(0, last, h), product(last, last + 1, h)])
    return product(0, last + 1, h)

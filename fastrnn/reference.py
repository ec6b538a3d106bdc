"""The plain reference: every layer in readable PyTorch, on any device and any dtype.

It is the oracle of the tests, the last fallback, and the formula behind double backward. It shares
the kernels' contract (gate order, states, masks) and none of their code: otherwise it would prove
nothing. It is made of out-of-place torch operations only, so autograd, `torch.func` and complex
numbers pass through it.

Dimensions: T time, B batch, I input, H hidden, P projection (the width of h; P = H without one),
G gates, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def lstm_step(
    gx: Tensor, h: Tensor, states: Sequence[Tensor], R: Tensor, b: Tensor | None
) -> tuple[Tensor, ...]:
    """Hochreiter & Schmidhuber 1997 with forget gates (Gers 2000). Gate order i, f, g, o."""
    i, f, g, o = (gx + torch.nn.functional.linear(h, R, b)).chunk(4, -1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(
    gx: Tensor, h: Tensor, states: Sequence[Tensor], R: Tensor, b: Tensor | None
) -> tuple[Tensor, ...]:
    """Cho 2014 in cuDNN's form: the reset gate acts after the recurrent product. Gate order r, z, n."""
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz, hn = torch.nn.functional.linear(h, R, b).chunk(3, -1)
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return ((1 - z) * n + z * h,)


def gru_reset_before_step(
    gx: Tensor, h: Tensor, states: Sequence[Tensor], R: Tensor, b: Tensor | None
) -> tuple[Tensor, ...]:
    """Cho 2014 v3, the textbook form: the reset gate acts before the recurrent product."""
    H = h.shape[-1]
    xr, xz, xn = gx.chunk(3, -1)
    b_rz, b_n = (None, None) if b is None else (b[: 2 * H], b[2 * H :])
    hr, hz = torch.nn.functional.linear(h, R[: 2 * H], b_rz).chunk(2, -1)
    z = (xz + hz).sigmoid()
    n = (xn + torch.nn.functional.linear((xr + hr).sigmoid() * h, R[2 * H :], b_n)).tanh()
    return ((1 - z) * n + z * h,)


def rnn_tanh_step(
    gx: Tensor, h: Tensor, states: Sequence[Tensor], R: Tensor, b: Tensor | None
) -> tuple[Tensor, ...]:
    """Elman 1990: h' = tanh(W x + b + R h)."""
    return ((gx + torch.nn.functional.linear(h, R, b)).tanh(),)


def rnn_relu_step(
    gx: Tensor, h: Tensor, states: Sequence[Tensor], R: Tensor, b: Tensor | None
) -> tuple[Tensor, ...]:
    """h' = max(0, W x + b + R h)."""
    return ((gx + torch.nn.functional.linear(h, R, b)).relu(),)


@dataclass(frozen=True)
class Cell:
    """What the outside knows of a cell. `step` maps (gx, h, states, R, b_hh) to the new states."""

    gates: int
    states: int
    step: Callable[..., tuple[Tensor, ...]]
    saved: int  # values a unit and a step that the kernels keep for the backward pass
    projectable: bool = False
    saves_h: bool = False  # it is the new h, which the CPU keeps once, as y


# The one registry on the Python side; csrc/cells/registry.h is the one on the C++ side.
CELLS: dict[str, Cell] = {
    "lstm": Cell(4, 2, lstm_step, saved=4, projectable=True),
    "gru": Cell(3, 1, gru_step, saved=4),
    "gru_reset_before": Cell(3, 1, gru_reset_before_step, saved=3),
    "rnn_tanh": Cell(1, 1, rnn_tanh_step, saved=1, saves_h=True),
    "rnn_relu": Cell(1, 1, rnn_relu_step, saved=1, saves_h=True),
}


@dataclass(frozen=True)
class DirectionParams:
    """The parameters of one direction of one layer, by name."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [P, H]


def split_params(params: Sequence[Tensor], directions: int) -> list[DirectionParams]:
    """Names the flat list (w_ih, w_hh[, b_ih, b_hh][, w_hr]) * D, in torch.nn's order."""
    per = len(params) // directions
    groups = []
    for d in range(directions):
        p = list(params[d * per : (d + 1) * per])
        b_ih, b_hh = (p[2], p[3]) if per >= 4 else (None, None)
        groups.append(DirectionParams(p[0], p[1], b_ih, b_hh, p[-1] if per in (3, 5) else None))
    return groups


def _dense(R: Tensor, width: int) -> Tensor:
    """R [G*H, H/n] of n heads as the block-diagonal matrices [G*H, H] that they stand for."""
    if R.shape[1] == width:  # one head, of 0 units too
        return R
    n = width // R.shape[1]
    blocks = R.reshape(-1, n, width // n, 1, R.shape[1])
    own = torch.eye(n, dtype=torch.bool, device=R.device)[None, :, None, :, None]
    return torch.where(own, blocks, torch.zeros((), dtype=R.dtype, device=R.device)).reshape(
        R.shape[0], width
    )


def rounded(
    result: tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]], dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A layer's result in another dtype."""
    y, last, seq = result
    return y.to(dtype), tuple(s.to(dtype) for s in last), tuple(s.to(dtype) for s in seq)


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for this device: it would round the products of the reference."""
    # is_autocast_enabled raises for meta; torch 2.11's compiler cannot trace is_autocast_available.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def layer(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One layer, all its directions.

    x           [T, B, I], or [N, I] packed where batch_sizes (LongTensor [T] on the CPU) is given
    states      h [D, B, P] and, by cell, c [D, B, H]
    params      (w_ih, w_hh[, b_ih, b_hh][, w_hr]) for each direction; w_hh [G*H, H/n] is of n heads, the
                blocks of block-diagonal matrices
    lengths     LongTensor [B]: each sequence's own length, clamped to [0, T]
    reset       BoolTensor [T, B]: the state is zeroed before step t (between t+1 and t in reverse)
    returns     y [T, B, D*P] (packed: [N, D*P]), the last states [D, B, .], and the sequences of
                the states after the first, each [D, T, B, H] (packed: [D, N, H])
    """
    if under_autocast(x.device):
        with torch.autocast(x.device.type, enabled=False):
            return layer(cell, x, states, params, lengths, batch_sizes, reset)
    if x.dtype in (torch.float16, torch.bfloat16):
        # As in the kernels: 16 bits are for what is kept, the arithmetic is float32's, rounded once.
        first, *states_params = (t.float() for t in (x, *states, *params))
        S = len(states)
        wide = layer(cell, first, states_params[:S], states_params[S:], lengths, batch_sizes, reset)
        return rounded(wide, x.dtype)
    if batch_sizes is not None:
        return _packed_layer(cell, x, states, params, batch_sizes)
    D = states[0].shape[0]
    T = x.shape[0]
    if lengths is not None:
        steps = torch.arange(T, device=x.device)[:, None]
        active = steps < lengths.to(x.device).clamp(0, T)[None, :]  # [T, B]
        x = torch.where(active[:, :, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    else:
        active = None
    spec = CELLS[cell]
    outs, lasts, seqs = [], [], []
    for d, p in enumerate(split_params(params, D)):
        gx = torch.nn.functional.linear(x, p.w_ih, p.b_ih)  # [T, B, G*H]
        R = _dense(p.w_hh, states[0].shape[2])
        s = tuple(state[d] for state in states)
        steps_out: list[tuple[Tensor, ...]] = [()] * T
        order = range(T) if d == 0 else range(T - 1, -1, -1)
        for t in order:
            # Forward, the boundary before step t; in reverse, the same boundary lies after step t.
            boundary = t if d == 0 else t + 1
            if reset is not None and boundary < T:
                cut = reset[boundary]
                if active is not None:  # a reset at or past the end does nothing
                    cut = cut & active[boundary]
                s = tuple(torch.where(cut[:, None], torch.zeros_like(v), v) for v in s)
            new = spec.step(gx[t], s[0], s, R, p.b_hh)
            if p.w_hr is not None:
                new = (torch.nn.functional.linear(new[0], p.w_hr), *new[1:])
            if active is not None:
                on = active[t][:, None]
                s = tuple(torch.where(on, n, v) for n, v in zip(new, s, strict=True))
                new = tuple(torch.where(on, n, torch.zeros_like(n)) for n in new)
            else:
                s = new
            steps_out[t] = new
        seq = [torch.stack(list(column)) for column in zip(*steps_out, strict=True)]
        outs.append(seq[0])
        seqs.append(seq[1:])
        lasts.append(s)
    y = torch.cat(outs, -1)
    last = tuple(torch.stack(column) for column in zip(*lasts, strict=True))
    seq_out = tuple(torch.stack(column) for column in zip(*seqs, strict=True))
    return y, last, seq_out


def _packed_layer(
    cell: str, x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], batch_sizes: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A PackedSequence's data through the padded form and back: row i of step t stands at offset[t] + i."""
    T, B = batch_sizes.numel(), states[0].shape[1]
    rows = torch.arange(B, device="cpu")[None, :] < batch_sizes.cpu()[:, None]  # [T, B]
    lengths = rows.sum(0)
    flat = rows.flatten().nonzero().squeeze(1).to(x.device)  # packed row -> t*B + i
    padded = x.new_zeros(T * B, x.shape[1]).index_copy(0, flat, x).view(T, B, -1)
    y, last, seq = layer(cell, padded, states, params, lengths=lengths)
    return (
        y.flatten(0, 1).index_select(0, flat),
        last,
        tuple(s.flatten(1, 2).index_select(1, flat) for s in seq),
    )


def attention(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention after all products with weights: scores of queries against keys, softmax, weighted sums.

    query    [Tq, B, K], keys [S, B, K], values [S, B, V]
    v        None: score = query . key; [K]: score = v . tanh(query + key). Either times scale
    mask     bool [B, S] or [B, Tq, S], True where a query may attend; what none may attend to is not read
    returns  (context [Tq, B, V], weights [B, Tq, S]), zero where a query may attend to nothing
    """
    if under_autocast(query.device):
        with torch.autocast(query.device.type, enabled=False):
            return attention(query, keys, values, v, mask, scale)
    q, k, m = (t.transpose(0, 1) for t in (query, keys, values))  # [B, ., .]
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask[:, None]
        attended = mask.any(1)[:, :, None]
        k, m = torch.where(attended, k, zero), torch.where(attended, m, zero)
    scores = scale * (q @ k.mT if v is None else (q[:, :, None] + k[:, None]).tanh() @ v)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        # A finite lowest score: the softmax of a row without any other is no NaN, and cut after it.
        lowest = torch.full_like(zero, torch.finfo(q.dtype).min)
        weights = torch.where(mask, torch.where(mask, scores, lowest).softmax(-1), zero)
    return (weights @ m).transpose(0, 1), weights


def decoder(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    feed: Tensor,
    params: Sequence[Sequence[Tensor]],
    w_h: Tensor,
    keys: Tensor,
    values: Tensor,
    w_q: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    drops: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Luong's decoder with input feeding, all steps: a_t = tanh(W_c [c_t; h_t]), with the part of W_c that
    meets the context taken into the values, W_c c = sum_s w_s (W_c m_s).

    x        [T, B, I]
    states   h [L, B, H] and, for the LSTM, c
    feed     [B, H] the a before the first step
    params   of each layer (w_ih [G*H, I + H or H], w_hh [G*H, H], b_ih, b_hh [G*H]); the first layer reads
             [x_t; a_{t-1}]
    w_h      [H, H] the part of W_c that meets h
    keys     [S, B, K], values [S, B, H]: what scores are made of, what is summed; w_q [K, H] makes the query
             of h, None: h itself; v, mask, scale as in `attention`
    drops    [T, B, H] factors of the output of each layer but the last; none: 1
    returns  (a [T, B, H], last states, weights [B, T, S])
    """
    if under_autocast(x.device):
        with torch.autocast(x.device.type, enabled=False):
            return decoder(cell, x, states, feed, params, w_h, keys, values, w_q, v, mask, drops, scale)
    layers = [tuple(s[k] for s in states) for k in range(len(params))]
    out, columns = [], []
    for t in range(x.shape[0]):
        below = torch.cat([x[t], feed], -1)
        for k, (w_ih, w_hh, b_ih, b_hh) in enumerate(params):
            gx = torch.nn.functional.linear(below, w_ih, b_ih)
            layers[k] = CELLS[cell].step(gx, layers[k][0], layers[k], w_hh, b_hh)
            below = layers[k][0]
            if drops and k < len(params) - 1:
                below = below * drops[k][t]
        query = below if w_q is None else torch.nn.functional.linear(below, w_q)
        mixed, weights = attention(query[None], keys, values, v, mask, scale)
        feed = (mixed[0] + torch.nn.functional.linear(below, w_h)).tanh()
        out.append(feed)
        columns.append(weights)
    last = tuple(torch.stack(column) for column in zip(*layers, strict=True))
    return torch.stack(out), last, torch.cat(columns, 1)

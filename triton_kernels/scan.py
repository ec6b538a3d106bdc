"""The kernels of layers that fit on a chip whole, forward and backward, and what all kernels share.

A program owns a tile of the batch of one group (a direction's head) and runs all steps; R stays in its
registers or shared memory, h and c in its registers. step.py has the kernels of larger layers.

Dimensions: T time, B batch, N rows (T*B, or those of a PackedSequence), H hidden units and P width of h of a
direction, HH = H / HEADS and K = P / HEADS of one of its heads, D directions. A group's step s is time s
forward, T-1-s in reverse. Steps of which a call holds only some lie in buffers from row base_0 (base_1 in
reverse) on.

flags   [D, T, B] bytes: 1 where the sequence runs at t, 2 where its state is zeroed before (MASKED)
offsets [T + 1]: the row at which t begins; the sequences that run are its first ones (PACKED)
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import cells

# Values that differ from call to call, for which no kernel is compiled anew.
FREE = ("base_0", "base_1", "rows", "T", "B", "N", "begin", "end")


@triton.jit
def _of(d, first, second):
    """The one of this direction."""
    if d == 0:
        chosen = first
    else:
        chosen = second
    return chosen


@triton.jit
def _place(s, d, T, B, b, base, offsets, flags, PACKED: tl.constexpr, MASKED: tl.constexpr):
    """Of sequences b at step s: where each lies (row), whether it does (here), runs (on), is zeroed (cut)."""
    t = s + d * (T - 1 - 2 * s)
    here = b < B
    cut = b < 0
    row = b - base
    if PACKED:
        start = tl.load(offsets + t)
        here = here & (b < tl.load(offsets + t + 1) - start)
        row += start
    else:
        row += t.to(tl.int64) * B
    on = here
    if MASKED:
        flag = tl.load(flags + (d * T + t).to(tl.int64) * B + b, mask=on, other=0)
        on = on & ((flag & 1) != 0)
        cut = (flag & 2) != 0
    return row, here, on, cut


@triton.jit
def _raw(p, row, stride, column, mask):
    return tl.load(p + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _tile(p, row, stride, column, mask):
    return _raw(p, row, stride, column, mask).to(tl.float32)


@triton.jit
def _tiles(p, row, stride, H, unit, mask, COUNT: tl.constexpr):
    """The blocks of units of so many gates."""
    found = ()
    for g in tl.static_range(COUNT):
        found = found + (_raw(p, row, stride, g * H + unit, mask),)
    return found


@triton.jit
def _put(p, row, stride, column, value, mask):
    tl.store(p + row[:, None] * stride + column[None, :], value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION)


@triton.jit
def _biases(b_ih, b_hh, unit, has, H, GATES: tl.constexpr, BIAS: tl.constexpr):
    """Of the gates' input and recurrent parts, [GATES] rows each. They are added in float32."""
    ih, hh = (), ()
    for g in tl.static_range(GATES):
        if BIAS:
            i = tl.load(b_ih + g * H + unit, mask=has, other=0.0).to(tl.float32)
            h = tl.load(b_hh + g * H + unit, mask=has, other=0.0).to(tl.float32)
        else:
            i = unit * 0.0
            h = unit * 0.0
        ih = ih + (i[None, :],)
        hh = hh + (h[None, :],)
    return ih, hh


@triton.jit(do_not_specialize=FREE)
def scan_forward(
    gates,  # [D, rows, SAVED*H]: the gates' input parts; where SAVE, what the backward pass needs comes out
    y,  # [N, D*P]
    seq,  # [D, N, H]: where SEQ, every step's c comes out
    mid,  # [D, rows, H]: where PROJECTED, what is projected comes out
    h_state,  # [D, B, P] float32, before and after
    c_state,  # [D, B, H] float32, before and after
    w_hh_0, w_hh_1,  # [GATES*H, K], of each direction
    b_ih_0, b_ih_1, b_hh_0, b_hh_1,  # [GATES*H]
    w_hr_0, w_hr_1,  # [P, H]
    offsets, flags,
    base_0, base_1, rows, T, B, N, H, P, D, begin, end,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HEADS: tl.constexpr,
    CELL_STATE: tl.constexpr, PROJECTED: tl.constexpr, MID: tl.constexpr, BIAS: tl.constexpr,
    PACKED: tl.constexpr, MASKED: tl.constexpr, SAVE: tl.constexpr, SEQ: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps begin to end of all groups; grid (tiles of the batch, D * HEADS)."""
    group = tl.program_id(1)
    d, head = group // HEADS, group % HEADS
    w_hh, b_ih, b_hh = _of(d, w_hh_0, w_hh_1), _of(d, b_ih_0, b_ih_1), _of(d, b_hh_0, b_hh_1)
    base = _of(d, base_0.to(tl.int64), base_1.to(tl.int64))  # of one type, whatever each has room in
    HH, K = H // HEADS, P // HEADS
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    has_u, has_k = u < HH, k < K
    unit, column = head * HH + u, head * K + k
    live_u, live_k = (b < B)[:, None] & has_u[None, :], (b < B)[:, None] & has_k[None, :]
    direction = d.to(tl.int64)

    # [K, HH] of each gate
    R = ()
    for g in tl.static_range(GATES):
        block = tl.load(
            w_hh + (g * H + unit)[None, :] * K + k[:, None],
            mask=has_k[:, None] & has_u[None, :],
            other=0.0,
        )
        R = R + (block,)
    if PROJECTED:
        projection = tl.load(
            _of(d, w_hr_0, w_hr_1) + k[None, :] * H + u[:, None],
            mask=has_u[:, None] & has_k[None, :],
            other=0.0,
        )
    bias_x, bias_h = _biases(b_ih, b_hh, unit, has_u, H, GATES, BIAS)

    state = direction * B + b
    h = _tile(h_state, state, P, column, live_k)
    c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if CELL_STATE:
        c = _tile(c_state, state, H, unit, live_u)

    row, here, on, cut = _place(begin, d, T, B, b, base, offsets, flags, PACKED, MASKED)
    ahead = _tiles(gates, direction * rows + row, SAVED * H, H, unit, on[:, None] & has_u[None, :], GATES)
    for s in range(begin, end):
        row, here, on, cut = _place(s, d, T, B, b, base, offsets, flags, PACKED, MASKED)
        on_u, on_k = on[:, None] & has_u[None, :], on[:, None] & has_k[None, :]
        here_u, here_k = here[:, None] & has_u[None, :], here[:, None] & has_k[None, :]
        local = direction * rows + row
        if MASKED:
            h = tl.where(cut[:, None], 0.0, h)
            c = tl.where(cut[:, None], 0.0, c)
        x = ()
        for g in tl.static_range(GATES):
            x = x + (ahead[g].to(tl.float32) + bias_x[g],)
        # The next step's are on their way while this one is computed.
        after, _, runs, _ = _place(min(s + 1, end - 1), d, T, B, b, base, offsets, flags, PACKED, MASKED)
        ahead = _tiles(
            gates, direction * rows + after, SAVED * H, H, unit, runs[:, None] & has_u[None, :], GATES
        )
        # Products are of h as y keeps it.
        operand = h.to(y.dtype.element_ty)
        if MID:
            zero = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
            ar = _dot(operand, R[0], zero, OPERAND, PRECISION) + bias_h[0]
            az = _dot(operand, R[1], zero, OPERAND, PRECISION) + bias_h[1]
            r, z, m = cells.reset_forward_first(x[0], x[1], ar, az, h)
            m = m.to(y.dtype.element_ty)
            an = _dot(m, R[2], zero, OPERAND, PRECISION) + bias_h[2]
            h_new, n = cells.reset_forward(x[2], an, z, h)
            c_new = c
            saved = (r, z, n)
        else:
            a = ()
            for g in tl.static_range(GATES):
                zero = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
                a = a + (_dot(operand, R[g], zero, OPERAND, PRECISION) + bias_h[g],)
            h_new, c_new, saved = cells.forward(CELL, x, a, h, c)
        if SAVE:
            for g in tl.static_range(SAVED):
                _put(gates, local, SAVED * H, g * H + unit, saved[g], on_u)
        if SEQ:
            _put(seq, direction * N + row + base, H, unit, tl.where(on_u, c_new, 0.0), here_u)
        if PROJECTED:
            m = h_new.to(y.dtype.element_ty)
            if SAVE:
                tl.store(mid + local[:, None] * H + unit[None, :], m, mask=on_u)
            zero = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
            h_new = _dot(m, projection, zero, OPERAND, PRECISION)
        _put(y, row + base, D * P, d * P + column, tl.where(on_k, h_new, 0.0), here_k)
        if MASKED or PACKED:
            h = tl.where(on[:, None], h_new, h)
            c = tl.where(on[:, None], c_new, c)
        else:
            h = h_new
            c = c_new

    _put(h_state, state, P, column, h, live_k)
    if CELL_STATE:
        _put(c_state, state, H, unit, c, live_u)


@triton.jit
def _kept(
    gates, h_before, c_before, seq, dy, row, on, d, N, H, P, D, unit, column, has_u, has_k,
    SAVED: tl.constexpr, STATE: tl.constexpr, CELL_STATE: tl.constexpr, DY: tl.constexpr,
):  # fmt: skip
    """What a step of the backward pass reads that no later step makes: what was saved, then h, c, the c after
    and dy; the first again in place of what is not there."""
    local = d.to(tl.int64) * N + row
    on_u = on[:, None] & has_u[None, :]
    saved = _tiles(gates, local, SAVED * H, H, unit, on_u, SAVED)
    h, c, c_new, given = saved[0], saved[0], saved[0], saved[0]
    if STATE:
        h = _raw(h_before, local, P, unit, on_u)
    if CELL_STATE:
        c = _raw(c_before, local, H, unit, on_u)
        c_new = _raw(seq, local, H, unit, on_u)
    if DY:
        given = _raw(dy, row, D * P, d * P + column, on[:, None] & has_k[None, :])
    return saved + (h, c, c_new, given)


@triton.jit(do_not_specialize=FREE)
def scan_backward(
    dy,  # [N, D*P], where DY
    dseq,  # [D, N, H], where DSEQ
    gates, seq,  # as the forward pass left them
    h_before, c_before,  # [D, N, P], [D, N, H]: the states before each step, zeroed where it zeroes them
    dg,  # [D, N, GRADS*H]: comes out
    dmid,  # [D, N, P]: where PROJECTED, the gradient of what was projected's image comes out
    h_grad,  # [D, B, P] float32: of the last states; of the first ones comes out
    c_grad,  # [D, B, H] float32: likewise
    w_hh_0, w_hh_1, w_hr_0, w_hr_1,
    offsets, flags,
    T, B, N, H, P, D,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, GRADS: tl.constexpr, HIDDEN: tl.constexpr,
    HEADS: tl.constexpr, STATE: tl.constexpr, CELL_STATE: tl.constexpr, PROJECTED: tl.constexpr,
    MID: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, DY: tl.constexpr, DSEQ: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All steps of all groups, last first; grid (tiles of the batch, D * HEADS).

    dg is the gradient of what enters the gates, their input parts first; a step finishes the gradient of its
    h by R's product with the dg of the step after it.
    """
    group = tl.program_id(1)
    d, head = group // HEADS, group % HEADS
    w_hh = _of(d, w_hh_0, w_hh_1)
    HH, K = H // HEADS, P // HEADS
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    has_u, has_k = u < HH, k < K
    unit, column = head * HH + u, head * K + k
    live_u, live_k = (b < B)[:, None] & has_u[None, :], (b < B)[:, None] & has_k[None, :]
    direction = d.to(tl.int64)

    # [HH, K] of each gate
    R = ()
    for g in tl.static_range(GATES):
        block = tl.load(
            w_hh + (g * H + unit)[:, None] * K + k[None, :],
            mask=has_u[:, None] & has_k[None, :],
            other=0.0,
        )
        R = R + (block,)
    if PROJECTED:
        projection = tl.load(
            _of(d, w_hr_0, w_hr_1) + k[:, None] * H + u[None, :],
            mask=has_k[:, None] & has_u[None, :],
            other=0.0,
        )

    state = direction * B + b
    dh_next = _tile(h_grad, state, P, column, live_k)
    dc_next = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if CELL_STATE:
        dc_next = _tile(c_grad, state, H, unit, live_u)

    row, here, on, cut = _place(T - 1, d, T, B, b, 0, offsets, flags, PACKED, MASKED)
    ahead = _kept(
        gates, h_before, c_before, seq, dy, row, on, d, N, H, P, D, unit, column, has_u, has_k,
        SAVED, STATE, CELL_STATE, DY,
    )  # fmt: skip
    for i in range(0, T):
        row, here, on, cut = _place(T - 1 - i, d, T, B, b, 0, offsets, flags, PACKED, MASKED)
        on_u = on[:, None] & has_u[None, :]
        here_u, here_k = here[:, None] & has_u[None, :], here[:, None] & has_k[None, :]
        local = direction * N + row
        kept = ahead
        # What the step before needs is on its way while this one is computed.
        past, _, runs, _ = _place(max(T - 2 - i, 0), d, T, B, b, 0, offsets, flags, PACKED, MASKED)
        ahead = _kept(
            gates, h_before, c_before, seq, dy, past, runs, d, N, H, P, D, unit, column, has_u, has_k,
            SAVED, STATE, CELL_STATE, DY,
        )  # fmt: skip
        dh = tl.where(on[:, None], dh_next, 0.0)
        if DY:
            dh += kept[SAVED + 3].to(tl.float32)
        dc = tl.where(on[:, None], dc_next, 0.0)
        if DSEQ:
            dc += _tile(dseq, local, H, unit, on_u)
        if PROJECTED:
            m = dh.to(dg.dtype.element_ty)
            tl.store(dmid + local[:, None] * P + column[None, :], m, mask=here_k)
            zero = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
            dh = _dot(m, projection, zero, OPERAND, PRECISION)
        h, c, c_new = (
            kept[SAVED].to(tl.float32),
            kept[SAVED + 1].to(tl.float32),
            kept[SAVED + 2].to(tl.float32),
        )
        saved = ()
        for g in tl.static_range(SAVED):
            saved = saved + (kept[g].to(tl.float32),)
        if MID:
            dz, dn, rest = cells.reset_backward(saved[1], saved[2], h, dh)
            zero = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
            through = _dot(dn.to(dg.dtype.element_ty), R[2], zero, OPERAND, PRECISION)
            dr, more = cells.reset_backward_first(saved[0], h, through)
            grads = (dr, dz, dn)
            dh_new = rest + more
            hidden = (dr, dz)
            dc_new = dc
        else:
            grads, rest, dc_new = cells.backward(CELL, saved, h, c, c_new, dh, dc)
            hidden = grads
            if PROJECTED:
                dh_new = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
            else:
                dh_new = rest
        for g in tl.static_range(GRADS):
            value = tl.where(on_u, grads[g], 0.0)
            _put(dg, local, GRADS * H, g * H + unit, value, here_u)
        for g in tl.static_range(GATES - 1 if MID else GATES):
            part = hidden[HIDDEN[g]].to(dg.dtype.element_ty)
            dh_new = _dot(part, R[g], dh_new, OPERAND, PRECISION)
        if MASKED:
            dh_new = tl.where(cut[:, None], 0.0, dh_new)
            dc_new = tl.where(cut[:, None], 0.0, dc_new)
        if MASKED or PACKED:
            dh_next = tl.where(on[:, None], dh_new, dh_next)
            dc_next = tl.where(on[:, None], dc_new, dc_next)
        else:
            dh_next = dh_new
            dc_next = dc_new

    _put(h_grad, state, P, column, dh_next, live_k)
    if CELL_STATE:
        _put(c_grad, state, H, unit, dc_next, live_u)

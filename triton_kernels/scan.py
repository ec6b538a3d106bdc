"""The kernels: one scan for what fits on a chip whole, and one step for what does not, forward and backward.

A program of a scan owns a tile of the batch of one group (a direction's head) and runs all steps; R stays in
its registers or shared memory, h and c in its registers. A program of a step owns a tile of the batch and a
tile of units of one group, and reads R from the cache: one launch a step, two for cells of two stages.

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
FREE = ("base_0", "base_1", "rows", "T", "B", "begin", "end", "step")


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
def _tile(p, row, stride, column, mask):
    return tl.load(p + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(p, row, stride, column, value, mask):
    tl.store(p + row[:, None] * stride + column[None, :], value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION)


@triton.jit
def _biases(b_ih, b_hh, unit, has, H, CELL: tl.constexpr, GATES: tl.constexpr, BIAS: tl.constexpr):
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
    base = _of(d, base_0, base_1)
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
    bias_x, bias_h = _biases(b_ih, b_hh, unit, has_u, H, CELL, GATES, BIAS)

    state = direction * B + b
    h = _tile(h_state, state, P, column, live_k)
    c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if CELL_STATE:
        c = _tile(c_state, state, H, unit, live_u)

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
            x = x + (_tile(gates, local, SAVED * H, g * H + unit, on_u) + bias_x[g],)
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
            _put(
                seq,
                direction * N + row + base,
                H,
                unit,
                tl.where(on_u, c_new, 0.0),
                here_u,
            )
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
def _products(
    source, row, stride, column, on, w, w_row, gate_stride, w_stride, w_k, has, K,
    GATES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """source[row, column : column + K] times each gate's rows w_row of w, transposed: [BLOCK_B, BLOCK_U]
    each."""
    acc = ()
    for _ in tl.static_range(GATES):
        acc = acc + (tl.zeros((BLOCK_B, BLOCK_U), tl.float32),)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(
            source + row[:, None] * stride + (column + k)[None, :],
            mask=on[:, None] & (k < K)[None, :],
            other=0.0,
        )
        new = ()
        for g in tl.static_range(GATES):
            block = tl.load(
                w + (g * gate_stride + w_row * w_stride)[None, :] + (k * w_k)[:, None],
                mask=(k < K)[:, None] & has[None, :],
                other=0.0,
            )
            new = new + (_dot(a, block, acc[g], OPERAND, PRECISION),)
        acc = new
    return acc


@triton.jit(do_not_specialize=FREE)
def step_forward(
    gates, y, seq,
    mid,  # [D, rows, H]: between the stages
    exchange,  # [2, D, B, P]: h as y keeps it, before and after by turns
    h_state, c_state, w_hh_0, w_hh_1, b_ih_0, b_ih_1, b_hh_0, b_hh_1, w_hr_0, w_hr_1,
    offsets, flags,
    base_0, base_1, rows, T, B, N, H, P, D, step,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HEADS: tl.constexpr,
    CELL_STATE: tl.constexpr, PROJECTED: tl.constexpr, MID: tl.constexpr, BIAS: tl.constexpr,
    PACKED: tl.constexpr, MASKED: tl.constexpr, SAVE: tl.constexpr, SEQ: tl.constexpr, STAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stage of one step of all groups; grid (tiles of the batch, tiles of a head's units, D * HEADS), in
    the second stage of a projected cell tiles of P. STAGE 0: the only one."""
    group = tl.program_id(2)
    d, head = group // HEADS, group % HEADS
    base = _of(d, base_0, base_1)
    HH, K = H // HEADS, P // HEADS
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    direction = d.to(tl.int64)
    row, here, on, cut = _place(step, d, T, B, b, base, offsets, flags, PACKED, MASKED)
    local = direction * rows + row
    state = direction * B + b
    before = (step % 2).to(tl.int64) * D * B + state
    after = ((step + 1) % 2).to(tl.int64) * D * B + state

    if PROJECTED and STAGE == 2:
        has = u < P
        live, on_u = (b < B)[:, None] & has[None, :], on[:, None] & has[None, :]
        here_u = here[:, None] & has[None, :]
        h_new = _products(
            mid, local, H, 0, on, _of(d, w_hr_0, w_hr_1), u, 0, H, 1, has, H,
            1, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
        )[0]  # fmt: skip
        h = _tile(h_state, state, P, u, live)
        h = tl.where(on[:, None], h_new, h)
        _put(y, row + base, D * P, d * P + u, tl.where(on_u, h_new, 0.0), here_u)
        _put(h_state, state, P, u, h, live)
        _put(exchange, after, P, u, h, live)
    else:
        has = u < HH
        unit = head * HH + u
        live, on_u = (b < B)[:, None] & has[None, :], on[:, None] & has[None, :]
        here_u = here[:, None] & has[None, :]
        w_hh = _of(d, w_hh_0, w_hh_1)
        bias_x, bias_h = _biases(
            _of(d, b_ih_0, b_ih_1), _of(d, b_hh_0, b_hh_1), unit, has, H, CELL, GATES, BIAS
        )
        h = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
        if not PROJECTED:
            h = _tile(h_state, state, P, unit, live)
        c = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
        if CELL_STATE:
            c = _tile(c_state, state, H, unit, live)
        if MASKED:
            h_cut = tl.where(cut[:, None], 0.0, h)
            c_cut = tl.where(cut[:, None], 0.0, c)
        else:
            h_cut = h
            c_cut = c
        # A product's rows that are off or zeroed read as 0.
        reads = on & (cut == 0)
        if MID:
            if STAGE == 1:
                product = _products(
                    exchange, before, P, head * K, reads, w_hh, unit, H * K, K, 1, has, K,
                    2, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
                )  # fmt: skip
                xr = _tile(gates, local, SAVED * H, unit, on_u) + bias_x[0]
                xz = _tile(gates, local, SAVED * H, H + unit, on_u) + bias_x[1]
                ar, az = product[0] + bias_h[0], product[1] + bias_h[1]
                r, z, m = cells.reset_forward_first(xr, xz, ar, az, h_cut)
                _put(gates, local, SAVED * H, unit, r, on_u)
                _put(gates, local, SAVED * H, H + unit, z, on_u)
                _put(mid, local, H, unit, m, on_u)
            else:
                x = _tile(gates, local, SAVED * H, 2 * H + unit, on_u) + bias_x[2]
                z = _tile(gates, local, SAVED * H, H + unit, on_u)
                product = _products(
                    mid, local, H, head * HH, on, w_hh, 2 * H + unit, 0, K, 1, has, K,
                    1, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
                )  # fmt: skip
                h_new, n = cells.reset_forward(x, product[0] + bias_h[2], z, h_cut)
                if SAVE:
                    _put(gates, local, SAVED * H, 2 * H + unit, n, on_u)
                h = tl.where(on[:, None], h_new, h)
                _put(
                    y,
                    row + base,
                    D * P,
                    d * P + unit,
                    tl.where(on_u, h_new, 0.0),
                    here_u,
                )
                _put(h_state, state, P, unit, h, live)
                _put(exchange, after, P, unit, h, live)
        else:
            product = _products(
                exchange, before, P, head * K, reads, w_hh, unit, H * K, K, 1, has, K,
                GATES, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
            )  # fmt: skip
            x = ()
            a = ()
            for g in tl.static_range(GATES):
                x = x + (_tile(gates, local, SAVED * H, g * H + unit, on_u) + bias_x[g],)
                a = a + (product[g] + bias_h[g],)
            h_new, c_new, saved = cells.forward(CELL, x, a, h_cut, c_cut)
            if SAVE:
                for g in tl.static_range(SAVED):
                    _put(gates, local, SAVED * H, g * H + unit, saved[g], on_u)
            if SEQ:
                _put(
                    seq, direction * N + row + base, H, unit, tl.where(on_u, c_new, 0.0),
                    here_u,
                )  # fmt: skip
            if CELL_STATE:
                _put(c_state, state, H, unit, tl.where(on[:, None], c_new, c), live)
            if PROJECTED:
                _put(mid, local, H, unit, h_new, on_u)
            else:
                h = tl.where(on[:, None], h_new, h)
                _put(
                    y,
                    row + base,
                    D * P,
                    d * P + unit,
                    tl.where(on_u, h_new, 0.0),
                    here_u,
                )
                _put(h_state, state, P, unit, h, live)
                _put(exchange, after, P, unit, h, live)


# --- backward: dg is the gradient of what enters the gates, their input parts first; a step finishes the
# gradient of its h by R's product with the dg of the step after it.


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
    """All steps of all groups, last first; grid (tiles of the batch, D * HEADS)."""
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

    for i in range(0, T):
        row, here, on, cut = _place(T - 1 - i, d, T, B, b, 0, offsets, flags, PACKED, MASKED)
        on_u, on_k = on[:, None] & has_u[None, :], on[:, None] & has_k[None, :]
        here_u, here_k = here[:, None] & has_u[None, :], here[:, None] & has_k[None, :]
        local = direction * N + row
        dh = tl.where(on[:, None], dh_next, 0.0)
        if DY:
            dh += _tile(dy, row, D * P, d * P + column, on_k)
        dc = tl.where(on[:, None], dc_next, 0.0)
        if DSEQ:
            dc += _tile(dseq, local, H, unit, on_u)
        if PROJECTED:
            m = dh.to(dg.dtype.element_ty)
            tl.store(dmid + local[:, None] * P + column[None, :], m, mask=here_k)
            zero = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
            dh = _dot(m, projection, zero, OPERAND, PRECISION)
        h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        if STATE:
            h = _tile(h_before, local, P, unit, on_u)
        c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        c_new = c
        if CELL_STATE:
            c = _tile(c_before, local, H, unit, on_u)
            c_new = _tile(seq, local, H, unit, on_u)
        saved = ()
        for g in tl.static_range(SAVED):
            saved = saved + (_tile(gates, local, SAVED * H, g * H + unit, on_u),)
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


@triton.jit
def _through_R(
    dg, row, stride, column, on, w, w_column, H, K, HH, has,
    FIRST: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What gates FIRST to FIRST + GATES give to columns of h: the sum of their gradients times R."""
    acc = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
    for first in range(0, HH, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        for g in tl.static_range(FIRST, FIRST + GATES):
            a = tl.load(
                dg + row[:, None] * stride + (HIDDEN[g] * H + column + k)[None, :],
                mask=on[:, None] & (k < HH)[None, :],
                other=0.0,
            )
            block = tl.load(
                w + (g * H + column + k)[:, None] * K + w_column[None, :],
                mask=(k < HH)[:, None] & has[None, :],
                other=0.0,
            )
            acc = _dot(a, block, acc, OPERAND, PRECISION)
    return acc


@triton.jit(do_not_specialize=FREE)
def step_backward(
    dy, dseq, gates, seq, h_before, c_before, dg, dmid,
    h_grad,  # [D, B, P] float32: what the steps after leave to h past R, between launches
    c_grad, w_hh_0, w_hh_1, w_hr_0, w_hr_1,
    offsets, flags,
    T, B, N, H, P, D, step,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, GRADS: tl.constexpr, HIDDEN: tl.constexpr,
    HEADS: tl.constexpr, STATE: tl.constexpr, CELL_STATE: tl.constexpr, PROJECTED: tl.constexpr,
    MID: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, DY: tl.constexpr, DSEQ: tl.constexpr,
    STAGE: tl.constexpr, FINAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stage of one step of all groups; grid (tiles of the batch, tiles of a head's units, D * HEADS), in
    the first stage of a projected cell tiles of P. FINAL, with step -1: what step 0 leaves to the first h."""
    group = tl.program_id(2)
    d, head = group // HEADS, group % HEADS
    HH, K = H // HEADS, P // HEADS
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    direction = d.to(tl.int64)
    state = direction * B + b
    w_hh = _of(d, w_hh_0, w_hh_1)

    # Columns of h; where nothing is projected, the units.
    has_k = u < K
    column = head * K + u
    live_k = (b < B)[:, None] & has_k[None, :]
    dh = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
    if STAGE < 2:
        dh = _tile(h_grad, state, P, column, live_k)
        if step < T - 1:
            row, here, on, cut = _place(step + 1, d, T, B, b, 0, offsets, flags, PACKED, MASKED)
            through = _through_R(
                dg, direction * N + row, GRADS * H, head * HH, on, w_hh, u, H, K, HH, has_k,
                0, GATES - 1 if MID else GATES, HIDDEN, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
            )  # fmt: skip
            dh += through
            if MASKED:
                dh = tl.where(cut[:, None], 0.0, dh)
    if FINAL:
        _put(h_grad, state, P, column, dh, live_k)
    else:
        row, here, on, cut = _place(step, d, T, B, b, 0, offsets, flags, PACKED, MASKED)
        local = direction * N + row
        has_u = u < HH
        unit = head * HH + u
        live_u, on_u = (b < B)[:, None] & has_u[None, :], on[:, None] & has_u[None, :]
        on_k = on[:, None] & has_k[None, :]
        here_u, here_k = here[:, None] & has_u[None, :], here[:, None] & has_k[None, :]
        if STAGE < 2:
            past = tl.where(on[:, None], 0.0, dh)  # of sequences that do not run here
            dh = tl.where(on[:, None], dh, 0.0)
            if DY:
                dh += _tile(dy, row, D * P, d * P + column, on_k)
        if PROJECTED and STAGE == 1:
            _put(dmid, local, P, column, dh, here_k)
            _put(h_grad, state, P, column, past, live_k)
        else:
            h = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
            if STATE:
                h = _tile(h_before, local, P, unit, on_u)
            if MID and STAGE == 2:
                through = _through_R(
                    dg, local, GRADS * H, head * HH, on, w_hh, u, H, K, HH, has_u,
                    2, 1, HIDDEN, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
                )  # fmt: skip
                r = _tile(gates, local, SAVED * H, unit, on_u)
                dr, more = cells.reset_backward_first(r, h, through)
                _put(dg, local, GRADS * H, unit, tl.where(on_u, dr, 0.0), here_u)
                rest = _tile(h_grad, state, P, unit, live_u)
                _put(h_grad, state, P, unit, tl.where(on_u, rest + more, rest), live_u)
            else:
                saved = ()
                for g in tl.static_range(SAVED):
                    saved = saved + (_tile(gates, local, SAVED * H, g * H + unit, on_u),)
                if MID:
                    dz, dn, rest = cells.reset_backward(saved[1], saved[2], h, dh)
                    _put(
                        dg,
                        local,
                        GRADS * H,
                        H + unit,
                        tl.where(on_u, dz, 0.0),
                        here_u,
                    )
                    _put(
                        dg,
                        local,
                        GRADS * H,
                        2 * H + unit,
                        tl.where(on_u, dn, 0.0),
                        here_u,
                    )
                    _put(h_grad, state, P, unit, rest + past, live_u)
                else:
                    if PROJECTED:
                        dh = _products(
                            dmid, local, P, 0, on, _of(d, w_hr_0, w_hr_1), u, 0, 1, H, has_u, P,
                            1, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
                        )[0]  # fmt: skip
                    c = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
                    c_new = c
                    dc_next = c
                    if CELL_STATE:
                        c = _tile(c_before, local, H, unit, on_u)
                        c_new = _tile(seq, local, H, unit, on_u)
                        dc_next = _tile(c_grad, state, H, unit, live_u)
                    dc = tl.where(on[:, None], dc_next, 0.0)
                    if DSEQ:
                        dc += _tile(dseq, local, H, unit, on_u)
                    grads, rest, dc_new = cells.backward(CELL, saved, h, c, c_new, dh, dc)
                    for g in tl.static_range(GRADS):
                        value = tl.where(on_u, grads[g], 0.0)
                        _put(dg, local, GRADS * H, g * H + unit, value, here_u)
                    if CELL_STATE:
                        if MASKED:
                            dc_new = tl.where(cut[:, None], 0.0, dc_new)
                        _put(c_grad, state, H, unit, tl.where(on[:, None], dc_new, dc_next), live_u)
                    if not PROJECTED:
                        _put(h_grad, state, P, unit, rest + past, live_u)

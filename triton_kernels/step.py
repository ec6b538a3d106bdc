"""The kernels of layers that do not fit on a chip whole, forward and backward: see scan.py for the names.

A program owns a tile of the batch and a tile of units of one group, and reads R from the cache, piece by
piece. It runs one stage of one step, a launch each; or, where all programs are on the GPU at once (GRID), all
steps in one launch: those that share a tile of the batch and a group meet after every stage.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import cells
from .scan import FREE, _biases, _dot, _of, _place, _put, _tile

# Numbers from one counter of meetings to the next: a cache line.
APART = tl.constexpr(32)


@triton.jit
def _meet(arrived, meetings):
    """Returns when all programs of this tile of the batch and this group have been here so many times, and
    sees what they stored before."""
    counter = arrived + (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * APART
    tl.debug_barrier()  # all of this program's threads have stored
    tl.atomic_add(counter, 1, sem="release")
    while tl.atomic_add(counter, 0, sem="acquire") < meetings * tl.num_programs(1):
        pass
    tl.debug_barrier()


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


@triton.jit
def _input_parts(gates, row, stride, H, unit, on, bias, GATES: tl.constexpr):
    """Of all gates, with their bias."""
    x = ()
    for g in tl.static_range(GATES):
        x = x + (_tile(gates, row, stride, g * H + unit, on) + bias[g],)
    return x


@triton.jit(do_not_specialize=FREE)
def step_forward(
    gates, y, seq,
    mid,  # [D, rows, H]: between the stages
    exchange,  # [2, D, B, P]: h as y keeps it, before and after by turns
    h_state, c_state, w_hh_0, w_hh_1, b_ih_0, b_ih_1, b_hh_0, b_hh_1, w_hr_0, w_hr_1,
    offsets, flags,
    arrived,  # [groups, tiles of the batch, APART]: zeros, where GRID
    base_0, base_1, rows, T, B, N, H, P, D, begin, end,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, HEADS: tl.constexpr,
    CELL_STATE: tl.constexpr, PROJECTED: tl.constexpr, MID: tl.constexpr, BIAS: tl.constexpr,
    PACKED: tl.constexpr, MASKED: tl.constexpr, SAVE: tl.constexpr, SEQ: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, GRID: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stages FIRST to LAST of steps begin to end of all groups; grid (tiles of the batch, tiles of a head's
    units, D * HEADS), in the second stage of a projected cell tiles of P. Stage 0: the only one. EARLY: the
    gates' input parts are loaded before the product, which hides the wait for them and takes registers."""
    group = tl.program_id(2)
    d, head = group // HEADS, group % HEADS
    base = _of(d, base_0.to(tl.int64), base_1.to(tl.int64))  # as in scan_forward
    HH, K = H // HEADS, P // HEADS
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    direction = d.to(tl.int64)
    state = direction * B + b
    has, has_p = u < HH, u < P
    unit = head * HH + u
    live, live_p = (b < B)[:, None] & has[None, :], (b < B)[:, None] & has_p[None, :]
    w_hh = _of(d, w_hh_0, w_hh_1)
    bias_x, bias_h = _biases(_of(d, b_ih_0, b_ih_1), _of(d, b_hh_0, b_hh_1), unit, has, H, GATES, BIAS)

    for step in range(begin, end):
        row, here, on, cut = _place(step, d, T, B, b, base, offsets, flags, PACKED, MASKED)
        on_u, here_u = on[:, None] & has[None, :], here[:, None] & has[None, :]
        local = direction * rows + row
        before = step % 2 * (B.to(tl.int64) * D) + state
        after = (step + 1) % 2 * (B.to(tl.int64) * D) + state
        # A product's rows that are off or zeroed read as 0.
        reads = on & (cut == 0)
        for STAGE in tl.static_range(FIRST, LAST + 1):
            if PROJECTED and STAGE == 2:
                h = _tile(h_state, state, P, u, live_p)
                h_new = _products(
                    mid, local, H, 0, on, _of(d, w_hr_0, w_hr_1), u, 0, H, 1, has_p, H,
                    1, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
                )[0]  # fmt: skip
                h = tl.where(on[:, None], h_new, h)
                shown = tl.where(on[:, None], h_new, 0.0)
                _put(y, row + base, D * P, d * P + u, shown, here[:, None] & has_p[None, :])
                _put(h_state, state, P, u, h, live_p)
                _put(exchange, after, P, u, h, live_p)
            elif MID and STAGE == 1:
                h_cut = tl.where(cut[:, None], 0.0, _tile(h_state, state, P, unit, live))
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
                if MID:
                    product = _products(
                        mid, local, H, head * HH, on, w_hh, 2 * H + unit, 0, K, 1, has, K,
                        1, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
                    )  # fmt: skip
                else:
                    if EARLY:
                        early = _input_parts(gates, local, SAVED * H, H, unit, on_u, bias_x, GATES)
                    product = _products(
                        exchange, before, P, head * K, reads, w_hh, unit, H * K, K, 1, has, K,
                        GATES, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
                    )  # fmt: skip
                h = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
                if not PROJECTED:
                    h = _tile(h_state, state, P, unit, live)
                c = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
                if CELL_STATE:
                    c = _tile(c_state, state, H, unit, live)
                h_cut = h
                c_cut = c
                if MASKED:
                    h_cut = tl.where(cut[:, None], 0.0, h)
                    c_cut = tl.where(cut[:, None], 0.0, c)
                c_new = c
                if MID:
                    x = _tile(gates, local, SAVED * H, 2 * H + unit, on_u) + bias_x[2]
                    z = _tile(gates, local, SAVED * H, H + unit, on_u)
                    h_new, n = cells.reset_forward(x, product[0] + bias_h[2], z, h_cut)
                    if SAVE:
                        _put(gates, local, SAVED * H, 2 * H + unit, n, on_u)
                else:
                    if EARLY:
                        x = early
                    else:
                        x = _input_parts(gates, local, SAVED * H, H, unit, on_u, bias_x, GATES)
                    a = ()
                    for g in tl.static_range(GATES):
                        a = a + (product[g] + bias_h[g],)
                    h_new, c_new, saved = cells.forward(CELL, x, a, h_cut, c_cut)
                    if SAVE:
                        for g in tl.static_range(SAVED):
                            _put(gates, local, SAVED * H, g * H + unit, saved[g], on_u)
                if SEQ:
                    shown = tl.where(on_u, c_new, 0.0)
                    _put(seq, direction * N + row + base, H, unit, shown, here_u)
                if CELL_STATE:
                    _put(c_state, state, H, unit, tl.where(on[:, None], c_new, c), live)
                if PROJECTED:
                    _put(mid, local, H, unit, h_new, on_u)
                else:
                    h = tl.where(on[:, None], h_new, h)
                    _put(y, row + base, D * P, d * P + unit, tl.where(on_u, h_new, 0.0), here_u)
                    _put(h_state, state, P, unit, h, live)
                    _put(exchange, after, P, unit, h, live)
            if GRID:
                _meet(arrived, (step - begin) * (LAST + 1 - FIRST) + STAGE + 1 - FIRST)


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
    h_grad,  # [D, B, P] float32: what the steps after leave to h past R, between stages
    c_grad, w_hh_0, w_hh_1, w_hr_0, w_hr_1,
    offsets, flags, arrived,
    T, B, N, H, P, D, begin, end,
    CELL: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, GRADS: tl.constexpr, HIDDEN: tl.constexpr,
    HEADS: tl.constexpr, STATE: tl.constexpr, CELL_STATE: tl.constexpr, PROJECTED: tl.constexpr,
    MID: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, DY: tl.constexpr, DSEQ: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, GRID: tl.constexpr, FINAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stages FIRST to LAST of steps T-1-begin down to T-end of all groups; grid (tiles of the batch, tiles of
    a head's units, D * HEADS), in the first stage of a projected cell tiles of P. FINAL, at T: what step 0
    leaves to the first h."""
    group = tl.program_id(2)
    d, head = group // HEADS, group % HEADS
    HH, K = H // HEADS, P // HEADS
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    direction = d.to(tl.int64)
    state = direction * B + b
    w_hh = _of(d, w_hh_0, w_hh_1)
    # Units, and columns of h, which are the units where nothing is projected.
    has_u, has_k = u < HH, u < K
    unit, column = head * HH + u, head * K + u
    live_u, live_k = (b < B)[:, None] & has_u[None, :], (b < B)[:, None] & has_k[None, :]

    for i in range(begin, end):
        step = T - 1 - i
        for STAGE in tl.static_range(FIRST, LAST + 1):
            dh = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
            if STAGE < 2:
                dh = _tile(h_grad, state, P, column, live_k)
                if i > 0:
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
                on_u, on_k = on[:, None] & has_u[None, :], on[:, None] & has_k[None, :]
                here_u, here_k = here[:, None] & has_u[None, :], here[:, None] & has_k[None, :]
                past = dh
                if STAGE < 2:
                    past = tl.where(on[:, None], 0.0, dh)  # of sequences that do not run here
                    dh = tl.where(on[:, None], dh, 0.0)
                    if DY:
                        dh += _tile(dy, row, D * P, d * P + column, on_k)
                h = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
                if STATE:
                    h = _tile(h_before, local, P, unit, on_u)
                if PROJECTED and STAGE == 1:
                    _put(dmid, local, P, column, dh, here_k)
                    _put(h_grad, state, P, column, past, live_k)
                elif MID and STAGE == 2:
                    through = _through_R(
                        dg, local, GRADS * H, head * HH, on, w_hh, u, H, K, HH, has_u,
                        2, 1, HIDDEN, BLOCK_B, BLOCK_U, BLOCK_K, OPERAND, PRECISION,
                    )  # fmt: skip
                    r = _tile(gates, local, SAVED * H, unit, on_u)
                    dr, more = cells.reset_backward_first(r, h, through)
                    _put(dg, local, GRADS * H, unit, tl.where(on_u, dr, 0.0), here_u)
                    rest = _tile(h_grad, state, P, unit, live_u)
                    _put(h_grad, state, P, unit, tl.where(on_u, rest + more, rest), live_u)
                elif MID:
                    z = _tile(gates, local, SAVED * H, H + unit, on_u)
                    n = _tile(gates, local, SAVED * H, 2 * H + unit, on_u)
                    dz, dn, rest = cells.reset_backward(z, n, h, dh)
                    _put(dg, local, GRADS * H, H + unit, tl.where(on_u, dz, 0.0), here_u)
                    _put(dg, local, GRADS * H, 2 * H + unit, tl.where(on_u, dn, 0.0), here_u)
                    _put(h_grad, state, P, unit, rest + past, live_u)
                else:
                    saved = ()
                    for g in tl.static_range(SAVED):
                        saved = saved + (_tile(gates, local, SAVED * H, g * H + unit, on_u),)
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
            if GRID:
                _meet(arrived, (i - begin) * (LAST + 1 - FIRST) + STAGE + 1 - FIRST)

"""The kernels of layers that do not fit on a chip whole, forward and backward: see scan.py for the names.

A program owns a tile of the batch and a tile of units of one group. It runs one stage of one step, a launch
each, and reads R from the cache, piece by piece; or, where all programs are on the GPU at once (GRID), all
steps in one launch: those that share sequences and a group meet after every stage, and each keeps the first
RESIDENT pieces of its R on the chip, for TILES tiles of the batch, one after another.

A piece is BLOCK_K of a product's K. SPLIT > 1 cuts it into as many parts, whose products are separate ones of
a batch of products, until the end: Triton gives each warp its own (tiles of [16, 16] would leave most warps
nothing but to do the same as others), and the sums do not wait for one another.
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
def _source_piece(
    source, row, stride, column, on, first, K,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """source[row, column + first : ... + BLOCK_K]: [BLOCK_B, BLOCK_K], [SPLIT, BLOCK_B, BLOCK_K / SPLIT]."""
    if SPLIT == 1:
        k = first + tl.arange(0, BLOCK_K)
        piece = tl.load(
            source + row[:, None] * stride + (column + k)[None, :],
            mask=on[:, None] & (k < K)[None, :],
            other=0.0,
        )
    else:
        part = BLOCK_K // SPLIT
        k = first + tl.arange(0, SPLIT)[:, None] * part + tl.arange(0, BLOCK_K // SPLIT)[None, :]
        piece = tl.load(
            source + row[None, :, None] * stride + (column + k)[:, None, :],
            mask=on[None, :, None] & (k < K)[:, None, :],
            other=0.0,
        )
    return piece


@triton.jit
def _weight_piece(w, column, w_k, has, first, K, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """w[column + k * w_k] of k from first on: [BLOCK_K, columns], or [SPLIT, BLOCK_K / SPLIT, columns]."""
    if SPLIT == 1:
        k = first + tl.arange(0, BLOCK_K)
        piece = tl.load(
            w + column[None, :] + (k * w_k)[:, None], mask=(k < K)[:, None] & has[None, :], other=0.0
        )
    else:
        part = BLOCK_K // SPLIT
        k = first + tl.arange(0, SPLIT)[:, None] * part + tl.arange(0, BLOCK_K // SPLIT)[None, :]
        piece = tl.load(
            w + column[None, None, :] + (k * w_k)[:, :, None],
            mask=(k < K)[:, :, None] & has[None, None, :],
            other=0.0,
        )
    return piece


@triton.jit
def _resident(
    w, column, gate_stride, w_k, has, K,
    GATES: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The first pieces of each gate's weights, by piece and gate."""
    R = ()
    for p in tl.static_range(RESIDENT):
        for g in tl.static_range(GATES):
            R = R + (_weight_piece(w, g * gate_stride + column, w_k, has, p * BLOCK_K, K, BLOCK_K, SPLIT),)
    return R


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, SPLIT: tl.constexpr):
    acc = ()
    for _ in tl.static_range(COUNT):
        if SPLIT == 1:
            acc = acc + (tl.zeros((BLOCK_B, BLOCK_U), tl.float32),)
        else:
            acc = acc + (tl.zeros((SPLIT, BLOCK_B, BLOCK_U), tl.float32),)
    return acc


@triton.jit
def _joined(acc, SPLIT: tl.constexpr):
    """The sum of a product's parts."""
    if SPLIT == 1:
        return acc
    else:
        return tl.sum(acc, 0)


@triton.jit
def _products(
    source, row, stride, column, on, w, w_column, gate_stride, w_k, has, K, R,
    FIRST: tl.constexpr, GATES: tl.constexpr, OF: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """source[row, column : column + K] times the weights of gates FIRST to FIRST + GATES, of which gate g's
    begin at w + g * gate_stride + w_column: [BLOCK_B, BLOCK_U] each. R: their first RESIDENT pieces, of OF
    gates; of the source AHEAD pieces are loaded before the first is used."""
    acc = _zeros(GATES, BLOCK_B, BLOCK_U, SPLIT)
    for begin in tl.static_range(0, RESIDENT, AHEAD):
        pieces = ()
        for p in tl.static_range(AHEAD):
            if begin + p < RESIDENT:
                pieces = pieces + (
                    _source_piece(
                        source, row, stride, column, on, (begin + p) * BLOCK_K, K, BLOCK_B, BLOCK_K, SPLIT
                    ),
                )
        for p in tl.static_range(AHEAD):
            if begin + p < RESIDENT:
                new = ()
                for g in tl.static_range(GATES):
                    block = R[(begin + p) * OF + FIRST + g]
                    new = new + (_dot(pieces[p], block, acc[g], OPERAND, PRECISION),)
                acc = new
    for first in range(RESIDENT * BLOCK_K, K, BLOCK_K):
        a = _source_piece(source, row, stride, column, on, first, K, BLOCK_B, BLOCK_K, SPLIT)
        new = ()
        for g in tl.static_range(GATES):
            block = _weight_piece(w, (FIRST + g) * gate_stride + w_column, w_k, has, first, K, BLOCK_K, SPLIT)
            new = new + (_dot(a, block, acc[g], OPERAND, PRECISION),)
        acc = new
    out = ()
    for g in tl.static_range(GATES):
        out = out + (_joined(acc[g], SPLIT),)
    return out


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
    FIRST: tl.constexpr, LAST: tl.constexpr, GRID: tl.constexpr,
    TILES: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stages FIRST to LAST of steps begin to end of all groups; grid (tiles of the batch, tiles of a head's
    units, D * HEADS), in the second stage of a projected cell tiles of P. Stage 0: the only one."""
    group = tl.program_id(2)
    d, head = group // HEADS, group % HEADS
    base = _of(d, base_0, base_1)
    HH, K = H // HEADS, P // HEADS
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    direction = d.to(tl.int64)
    has, has_p = u < HH, u < P
    unit = head * HH + u
    w_hh, w_hr = _of(d, w_hh_0, w_hh_1), _of(d, w_hr_0, w_hr_1)
    bias_x, bias_h = _biases(_of(d, b_ih_0, b_ih_1), _of(d, b_hh_0, b_hh_1), unit, has, H, CELL, GATES, BIAS)
    R = _resident(w_hh, unit * K, H * K, 1, has, K, GATES, RESIDENT, BLOCK_K, SPLIT)

    for step in range(begin, end):
        for STAGE in tl.static_range(FIRST, LAST + 1):
            for tile in range(0, TILES):
                b = (tl.program_id(0) * TILES + tile) * BLOCK_B + tl.arange(0, BLOCK_B)
                state = direction * B + b
                live, live_p = (b < B)[:, None] & has[None, :], (b < B)[:, None] & has_p[None, :]
                row, here, on, cut = _place(step, d, T, B, b, base, offsets, flags, PACKED, MASKED)
                on_u, here_u = on[:, None] & has[None, :], here[:, None] & has[None, :]
                local = direction * rows + row
                before = step % 2 * (B.to(tl.int64) * D) + state
                after = (step + 1) % 2 * (B.to(tl.int64) * D) + state
                # A product's rows that are off or zeroed read as 0.
                reads = on & (cut == 0)
                if PROJECTED and STAGE == 2:
                    h = _tile(h_state, state, P, u, live_p)
                    h_new = _products(
                        mid, local, H, 0, on, w_hr, u * H, 0, 1, has_p, H, R,
                        0, 1, GATES, 0, AHEAD, BLOCK_B, BLOCK_U, BLOCK_K, SPLIT, OPERAND, PRECISION,
                    )[0]  # fmt: skip
                    h = tl.where(on[:, None], h_new, h)
                    shown = tl.where(on[:, None], h_new, 0.0)
                    _put(exchange, after, P, u, h, live_p)
                    _put(y, row + base, D * P, d * P + u, shown, here[:, None] & has_p[None, :])
                    _put(h_state, state, P, u, h, live_p)
                elif MID and STAGE == 1:
                    xr = _tile(gates, local, SAVED * H, unit, on_u) + bias_x[0]
                    xz = _tile(gates, local, SAVED * H, H + unit, on_u) + bias_x[1]
                    h_cut = tl.where(cut[:, None], 0.0, _tile(h_state, state, P, unit, live))
                    product = _products(
                        exchange, before, P, head * K, reads, w_hh, unit * K, H * K, 1, has, K, R,
                        0, 2, GATES, RESIDENT, AHEAD, BLOCK_B, BLOCK_U, BLOCK_K, SPLIT, OPERAND, PRECISION,
                    )  # fmt: skip
                    ar, az = product[0] + bias_h[0], product[1] + bias_h[1]
                    r, z, m = cells.reset_forward_first(xr, xz, ar, az, h_cut)
                    _put(mid, local, H, unit, m, on_u)
                    _put(gates, local, SAVED * H, unit, r, on_u)
                    _put(gates, local, SAVED * H, H + unit, z, on_u)
                else:
                    # What is not waited for is loaded first.
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
                        product = _products(
                            mid, local, H, head * HH, on, w_hh, unit * K, H * K, 1, has, K, R,
                            2, 1, GATES, RESIDENT, AHEAD,
                            BLOCK_B, BLOCK_U, BLOCK_K, SPLIT, OPERAND, PRECISION,
                        )  # fmt: skip
                        h_new, n = cells.reset_forward(x, product[0] + bias_h[2], z, h_cut)
                        saved = (n,)
                    else:
                        x = _input_parts(gates, local, SAVED * H, H, unit, on_u, bias_x, GATES)
                        product = _products(
                            exchange, before, P, head * K, reads, w_hh, unit * K, H * K, 1, has, K, R,
                            0, GATES, GATES, RESIDENT, AHEAD,
                            BLOCK_B, BLOCK_U, BLOCK_K, SPLIT, OPERAND, PRECISION,
                        )  # fmt: skip
                        a = ()
                        for g in tl.static_range(GATES):
                            a = a + (product[g] + bias_h[g],)
                        h_new, c_new, saved = cells.forward(CELL, x, a, h_cut, c_cut)
                    # What others wait for goes first.
                    if PROJECTED:
                        _put(mid, local, H, unit, h_new, on_u)
                    else:
                        h = tl.where(on[:, None], h_new, h)
                        _put(exchange, after, P, unit, h, live)
                        _put(y, row + base, D * P, d * P + unit, tl.where(on_u, h_new, 0.0), here_u)
                        _put(h_state, state, P, unit, h, live)
                    if CELL_STATE:
                        _put(c_state, state, H, unit, tl.where(on[:, None], c_new, c), live)
                    if SAVE:
                        for g in tl.static_range(1 if MID else SAVED):
                            of = 2 if MID else g
                            _put(gates, local, SAVED * H, of * H + unit, saved[g], on_u)
                    if SEQ:
                        shown = tl.where(on_u, c_new, 0.0)
                        _put(seq, direction * N + row + base, H, unit, shown, here_u)
            if GRID:
                _meet(arrived, (step - begin) * (LAST + 1 - FIRST) + STAGE + 1 - FIRST)


@triton.jit
def _through_R(
    dg, row, stride, column, on, w, w_column, H, K, HH, has, R,
    FIRST: tl.constexpr, GATES: tl.constexpr, OF: tl.constexpr, HIDDEN: tl.constexpr,
    RESIDENT: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What gates FIRST to FIRST + GATES give to columns of h: the sum of their gradients times R."""
    acc = _zeros(1, BLOCK_B, BLOCK_U, SPLIT)[0]
    for begin in tl.static_range(0, RESIDENT * GATES, AHEAD):
        pieces = ()
        for i in tl.static_range(AHEAD):
            if begin + i < RESIDENT * GATES:
                of_gate = HIDDEN[FIRST + (begin + i) % GATES] * H + column
                first = (begin + i) // GATES * BLOCK_K
                piece = _source_piece(dg, row, stride, of_gate, on, first, HH, BLOCK_B, BLOCK_K, SPLIT)
                pieces = pieces + (piece,)
        for i in tl.static_range(AHEAD):
            if begin + i < RESIDENT * GATES:
                block = R[(begin + i) // GATES * OF + FIRST + (begin + i) % GATES]
                acc = _dot(pieces[i], block, acc, OPERAND, PRECISION)
    for first in range(RESIDENT * BLOCK_K, HH, BLOCK_K):
        for g in tl.static_range(FIRST, FIRST + GATES):
            a = _source_piece(dg, row, stride, HIDDEN[g] * H + column, on, first, HH, BLOCK_B, BLOCK_K, SPLIT)
            block = _weight_piece(w, (g * H + column) * K + w_column, K, has, first, HH, BLOCK_K, SPLIT)
            acc = _dot(a, block, acc, OPERAND, PRECISION)
    return _joined(acc, SPLIT)


@triton.jit
def _saved_parts(gates, row, stride, H, unit, on, SAVED: tl.constexpr):
    saved = ()
    for g in tl.static_range(SAVED):
        saved = saved + (_tile(gates, row, stride, g * H + unit, on),)
    return saved


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
    TILES: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stages FIRST to LAST of steps T-1-begin down to T-end of all groups; grid (tiles of the batch, tiles of
    a head's units, D * HEADS), in the first stage of a projected cell tiles of P. FINAL, at T: what step 0
    leaves to the first h."""
    group = tl.program_id(2)
    d, head = group // HEADS, group % HEADS
    HH, K = H // HEADS, P // HEADS
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    direction = d.to(tl.int64)
    w_hh, w_hr = _of(d, w_hh_0, w_hh_1), _of(d, w_hr_0, w_hr_1)
    # Units, and columns of h, which are the units where nothing is projected.
    has_u, has_k = u < HH, u < K
    unit, column = head * HH + u, head * K + u
    R = _resident(w_hh, head * HH * K + u, H * K, K, has_k, HH, GATES, RESIDENT, BLOCK_K, SPLIT)

    for i in range(begin, end):
        step = T - 1 - i
        for STAGE in tl.static_range(FIRST, LAST + 1):
            for tile in range(0, TILES):
                b = (tl.program_id(0) * TILES + tile) * BLOCK_B + tl.arange(0, BLOCK_B)
                state = direction * B + b
                live_u, live_k = (b < B)[:, None] & has_u[None, :], (b < B)[:, None] & has_k[None, :]
                zeros = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
                # What is not waited for is loaded first.
                past = zeros
                if STAGE < 2 or MID:
                    past = _tile(h_grad, state, P, column, live_k)
                given, h, c, c_new, dc_next = zeros, zeros, zeros, zeros, zeros
                if not FINAL:
                    row, here, on, cut = _place(step, d, T, B, b, 0, offsets, flags, PACKED, MASKED)
                    local = direction * N + row
                    on_u, on_k = on[:, None] & has_u[None, :], on[:, None] & has_k[None, :]
                    here_u, here_k = here[:, None] & has_u[None, :], here[:, None] & has_k[None, :]
                    if DY and STAGE < 2:
                        given = _tile(dy, row, D * P, d * P + column, on_k)
                    if STATE:
                        h = _tile(h_before, local, P, unit, on_u)
                    if not PROJECTED or STAGE == 2:
                        saved = _saved_parts(gates, local, SAVED * H, H, unit, on_u, SAVED)
                        if CELL_STATE:
                            c = _tile(c_before, local, H, unit, on_u)
                            c_new = _tile(seq, local, H, unit, on_u)
                            dc_next = _tile(c_grad, state, H, unit, live_u)
                dh = zeros
                if STAGE < 2:
                    dh = past
                    if i > 0:
                        after, _here, on_after, cut_after = _place(
                            step + 1, d, T, B, b, 0, offsets, flags, PACKED, MASKED
                        )
                        through = _through_R(
                            dg, direction * N + after, GRADS * H, head * HH, on_after,
                            w_hh, u, H, K, HH, has_k, R,
                            0, GATES - 1 if MID else GATES, GATES, HIDDEN, RESIDENT, AHEAD,
                            BLOCK_B, BLOCK_U, BLOCK_K, SPLIT, OPERAND, PRECISION,
                        )  # fmt: skip
                        dh += through
                        if MASKED:
                            dh = tl.where(cut_after[:, None], 0.0, dh)
                if FINAL:
                    _put(h_grad, state, P, column, dh, live_k)
                else:
                    if STAGE < 2:
                        past = tl.where(on[:, None], 0.0, dh)  # of sequences that do not run here
                        dh = tl.where(on[:, None], dh + given, 0.0)
                    if PROJECTED and STAGE == 1:
                        _put(dmid, local, P, column, dh, here_k)
                        _put(h_grad, state, P, column, past, live_k)
                    elif MID and STAGE == 2:
                        through = _through_R(
                            dg, local, GRADS * H, head * HH, on, w_hh, u, H, K, HH, has_u, R,
                            2, 1, GATES, HIDDEN, RESIDENT, AHEAD,
                            BLOCK_B, BLOCK_U, BLOCK_K, SPLIT, OPERAND, PRECISION,
                        )  # fmt: skip
                        dr, more = cells.reset_backward_first(saved[0], h, through)
                        _put(dg, local, GRADS * H, unit, tl.where(on_u, dr, 0.0), here_u)
                        _put(h_grad, state, P, unit, tl.where(on_u, past + more, past), live_u)
                    elif MID:
                        dz, dn, rest = cells.reset_backward(saved[1], saved[2], h, dh)
                        _put(dg, local, GRADS * H, 2 * H + unit, tl.where(on_u, dn, 0.0), here_u)
                        _put(dg, local, GRADS * H, H + unit, tl.where(on_u, dz, 0.0), here_u)
                        _put(h_grad, state, P, unit, rest + past, live_u)
                    else:
                        if PROJECTED:
                            dh = _products(
                                dmid, local, P, 0, on, w_hr, u, 0, H, has_u, P, R,
                                0, 1, GATES, 0, AHEAD, BLOCK_B, BLOCK_U, BLOCK_K, SPLIT, OPERAND, PRECISION,
                            )[0]  # fmt: skip
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

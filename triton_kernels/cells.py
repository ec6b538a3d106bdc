"""The cells' arithmetic, in Triton: what csrc/cells/*.h is to the C++ kernels, with the same gate order and
the same values saved. All of it is float32, elementwise, on tiles of any shape.

A cell has up to two stages a step. The GRU whose reset gate acts before the product makes r and z of h, then
n of mid = r*h; the projected LSTM makes its output, then projects it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # Near 0 the difference of 2*sigmoid(2x) and 1 would lose its digits: the series there, within 1e-9.
    s = x * x
    series = x * (
        1.0
        + s
        * (-0.333333333 + s * (0.133333333 + s * (-0.0539682540 + s * (0.0218694885 + s * -0.00886323553))))
    )
    return tl.where(tl.abs(x) < 0.25, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def forward(CELL: tl.constexpr, x, a, h, c):
    """A cell of one stage. x: the gates' input parts with their bias; a: their recurrent parts with theirs;
    h, c: the states. Returns (h', c', saved)."""
    if CELL == "lstm":
        i = tl.sigmoid(x[0] + a[0])
        f = tl.sigmoid(x[1] + a[1])
        g = tanh(x[2] + a[2])
        o = tl.sigmoid(x[3] + a[3])
        c = f * c + i * g
        return o * tanh(c), c, (i, f, g, o)
    elif CELL == "gru":
        r = tl.sigmoid(x[0] + a[0])
        z = tl.sigmoid(x[1] + a[1])
        n = tanh(x[2] + r * a[2])
        return n + z * (h - n), c, (r, z, n, a[2])
    elif CELL == "rnn_tanh":
        h = tanh(x[0] + a[0])
        return h, c, (h,)
    else:
        # Not maximum: a NaN must stay one.
        h = x[0] + a[0]
        h = tl.where(h < 0.0, 0.0, h)
        return h, c, (h,)


@triton.jit
def backward(CELL: tl.constexpr, saved, h, c, c_new, dh, dc):
    """The gradients of a cell of one stage. h, c: the states before; c_new: c after; dh, dc: the gradients of
    the states after. Returns (grads, what dh leaves to the h before past R, dc of the c before); nothing is a
    plain 0, not 0 times a gradient, which may be infinite."""
    if CELL == "lstm":
        i, f, g, o = saved
        t = tanh(c_new)
        dc += dh * o * (1.0 - t * t)
        di = dc * g * i * (1.0 - i)
        df = dc * c * f * (1.0 - f)
        dg = dc * i * (1.0 - g * g)
        do = dh * t * o * (1.0 - o)
        return (di, df, dg, do), tl.zeros_like(dh), dc * f
    elif CELL == "gru":
        r, z, n, a = saved
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dz = dh * (h - n) * z * (1.0 - z)
        return (dn * a * r * (1.0 - r), dz, dn, dn * r), dh * z, dc
    elif CELL == "rnn_tanh":
        y = saved[0]
        return (dh * (1.0 - y * y),), tl.zeros_like(dh), dc
    else:
        return (tl.where(saved[0] <= 0.0, 0.0, dh),), tl.zeros_like(dh), dc


# The GRU of two stages.


@triton.jit
def reset_forward_first(xr, xz, ar, az, h):
    """(r, z, mid)"""
    r = tl.sigmoid(xr + ar)
    return r, tl.sigmoid(xz + az), r * h


@triton.jit
def reset_forward(xn, an, z, h):
    """(h', n)"""
    n = tanh(xn + an)
    return n + z * (h - n), n


@triton.jit
def reset_backward(z, n, h, dh):
    """(dz, dn, what dh leaves to h past R and mid)"""
    dn = dh * (1.0 - z) * (1.0 - n * n)
    return dh * (h - n) * z * (1.0 - z), dn, dh * z


@triton.jit
def reset_backward_first(r, h, dmid):
    """(dr, what mid leaves to h)"""
    return dmid * h * r * (1.0 - r), dmid * r

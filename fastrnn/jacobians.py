"""What a step of a cell does to a small change of its state: derivatives in closed form, from the gates.

`fastrnn.diagnostics` is made of them. As the reference they are plain torch operations and share no code with
the kernels. What these saved of the gates differs from backend to backend, and is made again from the states,
by one product for all steps. Each class holds the elementwise derivatives of its cell, [T, B, H], and knows
two things:

    back(dgx)       the part of dL/dh_{k-1} that comes through step k's gates, [T, B, P], from the gradient
                    dgx [T, B, G*H] of their input part; `carry` [T, B, H] is what comes through beside them,
                    elementwise: dL/ds_{k-1} has carry_k * dL/ds_k (s: the GRU's h, the LSTM's c)
    jacobian(rows)  ds_k/ds_{k-1} of the steps `rows` (LongTensor [n] into T*B): [n, S, S], s = h, or (h, c)

Dimensions: T steps, B batch, H hidden, P projection (P = H without one), G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .reference import DirectionParams

States = Sequence[Tensor]  # h [T, B, P] and, for the LSTM, c [T, B, H]


def _dsigmoid(y: Tensor) -> Tensor:
    return y * (1 - y)


def _dtanh(y: Tensor) -> Tensor:
    return 1 - y * y


def _scaled(d: Tensor, R: Tensor) -> Tensor:
    """diag(d) R for each of the rows d [n, H]: [n, H, P]."""
    return d.unsqueeze(-1) * R


class Steps:
    """All steps of one direction.

    gx   [T, B, G*H] the input part of the gates, with the input's bias
    old  the states before each step, new: those after it
    p    the direction's parameters
    """

    carry: Tensor | None = None

    def __init__(self, gx: Tensor, old: States, new: States, p: DirectionParams) -> None:
        # Copies: the Jacobians are made later, and training goes on in place.
        self.R, self.w_hr = p.w_hh.clone(), None if p.w_hr is None else p.w_hr.clone()
        self._derive(gx, old, new, p.b_hh)

    def _derive(self, gx: Tensor, old: States, new: States, b: Tensor | None) -> None:
        raise NotImplementedError

    @property
    def size(self) -> int:
        """S, the width of the state."""
        return self.R.shape[1]

    def _at(self, rows: Tensor, *derivatives: Tensor) -> list[Tensor]:
        return [d.flatten(0, 1)[rows] for d in derivatives]

    def back(self, dgx: Tensor) -> Tensor:
        return dgx @ self.R

    def jacobian(self, rows: Tensor) -> Tensor:
        raise NotImplementedError


class _Vanilla(Steps):
    """h' = f(a): dh'/dh = diag(f'(a)) R."""

    slope: Tensor

    def jacobian(self, rows: Tensor) -> Tensor:
        (slope,) = self._at(rows, self.slope)
        return _scaled(slope, self.R)


class VanillaTanh(_Vanilla):
    def _derive(self, gx: Tensor, old: States, new: States, b: Tensor | None) -> None:
        self.slope = _dtanh(new[0])


class VanillaRelu(_Vanilla):
    def _derive(self, gx: Tensor, old: States, new: States, b: Tensor | None) -> None:
        self.slope = (new[0] > 0).to(gx.dtype)


class LSTM(Steps):
    """c' = f * c + i * g, m = o * tanh(c'), h' = m, or W_hr m:

    dc'/dh = diag(g i') R_i + diag(c f') R_f + diag(i g') R_g        dc'/dc = diag(f)
    dm/dh  = diag(tanh(c') o') R_o + diag(o tanh'(c')) dc'/dh        dm/dc  = diag(o tanh'(c') f)
    """

    carry: Tensor

    def _derive(self, gx: Tensor, old: States, new: States, b: Tensor | None) -> None:
        gates = (gx + linear(old[0], self.R, b)).chunk(4, -1)
        i, f, o = (gates[k].sigmoid() for k in (0, 1, 3))
        g, tc = gates[2].tanh(), new[1].tanh()
        self.i, self.f, self.g = g * _dsigmoid(i), old[1] * _dsigmoid(f), i * _dtanh(g)
        self.o, self.out = tc * _dsigmoid(o), o * _dtanh(tc)  # of m by o's gate, and by c'
        self.carry = f

    def jacobian(self, rows: Tensor) -> Tensor:
        i, f, g, o, out, carry = self._at(rows, self.i, self.f, self.g, self.o, self.out, self.carry)
        R_i, R_f, R_g, R_o = self.R.chunk(4)
        ch = _scaled(i, R_i) + _scaled(f, R_f) + _scaled(g, R_g)
        hh = _scaled(o, R_o) + out.unsqueeze(-1) * ch
        hc = torch.diag_embed(out * carry)
        if self.w_hr is not None:
            hh, hc = self.w_hr @ hh, self.w_hr @ hc
        return torch.cat([torch.cat([hh, hc], -1), torch.cat([ch, torch.diag_embed(carry)], -1)], -2)

    @property
    def size(self) -> int:
        return self.R.shape[1] + self.R.shape[0] // 4

    def of_cell(self, dh: Tensor) -> Tensor:
        """The part of dL/dc_k that comes through the same step's h_k: [T, B, H] from dL/dh_k [T, B, P]."""
        return self.out * (dh if self.w_hr is None else dh @ self.w_hr)


class _GRU(Steps):
    """h' = (1 - z) * n + z * h: dh'/dh = diag(z) + diag((h - n) z') R_z + diag(1 - z) dn/dh."""

    def _gate(self, h: Tensor, z: Tensor, n: Tensor) -> None:
        self.carry = z
        self.z = (h - n) * _dsigmoid(z)
        self.n = (1 - z) * _dtanh(n)  # of h' by n's gate

    def jacobian(self, rows: Tensor) -> Tensor:
        assert self.carry is not None
        carry, z, n = self._at(rows, self.carry, self.z, self.n)
        _, R_z, _ = self.R.chunk(3)
        return torch.diag_embed(carry) + _scaled(z, R_z) + n.unsqueeze(-1) * self._candidate(rows)

    def _candidate(self, rows: Tensor) -> Tensor:
        """Of n's gate by h: [n, H, H]."""
        raise NotImplementedError


class GRU(_GRU):
    """n's gate is x_n + r * (R_n h + b_n)."""

    def _derive(self, gx: Tensor, old: States, new: States, b: Tensor | None) -> None:
        xr, xz, xn = gx.chunk(3, -1)
        hr, hz, hn = linear(old[0], self.R, b).chunk(3, -1)
        self.r = (xr + hr).sigmoid()
        self.dr = hn * _dsigmoid(self.r)
        self._gate(old[0], (xz + hz).sigmoid(), (xn + self.r * hn).tanh())

    def back(self, dgx: Tensor) -> Tensor:
        dr, dz, dn = dgx.chunk(3, -1)
        return torch.cat([dr, dz, self.r * dn], -1) @ self.R

    def _candidate(self, rows: Tensor) -> Tensor:
        r, dr = self._at(rows, self.r, self.dr)
        R_r, _, R_n = self.R.chunk(3)
        return _scaled(r, R_n) + _scaled(dr, R_r)


class GRUResetBefore(_GRU):
    """n's gate is x_n + R_n (r * h) + b_n."""

    def _derive(self, gx: Tensor, old: States, new: States, b: Tensor | None) -> None:
        H = old[0].shape[-1]
        xr, xz, xn = gx.chunk(3, -1)
        b_rz, b_n = (None, None) if b is None else (b[: 2 * H], b[2 * H :])
        hr, hz = linear(old[0], self.R[: 2 * H], b_rz).chunk(2, -1)
        self.r = (xr + hr).sigmoid()
        self.dr = old[0] * _dsigmoid(self.r)
        n = (xn + linear(self.r * old[0], self.R[2 * H :], b_n)).tanh()
        self._gate(old[0], (xz + hz).sigmoid(), n)

    def back(self, dgx: Tensor) -> Tensor:
        H = self.r.shape[-1]
        return dgx[..., : 2 * H] @ self.R[: 2 * H] + self.r * (dgx[..., 2 * H :] @ self.R[2 * H :])

    def _candidate(self, rows: Tensor) -> Tensor:
        r, dr = self._at(rows, self.r, self.dr)
        R_r, _, R_n = self.R.chunk(3)
        return R_n @ (torch.diag_embed(r) + _scaled(dr, R_r))


# By the name in `reference.CELLS`.
STEPS: dict[str, Callable[..., Any]] = {
    "lstm": LSTM,
    "gru": GRU,
    "gru_reset_before": GRUResetBefore,
    "rnn_tanh": VanillaTanh,
    "rnn_relu": VanillaRelu,
}

"""What `diagnostics.gradient_flow` gives for one direction of one layer: figures, a sentence, a picture."""

from __future__ import annotations

import importlib
import math
import textwrap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .jacobians import Steps

MISSING = "matplotlib is not installed: pip install matplotlib"
# Elements of the Jacobians that exist at once: 64 MiB of float32, and what they are made of.
_AT_ONCE = 1 << 24
# Of a spectrum that is only drawn: so many of the Jacobians, evenly chosen, within a few seconds on one core.
_DRAWN = 1000
_DRAWN_WORK = 1e9  # n matrices of S x S take n * S^3
# Steady is a change of less than 1 % a step and less than tenfold in all.
_RATE, _CHANGE = math.log(1.01), math.log(10.0)


class Masks(NamedTuple):
    """Bool [T, B], in the order in which the direction runs."""

    active: Tensor  # the sequence has this step
    linked: Tensor  # ... and it continues the step before
    begins: Tensor  # ... and it begins from the first state


class Reading(NamedTuple):
    """Where the loss reads the output: in a sequence lag n is n input steps before its step `begin`."""

    begin: Tensor  # [B], LongTensor
    later: bool  # lags go on to later steps instead
    steps: int  # how many steps of one sequence are read
    finite: bool  # the loss's own gradient by the output


class Trend(NamedTuple):
    """What the norms of the whole state do, by lag."""

    verdict: str
    rate: float  # factor a step, from the first to the last lag that has a gradient
    start: int  # that first lag
    steps: int  # from it to the last
    zero: int | None = None  # the lag after that, where the gradient is 0 or as good as 0
    overflow: int | None = None  # the first lag where it is not finite


def norm(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over dims in float64, of numbers whose squares leave its range too."""
    values = values.double()
    if values.numel():
        largest = values.abs().amax(dims, keepdim=True)
        scale = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
        result: Tensor = torch.linalg.vector_norm(values / scale, dim=dims) * scale.amax(dims)
    else:
        result = torch.linalg.vector_norm(values, dim=dims)
    return result


class GradientFlow:
    """The gradient of a loss L by the states of one direction of one layer. Index k is the input's step, in
    the reverse direction too; tensors lie on the layer's device, in its dtype (float32 for 16-bit layers).

    name             "LSTM", "GRU layer 1, reverse" ...
    norms            [T] ||dL/dh_k||, Frobenius over the batch, by all paths from h_k, of the layers above too
    norms_c          [T] ||dL/dc_k|| of the LSTM likewise, h_k = o * tanh(c_k) among the paths; else None
    norms_state      [T] of the whole state, by which summary and verdict judge: the LSTM's
                     sqrt(||dL/dh_k||^2 + ||dL/dc_k||^2), for other cells `norms`
    singular_values  [T-1, B, S], see there
    origin           (step, later): the lag 0 of summary and plot, from which lags go back to step 0, or on to
                     step T-1 where `later`. It is the last step, in the direction's own order, that the loss
                     reads of the output's half; where that is none or the very step with which the direction
                     begins, as in reverse by the last step's output, it is the other direction's. With
                     lengths each sequence's lags count from its own such step; this is the latest of them
                     (the earliest where `later`), and a lag compares the sequences that reach so far
    rate             factor by which the norm changes a step back in time, on average from the first to the
                     last lag that has a gradient (below the dtype's smallest normal number it counts as
                     none); NaN where there are not two
    verdict          "vanish", "explode", "steady" (less than 1 % a step and tenfold in all, or not twofold
                     in all), "none" where no gradient arrives, "start" where one does only at the step with
                     which the direction begins, as in the reverse direction by the last step's output;
                     "mixed" where the loss reads several steps of a sequence: gradients begin at each of
                     them, and their sum has no rate; "nan" where the forward pass or the loss's own gradient
                     is not finite
    """

    def __init__(
        self,
        name: str,
        h: Tensor,
        c: Tensor | None,
        steps: Steps,
        masks: Masks,
        reading: Reading,
        broken: int | None,
        reverse: bool,
        batched: bool,
    ) -> None:
        """h and c are the norms of each sequence, float64 [T, B]; broken is the first step, in the
        direction's order, after which a state is not finite."""
        self.name = name
        self._h, self._c = h, c
        self._s = h if c is None else torch.hypot(h, c)
        dtype = steps.R.dtype
        self.norms = norm(h, (1,)).to(dtype)
        self.norms_c = None if c is None else norm(c, (1,)).to(dtype)
        self.norms_state = self.norms if c is None else norm(self._s, (1,)).to(dtype)
        self._steps, self._masks, self._reading, self._broken = steps, masks, reading, broken
        self._reverse, self._batched = reverse, batched

    def __repr__(self) -> str:
        return f"<GradientFlow of {self.summary()}>"

    @cached_property
    def singular_values(self) -> Tensor:
        """[T-1, B, S], descending: of the Jacobian ds_k/ds_{k-1} of the state s = h (S = H), for the LSTM
        (h, c) (S = 2 * H; with proj_size P + H), k = 1 .. T-1; [T-1, S] unbatched. In the reverse direction
        of ds_{k-1}/ds_k: entry k-1 is the step between k-1 and k either way.

        The Jacobians are made in closed form from the gates at the first access, which takes the time of
        (T-1) * B singular value decompositions. NaN past a sequence's end and where a Jacobian is not
        finite, 0 at a reset.
        """
        active, linked, begins = (m[1:].flatten() for m in self._masks)
        T, B = self._masks.linked.shape
        rows = linked.nonzero().squeeze(1)
        values = self.norms.new_full((linked.numel(), self._steps.size), math.nan)
        values[active & ~linked & ~begins] = 0
        values[rows] = self._decomposed(rows + B)
        values = values.unflatten(0, (T - 1, B))
        values = values.flip(0) if self._reverse else values
        result: Tensor = values if self._batched else values.squeeze(1)
        return result

    def _decomposed(self, rows: Tensor) -> Tensor:
        """The singular values [n, S] of the Jacobians of rows [n] among all T*B, some of them at a time."""
        parts = [self.norms.new_empty(0, self._steps.size)]
        at_once = max(1, _AT_ONCE // self._steps.size**2)
        with torch.no_grad(), torch.autocast(self.norms.device.type, enabled=False):
            for some in rows.split(at_once) if rows.numel() else ():
                J = self._steps.jacobian(some)
                finite = J.isfinite().all(-1).all(-1)  # LAPACK refuses all for one
                values = torch.linalg.svdvals(torch.where(finite[:, None, None], J, J.new_zeros(())))
                values[~finite] = math.nan
                parts.append(values)
        return torch.cat(parts)

    def _spectrum(self) -> tuple[Tensor, int]:
        """Singular values [n, S] to draw, evenly out of all, and of how many."""
        linked = self._masks.linked[1:].flatten()
        rows, known = linked.nonzero().squeeze(1), "singular_values" in self.__dict__
        # quantile takes no more than 2^24 elements.
        most = (1 << 24) // self._steps.size if known else 16 + int(_DRAWN_WORK / self._steps.size**3)
        most = min(most if known else min(most, _DRAWN), rows.numel())
        some = rows[torch.linspace(0, max(0, rows.numel() - 1), most).round().long().to(rows.device)]
        if known:
            values = self.singular_values.flip(0) if self._reverse else self.singular_values
            values = values.reshape(linked.numel(), self._steps.size)[some]  # of no links either
        else:
            values = self._decomposed(some + self._masks.linked.shape[1])
        return values[~values.isnan().any(-1)], rows.numel()

    @property
    def origin(self) -> tuple[int, bool]:
        begin, later = self._reading.begin.tolist(), self._reading.later
        return (min(begin, default=0) if later else max(begin, default=0)), later

    @cached_property
    def _lags(self) -> tuple[Tensor, Tensor]:
        """Of lag n in sequence b: its step, and whether there is one, [T, B]."""
        lags = torch.arange(self.norms.numel(), device=self.norms.device)[:, None]
        step = self._reading.begin + (lags if self._reading.later else -lags)
        return step.clamp(0, lags.numel() - 1), (step >= 0) & (step < self._masks.active.sum(0))

    def _by_lag(self, norms: Tensor) -> Tensor:
        """[lags] over the batch, from norms [T, B]. A sequence that ends takes its share of the norm along,
        which would look like a fall: what the others have at its last lag is scaled up to the whole."""
        step, there = self._lags
        values = torch.where(there, norms.gather(0, step), 0.0)
        whole, staying = norm(values, (1,)), norm(torch.where(there[1:], values[:-1], 0.0), (1,))
        share = whole[:-1] / staying
        share = torch.where(share.isfinite() & (staying > 0), share, 1.0)
        whole[1:] *= share.cumprod(0)
        return whole[: int(there.any(1).sum())].cpu()

    @cached_property
    def _trend(self) -> Trend:
        values = self._by_lag(self._s)
        finite = values.isfinite()
        seen = finite & (values >= torch.finfo(self.norms.dtype).tiny)
        lags = seen.nonzero().squeeze(1)
        overflow = None if bool(finite.all()) else int((~finite).nonzero()[0])
        if overflow is not None and (self._broken is not None or not self._reading.finite):
            return Trend("nan", math.nan, 0, 0, overflow=overflow)
        if not lags.numel():
            return Trend("none" if overflow is None else "explode", math.nan, 0, 0, overflow=overflow)
        start, end, last = int(lags[0]), int(lags[-1]), values.numel() - 1
        steps = end - start
        if self._reading.steps > 1:
            return Trend("mixed", math.nan, start, steps, overflow=overflow)
        zero = end + 1 if end < last else None
        if not steps:
            verdict = "explode" if overflow is not None else "start" if self._only_begins(start) else "vanish"
            return Trend(verdict, math.nan, start, 0, zero, overflow)
        slope = math.log(float(values[end]) / float(values[start])) / steps
        change = abs(slope) * steps
        moves = change > math.log(2.0) and (abs(slope) > _RATE or change > _CHANGE)
        verdict = "steady" if not moves else "vanish" if slope < 0 else "explode"
        if overflow is not None:
            verdict = "explode"
        return Trend(verdict, math.exp(slope), start, steps, zero, overflow)

    def _only_begins(self, lag: int) -> bool:
        """Whether the gradients of this lag are by the states with which the direction begins."""
        step, there = (t[lag] for t in self._lags)
        begins = self._masks.active.sum(0) - 1 if self._reverse else 0
        arrives = there & (self._s.gather(0, step[None])[0] > 0)
        return bool(((step == begins) | ~arrives).all())

    @property
    def rate(self) -> float:
        return self._trend.rate

    @property
    def verdict(self) -> str:
        return self._trend.verdict

    def summary(self) -> str:
        """One sentence: whether gradients vanish or explode, at what rate a step, over what horizon."""
        return f"{self.name}: {self._sentence()}."

    def _sentence(self) -> str:
        verdict, rate, start, steps, zero, overflow = self._trend
        T = self.norms.numel()
        if verdict == "nan":
            if self._broken is None:
                return "the loss's gradient by the layer's output is not finite, before any step back"
            return (
                f"the forward pass itself is not finite, from step {self._broken:,} on: look at the input, "
                "the states and the weights, not at the gradients"
            )
        if verdict == "none":
            return "no gradient of the loss arrives at any step"
        if verdict == "mixed":
            return (
                f"the loss reads {self._reading.steps:,} steps; gradients begin at each of them and add up, "
                "so that no rate can be told: let loss= read one step, the last say"
            )
        if verdict == "start":
            if T == 1:
                return "a single step, from which no gradient flows back"
            return "the loss reads this direction only at the step with which it begins, nothing flows back"
        state = "||dL/dh||" if self._c is None else "||dL/d(h, c)||"
        if overflow is not None and not rate > 1:
            return f"gradients explode: {state} is not finite from {_back(overflow)} on"
        if math.isnan(rate):
            return f"gradients vanish at once: {state} is 0 from {_back(start + 1)} on"
        values = self._by_lag(self._s)
        first, last = float(values[start]), float(values[start + steps])
        over = f"a step on average over {_count(steps, 'step')}, to {last / first:.3g} times its size"
        if verdict == "steady":
            return f"gradients are steady: {state} changes by {100 * (rate - 1):+.2g} % {over}"
        if verdict == "explode":
            grows = f"{rate:.3g}-fold" if rate >= 2 else f"by {100 * (rate - 1):.3g} %"
            text = f"gradients explode: {state} grows {grows} {over}"
            if rate < 5:
                text += f" (tenfold every {_count(round(math.log(10) / math.log(rate)), 'step')})"
            return text if overflow is None else f"{text}, and is not finite from {_back(overflow)} on"
        text = f"gradients vanish: {state} falls by {100 * (1 - rate):.3g} % {over}"
        text += f" (a tenth {self._falls_to(values, 0.1)}, a thousandth {self._falls_to(values, 1e-3)})"
        if zero is None:
            return text
        dtype = self.norms.dtype
        small = last * rate < 1e3 * torch.finfo(dtype).tiny
        gone = f"too small for {str(dtype).removeprefix('torch.')}" if small else "0"
        return f"{text}, and is {gone} from {_back(zero)} on"

    def _falls_to(self, values: Tensor, share: float) -> str:
        """When the norms are at a share of what they start with; beyond what was seen, at the mean rate."""
        start, steps = self._trend.start, self._trend.steps
        below = (values[start:] <= share * values[start]).nonzero()
        if below.numel():
            return f"after {int(below[0]):,}"
        more = math.log(float(values[start + steps]) / (share * float(values[start]))) / -math.log(self.rate)
        return f"after {steps + max(1, round(more)):,} at that rate"

    def plot(self, path: str | Path) -> None:
        """Draws the norms by lag, on a logarithmic scale with the mean rate, beside the Jacobians'
        spectrum: the median, the middle 80 % and the range of each singular value over steps and batch.

        path  a file, whose suffix names the format (.png, .svg, .pdf; PNG without one); its folder is made

        Of many Jacobians, or of large ones, only some are taken, evenly chosen, unless singular_values was
        read before; the picture says of how many. `diagnostics.plot` draws several flows.
        Raises ImportError where matplotlib is missing, OSError where the file cannot be written, ValueError
        for a suffix that names no format.
        """
        draw([self], path)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _back(lag: int) -> str:
    return f"{_count(lag, 'step')} back"


def draw(flows: Sequence[GradientFlow], path: str | Path) -> None:
    """A row for each flow, see `GradientFlow.plot`."""
    try:
        figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(MISSING) from error
    if not flows:
        raise ValueError("there is no flow to draw")
    figure = figure_class(figsize=(11, 3.9 * len(flows)), layout="constrained")
    kind, kinds = Path(path).suffix[1:] or "png", figure.canvas.get_supported_filetypes()
    if kind.lower() not in kinds:
        raise ValueError(f"path must end in one of {', '.join(f'.{k}' for k in sorted(kinds))}, got {path}")
    parts = figure.subfigures(len(flows), 1, squeeze=False)[:, 0]
    for flow, part in zip(flows, parts, strict=True):
        left, right = part.subplots(1, 2, width_ratios=(3, 2))
        part.suptitle(textwrap.fill(flow.summary(), 140), fontsize=11, x=0.01, ha="left")
        _draw_norms(left, flow)
        _draw_spectrum(right, flow)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=kind, dpi=120)


def _draw_norms(axes: Any, flow: GradientFlow) -> None:
    trend = flow._trend
    axes.set(ylabel="norm of the gradient")
    if trend.steps == 0:
        told = "nothing flows back" if trend.verdict in ("none", "start") else "no two lags have a gradient"
        axes.text(0.5, 0.5, told, transform=axes.transAxes, ha="center", color="0.35")
        axes.set(xticks=[], yticks=[])
        return
    whole = flow._by_lag(flow._s)
    curves = [("h", flow._h, "C0", 1.5)]
    if flow._c is not None:  # the whole lies on the larger of the two: broad, below them
        curves = [("(h, c)", flow._s, "0.8", 6.0), *curves, ("c", flow._c, "C1", 1.5)]
    for name, norms, color, width in curves:
        values = flow._by_lag(norms)
        lags = (values.isfinite() & (values > 0)).nonzero().squeeze(1)
        style = {"marker": "."} if lags.numel() < 30 else {}
        label = f"$\\|\\partial L/\\partial {name}_k\\|$"
        axes.plot(lags, values[lags], color=color, linewidth=width, label=label, **style)
    if not math.isnan(trend.rate):
        ends = [trend.start, trend.start + trend.steps]
        label = f"mean: {trend.rate:.3g} a step"
        axes.plot(ends, whole[ends], color="0.35", linestyle="--", linewidth=1, label=label)
    axes.set_yscale("log")
    _decades(axes)
    step, later = flow.origin
    there = flow._lags[1][0]
    one = bool((flow._reading.begin[there] == step).all())
    read = f"step {step:,}" if one else "the one the loss reads, each sequence's own"
    axes.set(xlabel=f"lag: steps {'after' if later else 'before'} {read}")
    axes.set_xlim(0, max(1, whole.numel() - 1))
    axes.grid(alpha=0.3)
    axes.legend()


def _decades(axes: Any) -> None:
    """At least two decades, so that a steady curve is not blown up into a rugged one."""
    low, high = axes.get_ylim()
    if high / low < 100:
        middle = math.sqrt(low * high)
        axes.set_ylim(middle / 10, middle * 10)


def _draw_spectrum(axes: Any, flow: GradientFlow) -> None:
    values, total = flow._spectrum()
    title = "singular values of the step's Jacobian"
    if values.shape[0] < total:
        title += f"\n{values.shape[0]:,} of {total:,} steps and sequences"
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="index, the largest first", ylabel="singular value")
    axes.axhline(1.0, color="0.35", linestyle="--", linewidth=1, label="1: length is kept")
    if values.numel():
        shares = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.double)
        low, tenth, middle, most, high = values.double().cpu().quantile(shares, dim=0)
        index = range(1, values.shape[1] + 1)
        axes.fill_between(index, low, high, color="C2", alpha=0.15, linewidth=0, label="all")
        axes.fill_between(index, tenth, most, color="C2", alpha=0.35, linewidth=0, label="middle 80 %")
        axes.plot(index, middle, color="C2", label="median")
        axes.set_ylim(0, 1.08 * max(1.0, float(high.max())))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)

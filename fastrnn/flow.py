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

MISSING = "matplotlib is not installed: pip install fastrnn[lm]"
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


class Origin(NamedTuple):
    """Where the loss begins: lag n is n input steps before `step`, or after it where `later`."""

    step: int
    later: bool


class Trend(NamedTuple):
    """What the norms do, by lag."""

    verdict: str  # vanish, explode, steady, none (no gradient arrives), start (only where the run begins)
    rate: float  # factor a step, fitted
    level: float  # logarithm of the norm at lag 0, fitted
    start: int  # the first lag with a gradient
    steps: int  # how many steps the fit spans
    zero: int | None  # the first lag after those of the fit, where the gradient is 0 or as good as 0
    overflow: int | None  # the first lag where it is not finite


class GradientFlow:
    """The gradient of a loss L by the states of one direction of one layer. Index k is the input's step, in
    the reverse direction too; tensors lie on the layer's device, in its dtype (float32 for 16-bit layers).

    name             "LSTM", "GRU layer 1, reverse" ...
    norms            [T] ||dL/dh_k||, Frobenius over the batch, by all paths from h_k, of the layers above too
    norms_c          [T] ||dL/dc_k|| of the LSTM likewise, h_k = o * tanh(c_k) among the paths; else None
    singular_values  [T-1, B, S], see there
    origin           (step, later): the lag 0 of summary and plot, from which lags go back to step 0, or on to
                     step T-1 where `later`. It is the last step, in the direction's own order, that the loss
                     reads of the output's half; where that is none or the very step with which the direction
                     begins, as in reverse by the last step's output, it is the other direction's
    rate             factor by which norms change a step back in time: exp of the slope of a line fitted to
                     their logarithms over all steps that have a gradient (below the dtype's smallest normal
                     number it counts as none); NaN where there are not two
    verdict          "vanish", "explode", "steady" (less than 1 % a step and tenfold in all, or not twofold
                     in all), "none" where no gradient arrives, "start" where one does only at the step with
                     which the direction begins, as in the reverse direction by the last step's output
    """

    def __init__(
        self,
        name: str,
        norms: Tensor,
        norms_c: Tensor | None,
        steps: Steps,
        masks: Masks,
        origin: Origin,
        reverse: bool,
        batched: bool,
    ) -> None:
        self.name = name
        self.norms = norms
        self.norms_c = norms_c
        self.origin = origin
        self._steps, self._masks = steps, masks
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
            values = self.singular_values
            values = (values.flip(0) if self._reverse else values).reshape(linked.numel(), -1)[some]
        else:
            values = self._decomposed(some + self._masks.linked.shape[1])
        return values[~values.isnan().any(-1)], rows.numel()

    def _by_lag(self, norms: Tensor) -> Tensor:
        step, later = self.origin
        return (norms[step:] if later else norms[: step + 1].flip(0)).double().cpu()

    @cached_property
    def _trend(self) -> Trend:
        values = self._by_lag(self.norms)
        finite = values.isfinite()
        seen = finite & (values >= torch.finfo(self.norms.dtype).tiny)
        lags = seen.nonzero().squeeze(1)
        overflow = None if bool(finite.all()) else int((~finite).nonzero()[0])
        if not lags.numel():
            return Trend("none" if overflow is None else "explode", math.nan, math.nan, 0, 0, None, overflow)
        start, end, last = int(lags[0]), int(lags[-1]), values.numel() - 1
        zero = end + 1 if end < last and overflow is None else None
        steps = end - start
        if lags.numel() < 2:
            own = self.origin.step + (start if self.origin.later else -start)
            first = own == (self.norms.numel() - 1 if self._reverse else 0)
            verdict = "explode" if overflow is not None else "start" if first else "vanish"
            return Trend(verdict, math.nan, math.nan, start, 0, zero, overflow)
        log, middle = values[lags].log(), float(lags.double().mean())
        t = lags.double() - middle
        slope = float((t * log).sum() / (t * t).sum())
        change = abs(slope) * steps
        moves = change > math.log(2.0) and (abs(slope) > _RATE or change > _CHANGE)
        verdict = "steady" if not moves else "vanish" if slope < 0 else "explode"
        if overflow is not None:
            verdict = "explode"
        level = float(log.mean()) - slope * middle
        return Trend(verdict, math.exp(slope), level, start, steps, zero, overflow)

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
        verdict, rate, _, start, steps, zero, overflow = self._trend
        T = self.norms.numel()
        if verdict == "none":
            return "no gradient of the loss arrives at any step"
        if verdict == "start":
            if T == 1:
                return "a single step, from which no gradient flows back"
            return "the loss reads this direction only at the step with which it begins, nothing flows back"
        if overflow is not None and not rate > 1:
            return f"gradients explode: ||dL/dh|| is not finite from {_back(overflow)} on"
        if math.isnan(rate):
            return f"gradients vanish at once: ||dL/dh|| is 0 from {_back(start + 1)} on"
        values = self._by_lag(self.norms)[start:]
        ratio = float(values[steps] / values[0])
        over = f"over {_count(steps, 'step')}"
        if verdict == "steady":
            change = f"{100 * (rate - 1):+.2g} % a step"
            return f"gradients are steady: ||dL/dh|| changes by {change} {over}, to {_times(ratio)} its size"
        if verdict == "explode":
            text = "gradients explode: ||dL/dh|| grows "
            text += f"{rate:.3g}-fold" if rate >= 2 else f"by {100 * (rate - 1):.3g} %"
            text += f" a step {over}, to {_times(ratio)} its size"
            if rate < 5:
                text += f" (tenfold every {_count(round(math.log(10) / math.log(rate)), 'step')})"
            return text if overflow is None else f"{text}, and is not finite from {_back(overflow)} on"
        text = f"gradients vanish: ||dL/dh|| falls by {100 * (1 - rate):.3g} % a step {over}, to "
        text += f"{self._falls_to(values, 0.1, 'a tenth')} and {self._falls_to(values, 1e-3, 'a thousandth')}"
        if zero is None:
            return text
        gone = "0" if float(self._by_lag(self.norms)[zero]) == 0 else "below the smallest normal number"
        return f"{text}, and is {gone} from {_back(zero)} on"

    def _falls_to(self, values: Tensor, share: float, word: str) -> str:
        """When the norms are at a share of what they start with; beyond what was seen, at the rate fitted."""
        below = (values <= share * values[0]).nonzero()
        if below.numel():
            return f"{word} after {int(below[0]):,}"
        steps = self._trend.steps
        more = math.log(float(values[steps]) / (share * float(values[0]))) / -math.log(self.rate)
        return f"{word} after {steps + max(1, round(more)):,} at that rate"

    def plot(self, path: str | Path) -> None:
        """Draws the norms by lag, on a logarithmic scale with the fitted rate, beside the Jacobians'
        spectrum: the median, the middle 80 % and the range of each singular value over steps and batch.

        path  a file, whose suffix names the format (.png, .svg, .pdf; PNG without one)

        Of many Jacobians, or of large ones, only some are taken, evenly chosen, unless singular_values was
        read before; the picture says of how many. `diagnostics.plot` draws several flows.
        Raises ImportError where matplotlib is missing, OSError where the file cannot be written.
        """
        draw([self], path)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _back(lag: int) -> str:
    return f"{_count(lag, 'step')} back"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times"


def draw(flows: Sequence[GradientFlow], path: str | Path) -> None:
    """A row for each flow, see `GradientFlow.plot`."""
    try:
        figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(MISSING) from error
    if not flows:
        raise ValueError("there is no flow to draw")
    figure = figure_class(figsize=(11, 3.9 * len(flows)), layout="constrained")
    parts = figure.subfigures(len(flows), 1, squeeze=False)[:, 0]
    for flow, part in zip(flows, parts, strict=True):
        left, right = part.subplots(1, 2, width_ratios=(3, 2))
        part.suptitle(textwrap.fill(flow.summary(), 140), fontsize=11, x=0.01, ha="left")
        _draw_norms(left, flow)
        _draw_spectrum(right, flow)
    figure.savefig(path, format=Path(path).suffix[1:] or "png", dpi=120)


def _draw_norms(axes: Any, flow: GradientFlow) -> None:
    trend = flow._trend
    for norms, name, color in ((flow.norms, "h", "C0"), (flow.norms_c, "c", "C1")):
        if norms is not None:
            values = flow._by_lag(norms)
            lags = (values.isfinite() & (values > 0)).nonzero().squeeze(1)
            style = {"marker": "."} if lags.numel() < 30 else {}
            axes.plot(
                lags, values[lags], color=color, label=f"$\\|\\partial L/\\partial {name}_k\\|$", **style
            )
    if not math.isnan(trend.rate):
        ends = (trend.start, trend.start + trend.steps)
        line = [math.exp(max(-690.0, min(690.0, trend.level + math.log(trend.rate) * lag))) for lag in ends]
        label = f"fit: {trend.rate:.3g} a step"
        axes.plot(ends, line, color="0.35", linestyle="--", linewidth=1, label=label)
    axes.set_yscale("log")
    _decades(axes)
    axes.set(
        xlabel=f"lag: steps {'after' if flow.origin.later else 'before'} step {flow.origin.step:,}",
        ylabel="norm of the gradient",
    )
    axes.set_xlim(0, max(1, flow._by_lag(flow.norms).numel() - 1))
    axes.grid(alpha=0.3)
    if axes.lines:
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

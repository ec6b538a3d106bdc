"""A tqdm bar on a terminal; plain lines in a log, or where tqdm is not installed."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows loss and tokens/s of a run of `total` steps on stderr. total=None: unknown."""

    def __init__(self, total: int | None, start: int = 0, silent: bool = False) -> None:
        self._silent = silent
        self._total = total
        self._step = start
        self._printed = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and not silent:
            try:
                tqdm = importlib.import_module("tqdm").tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def update(self, text: str, steps: int = 1) -> None:
        """So many steps more; text says how they went."""
        self._step += steps
        if self._silent:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(steps)
            return
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES or self._step == self._total:
            self._printed = now
            of = "" if self._total is None else f"/{self._total}"
            print(f"step {self._step}{of}  {text}", file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """A line on stdout that does not break the bar."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

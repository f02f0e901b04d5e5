"""How far long work got: one line on a terminal that rewrites itself, nothing in a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import click

from thinpool.wording import iec

SECONDS_BETWEEN = 0.2


class WorkProgress:
    """Use it in `with`; `show(done_bytes, total_bytes)` may be called often."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._started = self._last = time.monotonic()
        self._line = False

    def __enter__(self) -> WorkProgress:
        return self

    def show(self, done: int, total: int | None) -> None:
        """Say how far it is; the total may be an upper bound, or not be known."""
        now = time.monotonic()
        if not self._shown or now - self._last < SECONDS_BETWEEN:
            return
        self._last = now
        rate = done / max(now - self._started, 0.001)
        share = "" if total is None else f"{100 * done // total if total else 100:3d} %, "
        click.echo(f"\r{self._what}: {share}{iec(done)}, {iec(int(rate))}/s\x1b[K", err=True, nl=False)
        self._line = True

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line:
            click.echo("\r\x1b[K", err=True, nl=False)

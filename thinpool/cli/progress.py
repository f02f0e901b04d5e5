"""How far a transfer got: a moving line on a terminal, nothing in a pipe.

In: the look, on standard error. Out: what is counted (`sending.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any


class TransferProgress:
    """A context in which a transfer runs. `total_bytes` None where nobody knows how much it will be."""

    def __init__(self, title: str, total_bytes: int | None) -> None:
        self._title = title
        self._total = total_bytes
        self._bar: Any = None
        self._task: Any = None
        self._done = 0

    @staticmethod
    def wanted() -> bool:
        """Whether a person is looking."""
        return sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> TransferProgress:
        if self.wanted():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
            from rich.text import Text

            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(binary_units=True),
            ]
            self._bar = Progress(
                *columns, TransferSpeedColumn(), console=Console(stderr=True), transient=True
            )
            self._bar.start()
            self._task = self._bar.add_task(Text(self._title).plain, total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, data_bytes: int, _: int) -> None:
        """So much of the device is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=data_bytes)

    def counting(self, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
        """The same reader; what it reads is progress."""
        if self._bar is None:
            return read

        def counted(count: int) -> bytes:
            piece = read(count)
            self._done += len(piece)
            self._bar.update(self._task, completed=self._done)
            return piece

        return counted

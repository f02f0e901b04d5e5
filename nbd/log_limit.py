"""A bound on log lines: clients decide how often something goes wrong, so they must not decide how much is logged.

Nor how it looks: names come from clients, so whatever is not printable is escaped.
"""

import threading
from collections.abc import Callable
from time import monotonic

_LINES_MAX = 20
_WINDOW_SECONDS = 10.0


class LogLimit:
    """Passes on at most 20 lines in ten seconds and says how many it left out."""

    def __init__(self, log: Callable[[str], None], clock: Callable[[], float] = monotonic) -> None:
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._window = clock()
        self._lines = 0

    def __call__(self, text: str) -> None:
        """Log a line, or count it as left out."""
        with self._lock:
            now = self._clock()
            left_out = 0
            if now - self._window >= _WINDOW_SECONDS:
                left_out = max(0, self._lines - _LINES_MAX)
                self._window, self._lines = now, 0
            self._lines += 1
            if self._lines > _LINES_MAX:
                return
        if left_out:
            self._log(f"{left_out} more lines about clients were left out")
        self._log(_printable(text))


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )

"""How fast something fills up: a few samples of the recent past, and how long it lasts at that rate.

In: samples and arithmetic. Out: when samples are taken (`space_watch.py`).
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

WINDOW_SECONDS = 600.0
SPAN_SECONDS_MIN = 10.0
SPACING_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Growth of what is used, in bytes a second (negative where it shrinks), and seconds until it is full at that rate.

    `rate` is None where it has not been measured for long enough, `full_in` where it is not growing either.
    """

    rate: float | None = None
    full_in: float | None = None


class UsageHistory:
    """Bytes used at times of the monotonic clock. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, used_bytes: int) -> None:
        """Remember a sample; the last one before the window is kept as its beginning."""
        with self._lock:
            samples = self._samples
            if len(samples) > 1 and now - samples[-2][0] < SPACING_SECONDS:
                samples.pop()
            samples.append((now, used_bytes))
            while len(samples) > 2 and samples[1][0] <= now - WINDOW_SECONDS:
                samples.popleft()

    def forecast(self, now: float, used_bytes: int, size_bytes: int) -> Forecast:
        """The rate over the window up to now, and what it means."""
        with self._lock:
            if not self._samples:
                return Forecast()
            began, before = self._samples[0]
            if len(self._samples) > 1 and began < now - WINDOW_SECONDS:
                # Between two samples nothing was committed: at the window's beginning it was as before the second.
                began = now - WINDOW_SECONDS
        if now - began < SPAN_SECONDS_MIN:
            return Forecast()
        rate = (used_bytes - before) / (now - began)
        return Forecast(rate, (size_bytes - used_bytes) / rate if rate > 0 else None)

"""Watching how full a served pool is: rates, low-water marks, growth by itself, events for the operator.

In: a thread that looks after commits which took or freed something, at most once a second, and does what the settings
say. Out: the marks (`low_water.py`), the arithmetic of rates (`usage_history.py`), running a command
(`event_command.py`), growing (`pool.py`). A pool in which nothing changes wakes nobody.

Nothing of the data path waits for this thread. A pool that fills faster than it looks is grown by the first write that
finds no space (`Engine.make_space`), so a limit above the present size means that no write is refused before it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .description import METADATA_BLOCK_BYTES, mode_of
from .event_command import start_event_command
from .low_water import LowWaterMark
from .usage_history import Forecast, UsageHistory
from .wording import iec

if TYPE_CHECKING:
    from .pool import Pool

LOOK_SECONDS = 1.0
STEPS_MAX = 100

log = logging.getLogger("thinpool")


@dataclass(slots=True)
class _Level:
    """The data or the metadata: how full, and what has been told of it."""

    name: str
    measure: Callable[[], tuple[int, int]]  # used and size, bytes
    percent: Callable[[], int]
    history: UsageHistory = field(default_factory=UsageHistory)
    low: LowWaterMark = field(default_factory=LowWaterMark)
    full: LowWaterMark = field(default_factory=LowWaterMark)


class SpaceWatch:
    """The watch of one pool. `look` may be called without the thread, by tests."""

    def __init__(self, pool: Pool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._data = _Level("data", self._measure_data, lambda: pool.settings.data_low_water)
        self._metadata = _Level("metadata", self._measure_metadata, lambda: pool.settings.metadata_low_water)
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="space", daemon=True)

    def start(self) -> None:
        """Begin: look at once, then after every commit that changed something."""
        self._pool.watch = self
        self._pool.engine.level_changed = self._changed.set
        self._changed.set()
        self._thread.start()

    def close(self) -> None:
        """End. A command that is running goes on."""
        self._pool.engine.level_changed = lambda: None
        self._pool.watch = None
        self._stopping.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._changed.wait()
            if self._stopping.is_set():
                return
            self._changed.clear()
            try:
                self.look()
            except Exception:  # watching must not end because of one look
                log.exception("watching the space of the pool failed")
            if self._stopping.wait(LOOK_SECONDS):
                return

    def _measure_data(self) -> tuple[int, int]:
        metadata, unit = self._pool.engine.metadata, self._pool.block_bytes
        with self._pool.engine.tree:
            return metadata.data_blocks_allocated * unit, metadata.data_blocks * unit

    def _measure_metadata(self) -> tuple[int, int]:
        metadata, unit = self._pool.engine.metadata, METADATA_BLOCK_BYTES
        with self._pool.engine.tree:
            return metadata.metadata_blocks_allocated * unit, metadata.metadata_blocks * unit

    def forecasts(self) -> tuple[Forecast, Forecast]:
        """How long data and metadata last at the present rate."""
        now = self._clock()
        data, metadata = (level.history.forecast(now, *level.measure()) for level in self._levels())
        return data, metadata

    def _levels(self) -> tuple[_Level, _Level]:
        return self._data, self._metadata

    def look(self) -> None:
        """Take a sample of both levels and do what is to be done."""
        for level in self._levels():
            used, size = level.measure()
            level.history.add(self._clock(), used)
            for _ in range(STEPS_MAX):
                if not level.low.reached(used, size, level.percent()):
                    break
                if not self._pool.growth.by_itself(
                    data=level is self._data, metadata=level is self._metadata
                ):
                    break
                used, size = level.measure()
            if level.low.crossed(used, size, level.percent()):
                self._tell(level, "low", used, size)
            # The last metadata blocks are kept for commits and deletions.
            if level is self._metadata and self._pool.engine.metadata_is_small:
                used = size
            set_aside = self._set_aside(used, size) if level is self._data else 0
            if level.full.crossed(min(used + set_aside, size), size, 100):
                self._tell(level, "full", used, size, set_aside)

    def _set_aside(self, used: int, size: int) -> int:
        """Bytes that only devices with a reservation may take; where nothing else is left, as counted just now."""
        engine, unit = self._pool.engine, self._pool.block_bytes
        if not engine.free.promised or used + engine.free.promised * unit < size:
            return engine.free.promised * unit
        # From here on everybody else is refused, so it is the time to grow and to be exact.
        with engine.transaction:
            engine.reservations.measure(at_once=True)
            if used + engine.free.promised * unit >= size and self._pool.growth.by_itself(
                data=True, metadata=False
            ):
                return 0
            return engine.free.promised * unit

    def _tell(self, level: _Level, what: str, used: int, size: int, set_aside: int = 0) -> None:
        percent = 100 * used / size if size else 100.0
        log.warning(
            "the %s of the pool is %.1f %% full: %s of %s used, %s free%s",
            level.name,
            percent,
            iec(used),
            iec(size),
            iec(size - used),
            f", of which {iec(set_aside)} are set aside for devices with a reservation" if set_aside else "",
        )
        pool, settings = self._pool, self._pool.settings
        if not settings.event_command:
            return
        event, path = f"{level.name}-{what}", str(pool.location.absolute())
        environment = {
            "THINPOOL_EVENT": event,
            "THINPOOL_POOL": path,
            "THINPOOL_USED_BYTES": str(used),
            "THINPOOL_SIZE_BYTES": str(size),
            "THINPOOL_FREE_BYTES": str(size - used),
            "THINPOOL_PERCENT": f"{percent:.1f}",
            "THINPOOL_MODE": mode_of(pool),
        }
        start_event_command(
            settings.event_command, (event, path), environment, settings.event_timeout, log.warning
        )

"""Fetching all that is missing of a lazily pulled device: once to the end, or in the background of a server.

In: the order, the parallelism, checkpoints, patience with a store that is away. Out: single blocks (`lazy_device.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from .errors import StoreDamaged, ThinPoolError

if TYPE_CHECKING:
    from .lazy_device import LazyDevice

WINDOW_BYTES = 8 << 20  # about what lies in one pack
FETCHERS = 4
CHECKPOINT_SECONDS = 3.0
BACKGROUND_ATTEMPTS = 2  # it comes again anyway, and must not hold up the end of the server
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 1.0, 30.0

log = logging.getLogger("thinpool")


class StoppedError(Exception):
    """Somebody asked for the end."""


def hydrate(
    lazy: LazyDevice,
    stop: threading.Event,
    progress: Callable[[int, int], None] | None = None,
    *,
    attempts: int | None = None,
) -> None:
    """Fetch everything; `attempts` a request, where the usual number is not wanted.

    What was fetched is durable, and recorded, when this returns; also when it raises, unless the pool gave up.

    Raises StoppedError, the store's errors, OSError (ENOSPC when the pool is full), and what a commit raises.
    """
    reader = lazy.reader(attempts)
    total = lazy.remote_blocks * lazy.block_bytes
    try:
        with ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch") as threads:
            running: set[Future[None]] = set()
            try:
                last = time.monotonic()
                for begin, end in _windows(lazy):
                    if stop.is_set() or lazy.closed:
                        raise StoppedError
                    lazy.learn(begin, end, reader)
                    running.add(threads.submit(lazy.fetch, range(begin, end), reader, begin, end))
                    if len(running) > FETCHERS:
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                    if progress is not None:
                        progress(total - lazy.remote_blocks * lazy.block_bytes, total)
                    if time.monotonic() - last > CHECKPOINT_SECONDS:
                        lazy.checkpoint()
                        last = time.monotonic()
                for future in running:
                    future.result()
            finally:
                threads.shutdown(wait=True, cancel_futures=True)
    except BaseException:
        _record_what_there_is(lazy)
        raise
    if not lazy.closed:
        lazy.checkpoint()


def _record_what_there_is(lazy: LazyDevice) -> None:
    """After an error, which is the one to be told; what is not recorded is fetched again."""
    try:
        if not lazy.closed:
            lazy.checkpoint()
    except (ThinPoolError, OSError) as second:
        log.warning("what was fetched is not recorded: %s", second)


def _windows(lazy: LazyDevice) -> Iterator[tuple[int, int]]:
    """Ranges of blocks with something to fetch, in the order of the device."""
    step = max(1, WINDOW_BYTES // lazy.block_bytes)
    bits = lazy.remote.bits
    begin = bits.find(1)
    while begin >= 0:
        end = min(begin // step * step + step, len(bits))
        yield begin, end
        begin = bits.find(1, end)


class BackgroundHydration:
    """Hydrates one device in a thread until it is complete, however often the store goes away meanwhile."""

    def __init__(self, name: str, lazy: LazyDevice, complete: Callable[[], None]) -> None:
        self._name = name
        self._lazy = lazy
        self._complete = complete
        self._stop = threading.Event()
        self._wake = threading.Event()
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"hydrate {name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def request_stop(self) -> None:
        """Begin to end; returns at once."""
        self._stop.set()
        self._wake.set()

    def hurry(self) -> None:
        """Try again now: somebody waits, or knows that the store is back. What failed before is of the past."""
        self.failure = None
        self._wake.set()

    def stop(self) -> None:
        """End, after what is on its way has been recorded."""
        self.request_stop()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        pause = PAUSE_SECONDS
        while not self._stop.is_set() and not self._lazy.closed:
            before = self._lazy.remote_blocks
            try:
                hydrate(self._lazy, self._stop, attempts=BACKGROUND_ATTEMPTS)
                self._complete()
            except StoppedError:
                return
            except Exception as error:
                # Whoever waits for the device hears of it in `failure`, also of what nobody foresaw.
                if str(error) != str(self.failure):
                    foreseen = isinstance(error, ThinPoolError | OSError)
                    log.warning("fetching %r: %s", self._name, error, exc_info=None if foreseen else error)
                self.failure = error
            else:
                return
            patient = self._lazy.remote_blocks == before or isinstance(self.failure, StoreDamaged)
            pause = min(pause * 2, PAUSE_SECONDS_MAX) if patient else PAUSE_SECONDS
            self._wake.wait(pause)
            self._wake.clear()

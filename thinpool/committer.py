"""Group commit, and the commit that comes by itself.

Flushes that arrive while a commit runs share the next one: a ticket is the number of the first commit that
starts after the flush was asked for, and whoever finds no commit running carries it out for all that wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

COMMIT_SECONDS = 1.0
# A commit by itself also writes out all data before it. Where that takes long (many first writes to a slow disk), a
# commit a second would make every write wait for the disk; then they come rarer, up to the five seconds that file
# systems use. What a client asked to be durable is not touched by this.
COMMIT_SHARE = 10
COMMIT_SECONDS_MAX = 5.0


class Committer:
    """Runs `commit` for flushes and, after `touched` was set, by itself: after a second, or up to five under load."""

    def __init__(self, commit: Callable[[], None], reclaim: Callable[[], object]) -> None:
        self.touched = threading.Event()
        self._commit = commit
        self._reclaim = reclaim
        self._turn = threading.Condition()
        self._started = 0
        self._done = 0
        self._running = False
        self._failures: dict[int, Exception] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def touch(self) -> None:
        """Something changed that a commit must make durable soon."""
        if not self.touched.is_set():
            self.touched.set()

    def start(self) -> None:
        """Start the periodic commit."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._periodic, name="commit", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the periodic commit; flushes still work."""
        self._stopping.set()
        self.touched.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def flush(self) -> None:
        """Return when a commit that started after this call has ended. Raises what that commit raised."""
        with self._turn:
            ticket = self._started + 1
            while self._running and self._done < ticket:
                self._turn.wait()
            if self._done >= ticket:
                self._raise_failure(ticket)
                return
            self._running = True
            self._started += 1
            number = self._started
        failure: Exception | None = None
        try:
            self._commit()
        except Exception as error:
            failure = error
            raise
        finally:
            with self._turn:
                self._running = False
                self._done = number
                # Waiters look at once; a handful of numbers back is more than any of them can be late.
                self._failures = {n: e for n, e in self._failures.items() if n > number - 64}
                if failure is not None:
                    self._failures[number] = failure
                self._turn.notify_all()

    def _raise_failure(self, ticket: int) -> None:
        for number, failure in self._failures.items():
            if number >= ticket:
                raise failure

    def _periodic(self) -> None:
        pause = COMMIT_SECONDS
        while not self._stopping.is_set():
            self.touched.wait()
            if self._stopping.wait(pause):
                return
            self.touched.clear()
            began = time.monotonic()
            with suppress(Exception):  # the engine has poisoned the pool and logged why
                self.flush()
            took = time.monotonic() - began
            pause = min(max(COMMIT_SECONDS, took * COMMIT_SHARE), COMMIT_SECONDS_MAX)
            self._reclaim()

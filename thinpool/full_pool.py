"""What becomes of writes that find no space: whether they wait, for how long, and who wakes them.

In: the policy (dm-thin's two: queue with a time-out, or fail at once), the clock, the descriptors of sessions that
wait. Out: finding space (`engine`), the requests themselves and how they wait (`nbd/queued.py`).

Two things can be full. Where the *pool* has no free block, or no metadata to map one, every way of getting some tells
us: a commit that freed blocks, growth, a change of settings. The time-out runs from the moment the first write was
refused, as dm-thin's does, and once it has passed every later write fails at once until space comes back; then the
configured policy holds again. Where the *file system* under a sparse pool is full nobody tells us: waiting writes are
tried again every second, and it counts as full until it says it has room.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Literal

WhenFull = Literal["queue", "error"]
QUEUE_TIMEOUT_SECONDS = 60  # no_space_timeout of drivers/md/dm-thin.c
DISK_ROOM_BYTES_MIN = 1 << 20
NO_DATA = "no data block is free"
ALL_PROMISED = "every free data block is reserved for other devices"
NO_METADATA = "the metadata has no room for another mapping"
NO_JOURNAL = "the journal has no room for another mapping before a commit"


class NoFreeBlock(OSError):  # noqa: N818 -- says what happened, as the leaves of `errors.py` do
    """ENOSPC of the pool's own: no data block is free, or there is no room to map or to note one."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.ENOSPC, reason)


class FullPool:
    """The policy of one pool, and the sessions that wait. Thread-safe; takes no other lock.

    `disk_free_bytes` asks the file system under the data file.
    """

    def __init__(
        self,
        log: Callable[[str], None],
        disk_free_bytes: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.when_full: WhenFull = "queue"
        self.timeout_seconds = QUEUE_TIMEOUT_SECONDS
        self._log = log
        self._disk_free_bytes = disk_free_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._full_since: float | None = None
        self._disk_full_since: float | None = None
        self._told = False  # that the time-out has passed
        self._descriptors: set[int] = set()

    # --- what a refused write asks ---

    def may_wait(self, refused: OSError, since: float) -> bool:
        """Whether a write refused with ENOSPC waits; `since` is when it was refused first."""
        by_pool = isinstance(refused, NoFreeBlock)
        if not by_pool and self._disk_free_bytes() >= DISK_ROOM_BYTES_MIN:
            self._disk_full_since = (
                None  # another try may succeed; a quota that statvfs does not know ends it
            )
        with self._lock:
            if self.when_full == "error":
                return False
            now = self._clock()
            first = self._full_since if by_pool else self._disk_full_since
            if first is None:
                first = now
                self._tell_full(refused)
                if by_pool:
                    self._full_since = now
                else:
                    self._disk_full_since = now
            if not self.timeout_seconds or now - min(first, since) < self.timeout_seconds:
                return True
            if not self._told:
                self._told = True
                self._log(
                    f"no space for {self.timeout_seconds} s: writes that need a new block fail from now on"
                )
            return False

    def _tell_full(self, refused: OSError) -> None:
        self._told = False
        wait = f"wait up to {self.timeout_seconds} s" if self.timeout_seconds else "wait"
        self._log(f"{refused.strerror}: writes that need a new block {wait} for space")

    @property
    def refuses(self) -> bool:
        """Whether a write that needs a new block, and finds none, fails at once (dm-thin: error_if_no_space)."""
        with self._lock:
            if self.when_full == "error":
                return True
            since = self._full_since if self._full_since is not None else self._disk_full_since
            return bool(self.timeout_seconds and since is not None) and (
                self._clock() - (since or 0.0) >= self.timeout_seconds
            )

    # --- waking ---

    def configure(self, when_full: WhenFull, timeout_seconds: int) -> None:
        """Change the policy, also for writes that wait. `timeout_seconds` 0 lets them wait for ever."""
        with self._lock:
            self.when_full, self.timeout_seconds = when_full, timeout_seconds
        self.wake()

    def space_came(self) -> None:
        """The pool has free blocks, and metadata to map them, again; cheap where nobody waits."""
        if self._full_since is not None or self._descriptors:
            with self._lock:
                was_full, self._full_since = self._full_since is not None, None
            if was_full:
                self._log("there is space for new blocks again")
            self.wake()

    def wake(self) -> None:
        """Let every session that waits try again."""
        with self._lock:
            for descriptor in self._descriptors:
                os.eventfd_write(descriptor, 1)

    @property
    def waiting_sessions(self) -> int:
        """Connections with writes that wait."""
        return len(self._descriptors)

    def attach(self) -> int:
        """A descriptor that is readable after news, -1 where the process has no more descriptors."""
        try:
            descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            return -1
        with self._lock:
            self._descriptors.add(descriptor)
        return descriptor

    def detach(self, descriptor: int) -> None:
        """Close a descriptor of `attach`."""
        with self._lock:
            self._descriptors.discard(descriptor)
        os.close(descriptor)

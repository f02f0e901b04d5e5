"""Buffers for large write payloads, shared by all connections of a server and bounded in number.

A write of up to two MiB is received completely before it is applied. The memory for that is taken from here,
never allocated by a length that a client announced. Where all buffers are in use (say, by clients that
stopped in the middle of a payload) nobody waits: the write is applied in pieces as it arrives.
"""

import mmap
import threading

_IDLE_MAX = 4  # buffers kept for the next user; the last one returned is the warmest


class PayloadMemory:
    """A bounded stack of equal buffers."""

    def __init__(self, *, buffer_bytes: int, total_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._lock = threading.Lock()
        self._count_max = total_bytes // buffer_bytes
        self._in_use = 0
        self._idle: list[memoryview] = []

    @property
    def in_use(self) -> int:
        """Buffers taken now."""
        return self._in_use

    def take(self) -> memoryview | None:
        """Return a buffer, or None where all are in use."""
        with self._lock:
            if self._in_use >= self._count_max:
                return None
            self._in_use += 1
            if self._idle:
                return self._idle.pop()
        return memoryview(mmap.mmap(-1, self.buffer_bytes))

    def give_back(self, buffer: memoryview) -> None:
        """Return a buffer taken before."""
        with self._lock:
            self._in_use -= 1
            if len(self._idle) < _IDLE_MAX:
                self._idle.append(buffer)

"""Replies whose client does not read: moved out of the data file, so that nothing waits for that client.

The kernel copies the remaining buffers into an anonymous file (`writev` to a memfd: only the kernel may touch
a mapping of the data file, see `device.Session.read`), after which the blocks under them may be reused. All
parked bytes of a server are bounded; beyond the bound the client is disconnected.
"""

import os
import socket
import threading
from collections.abc import Sequence
from types import TracebackType

from .device import Buffer
from .errors import ConnectionEnded, ReplyBacklog

_IOV_MAX = 1024
_SEND_BYTES = 1 << 20


class Parking:
    """The account of parked bytes of one server."""

    def __init__(self, bytes_max: int) -> None:
        self._lock = threading.Lock()
        self._bytes_max = bytes_max
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """Bytes parked now."""
        return self._used

    def take(self, count: int) -> bool:
        """Reserve bytes, or return False where there are too many."""
        with self._lock:
            if self._used + count > self._bytes_max:
                return False
            self._used += count
            return True

    def give_back(self, count: int) -> None:
        """Return reserved bytes."""
        with self._lock:
            self._used -= count


class StalledReply:
    """The rest of a reply in an anonymous file; a context manager that frees it."""

    def __init__(self, parts: Sequence[Buffer], parking: Parking) -> None:
        self._bytes = sum(map(len, parts))
        self._parking = parking
        if not parking.take(self._bytes):
            raise ReplyBacklog
        self._file = -1
        try:
            self._file = os.memfd_create("nbd-stalled-reply", os.MFD_CLOEXEC)
            self._fill(list(parts))
        except BaseException:
            self._release()
            raise

    def _fill(self, parts: list[Buffer]) -> None:
        for start in range(0, len(parts), _IOV_MAX):
            some = parts[start : start + _IOV_MAX]
            while some:
                count = os.writev(self._file, some)
                while some and count >= len(some[0]):
                    count -= len(some[0])
                    del some[0]
                if some and count:
                    some[0] = memoryview(some[0])[count:]

    def send(self, sock: socket.socket) -> None:
        """Send everything, however long the client takes; OSError where it vanished."""
        offset = 0
        while offset < self._bytes:
            try:
                count = os.sendfile(sock.fileno(), self._file, offset, min(_SEND_BYTES, self._bytes - offset))
            except BlockingIOError:
                continue  # SO_SNDTIMEO again; shutdown() of the socket ends the wait with an error
            if count == 0:
                raise ConnectionEnded
            offset += count

    def _release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._parking.give_back(self._bytes)

    def __enter__(self) -> "StalledReply":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

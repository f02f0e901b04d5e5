"""The byte stream under TLS. Data pass through user space, so the session hands out private copies (`Link.copies`)."""

import select
import ssl
from collections.abc import Callable, Sequence

from .activity import Activity
from .device import Buffer
from .limits import KIB
from .link import remainder


class TlsLink:
    """A TLS socket after its handshake; `release` lets go of what the session pinned, copies need no pin."""

    copies: bool = True
    fast_read_max: int = 256 * KIB

    def __init__(self, sock: ssl.SSLSocket, activity: Activity, release: Callable[[], None]) -> None:
        self._socket = sock
        self._activity = activity
        self._release = release
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(activity.wake_descriptor, select.POLLIN)
        self._wakes = True
        self.receive: Callable[[memoryview], int] = self._receive
        self.gather: Callable[[memoryview], int] = self._receive
        self.send_some: Callable[[list[Buffer]], int] = self._send_some
        activity.working.add(self)

    def close(self) -> None:
        """Take the connection out of the server's account; the socket is the caller's."""
        self._activity.working.discard(self)

    def _receive(self, target: memoryview) -> int:
        if not self._socket.pending():
            self._sleep()
        return self._socket.recv_into(target)

    def _sleep(self) -> None:
        """Wait for the socket alone or for the server's wake-up, which is noticed once."""
        working = self._activity.working
        working.discard(self)
        while True:
            ready = self._poll.poll()
            if self._wakes and self._activity.stopping:
                self._poll.unregister(self._activity.wake_descriptor)
                self._wakes = False
            if any(descriptor == self._socket.fileno() for descriptor, _ in ready):
                break
        working.add(self)

    def _send_some(self, parts: list[Buffer]) -> int:
        self._release()
        data = b"".join(parts)  # one record stream instead of a record per header
        self._socket.sendall(data)
        return len(data)

    def finish(self, parts: Sequence[Buffer], sent: int, release: Callable[[], None]) -> None:
        """Send the rest of `parts`; raises OSError."""
        release()
        rest = remainder(parts, sent)
        if rest:
            self._socket.sendall(b"".join(rest))

"""The byte stream under TLS. Data pass through user space, so the session hands out private copies (`Link.copies`).

A TLS record holds what the client sent in one piece, so a request and its payload come as two, and each takes a
receive of its own. Records that have arrived are received together as far as there is room: they make one batch
with one reply. The socket does not block, because a readable one may hold half a record, or one without data (a
change of keys): neither may keep what is here from being answered, or a stopping server from being noticed.
"""

import select
import socket
import ssl
from collections.abc import Callable, Sequence

from .activity import Activity
from .device import Buffer
from .limits import KIB
from .link import remainder
from .waiting import Waiting

_RECORD_BYTES_MAX = 16 * KIB  # RFC 8446, section 5.1
_NOT_READING_MS = 100  # pause where the client must take something in first


class TlsLink:
    """A TLS socket after its handshake; `release` lets go of what the session pinned, copies need no pin."""

    copies: bool = True
    direct: socket.socket | None = None
    fast_read_max: int = 256 * KIB

    def __init__(
        self,
        sock: ssl.SSLSocket,
        activity: Activity,
        release: Callable[[], None],
        *,
        spin_seconds: float,
    ) -> None:
        self._socket = sock
        self._release = release
        self._ended = False
        self._ahead = b""  # received by `arrived`
        self._waiting = Waiting(sock, activity, spin_seconds)
        self.token: object = self._waiting
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self.descriptor: int = sock.fileno()
        self.receive: Callable[[memoryview], int] = self._receive
        self.gather: Callable[[memoryview], int] = self._receive
        self.send_some: Callable[[list[Buffer]], int] = self._send_some
        sock.setblocking(False)

    def close(self) -> None:
        """Take the connection out of the server's account; the socket is the caller's."""
        self._waiting.close()

    def buffered(self) -> bool:
        """Whether decrypted bytes are waiting, or the end."""
        return self._ended or bool(self._ahead) or self._socket.pending() > 0

    def arrived(self) -> bool:
        """Receive what there is, which half a record or one without data is not."""
        if not self.buffered():
            try:
                self._ahead = self._socket.recv(_RECORD_BYTES_MAX)
                self._ended = not self._ahead
            except ssl.SSLWantReadError:
                return False
            except ssl.SSLWantWriteError:
                self._writable.poll(_NOT_READING_MS)
                return False
        return True

    def _receive(self, target: memoryview) -> int:
        if self._ahead:
            count = min(len(target), len(self._ahead))
            target[:count], self._ahead = self._ahead[:count], self._ahead[count:]
            return count
        if self._ended:
            return 0
        recv_into, pending, readable = self._socket.recv_into, self._socket.pending, self._waiting.readable
        if not pending():
            self._waiting.wait()
        count = 0
        while True:
            try:
                got = recv_into(target[count:])
            except ssl.SSLWantReadError:
                if count:
                    return count
                self._waiting.wait()
                continue
            except ssl.SSLWantWriteError:
                self._writable.poll()
                continue
            count += got
            if not got:
                # The client's farewell may come right behind data. TLS tells of it once; the socket stays silent.
                self._ended = True
                return count
            if len(target) - count < _RECORD_BYTES_MAX or not (pending() or readable()):
                return count

    def _send_some(self, parts: list[Buffer]) -> int:
        self._release()
        data = b"".join(parts)  # one record stream instead of a record per header
        self._send(data)
        return len(data)

    def _send(self, data: bytes) -> None:
        done, view = 0, memoryview(data)
        while done < len(data):
            try:
                done += self._socket.send(view[done:])
            except ssl.SSLWantWriteError:
                self._writable.poll()
            except ssl.SSLWantReadError:
                self._waiting.wait()

    def finish(self, parts: Sequence[Buffer], sent: int, release: Callable[[], None]) -> None:
        """Send the rest of `parts`; raises OSError."""
        release()
        rest = remainder(parts, sent)
        if rest:
            self._send(b"".join(rest))

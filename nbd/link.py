"""The byte stream under a connection in transmission: waiting, sending, and what can go wrong while sending.

In: `PlainLink` (a socket; sends file-mapping slices without copying) and the
`Link` protocol that it shares with `TlsLink` (in `tls_link`) and with the tests' in-memory stream. Out: what
the bytes mean.

A reply's buffers may be slices of the data file's mapping. While they wait for a client that does not read,
the blocks under them cannot be reused, so a send that makes no progress for some seconds is finished from a
private copy, made by the kernel (`stalled`); the client itself is left alone, it may be a suspended virtual
machine.
"""

import errno
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from .activity import Activity
from .device import Buffer
from .errors import SendFault
from .stalled import Parking, StalledReply
from .waiting import Waiting

IOV_MAX = 1024  # Linux UIO_MAXIOV


class Link(Protocol):
    """One direction each of a byte stream.

    `receive` blocks until there is something and returns 0 at the end of the stream; `gather` is the same for
    use after short replies and may wait some microseconds for more. `send_some` passes a list of at most
    IOV_MAX buffers on and returns how many bytes it took. `finish` sends what is left of a list after `sent`
    bytes; it calls `release` as soon as no buffer of the list is needed any longer. `fast_read_max` is the
    longest read whose data may be handed over in one list. `direct` is the socket, where the stream is nothing
    but that, so that the shared loop may use it; `token` then stands for the connection in `Activity.working`.
    `descriptor` becomes readable when there is something to receive (-1 where there always is), except for what
    `buffered` says is here already.
    """

    receive: Callable[[memoryview], int]
    gather: Callable[[memoryview], int]
    send_some: Callable[[list[Buffer]], int]
    fast_read_max: int
    copies: bool
    direct: socket.socket | None
    token: object
    descriptor: int

    def buffered(self) -> bool:
        """Whether `receive` has bytes to give that `descriptor` does not tell of."""

    def arrived(self) -> bool:
        """After `descriptor` was readable: whether `receive` would return at once now."""

    def finish(self, parts: Sequence[Buffer], sent: int, release: Callable[[], None]) -> None:
        """Send the rest; raises SendFault or OSError."""


class PlainLink:
    """A connected stream socket in blocking mode."""

    copies: bool = False

    def __init__(
        self,
        sock: socket.socket,
        activity: Activity,
        parking: Parking,
        *,
        spin_seconds: float,
        read_max: int,
    ) -> None:
        self._socket = sock
        self._parking = parking
        self._waiting = Waiting(sock, activity, spin_seconds)
        self.fast_read_max: int = read_max
        self.direct: socket.socket | None = sock
        self.token: object = self._waiting
        self.descriptor: int = sock.fileno()
        self.send_some: Callable[[list[Buffer]], int] = sock.sendmsg
        self.receive: Callable[[memoryview], int] = self._waiting.receiver()
        self.gather: Callable[[memoryview], int] = self._waiting.gatherer()

    def close(self) -> None:
        """Take the connection out of the server's account; the socket is the caller's."""
        self._waiting.close()

    def buffered(self) -> bool:
        """Whether bytes were taken from the socket already: never."""
        return False

    def arrived(self) -> bool:
        """Whatever makes the socket readable is for `receive`."""
        return True

    def finish(self, parts: Sequence[Buffer], sent: int, release: Callable[[], None]) -> None:
        """Send the rest of `parts` after `sent` bytes; raises SendFault or OSError."""
        done = sent
        rest = remainder(parts, sent)
        while rest:
            try:
                count = self._socket.sendmsg(rest[:IOV_MAX])
            except BlockingIOError:  # SO_SNDTIMEO: the client takes nothing
                self._finish_stalled(rest, done, release)
                return
            except OSError as error:
                if error.errno == errno.EFAULT:
                    raise SendFault(sent=done) from None
                raise
            done += count
            rest = remainder(rest, count)

    def _finish_stalled(self, rest: list[Buffer], done: int, release: Callable[[], None]) -> None:
        try:
            reply = StalledReply(rest, self._parking)
        except OSError as error:
            if error.errno == errno.EFAULT:
                raise SendFault(sent=done) from None
            raise
        with reply:
            release()
            reply.send(self._socket)


def remainder(parts: Sequence[Buffer], sent: int) -> list[Buffer]:
    """Return the buffers that are left of `parts` after the first `sent` bytes."""
    for index, part in enumerate(parts):
        if sent < len(part):
            return [memoryview(part)[sent:], *parts[index + 1 :]]
        sent -= len(part)
    return []

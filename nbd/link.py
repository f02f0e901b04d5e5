"""The byte stream under a connection in transmission: waiting, sending, and what can go wrong while sending.

In: `PlainLink` (a socket; polls briefly before it sleeps, sends file-mapping slices without copying) and the
`Link` protocol that it shares with `TlsLink` (in `tls_link`) and with the tests' in-memory stream. Out: what
the bytes mean.

A reply's buffers may be slices of the data file's mapping. While they wait for a client that does not read,
the blocks under them cannot be reused, so a send that makes no progress for some seconds is finished from a
private copy, made by the kernel (`stalled`); the client itself is left alone, it may be a suspended virtual
machine.
"""

import errno
import select
import socket
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Protocol

from .activity import Activity
from .device import Buffer
from .errors import SendFault
from .stalled import Parking, StalledReply

IOV_MAX = 1024  # Linux UIO_MAXIOV

_SPIN_CREDIT_MAX = 16
_SPIN_RETRY_EVERY = 32  # sleeps after which polling is tried again although it did not pay off


class Link(Protocol):
    """One direction each of a byte stream.

    `receive` blocks until there is something and returns 0 at the end of the stream. `send_some` passes a
    list of at most IOV_MAX buffers on and returns how many bytes it took. `finish` sends what is left of a
    list after `sent` bytes; it calls `release` as soon as no buffer of the list is needed any longer.
    `fast_read_max` is the longest read whose data may be handed over in one list.
    """

    receive: Callable[[memoryview], int]
    send_some: Callable[[list[Buffer]], int]
    fast_read_max: int
    copies: bool

    def finish(self, parts: Sequence[Buffer], sent: int, release: Callable[[], None]) -> None:
        """Send the rest; raises SendFault or OSError."""


class PlainLink:
    """A connected stream socket in blocking mode."""

    copies: bool = False

    def __init__(
        self, sock: socket.socket, activity: Activity, parking: Parking, *, spin_seconds: float, read_max: int
    ) -> None:
        self.fast_read_max: int = read_max
        self._socket = sock
        self._activity = activity
        self._parking = parking
        self._spin_seconds = spin_seconds
        self._credit = _SPIN_CREDIT_MAX // 2
        self._sleeps = 0
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(activity.wake_descriptor, select.POLLIN)
        self._wakes = True
        self.send_some: Callable[[list[Buffer]], int] = sock.sendmsg
        self.receive: Callable[[memoryview], int] = self._receiver()
        activity.working.add(self)

    def close(self) -> None:
        """Take the connection out of the server's account; the socket is the caller's."""
        self._activity.working.discard(self)

    def _receiver(self) -> Callable[[memoryview], int]:
        """Return `receive` as a closure: it runs once a batch."""
        recv_into = self._socket.recv_into
        dont_wait = socket.MSG_DONTWAIT
        wait = self._wait

        def receive(target: memoryview) -> int:
            try:
                return recv_into(target, 0, dont_wait)
            except BlockingIOError:
                return wait(target)

        return receive

    def _wait(self, target: memoryview) -> int:
        if self._spin_seconds and len(self._activity.working) <= 1 and self._may_spin():
            received = self._spin(target)
            if received >= 0:
                return received
        working = self._activity.working
        while True:
            working.discard(self)
            ready = self._poll.poll()
            working.add(self)
            if self._wakes and self._activity.stopping:
                self._poll.unregister(self._activity.wake_descriptor)  # it stays readable from now on
                self._wakes = False
            if any(descriptor == self._socket.fileno() for descriptor, _ in ready):
                try:
                    return self._socket.recv_into(target, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue

    def _may_spin(self) -> bool:
        if self._credit > 0:
            return True
        self._sleeps += 1
        if self._sleeps >= _SPIN_RETRY_EVERY:
            self._sleeps = 0
            return True
        return False

    def _spin(self, target: memoryview) -> int:
        """Poll for a bounded time; -1 where nothing came."""
        recv_into, dont_wait = self._socket.recv_into, socket.MSG_DONTWAIT
        end = monotonic() + self._spin_seconds
        while monotonic() < end:
            try:
                received = recv_into(target, 0, dont_wait)
            except BlockingIOError:
                continue
            self._credit = min(self._credit + 1, _SPIN_CREDIT_MAX)
            return received
        self._credit = max(self._credit - 2, -1)
        return -1

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

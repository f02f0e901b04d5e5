"""How a connection waits for its next requests: at once, a little, or asleep.

Theory of operation. Waking a sleeping thread costs more than a small request, so two kinds of short waiting
pay off, both only while no other connection of the server is working (a polling thread takes the interpreter
lock from its neighbours) and both bounded:

`spin`    the client has nothing to say yet: poll for up to 50 us before going to sleep. It goes by credit:
where
          recent polling was in vain it is tried rarely.
`gather`  the client has said one thing and is busy reading earlier replies: let it read some of them, and
          more requests will be there for one batch. What it has not read is known to the kernel (SIOCOUTQ); if
          that is little, the client may be waiting for us and nothing is delayed. Without this, a server that is
          faster than its client falls into step with it: one request, one reply, two contended system calls each.

Polling asks poll(2) with a time-out of 0 and receives once it says yes: a receive that would block raises
BlockingIOError, and making that exception (with the message in the user's language) costs four such questions.

An idle connection sleeps in poll(2), also on the server's wake-up descriptor, and uses no CPU.
"""

import array
import fcntl
import select
import socket
import termios
from collections.abc import Callable
from time import monotonic

from .activity import Activity

# Unread bytes (the kernel's accounting of buffers) from which on the client counts as busy, and how many of
# them it is left to read before we look again.
_UNREAD_BYTES_MIN = 16 * 1024
_UNREAD_STEP_BYTES = 32 * 1024
_GATHER_SECONDS = 30e-6
_PAUSE = range(40)  # a few hundred nanoseconds between two looks

_CREDIT_MAX = 16
_RETRY_EVERY = 32  # sleeps after which polling is tried again although it did not pay off

Receive = Callable[[memoryview], int]


class Waiting:
    """The receiving side of a plain socket in blocking mode."""

    def __init__(self, sock: socket.socket, activity: Activity, spin_seconds: float) -> None:
        self._socket = sock
        self._activity = activity
        self._spin_seconds = spin_seconds
        self._credit = _CREDIT_MAX // 2
        self._sleeps = 0
        self._ready = select.poll()
        self._ready.register(sock, select.POLLIN)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(activity.wake_descriptor, select.POLLIN)
        self._wakes = True
        activity.working.add(self)

    def close(self) -> None:
        """Take the connection out of the server's account."""
        self._activity.working.discard(self)

    def receiver(self) -> Receive:
        """Return a function that receives at least one byte, or 0 at the end of the stream."""
        recv_into, ready, wait = self._socket.recv_into, self._ready.poll, self._wait

        def receive(target: memoryview) -> int:
            if not ready(0):
                wait()
            return recv_into(target)

        return receive

    def readable(self) -> bool:
        """Tell whether a receive would find something, without waiting."""
        return bool(self._ready.poll(0))

    def wait(self) -> None:
        """Return when a receive would find something."""
        if not self._ready.poll(0):
            self._wait()

    def gatherer(self) -> Receive:
        """Return the same, for use after a batch with short replies: it lets requests gather while that is free."""
        if not self._spin_seconds:
            return self.receiver()
        recv_into, ready, wait = self._socket.recv_into, self._ready.poll, self._wait
        descriptor, ioctl = self._socket.fileno(), fcntl.ioctl
        working = self._activity.working
        unread = array.array("i", [0])
        raw = memoryview(unread).cast("B")
        at_once = False  # whether the last call found something without waiting

        def gather(target: memoryview) -> int:
            nonlocal at_once
            if at_once and len(working) <= 1:
                ioctl(descriptor, termios.TIOCOUTQ, raw)
                if unread[0] >= _UNREAD_BYTES_MIN:
                    goal = max(unread[0] // 2, unread[0] - _UNREAD_STEP_BYTES)
                    end = monotonic() + _GATHER_SECONDS
                    while unread[0] > goal and monotonic() < end:
                        for _ in _PAUSE:
                            pass
                        ioctl(descriptor, termios.TIOCOUTQ, raw)
            at_once = bool(ready(0))
            if not at_once:
                wait()
            return recv_into(target)

        return gather

    def _wait(self) -> None:
        """Poll if that promises something, then sleep."""
        working = self._activity.working
        if self._spin_seconds and len(working) <= 1 and self._may_spin() and self._spin():
            return
        while True:
            working.discard(self)
            ready = self._poll.poll()
            working.add(self)
            if self._wakes and self._activity.stopping:
                self._poll.unregister(self._activity.wake_descriptor)  # it stays readable from now on
                self._wakes = False
            if any(descriptor == self._socket.fileno() for descriptor, _ in ready):
                return

    def _may_spin(self) -> bool:
        if self._credit > 0:
            return True
        self._sleeps += 1
        if self._sleeps >= _RETRY_EVERY:
            self._sleeps = 0
            return True
        return False

    def _spin(self) -> bool:
        """Poll for a bounded time; tell whether something came."""
        ready = self._ready.poll
        end = monotonic() + self._spin_seconds
        while not ready(0):
            if monotonic() >= end:
                self._credit = max(self._credit - 2, -1)
                return False
        self._credit = min(self._credit + 1, _CREDIT_MAX)
        return True

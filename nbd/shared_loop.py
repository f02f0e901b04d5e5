"""One thread that serves many connections in turn, while all they have to say is plain.

Theory of operation. A thread a connection is the quickest way as long as one or two connections are busy: nothing
is looked up, and polling for the next request is allowed. With more, the threads spend their time handing the
interpreter lock to each other, several times a request. So a connection that is about to wait, while others are
busy, lends itself to this loop: its own thread sleeps, and the loop, which sleeps in epoll(7) for all of them,
receives, applies and answers (`Shift.turn`) whenever there is something. The loop never waits for a client nor for
anything but the page cache: whatever is not plain, cannot be sent at once, or took long is the end of the stay, and
the connection's own thread goes on from exactly there. So is a session that says it may have to wait
(`Session.held_up`), because a snapshot is being taken of its device or its content comes over a network.

A connection that turns out to be the only busy one is given back as well: alone, its own thread serves it better.
"""

import select
import threading
from collections.abc import Callable
from time import monotonic

from .activity import Activity

# Busy threads, the asking one included, from which on sharing pays.
_BUSY_MIN = 3
# Turns in a row for one connection and nobody else, after which it is given back.
_ALONE_TURNS = 64
# A turn that took longer waited for something, a disk as a rule; threads of their own can wait side by side.
_TURN_SECONDS_MAX = 1e-3


class _Member:
    """A connection in the loop: what serves it, and what its own thread sleeps on."""

    __slots__ = ("back", "slow", "token", "turn")

    def __init__(self, turn: Callable[[], bool], token: object) -> None:
        self.turn = turn
        self.token = token
        self.slow = False
        self.back = threading.Lock()
        self.back.acquire()


class SharedLoop:
    """The loop of one server; its thread is started when it is first needed."""

    def __init__(self, activity: Activity, spin_seconds: float) -> None:
        self._activity = activity
        self._spin_seconds = spin_seconds
        self._lock = threading.Lock()
        self._members: dict[int, _Member] = {}
        self._epoll = select.epoll()
        self._epoll.register(activity.wake_descriptor, select.EPOLLIN)
        self._thread: threading.Thread | None = None

    def wanted(self) -> bool:
        """Tell whether a connection that is about to wait had better do so here."""
        working = self._activity.working
        return (len(working) >= _BUSY_MIN or self in working) and not self._activity.stopping

    def serve(self, descriptor: int, turn: Callable[[], bool], token: object) -> bool:
        """Call `turn` whenever the socket is readable, until it returns False or the server stops.

        Returns whether it ended because a turn waited for something.

        `token` is what stands for the connection in the account of working connections; it is out of it meanwhile.
        Blocks the caller, who owns the socket again afterwards. Returns at once where the server is stopping or the
        system has no thread or no watch on a descriptor to give.
        """
        member = _Member(turn, token)
        with self._lock:
            if self._activity.stopping or not self._started():
                return False
            self._members[descriptor] = member
            self._activity.working.discard(token)
            try:
                self._epoll.register(descriptor, select.EPOLLIN)
            except OSError:
                del self._members[descriptor]
                self._activity.working.add(token)
                return False
        member.back.acquire()
        return member.slow

    def close(self) -> None:
        """Release what the loop holds; the server has stopped and no connection is left."""
        if self._thread is not None:
            self._thread.join()
        self._epoll.close()

    def _started(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="nbd-shared", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return True

    def _give_back(self, descriptor: int) -> None:
        with self._lock:
            member = self._members.pop(descriptor)
            self._epoll.unregister(descriptor)
        # In this order: a stopping server must find either the loop or the connection at work.
        self._activity.working.add(member.token)
        member.back.release()

    def _run(self) -> None:
        working, stopping = self._activity.working, self._activity.wake_descriptor
        last, turns = -1, 0
        while True:
            ready = self._wait()
            working.add(self)
            for descriptor, _ in ready:
                if descriptor == stopping:
                    self._end()
                    return
                if not self._turn(self._members[descriptor]):
                    self._give_back(descriptor)
                    last = -1
                elif len(ready) > 1 or descriptor != last:
                    last, turns = descriptor, 0
                else:
                    turns += 1
                    if turns >= _ALONE_TURNS:
                        self._give_back(descriptor)
                        last = -1

    def _turn(self, member: _Member) -> bool:
        began = monotonic()
        if not member.turn():
            return False
        member.slow = monotonic() - began >= _TURN_SECONDS_MAX
        return not member.slow

    def _wait(self) -> list[tuple[int, int]]:
        """Poll for a short time, where nobody else is at work, then sleep."""
        poll, working = self._epoll.poll, self._activity.working
        ready = poll(0)
        if not ready and self._spin_seconds and len(working) <= 1:
            end = monotonic() + self._spin_seconds
            while not ready and monotonic() < end:
                ready = poll(0)
        if not ready:
            working.discard(self)
            ready = poll()
        return ready

    def _end(self) -> None:
        """The server is stopping: every connection sees to that in its own thread."""
        with self._lock:
            descriptors = list(self._members)
        for descriptor in descriptors:
            self._give_back(descriptor)
        self._activity.working.discard(self)

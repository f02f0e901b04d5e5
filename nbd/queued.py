"""Requests that wait for space, while their connection goes on.

A write that finds no free block may wait until the pool has grown or something was deleted. NBD lets replies come in
any order, so it need not hold up what the client asked for behind it: reads, writes to blocks that are there, and the
trim that frees what it waits for. So the request is put aside with a copy of its payload, the connection is served one
request at a time, and whenever there is news of space everything put aside is tried again, oldest first. Nothing is
locked or pinned meanwhile. A request put aside is always answered: when it has been done, when the device says it has
waited long enough, when the server stops, when the client says it is leaving.

In: the list, its memory, waiting for news. Out: carrying out a request (`execution`).
"""

import select
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from .activity import Activity
from .device import Session
from .errors import ConnectionEnded
from .link import Link
from .wire import Request

# Without news everything is tried again after this time: a disk under the pool that was full tells nobody.
TICK_SECONDS = 1.0
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL
_NO_PAYLOAD = memoryview(b"")


class QueuedMemory:
    """How many bytes all connections of a server may put aside."""

    def __init__(self, total_bytes: int) -> None:
        self._lock = threading.Lock()
        self._left = total_bytes

    def take(self, count: int) -> bool:
        """Whether there is room for `count` bytes more; takes them if so."""
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            return True

    def give_back(self, count: int) -> None:
        """Bytes taken before are free again."""
        with self._lock:
            self._left += count


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A WRITE or WRITE_ZEROES that waits; `since` is when it was refused first (monotonic clock)."""

    request: Request
    payload: memoryview
    since: float


class SpaceQueue:
    """What one connection has put aside."""

    def __init__(self, link: Link, session: Session, activity: Activity, memory: QueuedMemory) -> None:
        self._link = link
        self._session = session
        self._activity = activity
        self._memory = memory
        self._next_tick = 0.0
        self.requests: list[QueuedRequest] = []

    def put(self, request: Request, payload: bytes | memoryview = _NO_PAYLOAD) -> bool:
        """Put a request aside with a copy of its payload; False where there is no memory for that."""
        if not self._memory.take(len(payload)):
            return False
        if not self.requests:
            self._next_tick = 0.0
        self.requests.append(QueuedRequest(request, memoryview(bytes(payload)), monotonic()))
        self._session.space_descriptor()  # from here on news reaches us; what came before, the first try finds
        return True

    def try_again(self, attempt: Callable[[QueuedRequest], bool]) -> None:
        """Give each request its turn; `attempt` says whether it has been answered."""
        self._session.space_seen()
        self._next_tick = monotonic() + TICK_SECONDS
        waiting, self.requests = self.requests, []
        try:
            while waiting:
                if not attempt(waiting[0]):
                    self.requests.append(waiting[0])
                else:
                    self._memory.give_back(len(waiting[0].payload))
                del waiting[0]
        finally:
            self.requests += waiting  # those not looked at, where the connection broke

    def close(self) -> None:
        """Forget everything; the connection has ended."""
        self._memory.give_back(sum(len(queued.payload) for queued in self.requests))
        self.requests.clear()

    def news(self, *, receive: bool) -> bool:
        """Wait for news of space, a tick, the server's stop or (if `receive`) more input; whether to receive.

        News and ticks come before input, so a client that never stops sending does not keep its own writes waiting.
        Raises ConnectionEnded where nothing is to be received and the client has gone.
        """
        link = self._link
        until_tick = self._next_tick - monotonic()
        if until_tick <= 0:
            self._next_tick = monotonic() + TICK_SECONDS
            return False
        at_once = receive and (link.buffered() or link.descriptor < 0)
        # Made for each wait: this is off the hot path, and the descriptors come and go.
        poll = select.poll()
        if link.descriptor >= 0:
            poll.register(link.descriptor, _GONE | (select.POLLIN if receive else 0))
        poll.register(self._activity.wake_descriptor, select.POLLIN)
        space = self._session.space_descriptor()
        if space >= 0:
            poll.register(space, select.POLLIN)
        ready = dict(poll.poll(0 if at_once else until_tick * 1000))
        if space in ready or self._activity.wake_descriptor in ready:
            return False
        if not receive and ready.get(link.descriptor, 0) & _GONE:
            raise ConnectionEnded
        try:
            return at_once or (link.descriptor in ready and link.arrived())
        except OSError as error:
            raise ConnectionEnded from error

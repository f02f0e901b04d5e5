"""A connection's stay in the shared loop: the turns that serve it there, and the state its own thread goes on from."""

import socket
from typing import TYPE_CHECKING

from .device import Buffer
from .link import IOV_MAX, Link
from .shared_loop import SharedLoop

if TYPE_CHECKING:
    from .execution import Executor
    from .transmission import Apply

# Batches of more bytes, requests and replies together, are worth a thread: there is much to do before the next switch.
TURN_BYTES_MAX = 16 * 1024
# A stay that ends with a slow turn as early as this was ended by the disk, a later one may have waited for the
# interpreter lock. Each such stay in a row doubles the time until the next one, up to 2 ** _SLOW_STAYS_MAX.
_SHORT_STAY_TURNS = 16
_SLOW_STAYS_MAX = 6


class Shift:
    """The receive buffer's bounds, and what a turn left to be done by the connection's own thread.

    After a stay: `have` bytes are in the buffer, the next request begins at `pos` and the batch began at `first`;
    `parts` are replies of which `count` of `total` bytes have gone out, `problem` is what a turn raised; `need` and
    `failure` are those of the hot loop. `ended`: the client has closed its side. `slow_stays`: how many stays in
    a row were short because a turn waited: while a disk makes connections wait, they must not do it here in line.
    """

    __slots__ = (
        "_apply",
        "_held_up",
        "_loop",
        "_moved",
        "_sent",
        "_socket",
        "_token",
        "_turns",
        "_view",
        "count",
        "ended",
        "failure",
        "first",
        "have",
        "head",
        "need",
        "parts",
        "pos",
        "problem",
        "slow_stays",
        "total",
        "wanted",
    )

    def __init__(self, loop: SharedLoop, link: Link, executor: "Executor", head: int) -> None:
        assert link.direct is not None
        self.head = head
        self.slow_stays = 0
        self.wanted = loop.wanted
        self._loop = loop
        self._socket = link.direct
        self._token = link.token
        self._view = executor.view
        self._sent = executor.terms.session.sent
        self._held_up = executor.terms.session.held_up
        self._apply: Apply

    def stay(self, apply: "Apply") -> None:
        """Be served by the loop, from an empty buffer on; returns when the connection's own thread has to go on."""
        self._apply = apply
        self.pos = self.have = self.first = self.count = self.total = 0
        self.need = self.head
        self.parts: list[Buffer] = []
        self.failure: OSError | None = None
        self.problem: Exception | None = None
        self.ended = False
        self._turns = 0
        slow = not self._held_up() and self._loop.serve(self._socket.fileno(), self.turn, self._token)
        if slow and self._turns <= _SHORT_STAY_TURNS:
            self.slow_stays = min(self.slow_stays + 1, _SLOW_STAYS_MAX)
        else:
            self.slow_stays = 0

    def turn(self) -> bool:
        """Receive once, apply, answer. False where the connection's own thread has to go on."""
        self._turns += 1
        try:
            return self._receive() and self._answer() and self._make_room()
        except Exception as problem:  # raised again where it ends one connection and not the loop
            self.problem = problem
            return False

    def _receive(self) -> bool:
        """False at the end of the stream."""
        got = self._socket.recv_into(self._view[self.have :], 0, socket.MSG_DONTWAIT)
        self.have += got
        self.ended = not got
        return bool(got)

    def _answer(self) -> bool:
        """Apply what has arrived and send the replies; False where that may take long or they do not go out at once."""
        if self._held_up():  # asked after the receive, which lets other threads run
            return False
        parts: list[Buffer] = []
        self.first = self.pos
        self.pos, self.total, self.need, self.failure = self._apply(parts, self.pos, self.have)
        self._moved = self.total + self.pos - self.first
        if parts:
            self.parts, self.count = parts, 0
            if len(parts) > IOV_MAX:
                return False
            try:
                self.count = self._socket.sendmsg(parts, (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if self.count != self.total:
                return False
            self.parts = []
        self._sent()
        return True

    def _make_room(self) -> bool:
        """Have the next receive go on behind an unfinished request; False where that is not for the loop."""
        rest = self.have - self.pos
        if not rest:
            self.pos = self.have = 0
        elif self.need <= self.head or self.need > len(self._view) // 2:
            return False
        elif self.pos:
            self._view[:rest] = self._view[self.pos : self.have]
            self.pos, self.have = 0, rest
        return self.need > 0 and self._moved <= TURN_BYTES_MAX

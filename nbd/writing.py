"""WRITE payloads that are not simply in the receive buffer: how they arrive and how they are applied.

A payload of up to two MiB is received completely before a byte of it is applied, so a client that dies in the
middle leaves the data as they were. Larger ones, and any that finds the server's payload memory in use, are
applied in pieces of 256 KiB as they arrive: the request has been validated, no lock is held while waiting,
and the memory does not follow the announced length.

A write that finds no space may wait (`queued`). It has then been applied up to the block that was missing, in order,
and is applied again from its beginning; until it is answered the client knows nothing of what it did. One that is
applied as it arrives cannot be put aside, nor can any when the memory for that is used up: these wait where they are,
and their connection with them.
"""

import errno
from collections.abc import Callable
from time import monotonic

from .activity import Activity
from .constants import Errno
from .device import Session
from .errors import ConnectionEnded, RequestError
from .limits import KIB, Limits
from .payload_memory import PayloadMemory
from .queued import SpaceQueue
from .terms import Terms
from .wire import Request

_PIECE_BYTES = 256 * KIB


class PayloadStream:
    """The payload of the request being handled: partly in the receive buffer, partly still on its way."""

    def __init__(
        self, view: memoryview, pos: int, have: int, size: int, receive: Callable[[memoryview], int]
    ) -> None:
        self.size = size
        self._view = view
        self._receive = receive
        self._pos = pos
        self._have = have
        self._left = size  # not yet consumed

    @property
    def left(self) -> int:
        """Bytes of the payload not yet consumed."""
        return self._left

    @property
    def buffered(self) -> int:
        """Bytes of the rest of the payload that are in the receive buffer."""
        return min(self._left, self._have - self._pos)

    def bounds(self) -> tuple[int, int]:
        """Return where the next request begins and where the received bytes end."""
        assert self._left == 0
        return self._pos, self._have

    def piece(self, count: int) -> memoryview:
        """Consume `count` bytes as a view of the receive buffer, waiting for them; valid until the next call.

        `count` must fit the buffer together with nothing else: it is at most 256 KiB.
        """
        assert count <= self._left
        if self._pos + count > len(self._view):
            held = self._have - self._pos
            self._view[:held] = self._view[self._pos : self._have]
            self._pos, self._have = 0, held
        while self._have - self._pos < count:
            # no further than the piece: what follows may be better received elsewhere
            self._have += self._more(self._view[self._have : self._pos + count])
        start, self._pos = self._pos, self._pos + count
        self._left -= count
        if self._pos == self._have:
            view, self._pos, self._have = self._view[start : start + count], 0, 0
            return view
        return self._view[start : start + count]

    def take(self) -> bytes:
        """Consume the whole rest, which must be small, as private bytes."""
        return bytes(self.piece(self._left))

    def fill(self, target: memoryview) -> None:
        """Consume bytes that are not in the receive buffer, directly into other memory."""
        assert self.buffered == 0
        got = 0
        while got < len(target):
            got += self._more(target[got:])
        self._left -= got

    def discard(self) -> None:
        """Consume and drop the rest."""
        while self._left:
            self.piece(min(self._left, _PIECE_BYTES, len(self._view)))

    def _more(self, target: memoryview) -> int:
        try:
            count = self._receive(target)
        except OSError as error:  # the stream's, not the device's
            raise ConnectionEnded from error
        if not count:
            raise ConnectionEnded
        return count


class Writing:
    """Applies payloads of one connection."""

    def __init__(
        self, terms: Terms, memory: PayloadMemory, limits: Limits, queue: SpaceQueue, activity: Activity
    ) -> None:
        self._session: Session = terms.session
        self._memory = memory
        self._queue = queue
        self._activity = activity
        self._block_bytes = max(1, terms.export.preferred_block_bytes)
        self._whole_max = min(limits.whole_payload_bytes, memory.buffer_bytes)
        self._piece_max = min(_PIECE_BYTES, limits.receive_buffer_bytes)

    def apply(self, request: Request, payload: PayloadStream) -> bool:
        """Receive the payload and write it; False where it was put aside to wait for space.

        Raises OSError where the device refuses (part of the payload may be left), RequestError where it waited and the
        server is stopping.
        """
        if payload.size <= self._piece_max:
            return not payload.size or self._write(request, [payload.piece(payload.size)])
        buffer = self._memory.take() if payload.size <= self._whole_max else None
        if buffer is None:
            self._in_pieces(request.offset, payload)
            return True
        try:
            return self._whole(request, payload, buffer)
        finally:
            self._memory.give_back(buffer)

    def _write(self, request: Request, parts: list[memoryview]) -> bool:
        """Apply a payload that has arrived; False where it was put aside."""
        offset = request.offset
        try:
            for part in parts:
                self._write_part(offset, part)
                offset += len(part)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._session.may_wait(error, monotonic()):
                raise
        else:
            return True
        if self._queue.put(request, b"".join(parts) if len(parts) > 1 else parts[0]):
            return False
        offset = request.offset
        for part in parts:
            self._write_waiting(offset, part)
            offset += len(part)
        return True

    def _write_part(self, offset: int, data: memoryview) -> None:
        """Apply a piece; where the device has no block for it, again for as long as it finds some when it is asked to.

        Nothing is held while it looks: no lock, and no block pinned by earlier replies, which have gone out.
        """
        tries = 0
        while True:
            try:
                self.apply_now(offset, data)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._session.sent()
                if not self._session.wait_for_space(error, tries):
                    raise
                tries += 1
            else:
                return

    def apply_now(self, offset: int, data: memoryview) -> None:
        """Apply a piece, or fail."""
        self._session.enter()
        try:
            self._session.write(offset, data)
        finally:
            self._session.leave()

    def _write_waiting(self, offset: int, data: memoryview) -> None:
        """Apply a piece, and wait for space here if it must. Raises RequestError where the server stops meanwhile."""
        since = monotonic()
        waited = False
        try:
            while True:
                try:
                    self._write_part(offset, data)
                except OSError as error:
                    if error.errno != errno.ENOSPC or not self._session.may_wait(error, since):
                        raise
                else:
                    return
                if self._activity.stopping:
                    raise RequestError(Errno.ESHUTDOWN, "the server is shutting down")
                waited = True
                self._queue.news(receive=False)
                self._session.space_seen()
        finally:
            if waited and not self._queue.requests:
                self._session.space_no_longer_wanted()

    def _whole(self, request: Request, payload: PayloadStream, buffer: memoryview) -> bool:
        """Receive everything, then apply. What is in the receive buffer is used from there, up to a block border."""
        offset = request.offset
        early = payload.buffered
        border = (offset + early) // self._block_bytes * self._block_bytes
        kept = max(0, border - offset)
        # In this order, because the receive buffer may be recycled once it is empty: the views stay valid,
        # their memory is not written to before the next request is received.
        first = payload.piece(kept) if kept else None
        tail = payload.buffered
        if tail:
            buffer[:tail] = payload.piece(tail)
        rest = buffer[: tail + payload.left]
        payload.fill(rest[tail:])
        return self._write(request, [rest] if first is None else [first, rest])

    def _in_pieces(self, offset: int, payload: PayloadStream) -> None:
        """Apply as it arrives, in pieces that end at multiples of their size."""
        while payload.left:
            border = (offset // self._piece_max + 1) * self._piece_max
            count = min(border - offset, payload.left)
            self._write_waiting(offset, payload.piece(count))
            offset += count

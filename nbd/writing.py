"""WRITE payloads that are not simply in the receive buffer: how they arrive and how they are applied.

A payload of up to two MiB is received completely before a byte of it is applied, so a client that dies in the
middle leaves the data as they were. Larger ones, and any that finds the server's payload memory in use, are
applied in pieces of 256 KiB as they arrive: the request has been validated, no lock is held while waiting,
and the memory does not follow the announced length.
"""

import errno
from collections.abc import Callable

from .device import Session
from .errors import ConnectionEnded
from .limits import KIB, Limits
from .payload_memory import PayloadMemory
from .terms import Terms

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

    def __init__(self, terms: Terms, memory: PayloadMemory, limits: Limits) -> None:
        self._session: Session = terms.session
        self._memory = memory
        self._block_bytes = max(1, terms.export.preferred_block_bytes)
        self._whole_max = min(limits.whole_payload_bytes, memory.buffer_bytes)
        self._piece_max = min(_PIECE_BYTES, limits.receive_buffer_bytes)

    def apply(self, offset: int, payload: PayloadStream) -> None:
        """Receive the payload and write it; OSError where the device refuses (part of the payload may be left)."""
        if payload.size <= self._piece_max:
            if payload.size:
                self._write(offset, payload.piece(payload.size))
            return
        buffer = self._memory.take() if payload.size <= self._whole_max else None
        if buffer is None:
            self._in_pieces(offset, payload)
            return
        try:
            self._whole(offset, payload, buffer)
        finally:
            self._memory.give_back(buffer)

    def _write(self, offset: int, data: memoryview) -> None:
        """Apply a piece; where the device has no block for it, once more after it was asked to find some.

        Nothing is held while it looks: no lock, and no block pinned by earlier replies, which have gone out.
        """
        try:
            self._apply(offset, data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._session.sent()
            if not self._session.wait_for_space():
                raise
            self._apply(offset, data)

    def _apply(self, offset: int, data: memoryview) -> None:
        self._session.enter()
        try:
            self._session.write(offset, data)
        finally:
            self._session.leave()

    def _whole(self, offset: int, payload: PayloadStream, buffer: memoryview) -> None:
        """Receive everything, then apply. What is in the receive buffer is used from there, up to a block border."""
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
        if first is not None:
            self._write(offset, first)
        self._write(offset + kept, rest)

    def _in_pieces(self, offset: int, payload: PayloadStream) -> None:
        """Apply as it arrives, in pieces that end at multiples of their size."""
        while payload.left:
            border = (offset // self._piece_max + 1) * self._piece_max
            count = min(border - offset, payload.left)
            self._write(offset, payload.piece(count))
            offset += count

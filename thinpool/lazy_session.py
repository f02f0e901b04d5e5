"""A connection to a device whose content is partly still in a store: blocks are fetched before they are touched.

In: what differs from an ordinary session. Out: fetching (`lazy_device.py`).

While the store is asked the session's lock is let go, so a snapshot never waits for the network. Between two requests
of a batch a snapshot may then be taken: those before it are in it, and none of them was answered yet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import ThinPoolError
from .extents import EXCLUSIVE, HOLE
from .lazy_device import DEMAND_ATTEMPTS
from .session import Buffers, Session

if TYPE_CHECKING:
    from .device import ThinDevice
    from .lazy_device import LazyDevice

LEARN_BLOCKS_MAX = 1 << 16


class LazySession(Session):
    """See `nbd.device.Session` for the contract of each call."""

    def __init__(self, device: ThinDevice, lazy: LazyDevice) -> None:
        self._lazy = lazy
        super().__init__(device)

    def held_up(self) -> bool:
        """A read or write may have to wait for the store, until all is here."""
        return not self._lazy.closed or super().held_up()

    def _fetched(self, offset: int, length: int) -> None:
        """Have the blocks of a range here; inside `enter` and `leave`."""
        begin, end = offset // self._lazy.block_bytes, -(-(offset + length) // self._lazy.block_bytes)
        if self._lazy.remote.remote_in(begin, end):
            self.lock.release()
            try:
                self._lazy.ensure_local(begin, end)
            finally:
                self.lock.acquire()

    def _make_read(self) -> tuple[Callable[[int, int, Buffers], int], Callable[[], None]]:
        plain, rebind = super()._make_read()

        def read(offset: int, length: int, parts: Buffers) -> int:
            self._fetched(offset, length)
            return plain(offset, length, parts)

        return read, rebind

    def _make_write(self) -> Callable[[int, memoryview], None]:
        plain = super()._make_write()

        def write(offset: int, buffer: memoryview) -> None:
            self._fetch_edges(offset, len(buffer))
            plain(offset, buffer)

        return write

    def _fetch_edges(self, offset: int, length: int) -> None:
        """Blocks that a change covers in part only; those it covers whole need not be fetched."""
        block_bytes, end = self._lazy.block_bytes, offset + length
        if offset % block_bytes:
            self._fetched(offset, 1)
        if end % block_bytes and end < self.device.size_bytes:
            self._fetched(end - 1, 1)

    def read_copy(self, offset: int, length: int) -> bytearray:
        """See `Session.read_copy`."""
        self._fetched(offset, length)
        return super().read_copy(offset, length)

    def _whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        block_bytes, end = self._lazy.block_bytes, offset + length
        last = -(-end // block_bytes) if end == self.device.size_bytes else end // block_bytes
        return -(-offset // block_bytes), last

    def trim(self, offset: int, length: int) -> None:
        """See `Session.trim`."""
        begin, end = self._whole_blocks(offset, length)
        if begin < end:
            self._lazy.discard(begin, end)
        super().trim(offset, length)

    def zero(self, offset: int, length: int, *, keep_allocated: bool, fast_only: bool) -> None:
        """See `Session.zero`."""
        begin, end = self._whole_blocks(offset, length)
        self.enter()
        try:
            self._fetch_edges(offset, length)
        finally:
            self.leave()
            self.sent()
        if begin < end and not keep_allocated:
            self._lazy.discard(begin, end)
        super().zero(offset, length, keep_allocated=keep_allocated, fast_only=fast_only)

    def cache(self, offset: int, length: int) -> None:
        """See `Session.cache`."""
        begin, end = offset // self._lazy.block_bytes, -(-(offset + length) // self._lazy.block_bytes)
        self._lazy.ensure_local(begin, end)
        super().cache(offset, length)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Ranges as `Session.extents`; what is still remote is no hole."""
        lazy, block_bytes = self._lazy, self._lazy.block_bytes
        begin, end = offset // block_bytes, -(-(offset + length) // block_bytes)
        end = min(end, begin + LEARN_BLOCKS_MAX)
        length = min(length, end * block_bytes - offset)
        if lazy.remote.remote_in(begin, end):
            # Where the store is away, what may be a hole is told as data, which is never wrong.
            with suppress(ThinPoolError, OSError):
                lazy.learn(begin, end, lazy.reader(DEMAND_ATTEMPTS))
        found: list[tuple[int, int]] = []
        # Before the mappings: a block that is fetched in between is then told once too often, not left out.
        bits = lazy.remote.bits.copy()
        for count, kind in super().extents(offset, length):
            if kind != HOLE:
                _extend(found, count, kind)
                offset += count
                continue
            until = offset + count
            while offset < until:
                block = offset // block_bytes
                remote = block < len(bits) and bool(bits[block])
                following = bits.find(not remote, block) if block < len(bits) else -1
                next_offset = until if following < 0 else min(following * block_bytes, until)
                if following < 0 and remote:
                    next_offset = min(len(bits) * block_bytes, until)
                _extend(found, next_offset - offset, EXCLUSIVE if remote else HOLE)
                offset = next_offset
        return found


def _extend(ranges: list[tuple[int, int]], length: int, kind: int) -> None:
    if ranges and ranges[-1][1] == kind:
        length += ranges.pop()[0]
    ranges.append((length, kind))

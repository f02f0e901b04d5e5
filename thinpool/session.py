"""One connection's way to one thin device: the engine's half of the hot path.

The other half is the loop in `nbd` that parses requests and sends replies. It calls `read` and `write` between
`enter` and `leave`, hands the buffers it got to the kernel, then calls `sent`. What is written here for speed
rather than for the reader: `read` and `write` are closures over plain local names, a request inside one data
block takes one look-up in a flat array and builds no object but the slice itself.

Everything that may have to wait for a commit (flush, trim, write zeroes, finding space) is called without the
session's lock and without anything pinned, so a snapshot and the reclaimer never wait for a client.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from metadata import MetadataError, MetadataFull
from nbd.device import Buffer

from .block_map import MAPPED, TIME
from .errors import PoolPoisoned, PoolReadOnly
from .full_pool import NoFreeBlock
from .reclaim import UNPINNED

if TYPE_CHECKING:
    from .device import ThinDevice

Buffers = list[Buffer]
NOTHING = memoryview(b"")
PREFETCH_BLOCKS_MAX = 1024


def io_error(error: Exception) -> OSError:
    """Any failure of the engine as what a block device may answer."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, PoolReadOnly):
        return OSError(errno.EPERM, str(error))
    if isinstance(error, MetadataFull):
        return OSError(errno.ENOSPC, str(error))
    return OSError(errno.EIO, str(error))


class Session:
    """See `nbd.device.Session` for the contract of each call.

    `pinned` is the epoch that `reclaim` compares: blocks freed at or after it are left alone.
    """

    read: Callable[[int, int, Buffers], int]
    write: Callable[[int, memoryview], None]
    rebind: Callable[[], None]

    def __init__(self, device: ThinDevice) -> None:
        self.device = device
        self.lock = Lock()
        self.pinned = UNPINNED
        self._engine = device.engine
        self._space_descriptor = -1
        self._reclaimer = device.engine.reclaimer
        self.read, rebind_read = self._make_read()
        self.write = self._make_write()
        self.rebind = rebind_read

    # --- batches ---

    def enter(self) -> None:
        """Begin applying a batch."""
        self.lock.acquire()
        if self.pinned == UNPINNED:
            self.pinned = self._reclaimer.epoch

    def leave(self) -> None:
        """End applying; buffers given out stay valid until `sent`."""
        self.lock.release()

    def held_up(self) -> bool:
        """Whether the device is held for a point in time: while a snapshot waits for the disk, say."""
        return self.lock.locked()

    def sent(self) -> None:
        """The buffers given out are not in use any more."""
        self.pinned = UNPINNED

    # --- the hot path ---

    def _make_read(self) -> tuple[Callable[[int, int, Buffers], int], Callable[[], None]]:
        device, engine = self.device, self._engine
        block_bytes = engine.block_bytes
        entries, zeros, data = device.block_map.entries, engine.zeros, engine.data.view
        ensure = device.ensure

        def read(offset: int, length: int, parts: Buffers) -> int:
            index = offset // block_bytes
            inside = offset - index * block_bytes
            if inside + length > block_bytes:
                return read_long(index, inside, length, parts)
            entry = entries[index]
            if not entry:
                ensure(index, index)
                entry = entries[index]
            if entry < MAPPED:
                parts.append(zeros[:length])
                return length
            at = ((entry >> 24) - 1) * block_bytes + inside
            parts.append(data[at : at + length])
            return 0

        def read_long(index: int, inside: int, length: int, parts: Buffers) -> int:
            """Several blocks: neighbours in the data file become one slice, holes one slice of zeros."""
            ensure(index, index + (inside + length - 1) // block_bytes)
            holes = run_holes = begin = end = 0  # the run collected so far, in the file or in the zeros
            while length:
                piece = min(block_bytes - inside, length)
                entry = entries[index]
                if entry < MAPPED:
                    if begin != end:
                        parts.append(data[begin:end])
                        begin = end = 0
                    run_holes += piece
                else:
                    if run_holes:
                        parts.append(zeros[:run_holes])
                        holes += run_holes
                        run_holes = 0
                    at = ((entry >> 24) - 1) * block_bytes + inside
                    if at == end and begin != end:
                        end += piece
                    else:
                        if begin != end:
                            parts.append(data[begin:end])
                        begin, end = at, at + piece
                index += 1
                inside = 0
                length -= piece
            parts.append(zeros[:run_holes] if run_holes else data[begin:end])
            return holes + run_holes

        def rebind() -> None:
            nonlocal data
            data = engine.data.view

        return read, rebind

    def _make_write(self) -> Callable[[int, memoryview], None]:
        device, engine = self.device, self._engine
        block_bytes = engine.block_bytes
        entries, pwrite = device.block_map.entries, engine.data.pwrite
        write_file, provision, ensure = engine.data.write, device.provision, device.ensure

        def write(offset: int, buffer: memoryview) -> None:
            index = offset // block_bytes
            inside = offset - index * block_bytes
            length = len(buffer)
            if inside + length > block_bytes:
                write_long(index, inside, buffer)
                return
            entry = entries[index]
            if entry < MAPPED or (entry & TIME) < device.shared_before:
                provision(index, inside, buffer)
                return
            at = ((entry >> 24) - 1) * block_bytes + inside
            if pwrite(buffer, at) != length:
                write_file(at, buffer)

        def write_long(index: int, inside: int, buffer: memoryview) -> None:
            """Several blocks: those that lie next to each other in the data file are written by one call."""
            length = len(buffer)
            ensure(index, index + (inside + length - 1) // block_bytes)
            shared_before = device.shared_before
            begin = position = 0  # buffer[begin:position] is collected and goes to `at`
            at = 0
            while position < length:
                piece = min(block_bytes - inside, length - position)
                entry = entries[index]
                if entry < MAPPED or (entry & TIME) < shared_before:
                    if begin != position:
                        write_file(at, buffer[begin:position])
                    provision(index, inside, buffer[position : position + piece])
                    begin = position + piece
                else:
                    here = ((entry >> 24) - 1) * block_bytes + inside
                    if begin == position:
                        at = here
                    elif at + position - begin != here:
                        write_file(at, buffer[begin:position])
                        begin, at = position, here
                position += piece
                index += 1
                inside = 0
            if begin != position:
                write_file(at, buffer[begin:position])

        return write

    def read_copy(self, offset: int, length: int) -> bytearray:
        """Read into memory, inside `enter` and `leave` like `read`: for TLS, which must look at the bytes.

        Raises OSError(EIO) for a bad sector, a data file that ends early, or damaged metadata.
        """
        block_bytes = self._engine.block_bytes
        result = bytearray(length)
        position = 0
        while position < length:
            index, inside = divmod(offset + position, block_bytes)
            piece = min(block_bytes - inside, length - position)
            self.device.ensure(index, index)
            entry = self.device.block_map.entries[index]
            if entry >= MAPPED:
                at = ((entry >> 24) - 1) * block_bytes + inside
                try:
                    result[position : position + piece] = self._engine.data.read(at, piece)
                except OSError:
                    self._engine.committer.touch()  # a file that was cut off is noticed soon, without a flush
                    raise
            position += piece
        return result

    # --- without the lock ---

    def read_bytes(self, offset: int, length: int) -> bytearray:
        """`read_copy` for callers without a batch of their own."""
        self.enter()
        try:
            return self.read_copy(offset, length)
        finally:
            self.leave()
            self.sent()

    def wait_for_space(self, refused: OSError | None = None, tries: int = 0) -> bool:
        """After a write failed with ENOSPC and the replies before it went out: is it worth another try?

        Where it is the file system that is full, no block of ours helps, but what was freed and not given back yet may;
        looking for that once is enough.
        """
        disk_full = refused is not None and not isinstance(refused, NoFreeBlock)
        if tries and disk_full:
            return False
        try:
            return self._engine.give_back() if disk_full else self._engine.make_space(self.device.device_id)
        except (MetadataError, PoolPoisoned) as error:
            raise io_error(error) from error

    def may_wait(self, refused: OSError, since: float) -> bool:
        """After that try failed as well: may the request wait for space?"""
        return self._engine.failure is None and self._engine.full.may_wait(refused, since)

    def space_descriptor(self) -> int:
        """Readable when waiting requests are worth another try; made when it is first asked for."""
        if self._space_descriptor < 0:
            self._space_descriptor = self._engine.full.attach()
        return self._space_descriptor

    def space_seen(self) -> None:
        """Wait for the next news."""
        if self._space_descriptor >= 0:
            with suppress(BlockingIOError):
                os.eventfd_read(self._space_descriptor)

    def space_no_longer_wanted(self) -> None:
        """Nothing waits any more."""
        descriptor, self._space_descriptor = self._space_descriptor, -1
        if descriptor >= 0:
            self._engine.full.detach(descriptor)

    def flush(self) -> None:
        """Everything replied to before, on any connection, is durable on return. Raises OSError(EIO)."""
        if self._engine.failure is not None:
            raise OSError(errno.EIO, "the pool is read-only after a failed commit")
        try:
            self._engine.committer.flush()
        except (MetadataError, PoolPoisoned) as error:
            raise io_error(error) from error

    def trim(self, offset: int, length: int) -> None:
        """Unmap the whole blocks of a range; what covers only part of a block is left as it is (as dm-thin does)."""
        block_bytes = self._engine.block_bytes
        begin = -(-offset // block_bytes)
        end = (offset + length) // block_bytes
        if offset + length == self.device.size_bytes:
            end = -(-self.device.size_bytes // block_bytes)  # the last block may be a partial one
        if begin < end:
            self._unmap(begin, end)

    def _unmap(self, begin: int, end: int) -> None:
        try:
            self.device.unmap(begin, end)
        except (MetadataError, PoolReadOnly, PoolPoisoned) as error:
            raise io_error(error) from error

    def zero(self, offset: int, length: int, *, keep_allocated: bool, fast_only: bool) -> None:
        """Make a range read zeros: whole blocks are unmapped (or kept allocated), the edges written."""
        if not length:
            return
        block_bytes, limit = self._engine.block_bytes, offset + length
        begin = -(-offset // block_bytes)
        end = limit // block_bytes
        if limit == self.device.size_bytes:
            end = -(-limit // block_bytes)
        if keep_allocated:
            if fast_only:
                raise OSError(errno.ENOTSUP, "zeroing with blocks kept allocated is not fast")
            self._zero_in_place(offset, limit)
            return
        edges = [
            (offset, min(begin * block_bytes, limit)),
            (max(end * block_bytes, begin * block_bytes), limit),
        ]
        edges = [(low, high) for low, high in edges if low < high and self._is_mapped(low // block_bytes)]
        if edges and fast_only:
            raise OSError(errno.ENOTSUP, "the range does not begin and end on block borders")
        for low, high in edges:
            self._zero_in_place(low, high)
        if begin < end:
            self._unmap(begin, end)

    def _is_mapped(self, index: int) -> bool:
        self.device.ensure(index, index)
        return self.device.block_map.entries[index] >= MAPPED

    def _zero_in_place(self, offset: int, limit: int) -> None:
        """Zero [offset, limit) block by block; every block of it is mapped and exclusively ours afterwards."""
        block_bytes = self._engine.block_bytes
        while offset < limit:
            index, inside = divmod(offset, block_bytes)
            piece = min(block_bytes - inside, limit - offset)
            try:
                self._zero_piece(index, inside, piece)
            except OSError as error:
                if error.errno != errno.ENOSPC or not self.wait_for_space(error):
                    raise
                # Once more and no oftener: it may be the file system that is full, where no block of ours helps.
                self._zero_piece(index, inside, piece)
            offset += piece

    def _zero_piece(self, index: int, inside: int, length: int) -> None:
        device, file = self.device, self._engine.data
        self.enter()
        try:
            if inside == 0 and length == self._engine.block_bytes:
                entry = device.claim_zeroed(index)
            else:
                entry = device.provision(index, inside, NOTHING)
            file.zero(((entry >> 24) - 1) * self._engine.block_bytes + inside, length)
        finally:
            self.leave()
            self.sent()

    def cache(self, offset: int, length: int) -> None:
        """Ask the kernel to read mapped ranges ahead."""
        block_bytes = self._engine.block_bytes
        first, end = offset // block_bytes, -(-(offset + length) // block_bytes)
        for index in range(first, min(end, first + PREFETCH_BLOCKS_MAX)):
            self.device.ensure(index, index)
            entry = self.device.block_map.entries[index]
            if entry >= MAPPED:
                self._engine.data.prefetch(((entry >> 24) - 1) * block_bytes, block_bytes)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """See `ThinDevice.extents`."""
        try:
            return self.device.extents(offset, length)
        except MetadataError as error:
            raise io_error(error) from error

    def dirty(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        """Ranges that changed since the snapshot `context`."""
        try:
            return self.device.changed_since(context, offset, length)
        except MetadataError as error:
            raise io_error(error) from error

    def close(self) -> None:
        """End the session. What it wrote stays; durability is the pool's business."""
        self.pinned = UNPINNED
        self.space_no_longer_wanted()
        self.device.drop(self)

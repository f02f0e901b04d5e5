"""An image file (raw, qcow2, whatever qemu knows) as a source of a stream, and a held device as an NBD export.

In: reading an image through qemu-nbd, so that no image format is ours to parse; a session that reads a held device, for
qemu-img to convert from. Out: the stream (`sending.py`), who runs qemu-img (`image_files.py`).

Blocks of the image that hold nothing but zeros are left out, as `qemu-img convert` does: the device reads zeros there
without them.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Iterator, Sequence

from nbd import EXTENT_EXCLUSIVE, EXTENT_HOLE, Buffer, Extents
from nbd.client import Client
from nbd.errors import NbdError

from .common_bases import KnownBase
from .content_identity import new_identity
from .snapshot_source import Piece, SnapshotSource, SourceDevice

ALLOCATION = "base:allocation"
ZERO = 2  # NBD_STATE_ZERO
STATUS_BYTES = 1 << 30
ZERO_BLOCK_BYTES = 64 << 10
RANGES_MAX = 1 << 16  # more than any one read has blocks
_ZEROS = bytes(ZERO_BLOCK_BYTES)


class ImageSource:
    """The content of an image, as `snapshot_source.SnapshotSource` is that of a device."""

    base: SourceDevice | None = None
    bases: Sequence[KnownBase] = ()
    block_bytes = ZERO_BLOCK_BYTES

    def __init__(self, uri: str, name: str, *, size_bytes: int) -> None:
        self._client = Client.connect(uri, contexts=[ALLOCATION])
        self.device = SourceDevice(name, size_bytes, new_identity(), new_identity(), False, 0, 0)
        self._taken: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def still_held(self) -> None:
        """An image that changes while it is read is the user's to avoid; qemu locks it."""

    def totals(self, begin_bytes: int = 0) -> tuple[int, int]:
        """(bytes that are not known to be zeros, 0)."""
        del begin_bytes
        return sum(length for _, length in self._extents()), 0

    def pieces(self, begin_bytes: int, piece_bytes_max: int) -> Iterator[Piece]:
        """What is not zeros, ascending. Each piece is read here, and handed out by `read`."""
        for start, length in self._extents():
            offset, end = max(start, begin_bytes), start + length
            while offset < end:
                count = min(piece_bytes_max - offset % piece_bytes_max, end - offset)
                yield from self._not_zero(offset, memoryview(self._read(offset, count)))
                offset += count

    def _not_zero(self, offset: int, data: memoryview) -> Iterator[Piece]:
        """Runs of blocks that are not all zeros."""
        begin: int | None = None
        position = 0
        while position < len(data):
            length = min(ZERO_BLOCK_BYTES - (offset + position) % ZERO_BLOCK_BYTES, len(data) - position)
            if data[position : position + length] == _ZEROS[:length]:
                if begin is not None:
                    yield self._piece(offset + begin, data[begin:position])
                begin = None
            elif begin is None:
                begin = position
            position += length
        if begin is not None:
            yield self._piece(offset + begin, data[begin:])

    def _piece(self, offset: int, data: memoryview) -> Piece:
        with self._lock:
            self._taken[offset] = data
        return Piece(offset, len(data), offset)

    def read(self, at_bytes: int, buffer: memoryview) -> None:
        """Hand out what `pieces` has read."""
        with self._lock:
            data = self._taken.pop(at_bytes)
        buffer[:] = data

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return self._client.read(offset, length)
        except NbdError as error:
            raise OSError(errno.EIO, f"the image cannot be read: {error}") from error

    def _extents(self) -> Iterator[tuple[int, int]]:
        """Ranges that may hold something else than zeros."""
        offset = 0
        while offset < self.device.size_bytes:
            length = min(STATUS_BYTES, self.device.size_bytes - offset)
            for extent, state in self._client.block_status(offset, length)[ALLOCATION]:
                if not state & ZERO:
                    yield offset, extent
                offset += extent


class SourceExport:
    """A held device as the only export of a server, read-only (`nbd.device.Export`)."""

    description = ""
    read_only = True
    preferred_block_bytes = 64 << 10

    def __init__(self, source: SnapshotSource) -> None:
        self._source = source
        self._looking = threading.Lock()
        self.name = ""
        self.size_bytes = source.device.size_bytes

    def dirty_contexts(self) -> Sequence[str]:
        """There are none."""
        return ()

    def open(self) -> SourceSession:
        """A session on the device."""
        return SourceSession(self._source, self._looking)


class SourceExports:
    """The directory of one export (`nbd.device.ExportDirectory`)."""

    def __init__(self, source: SnapshotSource) -> None:
        self._export = SourceExport(source)

    def listing(self) -> Iterator[tuple[str, str]]:
        """Yield the export."""
        yield self._export.name, ""

    def find(self, name: str) -> SourceExport | None:
        """The export, by its empty name."""
        return self._export if not name else None


class SourceSession:
    """Reads a held device; everything that would change it fails (`nbd.device.Session`)."""

    def __init__(self, source: SnapshotSource, looking: threading.Lock) -> None:
        self._source = source
        self._looking = looking  # the nodes of the tree are cached, for one thread at a time

    def enter(self) -> None:
        """Nothing is shared with other connections."""

    def leave(self) -> None:
        """See `enter`."""

    def held_up(self) -> bool:
        """Every read waits for those of other connections and for the disk."""
        return True

    def sent(self) -> None:
        """See `enter`."""

    def read(self, offset: int, length: int, parts: list[Buffer], /) -> int:
        """Read into memory: the files are another process's to change the size of."""
        parts.append(memoryview(self.read_copy(offset, length)))
        return 0

    def read_copy(self, offset: int, length: int) -> bytearray:
        """The range; holes are zeros."""
        result = bytearray(length)
        filled = memoryview(result)
        for start, count, at in self._mapped(offset, length):
            self._source.read(at, filled[start - offset : start - offset + count])
        self._source.still_held()
        return result

    def _mapped(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        with self._looking:
            return list(itertools.islice(self._source.mapped(offset, length), RANGES_MAX))

    def extents(self, offset: int, length: int) -> Extents:
        """Holes and data, from `offset` on."""
        found: Extents = []
        position = offset
        ranges = self._mapped(offset, length)
        if len(ranges) == RANGES_MAX:  # a prefix is an answer too
            length = ranges[-1][0] + ranges[-1][1] - offset
        for start, count, _ in ranges:
            if start > position:
                found.append((start - position, EXTENT_HOLE))
            found.append((count, EXTENT_EXCLUSIVE))
            position = start + count
        if position < offset + length:
            found.append((offset + length - position, EXTENT_HOLE))
        return found

    def dirty(self, context: str, offset: int, length: int) -> Extents:
        """No context is offered."""
        raise OSError(errno.EINVAL, f"no context {context} for {length} bytes from {offset}")

    def flush(self) -> None:
        """Nothing was written."""

    def cache(self, offset: int, length: int) -> None:
        """The page cache does that by itself."""

    def wait_for_space(self, refused: OSError, tries: int, /) -> bool:
        """No space would help."""
        return False

    def may_wait(self, refused: OSError, since: float, /) -> bool:
        """Nothing is written here, so nothing waits."""
        return False

    def space_descriptor(self) -> int:
        """There is no news of space."""
        return -1

    def space_seen(self) -> None:
        """Nothing to do."""

    def space_no_longer_wanted(self) -> None:
        """Nothing to do."""

    def write(self, offset: int, data: memoryview, /) -> None:
        """Refuse; the server does so before."""
        raise OSError(errno.EPERM, f"read-only: {len(data)} bytes at {offset}")

    def trim(self, offset: int, length: int) -> None:
        """Refuse."""
        raise OSError(errno.EPERM, f"read-only: {length} bytes at {offset}")

    def zero(self, offset: int, length: int, *, keep_allocated: bool, fast_only: bool) -> None:
        """Refuse."""
        del keep_allocated, fast_only
        raise OSError(errno.EPERM, f"read-only: {length} bytes at {offset}")

    def close(self) -> None:
        """The source is closed by whoever opened it."""

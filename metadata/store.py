# ruff: noqa: EM101, TRY003 -- what is passed to an error is a field, the sentence is made when it is printed
"""The one seam for metadata I/O: whole 4096-byte blocks in, whole blocks out.

In: the `BlockStore` protocol, files and block devices, and a store in memory.
Out: caching, checksums, ordering of writes. Every fault test is another implementation of the protocol.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from .errors import OutOfRange, ReadOnlyMetadata, ShortRead
from .layout import BLOCK_BYTES

Data = bytes | bytearray | memoryview


class BlockStore(Protocol):
    """Storage of metadata blocks. All positions and counts are in blocks of 4096 bytes."""

    def read(self, first: int, count: int) -> bytes:
        """Exactly `count` blocks. Raises OSError or ShortRead."""
        ...

    def write(self, first: int, data: Data) -> None:
        """Write whole blocks; durable only after the next `flush`. Raises OSError."""
        ...

    def flush(self) -> None:
        """Make everything written so far durable. Raises OSError."""
        ...

    def size_blocks(self) -> int:
        """Whole blocks the storage has now; a trailing partial block does not count."""
        ...

    def close(self) -> None:
        """Give up the storage. Does not flush."""
        ...


def _whole_blocks(data: Data) -> int:
    count, rest = divmod(len(data), BLOCK_BYTES)
    if rest:
        raise ValueError(len(data))
    return count


class FileStore:
    """A regular file or block device.

    Raises OSError as the operating system reports it. Takes no lock; that is the caller's business.
    """

    def __init__(self, path: str | os.PathLike[str], *, writable: bool) -> None:
        self.path = Path(path)
        self._writable = writable
        self._descriptor = os.open(self.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)

    def read(self, first: int, count: int) -> bytes:
        """See `BlockStore.read`."""
        wanted = count * BLOCK_BYTES
        offset = first * BLOCK_BYTES
        data = os.pread(self._descriptor, wanted, offset)
        while len(data) < wanted:
            more = os.pread(self._descriptor, wanted - len(data), offset + len(data))
            if not more:
                raise ShortRead(first, count, len(data))
            data += more
        return data

    def write(self, first: int, data: Data) -> None:
        """See `BlockStore.write`."""
        if not self._writable:
            raise ReadOnlyMetadata("write a metadata block")
        _whole_blocks(data)
        rest = memoryview(data)
        offset = first * BLOCK_BYTES
        while rest:
            written = os.pwrite(self._descriptor, rest, offset)
            rest = rest[written:]
            offset += written

    def flush(self) -> None:
        """See `BlockStore.flush`."""
        os.fdatasync(self._descriptor)

    def size_blocks(self) -> int:
        """See `BlockStore.size_blocks`; works for block devices, whose st_size is zero."""
        return os.lseek(self._descriptor, 0, os.SEEK_END) // BLOCK_BYTES

    def close(self) -> None:
        """See `BlockStore.close`; closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class MemoryStore:
    """Blocks in memory: for tests and for trying out an image without touching it."""

    def __init__(self, blocks: int | Data) -> None:
        self.image = bytearray(blocks * BLOCK_BYTES) if isinstance(blocks, int) else bytearray(blocks)

    def read(self, first: int, count: int) -> bytes:
        """See `BlockStore.read`."""
        data = bytes(self.image[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES])
        if len(data) < count * BLOCK_BYTES:
            raise ShortRead(first, count, len(data))
        return data

    def write(self, first: int, data: Data) -> None:
        """See `BlockStore.write`; writing past the end is refused as a device would."""
        count = _whole_blocks(data)
        if first + count > self.size_blocks():
            raise OutOfRange("metadata block", first + count - 1, 0, self.size_blocks() - 1)
        self.image[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES] = data

    def flush(self) -> None:
        """See `BlockStore.flush`; nothing to do."""

    def size_blocks(self) -> int:
        """See `BlockStore.size_blocks`."""
        return len(self.image) // BLOCK_BYTES

    def resize(self, blocks: int) -> None:
        """Lengthen (with zeros) or cut the store, as a device may be between two openings."""
        wanted = blocks * BLOCK_BYTES
        del self.image[wanted:]
        self.image.extend(bytes(wanted - len(self.image)))

    def close(self) -> None:
        """See `BlockStore.close`; the image stays readable."""


Flush = Callable[[], None]

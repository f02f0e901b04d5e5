# ruff: noqa: PTH102, PTH104, PTH108, PTH208 -- changes of files are calls of `os`, so that tests can cut each
"""Which blocks of a device still lie in an object store: a bitmap in the pool directory, one file a device.

In: the file, and the order in which bits reach it. Out: fetching (`lazy_device.py`), who has such a file
(`lazy_devices.py`).

A set bit says: unless this block is mapped, its content is in the store. So *the mapping wins*, and most bits may stay
set too long without harm; a block that was fetched, or written by a client, is mapped. What must never happen is the
other direction:

* A fetched block's bit is cleared in the file only after the commit that made its mapping durable (`checkpoint`): the
  bits are copied first, then the pool commits, then the copy is written.
* A discarded block must not come back from the store. Its bit is cleared in the file before its mapping goes
  (`clear_durably`). A power cut in between leaves a block that reads zeros although its discard was not answered yet,
  which a discard allows.

The file: a header of 4096 bytes (JSON, padded with zeros), then the bits, lowest first. A bit is cleared by writing a
byte over a byte, so a torn write leaves old bits or new ones, both of which are right.

Every change of a file is a call of `os`: that is where the crash search looks on and cuts.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bitarray import bitarray

from .catalog_rows import CatalogEntry
from .errors import PoolDamaged

HEADER_BYTES = 4096
READ_BYTES = 1 << 20
FORMAT = "thinpool remote blocks 1"
# The tag of a device that has such a file, with the file's name.
TAG = "remote"


def is_lazy(entry: CatalogEntry) -> bool:
    """Whether part of a device may still be in a store."""
    return TAG in entry.tags


def untagged(tags: dict[str, str]) -> dict[str, str]:
    """The tags of a device that is all here."""
    return {key: value for key, value in tags.items() if key != TAG}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the content is: the store, the snapshot, the object that holds its manifest (`root`), the key's file.

    `hold` says that `root` is ours and is to be removed when it is not needed any more.
    """

    url: str
    snapshot: str
    content_id: str
    root: str
    hold: bool
    key_file: str | None


class RemoteBlocks:
    """The bitmap of one device. `bits` is the present state; whoever changes it holds the device's lock."""

    def __init__(self, path: Path, origin: Origin, bits: bitarray) -> None:
        self.path = path
        self.origin = origin
        self.bits = bits
        self._on_disk = bits.copy()

    @classmethod
    def create(cls, path: Path, origin: Origin, bits: bitarray) -> RemoteBlocks:
        """Write a new file, durable on return."""
        header = json.dumps({"format": FORMAT, "blocks": len(bits), **asdict(origin)}).encode("ascii")
        with suppress(FileExistsError):
            os.mkdir(path.parent, 0o700)
        partial = path.with_name(path.name + ".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, header.ljust(HEADER_BYTES, b"\0") + bits.tobytes(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(partial, path)
        _sync_directory(path.parent)
        _sync_directory(path.parent.parent)
        return cls(path, origin, bits)

    @classmethod
    def open(cls, path: Path) -> RemoteBlocks:
        """Read a file. Raises PoolDamaged, OSError."""
        return cls.decode(path, _read_all(path))

    @classmethod
    def decode(cls, path: Path, data: bytes) -> RemoteBlocks:
        """What the bytes of a file say. Raises PoolDamaged."""
        try:
            header = json.loads(data[:HEADER_BYTES].rstrip(b"\0"))
            count = header.pop("blocks")
            if header.pop("format") != FORMAT or not isinstance(count, int):
                raise ValueError(count)
            origin = Origin(**header)
            bits = bitarray(endian="little")
            bits.frombytes(data[HEADER_BYTES:])
            if len(bits) != -(-count // 8) * 8:
                raise ValueError(len(bits))
        except (ValueError, KeyError, TypeError) as error:
            reason = "it does not tell which blocks are still to be fetched"
            raise PoolDamaged(str(path), reason) from error
        del bits[count:]
        return cls(path, origin, bits)

    def remote_in(self, begin: int, end: int) -> bool:
        """Whether any bit of blocks [begin, end) is set."""
        return self.bits.find(1, begin, min(end, len(self.bits))) >= 0

    def clear_durably(self, begin: int, end: int) -> None:
        """Clear bits here and in the file, on disk on return."""
        end = min(end, len(self.bits))
        if begin >= end:
            return
        self.bits[begin:end] = 0
        if self._on_disk.find(1, begin, end) < 0:
            return
        low, high = begin // 8 * 8, min(-(-end // 8) * 8, len(self._on_disk))
        changed = self._on_disk[low:high]
        changed[begin - low : end - low] = 0
        self._write(low // 8, changed.tobytes())
        # Not before it is there: what could not be written has to be tried again by the next one.
        self._on_disk[begin:end] = 0

    def checkpoint(self, bits: bitarray) -> None:
        """Clear in the file what is clear in `bits`, which were copied before the last commit; on disk on return."""
        changed = self._on_disk & bits
        if changed != self._on_disk:
            self._write(0, changed.tobytes())
            self._on_disk = changed

    def _write(self, at: int, data: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            _write_all(descriptor, data, HEADER_BYTES + at)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Delete the file; it is not needed any more."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)


def remove_left_over(directory: Path, known: set[str]) -> None:
    """Delete the files of a directory that no device has, by their names: a kill left them. Raises OSError."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in names:
        if name not in known:
            with suppress(FileNotFoundError):
                os.unlink(directory / name)


def _read_all(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(descriptor, READ_BYTES):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes, at: int) -> None:
    rest = memoryview(data)
    while rest:
        done = os.pwrite(descriptor, rest, at)
        rest, at = rest[done:], at + done


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

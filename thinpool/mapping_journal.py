"""What was answered and is not committed yet, kept where the death of the process cannot reach it: in the page cache.

In: a file of the pool directory with one entry for each mapping made or dropped since the last commit, and finding
the entries that a killed process left. Out: what they mean for the metadata (`replay.py`), when commits happen.

Theory of operation. A write that was answered and not flushed may be lost in a power cut, but not when the server is
merely killed: a client that reconnects has no reason to send it again. Its bytes are in the page cache then, and so
is this file; only the mapping would be gone. The file is never flushed and never believed after a reboot.

The entries belong to a *generation*, the time between two commits. There are two areas, used in turn. A commit first
*cuts*: from there on entries go to the other area, which is empty. An area is good for one committed superblock, its
*base*, known by a digest. The digest of the next superblock is written into the new area's header before that
superblock is written, so at every instant the superblock on disk is the base of one area:

* it is the base of the older one: the commit did not happen; the older area's entries count, then the newer one's,
  since nothing but new mappings is made while a commit runs;
* it is the base of the newer one: the commit happened, and what the older area holds is in it.

A mapping made between the cut and the moment when the commit takes the device's list is in both the metadata and
the newer area. Finding it there changes nothing.

When it is not believed. The digest covers the boot, both files' devices and inodes, and the superblock. The metadata
file must not have been written since the commit either, whatever is in it (the kernel may have had the pool), and
the data file not long after the entries. Block devices change without leaving such traces, and pools of bare paths
have no place for the file: those have no journal.

The file is mapped into memory where that is safe, so that an entry costs no system call; a kill takes the map and
leaves the pages. Elsewhere each entry is a `pwrite`.

An entry is written after the block it tells of has its content, and before the write is answered. Each has a
checksum and its generation, so a torn one, or one of an earlier use of the area, is none. Any part of the entries may
be missing without harm: that is what a power cut would have left.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import mmap
import os
import stat
import struct
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

SUPERBLOCK_BYTES = 4096
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
DIGEST_BYTES = 32
# Magic, entries an area has room for; for each area: generation, begun, committed (both in ns), base.
HEADER = struct.Struct("<8sQ QQQ32s QQQ32s")
MAGIC = b"thinjrn1"
HEADER_BYTES = 4096
AREA_HEADER = struct.Struct("<QQQ32s")
AREA_HEADERS_AT = 16
BODY = struct.Struct("<QIQQ")  # generation, kind and device id, two numbers
CHECKSUM = struct.Struct("<I")
ENTRY_BYTES = 32
DROPPED = 1 << 24  # above the device id
ENTRIES_MAX = 1 << 17
# Every connection may be past the check for room when the area is full, with one block in its hands.
SPARE_ENTRIES = 1 << 12
# The committer comes at least every five seconds; a commit to a slow disk may take long itself.
BELIEVED_NS = 60 * 10**9
# ext4, xfs, tmpfs (linux/magic.h).
IN_PLACE = frozenset({0xEF53, 0x58465342, 0x01021994})
_libc = ctypes.CDLL(None, use_errno=True)
NO_BASE = bytes(DIGEST_BYTES)
WRITTEN_IN_PART = "the journal was written in part"

assert HEADER.size == AREA_HEADERS_AT + 2 * AREA_HEADER.size
assert BODY.size + CHECKSUM.size == ENTRY_BYTES

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Mapped:
    """A thin block got a data block."""

    device_id: int
    thin_block: int
    data_block: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """The mappings of [begin, end) went."""

    device_id: int
    begin: int
    end: int


Entry = Mapped | Dropped


@dataclass(slots=True)
class _Area:
    """Where one generation's entries go. `next_slot` gives every caller a number of its own, without a lock."""

    generation: int
    number: int
    start: int
    next_slot: Callable[[], int]
    used: int = 0


class MappingJournal:
    """The journal of a pool that is open for writing. Made by `begin`, after what was found has been replayed.

    Where the file cannot be written it is given up, once and aloud; the pool goes on without.
    """

    def __init__(self, descriptor: int, witness: Witness, log: Log, entries_max: int) -> None:
        self._descriptor = descriptor
        self._let_go = weakref.finalize(self, os.close, descriptor)  # also where a pool is dropped unclosed
        self._witness = witness
        self._log = log
        self._entries_max = entries_max
        # Room is asked for with some to spare, so that no entry ever finds none.
        self._full_at = entries_max - min(SPARE_ENTRIES, entries_max // 2)
        self._headers: list[tuple[int, int, int, bytes]] = [(0, 0, 0, NO_BASE)] * 2
        self._area = self._new_area(1)
        self._active = True
        # One write system call, or a copy into the map; tests replace it.
        self._pwrite: Callable[[bytes, int], int] = functools.partial(os.pwrite, descriptor)

    @classmethod
    def begin(
        cls,
        path: Path,
        witness: Witness,
        log: Log,
        *,
        entries_max: int = ENTRIES_MAX,
        pwrite: Callable[[bytes, int], int] | None = None,
    ) -> MappingJournal:
        """Start an empty journal on the pool as it is committed now. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        journal = cls(descriptor, witness, log, entries_max)
        try:
            if pwrite is not None:
                journal._pwrite = pwrite
            elif overwrites_in_place(descriptor):
                journal._pwrite = _mapped(descriptor, HEADER_BYTES + 2 * entries_max * ENTRY_BYTES)
            journal._start()
        except BaseException:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            journal._let_go()
            raise
        return journal

    def _start(self) -> None:
        area = self._area
        base = self._witness.digest(self._witness.superblock())
        self._headers[area.number] = (area.generation, 0, self._witness.metadata_changed_ns(), base)
        self._write(MAGIC + self._entries_max.to_bytes(8, "little"), 0)
        self._write_headers()

    def _new_area(self, generation: int) -> _Area:
        number = generation % 2
        start = HEADER_BYTES + number * self._entries_max * ENTRY_BYTES
        return _Area(generation, number, start, itertools.count().__next__)

    # --- entries ---

    @property
    def full(self) -> bool:
        """Whether a commit must come before the next entry."""
        return self._active and self._area.used >= self._full_at

    def mapped(self, device_id: int, thin_block: int, data_block: int) -> None:
        """A thin block has a data block, whose content is written. The device's lock is held."""
        # Written out for speed, as every first write comes here. The area is looked at once: a cut may come any
        # time, and a caller that began before it is waited for.
        area = self._area
        slot = area.next_slot()
        if not self._active or slot >= self._entries_max:
            return
        if not slot:
            self._note_beginning(area)
        body = BODY.pack(area.generation, device_id, thin_block, data_block)
        try:
            done = self._pwrite(body + CHECKSUM.pack(crc32(body)), area.start + slot * ENTRY_BYTES)
        except OSError as error:
            self.give_up(str(error))
        else:
            if done != ENTRY_BYTES:
                self.give_up(WRITTEN_IN_PART)
        area.used = slot + 1

    def dropped(self, device_id: int, begin: int, end: int) -> None:
        """The mappings of [begin, end) are gone from the tree. The device's lock is held."""
        self.mapped(device_id | DROPPED, begin, end)

    def _note_beginning(self, area: _Area) -> None:
        generation, _, committed, base = self._headers[area.number]
        self._headers[area.number] = (generation, time.time_ns(), committed, base)
        self._write_headers()

    # --- commits; the transaction is held ---

    def cut(self) -> None:
        """A commit begins: what is entered from now on may not be in it."""
        area = self._new_area(self._area.generation + 1)
        self._headers[area.number] = (area.generation, 0, 0, NO_BASE)
        self._write_headers()
        self._area = area

    def about_to_commit(self, superblock: bytes) -> None:
        """The metadata, then this superblock, are going to be written."""
        self._forget_time(1 - self._area.number)
        self._set_base(self._witness.digest(superblock), 0)

    def about_to_lengthen(self) -> None:
        """The metadata file is going to be longer, with the same superblock until the next commit.

        Also in the middle of one, when it is the older area that the superblock belongs to.
        """
        self._forget_time(0)
        self._forget_time(1)
        self._write_headers()

    def _forget_time(self, area: int) -> None:
        """We are going to write to the metadata file, so when it was written says nothing until we are done."""
        generation, begun, _, base = self._headers[area]
        self._headers[area] = (generation, begun, 0, base)

    def committed(self) -> None:
        """The commit that was cut is done. Without `about_to_commit` there was nothing to write."""
        old = 1 - self._area.number
        _, _, _, base = self._headers[self._area.number]
        self._set_base(
            self._headers[old][3] if base == NO_BASE else base, self._witness.metadata_changed_ns()
        )
        self._headers[old] = (self._headers[old][0], 0, 0, NO_BASE)
        self._write_headers()

    def _set_base(self, base: bytes, committed_ns: int) -> None:
        generation, begun, _, _ = self._headers[self._area.number]
        self._headers[self._area.number] = (generation, begun, committed_ns, base)
        self._write_headers()

    # --- the end ---

    def give_up(self, why: str) -> None:
        """The file cannot be used; the pool goes on without."""
        if self._active:
            self._log(f"writes that are not flushed no longer outlive a killed server: {why}")
            self.discard()

    def discard(self) -> None:
        """Nothing of it is to be believed any more: the pool is in its committed state, or gave up."""
        if self._active:
            self._active = False
            try:
                # Not shortened yet: a thread that is late may still store into the map.
                os.pwrite(self._descriptor, bytes(HEADER.size), 0)
            except OSError as error:
                self._log(f"the journal could not be emptied: {error}")

    def close(self) -> None:
        """Let go of the file. Nobody enters anything any more."""
        if not self._active:
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
        self._let_go()
        self._witness.close()

    def _write_headers(self) -> None:
        first, second = self._headers
        self._write(AREA_HEADER.pack(*first) + AREA_HEADER.pack(*second), AREA_HEADERS_AT)

    def _write(self, data: bytes, offset: int) -> None:
        if not self._active:
            return
        try:
            done = self._pwrite(data, offset)
        except OSError as error:
            self.give_up(str(error))
        else:
            if done != len(data):
                self.give_up(WRITTEN_IN_PART)


def overwrites_in_place(descriptor: int) -> bool:
    """Whether the file system never needs new space to change what a file has: only then may the file be mapped.

    Where a page cannot be written the kernel has no error for a store into memory, it ends the process.
    """
    buffer = (ctypes.c_long * 32)()  # struct statfs, its first field the type (statfs(2))
    return _libc.fstatfs(descriptor, buffer) == 0 and buffer[0] in IN_PLACE


def _mapped(descriptor: int, length_bytes: int) -> Callable[[bytes, int], int]:
    """A `pwrite` that is a copy into memory: a quarter of what the system call costs. Raises OSError without space."""
    os.posix_fallocate(descriptor, 0, length_bytes)
    view = memoryview(mmap.mmap(descriptor, length_bytes))

    def store(data: bytes, offset: int) -> int:
        view[offset : offset + len(data)] = data
        return len(data)

    return store


def forget_journal(path: Path) -> None:
    """Empty the file of a journal that is not in use. Raises OSError."""
    os.truncate(path, 0)


def announce_replay(path: Path) -> None:
    """The metadata file is going to be written for the sake of these entries: a kill meanwhile must not void them.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        magic, entries_max, *fields = HEADER.unpack(os.pread(descriptor, HEADER.size, 0))
        fields[2] = fields[6] = 0
        os.pwrite(descriptor, HEADER.pack(magic, entries_max, *fields), 0)
    finally:
        os.close(descriptor)


class Witness:
    """What ties a journal to this boot and to the two files of the pool as they are."""

    def __init__(self, metadata_path: Path, data_path: Path) -> None:
        """Raises OSError."""
        self._metadata = os.open(metadata_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            metadata, self._data = os.fstat(self._metadata), data_path.stat()
            self.usable = stat.S_ISREG(metadata.st_mode) and stat.S_ISREG(self._data.st_mode)
            numbers = (metadata.st_dev, metadata.st_ino, self._data.st_dev, self._data.st_ino)
            self._identity = repr((self._boot(), *numbers)).encode()
        except BaseException:
            os.close(self._metadata)
            raise
        # Also where a pool is dropped unclosed.
        self._let_go = weakref.finalize(self, os.close, self._metadata)

    @staticmethod
    def _boot() -> str:
        return BOOT_ID.read_text(encoding="ascii").strip()

    def digest(self, superblock: bytes) -> bytes:
        """The base that a superblock is."""
        return hashlib.blake2b(superblock + self._identity, digest_size=DIGEST_BYTES).digest()

    def superblock(self) -> bytes:
        """The superblock in the file."""
        return os.pread(self._metadata, SUPERBLOCK_BYTES, 0)

    def metadata_changed_ns(self) -> int:
        """When the metadata file was written last."""
        return os.fstat(self._metadata).st_mtime_ns

    def data_changed_ns(self) -> int:
        """When the data file was written last, as of the making of this object."""
        return self._data.st_mtime_ns

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._let_go()


def left_behind(path: Path, witness: Witness) -> list[Entry]:
    """What a killed process had answered and not committed, in order; empty where there is nothing to believe.

    Raises OSError.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        return []
    _, entries_max, *fields = HEADER.unpack_from(content)
    headers = sorted((tuple(fields[:4]), tuple(fields[4:])))
    here = witness.digest(witness.superblock())
    for position, (generation, _, committed, base) in enumerate(headers):
        if base != here:
            continue
        if committed and committed != witness.metadata_changed_ns():
            return []
        counting = [headers[position]]
        if position == 0 and headers[1][0] == generation + 1:
            counting.append(headers[1])
        if witness.data_changed_ns() > max(int(header[1]) for header in counting) + BELIEVED_NS:
            return []
        return [entry for header in counting for entry in _entries(content, int(header[0]), entries_max)]
    return []


def _entries(content: bytes, generation: int, entries_max: int) -> list[Entry]:
    """The entries of one generation. Slots may be empty in between: two threads write two slots in any order."""
    start = HEADER_BYTES + generation % 2 * entries_max * ENTRY_BYTES
    area = content[start : start + entries_max * ENTRY_BYTES]
    area = area[: len(area) // ENTRY_BYTES * ENTRY_BYTES]
    words = np.frombuffer(area, dtype="<u8").reshape(-1, ENTRY_BYTES // 8)
    found: list[Entry] = []
    for slot in np.flatnonzero(words[:, 0] == generation).tolist():
        entry = area[slot * ENTRY_BYTES : (slot + 1) * ENTRY_BYTES]
        body = entry[: BODY.size]
        if crc32(body) != int.from_bytes(entry[BODY.size :], "little"):
            continue
        _, kind, first, second = BODY.unpack(body)
        device_id = kind & (DROPPED - 1)
        found.append((Dropped if kind & DROPPED else Mapped)(device_id, first, second))
    return found

"""The history of a simulated disk: one totally ordered list of events over sectors whose contents are numbered.

In: numbering of sector contents, the events, the images that a power cut may leave. Out: who makes the events
(`simulated_disk`) and what an image must show (`crash_oracle`).

Theory of operation. Every 512-byte content that was ever written is interned once and known by a number from then
on; number 0 is 512 zero bytes. An image of a file is an array of such numbers, one per sector, so that copying a
whole image costs microseconds, comparing two is one numpy operation, and the bytes are made only when somebody wants
to open the image. `Replay` walks the events and keeps what is durable for sure (everything flushed) apart from what
is pending; an image after a cut is the durable one with any subset of the pending sectors laid over it, in the order
they were written: for each sector the old content or any of its pending versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, auto
from functools import lru_cache

import numpy as np

from tests.fakes.file_history import Call, FileHistory
from tests.fakes.file_history import Image as SmallFiles

SECTOR_BYTES = 512
ZERO_SECTOR = bytes(SECTOR_BYTES)
_ZEROS = bytes(8192)
_POSITIONS_MAX = 1 << 20
_POSITION_FACTORS = np.random.Generator(np.random.PCG64(20)).integers(1, 2**63, _POSITIONS_MAX, np.uint64) | 1


@lru_cache(maxsize=1024)
def digest_of(data: bytes) -> int:
    """64 bits of a hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Kind(IntEnum):
    """What an event is."""

    WRITE = auto()  # file, first sector, contents
    SIZE = auto()  # file, sectors: the file's length changed (durable with the file's next flush)
    FLUSH = auto()  # file: everything written to it before is durable
    LOST_FLUSH = auto()  # file: the flush failed; what was pending may or may not ever arrive
    CATALOG = auto()  # the catalogue's durable state from here on (SQLite transactions are atomic)
    MARK = auto()  # something the oracle must know
    JOURNAL = (
        auto()
    )  # the journal's bytes from here on; a power cut leaves them or not, and they must not matter
    FILES = auto()  # a call about a small file of the pool directory (`file_history.Call`)
    STORE = auto()  # the objects of the store from here on; no cut is about them


class File(IntEnum):
    METADATA = 0
    DATA = 1


@dataclass(frozen=True, slots=True)
class Event:
    kind: Kind
    file: File = File.DATA
    first: int = 0
    contents: np.ndarray | None = None
    payload: object = None


class Contents:
    """Numbers for sector contents. Equal bytes have equal numbers."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {ZERO_SECTOR: 0}
        self.table: list[bytes] = [ZERO_SECTOR]
        self._digests = [0]  # zeros count for nothing, so that arrays of any length agree

    def intern(self, data: bytes) -> np.ndarray:
        """Numbers of consecutive sectors; `data` is whole sectors. Shape (sectors,), int32."""
        count, rest = divmod(len(data), SECTOR_BYTES)
        assert not rest
        found = np.zeros(count, np.int32)
        for at in range(0, len(data), len(_ZEROS)):
            large = data[at : at + len(_ZEROS)]
            if large != _ZEROS[: len(large)]:
                self._intern_piece(large, found[at // SECTOR_BYTES :])
        return found

    def _intern_piece(self, data: bytes, found: np.ndarray) -> None:
        numbers = self._numbers
        for index, at in enumerate(range(0, len(data), SECTOR_BYTES)):
            piece = data[at : at + SECTOR_BYTES]
            number = numbers.get(piece)
            if number is None:
                number = numbers[piece] = len(self.table)
                self.table.append(piece)
                self._digests.append(digest_of(piece))
            found[index] = number

    def bytes_of(self, numbers: np.ndarray) -> bytes:
        """The bytes of consecutive sectors."""
        table = self.table
        return b"".join([table[number] for number in numbers.tolist()])

    def digests(self) -> np.ndarray:
        """A 64-bit digest by number; for counting distinct images."""
        return np.array(self._digests, np.uint64)


@dataclass(slots=True)
class FileImage:
    """One file: contents by sector. `sectors` is its length, the array may be longer."""

    contents: np.ndarray
    sectors: int

    def copy(self) -> FileImage:
        return FileImage(self.contents.copy(), self.sectors)

    def put(self, first: int, contents: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Lay sectors over the image; `mask` says which of them."""
        end = first + len(contents)
        if end > len(self.contents):
            longer = np.zeros(max(end, len(self.contents) * 3 // 2), np.int32)
            longer[: len(self.contents)] = self.contents
            self.contents = longer
        if mask is None:
            self.contents[first:end] = contents
        else:
            span = self.contents[first:end]
            span[mask] = contents[mask]


@dataclass(slots=True)
class Image:
    """What is on the disk: both files, the catalogue, small files; and what the object store holds at that time."""

    files: tuple[FileImage, FileImage]
    catalog: object
    journal: bytes = b""
    small: SmallFiles = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)

    @property
    def metadata(self) -> FileImage:
        return self.files[File.METADATA]

    @property
    def data(self) -> FileImage:
        return self.files[File.DATA]

    def copy(self) -> Image:
        files = self.files[0].copy(), self.files[1].copy()
        return Image(files, self.catalog, self.journal, self.small, self.store)


class Digests:
    """64 bits for an image that differ where the contents do, whatever history led to them.

    A sum over the sectors, so that an image costs only what it differs from the one named by `base`.
    """

    def __init__(self, contents: Contents) -> None:
        self._by_number = contents.digests()
        self._base: list[tuple[np.ndarray, int]] = [(np.zeros(0, np.int32), 0)] * 2

    def base(self, image: Image) -> None:
        """Images to come are mostly like this one."""
        self._base = [
            (file.contents[: file.sectors].copy(), self._sum(number, file))
            for number, file in enumerate(image.files)
        ]

    def of(self, image: Image) -> int:
        """The digest of an image."""
        total = digest_of(repr(image.catalog).encode())
        if image.small:
            total += digest_of(repr(sorted(image.small.items(), key=str)).encode())
        for number, file in enumerate(image.files):
            total = (total * 3 + self._sum(number, file) + file.sectors) % (1 << 64)
        return total

    def _sum(self, number: int, file: FileImage) -> int:
        base, total = self._base[number]
        now = file.contents[: file.sectors]
        shared = min(len(base), len(now))
        differing = np.flatnonzero(now[:shared] != base[:shared])
        factors = _POSITION_FACTORS[number * (_POSITIONS_MAX // 2) :]
        for where, sign in ((differing, 1), (slice(shared, len(now)), 1)):
            total += sign * self._weighted(now[where], factors[: len(now)][where])
        for where in (differing, slice(shared, len(base))):
            total -= self._weighted(base[where], factors[: len(base)][where])
        return total % (1 << 64)

    def _weighted(self, numbers: np.ndarray, factors: np.ndarray) -> int:
        if not len(numbers):
            return 0
        with np.errstate(over="ignore"):
            return int(np.sum(self._by_number[numbers] * factors, dtype=np.uint64))


@dataclass(slots=True)
class Pending:
    """A write that no flush covers yet. `lost`: a flush that should have covered it failed."""

    event: Event
    mask: np.ndarray | None = None
    lost: bool = False


@dataclass(slots=True)
class Replay:
    """The disk after the first events of a history: `durable`, and what is pending by file."""

    durable: Image
    pending: tuple[list[Pending], list[Pending]] = field(default_factory=lambda: ([], []))
    small: FileHistory = field(init=False)

    def __post_init__(self) -> None:
        self.small = FileHistory.of(self.durable.small)

    def apply(self, event: Event) -> None:
        """Go on by one event."""
        if event.kind in (Kind.WRITE, Kind.SIZE):
            self.pending[event.file].append(Pending(event))
        elif event.kind is Kind.FLUSH:
            self._flush(event.file)
        elif event.kind is Kind.LOST_FLUSH:
            for pending in self.pending[event.file]:
                pending.lost = True
        elif event.kind is Kind.CATALOG:
            self.durable.catalog = event.payload
        elif event.kind is Kind.JOURNAL:
            assert isinstance(event.payload, bytes)
            self.durable.journal = event.payload
        elif event.kind is Kind.FILES:
            assert isinstance(event.payload, Call)
            self.small.apply(event.payload)
            self.durable.small = self.small.durable()
        elif event.kind is Kind.STORE:
            assert isinstance(event.payload, dict)
            self.durable.store = event.payload

    def _flush(self, file: File) -> None:
        image, kept = self.durable.files[file], []
        for pending in self.pending[file]:
            if pending.lost:
                kept.append(pending)
                continue
            _lay(image, pending.event)
            for lost in kept:
                _hide(lost, pending.event)
        self.pending[file][:] = kept

    def waiting(self) -> Iterator[Pending]:
        """All pending writes, oldest first within each file."""
        yield from self.pending[0]
        yield from self.pending[1]

    @property
    def waiting_sectors(self) -> int:
        sectors = sum(1 if p.event.contents is None else len(p.event.contents) for p in self.waiting())
        return sectors + self.small.waiting

    def latest(self) -> Image:
        """Everything written arrived: what a kill of the process alone leaves."""
        image = self.durable.copy()
        for pending in self.waiting():
            _lay(image.files[pending.event.file], pending.event, pending.mask)
        image.small = self.small.latest()
        return image

    def cut(self, random: np.random.Generator, share: float, *, torn: bool) -> Image:
        """A power cut: each pending sector (or, unless `torn`, each write) arrived with probability `share`."""
        image = self.durable.copy()
        for pending in self.waiting():
            event, file = pending.event, image.files[pending.event.file]
            if event.contents is None or not torn:
                if random.random() < share:
                    _lay(file, event, pending.mask)
                continue
            arrived = random.random(len(event.contents)) < share
            if pending.mask is not None:
                arrived &= pending.mask
            file.put(event.first, event.contents, arrived)
        if self.small.waiting:
            image.small = self.small.cut(random, int(random.integers(8)), share)
        return image

    def cut_one(self, random: np.random.Generator, *, only: bool) -> Image:
        """A power cut with one write singled out: it alone arrived (`only`), or all others did."""
        waiting = list(self.waiting())
        if not waiting:
            return self.latest() if only else self.durable.copy()
        chosen = waiting[int(random.integers(len(waiting)))]
        image = self.durable.copy()
        for pending in waiting:
            if (pending is chosen) == only:
                _lay(image.files[pending.event.file], pending.event, pending.mask)
        if not only:
            image.small = self.small.latest()
        return image


def _lay(image: FileImage, event: Event, mask: np.ndarray | None = None) -> None:
    if event.contents is None:
        assert isinstance(event.payload, int)
        image.sectors = event.payload
        image.put(event.payload, np.zeros(0, np.int32))
    else:
        image.put(event.first, event.contents, mask)


def _hide(lost: Pending, newer: Event) -> None:
    """What a failed flush left in doubt cannot come back over what is durable since."""
    contents = lost.event.contents
    if contents is None or newer.contents is None:
        return
    low = max(newer.first - lost.event.first, 0)
    high = min(newer.first + len(newer.contents) - lost.event.first, len(contents))
    if low < high:
        if lost.mask is None:
            lost.mask = np.ones(len(contents), np.bool_)
        lost.mask[low:high] = False

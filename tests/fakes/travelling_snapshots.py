"""Snapshots that travel into the simulated pools: a few days of one device, as streams and in an object store.

In: the days, decided by a seed; their streams, whole, incremental and resumed, made by the real sender; the objects of
a store they were pushed to, made by the real push. Out: what is done with them (`crash_transfers`).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from random import Random

import numpy as np

from tests.fakes.crash_scenario import BLOCK_BYTES, BLOCK_SECTORS, SECTOR_BYTES
from tests.fakes.disk_history import Contents
from tests.fakes.reproducible import stamp
from tests.fakes.simulated_objects import URL, SimulatedObjects
from tests.fakes.store_source import FakeDevice, FakeSnapshot
from thinpool.common_bases import KnownBase
from thinpool.sending import Sender, SendOptions
from thinpool.snapshot_source import Piece, SourceDevice
from thinpool.store.keys import create_store
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.objects import Objects
from thinpool.store.pushing import Push
from thinpool.store.store import Store

DAYS = 4
BLOCKS_MAX = 6
# Whose stamps these are: no device of a pool has such a number.
STAMPED_AS = 1 << 60


class Day:
    """One snapshot: its name in the store, its content by sectors, the snapshot to push and to send."""

    def __init__(self, number: int, snapshot: FakeSnapshot, contents: Contents) -> None:
        self.number = number
        self.name = f"day{number}"
        self.snapshot = snapshot
        self.sectors = snapshot.size_bytes // SECTOR_BYTES
        self.contents = contents.intern(snapshot.content(0, snapshot.size_bytes))

    @property
    def content_id(self) -> str:
        return self.snapshot.identity

    def as_source(self) -> SourceDevice:
        return SourceDevice(
            name=self.name,
            size_bytes=self.snapshot.size_bytes,
            uuid=self.content_id,
            content_id=self.content_id,
            read_only=True,
            root=0,
            device_id=0,
        )


class TravellingSnapshots:
    """All days of one seed. `objects` is the store they lie in."""

    def __init__(self, seed: object, contents: Contents) -> None:
        self._random = Random(f"travelling {seed}")
        self._device = FakeDevice(self._size_bytes())
        self._changes = 0
        self._streams: dict[tuple[int, bool, int], bytes] = {}
        self.days: list[Day] = []
        backend = SimulatedObjects(None, {})
        store_objects = Objects(URL, backend)
        store = Store(store_objects, create_store(store_objects, None))
        for number in range(DAYS):
            self._live_a_day(first=not number)
            snapshot = self._device.snapshot()
            snapshot.identity = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
            self.days.append(Day(number, snapshot, contents))
            Push(store, snapshot, f"day{number}", KnownChunks(None)).run()
        self.objects = dict(backend.objects)
        self.by_content_id = {day.content_id: day for day in self.days}

    def _size_bytes(self) -> int:
        odd = self._random.choice((0, 0, 1, 9, 127))
        return (self._random.randrange(2, BLOCKS_MAX) * BLOCK_SECTORS + odd) * SECTOR_BYTES

    def _live_a_day(self, *, first: bool) -> None:
        random, device = self._random, self._device
        if not first and random.random() < 0.5:
            device.resize(self._size_bytes())
        for block in range(-(-device.size_bytes // BLOCK_BYTES)):
            fate = random.random()
            if fate < (0.75 if first else 0.45):
                device.blocks[block] = self._content(block)
            elif fate < 0.85 and not first:
                device.discard(block)

    def _content(self, block: int) -> bytes:
        """A full block, one with a few sectors, or zeros that are allocated."""
        random = self._random
        self._changes += 1
        kind, first, count = random.random(), 0, BLOCK_SECTORS
        if kind < 0.1:
            return bytes(bytearray(BLOCK_BYTES))
        if kind < 0.4:
            first, count = random.randrange(BLOCK_SECTORS - 9), 8
        whole = bytearray(BLOCK_BYTES)
        stamped = stamp(STAMPED_AS, self._changes, block * BLOCK_SECTORS + first, count)
        whole[first * SECTOR_BYTES : (first + count) * SECTOR_BYTES] = stamped
        return bytes(whole)

    def stream(self, day: Day, *, increment: bool, start_bytes: int = 0) -> bytes:
        """The stream of a day, on top of the day before if `increment`, from a byte on."""
        key = day.number, increment, start_bytes
        if key not in self._streams:
            base = self.days[day.number - 1] if increment else None
            written = bytearray()
            Sender(_DaySource(day, base), written.extend, SendOptions(start_bytes=start_bytes)).run()
            self._streams[key] = bytes(written)
        return self._streams[key]


class _DaySource:
    """A day as `thinpool.sending.StreamSource`, in records of one block."""

    block_bytes = BLOCK_BYTES

    def __init__(self, day: Day, base: Day | None) -> None:
        self._snapshot = day.snapshot
        self._base = None if base is None else base.snapshot
        self.device = day.as_source()
        self.base = None if base is None else base.as_source()
        self.bases: tuple[KnownBase, ...] = ()

    def still_held(self) -> None:
        pass

    def pieces(self, begin_bytes: int, piece_bytes_max: int) -> Iterator[Piece]:
        size_bytes = self._snapshot.size_bytes
        changes = (
            self._snapshot.mapped(0, size_bytes)
            if self._base is None
            else self._snapshot.changes(self._base.identity, mapped_bytes=0)
        )
        assert changes is not None
        for offset, length, is_data in changes:
            end = min(offset + length, size_bytes)
            at = max(offset, begin_bytes)
            while at < end:
                until = min((at // BLOCK_BYTES + 1) * BLOCK_BYTES, end)
                yield Piece(at, until - at, at if is_data else None)
                at = until

    def read(self, at_bytes: int, buffer: memoryview) -> None:
        buffer[:] = self._snapshot.content(at_bytes, len(buffer))

    def totals(self, begin_bytes: int = 0) -> tuple[int, int]:
        return self._snapshot.size_bytes, 0


def contents_of_block(day: Day, block: int) -> np.ndarray:
    """The sectors of a block of a day, zeros past its end."""
    whole = np.zeros(BLOCK_SECTORS, np.int32)
    found = day.contents[block * BLOCK_SECTORS : (block + 1) * BLOCK_SECTORS]
    whole[: len(found)] = found
    return whole

"""A thin device in memory, with snapshots that can be pushed: the model behind the tests of object stores."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from itertools import groupby

from thinpool.store.fetching import SnapshotReader
from thinpool.store.keys import CHUNK_BYTES


class FakeSnapshot:
    """Blocks by number; an absent one is a hole. `read_bytes` counts what was read."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.identity = str(uuid.uuid4())
        self.blocks = dict(device.blocks)
        self.size_bytes = device.size_bytes
        self.block_bytes = device.block_bytes
        self.created = 1.0
        self.bytes_read = 0

    def relatives(self) -> list[str]:
        return [other.identity for other in reversed(self.device.snapshots) if other is not self]

    def _ranges(self, numbers: list[int], is_data: bool) -> Iterator[tuple[int, int, bool]]:
        for _, group in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
            run = [number for _, number in group]
            begin = run[0] * self.block_bytes
            end = min((run[-1] + 1) * self.block_bytes, self.size_bytes)
            if begin < end:
                yield begin, end - begin, is_data

    def mapped(self, begin_bytes: int, end_bytes: int) -> Iterator[tuple[int, int, bool]]:
        for offset, length, is_data in self._ranges(list(self.blocks), True):
            low, high = max(offset, begin_bytes), min(offset + length, end_bytes)
            if low < high:
                yield low, high - low, is_data

    def changes(self, base: str, mapped_bytes: int) -> Iterator[tuple[int, int, bool]] | None:
        old = next((other for other in self.device.snapshots if other.identity == base), None)
        if old is None:
            return None
        differing = {n for n in {*old.blocks, *self.blocks} if old.blocks.get(n) is not self.blocks.get(n)}
        found = [*self._ranges([n for n in differing if n in self.blocks], True)]
        found += self._ranges([n for n in differing if n not in self.blocks], False)
        return iter(sorted(found))

    def read(self, offset: int, length_bytes: int) -> bytes:
        self.bytes_read += length_bytes
        return self.content(offset, length_bytes)

    def content(self, offset: int, length_bytes: int) -> bytes:
        parts = []
        while length_bytes:
            number, inside = divmod(offset, self.block_bytes)
            piece = min(self.block_bytes - inside, length_bytes)
            block = self.blocks.get(number, bytes(self.block_bytes))
            parts.append(block[inside : inside + piece])
            offset, length_bytes = offset + piece, length_bytes - piece
        return b"".join(parts)

    def mapped_chunks(self) -> set[int]:
        return {
            chunk
            for offset, length, _ in self.mapped(0, self.size_bytes)
            for chunk in range(offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES))
        }


class FakeDevice:
    """A device that is written to and snapshotted."""

    def __init__(self, size_bytes: int, block_bytes: int = CHUNK_BYTES) -> None:
        self.size_bytes = size_bytes
        self.block_bytes = block_bytes
        self.blocks: dict[int, bytes] = {}
        self.snapshots: list[FakeSnapshot] = []

    def write(self, number: int, filler: bytes) -> None:
        """A whole block, `filler` repeated; always a new object, as a write always gives a new data block."""
        content = (filler * (self.block_bytes // len(filler) + 1))[: self.block_bytes]
        self.blocks[number] = bytes(bytearray(content))

    def discard(self, number: int) -> None:
        self.blocks.pop(number, None)

    def resize(self, size_bytes: int) -> None:
        """What a pool does: whole blocks behind a nearer end go, and what a new block's tail held reads as zeros."""
        if size_bytes > self.size_bytes and self.size_bytes % self.block_bytes:
            number, inside = divmod(self.size_bytes, self.block_bytes)
            tail = self.blocks.get(number, b"")[inside:]
            if tail.count(0) != len(tail):
                self.blocks[number] = self.blocks[number][:inside] + bytes(len(tail))
        self.size_bytes = size_bytes
        end = -(-size_bytes // self.block_bytes)
        self.blocks = {number: block for number, block in self.blocks.items() if number < end}

    def snapshot(self) -> FakeSnapshot:
        self.snapshots.append(FakeSnapshot(self))
        return self.snapshots[-1]


def restored(reader: SnapshotReader) -> dict[int, bytes]:
    """All chunks that were mapped, with their content."""
    end = -(-reader.size_bytes // CHUNK_BYTES)
    places = reader.places(0, end)
    contents: dict[bytes, bytes] = {}
    reader.fetch(places.values(), lambda place, content: contents.__setitem__(place.name, content))
    zeros = bytes(CHUNK_BYTES)
    return {chunk: contents[place.name] if place.length_bytes else zeros for chunk, place in places.items()}

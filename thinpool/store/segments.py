"""A segment: where 1024 consecutive chunks of a device (64 MiB) lie. Unchanged segments are shared by manifests.

In: the table and its bytes. Out: the list of segments (`manifests.py`), packs (`packs.py`).

    bytes 0..3   "TPsg"
    bytes 4..5   version, 1
    bytes 6..7   number of packs named
    bytes 8..11  number of chunks
    then         the packs (16 bytes each), then five columns, one value a chunk, ascending position:
                 position u16, pack u16 (into the list above), offset u32, length u32, name 32 bytes

A chunk that is not in the table was a hole. One of length 0 was allocated and held zeros only; it lies nowhere.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field

from .damage import DamagedError
from .keys import ID_BYTES

MAGIC = b"TPsg"
VERSION = 1
HEADER = struct.Struct("<4sHHI")
assert HEADER.size == 12
PACK_ID_BYTES = 16
SEGMENT_CHUNKS = 1024
ROW_BYTES = 2 + 2 + 4 + 4 + ID_BYTES


@dataclass(frozen=True, slots=True)
class Place:
    """Where a blob lies: pack, byte range in it, and the name that its content must have."""

    pack: bytes
    offset: int
    length_bytes: int
    name: bytes


ZERO_PLACE = Place(b"", 0, 0, bytes(ID_BYTES))


@dataclass(slots=True)
class Segment:
    """Chunks by their position in the segment."""

    chunks: dict[int, Place] = field(default_factory=dict)

    def used(self) -> Counter[bytes]:
        """Bytes that the chunks take of each pack."""
        total: Counter[bytes] = Counter()
        for place in self.chunks.values():
            if place.length_bytes:
                total[place.pack] += place.length_bytes
        return total

    def encode(self) -> bytes:
        """The bytes of the segment; equal tables have equal bytes."""
        rows = sorted(self.chunks.items())
        packs = sorted({place.pack for _, place in rows if place.length_bytes})
        number = {pack: index for index, pack in enumerate(packs)}
        count = len(rows)
        return b"".join(
            (
                HEADER.pack(MAGIC, VERSION, len(packs), count),
                *packs,
                _column("H", [position for position, _ in rows]),
                _column("H", [number.get(place.pack, 0) for _, place in rows]),
                _column("I", [place.offset for _, place in rows]),
                _column("I", [place.length_bytes for _, place in rows]),
                *(place.name for _, place in rows),
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> Segment:
        """Raises DamagedError."""
        if len(data) < HEADER.size:
            raise DamagedError(reason="it is too short")
        magic, version, packs_count, count = HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION or count > SEGMENT_CHUNKS:
            raise DamagedError(reason="it does not begin as a segment")
        if len(data) != HEADER.size + packs_count * PACK_ID_BYTES + count * ROW_BYTES:
            raise DamagedError(reason="its length is wrong")
        at = HEADER.size
        packs = [data[at + n * PACK_ID_BYTES : at + (n + 1) * PACK_ID_BYTES] for n in range(packs_count)]
        at += packs_count * PACK_ID_BYTES
        columns: list[tuple[int, ...]] = []
        for kind, size in (("H", 2), ("H", 2), ("I", 4), ("I", 4)):
            columns.append(struct.Struct(f"<{count}{kind}").unpack_from(data, at))
            at += size * count
        chunks = {}
        for row, (position, pack, offset, length) in enumerate(zip(*columns, strict=True)):
            if position >= SEGMENT_CHUNKS or (length and pack >= packs_count):
                raise DamagedError(reason=f"row {row} makes no sense")
            name = data[at + row * ID_BYTES : at + (row + 1) * ID_BYTES]
            chunks[position] = Place(packs[pack], offset, length, name) if length else ZERO_PLACE
        return cls(chunks)


def _column(kind: str, values: list[int]) -> bytes:
    return struct.Struct(f"<{len(values)}{kind}").pack(*values)

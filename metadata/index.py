"""The metadata space map's index: one block with the places of up to 255 bitmaps.

In: codec of that block. Out: the data space map's index, which is a B-tree with the same records.
Layout: struct disk_metadata_index, dm-space-map-common.h. Entries past the number of bitmaps are
normally zero but hold garbage in some pools; they are kept as they are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .checksum import BlockKind, seal, verify
from .layout import BLOCK_BYTES, INDEX_ENTRIES_MAX, INDEX_RECORD, ValueArray

_HEADER = struct.Struct("<IIQ")
assert _HEADER.size + INDEX_ENTRIES_MAX * INDEX_RECORD.itemsize == BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Index:
    """`entries` has shape (255,) and dtype INDEX_RECORD: location, free, none_free_before."""

    entries: ValueArray
    padding: int = 0

    def encode(self, location: int) -> bytes:
        """The 4096 bytes at `location`, checksum included."""
        block = bytearray(BLOCK_BYTES)
        _HEADER.pack_into(block, 0, 0, self.padding, location)
        block[_HEADER.size :] = self.entries.tobytes()
        return seal(block, BlockKind.INDEX, location)


def empty_index() -> Index:
    """An index of no bitmaps."""
    return Index(np.zeros(INDEX_ENTRIES_MAX, INDEX_RECORD))


def decode_index(raw: bytes, location: int) -> Index:
    """Decode and verify. Raises BlockDamaged."""
    verify(raw, BlockKind.INDEX, location)
    entries = np.frombuffer(raw, INDEX_RECORD, INDEX_ENTRIES_MAX, _HEADER.size).copy()
    return Index(entries, _HEADER.unpack_from(raw)[1])

"""Space map bitmaps: two bits of reference count for each of 16320 blocks.

In: codec of one bitmap block and of its index entry. Out: counts of three and more (overflow tree),
where bitmaps live (index).

The pair of bits of a block is stored with its *high* bit first (dm-space-map-common.c, sm_lookup_bitmap):
raw pairs read 0b00, 0b10, 0b01, 0b11 for the counts 0, 1, 2 and "three or more". Translation goes
through tables a byte (four blocks) at a time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .checksum import BlockKind, seal, verify
from .layout import BLOCK_BYTES, COUNT_OVERFLOW, ENTRIES_PER_BITMAP, U8Array, U32Array

_HEADER = struct.Struct("<IIQ")
_SWAP = np.array([0, 2, 1, 3], np.uint8)
_BYTES = np.arange(256, dtype=np.uint32)
# _COUNTS[byte] are the four counts a byte holds; _USED[byte] has one bit for each that is not zero.
_COUNTS = np.stack([_SWAP[(_BYTES >> shift) & 3] for shift in (0, 2, 4, 6)], axis=1).astype(np.uint32)
_USED = ((_COUNTS != 0) * np.array([8, 4, 2, 1])).sum(axis=1).astype(np.uint8)
assert _HEADER.size == 16


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One decoded bitmap: `counts` has shape (16320,), dtype uint32, values 0..3."""

    counts: U32Array
    unused: int = 0

    def encode(self, location: int) -> bytes:
        """The 4096 bytes at `location`; counts above three are stored as "three or more"."""
        pairs = _SWAP[np.minimum(self.counts, COUNT_OVERFLOW)].reshape(-1, 4)
        block = bytearray(BLOCK_BYTES)
        _HEADER.pack_into(block, 0, 0, self.unused, location)
        packed = pairs[:, 0] | pairs[:, 1] << 2 | pairs[:, 2] << 4 | pairs[:, 3] << 6
        block[_HEADER.size :] = packed.astype(np.uint8).tobytes()
        return seal(block, BlockKind.BITMAP, location)


def decode_bitmap(raw: bytes, location: int) -> Bitmap:
    """Decode and verify. Raises BlockDamaged."""
    verify(raw, BlockKind.BITMAP, location)
    counts = _COUNTS[np.frombuffer(raw, np.uint8, offset=_HEADER.size)].reshape(-1)
    return Bitmap(counts, _HEADER.unpack_from(raw)[1])


def used_bits(raw: bytes, location: int) -> U8Array:
    """Verify and give one bit for each block, set where the count is not zero.

    Shape (2040,), uint8; the lowest block is the most significant bit of the first byte. Raises BlockDamaged.
    """
    verify(raw, BlockKind.BITMAP, location)
    nibbles = _USED[np.frombuffer(raw, np.uint8, offset=_HEADER.size)]
    packed: U8Array = nibbles[0::2] << np.uint8(4) | nibbles[1::2]
    return packed


def summary(counts: U32Array) -> tuple[int, int]:
    """(free, none_free_before) of an index entry for a bitmap with these 16320 counts.

    `free` counts the whole bitmap even where the space map ends inside it, as the kernel does: extending
    the map then finds the new blocks free. `none_free_before` is exact, so never above the first free entry.
    """
    free = ENTRIES_PER_BITMAP - int(np.count_nonzero(counts))
    return free, int(np.argmin(counts != 0)) if free else ENTRIES_PER_BITMAP

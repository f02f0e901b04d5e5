"""Constants and limits of the dm-thin on-disk format, and the distinct integer types of its addresses.

In: numbers every codec agrees on, with their origin. Out: structures (one module each), algorithms.
All numbers come from the Linux kernel (drivers/md/dm-thin-metadata.c and drivers/md/persistent-data/);
integers on disk are little-endian.
"""

from __future__ import annotations

from typing import Any, NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

MetadataBlock = NewType("MetadataBlock", int)
DataBlock = NewType("DataBlock", int)
ThinBlock = NewType("ThinBlock", int)
DeviceId = NewType("DeviceId", int)

U8Array: TypeAlias = NDArray[np.uint8]
U32Array: TypeAlias = NDArray[np.uint32]
U64Array: TypeAlias = NDArray[np.uint64]
BoolArray: TypeAlias = NDArray[np.bool_]
# Values of a tree node: uint64, uint32 or one of the record types below, always one-dimensional.
ValueArray: TypeAlias = NDArray[Any]

BLOCK_BYTES = 4096
BLOCK_SECTORS = 8
SECTOR_BYTES = 512

SUPERBLOCK_LOCATION = 0
SUPERBLOCK_MAGIC = 27022010
SUPERBLOCK_VERSION = 2
NEEDS_CHECK_FLAG = 1

# dm-space-map-common.h: a bitmap block is a 16-byte header and two bits for each block it describes.
ENTRIES_PER_BITMAP = (BLOCK_BYTES - 16) * 4
INDEX_ENTRIES_MAX = 255
METADATA_BLOCKS_MAX = INDEX_ENTRIES_MAX * ENTRIES_PER_BITMAP
# A bitmap stores 0, 1, 2 exactly; 3 says "the count is in the overflow tree".
COUNT_OVERFLOW = 3
COUNT_MAX = 2**32 - 1

# dm-btree-internal.h
NODE_HEADER_BYTES = 32
NODE_INTERNAL = 1
NODE_LEAF = 2
KEY_LIMIT = 2**64
# Eleven levels of minimally filled nodes already hold more than 2**64 keys: a deeper path is a loop.
TREE_DEPTH_MAX = 12

DEVICE_ID_LIMIT = 2**24
DATA_BLOCK_LIMIT = 2**40
TIME_BITS = 24
TIME_LIMIT = 2**24
DATA_BLOCK_SECTORS_MIN = 128
DATA_BLOCK_SECTORS_MAX = 2097152

INDEX_RECORD = np.dtype([("location", "<u8"), ("free", "<u4"), ("none_free_before", "<u4")])
DETAILS_RECORD = np.dtype(
    [
        ("mapped_blocks", "<u8"),
        ("transaction_id", "<u8"),
        ("creation_time", "<u4"),
        ("snapshotted_time", "<u4"),
    ]
)
# The value types of the format's trees by their size on disk; the size alone identifies the type.
VALUE_TYPES: dict[int, np.dtype[Any]] = {
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
    16: INDEX_RECORD,
    24: DETAILS_RECORD,
}

assert INDEX_RECORD.itemsize == 16
assert DETAILS_RECORD.itemsize == 24
assert ENTRIES_PER_BITMAP == 16320


def max_entries(value_bytes: int) -> int:
    """Entries that fit a node with values of this size; always a multiple of three (dm-btree.c)."""
    return (BLOCK_BYTES - NODE_HEADER_BYTES) // (8 + value_bytes) // 3 * 3


def bitmaps_for(blocks: int) -> int:
    """Bitmap blocks needed to describe `blocks` blocks."""
    return -(-blocks // ENTRIES_PER_BITMAP)


def pack_mapping(data_block: int, time: int) -> int:
    """The on-disk value of a mapping: 40 bits of data block, 24 bits of time."""
    return data_block << TIME_BITS | time


def unpack_mapping(value: int) -> tuple[int, int]:
    """Inverse of `pack_mapping`: (data block, time)."""
    return value >> TIME_BITS, value & (TIME_LIMIT - 1)

"""What changed between two devices, by comparing their mappings leaf by leaf."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from metadata import PoolMetadata

SAME, CHANGED = 0, 1
MAPPINGS_MAX = 1 << 16


def _gather(
    metadata: PoolMetadata, device_id: int, begin: int, end: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
    """Keys and data blocks of a device in [begin, end), and where reading stopped (`end` unless there are many)."""
    keys: list[NDArray[np.uint64]] = []
    blocks: list[NDArray[np.uint64]] = []
    count = 0
    for leaf_keys, leaf_values in metadata.mappings(device_id, begin, end):
        keys.append(leaf_keys)
        blocks.append(leaf_values >> np.uint64(24))
        count += len(leaf_keys)
        if count >= MAPPINGS_MAX:
            end = int(leaf_keys[-1]) + 1
            break
    if not keys:
        return np.empty(0, np.uint64), np.empty(0, np.uint64), end
    return np.concatenate(keys), np.concatenate(blocks), end


def changed_blocks(
    metadata: PoolMetadata, devices: tuple[int, int], begin: int, end: int
) -> tuple[NDArray[np.uint64], int]:
    """Virtual blocks of [begin, end) that the two devices map differently, and the end of what was compared."""
    old_keys, old_blocks, old_end = _gather(metadata, devices[0], begin, end)
    new_keys, new_blocks, new_end = _gather(metadata, devices[1], begin, end)
    end = min(old_end, new_end)
    old_kept, new_kept = old_keys < end, new_keys < end
    old_keys, old_blocks = old_keys[old_kept], old_blocks[old_kept]
    new_keys, new_blocks = new_keys[new_kept], new_blocks[new_kept]
    common, in_old, in_new = np.intersect1d(old_keys, new_keys, assume_unique=True, return_indices=True)
    same = common[old_blocks[in_old] == new_blocks[in_new]]
    return np.setdiff1d(np.union1d(old_keys, new_keys), same, assume_unique=True), end


def changed_ranges(
    metadata: PoolMetadata, devices: tuple[int, int], block_bytes: int, offset: int, length: int
) -> list[tuple[int, int]]:
    """(length_bytes, CHANGED or SAME) of consecutive ranges from byte `offset`; a prefix where there are many."""
    begin, end = offset // block_bytes, -(-(offset + length) // block_bytes)
    blocks, compared_to = changed_blocks(metadata, devices, begin, end)
    limit = min(offset + length, compared_to * block_bytes)
    ranges: list[tuple[int, int]] = []
    position = offset
    breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
    for run in np.split(blocks, breaks):
        if not len(run):
            continue
        low = max(int(run[0]) * block_bytes, offset)
        high = min((int(run[-1]) + 1) * block_bytes, limit)
        if low > position:
            ranges.append((low - position, SAME))
        ranges.append((high - low, CHANGED))
        position = high
    if position < limit:
        ranges.append((limit - position, SAME))
    return ranges

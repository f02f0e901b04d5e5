"""What changed between two devices, as ranges of bytes: data, holes, and what stayed the same.

In: the three states, ranges of a device out of the differences of two mapping trees (`metadata/difference.py`), and
the answer to an NBD dirty context. Out: moving the ranges anywhere (`sending.py`).

Two devices that map a block to the same data block have equal content there: whoever writes to a shared block gets a
copy first. The other way round nothing is promised: blocks that differ may hold equal bytes. A block that was mapped
and is not any more has become a hole and reads as zeros; it is kept apart from data, because a copy that leaves it
out keeps the old bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from metadata import ABSENT, Difference, PoolMetadata

DIRTY_EXTENTS_MAX = 1 << 15


class Change(IntEnum):
    """How a range of a device compares with an older device."""

    SAME = 0
    DATA = 1  # mapped to other data blocks
    HOLE = 2  # was mapped and is not any more: reads as zeros


@dataclass(frozen=True, slots=True)
class ChangedRange:
    """`length_bytes` from `offset_bytes` on, in the newer device."""

    offset_bytes: int
    length_bytes: int
    change: Change

    @property
    def end_bytes(self) -> int:
        """The first byte behind it."""
        return self.offset_bytes + self.length_bytes


def changed_ranges(
    metadata: PoolMetadata, old_id: int | None, new_id: int, block_bytes: int, size_bytes: int
) -> Iterator[ChangedRange]:
    """Ranges of the newer device that are not as in the older one, ascending, neighbours of one kind joined.

    `old_id` None compares with a device that is all holes. `size_bytes` is the size of the newer device: nothing
    beyond it is told. Nothing may change meanwhile. Raises NoSuchDevice, BlockDamaged, OSError.
    """
    end = -(-size_bytes // block_bytes)
    return joined(metadata.differences(old_id, new_id, 0, end), block_bytes, size_bytes)


def joined(differences: Iterable[Difference], block_bytes: int, size_bytes: int) -> Iterator[ChangedRange]:
    """The ranges of consecutive differences; `size_bytes` cuts the last block of a device."""
    last: ChangedRange | None = None
    for difference in differences:
        for found in _ranges_of(difference, block_bytes, size_bytes):
            if last is not None and last.end_bytes == found.offset_bytes and last.change == found.change:
                last = ChangedRange(last.offset_bytes, last.length_bytes + found.length_bytes, last.change)
                continue
            if last is not None:
                yield last
            last = found
    if last is not None:
        yield last


def _ranges_of(difference: Difference, block_bytes: int, size_bytes: int) -> Iterator[ChangedRange]:
    keys, holes = difference.keys, difference.new == np.uint64(ABSENT)
    if not len(keys):
        return
    breaks = np.flatnonzero((np.diff(keys) != 1) | (np.diff(holes) != 0)) + 1
    starts = np.concatenate(([0], breaks)).tolist()
    ends = np.concatenate((breaks, [len(keys)])).tolist()
    for start, end in zip(starts, ends, strict=True):
        low = int(keys[start]) * block_bytes
        high = min((int(keys[start]) + end - start) * block_bytes, size_bytes)
        if low < high:
            yield ChangedRange(low, high - low, Change.HOLE if holes[start] else Change.DATA)


def dirty_extents(
    metadata: PoolMetadata, devices: tuple[int, int], block_bytes: int, offset: int, length: int
) -> list[tuple[int, int]]:
    """(length_bytes, 1 changed or 0 same) of consecutive ranges from byte `offset` on; a prefix where there are many.

    `devices` are the older and the newer one. Raises NoSuchDevice, BlockDamaged, OSError.
    """
    limit = offset + length
    begin, end = offset // block_bytes, -(-limit // block_bytes)
    extents: list[tuple[int, int]] = []
    position = offset
    for difference in metadata.differences(*devices, begin, end):
        for found in _ranges_of(difference, block_bytes, limit):
            low = max(found.offset_bytes, offset)
            _extend(extents, low - position, 0)
            _extend(extents, found.end_bytes - low, 1)
            position = found.end_bytes
        compared = min(difference.end * block_bytes, limit)
        _extend(extents, compared - position, 0)
        position = compared
        if len(extents) >= DIRTY_EXTENTS_MAX:
            break
    return extents


def _extend(extents: list[tuple[int, int]], length: int, flag: int) -> None:
    if length <= 0:
        return
    if extents and extents[-1][1] == flag:
        length += extents.pop()[0]
    extents.append((length, flag))

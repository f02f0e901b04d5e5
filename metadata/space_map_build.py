"""Writing both space maps anew from reference counts: the end of making a pool, and of counting one again.

In: bitmaps, indexes and overflow trees for given counts, written one after another. Out: the counts (pool_build, mend),
the superblock that names the maps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bitmap import Bitmap, summary
from .checksum import BlockKind, seal
from .index import Index, empty_index
from .layout import (
    BLOCK_BYTES,
    COUNT_OVERFLOW,
    ENTRIES_PER_BITMAP,
    INDEX_RECORD,
    SUPERBLOCK_LOCATION,
    U32Array,
    U64Array,
    ValueArray,
    bitmaps_for,
)
from .superblock import SpaceMapRoot
from .tree_build import BlockSink, TreeBuilder

# The counts of 16320 blocks, shape (16320,), None for none in use.
Counts = Callable[[int], U32Array | None]


def build_tree(sink: BlockSink, keys: U64Array, values: ValueArray, builder: TreeBuilder) -> int:
    """A tree with one reference to it, from the superblock; its root. Raises MetadataFull, OSError."""
    builder.add(keys, values)
    root = builder.finish()
    sink.refer(np.array([root], np.uint64))
    return root


class SpaceMapBuilder:
    """Writes the data map, then the metadata map, through `sink`. Raises MetadataFull, OSError."""

    def __init__(self, sink: BlockSink) -> None:
        self._sink = sink

    def data_space(self, blocks: int, counts: Counts) -> SpaceMapRoot:
        """The map of `blocks` data blocks."""
        records = np.zeros(bitmaps_for(blocks), INDEX_RECORD)
        exact_blocks: list[U64Array] = []
        exact_counts: list[U32Array] = []
        allocated = 0
        for number in range(len(records)):
            found = counts(number)
            records[number] = self._bitmap(found)
            allocated += ENTRIES_PER_BITMAP - int(records[number]["free"])
            if found is not None:
                exact = np.flatnonzero(found >= COUNT_OVERFLOW)
                exact_blocks.append((exact + number * ENTRIES_PER_BITMAP).astype(np.uint64))
                exact_counts.append(found[exact])
        self._sink.refer(records["location"])
        numbers = np.arange(len(records), dtype=np.uint64)
        index_root = build_tree(self._sink, numbers, records, TreeBuilder(self._sink, 16))
        overflow_root = build_tree(
            self._sink,
            np.concatenate([np.empty(0, np.uint64), *exact_blocks]),
            np.concatenate([np.empty(0, np.uint32), *exact_counts]),
            TreeBuilder(self._sink, 4),
        )
        return SpaceMapRoot(blocks, allocated, index_root, overflow_root)

    def metadata_space(self, blocks: int, kept: U32Array | None = None) -> SpaceMapRoot:
        """The map of all metadata blocks, its own included: bitmaps and index come last and have one reference each.

        `kept`: references to blocks that the sink did not write, shape (blocks,).
        """
        sink = self._sink
        bitmaps = bitmaps_for(blocks)
        counts = np.zeros(bitmaps * ENTRIES_PER_BITMAP, np.uint32)
        if kept is not None:
            counts[:blocks] = kept
        counts[: sink.used_blocks] += sink.references()[: len(counts)]
        counts[SUPERBLOCK_LOCATION] = 1
        exact = np.flatnonzero(counts >= COUNT_OVERFLOW)
        before = sink.used_blocks
        overflow_root = build_tree(sink, exact.astype(np.uint64), counts[exact], TreeBuilder(sink, 4))
        own = sink.references()[before:]  # nodes of the overflow tree: one reference each
        last = sink.used_blocks + bitmaps + 1
        counts[before : sink.used_blocks] = own
        counts[sink.used_blocks : last] = 1
        entries = empty_index().entries
        for number in range(bitmaps):
            begin = number * ENTRIES_PER_BITMAP
            entries[number] = self._bitmap(counts[begin : begin + ENTRIES_PER_BITMAP])
        place = sink.append(Index(entries).encode(sink.location()))
        return SpaceMapRoot(blocks, int(np.count_nonzero(counts[:blocks])), place, overflow_root)

    def _bitmap(self, counts: U32Array | None) -> tuple[int, int, int]:
        """Write a bitmap; its record for the index."""
        location = self._sink.location()
        if counts is None:
            block, figures = seal(bytearray(BLOCK_BYTES), BlockKind.BITMAP, location), (ENTRIES_PER_BITMAP, 0)
        else:
            block, figures = Bitmap(counts).encode(location), summary(counts)
        self._sink.append(block)
        return location, *figures

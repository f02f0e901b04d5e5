# ruff: noqa: EM101 -- what is passed to an error is a field, the sentence is made when it is printed
"""The two space maps on disk: bitmaps found through an index, and an overflow tree for counts of three and more.

In: reading committed counts, and rewriting what changed at commit. Out: the counts themselves (counts).

The data map's index is a B-tree of index records; the metadata map's index is one block. Blocks of
both maps are metadata blocks, counted in the metadata map. So rewriting a map allocates metadata blocks: the
data map is settled first, then the metadata map, which is its own customer and needs a fixpoint: each
bitmap, overflow node and the index is moved to a new place at most once in a transaction, so passes are
repeated until one of them moves nothing; only then are the bitmaps encoded, from the final counts.
"""

from __future__ import annotations

import numpy as np

from .bitmap import Bitmap, decode_bitmap, summary, used_bits
from .block_cache import BlockCache
from .btree import NodeSource, leaves, lookup
from .btree_edit import TreeEditor
from .btree_insert import TreeInserter
from .btree_remove import TreeRemover
from .checksum import BlockKind
from .counts import CountTable
from .errors import CountDamaged
from .index import Index, decode_index, empty_index
from .layout import (
    COUNT_OVERFLOW,
    ENTRIES_PER_BITMAP,
    INDEX_RECORD,
    U8Array,
    U32Array,
    U64Array,
    ValueArray,
    bitmaps_for,
)
from .superblock import SpaceMapRoot
from .transaction import Transaction
from .tree_kind import TreeKind

OVERFLOW_KIND = TreeKind("overflow counts", 4)
INDEX_KIND = TreeKind("data space map index", 16)


def complete_counts(
    space: str, chunk: int, counts: U32Array, source: NodeSource, overflow_root: int
) -> U32Array:
    """Replace each "three or more" of a decoded bitmap by the count in the overflow tree.

    Raises:
        CountDamaged: such a count is missing from the tree.
        BlockDamaged: the tree cannot be read.
    """
    waiting = counts == COUNT_OVERFLOW
    if not waiting.any():
        return counts
    base = chunk * ENTRIES_PER_BITMAP
    found = np.zeros(ENTRIES_PER_BITMAP, np.uint32)
    for keys, values in leaves(source, 4, overflow_root, base, base + ENTRIES_PER_BITMAP):
        found[(keys - np.uint64(base)).astype(np.int64)] = values
    missing = waiting & (found < COUNT_OVERFLOW)
    if missing.any():
        raise CountDamaged(space, base + int(np.argmax(missing)), "is missing from the overflow tree")
    return np.where(waiting, found, counts)


class _Overflow:
    """The overflow tree of one map, and which of this transaction's changes it has taken in."""

    def __init__(self, transaction: Transaction, counts: CountTable, root: int) -> None:
        self._editor = TreeEditor(transaction, OVERFLOW_KIND)
        self._counts = counts
        self.root = root
        self._applied: dict[int, int] = {}

    def settle(self) -> bool:
        """Bring the tree up to the current counts; returns whether it had to change."""
        wanted: dict[int, int] = {}
        for chunk in self._counts.touched():
            saved, current = self._counts.saved(chunk), self._counts.chunk(chunk)
            moved = (saved != current) & ((saved >= COUNT_OVERFLOW) | (current >= COUNT_OVERFLOW))
            places = np.flatnonzero(moved)
            blocks = (places + chunk * ENTRIES_PER_BITMAP).tolist()
            for block, count in zip(blocks, current[places].tolist(), strict=True):
                if self._applied.get(block) != count:
                    wanted[block] = count
        if not wanted:
            return False
        self._applied |= wanted
        blocks_array = np.array(sorted(wanted), np.uint64)
        counts_array = np.array([wanted[int(block)] for block in blocks_array.tolist()], np.uint32)
        kept = counts_array >= COUNT_OVERFLOW
        self.root = TreeInserter(self._editor).insert(self.root, blocks_array[kept], counts_array[kept])
        self.root = TreeRemover(self._editor).remove_keys(self.root, blocks_array[~kept])
        return True

    def finish(self) -> None:
        """The changes taken in are committed."""
        self._applied.clear()


class DataSpaceMap:
    """Reference counts of data blocks."""

    def __init__(self, transaction: Transaction, root: SpaceMapRoot) -> None:
        self._transaction = transaction
        self._index_root = root.bitmap_root
        self._allocated = root.allocated
        self._bitmaps = bitmaps_for(root.blocks)
        self.counts = CountTable("data", root.blocks, self._load)
        self._overflow = _Overflow(transaction, self.counts, root.overflow_root)

    @property
    def overflow_root(self) -> int:
        """Root of the overflow tree."""
        return self._overflow.root

    @property
    def index_root(self) -> int:
        """Root of the index tree."""
        return self._index_root

    @property
    def allocated(self) -> int:
        """Blocks in use now, this transaction included."""
        return self._allocated + self.counts.allocated_change()

    @property
    def missing_bitmaps(self) -> int:
        """Bitmaps that growing made necessary and the next commit will allocate."""
        return bitmaps_for(self.counts.blocks) - self._bitmaps

    def grow(self, blocks: int) -> None:
        """Add free blocks at the end."""
        self.counts.extend(blocks)

    def adopt_layout(self, index_root: int, overflow_root: int) -> None:
        """Use these empty trees, made by the formatter, for a map that has none yet."""
        self._index_root = index_root
        self._overflow.root = overflow_root

    def _load(self, chunk: int) -> U32Array:
        if chunk >= self._bitmaps:
            return np.zeros(ENTRIES_PER_BITMAP, np.uint32)
        location = self._bitmap_location(chunk)
        counts = decode_bitmap(self._transaction.raw(location, BlockKind.BITMAP), location).counts
        return complete_counts("data", chunk, counts, self._transaction, self._overflow.root)

    def _bitmap_location(self, chunk: int) -> int:
        record = lookup(self._transaction, 16, self._index_root, chunk)
        if record is None:
            raise CountDamaged("data", chunk * ENTRIES_PER_BITMAP, "has no bitmap in the index")
        return int(record["location"])

    def used_bits(self) -> U8Array:
        """One bit per block, most significant first: in use in the committed map or now.

        Shape (2040 * bitmaps,), uint8. Reads every bitmap not in memory yet, and while at it corrects the
        committed number of used blocks, which some tools record wrongly. Raises BlockDamaged, CountDamaged.
        """
        chunks = bitmaps_for(self.counts.blocks)
        per_chunk = ENTRIES_PER_BITMAP // 8
        bits = np.zeros((chunks, per_chunk), np.uint8)
        allocated = 0
        seen = 0
        for keys, records in leaves(self._transaction, 16, self._index_root, 0, self._bitmaps):
            for chunk, location in zip(keys.tolist(), records["location"].tolist(), strict=True):
                seen += 1
                if self.counts.is_loaded(chunk):
                    continue
                raw = self._transaction.raw(location, BlockKind.BITMAP)
                bits[chunk] = used_bits(raw, location)
                allocated += int(np.bitwise_count(bits[chunk]).sum())
        if seen != self._bitmaps:
            raise CountDamaged("data", 0, f"cannot be known: {seen} of {self._bitmaps} bitmaps are indexed")
        for chunk in range(chunks):
            if self.counts.is_loaded(chunk):
                saved = self.counts.saved(chunk)
                allocated += int(np.count_nonzero(saved))
                bits[chunk] = np.packbits((saved > 0) | (self.counts.chunk(chunk) > 0))
        self._allocated = allocated
        return bits.reshape(-1)

    def settle(self) -> None:
        """Rewrite bitmaps, index and overflow tree of what changed. Raises BlockDamaged, MetadataFull."""
        chunks = [chunk for chunk in self.counts.touched() if self.counts.changed(chunk)]
        wanted = bitmaps_for(self.counts.blocks)
        chunks = sorted({*chunks, *range(self._bitmaps, wanted)})
        if not chunks:
            return
        records = np.zeros(len(chunks), INDEX_RECORD)
        for record, chunk in zip(records, chunks, strict=True):
            if chunk < self._bitmaps:
                place, _ = self._transaction.replace(self._bitmap_location(chunk))
            else:
                place = self._transaction.allocate()
            counts = self.counts.chunk(chunk)
            self._transaction.put(place, Bitmap(counts))
            free, none_free_before = summary(counts)
            record["location"], record["free"], record["none_free_before"] = place, free, none_free_before
        inserter = TreeInserter(TreeEditor(self._transaction, INDEX_KIND))
        self._index_root = inserter.insert(self._index_root, np.array(chunks, np.uint64), records)
        self._bitmaps = wanted
        self._overflow.settle()

    def root(self) -> SpaceMapRoot:
        """The root as it belongs into the superblock after `settle`."""
        return SpaceMapRoot(self.counts.blocks, self.allocated, self._index_root, self._overflow.root)

    def finish(self) -> U64Array:
        """The current counts are committed; returns the blocks that became free, ascending."""
        released = self.counts.released()
        self._allocated = self.allocated
        self.counts.settle()
        self._overflow.finish()
        return released


class MetadataSpaceMap:
    """Reference counts of metadata blocks; owns the table the transaction allocates from."""

    def __init__(self, cache: BlockCache, root: SpaceMapRoot) -> None:
        self._cache = cache
        self._root = root
        self._bitmaps = bitmaps_for(root.blocks)
        self._placed: dict[int, int] = {}
        self.counts = CountTable("metadata", root.blocks, self._load)
        self.index = (
            decode_index(cache.raw(root.bitmap_root, BlockKind.INDEX), root.bitmap_root)
            if root.bitmap_root
            else empty_index()
        )
        self.transaction = Transaction(cache, self.counts)
        self._overflow = _Overflow(self.transaction, self.counts, root.overflow_root)

    @property
    def overflow_root(self) -> int:
        """Root of the overflow tree."""
        return self._overflow.root

    @property
    def allocated(self) -> int:
        """Blocks in use now, this transaction included; exact once `load_all` ran."""
        return self._root.allocated + self.counts.allocated_change()

    @property
    def missing_bitmaps(self) -> int:
        """Bitmaps that growing made necessary and the next commit will allocate."""
        return bitmaps_for(self.counts.blocks) - self._bitmaps

    def _load(self, chunk: int) -> U32Array:
        if chunk >= bitmaps_for(self._root.blocks):
            return np.zeros(ENTRIES_PER_BITMAP, np.uint32)
        location = int(self.index.entries[chunk]["location"])
        counts = decode_bitmap(self._cache.raw(location, BlockKind.BITMAP), location).counts
        return complete_counts("metadata", chunk, counts, self._cache, self._root.overflow_root)

    def load_all(self) -> None:
        """Read all counts: what the allocator needs, and the exact number of used blocks.

        At most 255 bitmaps. Raises BlockDamaged, CountDamaged.
        """
        used = sum(
            int(np.count_nonzero(self.counts.chunk(chunk)))
            for chunk in range(bitmaps_for(self.counts.blocks))
        )
        self._root = SpaceMapRoot(
            self._root.blocks, used, self._root.bitmap_root, self._root.overflow_root, self._root.tail
        )
        self.transaction.recount(used)

    def grow(self, blocks: int) -> None:
        """Add free blocks at the end."""
        self.counts.extend(blocks)

    def adopt_layout(self, index_location: int, overflow_root: int) -> None:
        """Use these blocks, allocated by the formatter, for a map that has none yet, and place its bitmaps."""
        self._root = SpaceMapRoot(0, 0, index_location, overflow_root)
        self._overflow.root = overflow_root
        for chunk in range(bitmaps_for(self.counts.blocks)):
            self._placed[chunk] = self.transaction.allocate()

    def settle(self) -> SpaceMapRoot:
        """Rewrite everything that changed, to the fixpoint, and give the root for the superblock.

        Raises BlockDamaged, MetadataFull.
        """
        transaction = self.transaction
        index_location = self._root.bitmap_root
        entries = self.index.entries.copy()
        wanted = bitmaps_for(self.counts.blocks)
        if transaction.has_changes or wanted > self._bitmaps:
            index_location, _ = transaction.replace(index_location)
            moved: set[int] = set()
            while self._move_bitmaps(entries, moved, wanted) or self._overflow.settle():
                pass
            for chunk in moved:
                free, none_free_before = summary(self.counts.chunk(chunk))
                entries[chunk]["free"], entries[chunk]["none_free_before"] = free, none_free_before
            self.index = Index(entries, self.index.padding)
            transaction.put(index_location, self.index)
            self._bitmaps = wanted
        return SpaceMapRoot(self.counts.blocks, self.allocated, index_location, self._overflow.root)

    def _move_bitmaps(self, entries: ValueArray, moved: set[int], wanted: int) -> bool:
        """Give every bitmap to be rewritten its new place; whether there was any not moved before."""
        changed = {chunk for chunk in self.counts.touched() if self.counts.changed(chunk)}
        waiting = sorted((changed | set(range(self._bitmaps, wanted))) - moved)
        for chunk in waiting:
            if chunk < self._bitmaps:
                place, _ = self.transaction.replace(int(entries[chunk]["location"]))
            else:
                place = self._placed.pop(chunk, 0) or self.transaction.allocate()
            # The table's own memory, not a copy: encoded when the counts are final.
            self.transaction.put(place, Bitmap(self.counts.chunk(chunk)))
            entries[chunk]["location"] = place
            moved.add(chunk)
        return bool(waiting)

    def finish(self, root: SpaceMapRoot) -> None:
        """The current counts are committed."""
        self._root = root
        self._overflow.finish()
        self.transaction.settle(root.allocated)

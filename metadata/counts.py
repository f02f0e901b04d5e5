"""Reference counts in memory: the committed ones, read when first needed, and those of the transaction.

In: the table of counts of one space. Out: where counts come from and how they are written (space_map).

Counts live in one flat array of 32-bit numbers over anonymous memory that costs nothing until it is
touched; they are loaded and tracked in chunks of one bitmap (16320 blocks). The first change to a chunk in a
transaction saves a copy of it, so `committed` values stay available until `settle`, and the set of
saved chunks is exactly the set of bitmaps that need rewriting.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np

from .errors import CountDamaged
from .layout import ENTRIES_PER_BITMAP, BoolArray, U32Array, U64Array, bitmaps_for

# Linux MAP_NORESERVE: a huge, mostly untouched table must not count against overcommit limits.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
# A count this high is one that went below zero.
_UNDERFLOW = 0xF0000000


def _lazy_zeros(length: int) -> U32Array:
    memory = mmap.mmap(-1, max(length, 1) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    return np.frombuffer(memory, np.uint32, length)


class CountTable:
    """Counts of the blocks 0..blocks-1 of one space ("data" or "metadata").

    `load` gives the committed counts of a chunk, shape (16320,), and raises BlockDamaged or CountDamaged.
    """

    def __init__(self, space: str, blocks: int, load: Callable[[int], U32Array]) -> None:
        self.space = space
        self.blocks = blocks
        self._load = load
        chunks = bitmaps_for(blocks)
        self._counts = _lazy_zeros(chunks * ENTRIES_PER_BITMAP)
        self._loaded: BoolArray = np.zeros(chunks, np.bool_)
        self._touched: BoolArray = np.zeros(chunks, np.bool_)
        self._saved: dict[int, U32Array] = {}

    def extend(self, blocks: int) -> None:
        """Add blocks with count zero. Existing chunks keep their state."""
        chunks = bitmaps_for(blocks)
        grown = _lazy_zeros(chunks * ENTRIES_PER_BITMAP)
        for chunk in np.flatnonzero(self._loaded).tolist():
            span = slice(chunk * ENTRIES_PER_BITMAP, (chunk + 1) * ENTRIES_PER_BITMAP)
            grown[span] = self._counts[span]
        added = chunks - len(self._loaded)
        self._counts = grown
        self._loaded = np.append(self._loaded, np.zeros(added, np.bool_))
        self._touched = np.append(self._touched, np.zeros(added, np.bool_))
        self.blocks = blocks

    # Reading

    def chunk(self, chunk: int) -> U32Array:
        """Current counts of one chunk, shape (16320,); a view, not to be written to."""
        span = slice(chunk * ENTRIES_PER_BITMAP, (chunk + 1) * ENTRIES_PER_BITMAP)
        view: U32Array = self._counts[span]
        if not self._loaded[chunk]:
            view[:] = self._load(chunk)
            self._loaded[chunk] = True
        return view

    def saved(self, chunk: int) -> U32Array:
        """Counts of one chunk as they were when the transaction began."""
        saved = self._saved.get(chunk)
        return self.chunk(chunk) if saved is None else saved

    def is_loaded(self, chunk: int) -> bool:
        """Whether the counts of this chunk are in memory already."""
        return bool(self._loaded[chunk])

    def get(self, block: int) -> int:
        """Current count of one block. Raises CountDamaged when there is no such block."""
        if not 0 <= block < self.blocks:
            raise CountDamaged(self.space, block, "is wanted, but there is no such block")
        return int(self.chunk(block // ENTRIES_PER_BITMAP)[block % ENTRIES_PER_BITMAP])

    def committed(self, block: int) -> int:
        """Count of one block when the transaction began."""
        return int(self.saved(block // ENTRIES_PER_BITMAP)[block % ENTRIES_PER_BITMAP])

    def gather(self, blocks: U64Array) -> U32Array:
        """Current counts of many blocks, in their order. Raises CountDamaged."""
        self._prepare(blocks, self._loaded, self.chunk)
        result: U32Array = self._counts[blocks.astype(np.int64)]
        return result

    def span(self, first: int, count: int) -> U32Array:
        """Current counts of `count` consecutive blocks (a copy)."""
        for chunk in range(first // ENTRIES_PER_BITMAP, bitmaps_for(first + count)):
            self.chunk(chunk)
        return self._counts[first : first + count].copy()

    # Changing

    def increase(self, blocks: U64Array) -> None:
        """One more reference to each of `blocks`, which may repeat. Raises CountDamaged."""
        self._prepare(blocks, self._touched, self._touch)
        np.add.at(self._counts, blocks.astype(np.int64), 1)

    def decrease(self, blocks: U64Array) -> None:
        """One reference less to each of `blocks`, which may repeat.

        Raises:
            CountDamaged: a count was zero already; the counts are then wrong and the transaction is lost.
        """
        self._prepare(blocks, self._touched, self._touch)
        places = blocks.astype(np.int64)
        np.subtract.at(self._counts, places, 1)
        below = self._counts[places] >= _UNDERFLOW
        if below.any():
            raise CountDamaged(self.space, int(blocks[int(np.argmax(below))]), "is lower than its uses")

    def change(self, block: int, step: int) -> int:
        """Add `step` (+1 or -1) to one block's count and return the new count. Raises CountDamaged."""
        if not 0 <= block < self.blocks:
            raise CountDamaged(self.space, block, "would be changed, but there is no such block")
        chunk = block // ENTRIES_PER_BITMAP
        if not self._touched[chunk]:
            self._touch(chunk)
        count = int(self._counts[block]) + step
        if count < 0:
            raise CountDamaged(self.space, block, "is lower than its uses")
        self._counts[block] = count
        return count

    def _touch(self, chunk: int) -> None:
        self._saved[chunk] = self.chunk(chunk).copy()
        self._touched[chunk] = True

    def _prepare(self, blocks: U64Array, ready: BoolArray, make: Callable[[int], object]) -> None:
        """Run `make` for every chunk of `blocks` that is not `ready`."""
        if not len(blocks):
            return
        highest = int(blocks.max())
        if highest >= self.blocks:
            raise CountDamaged(self.space, highest, "is wanted, but there is no such block")
        chunks = (blocks // np.uint64(ENTRIES_PER_BITMAP)).astype(np.int64)
        waiting = ~ready[chunks]
        if waiting.any():
            for chunk in np.unique(chunks[waiting]).tolist():
                make(chunk)

    # The transaction

    def touched(self) -> list[int]:
        """Chunks saved in this transaction, ascending."""
        return sorted(self._saved)

    def changed(self, chunk: int) -> bool:
        """Whether any count of a touched chunk differs from the committed one."""
        return not np.array_equal(self._saved[chunk], self.chunk(chunk))

    def allocated_change(self) -> int:
        """Blocks in use now minus blocks in use when the transaction began."""
        return sum(
            int(np.count_nonzero(self.chunk(chunk))) - int(np.count_nonzero(saved))
            for chunk, saved in self._saved.items()
        )

    def released(self) -> U64Array:
        """Blocks in use when the transaction began and not now, ascending."""
        parts = [
            np.flatnonzero((self._saved[chunk] > 0) & (self.chunk(chunk) == 0)) + chunk * ENTRIES_PER_BITMAP
            for chunk in self.touched()
        ]
        return np.concatenate(parts).astype(np.uint64) if parts else np.empty(0, np.uint64)

    def settle(self) -> None:
        """The current counts are the committed ones now."""
        self._saved.clear()
        self._touched[:] = False

"""The block map of one open device: virtual block -> where it is, as a flat array of machine integers.

An *entry* is the on-disk mapping value with its data block raised by one, `(data_block + 1) << 24 | time`, so
that one comparison tells all there is to know on the hot path:

    0                    not loaded from the tree yet
    1                    loaded, not mapped (reads as zeros)
    >= MAPPED (1 << 24)  mapped; `(entry >> 24) - 1` is the data block, `entry & TIME` its time

The array lives in anonymous memory and costs only the pages that were touched, so a device of 1 PiB is as cheap
as a small one. It is filled a chunk of 512 entries (one page) at a time; a bitarray says which are filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from .free_map import anonymous_memory, zeroed_bits

MAPPED = 1 << 24
TIME = MAPPED - 1
UNMAPPED = 1
CHUNK_BLOCKS = 512
ENTRY_BYTES = 8
LEAVES_BLOCKS_MAX = 1 << 20  # asked of the tree at once

Leaves = Iterable[tuple[NDArray[np.uint64], NDArray[np.uint64]]]
Loader = Callable[[int, int], Leaves]


def entry_of(data_block: int, time: int) -> int:
    """The entry of a mapping."""
    return (data_block + 1) << 24 | time


class BlockMap:
    """Entries of one device, `blocks` of them. The device's lock guards every change.

    `load(begin, end)` yields the mappings of the tree in that range, leaf by leaf.
    `entries` is a signed 64-bit memoryview: single look-ups index it, never a numpy scalar.
    """

    def __init__(self, blocks: int, load: Loader) -> None:
        self.blocks = blocks
        chunks = -(-blocks // CHUNK_BLOCKS)
        self._capacity = max(chunks, 1) * CHUNK_BLOCKS
        memory = anonymous_memory(self._capacity * ENTRY_BYTES)
        self.entries = memoryview(memory).cast("q")
        self._array: NDArray[np.uint64] = np.frombuffer(memory, dtype=np.uint64)
        self._loaded = zeroed_bits(chunks)
        self._load = load

    def extend(self, blocks: int) -> bool:
        """Cover more blocks; False where the memory set aside does not reach so far."""
        if blocks > self._capacity:
            return False
        self.blocks = max(self.blocks, blocks)
        return True

    def ensure(self, first: int, last: int) -> None:
        """Load the chunks of blocks `first` to `last` (inclusive) that are not loaded."""
        begin, end = first // CHUNK_BLOCKS, last // CHUNK_BLOCKS + 1
        chunk = self._loaded.find(0, begin, end)
        while chunk >= 0:
            self._fill(chunk)
            chunk = self._loaded.find(0, chunk + 1, end)

    def _fill(self, chunk: int) -> None:
        begin = chunk * CHUNK_BLOCKS
        page = np.full(CHUNK_BLOCKS, UNMAPPED, dtype=np.uint64)
        for keys, values in self._load(begin, begin + CHUNK_BLOCKS):
            page[keys - np.uint64(begin)] = values + np.uint64(MAPPED)
        self._array[begin : begin + CHUNK_BLOCKS] = page
        self._loaded[chunk] = 1

    def leaves(self, begin: int, end: int) -> Leaves:
        """The mappings of [begin, end) as they are read, in order: those in memory, and the tree's elsewhere."""
        while begin < end:
            chunk = begin // CHUNK_BLOCKS
            if self._loaded[chunk]:
                until = min(end, (chunk + 1) * CHUNK_BLOCKS)
                yield self.mapped(np.arange(begin, until, dtype=np.uint64))
            else:
                loaded = self._loaded.find(1, chunk)
                until = end if loaded < 0 else min(end, loaded * CHUNK_BLOCKS)
                until = min(until, begin + LEAVES_BLOCKS_MAX)
                yield from self._load(begin, until)
            begin = until

    def unmap(self, begin: int, end: int) -> None:
        """Mark [begin, end) unmapped where it is loaded; what is not loaded will be read from the tree."""
        first, last = begin // CHUNK_BLOCKS, (end - 1) // CHUNK_BLOCKS
        for chunk in self._loaded.search(1, first, last + 1):
            low, high = chunk * CHUNK_BLOCKS, (chunk + 1) * CHUNK_BLOCKS
            self._array[max(low, begin) : min(high, end)] = UNMAPPED

    def mapped(self, blocks: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Those of `blocks` (loaded, ascending) that are mapped, with their on-disk values."""
        entries = self._array[blocks]
        kept = entries >= MAPPED
        return blocks[kept], entries[kept] - np.uint64(MAPPED)

    def older_than(self, chunk: int, time: int) -> NDArray[np.uint64]:
        """Mapped blocks of a loaded chunk whose time is before `time`: shared, as far as times tell."""
        begin = chunk * CHUNK_BLOCKS
        entries = self._array[begin : begin + CHUNK_BLOCKS]
        old = (entries >= MAPPED) & ((entries & np.uint64(TIME)) < time)
        return np.flatnonzero(old).astype(np.uint64) + np.uint64(begin)

    def restamp(self, blocks: NDArray[np.uint64], time: int) -> None:
        """Give mapped blocks a new time."""
        self._array[blocks] = (self._array[blocks] & ~np.uint64(TIME)) | np.uint64(time)

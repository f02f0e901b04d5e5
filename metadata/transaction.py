"""The running transaction: blocks changed in memory, block allocation, reference counts of metadata blocks.

In: copy-on-write of single blocks and the rule that nothing committed is overwritten or reused early.
Out: what the blocks mean (trees, space maps), writing them (commit).

Theory of operation. Every changed block is a *new* block: it was allocated in this transaction, at a
place that is free in the committed map, and lives in `_dirty` as an encodable object until commit. A
block freed in this transaction keeps its committed count in the table of saved counts, so the allocator,
which takes only blocks free both then and now, cannot hand it out before the commit that frees it. A block
allocated and freed within one transaction was never reachable from a superblock and is reusable at once.
Counting never recurses: allocation changes only the in-memory table; bitmaps are rewritten at commit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from .block_cache import BlockCache
from .btree import read_leaf
from .checksum import BlockKind
from .counts import CountTable
from .errors import BlockDamaged, Damage, MetadataFull
from .layout import ENTRIES_PER_BITMAP, U32Array, U64Array, ValueArray, bitmaps_for
from .node import Node


class Encodable(Protocol):
    """Content of a changed block."""

    def encode(self, location: int) -> bytes:
        """The 4096 bytes of the block."""
        ...


class Transaction:
    """Changed blocks over a cache of committed ones, and the metadata reference counts."""

    def __init__(self, cache: BlockCache, counts: CountTable) -> None:
        self._cache = cache
        self.counts = counts
        self._dirty: dict[int, Encodable] = {}
        self._fresh: set[int] = set()
        self._cursor = 0
        self._candidates: list[int] = []
        self._candidate_chunk = 0
        self._committed_used = 0
        self._limit: int | None = None
        self._used_beyond = 0  # committed blocks in use from the limit on
        self.taken = 0

    # Reading

    def node(self, location: int) -> Node:
        """The node at `location` as this transaction sees it. Raises BlockDamaged."""
        content = self._dirty.get(location)
        if content is None:
            return self._cache.node(location)
        if isinstance(content, Node):
            return content
        raise BlockDamaged(location, BlockKind.NODE.label, Damage.OTHER_KIND, "changed in this transaction")

    def entries(self, locations: U64Array, value_bytes: int) -> tuple[U64Array, ValueArray]:
        """Keys and values of these leaves one after another, as this transaction sees them.

        Raises BlockDamaged, also where a block is no leaf with values of this size; ShortRead, OSError.
        """
        changed = [place for place, location in enumerate(locations.tolist()) if location in self._dirty]
        parts = []
        begin = 0
        for place in changed:
            parts.append(self._cache.entries(locations[begin:place], value_bytes))
            node = read_leaf(self, int(locations[place]), value_bytes)
            parts.append((node.keys, node.values))
            begin = place + 1
        parts.append(self._cache.entries(locations[begin:], value_bytes))
        return np.concatenate([keys for keys, _ in parts]), np.concatenate([values for _, values in parts])

    def raw(self, location: int, kind: BlockKind) -> bytes:
        """Bytes of a block that is not a node, as this transaction sees it; unverified."""
        content = self._dirty.get(location)
        return self._cache.raw(location, kind) if content is None else content.encode(location)

    def is_shared(self, location: int) -> bool:
        """Whether more than one place points at this block."""
        return self.counts.get(location) > 1

    def is_fresh(self, location: int) -> bool:
        """Whether the block was allocated in this transaction."""
        return location in self._fresh

    # Changing

    def put(self, location: int, content: Encodable) -> None:
        """Set the content of a block allocated in this transaction."""
        assert location in self._fresh, location
        self._dirty[location] = content

    def allocate(self) -> int:
        """A block free in the committed map and now, with count one.

        Raises:
            MetadataFull: there is none; callers prevent this by asking for room before they begin.
        """
        location = self._next_free()
        self.counts.change(location, 1)
        self._fresh.add(location)
        self._cache.forget(location)
        self.taken += 1
        return location

    def allocate_with(self, content: Encodable) -> int:
        """Allocate a block and give it content."""
        location = self.allocate()
        self._dirty[location] = content
        return location

    def replace(self, location: int) -> tuple[int, bool]:
        """Make the block at `location` changeable by whoever holds the one reference used to get to it.

        Returns the place to put the new content, and whether the old block stays in use by others, in which
        case the caller must count the references that the copy duplicates.
        """
        if location in self._fresh and not self.is_shared(location):
            return location, False
        fresh = self.allocate()
        return fresh, self.unreference(location) > 0

    def reference(self, locations: U64Array) -> None:
        """One more place points at each of these blocks. Raises CountDamaged."""
        self.counts.increase(locations)

    def unreference(self, location: int) -> int:
        """One place less points at this block; returns how many still do. Raises CountDamaged."""
        left = self.counts.change(location, -1)
        if left == 0 and location in self._fresh:
            self._fresh.discard(location)
            self._dirty.pop(location, None)
            self.taken -= 1
        return left

    # Space

    @property
    def free_blocks(self) -> int:
        """Blocks `allocate` can still hand out in this transaction."""
        return self._end - (self._committed_used - self._used_beyond) - self.taken

    @property
    def _end(self) -> int:
        return self.counts.blocks if self._limit is None else min(self._limit, self.counts.blocks)

    def limit(self, blocks: int | None) -> None:
        """Hand out only blocks before this one; None for no limit. It may rise any time, and fall between commits."""
        self._limit = blocks
        self._used_beyond = 0
        if blocks is not None:
            for chunk in range(blocks // ENTRIES_PER_BITMAP, bitmaps_for(self.counts.blocks)):
                self._used_beyond += self._beyond(self.counts.saved(chunk), chunk)
        self._candidates.clear()
        self._candidate_chunk = max(self._candidate_chunk - 1, 0)

    def _beyond(self, counts: U32Array, chunk: int) -> int:
        """Blocks in use, of the counts of a chunk, that lie at the limit or behind it."""
        assert self._limit is not None
        return int(np.count_nonzero(counts[max(self._limit - chunk * ENTRIES_PER_BITMAP, 0) :]))

    def end_of_free(self, count: int) -> int:
        """The smallest limit with `count` free blocks before it; the size of the space where there are fewer."""
        for chunk in range(bitmaps_for(self.counts.blocks)):
            free = np.flatnonzero((self.counts.chunk(chunk) == 0) & (self.counts.saved(chunk) == 0))
            if len(free) >= count:
                last = int(free[count - 1]) if count > 0 else -1
                return min(chunk * ENTRIES_PER_BITMAP + last + 1, self.counts.blocks)
            count -= len(free)
        return self.counts.blocks

    def recount(self, used_blocks: int) -> None:
        """Set the number of blocks in use in the committed map."""
        self._committed_used = used_blocks

    def _next_free(self) -> int:
        for location in self._search():
            return location
        raise MetadataFull(1, 0, 0)

    def _search(self) -> Iterator[int]:
        """Free blocks from the cursor on, wrapping once; the candidates of a chunk are listed once."""
        chunks = bitmaps_for(self._end)
        for _ in range(chunks + 2):
            while self._candidates:
                location = self._candidates.pop()
                # A candidate may have been taken since it was listed (explicit order at format).
                if self.counts.get(location) == 0:
                    yield location
            self._candidate_chunk %= chunks
            self._candidates = self._list_free(self._candidate_chunk)
            self._candidate_chunk += 1

    def _list_free(self, chunk: int) -> list[int]:
        free = np.flatnonzero((self.counts.chunk(chunk) == 0) & (self.counts.saved(chunk) == 0))
        free += chunk * ENTRIES_PER_BITMAP
        inside = free[free < self._end]
        listed: list[int] = inside[::-1].tolist()
        return listed

    # Commit

    @property
    def has_changes(self) -> bool:
        """Whether any block changed content or any count moved."""
        return bool(self._dirty) or bool(self.counts.touched())

    def dirty(self) -> list[tuple[int, Encodable]]:
        """Changed blocks, ascending by location."""
        return sorted(self._dirty.items(), key=lambda item: item[0])

    def settle(self, used_blocks: int) -> None:
        """The changed blocks are the committed ones now."""
        for location, content in self._dirty.items():
            if isinstance(content, Node):
                self._cache.keep(location, content)
        self._dirty.clear()
        self._fresh.clear()
        if self._limit is not None:
            for chunk in self.counts.touched():
                now, before = self.counts.chunk(chunk), self.counts.saved(chunk)
                self._used_beyond += self._beyond(now, chunk) - self._beyond(before, chunk)
        self.counts.settle()
        self.taken = 0
        self._committed_used = used_blocks
        self._candidates.clear()
        self._candidate_chunk = max(self._candidate_chunk - 1, 0)

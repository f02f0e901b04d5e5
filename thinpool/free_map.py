"""Which data blocks may be handed out: one bit a block over anonymous memory, and a roving cursor.

A set bit means "not available": allocated now, or freed by a transaction that is not yet both committed and
free of readers (`reclaim`). Frees therefore never appear here before the commit that made them, which is the
rule that keeps the committed state intact: a block it names is never another's block too.

A block that is handed out reads as zeros. Freed blocks are punched before they come back, but a power cut may
fall between a commit and its punches, and a pool written by the kernel has whatever it has. So a region of free
blocks is *scrubbed* once per opening, before its first block goes out, rather than all at open: opening stays
quick however large the pool is.

Some free blocks may be promised to single devices (`reservations.py`). Handing out compares one integer for that: so
many are promised, to all together.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from bitarray import bitarray
from numpy.typing import NDArray

REGION_BLOCKS = 1024
NO_BLOCKS: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)

Scrub = Callable[[int, int], None]


def anonymous_memory(length_bytes: int) -> mmap.mmap:
    """Zero-filled memory that costs only the pages that are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return mmap.mmap(-1, max(length_bytes, mmap.PAGESIZE), flags=flags)


def zeroed_bits(count: int) -> bitarray:
    """A bitarray over anonymous memory: `count` zero bits, then set ones up to the end of its page.

    The set tail is there so that no search for a zero bit ever returns a number past `count`.
    """
    bits = bitarray(buffer=anonymous_memory((count + 7) // 8), endian="little")
    bits[count:] = 1
    return bits


@dataclass(slots=True)
class Claim:
    """What is set aside for one device, in blocks; changed under the allocator's lock only.

    It may have `blocks` for itself. It has `settled` in the tree, at least, and took `fresh` since.
    """

    blocks: int = 0
    settled: int = 0
    fresh: int = 0

    @property
    def owned(self) -> int:
        """Blocks the device has for itself, at least."""
        return self.settled + self.fresh

    @property
    def left(self) -> int:
        """Blocks that are promised to the device."""
        return max(self.blocks - self.settled - self.fresh, 0)


class FreeMap:
    """Allocator of data blocks. Thread-safe.

    `scrub(first, count)` is called with a run of free blocks, before any block of their region is handed out,
    and makes them read as zeros.
    """

    def __init__(self, unavailable: bitarray, scrub: Scrub) -> None:
        self._lock = threading.Lock()
        self._scrub = scrub
        self._cursor = 0
        self._fresh: list[int] = []
        self.promised = 0  # the sum of `left` of all claims
        self._install(unavailable)

    def _install(self, unavailable: bitarray) -> None:
        self.blocks = len(unavailable)
        self._bits = zeroed_bits(self.blocks)
        self._bits[: self.blocks] = unavailable
        regions = -(-self.blocks // REGION_BLOCKS)
        self._scrubbed = zeroed_bits(regions)
        self._free = self.blocks - unavailable.count(1)

    @property
    def free_blocks(self) -> int:
        """Blocks that could be handed out now."""
        return self._free

    def available_blocks(self, claim: Claim | None = None) -> int:
        """Blocks that could be handed out now to a device with that claim; not below 0."""
        with self._lock:
            return max(self._free - self.promised + (claim.left if claim is not None else 0), 0)

    def promise(
        self, claim: Claim, blocks: int, owned: int, coming: Callable[[], int] | None = None
    ) -> int | None:
        """Set a claim to `blocks` of which the device has `owned`.

        With `coming`, which tells how many blocks are about to be free, this is done only where it is covered;
        otherwise nothing changes, and what could be promised to the device is returned.
        """
        with self._lock:
            needed, left = max(blocks - owned, 0), claim.left
            if coming is not None and needed:
                # No block is counted twice: one that left those that are coming waits for our lock to be free.
                for_it = self._free + coming() - (self.promised - left)
                if needed > for_it:
                    return max(for_it, 0)
            self.promised += needed - left
            claim.blocks, claim.settled, claim.fresh = blocks, owned, 0
            return None

    def settle(self, claim: Claim, change: int) -> None:
        """What the device took is in the tree: it has `change` blocks more for itself there (or fewer) than before."""
        with self._lock:
            left = claim.left
            claim.settled, claim.fresh = max(claim.settled + change, 0), 0
            self.promised += claim.left - left

    def allocate(self, claim: Claim | None = None) -> int:
        """Take one block, next after the last one taken where that is free. Returns -1 when there is none.

        What is promised to others than the taker counts as not there. Raises OSError when the block's region cannot
        be scrubbed; nothing is taken then.
        """
        with self._lock:
            left = claim.left if claim is not None else 0
            if self._free <= self.promised - left:
                return -1
            block = self._bits.find(0, self._cursor)
            if block < 0:
                block = self._bits.find(0)
                if block < 0:
                    return -1
            region = block // REGION_BLOCKS
            if not self._scrubbed[region]:
                self._scrub_region(region)
            self._bits[block] = 1
            self._cursor = block + 1
            self._free -= 1
            self._fresh.append(block)
            if claim is not None:
                claim.fresh += 1
                self.promised -= left - claim.left
            return block

    def _scrub_region(self, region: int) -> None:
        end = min((region + 1) * REGION_BLOCKS, self.blocks)
        first = self._bits.find(0, region * REGION_BLOCKS, end)
        while first >= 0:
            last = self._bits.find(1, first, end)
            last = end if last < 0 else last
            self._scrub(first, last - first)
            first = self._bits.find(0, last, end)
        self._scrubbed[region] = 1

    @property
    def has_fresh(self) -> bool:
        """Whether any block was handed out since `take_fresh`."""
        return bool(self._fresh)

    def take_fresh(self) -> NDArray[np.uint64]:
        """Blocks handed out since the last call; the committer looks which of them ended up unused."""
        if not self._fresh:
            return NO_BLOCKS  # a flush without a new block is the common one, and numpy is slow for nothing
        with self._lock:
            fresh, self._fresh = self._fresh, []
        return np.unique(np.array(fresh, dtype=np.uint64))

    def release(self, blocks: NDArray[np.uint64]) -> None:
        """Give back blocks that are committed free, unread by anybody, and read as zeros."""
        with self._lock:
            for block in blocks.tolist():
                assert self._bits[block], "a free block was released again"
                self._bits[block] = 0
            self._free += len(blocks)

    def grow(self, blocks: int) -> None:
        """Add blocks at the end; the new ones are free and scrubbed on first use like all others."""
        with self._lock:
            present = self._bits[: self.blocks]
            fresh, scrubbed, cursor = self._fresh, self._scrubbed, self._cursor
            old_whole_regions = self.blocks // REGION_BLOCKS
            present.extend(bitarray(blocks - self.blocks))
            self._install(present)
            self._scrubbed[:old_whole_regions] = scrubbed[:old_whole_regions]
            self._fresh, self._cursor = fresh, cursor

"""Between "freed by a commit" and "free to be handed out": waiting for readers, then punching holes.

A reply is sent from slices of the data file's map while its connection holds no lock, so a block that was freed
meanwhile may still be on its way to a client. Therefore every connection pins the epoch it saw before it looked
at a block map, and unpins when its replies have gone out. Blocks freed by a commit carry the epoch of that
moment; they are punched and handed back only when no connection is pinned at that epoch or an earlier one.

Why a late pin is harmless: a connection looks at the maps only after it stored its pin. A pin stored after the
check below therefore belongs to a connection that looks after the check, and by then no map names these blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from .data_file import DataFile
from .free_map import FreeMap

UNPINNED = 1 << 62


def runs_of(blocks: NDArray[np.uint64]) -> Iterable[tuple[int, int]]:
    """(first, count) of each run of consecutive numbers in an ascending array."""
    if not len(blocks):
        return
    breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
    starts = np.concatenate(([0], breaks)).tolist()
    ends = np.concatenate((breaks, [len(blocks)])).tolist()
    for start, end in zip(starts, ends, strict=True):
        yield int(blocks[start]), end - start


class Reclaimer:
    """Freed blocks on their way back to the free map. Thread-safe."""

    def __init__(self, data: DataFile, free: FreeMap, log: Callable[[str], None]) -> None:
        self.epoch = 0
        self._data = data
        self._free = free
        self._log = log
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, NDArray[np.uint64]]] = []

    def add(self, blocks: NDArray[np.uint64]) -> None:
        """Take blocks that the committed state no longer names (ascending, unique)."""
        if len(blocks):
            with self._lock:
                self._waiting.append((self.epoch, blocks))
                self.epoch += 1

    @property
    def waiting_blocks(self) -> int:
        """Blocks freed and not handed back yet."""
        return self.waiting_count()

    def waiting_count(self) -> int:
        """The same, to be asked later."""
        with self._lock:
            return sum(len(blocks) for _, blocks in self._waiting)

    def run(self, oldest_pin: Callable[[], int]) -> int:
        """Hand back what no reader can still see; returns the number of blocks.

        `oldest_pin` is asked after the list was read, see the module's account of late pins.
        """
        with self._lock:
            ready_before = oldest_pin() if self._waiting else 0
            ready = [blocks for epoch, blocks in self._waiting if epoch < ready_before]
            self._waiting = [entry for entry in self._waiting if entry[0] >= ready_before]
        return sum(self._return(blocks) for blocks in ready)

    def _return(self, blocks: NDArray[np.uint64]) -> int:
        block_bytes = self._data.block_bytes
        returned = 0
        for first, count in runs_of(blocks):
            try:
                # Where the file cannot punch, blocks are zeroed when they are handed out instead.
                self._data.punch(first * block_bytes, count * block_bytes)
            except OSError as error:
                # Never hand out a block that may hold somebody's old data: it stays unavailable until the
                # pool is opened again, when its region is scrubbed before use.
                self._log(f"data blocks {first}..{first + count - 1} could not be punched: {error}")
                continue
            self._free.release(np.arange(first, first + count, dtype=np.uint64))
            returned += count
        return returned

"""Ranges of a device by kind: hole, mapped exclusively, mapped and shared. Built leaf by leaf with numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .block_map import TIME

HOLE, EXCLUSIVE, SHARED = 0, 1, 2


class ExtentList:
    """Collects `ranges`, (length_bytes, kind), that cover [begin_bytes, end_bytes) from its start on."""

    def __init__(self, block_bytes: int, begin_bytes: int, end_bytes: int, shared_before: int) -> None:
        self.ranges: list[tuple[int, int]] = []
        self._block_bytes = block_bytes
        self._position = begin_bytes
        self._end = end_bytes
        self._shared_before = shared_before

    def add(self, keys: NDArray[np.uint64], values: NDArray[np.uint64]) -> None:
        """Add the mappings of one leaf, ascending and after those added before."""
        if not len(keys):
            return
        kinds = np.where((values & np.uint64(TIME)) < self._shared_before, SHARED, EXCLUSIVE)
        breaks = np.flatnonzero((np.diff(keys) != 1) | (np.diff(kinds) != 0)) + 1
        starts = np.concatenate(([0], breaks)).tolist()
        ends = np.concatenate((breaks, [len(keys)])).tolist()
        for start, end in zip(starts, ends, strict=True):
            self._extend(int(keys[start]) * self._block_bytes, HOLE)
            self._extend((int(keys[start]) + end - start) * self._block_bytes, int(kinds[start]))

    def finish(self, kind: int) -> None:
        """Cover the rest."""
        self._extend(self._end, kind)

    def _extend(self, to_bytes: int, kind: int) -> None:
        length = min(to_bytes, self._end) - self._position
        if length <= 0:
            return
        self._position += length
        if self.ranges and self.ranges[-1][1] == kind:
            length += self.ranges.pop()[0]
        self.ranges.append((length, kind))

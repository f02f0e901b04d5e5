"""What deleting devices would free, found out without changing anything.

In: devices deleted one after the other in thought. Out: deleting them (`pool_metadata`).

A node goes when every place that points at it has gone, a data block when every leaf that names it has. So it is enough
to count, for the nodes and blocks met, how many of their references have gone so far: whatever others still hold is met
once, counted down by one, and not entered. Blocks that two snapshots share and nobody else has are freed by the second
of the two.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from .btree import read_node
from .layout import TIME_BITS
from .pool_state import PoolState


class Freeing:
    """A series of deletions in thought. Nothing may change while it is in use."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self._nodes: Counter[int] = Counter()
        self._data: Counter[int] = Counter()

    def delete(self, device_id: int) -> int:
        """Data blocks that become free with this device, those before it being gone. Raises NoSuchDevice.

        A device that a metadata snapshot holds as well frees nothing before that is released.
        """
        mapping = self._state.mapping
        root = mapping.device_root(device_id)
        return 0 if mapping.path_is_shared(device_id) else self._drop(root, 0)

    def _drop(self, location: int, depth: int) -> int:
        transaction = self._state.transaction
        self._nodes[location] += 1
        if self._nodes[location] < transaction.counts.get(location):
            return 0
        node = read_node(transaction, location, 8, depth)
        if not node.leaf:
            return sum(self._drop(child, depth + 1) for child in node.values.tolist())
        blocks = node.values >> np.uint64(TIME_BITS)
        counts = self._state.data_space.counts.gather(blocks)
        shared = counts > 1
        freed = len(blocks) - int(np.count_nonzero(shared))
        for block, count in zip(blocks[shared].tolist(), counts[shared].tolist(), strict=True):
            self._data[block] += 1
            freed += self._data[block] == count
        return freed

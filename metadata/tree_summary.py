"""What is left of each device's tree, read once however many states of a pool share it.

In: reading trees, remembering what comparing states needs. Out: states (commit_candidate).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import TIME_BITS, TIME_LIMIT
from .store import BlockStore
from .tree_salvage import TreeSalvage

_TIME_MASK = np.uint64(TIME_LIMIT - 1)


@dataclass(frozen=True, slots=True)
class TreeSummary:
    """One tree.

    Attributes:
        reached: its intact blocks.
        entries: its mappings, as far as they can be read.
        time: the latest time in them.
        highest: the highest data block that they name.
        lost: half-open ranges of keys that cannot be read.
        broken: blocks that should be part of it and hold something else.
    """

    reached: frozenset[int]
    entries: int
    time: int
    highest: int
    lost: tuple[tuple[int, int], ...]
    broken: frozenset[int]


class DeviceTrees:
    """Summaries by root."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._known: dict[int, TreeSummary] = {}

    def of(self, root: int) -> TreeSummary:
        """The tree at a root. Never raises for what blocks hold."""
        if root not in self._known:
            tree = TreeSalvage(self._store, root)
            entries = time = highest = 0
            for keys, values in tree.mappings():
                entries += len(keys)
                time = max(time, int((values & _TIME_MASK).max(initial=0)))
                highest = max(highest, int(values.max(initial=0)) >> TIME_BITS)
            broken = tree.misfits | {node.location for node in tree.damaged}
            reached = frozenset(tree.reached.keys() - tree.misfits)
            self._known[root] = TreeSummary(
                reached, entries, time, highest, tuple(tree.lost), frozenset(broken)
            )
        return self._known[root]

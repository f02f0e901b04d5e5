"""Reading what is left of a device's tree, in order, and telling which ranges of it are lost.

In: one tree, however damaged, with substitutes for nodes that were found elsewhere. Out: finding those (repair).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .layout import KEY_LIMIT, TREE_DEPTH_MAX, U64Array
from .node import Node
from .node_batch import Leaves, NodeBatch, read_nodes
from .store import BlockStore

# A child of a node that cannot be read: where it begins, and its block.
Substitutes = Mapping[int, Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class DamagedNode:
    """A node that cannot be read: its block, and the inclusive range of keys it answered for.

    `is_leaf`: what its siblings are, None where there are none to tell.
    """

    location: int
    begin: int
    last: int
    is_leaf: bool | None


@dataclass(slots=True)
class TreeSalvage:
    """One tree. Iterate `mappings` to the end, then look at the rest.

    Attributes:
        lost: half-open ranges of keys that cannot be read, ascending; an end may be 2**64.
        damaged: nodes that cannot be read.
        misfits: blocks of intact nodes that are not the ones that were there: their keys belong elsewhere.
        reached: every intact block of the tree, with how often this tree names it.
    """

    store: BlockStore
    root: int
    substitutes: Substitutes = field(default_factory=dict)
    lost: list[tuple[int, int]] = field(default_factory=list)
    damaged: list[DamagedNode] = field(default_factory=list)
    misfits: set[int] = field(default_factory=set)
    reached: dict[int, set[int]] = field(default_factory=dict)

    def mappings(self) -> Iterator[tuple[U64Array, U64Array]]:
        """Keys and values, ascending. Never raises for what blocks hold."""
        yield from self._children(
            0, np.array([self.root], np.uint64), np.zeros(1, np.uint64), KEY_LIMIT - 1, 0
        )

    def _children(
        self, parent: int, children: U64Array, begins: U64Array, last: int, depth: int
    ) -> Iterator[tuple[U64Array, U64Array]]:
        lasts = np.append(begins[1:] - np.uint64(1), np.uint64(last))
        batch = read_nodes(self.store, children, 8)
        inner = {position: node for position, node in batch.others if not node.leaf}
        is_leaf = None if len(batch.damaged) == len(children) or parent == 0 else not inner
        bad = {position for position, _ in batch.damaged}
        for position in range(len(children)):
            if position not in bad:
                self.reached.setdefault(int(children[position]), set()).add(parent)
        for position, part in _in_order(batch, len(children)):
            begin, end = int(begins[position]), int(lasts[position])
            location = int(children[position])
            if isinstance(part, Leaves):
                yield from self._leaves(part, children, begins, lasts)
            elif part is None:
                yield from self._damaged(DamagedNode(location, begin, end, is_leaf), depth)
            elif part.leaf:
                yield from self._leaves(Leaves.of(position, part), children, begins, lasts)
            else:
                yield from self._inner(location, part, begin, end, depth)

    def _inner(
        self, location: int, node: Node, begin: int, last: int, depth: int
    ) -> Iterator[tuple[U64Array, U64Array]]:
        fitting = (node.keys >= np.uint64(begin)) & (node.keys <= np.uint64(last))
        if depth >= TREE_DEPTH_MAX or not fitting.any():
            self.misfits.add(location)
            self.lose(begin, last)
            return
        keys, values = node.keys[fitting], node.values[fitting]
        if not fitting.all():
            self.misfits.add(location)
            self.lose(
                begin, last
            )  # not the node that was there; what it leads to within the range is taken all the same
        yield from self._children(location, values, keys, last, depth + 1)

    def _leaves(
        self, leaves: Leaves, children: U64Array, begins: U64Array, lasts: U64Array
    ) -> Iterator[tuple[U64Array, U64Array]]:
        low = np.repeat(begins[leaves.positions], leaves.counts)
        high = np.repeat(lasts[leaves.positions], leaves.counts)
        inside = (leaves.keys >= low) & (leaves.keys <= high)
        if inside.all():
            yield leaves.keys, leaves.values
            return
        # A leaf with keys of another place is not the leaf that was there.
        owner = np.repeat(leaves.positions, leaves.counts)
        for position in np.unique(owner[~inside]).tolist():
            self.misfits.add(int(children[position]))
            self.lose(int(begins[position]), int(lasts[position]))
        yield leaves.keys[inside], leaves.values[inside]

    def _damaged(self, node: DamagedNode, depth: int) -> Iterator[tuple[U64Array, U64Array]]:
        found = self.substitutes.get(node.location)
        self.damaged.append(node)
        if found is None or depth >= TREE_DEPTH_MAX:
            self.lose(node.begin, node.last)
            return
        begins = np.array([node.begin, *(begin for begin, _ in found[1:])], np.uint64)
        children = np.array([location for _, location in found], np.uint64)
        yield from self._children(node.location, children, begins, node.last, depth + 1)

    def lose(self, begin: int, last: int) -> None:
        """Note that keys `begin`..`last` cannot be had; called in ascending order."""
        if self.lost and self.lost[-1][1] >= begin:
            self.lost[-1] = self.lost[-1][0], max(self.lost[-1][1], last + 1)
        else:
            self.lost.append((begin, last + 1))


def _in_order(batch: NodeBatch, count: int) -> Iterator[tuple[int, Leaves | Node | None]]:
    """The children by position; usual leaves that follow each other together."""
    others = dict(batch.others)
    bad = {position for position, _ in batch.damaged}
    positions, counts, ends = batch.leaves.positions, batch.leaves.counts, batch.leaves.ends
    done = 0
    for position in [*sorted(others.keys() | bad), count]:
        stop = int(np.searchsorted(positions, position))
        if stop > done:
            begin = int(ends[done - 1]) if done else 0
            span = slice(begin, int(ends[stop - 1]))
            yield (
                int(positions[done]),
                Leaves(
                    positions[done:stop],
                    counts[done:stop],
                    batch.leaves.keys[span],
                    batch.leaves.values[span],
                ),
            )
            done = stop
        if position < count:
            yield position, others.get(position)

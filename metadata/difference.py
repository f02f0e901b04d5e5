"""What two mapping trees differ in, found by a walk of both side by side that skips every shared subtree.

In: the walk, in batches of bounded memory, over anything that gives nodes by location. Out: what a difference means
to a device (`thinpool/delta.py`), devices and their roots (`mapping`).

Theory of operation. All leaves of a tree are equally deep, and a node that two trees share is equally far above the
leaves in both. So the taller tree is first expanded down to the height of the other; then, level by level, the nodes
that occur in both lists are struck from both, and only the rest is expanded. What is left at the end are leaves that
one tree has and the other has not. A key in such a leaf of one tree cannot lie in a leaf that was struck, because a
tree holds each key once; so comparing the leaves that are left compares the trees. The work grows with the number of
nodes that are not shared, never with the size of the trees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .btree import NodeSource, child_position, first_at_or_above, read_node
from .layout import KEY_LIMIT, TIME_BITS, U64Array

LEAVES_PER_BATCH = 256
ABSENT = (1 << 64) - 1  # in place of a data block: not mapped
_TIME_BITS = np.uint64(TIME_BITS)
_NONE: U64Array = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Difference:
    """Thin blocks that two devices map to different data blocks, up to a point.

    Attributes:
        end: every thin block below this has been compared by this batch or one before; at most 2**64.
        keys: thin blocks, shape (n,), uint64, ascending.
        old: data blocks in the first device, shape (n,), `ABSENT` where it maps nothing.
        new: the same of the second device.
    """

    end: int
    keys: U64Array
    old: U64Array
    new: U64Array


@dataclass(slots=True)
class _Level:
    """Nodes of one tree at one height, in key order: where they are, and a lower bound of their keys."""

    locations: U64Array
    bounds: U64Array


def differences(
    source: NodeSource, old_root: int | None, new_root: int | None, begin: int = 0, end: int = KEY_LIMIT
) -> Iterator[Difference]:
    """Compare two mapping trees in begin <= thin block < end; a root of None is an empty tree.

    The last batch has `end` as its end. Trees must not change while the iterator is in use. Raises BlockDamaged.
    """
    if begin < end and old_root != new_root:
        walk = _Walk(source, begin, end)
        old, new = walk.unshared_leaves(old_root, new_root)
        yield from walk.compare(old, new)
    else:
        yield Difference(end, _NONE, _NONE, _NONE)


class _Walk:
    """One comparison within [begin, end)."""

    def __init__(self, source: NodeSource, begin: int, end: int) -> None:
        self._source = source
        self._begin = begin
        self._end = end

    def unshared_leaves(self, old_root: int | None, new_root: int | None) -> tuple[_Level, _Level]:
        old, new = self._start(old_root), self._start(new_root)
        heights = [self._height(old_root), self._height(new_root)]
        while heights != [0, 0]:
            if heights[0] == heights[1]:
                old, new = _strike_common(old, new)
            taller = max(heights)
            if heights[0] == taller:
                old = self._expand(old)
                heights[0] -= 1
            if heights[1] == taller:
                new = self._expand(new)
                heights[1] -= 1
        return _strike_common(old, new)

    def _start(self, root: int | None) -> _Level:
        locations = _NONE if root is None else np.array([root], np.uint64)
        return _Level(locations, np.zeros(len(locations), np.uint64))

    def _height(self, root: int | None) -> int:
        """Levels above the leaves, along the path that is read anyway."""
        if root is None:
            return 0
        node = read_node(self._source, root, 8)
        height = 0
        while not node.leaf:
            height += 1
            position = max(child_position(node, self._begin), 0)
            node = read_node(self._source, int(node.values[position]), 8, height)
        return height

    def _expand(self, level: _Level) -> _Level:
        """The children that may hold keys of the range."""
        locations, bounds = [_NONE], [_NONE]
        for location in level.locations.tolist():
            node = read_node(self._source, location, 8)
            first = max(child_position(node, self._begin), 0)
            last = first_at_or_above(node.keys, self._end)
            locations.append(node.values[first:last])
            bounds.append(node.keys[first:last])
        return _Level(np.concatenate(locations), np.concatenate(bounds))

    def compare(self, old: _Level, new: _Level) -> Iterator[Difference]:
        """Read the leaves of both in step, a batch at a time, and yield what differs."""
        left, right = _LeafReader(self._source, old), _LeafReader(self._source, new)
        begin = self._begin
        while True:
            limit = min(left.bound_after(LEAVES_PER_BATCH), right.bound_after(LEAVES_PER_BATCH), self._end)
            old_keys, old_blocks = left.take(begin, limit)
            new_keys, new_blocks = right.take(begin, limit)
            yield _merge(limit, old_keys, old_blocks, new_keys, new_blocks)
            if limit >= self._end:
                return
            begin = limit


class _LeafReader:
    """The entries of a list of leaves, handed out by ascending ranges of keys."""

    def __init__(self, source: NodeSource, level: _Level) -> None:
        self._source = source
        self._locations = level.locations
        self._bounds = level.bounds
        self._position = 0
        self._keys, self._blocks = _NONE, _NONE

    def bound_after(self, count: int) -> int:
        """The lower bound of the leaf `count` places on, beyond all keys where there is none."""
        position = self._position + count
        return int(self._bounds[position]) if position < len(self._bounds) else KEY_LIMIT

    def take(self, begin: int, limit: int) -> tuple[U64Array, U64Array]:
        """Keys and data blocks with begin <= key < limit; ranges follow one another."""
        begun = self._position
        self._position = max(begun, first_at_or_above(self._bounds, limit))
        keys, values = self._source.entries(self._locations[begun : self._position], 8)
        all_keys = np.concatenate((self._keys, keys))
        all_blocks = np.concatenate((self._blocks, values >> _TIME_BITS))
        # A bound may be lower than the leaf's first key: then the entries wait here for their range.
        first, last = first_at_or_above(all_keys, begin), first_at_or_above(all_keys, limit)
        self._keys, self._blocks = all_keys[last:], all_blocks[last:]
        return all_keys[first:last], all_blocks[first:last]


def _strike_common(old: _Level, new: _Level) -> tuple[_Level, _Level]:
    shared = np.intersect1d(old.locations, new.locations)
    if not len(shared):
        return old, new
    kept = [~np.isin(level.locations, shared) for level in (old, new)]
    return (
        _Level(old.locations[kept[0]], old.bounds[kept[0]]),
        _Level(new.locations[kept[1]], new.bounds[kept[1]]),
    )


def _merge(
    end: int, old_keys: U64Array, old_blocks: U64Array, new_keys: U64Array, new_blocks: U64Array
) -> Difference:
    """Join two ascending lists by key, and leave out what is mapped alike."""
    if np.array_equal(old_keys, new_keys):  # the usual case by far, and without a sort
        different = old_blocks != new_blocks
        return Difference(end, old_keys[different], old_blocks[different], new_blocks[different])
    keys = np.union1d(old_keys, new_keys)
    old = np.full(len(keys), ABSENT, np.uint64)
    new = np.full(len(keys), ABSENT, np.uint64)
    old[np.searchsorted(keys, old_keys)] = old_blocks
    new[np.searchsorted(keys, new_keys)] = new_blocks
    different = old != new
    return Difference(end, keys[different], old[different], new[different])

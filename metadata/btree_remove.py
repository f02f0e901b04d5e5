"""Removal from a B-tree: a range of keys, or a sorted batch of keys.

In: removal and the rebalancing that follows it. Out: insertion.

Theory of operation. Like insertion, removal works from the root down, shadowing each touched node once, and then
repairs upwards. A range drops subtrees that lie wholly inside it without looking at single entries (a shared one
only loses a reference), so only the nodes on its two edges are rewritten. A node that
lost all its entries disappears from its parent. A node left with less than a third of its capacity is *thin* and
is joined with a neighbour: merged into one node if both fit, evened out otherwise.

The subtle case is a thin node that is its parent's only child: it has no neighbour there. The parent then is
thin itself and gets joined one level up; at that moment the child gains neighbours and is mended first
(`_join` looks for only children on both sides). So a thin node survives only as a root.

A root with one child gives way to that child by moving the reference to it, not by copying its content, so
nothing below has to be counted again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .btree import child_position, first_at_or_above, has_entries
from .btree_edit import TreeEditor
from .btree_insert import group_bounds
from .layout import KEY_LIMIT, U64Array, ValueArray
from .node import make_internal, make_leaf


@dataclass(slots=True)
class _Children:
    """Entries of an internal node being rewritten, and those children that may be thin."""

    keys: U64Array
    locations: U64Array
    suspects: list[int]


class TreeRemover:
    """One removal; `removed` counts the entries."""

    def __init__(self, editor: TreeEditor) -> None:
        self._editor = editor
        self.removed = 0

    def remove_range(self, root: int, begin: int, end: int) -> int:
        """Remove all entries with begin <= key < end; returns the new root.

        Nothing is shadowed when there are none. Raises BlockDamaged, CountDamaged, MetadataFull; the
        transaction must then be aborted.
        """
        if not self._has(root, begin, end):
            return root
        return self._finish(self._cut(root, begin, end, KEY_LIMIT, 0))

    def remove_keys(self, root: int, keys: U64Array) -> int:
        """Remove the given strictly ascending keys; absent ones are no error. Returns the new root."""
        if not len(keys):
            return root
        return self._finish(self._pick(root, keys, 0))

    def _has(self, location: int, begin: int, end: int) -> bool:
        return has_entries(self._editor.transaction, self._editor.kind.value_bytes, location, begin, end)

    def _finish(self, root: int | None) -> int:
        if root is None:
            return self._editor.create()
        node = self._editor.node(root)
        while not node.leaf and len(node.keys) == 1:
            child = int(node.values[0])
            self._editor.transaction.unreference(root)
            root = child
            node = self._editor.node(root)
        return root

    # Going down

    def _cut(self, location: int, begin: int, end: int, upper: int, depth: int) -> int | None:
        """Remove the range from a subtree that has entries in it; None when nothing is left of it."""
        place, node = self._editor.shadow(location, depth)
        first = first_at_or_above(node.keys, begin)
        last = first_at_or_above(node.keys, end)
        if node.leaf:
            keep = np.ones(len(node.keys), np.bool_)
            keep[first:last] = False
            return self._keep(place, node.keys, node.values, keep)
        first = max(child_position(node, begin), 0)
        keys = node.keys.tolist()
        locations = node.values.copy()
        keep = np.ones(len(keys), np.bool_)
        suspects = []
        for position in range(first, last):
            child = int(locations[position])
            child_upper = keys[position + 1] if position + 1 < len(keys) else upper
            if begin <= keys[position] and child_upper <= end:
                self.removed += self._editor.drop(child, counting=True, depth=depth + 1)
                keep[position] = False
            elif self._has(child, begin, end):
                left = self._cut(child, begin, end, child_upper, depth + 1)
                keep[position] = left is not None
                if left is not None:
                    locations[position] = left
                    suspects.append(left)
        return self._repair(place, _Children(node.keys[keep], locations[keep], suspects))

    def _pick(self, location: int, keys: U64Array, depth: int) -> int | None:
        """Remove single keys from a subtree; None when nothing is left of it."""
        place, node = self._editor.shadow(location, depth)
        if node.leaf:
            return self._keep(place, node.keys, node.values, ~np.isin(node.keys, keys))
        positions = node.keys.searchsorted(keys, "right").astype(np.int64) - 1
        np.maximum(positions, 0, out=positions)
        bounds = group_bounds(positions)
        locations = node.values.copy()
        keep = np.ones(len(locations), np.bool_)
        suspects = []
        for start, stop in pairwise(bounds):
            position = int(positions[start])
            left = self._pick(int(locations[position]), keys[start:stop], depth + 1)
            keep[position] = left is not None
            if left is not None:
                locations[position] = left
                suspects.append(left)
        return self._repair(place, _Children(node.keys[keep], locations[keep], suspects))

    def _keep(self, place: int, keys: U64Array, values: ValueArray, keep: np.ndarray) -> int | None:
        """Write a leaf without the entries not kept; None (and the block freed) when that is all of them."""
        if not keep.all():
            gone = values[~keep]
            self.removed += len(gone)
            self._editor.kind.release(gone)
        if not keep.any():
            self._editor.transaction.unreference(place)
            return None
        self._editor.transaction.put(place, make_leaf(keys[keep], values[keep]))
        return place

    # Going up

    def _repair(self, place: int, children: _Children) -> int | None:
        """Write an internal node after mending its children; None when it has none left."""
        if not len(children.keys):
            self._editor.transaction.unreference(place)
            return None
        self._mend(children)
        self._editor.transaction.put(place, make_internal(children.keys, children.locations))
        return place

    def _mend(self, children: _Children) -> None:
        """Join thin children with neighbours until none is thin, or only one child is left."""
        while children.suspects and len(children.locations) > 1:
            suspect = children.suspects.pop()
            node = self._editor.node(suspect)
            if len(node.keys) >= node.minimum:
                continue
            self._join(children, self._left_of_pair(children.locations, suspect))

    def _left_of_pair(self, locations: U64Array, suspect: int) -> int:
        """Position of the left one of `suspect` and the neighbour to join it with.

        The left neighbour, unless only the right one spares us the copy of a shared node.
        """
        position = int(np.flatnonzero(locations == suspect)[0])
        if position == 0:
            return 0
        shared = self._editor.transaction.is_shared
        if position + 1 < len(locations) and shared(int(locations[position - 1])):
            return position if not shared(int(locations[position + 1])) else position - 1
        return position - 1

    def _join(self, children: _Children, left_position: int) -> None:
        """Merge two neighbouring children, or even them out if they do not fit one node."""
        transaction = self._editor.transaction
        old_left, old_right = (int(children.locations[left_position + side]) for side in (0, 1))
        left, left_node = self._editor.shadow(old_left)
        right, right_node = self._editor.shadow(old_right)
        keys = np.concatenate((left_node.keys, right_node.keys))
        values = np.concatenate((left_node.values, right_node.values))
        if not left_node.leaf:
            lonely = [int(node.values[0]) for node in (left_node, right_node) if len(node.keys) == 1]
            below = _Children(keys, values, lonely)
            self._mend(below)
            keys, values = below.keys, below.locations
        make = make_leaf if left_node.leaf else make_internal
        suspects = [place for place in children.suspects if place not in (old_left, old_right)]
        children.locations = children.locations.copy()
        children.locations[left_position] = left
        after = left_position + 1
        if len(keys) <= left_node.capacity:
            transaction.put(left, make(keys, values))
            transaction.unreference(right)
            children.keys = np.delete(children.keys, after)
            children.locations = np.delete(children.locations, after)
            suspects.append(left)
        else:
            half = len(keys) // 2
            transaction.put(left, make(keys[:half], values[:half]))
            transaction.put(right, make(keys[half:], values[half:]))
            children.keys = children.keys.copy()
            children.keys[after] = keys[half]
            children.locations[after] = right
        children.suspects = suspects

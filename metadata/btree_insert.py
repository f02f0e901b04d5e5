"""Bulk insertion into a B-tree.

In: merging a sorted batch of entries into a tree. Out: where the values come from, removal.

Theory of operation. The batch is split over the children of each node on the way down, so each touched
node is shadowed once and each touched leaf merged with numpy once, however many entries it receives. A
node that outgrows its block becomes several; the parent replaces one child entry by theirs, and may outgrow its own
block in turn. A root that became several gets a new root above. The parent is shadowed before its children, so that a
child of a shared parent is seen as shared.

Splitting: a batch that lies wholly behind the old entries of a leaf is an ascending load, and leaves full nodes
behind; anything else is split evenly. No piece is smaller than a third of the capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .btree_edit import TreeEditor
from .layout import U64Array, ValueArray
from .node import CAPACITY, Node, make_internal, make_leaf

# Pouring less than this into a neighbour is not worth writing it (as in dm-btree.c).
_POUR_MIN = 8


@dataclass(slots=True)
class _Pieces:
    """What a node became: lower bounds and locations of one or more nodes of the same height."""

    keys: U64Array
    locations: U64Array


def piece_sizes(count: int, capacity: int, *, ascending: bool) -> list[int]:
    """How to divide `count` entries over nodes; every size is at least capacity // 3 when there are several."""
    if count <= capacity:
        return [count]
    pieces = -(-count // capacity)
    if not ascending:
        small, larger = divmod(count, pieces)
        return [small + 1] * larger + [small] * (pieces - larger)
    sizes = [capacity] * (pieces - 1)
    last = count - capacity * (pieces - 1)
    missing = max(capacity // 3 - last, 0)
    sizes[-1] -= missing
    return [*sizes, last + missing]


def group_bounds(positions: NDArray[np.int64]) -> list[int]:
    """Bounds of the runs of equal numbers in an ascending, non-empty array, both ends included."""
    return [0, *(np.flatnonzero(np.diff(positions)) + 1).tolist(), len(positions)]


class TreeInserter:
    """One bulk insertion."""

    def __init__(self, editor: TreeEditor) -> None:
        self._editor = editor
        self.added = 0

    def insert(self, root: int, keys: U64Array, values: ValueArray) -> int:
        """Insert or overwrite; returns the new root.

        `keys` must be strictly ascending. `added` then says how many of them were new.
        Raises BlockDamaged, CountDamaged, MetadataFull; the transaction must then be aborted.
        """
        if not len(keys):
            return root
        pieces = self._into(root, keys, values, 0)
        while len(pieces.locations) > 1:
            place = self._editor.transaction.allocate()
            pieces = self._write(place, pieces.keys, pieces.locations, leaf=False, ascending=True)
        return int(pieces.locations[0])

    def _into(self, location: int, keys: U64Array, values: ValueArray, depth: int) -> _Pieces:
        place, node = self._editor.shadow(location, depth)
        if node.leaf:
            return self._into_leaf(place, node, keys, values)
        positions = node.keys.searchsorted(keys, "right").astype(np.int64) - 1
        np.maximum(positions, 0, out=positions)
        bounds = group_bounds(positions)
        if len(bounds) == 2:
            node = self._pour(node, int(positions[0]), keys, depth + 1)
        key_parts: list[U64Array] = []
        child_parts: list[U64Array] = []
        done = 0
        for start, stop in pairwise(bounds):
            position = int(positions[start])
            child = int(node.values[position])
            pieces = self._into(child, keys[start:stop], values[start:stop], depth + 1)
            # A lower bound may stay below the child's first key, but must follow it downwards.
            pieces.keys[0] = min(node.keys[position], keys[start])
            key_parts += [node.keys[done:position], pieces.keys]
            child_parts += [node.values[done:position], pieces.locations]
            done = position + 1
        key_parts.append(node.keys[done:])
        child_parts.append(node.values[done:])
        ascending = len(bounds) == 2 and done == len(node.keys)
        return self._write(
            place, np.concatenate(key_parts), np.concatenate(child_parts), leaf=False, ascending=ascending
        )

    def _pour(self, parent: Node, position: int, keys: U64Array, depth: int) -> Node:
        """Before an append makes a leaf overflow, move its head into free room of the leaf to the left.

        Small appends would otherwise leave leaves two thirds full. Returns the parent's changed content.
        """
        editor = self._editor
        right = editor.node(int(parent.values[position]), depth)
        count = len(right.keys)
        if not position or not right.leaf or not count or keys[0] <= right.keys[-1]:
            return parent
        left_place = int(parent.values[position - 1])
        left = editor.node(left_place, depth)
        capacity = CAPACITY[right.values.dtype.itemsize]
        moving = min(capacity - len(left.keys), count - 1)
        if count + len(keys) <= capacity or moving < _POUR_MIN or editor.transaction.is_shared(left_place):
            return parent
        left_place, left = editor.shadow(left_place, depth)
        right_place, right = editor.shadow(int(parent.values[position]), depth)
        put = editor.transaction.put
        head, tail = slice(None, moving), slice(moving, None)
        put(
            left_place,
            make_leaf(
                np.concatenate((left.keys, right.keys[head])),
                np.concatenate((left.values, right.values[head])),
            ),
        )
        put(right_place, make_leaf(right.keys[tail], right.values[tail]))
        parent_keys, children = parent.keys.copy(), parent.values.copy()
        parent_keys[position] = right.keys[moving]
        children[position - 1], children[position] = left_place, right_place
        return make_internal(parent_keys, children)

    def _into_leaf(self, place: int, node: Node, keys: U64Array, values: ValueArray) -> _Pieces:
        kind = self._editor.kind
        old_keys, old_values = node.keys, node.values
        count = len(old_keys)
        if not count or keys[0] > old_keys[-1]:
            self.added += len(keys)
            kind.adopt(values)
            return self._write(
                place,
                np.concatenate((old_keys, keys)),
                np.concatenate((old_values, values)),
                leaf=True,
                ascending=True,
            )
        at = old_keys.searchsorted(keys, "left")
        present = old_keys[np.minimum(at, count - 1)] == keys
        if present.any():
            places = at[present]
            replacing = values[present]
            kind.exchange(old_values[places], replacing)
            old_values = old_values.copy()
            old_values[places] = replacing
        if not present.all():
            absent = ~present
            fresh = values[absent]
            self.added += len(fresh)
            kind.adopt(fresh)
            old_values = np.insert(old_values, at[absent], fresh)
            old_keys = np.insert(old_keys, at[absent], keys[absent])
        return self._write(place, old_keys, old_values, leaf=True, ascending=False)

    def _write(
        self, place: int, keys: U64Array, values: ValueArray, *, leaf: bool, ascending: bool
    ) -> _Pieces:
        """Put entries into `place` and as many new nodes as they need."""
        transaction = self._editor.transaction
        capacity = CAPACITY[values.dtype.itemsize]
        sizes = piece_sizes(len(keys), capacity, ascending=ascending)
        bounds = [0, *np.cumsum(sizes).tolist()]
        make = make_leaf if leaf else make_internal
        locations = []
        if len(sizes) == 1:
            transaction.put(place, make(keys, values))
            return _Pieces(keys[:1].copy(), np.array([place], np.uint64))
        for start, stop in pairwise(bounds):
            location = place if not start else transaction.allocate()
            # Copies, so that a node in the cache does not keep the arrays of a whole batch alive.
            transaction.put(location, make(keys[start:stop].copy(), values[start:stop].copy()))
            locations.append(location)
        return _Pieces(keys[np.array(bounds[:-1])], np.array(locations, np.uint64))

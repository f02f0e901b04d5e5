"""Walking trees in order straight from storage: for readers of a whole tree that touch each block once.

In: strict iteration that raises at the first damage (dump), tolerant collection of small trees (recount, repair).
Out: lookups and ranges within a transaction (btree), the walk with context over possibly damaged trees (survey).

Leaves come in groups, all children of one lowest internal node together: that is the unit in which they are read and
decoded at speed, and the unit in which snapshots share them, so a reader can recognise a group it has seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .checksum import BlockKind
from .errors import BlockDamaged, Damage
from .layout import TREE_DEPTH_MAX, VALUE_TYPES, U64Array, ValueArray
from .node import Node
from .node_batch import Leaves, NodeBatch, read_nodes
from .store import BlockStore

_LABEL = BlockKind.NODE.label


@dataclass(frozen=True, slots=True)
class LeafGroup:
    """Sibling leaves: `parent` is the block that names them (the leaf itself where that is the root)."""

    parent: int
    locations: U64Array


def leaf_groups(store: BlockStore, value_bytes: int, root: int) -> Iterator[LeafGroup]:
    """The leaves of a tree in order, unread but for the leftmost. Raises BlockDamaged, ShortRead, OSError."""
    height = _height(store, value_bytes, root)
    if height == 0:
        yield LeafGroup(root, _array(root))
        return
    stack = [iter([root])]
    while stack:
        location = next(stack[-1], None)
        if location is None:
            stack.pop()
            continue
        children = _internal(store, value_bytes, location).values
        if len(stack) == height:
            yield LeafGroup(location, children)
        else:
            stack.append(iter(children.tolist()))


def read_leaves(store: BlockStore, value_bytes: int, locations: U64Array) -> tuple[U64Array, ValueArray]:
    """All entries of these leaves, in order. Raises BlockDamaged, ShortRead, OSError."""
    batch = read_nodes(store, locations, value_bytes)
    _raise_first(batch)
    if not batch.others:
        return batch.leaves.keys, batch.leaves.values
    parts = _single_leaves(batch)
    for position, node in batch.others:
        if not node.leaf:
            raise BlockDamaged(int(locations[position]), "leaf", Damage.NODE_FLAGS, "an internal node")
        parts[position] = (node.keys, node.values)
    ordered = [parts[position] for position in sorted(parts)]
    return np.concatenate([keys for keys, _ in ordered]), np.concatenate([values for _, values in ordered])


def entries(store: BlockStore, value_bytes: int, root: int) -> tuple[U64Array, ValueArray]:
    """All entries of a (small) tree, in order. Raises BlockDamaged, ShortRead, OSError."""
    parts = [
        read_leaves(store, value_bytes, group.locations) for group in leaf_groups(store, value_bytes, root)
    ]
    return np.concatenate([keys for keys, _ in parts]), np.concatenate([values for _, values in parts])


def salvage(store: BlockStore, value_bytes: int, root: int) -> tuple[U64Array, ValueArray, bool]:
    """The entries of a tree that can still be read, ascending, and whether that is all of them.

    Each block is visited once, so loops end; keys that come twice keep their first value. Never raises for contents.
    """
    keys: list[U64Array] = []
    values: list[ValueArray] = []
    seen: set[int] = set()
    complete = True
    level = _array(root)
    for _ in range(TREE_DEPTH_MAX):
        batch = read_nodes(store, level, value_bytes)
        complete = complete and not batch.damaged
        below: list[int] = []
        keys.append(batch.leaves.keys)
        values.append(batch.leaves.values)
        for _, node in batch.others:
            if node.leaf:
                keys.append(node.keys)
                values.append(node.values)
            else:
                below += node.values.tolist()
        fresh = [location for location in dict.fromkeys(below) if location not in seen]
        complete = complete and len(fresh) == len(below)
        seen.update(fresh)
        if not fresh:
            break
        level = np.array(fresh, np.uint64)
    else:
        complete = False
    all_keys = np.concatenate([np.empty(0, np.uint64), *keys])
    all_values = np.concatenate([np.empty(0, VALUE_TYPES[value_bytes]), *values])
    unique, first = np.unique(all_keys, return_index=True)
    return unique, all_values[first], complete and len(unique) == len(all_keys)


def listed_roots(store: BlockStore, root: int) -> tuple[U64Array, U64Array, bool]:
    """Devices and roots of the list at `root`, as `salvage` gives them.

    A root that is no block of the metadata says that a leaf is none of this list: one of mappings looks the same.
    """
    ids, roots, complete = salvage(store, 8, root)
    possible = (roots > 0) & (roots < store.size_blocks())
    return ids[possible], roots[possible], complete and bool(possible.all())


def _array(location: int) -> U64Array:
    return np.array([location], np.uint64)


def _one(store: BlockStore, value_bytes: int, location: int) -> Node:
    batch = read_nodes(store, _array(location), value_bytes)
    _raise_first(batch)
    if batch.others:
        return batch.others[0][1]
    return Node(True, batch.leaves.keys, batch.leaves.values, 0)


def _height(store: BlockStore, value_bytes: int, root: int) -> int:
    """Levels above the leaves, by the leftmost path."""
    location = root
    for height in range(TREE_DEPTH_MAX):
        node = _one(store, value_bytes, location)
        if node.leaf:
            return height
        location = int(node.values[0])
    raise BlockDamaged(location, _LABEL, Damage.TOO_DEEP)


def _internal(store: BlockStore, value_bytes: int, location: int) -> Node:
    node = _one(store, value_bytes, location)
    if node.leaf:
        raise BlockDamaged(location, "internal node", Damage.NODE_FLAGS, "a leaf above the lowest level")
    return node


def _raise_first(batch: NodeBatch) -> None:
    for _, fault in batch.damaged:
        raise fault


def _single_leaves(batch: NodeBatch) -> dict[int, tuple[U64Array, ValueArray]]:
    leaves: Leaves = batch.leaves
    begin = 0
    parts = {}
    for position, end in zip(leaves.positions.tolist(), leaves.ends.tolist(), strict=True):
        parts[position] = (leaves.keys[begin:end], leaves.values[begin:end])
        begin = end
    return parts

"""Reading B-trees: lookup, the leaf that answers for a key, ordered iteration over leaves.

In: functions over anything that gives nodes by location. Out: changing trees (btree_insert, btree_remove).

An internal entry's key is a lower bound of its child, possibly below the child's first key; nothing is
stored below the first entry's key, so descending clamps to the first entry where an answer is wanted for every
key. There are no sibling pointers: iteration keeps a stack of the path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .checksum import BlockKind
from .errors import BlockDamaged, Damage
from .layout import KEY_LIMIT, TREE_DEPTH_MAX, U64Array, ValueArray
from .node import Node


class NodeSource(Protocol):
    """Where nodes come from: the running transaction, or a cache of committed blocks."""

    def node(self, location: int) -> Node:
        """The node at `location`. Raises BlockDamaged."""
        ...

    def entries(self, locations: U64Array, value_bytes: int) -> tuple[U64Array, ValueArray]:
        """Keys and values of these leaves one after another, read together where there are many.

        `value_bytes` is the size of the tree's values. Raises BlockDamaged, also where one is no leaf.
        """
        ...


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf and the half-open range of keys it answers for; `end` may be 2**64."""

    location: int
    begin: int
    end: int
    node: Node


def read_node(source: NodeSource, location: int, value_bytes: int, depth: int = 0) -> Node:
    """A node of a tree with values of this size, `depth` levels below its root. Raises BlockDamaged."""
    node = source.node(location)
    if node.leaf and node.values.dtype.itemsize != value_bytes:
        size = node.values.dtype.itemsize
        raise BlockDamaged(
            location, BlockKind.NODE.label, Damage.VALUE_SIZE, f"{size} bytes, not {value_bytes}"
        )
    if depth > TREE_DEPTH_MAX:
        raise BlockDamaged(location, BlockKind.NODE.label, Damage.TOO_DEEP)
    return node


def read_leaf(source: NodeSource, location: int, value_bytes: int) -> Node:
    """A node that has to be a leaf of a tree with values of this size. Raises BlockDamaged."""
    node = read_node(source, location, value_bytes)
    if not node.leaf:
        raise BlockDamaged(location, BlockKind.NODE.label, Damage.NODE_FLAGS, "an internal node")
    return node


def child_position(node: Node, key: int) -> int:
    """Index of the last entry whose key is not above `key`; -1 when all are."""
    return int(node.keys.searchsorted(np.uint64(key), "right")) - 1


def first_at_or_above(keys: U64Array, key: int) -> int:
    """Index of the first of the ascending `keys` that is >= `key`; `key` may be 2**64."""
    return len(keys) if key >= KEY_LIMIT else int(keys.searchsorted(np.uint64(key), "left"))


def find_leaf(source: NodeSource, value_bytes: int, root: int, key: int) -> Leaf:
    """The leaf that answers for `key`, whether or not it holds it. Raises BlockDamaged."""
    begin, end = 0, KEY_LIMIT
    location = root
    node = read_node(source, location, value_bytes)
    depth = 0
    while not node.leaf:
        position = child_position(node, key)
        if position > 0:
            begin = int(node.keys[position])
        position = max(position, 0)
        if position + 1 < len(node.keys):
            end = int(node.keys[position + 1])
        location = int(node.values[position])
        depth += 1
        node = read_node(source, location, value_bytes, depth)
    return Leaf(location, begin, end, node)


def lookup(source: NodeSource, value_bytes: int, root: int, key: int) -> Any | None:
    """The value (a numpy scalar) under `key`, None when absent. Raises BlockDamaged."""
    node = find_leaf(source, value_bytes, root, key).node
    position = child_position(node, key)
    if position < 0 or int(node.keys[position]) != key:
        return None
    return node.values[position]


def leaves(
    source: NodeSource, value_bytes: int, root: int, begin: int = 0, end: int = KEY_LIMIT
) -> Iterator[tuple[U64Array, ValueArray]]:
    """Entries with begin <= key < end, a pair (keys, values) per leaf that has any, ascending.

    The tree must not change while the iterator is in use. Raises BlockDamaged.
    """
    if begin >= end:
        return
    stack = [iter([root])]
    while stack:
        location = next(stack[-1], None)
        if location is None:
            stack.pop()
            continue
        node = read_node(source, location, value_bytes, len(stack))
        if node.leaf:
            first, last = first_at_or_above(node.keys, begin), first_at_or_above(node.keys, end)
            if first < last:
                yield node.keys[first:last], node.values[first:last]
        else:
            first = max(child_position(node, begin), 0)
            last = first_at_or_above(node.keys, end)
            stack.append(iter(node.values[first:last].tolist()))


def last_key(source: NodeSource, value_bytes: int, root: int) -> int | None:
    """The highest key of a tree, None when it is empty. Raises BlockDamaged."""
    node = find_leaf(source, value_bytes, root, KEY_LIMIT - 1).node
    return int(node.keys[-1]) if len(node.keys) else None


def has_entries(source: NodeSource, value_bytes: int, root: int, begin: int, end: int) -> bool:
    """Whether any key lies in begin <= key < end. Raises BlockDamaged."""
    return next(leaves(source, value_bytes, root, begin, end), None) is not None


def count_entries(source: NodeSource, value_bytes: int, root: int) -> int:
    """Number of entries of a tree, by reading its leaves. Raises BlockDamaged."""
    return sum(len(keys) for keys, _ in leaves(source, value_bytes, root))


def count_nodes(source: NodeSource, value_bytes: int, root: int) -> int:
    """Number of nodes of a tree, by reading its internal nodes and one leaf. Raises BlockDamaged."""
    height = 0
    node = read_node(source, root, value_bytes)
    level = [root]
    total = 1
    while not node.leaf:
        height += 1
        level = [
            child
            for location in level
            for child in read_node(source, location, value_bytes, height).values.tolist()
        ]
        total += len(level)
        node = read_node(source, level[0], value_bytes, height)
    return total

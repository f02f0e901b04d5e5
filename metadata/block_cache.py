"""Reading nodes: verified once when they come from storage, then kept decoded in a bounded cache.

In: the read side only. Out: changed blocks, which the transaction keeps and asks first.
The cache holds `Node` objects, whose arrays are views of the 4096 bytes read, so its memory is bounded by
its length times roughly 4.5 KiB.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from .btree import read_leaf
from .checksum import BlockKind
from .errors import BlockDamaged, Damage
from .layout import VALUE_TYPES, U64Array, ValueArray
from .node import Node, decode_node
from .store import BlockStore
from .walk import read_leaves

CACHED_NODES_DEFAULT = 4096
# Fewer leaves than this are worth keeping, and may be here already; more would only drive others out.
LEAVES_READ_TOGETHER = 8


class BlockCache:
    """Verified reads of committed blocks, least recently used nodes forgotten first."""

    def __init__(self, store: BlockStore, capacity: int = CACHED_NODES_DEFAULT) -> None:
        self._store = store
        self._size_blocks = store.size_blocks()
        self._capacity = capacity
        self._nodes: OrderedDict[int, Node] = OrderedDict()

    def node(self, location: int) -> Node:
        """The node at `location`. Raises BlockDamaged, ShortRead, OSError."""
        nodes = self._nodes
        node = nodes.get(location)
        if node is not None:
            nodes.move_to_end(location)
            return node
        node = decode_node(self.raw(location, BlockKind.NODE), location)
        self.keep(location, node)
        return node

    def entries(self, locations: U64Array, value_bytes: int) -> tuple[U64Array, ValueArray]:
        """Keys and values of these leaves one after another. Many are read together and not kept.

        Raises BlockDamaged, also where a block is no leaf with values of this size; ShortRead, OSError.
        """
        if len(locations) >= LEAVES_READ_TOGETHER:
            return read_leaves(self._store, value_bytes, locations)
        keys: list[U64Array] = [np.empty(0, np.uint64)]
        values: list[ValueArray] = [np.empty(0, VALUE_TYPES[value_bytes])]
        for location in locations.tolist():
            node = read_leaf(self, location, value_bytes)
            keys.append(node.keys)
            values.append(node.values)
        return np.concatenate(keys), np.concatenate(values)

    def raw(self, location: int, kind: BlockKind) -> bytes:
        """Bytes of a block, unverified; `kind` is only for the message when there is no such block."""
        if not 0 <= location < self._size_blocks:
            raise BlockDamaged(location, kind.label, Damage.OUTSIDE, f"{self._size_blocks} blocks")
        return self._store.read(location, 1)

    def keep(self, location: int, node: Node) -> None:
        """Remember the committed content of a block."""
        nodes = self._nodes
        nodes[location] = node
        nodes.move_to_end(location)
        if len(nodes) > self._capacity:
            nodes.popitem(last=False)

    def forget(self, location: int) -> None:
        """Drop what is known of a block: it is about to get other content."""
        self._nodes.pop(location, None)

    def clear(self) -> None:
        """Drop everything and look again how large the storage is."""
        self._nodes.clear()
        self._size_blocks = self._store.size_blocks()

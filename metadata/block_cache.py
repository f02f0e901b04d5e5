"""Reading nodes: verified once when they come from storage, then kept decoded in a bounded cache.

In: the read side only. Out: changed blocks, which the transaction keeps and asks first.
The cache holds `Node` objects, whose arrays are views of the 4096 bytes read, so its memory is bounded by
its length times roughly 4.5 KiB.
"""

from __future__ import annotations

from collections import OrderedDict

from .checksum import BlockKind
from .errors import BlockDamaged, Damage
from .node import Node, decode_node
from .store import BlockStore

CACHED_NODES_DEFAULT = 4096


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

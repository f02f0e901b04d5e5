"""Every intact tree node of a store, found by reading all of it: where repair looks for trees that nothing names.

In: which blocks are nodes, of which kind, and how often each is counted as used. Out: which of them are still part of
the pool (repair): freed blocks hold intact nodes of the past.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .bitmap import decode_bitmap
from .errors import MetadataError
from .index import decode_index
from .layout import COUNT_OVERFLOW, ENTRIES_PER_BITMAP, METADATA_BLOCKS_MAX, U32Array, bitmaps_for
from .node import Node
from .node_batch import read_nodes
from .store import BlockStore
from .superblock import SpaceMapRoot
from .walk import salvage

_BLOCKS_AT_ONCE = 1024


@dataclass(slots=True)
class NodeScan:
    """Intact nodes with values of one size.

    Attributes:
        leaves: block -> (first key, last key, entries) of leaves that hold something.
        inner: block -> node.
        small: leaves all of whose values may be block numbers of metadata: what a leaf of device roots looks like. (A
            mapping's value is above those, unless it names data block 0.)
    """

    leaves: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    inner: dict[int, Node] = field(default_factory=dict)
    small: dict[int, Node] = field(default_factory=dict)


def scan_nodes(store: BlockStore, value_bytes: int) -> NodeScan:
    """Look at every block. Never raises for what blocks hold."""
    found = NodeScan()
    size = store.size_blocks()
    for first in range(0, size, _BLOCKS_AT_ONCE):
        locations = np.arange(first, min(first + _BLOCKS_AT_ONCE, size), dtype=np.uint64)
        batch = read_nodes(store, locations, value_bytes)
        begin = 0
        for position, end in zip(batch.leaves.positions.tolist(), batch.leaves.ends.tolist(), strict=True):
            node = Node(True, batch.leaves.keys[begin:end], batch.leaves.values[begin:end], 0)
            _take(found, first + position, node)
            begin = end
        for position, node in batch.others:
            _take(found, first + position, node)
    return found


def _take(found: NodeScan, location: int, node: Node) -> None:
    if not node.leaf:
        found.inner[location] = node
        return
    if len(node.keys):
        found.leaves[location] = int(node.keys[0]), int(node.keys[-1]), len(node.keys)
    if node.values.dtype.itemsize != 8 or bool((node.values < METADATA_BLOCKS_MAX).all()):
        found.small[location] = Node(True, node.keys.copy(), node.values.copy(), 0)


def stored_counts(store: BlockStore, root: SpaceMapRoot) -> U32Array | None:
    """How often the metadata space map counts each block, shape (size_blocks,); None where it is damaged."""
    size = store.size_blocks()
    try:
        index = decode_index(store.read(root.bitmap_root, 1), root.bitmap_root)
        counts = np.zeros(bitmaps_for(max(root.blocks, size)) * ENTRIES_PER_BITMAP, np.uint32)
        for number in range(bitmaps_for(root.blocks)):
            location = int(index.entries[number]["location"])
            begin = number * ENTRIES_PER_BITMAP
            counts[begin : begin + ENTRIES_PER_BITMAP] = decode_bitmap(
                store.read(location, 1), location
            ).counts
    except (MetadataError, OSError, ValueError):
        return None
    blocks, exact, complete = salvage(store, 4, root.overflow_root)
    if not complete:
        return None
    inside = blocks < len(counts)
    places = blocks[inside].astype(np.int64)
    known = counts[places] == COUNT_OVERFLOW
    counts[places[known]] = exact[inside][known]
    return counts[:size]

"""B-tree nodes: decoding a block to numpy arrays and back.

In: the node codec and the checks that need nothing but the node itself. Out: paths, key ranges of
parents, reference counts. Nodes are immutable: an edit makes a new `Node` and puts it at a new place.

Layout (struct btree_node, dm-btree-internal.h): a 32-byte header, then *capacity* keys, then
*capacity* values, so the values start at the same place however full the node is. Slots past the
entry count hold stale bytes in kernel-made pools; they are written as zeros here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .checksum import BlockKind, seal, verify
from .errors import BlockDamaged, Damage
from .layout import (
    BLOCK_BYTES,
    NODE_HEADER_BYTES,
    NODE_INTERNAL,
    NODE_LEAF,
    VALUE_TYPES,
    U64Array,
    ValueArray,
    max_entries,
)

_HEADER = struct.Struct("<IIQIIII")
_LABEL = BlockKind.NODE.label
_KEY_TYPE = np.dtype("<u8")
assert _HEADER.size == NODE_HEADER_BYTES

CAPACITY = {size: max_entries(size) for size in VALUE_TYPES}
assert CAPACITY == {4: 336, 8: 252, 16: 168, 24: 126}


@dataclass(frozen=True, slots=True)
class Node:
    """One decoded node.

    Attributes:
        leaf: True for a leaf, False for an internal node.
        keys: shape (n,), uint64, strictly ascending.
        values: shape (n,); child block numbers in an internal node, else the tree's value type.
        capacity: entries the block has room for, as recorded.
        padding: the header's last word, zero in every known pool.
    """

    leaf: bool
    keys: U64Array
    values: ValueArray
    capacity: int
    padding: int = 0

    @property
    def minimum(self) -> int:
        """Entries below which a node that is not a root counts as under-filled."""
        return self.capacity // 3

    def encode(self, location: int) -> bytes:
        """The 4096 bytes of this node at `location`, checksum included."""
        count = len(self.keys)
        block = bytearray(BLOCK_BYTES)
        value_bytes = self.values.dtype.itemsize
        flags = NODE_LEAF if self.leaf else NODE_INTERNAL
        _HEADER.pack_into(block, 0, 0, flags, location, count, self.capacity, value_bytes, self.padding)
        np.frombuffer(block, _KEY_TYPE, count, NODE_HEADER_BYTES)[:] = self.keys
        values_at = NODE_HEADER_BYTES + 8 * self.capacity
        np.frombuffer(block, self.values.dtype, count, values_at)[:] = self.values
        return seal(block, BlockKind.NODE, location)


def make_leaf(keys: U64Array, values: ValueArray) -> Node:
    """A leaf of standard capacity."""
    return Node(True, keys, values, CAPACITY[values.dtype.itemsize])


def make_internal(keys: U64Array, children: U64Array) -> Node:
    """An internal node of standard capacity."""
    return Node(False, keys, children, CAPACITY[8])


def empty_leaf(value_bytes: int) -> Node:
    """A leaf without entries: a whole empty tree."""
    return make_leaf(np.empty(0, _KEY_TYPE), np.empty(0, VALUE_TYPES[value_bytes]))


def decode_node(raw: bytes, location: int) -> Node:
    """Decode and verify one node; the arrays are read-only views of `raw`.

    Raises:
        BlockDamaged: the first thing wrong, in the order checksum, kind, location, flags, value size,
            capacity, entry count, key order.
    """
    verify(raw, BlockKind.NODE, location)
    return decode_unverified(raw, location)


def decode_unverified(raw: bytes, location: int) -> Node:
    """As `decode_node` for a block whose checksum and location were verified already."""
    _, flags, _, count, capacity, value_bytes, padding = _HEADER.unpack_from(raw)
    kind = flags & (NODE_INTERNAL | NODE_LEAF)
    if kind not in (NODE_INTERNAL, NODE_LEAF):
        raise BlockDamaged(location, _LABEL, Damage.NODE_FLAGS, f"flags {flags:#x}")
    value_type = VALUE_TYPES.get(value_bytes)
    if value_type is None or (kind == NODE_INTERNAL and value_bytes != 8):
        raise BlockDamaged(location, _LABEL, Damage.VALUE_SIZE, f"{value_bytes} bytes")
    if not 3 <= capacity <= CAPACITY[value_bytes] or capacity % 3:
        raise BlockDamaged(location, _LABEL, Damage.MAX_ENTRIES, f"{capacity} entries")
    if count > capacity:
        raise BlockDamaged(location, _LABEL, Damage.ENTRY_COUNT, f"{count} of {capacity}")
    if kind == NODE_INTERNAL and count == 0:
        raise BlockDamaged(location, _LABEL, Damage.EMPTY_INTERNAL)
    keys = np.frombuffer(raw, _KEY_TYPE, count, NODE_HEADER_BYTES)
    if count > 1 and not (keys[1:] > keys[:-1]).all():
        raise BlockDamaged(location, _LABEL, Damage.KEY_ORDER)
    values = np.frombuffer(raw, value_type, count, NODE_HEADER_BYTES + 8 * capacity)
    return Node(kind == NODE_LEAF, keys, values, capacity, padding)

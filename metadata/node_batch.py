"""Reading many tree nodes at once: the codec of `node` applied to whole arrays of blocks.

In: reading a list of blocks whatever some of them are like, and decoding the usual leaf by the hundred.
Out: order, paths, key ranges (walk); what to do about damage.

Walking ten million mappings visits some fifty thousand leaves, nearly all of them siblings of hundreds. Checking and
decoding those as one matrix costs a tenth of decoding them one by one. Whatever is not a sound leaf of standard
capacity goes through `decode_node`, which knows what is wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .checksum import BlockKind, raw_sum
from .errors import BlockDamaged, Damage, MetadataError, ShortRead
from .layout import (
    BLOCK_BYTES,
    NODE_HEADER_BYTES,
    NODE_INTERNAL,
    NODE_LEAF,
    VALUE_TYPES,
    U8Array,
    U64Array,
    ValueArray,
)
from .node import CAPACITY, Node, decode_node
from .store import BlockStore

HEADER = np.dtype(
    [
        ("sum", "<u4"),
        ("flags", "<u4"),
        ("location", "<u8"),
        ("count", "<u4"),
        ("capacity", "<u4"),
        ("value_bytes", "<u4"),
        ("padding", "<u4"),
    ]
)
assert HEADER.itemsize == NODE_HEADER_BYTES
_LABEL = BlockKind.NODE.label
_HOLE = bytes(BLOCK_BYTES)

# What can keep a block from being read: contents, the end of the storage, the storage itself.
ReadFault = BlockDamaged | ShortRead | OSError


@dataclass(frozen=True, slots=True)
class Leaves:
    """Several leaves, their entries one after another.

    Attributes:
        positions: shape (n,), int64; places of the leaves in the list that was asked for, ascending.
        counts: shape (n,), int64; entries of each leaf.
        keys: shape (sum of counts,), uint64.
        values: shape (sum of counts,); the tree's value type.
    """

    positions: NDArray[np.int64]
    counts: NDArray[np.int64]
    keys: U64Array
    values: ValueArray

    @property
    def ends(self) -> NDArray[np.int64]:
        """Index in `keys` just past the entries of each leaf, shape (n,)."""
        ends: NDArray[np.int64] = np.cumsum(self.counts)
        return ends

    @classmethod
    def of(cls, position: int, node: Node) -> Leaves:
        """A single leaf."""
        return cls(np.array([position]), np.array([len(node.keys)]), node.keys, node.values)


@dataclass(frozen=True, slots=True)
class NodeBatch:
    """Blocks that were read as nodes: each position is in exactly one of the three."""

    leaves: Leaves
    others: list[tuple[int, Node]] = field(default_factory=list)
    damaged: list[tuple[int, ReadFault]] = field(default_factory=list)


def read_blocks(store: BlockStore, locations: U64Array) -> tuple[bytes, dict[int, ReadFault]]:
    """The blocks one after another, zeros for those that cannot be read, and why not, by position."""
    size = store.size_blocks()
    faults: dict[int, ReadFault] = {}
    parts: list[bytes] = []
    breaks = np.flatnonzero(locations[1:] != locations[:-1] + np.uint64(1)) + 1
    wanted = locations.tolist()
    for start, stop in pairwise([0, *breaks.tolist(), len(wanted)]):
        if wanted[stop - 1] < size:
            try:
                parts.append(store.read(wanted[start], stop - start))
                continue
            except (OSError, ShortRead):
                pass  # found out block by block below
        for position in range(start, stop):
            parts.append(_read_one(store, size, position, wanted[position], faults))
    return b"".join(parts), faults


def _read_one(
    store: BlockStore, size: int, position: int, location: int, faults: dict[int, ReadFault]
) -> bytes:
    if location >= size:
        faults[position] = BlockDamaged(location, "metadata block", Damage.OUTSIDE, f"{size} blocks")
        return _HOLE
    try:
        return store.read(location, 1)
    except (OSError, ShortRead) as fault:
        faults[position] = fault
        return _HOLE


def read_nodes(store: BlockStore, locations: U64Array, value_bytes: int) -> NodeBatch:
    """Read blocks that should be nodes of a tree with values of this size. Never raises for what they hold."""
    raw, faults = read_blocks(store, locations)
    matrix = np.frombuffer(raw, np.uint8).reshape(-1, BLOCK_BYTES)
    usual = _usual_leaves(raw, matrix, locations, value_bytes)
    leaves, usual = _decode_leaves(matrix, usual, value_bytes)
    batch = NodeBatch(leaves)
    for position in np.flatnonzero(~usual).tolist():
        fault = faults.get(position)
        block = raw[position * BLOCK_BYTES : (position + 1) * BLOCK_BYTES]
        node = fault or _decode_other(block, int(locations[position]), value_bytes)
        if isinstance(node, Node):
            batch.others.append((position, node))
        else:
            batch.damaged.append((position, node))
    return batch


def _usual_leaves(raw: bytes, matrix: U8Array, locations: U64Array, value_bytes: int) -> NDArray[np.bool_]:
    """Which rows are intact leaves of standard capacity, but for the order of their keys."""
    view = memoryview(raw)
    sums = np.array(
        [raw_sum(view[offset : offset + BLOCK_BYTES]) for offset in range(0, len(raw), BLOCK_BYTES)],
        np.uint32,
    )
    header = matrix[:, :NODE_HEADER_BYTES].copy().view(HEADER).reshape(-1)
    usual: NDArray[np.bool_] = (sums ^ header["sum"]) == BlockKind.NODE
    usual &= header["location"] == locations
    usual &= header["flags"] & (NODE_INTERNAL | NODE_LEAF) == NODE_LEAF
    usual &= header["value_bytes"] == value_bytes
    usual &= header["capacity"] == CAPACITY[value_bytes]
    usual &= header["count"] <= CAPACITY[value_bytes]
    return usual


def _decode_leaves(
    matrix: U8Array, usual: NDArray[np.bool_], value_bytes: int
) -> tuple[Leaves, NDArray[np.bool_]]:
    """The leaves among `usual` whose keys ascend, and which those are."""
    capacity = CAPACITY[value_bytes]
    rows = matrix if usual.all() else matrix[usual]
    positions = np.flatnonzero(usual)
    counts = rows[:, 16:20].copy().view("<u4").reshape(-1).astype(np.int64)
    values_at = NODE_HEADER_BYTES + 8 * capacity
    keys = rows[:, NODE_HEADER_BYTES:values_at].view("<u8")
    values = rows[:, values_at : values_at + value_bytes * capacity].view(VALUE_TYPES[value_bytes])
    used = np.arange(capacity) < counts[:, np.newaxis]
    ascending = ((keys[:, 1:] > keys[:, :-1]) | ~used[:, 1:]).all(axis=1)
    if not ascending.all():
        positions, counts = positions[ascending], counts[ascending]
        keys, values, used = keys[ascending], values[ascending], used[ascending]
        usual = np.zeros_like(usual)
        usual[positions] = True
    return Leaves(positions, counts, keys[used], values[used]), usual


def _decode_other(block: bytes, location: int, value_bytes: int) -> Node | BlockDamaged:
    try:
        node = decode_node(block, location)
    except BlockDamaged as fault:
        return fault
    if node.leaf and node.values.dtype.itemsize != value_bytes:
        found = f"{node.values.dtype.itemsize} bytes, not {value_bytes}"
        return BlockDamaged(location, _LABEL, Damage.VALUE_SIZE, found)
    return node


def fault_text(fault: MetadataError | OSError) -> str:
    """The reason alone, as a clause: "its checksum does not match its contents"."""
    if isinstance(fault, BlockDamaged):
        return f"{fault.damage.value} ({fault.found})" if fault.found else fault.damage.value
    if isinstance(fault, MetadataError):
        return str(fault)
    return f"it cannot be read: {fault.strerror or fault}"

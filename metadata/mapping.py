"""The two-level mapping tree: device id to a tree of its own, thin block to packed data block and time.

In: lookups and changes of mappings with all reference counts they imply. Out: device records (devices),
choosing data blocks (the application's).

A data block's count is the number of distinct bottom leaves that name it: two devices sharing a leaf count
once. So inserting counts the new block, overwriting uncounts the old one, copying a shared leaf counts all its
blocks again, and dropping the last reference to a leaf uncounts them.

A device's tree is always reached through a *shadowed* top-level path before it is changed: if the top level is shared
with a metadata snapshot, that is what makes the device's root count two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from .btree import Leaf, child_position, find_leaf, has_entries, last_key, leaves, lookup, read_node
from .btree_edit import TreeEditor
from .btree_insert import TreeInserter, group_bounds
from .btree_remove import TreeRemover
from .counts import CountTable
from .errors import NoSuchDevice
from .layout import TIME_BITS, BoolArray, U64Array, ValueArray
from .transaction import Transaction
from .tree_kind import TreeKind

_TIME_BITS = np.uint64(TIME_BITS)


@dataclass(frozen=True, slots=True)
class BottomKind(TreeKind):
    """Trees of one device: values name data blocks."""

    name: str = "device mappings"
    value_bytes: int = 8
    data: CountTable = field(kw_only=True)

    def share(self, values: ValueArray) -> None:
        """See `TreeKind.share`."""
        self.data.increase(values >> _TIME_BITS)

    def release(self, values: ValueArray) -> None:
        """See `TreeKind.release`."""
        self.data.decrease(values >> _TIME_BITS)

    def exchange(self, old: ValueArray, new: ValueArray) -> None:
        """See `TreeKind.exchange`; only the data block matters, not the time."""
        old_blocks, new_blocks = old >> _TIME_BITS, new >> _TIME_BITS
        moved = old_blocks != new_blocks
        self.data.increase(new_blocks[moved])
        self.data.decrease(old_blocks[moved])

    def adopt(self, values: ValueArray) -> None:
        """See `TreeKind.adopt`."""
        self.data.increase(values >> _TIME_BITS)


@dataclass(frozen=True, slots=True)
class TopKind(TreeKind):
    """The top level: values are roots of bottom trees. Insertion moves a reference, it does not make one."""

    name: str = "devices' mapping trees"
    value_bytes: int = 8
    bottom: TreeEditor = field(kw_only=True)

    def share(self, values: ValueArray) -> None:
        """See `TreeKind.share`."""
        self.bottom.transaction.reference(values)

    def release(self, values: ValueArray) -> None:
        """See `TreeKind.release`."""
        for root in values.tolist():
            self.bottom.drop(root)


class MappingTree:
    """All mappings of a pool within one transaction."""

    def __init__(self, transaction: Transaction, data: CountTable, root: int) -> None:
        self._transaction = transaction
        self._data = data
        self._bottom = TreeEditor(transaction, BottomKind(data=data))
        self._top = TreeEditor(transaction, TopKind(bottom=self._bottom))
        self.root = root

    # Reading

    def device_root(self, device_id: int) -> int:
        """Root of a device's tree. Raises NoSuchDevice, BlockDamaged."""
        value = lookup(self._transaction, 8, self.root, device_id)
        if value is None:
            raise NoSuchDevice(device_id)
        return int(value)

    def lookup(self, device_id: int, thin_block: int) -> int | None:
        """Packed value of one thin block, None when unmapped."""
        value = lookup(self._transaction, 8, self.device_root(device_id), thin_block)
        return None if value is None else int(value)

    def leaf(self, device_id: int, thin_block: int) -> Leaf:
        """The leaf that answers for a thin block."""
        return find_leaf(self._transaction, 8, self.device_root(device_id), thin_block)

    def mappings(self, device_id: int, begin: int, end: int) -> Iterator[tuple[U64Array, U64Array]]:
        """Keys and values of a range, leaf by leaf."""
        return leaves(self._transaction, 8, self.device_root(device_id), begin, end)

    def highest(self, device_id: int) -> int | None:
        """The last mapped thin block, None when nothing is mapped."""
        return last_key(self._transaction, 8, self.device_root(device_id))

    def height(self, device_id: int) -> int:
        """Levels of a device's tree, 1 for a single leaf."""
        return self._height(self.device_root(device_id))

    def top_height(self) -> int:
        """Levels of the top-level tree."""
        return self._height(self.root)

    def _height(self, root: int) -> int:
        node = read_node(self._transaction, root, 8)
        levels = 1
        while not node.leaf:
            node = read_node(self._transaction, int(node.values[0]), 8, levels)
            levels += 1
        return levels

    def path_is_shared(self, device_id: int) -> bool:
        """Whether a node of the top level on the way to this device has more than one referrer."""
        location = self.root
        depth = 0
        while not self._transaction.is_shared(location):
            node = read_node(self._transaction, location, 8, depth)
            if node.leaf:
                return False
            location = int(node.values[max(child_position(node, device_id), 0)])
            depth += 1
        return True

    def exclusive(self, device_id: int, keys: U64Array) -> BoolArray:
        """True for keys mapped to a data block that nothing but this device's tree reaches."""
        result: BoolArray = np.zeros(len(keys), np.bool_)
        root = self.device_root(device_id)
        if len(keys) and not self.path_is_shared(device_id):
            self._exclusive(root, keys, result, 0)
        return result

    def _exclusive(self, location: int, keys: U64Array, result: BoolArray, depth: int) -> None:
        if self._transaction.is_shared(location):
            return
        node = read_node(self._transaction, location, 8, depth)
        positions = node.keys.searchsorted(keys, "right").astype(np.int64) - 1
        np.maximum(positions, 0, out=positions)
        if node.leaf:
            if len(node.keys):
                counts = self._data.gather(node.values[positions] >> _TIME_BITS)
                np.logical_and(node.keys[positions] == keys, counts == 1, out=result)
            return
        bounds = group_bounds(positions)
        for start, stop in pairwise(bounds):
            child = int(node.values[positions[start]])
            self._exclusive(child, keys[start:stop], result[start:stop], depth + 1)

    def exclusive_blocks(self, device_id: int) -> int:
        """Data blocks that deleting the device would free. Shared subtrees are not read."""
        root = self.device_root(device_id)
        return 0 if self.path_is_shared(device_id) else self._count_exclusive(root, 0)

    def _count_exclusive(self, location: int, depth: int) -> int:
        if self._transaction.is_shared(location):
            return 0
        node = read_node(self._transaction, location, 8, depth)
        if node.leaf:
            return int(np.count_nonzero(self._data.gather(node.values >> _TIME_BITS) == 1))
        return sum(self._count_exclusive(child, depth + 1) for child in node.values.tolist())

    def touched_nodes(self, device_id: int, keys: U64Array) -> tuple[int, int]:
        """Nodes an insertion of `keys` would rewrite, and how many of those are shared now."""
        root = self.device_root(device_id)
        return self._touched(root, keys, self.path_is_shared(device_id), 0)

    def _touched(self, location: int, keys: U64Array, shared: bool, depth: int) -> tuple[int, int]:
        shared = shared or self._transaction.is_shared(location)
        node = read_node(self._transaction, location, 8, depth)
        nodes, shared_nodes = 1, int(shared)
        if node.leaf:
            return nodes, shared_nodes
        positions = node.keys.searchsorted(keys, "right").astype(np.int64) - 1
        np.maximum(positions, 0, out=positions)
        bounds = group_bounds(positions)
        for start, stop in pairwise(bounds):
            child = int(node.values[positions[start]])
            below = self._touched(child, keys[start:stop], shared, depth + 1)
            nodes, shared_nodes = nodes + below[0], shared_nodes + below[1]
        return nodes, shared_nodes

    # Changing: all raise BlockDamaged, CountDamaged or MetadataFull with the transaction half done

    def create(self, device_id: int) -> None:
        """An empty tree for a new device."""
        self._set_root(device_id, self._bottom.create())

    def copy(self, device_id: int, origin_id: int) -> None:
        """Let a new device share the tree of another."""
        root = self.device_root(origin_id)
        # First the slot (which may copy a shared top-level leaf and count all roots), then the count of our own.
        self._set_root(device_id, root)
        self._transaction.reference(np.array([root], np.uint64))

    def delete(self, device_id: int) -> None:
        """Remove a device's tree and everything only it reached."""
        self.root = TreeRemover(self._top).remove_keys(self.root, np.array([device_id], np.uint64))

    def insert(self, device_id: int, keys: U64Array, values: U64Array) -> int:
        """Insert mappings; returns how many keys were unmapped before."""
        root = self._own(device_id)
        inserter = TreeInserter(self._bottom)
        self._set_root(device_id, inserter.insert(root, keys, values))
        return inserter.added

    def remove(self, device_id: int, begin: int, end: int) -> int:
        """Remove a range; returns how many mappings went. Changes nothing at all when there are none."""
        root = self.device_root(device_id)
        if not has_entries(self._transaction, 8, root, begin, end):
            return 0
        root = self._own(device_id)
        remover = TreeRemover(self._bottom)
        self._set_root(device_id, remover.remove_range(root, begin, end))
        return remover.removed

    def drop_snapshot(self, root: int) -> None:
        """Remove one reference to a whole top-level tree (of a metadata snapshot)."""
        self._top.drop(root)

    def _own(self, device_id: int) -> int:
        """Shadow the top-level path of a device and return the root found there."""
        root = self.device_root(device_id)
        self._set_root(device_id, root)
        return root

    def _set_root(self, device_id: int, root: int) -> None:
        self.root = TreeInserter(self._top).insert(
            self.root, np.array([device_id], np.uint64), np.array([root], np.uint64)
        )

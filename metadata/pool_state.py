"""Everything a running transaction consists of, built from a superblock; thrown away whole by an abort.

In: loading, settling all structures for a commit, accounting of metadata space. Out: the operations
(pool_metadata), I/O order (commit).

Room. Commits and deletions must not fail for lack of metadata blocks, although they allocate them. So `reserve`
bounds from above what a commit would still allocate now: every bitmap of a chunk with data in it (a deletion
may touch them all), the index, all nodes of the overflow trees plus what copying shared nodes may add to
them, and the device records waiting. Operations that add something must leave that and a bit for one deletion free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .block_cache import BlockCache
from .btree import count_nodes
from .devices import DeviceTable
from .errors import MetadataFull, MetadataTooShort
from .layout import SUPERBLOCK_VERSION, bitmaps_for
from .mapping import MappingTree
from .space_map import DataSpaceMap, MetadataSpaceMap
from .store import BlockStore
from .superblock import Superblock, check_acceptable, read_superblock

# Index records in a minimally filled leaf of the data space map's index.
_INDEX_LEAF_MIN = 56
_DETAILS_LEAF_MIN = 42
# A copied node makes at most 252 counts reach three; two and a bit overflow leaves hold them.
_OVERFLOW_PER_SHARED_NODE = 3
_REMOVAL_BLOCKS = 48
_DETAILS_PATH_BLOCKS = 6
_TOP_LEVEL_BLOCKS = 8
_DEVICE_BLOCKS = _TOP_LEVEL_BLOCKS + 2 * _OVERFLOW_PER_SHARED_NODE


class PoolState:
    """The structures of one pool within one transaction.

    `superblock` is the one being prepared; `committed` the one in storage.
    """

    def __init__(self, store: BlockStore, cache: BlockCache, superblock: Superblock) -> None:
        self.store = store
        self.committed = superblock
        self.superblock = superblock
        self.metadata_space = MetadataSpaceMap(cache, superblock.metadata_space)
        self.transaction = self.metadata_space.transaction
        self.data_space = DataSpaceMap(self.transaction, superblock.data_space)
        self.mapping = MappingTree(self.transaction, self.data_space.counts, superblock.mapping_root)
        self.devices = DeviceTable(self.transaction, superblock.details_root)
        # Asked for so many free blocks where there are fewer; it may raise the limit of the transaction.
        self.more_room: Callable[[int], None] = lambda free_blocks: None
        self._shared_copies = 0
        self._overflow_nodes: dict[int, int] = {}

    @classmethod
    def load(cls, store: BlockStore, cache: BlockCache, *, writable: bool) -> PoolState:
        """Read the superblock and what a transaction needs from the start.

        Raises NotPoolMetadata, UnsupportedPool, MetadataTooShort, BlockDamaged, CountDamaged, OSError.
        """
        superblock = read_superblock(store)
        check_acceptable(superblock, writable=writable)
        recorded, actual = superblock.metadata_space.blocks, store.size_blocks()
        if actual < recorded:
            raise MetadataTooShort(recorded, actual)
        state = cls(store, cache, superblock)
        if writable:
            state.metadata_space.load_all()
        return state

    @property
    def changed(self) -> bool:
        """Whether a commit would write anything."""
        return (
            self.superblock != self.committed
            or self.transaction.has_changes
            or self.devices.pending > 0
            or self.data_space.missing_bitmaps > 0
            or self.metadata_space.missing_bitmaps > 0
            or self.data_space.counts.blocks != self.committed.data_space.blocks
            or self.metadata_space.counts.blocks != self.committed.metadata_space.blocks
        )

    # Room

    @property
    def reserve(self) -> int:
        """Blocks a commit might still have to allocate if everything in the pool were deleted before it."""
        return self._commit_blocks(0)

    def _commit_blocks(self, new_data_blocks: int) -> int:
        data, metadata = self.data_space, self.metadata_space
        bitmaps = (
            min(bitmaps_for(data.counts.blocks), data.allocated + new_data_blocks) + data.missing_bitmaps
        )
        index_nodes = bitmaps // _INDEX_LEAF_MIN + 4
        metadata_map = bitmaps_for(metadata.counts.blocks) + 2
        overflow = self._nodes_of(data.overflow_root) + self._nodes_of(metadata.overflow_root)
        overflow += _OVERFLOW_PER_SHARED_NODE * self._shared_copies + 2
        pending = self.devices.pending
        details = 4 + (pending and pending // _DETAILS_LEAF_MIN + min(6 * pending, self._details_nodes()))
        return bitmaps + index_nodes + metadata_map + overflow + details

    def _nodes_of(self, overflow_root: int) -> int:
        """Nodes of an overflow tree; these trees change only at commits, so the answer is remembered."""
        known = self._overflow_nodes.get(overflow_root)
        if known is None:
            known = self._overflow_nodes[overflow_root] = count_nodes(self.transaction, 4, overflow_root)
        return known

    def _details_nodes(self) -> int:
        return count_nodes(self.transaction, 24, self.devices.root)

    def _deletion_blocks(self) -> int:
        """What deleting one device allocates at most: its path in the top level and two neighbours a level."""
        return 3 * self.mapping.top_height() + 1

    def _require(self, blocks: int, kept_blocks: int, new_data_blocks: int = 0) -> None:
        kept = self._commit_blocks(new_data_blocks) + kept_blocks
        if blocks + kept > self.transaction.free_blocks:
            self.more_room(blocks + kept)
        free = self.transaction.free_blocks
        if blocks + kept > free:
            raise MetadataFull(blocks, free, kept)

    def require(self, blocks: int, new_data_blocks: int = 0) -> None:
        """Room for an operation that adds something, leaving enough for a commit, a removal and a deletion.

        Raises:
            MetadataFull: there may not be enough; nothing has been changed.
        """
        self._require(blocks, self.kept_from_additions(), new_data_blocks)

    @property
    def room(self) -> int:
        """Blocks `require` can grant now, disregarding the bitmaps of new data blocks."""
        return self.transaction.free_blocks - self.reserve - self.kept_from_additions()

    def kept_from_additions(self) -> int:
        """Blocks that additions leave free beside the reserve: for a removal, two deletions and a rollback."""
        removal = min(_REMOVAL_BLOCKS, self.metadata_space.counts.blocks // 8)
        return removal + self._kept_for_deletion()

    def _kept_for_deletion(self) -> int:
        # Twice: while a metadata snapshot is held, the first deletion's copies are not paid back by its commit. And a
        # device more, which a rollback makes before it deletes.
        return (
            2 * (self._deletion_blocks() + _DETAILS_PATH_BLOCKS) + _DEVICE_BLOCKS + _OVERFLOW_PER_SHARED_NODE
        )

    def require_for_insert(self, device_id: int, count: int, touched: tuple[int, int]) -> None:
        """Room for inserting `count` mappings into a device, `touched` as `MappingTree.touched_nodes` gives it."""
        nodes, shared = touched
        grown = -(-count // 84) + 3
        grown += -(-grown // 84) + self.mapping.height(device_id)
        self.require(nodes + grown + _TOP_LEVEL_BLOCKS + _OVERFLOW_PER_SHARED_NODE * (shared + 1), count)
        self._shared_copies += shared

    def require_for_device(self, *, replacing: bool = False) -> None:
        """Room for adding a device or snapshot; `replacing`: another one is deleted in the same transaction.

        A replacement adds nothing in the end, so it may take from what additions have to leave (a rollback must work
        when the metadata is full).
        """
        if replacing:
            deletion = self._deletion_blocks() + _DETAILS_PATH_BLOCKS + _OVERFLOW_PER_SHARED_NODE
            self._require(_DEVICE_BLOCKS, deletion)
        else:
            self.require(_DEVICE_BLOCKS)
        self._shared_copies += 1

    def require_for_removal(self, device_id: int, begin: int, end: int) -> None:
        """Room for removing a range: the nodes on its two edges, and two neighbours of them on every level."""
        levels = self.mapping.height(device_id)
        edges = np.unique(np.array([begin, end - 1], np.uint64))
        nodes, shared = self.mapping.touched_nodes(device_id, edges)
        shared += 2 * (levels - 1)
        nodes += 2 * (levels - 1) + self._deletion_blocks()
        self._require(nodes + _OVERFLOW_PER_SHARED_NODE * shared, self._kept_for_deletion())
        self._shared_copies += shared

    def require_for_deletion(self) -> None:
        """Room for deleting a device; only ever lacking when the same transaction deleted others."""
        self._require(self._deletion_blocks() + _DETAILS_PATH_BLOCKS + _OVERFLOW_PER_SHARED_NODE, 0)
        self._shared_copies += 1

    # Commit

    def settle(self) -> Superblock:
        """Bring all trees and maps up to date in memory and give the superblock to write.

        Raises BlockDamaged, CountDamaged, MetadataFull; the transaction must then be aborted.
        """
        self.devices.settle()
        self.data_space.settle()
        metadata_root = self.metadata_space.settle()
        self.superblock = replace(
            self.superblock,
            version=SUPERBLOCK_VERSION,
            mapping_root=self.mapping.root,
            details_root=self.devices.root,
            data_space=self.data_space.root(),
            metadata_space=metadata_root,
        )
        return self.superblock

    def finish(self) -> None:
        """The settled transaction is committed; a new one begins."""
        self.committed = self.superblock
        self.metadata_space.finish(self.superblock.metadata_space)
        self._shared_copies = 0
        self._overflow_nodes.clear()

"""Metadata snapshots: a copy of the superblock that keeps the trees of one moment readable.

In: reserving and releasing the one a pool can hold. Out: reading through it.

The copy has the roots of both space maps zeroed and no snapshot of its own; it holds one reference to each of
the two trees. It pins mappings, not data: deleting a device frees nothing until the copy is
released. Everything here is part of the running transaction and takes effect with its commit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .btree_edit import TreeEditor
from .checksum import BlockKind
from .devices import DETAILS_KIND
from .errors import BlockDamaged, Damage, MetadataSnapshotExists, NoMetadataSnapshot
from .pool_state import PoolState
from .superblock import SpaceMapRoot, Superblock

_ZERO_ROOT = SpaceMapRoot(0, 0, 0, 0)


def reserve(state: PoolState) -> int:
    """Take a metadata snapshot of the transaction's present state; returns its block.

    Raises:
        MetadataSnapshotExists: one is held already.
        MetadataFull: no room; nothing has been changed.
    """
    if state.superblock.held_root:
        raise MetadataSnapshotExists(state.superblock.held_root)
    state.require_for_device()
    state.devices.settle()
    mapping_root, details_root = state.mapping.root, state.devices.root
    location = state.transaction.allocate()
    copy = replace(
        state.superblock,
        location=location,
        mapping_root=mapping_root,
        details_root=details_root,
        data_space=_ZERO_ROOT,
        metadata_space=_ZERO_ROOT,
        held_root=0,
    )
    state.transaction.put(location, copy)
    state.transaction.reference(np.array([mapping_root, details_root], np.uint64))
    state.superblock = replace(state.superblock, held_root=location)
    return location


def read_held(state: PoolState) -> Superblock:
    """The copy of the superblock that is held. Raises NoMetadataSnapshot, BlockDamaged."""
    location = state.superblock.held_root
    if not location:
        raise NoMetadataSnapshot
    copy = Superblock.unpack(state.transaction.raw(location, BlockKind.SUPERBLOCK), location)
    if copy.held_root:
        raise BlockDamaged(
            location, BlockKind.SUPERBLOCK.label, Damage.RANGE, "a snapshot holding a snapshot"
        )
    return copy


def release(state: PoolState) -> None:
    """Give up the metadata snapshot and what only it reached. Raises NoMetadataSnapshot, BlockDamaged."""
    copy = read_held(state)
    state.mapping.drop_snapshot(copy.mapping_root)
    TreeEditor(state.transaction, DETAILS_KIND).drop(copy.details_root)
    state.transaction.unreference(copy.location)
    state.superblock = replace(state.superblock, held_root=0)

"""What storage holds of a pool's commits beside its superblock: lists of devices, their records, space maps, copies.

In: one look at every block. Out: which of them belong to one commit (commit_candidate), which commit was the last
(commit_order).

A commit writes whatever it changes to blocks that are free, so storage holds the last commit, most of the one before,
and ever less of those before that. The metadata space map is a witness of its own: its index says where its bitmaps
are, they say which blocks were in use at that commit, and none of it depends on a superblock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .bitmap import decode_bitmap
from .capture import OverlayStore
from .checksum import BlockKind, recorded_location, sniff
from .errors import MetadataError
from .index import decode_index
from .layout import (
    COUNT_OVERFLOW,
    ENTRIES_PER_BITMAP,
    SUPERBLOCK_LOCATION,
    U32Array,
    U64Array,
    ValueArray,
    bitmaps_for,
)
from .node_batch import read_nodes
from .node_scan import NodeScan, scan_nodes, stored_counts
from .store import BlockStore
from .superblock import SpaceMapRoot, Superblock
from .walk import salvage

_LEAVES_AT_ONCE = 512
# A pool that hands out metadata ever onwards keeps traces of thousands of commits.
_STATES_MAX = 64


@dataclass(frozen=True, slots=True)
class FoundMap:
    """A metadata space map. `counts`: references to each block as of its commit, shape (size_blocks,)."""

    root: SpaceMapRoot
    counts: U32Array


@dataclass(frozen=True, slots=True)
class FoundTree:
    """A list of device roots or of records: its root, every block of it, device numbers and what belongs to each."""

    root: int
    blocks: tuple[int, ...]
    keys: U64Array
    values: ValueArray


class CommitClues:
    """Everything found in one store; never raises for what blocks hold.

    Attributes:
        store: the store, with blocks that were written to wrong places where they belong.
        moved: which blocks those are.
        superblocks: copies of superblocks, wherever they are.
        intact: blocks of any kind that are what they were when they were written.
        indexes: intact indexes of metadata space maps.
    """

    def __init__(self, source: BlockStore) -> None:
        self.superblocks: list[Superblock] = []
        self.indexes: list[int] = []
        self.intact: set[int] = {SUPERBLOCK_LOCATION}
        astray: dict[int, set[int]] = {}
        for location in range(source.size_blocks()):
            try:
                raw = source.read(location, 1)
            except (MetadataError, OSError):
                continue
            kind = sniff(raw)
            if kind is None:
                continue
            if kind is BlockKind.SUPERBLOCK:
                self._take_superblock(raw, location)
            home = recorded_location(raw)
            if home == location:
                self.intact.add(location)
                if kind is BlockKind.INDEX:
                    self.indexes.append(location)
            elif home != SUPERBLOCK_LOCATION:
                astray.setdefault(home, set()).add(location)
        self.store = source
        self.moved = frozenset(
            home for home, found in astray.items() if home not in self.intact and len(found) == 1
        )
        self._bring_home(source, astray)

    def _take_superblock(self, raw: bytes, location: int) -> None:
        """A superblock, a copy of it, or the superblock of block 0 in a place where it does not belong."""
        for place in (location, SUPERBLOCK_LOCATION):
            try:
                self.superblocks.append(Superblock.unpack(raw, place))
            except MetadataError:
                continue
            return

    def _bring_home(self, source: BlockStore, astray: dict[int, set[int]]) -> None:
        if not self.moved:
            return
        overlay = OverlayStore(source)
        for home in self.moved:
            raw = source.read(next(iter(astray[home])), 1)
            overlay.write(home, raw)
            if sniff(raw) is BlockKind.INDEX:
                self.indexes.append(home)
        self.store = overlay

    @cached_property
    def mappings(self) -> NodeScan:
        """Nodes with values of 8 bytes: leaves of mappings, lists of roots, inner nodes."""
        return scan_nodes(self.store, 8)

    @cached_property
    def nodes(self) -> frozenset[int]:
        """Blocks of nodes that may be of a device's tree."""
        return frozenset(self.mappings.leaves) | frozenset(self.mappings.inner)

    def held_copy(self, counts: U32Array) -> int:
        """Where the superblock copy of a metadata snapshot is, by the space map of one commit; 0 without one."""
        return next((each.location for each in self._held(counts)), 0)

    def held_lists(self, counts: U32Array) -> frozenset[int]:
        """Roots of lists that only a metadata snapshot keeps in use, by the space map of one commit."""
        roots = {root for each in self._held(counts) for root in (each.mapping_root, each.details_root)}
        return frozenset(root for root in roots if root < len(counts) and counts[root] == 1)

    def _held(self, counts: U32Array) -> list[Superblock]:
        """Copies without space maps, which is what a metadata snapshot's is, that are in use."""
        copies = [each for each in self.superblocks if not each.metadata_space.bitmap_root and each.location]
        return [each for each in copies if each.location < len(counts) and counts[each.location]]

    @cached_property
    def _all_lists(self) -> list[FoundTree]:
        return self._trees(self.mappings, 8)

    @cached_property
    def list_blocks(self) -> frozenset[int]:
        """Every block of every list of roots."""
        return frozenset(block for tree in self._all_lists for block in tree.blocks)

    @cached_property
    def lists(self) -> list[FoundTree]:
        """Trees of device roots; of very many those that belong to `maps`."""
        if len(self._all_lists) <= _STATES_MAX:
            return self._all_lists
        counted = [any(found.counts[tree.root] for found in self.maps) for tree in self._all_lists]
        return [tree for tree, kept in zip(self._all_lists, counted, strict=True) if kept][:_STATES_MAX]

    @cached_property
    def records(self) -> list[FoundTree]:
        """Trees of device records; of very many those with the latest times and the most mappings."""
        found = self._trees(scan_nodes(self.store, 24), 24)
        return sorted(found, key=_age, reverse=True)[:_STATES_MAX]

    def _trees(self, scan: NodeScan, value_bytes: int) -> list[FoundTree]:
        """Single leaves, and inner nodes that have nothing but such leaves below them."""
        leaves = {location: node for location, node in scan.small.items() if len(node.keys)}
        found = [
            FoundTree(location, (location,), node.keys, node.values) for location, node in leaves.items()
        ]
        for location, node in scan.inner.items():
            children = node.values.tolist()
            if children and all(child in leaves for child in children):
                keys, values, complete = salvage(self.store, value_bytes, location)
                if complete:
                    found.append(FoundTree(location, (location, *children), keys, values))
        return found

    def leaf_entries(self, blocks: Iterable[int]) -> Iterator[tuple[U64Array, U64Array]]:
        """Keys and values of the leaves of mappings among `blocks`, some hundred leaves at a time."""
        leaves = sorted(self.mappings.leaves.keys() & set(blocks))
        for first in range(0, len(leaves), _LEAVES_AT_ONCE):
            some = np.array(leaves[first : first + _LEAVES_AT_ONCE], np.uint64)
            batch = read_nodes(self.store, some, 8)
            yield batch.leaves.keys, batch.leaves.values
            for _, node in batch.others:
                yield node.keys, node.values

    @cached_property
    def maps(self) -> list[FoundMap]:
        """Metadata space maps that can be read as a whole; of very many those that belong to `records`."""
        many = len(self.indexes) > _STATES_MAX
        kept: list[FoundMap] = []
        for location in self.indexes:
            found = self._map(location)
            if found is None or (many and not any(found.counts[tree.root] for tree in self.records)):
                continue
            kept.append(found)
            if len(kept) == _STATES_MAX:
                break
        return kept

    def _map(self, location: int) -> FoundMap | None:
        size = self.store.size_blocks()
        nothing = SpaceMapRoot(size, 0, location, location)
        marked = self._marked(nothing)
        if marked is None:
            return None
        for root in self._overflow_roots:
            blocks, _, complete = salvage(self.store, 4, root)
            if complete and np.array_equal(blocks[blocks < size], marked):
                counts = stored_counts(self.store, SpaceMapRoot(size, 0, location, root))
                if counts is not None and counts[location] == 1 and counts[root]:
                    return FoundMap(SpaceMapRoot(size, int(np.count_nonzero(counts)), location, root), counts)
        return None

    def _marked(self, root: SpaceMapRoot) -> U64Array | None:
        """The blocks whose counts are in the overflow tree, None where a bitmap cannot be read."""
        parts = []
        try:
            index = decode_index(self.store.read(root.bitmap_root, 1), root.bitmap_root)
            for number in range(bitmaps_for(root.blocks)):
                location = int(index.entries[number]["location"])
                counts = decode_bitmap(self.store.read(location, 1), location).counts
                parts.append(np.flatnonzero(counts == COUNT_OVERFLOW) + number * ENTRIES_PER_BITMAP)
        except (MetadataError, OSError, ValueError):
            return None
        marked = np.concatenate(parts).astype(np.uint64)
        return marked[marked < root.blocks]

    @cached_property
    def _overflow_roots(self) -> list[int]:
        """What may be the root of a tree of counts."""
        counts = scan_nodes(self.store, 4)
        return [*counts.small, *counts.inner]


def _age(records: FoundTree) -> tuple[int, int, int]:
    table = records.values
    times = int(table["snapshotted_time"].max(initial=0)), int(table["transaction_id"].max(initial=0))
    return *times, int(table["mapped_blocks"].sum())

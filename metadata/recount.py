"""The full check of a pool: every tree walked, both space maps recounted, every redundant figure compared.

In: what the parts of a pool mean and how they must agree. Out: visiting nodes (survey), comparing counts
(space_audit), mending anything (the caller decides what to do about a problem).

Works on any storage, however damaged: what is wrong is returned, never raised. Reads only committed blocks, straight
from storage, through the codecs alone; it has no code in common with what writes pools. thin_check 0.9 leaves out
data counts, mapped blocks, free counts, data ranges, and trees against records; all of these are here.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from .errors import MetadataError, NoMetadataSnapshot
from .index import decode_index
from .layout import (
    BLOCK_SECTORS,
    DATA_BLOCK_SECTORS_MAX,
    DATA_BLOCK_SECTORS_MIN,
    DEVICE_ID_LIMIT,
    ENTRIES_PER_BITMAP,
    INDEX_RECORD,
    KEY_LIMIT,
    METADATA_BLOCKS_MAX,
    SUPERBLOCK_LOCATION,
    SUPERBLOCK_VERSION,
    TIME_BITS,
    TIME_LIMIT,
    U8Array,
    U32Array,
    U64Array,
    ValueArray,
    bitmaps_for,
)
from .node_batch import Leaves, fault_text
from .pool_metadata import PoolMetadata
from .problems import Affected, Fault, Place, Problem, Severity
from .sharing_times import SharingTimes
from .space_audit import SpaceAudit, SpaceMap
from .store import BlockStore
from .superblock import SpaceMapRoot, Superblock, read_superblock
from .survey import Owner, PlaceOf, Survey
from .walk import salvage

# Linux MAP_NORESERVE: counts of a huge, mostly unused data space must not weigh on overcommit limits.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_TIME_BITS = np.uint64(TIME_BITS)
_TIME_MASK = np.uint64(TIME_LIMIT - 1)
_DATA_MAP = Place("data space map")
_METADATA_MAP = Place("metadata space map")


class Extent(Enum):
    """How much of a pool to check.

    WHOLE: everything. NO_MAPPINGS: devices, records and space maps, but not what devices map, so counts are only
    read. SNAPSHOT: the trees of the metadata snapshot alone, which hold still while the pool is in use elsewhere.
    SUPERBLOCK: block 0 alone.
    """

    WHOLE = "everything"
    NO_MAPPINGS = "everything but mappings"
    SNAPSHOT = "the metadata snapshot"
    SUPERBLOCK = "the superblock"


def recount(source: BlockStore | PoolMetadata, extent: Extent = Extent.WHOLE) -> list[Problem]:
    """Check the committed state of a pool; an empty list means that nothing at all is wrong with it.

    Extent.SNAPSHOT raises NoMetadataSnapshot where none is held.
    """
    store = source.state.store if isinstance(source, PoolMetadata) else source
    return Recount(store, extent).run()


class DataReferences:
    """How often each data block is named by a leaf."""

    def __init__(self, blocks: int) -> None:
        self.blocks = min(blocks, METADATA_BLOCKS_MAX * ENTRIES_PER_BITMAP)
        chunks = bitmaps_for(self.blocks)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        memory = mmap.mmap(-1, max(chunks * ENTRIES_PER_BITMAP * 4, 1), flags=flags)
        self._counts: U32Array = np.frombuffer(memory, np.uint32, chunks * ENTRIES_PER_BITMAP)
        self._touched = np.zeros(chunks, np.bool_)

    def add(self, blocks: U64Array) -> None:
        """One more reference to each of `blocks`, all of them inside; they may repeat."""
        if not len(blocks):
            return
        # Sorted, equal ones together: four times as fast as np.add.at on blocks in the order of the mappings.
        places = np.sort(blocks.astype(np.int64))
        changes = places[1:] != places[:-1]
        if changes.all():
            self._counts[places] += 1
        else:
            last_of_each = np.append(np.flatnonzero(changes), len(places) - 1)
            self._counts[places[last_of_each]] += np.diff(last_of_each, prepend=-1).astype(np.uint32)
        first, last = (int(place) // ENTRIES_PER_BITMAP for place in (places[0], places[-1]))
        edges = places.searchsorted(np.arange(first, last + 2) * ENTRIES_PER_BITMAP)
        self._touched[first : last + 1] |= edges[1:] > edges[:-1]

    def chunk(self, number: int) -> U32Array | None:
        """References to the blocks of one bitmap, None when there are none."""
        if number >= len(self._touched) or not self._touched[number]:
            return None
        return self._counts[number * ENTRIES_PER_BITMAP : (number + 1) * ENTRIES_PER_BITMAP]


@dataclass(frozen=True, slots=True)
class _Trees:
    """The two trees of the live pool or of the metadata snapshot."""

    superblock: Superblock
    held: bool


class Recount:
    """One check of one store."""

    def __init__(self, store: BlockStore, extent: Extent = Extent.WHOLE) -> None:
        self._store = store
        self._extent = extent
        self._survey = Survey(store)
        self._data = DataReferences(0)
        self._device_paths: dict[int, tuple[int, ...]] = {}

    def run(self) -> list[Problem]:
        """Check everything that can be reached."""
        try:
            superblock = read_superblock(self._store)
        except (MetadataError, OSError) as error:
            return [Problem(Severity.ERROR, Fault.SUPERBLOCK, Place("superblock"), fault_text(error))]
        self._check_fields(superblock)
        survey = self._survey
        survey.claim(Owner.SUPERBLOCK, _one(SUPERBLOCK_LOCATION), lambda _: Place("superblock"))
        if self._extent is Extent.SNAPSHOT and not superblock.held_root:
            raise NoMetadataSnapshot
        if self._extent is Extent.SUPERBLOCK:
            return survey.problems
        self._data = DataReferences(superblock.data_space.blocks)
        if self._extent is not Extent.SNAPSHOT:
            self._check_trees(_Trees(superblock, held=False))
        held = self._held_copy(superblock)
        if held is not None:
            self._check_trees(_Trees(held, held=True))
        if self._extent is not Extent.SNAPSHOT:
            self._check_spaces(superblock)
        return [problem for problem in survey.problems if not self._is_expected(problem)]

    def _is_expected(self, problem: Problem) -> bool:
        """Counts that nothing accounts for are no news where mappings were left out."""
        return self._extent is Extent.NO_MAPPINGS and problem.fault is Fault.UNVERIFIED

    # What was found, for counting anew

    def metadata_references(self) -> U32Array:
        """References to each block of the metadata space, shape (blocks,); after `run`."""
        return self._survey.references[: read_superblock(self._store).metadata_space.blocks]

    def metadata_owners(self) -> U8Array:
        """The `Owner` of each block of the metadata space, shape (blocks,); after `run`."""
        return self._survey.owners[: read_superblock(self._store).metadata_space.blocks]

    def data_references(self, number: int) -> U32Array | None:
        """References to the 16320 data blocks of bitmap `number`, None when there are none; after `run`."""
        return self._data.chunk(number)

    # Superblocks

    def _check_fields(self, superblock: Superblock) -> None:
        sectors = superblock.data_block_sectors
        wrong = {
            "version": superblock.version != SUPERBLOCK_VERSION,
            "metadata_block_sectors": superblock.metadata_block_sectors != BLOCK_SECTORS,
            "data_block_sectors": not DATA_BLOCK_SECTORS_MIN <= sectors <= DATA_BLOCK_SECTORS_MAX
            or sectors % DATA_BLOCK_SECTORS_MIN != 0,
            "incompat_flags": superblock.incompat_flags != 0,
            "compat_ro_flags": superblock.compat_ro_flags != 0,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            detail = f"{name} is {getattr(superblock, name)}"
            self._survey.report(Problem(Severity.ERROR, Fault.FIELD, Place("superblock"), detail))
        blocks = superblock.metadata_space.blocks
        if blocks > min(self._survey.size_blocks, METADATA_BLOCKS_MAX):
            detail = f"the metadata should have {blocks} blocks, the storage has {self._survey.size_blocks}"
            self._survey.report(Problem(Severity.ERROR, Fault.FIELD, Place("superblock"), detail))

    def _held_copy(self, superblock: Superblock) -> Superblock | None:
        location = superblock.held_root
        if not location:
            return None
        place = Place("metadata snapshot").child(location, 0, KEY_LIMIT)
        if not self._survey.claim(Owner.SUPERBLOCK, _one(location), lambda _: place).all():
            return None
        try:
            held = Superblock.unpack(self._store.read(location, 1), location)
        except (MetadataError, OSError) as error:
            self._survey.unread.add(Owner.SUPERBLOCK)
            self._survey.error(Fault.HELD, place, fault_text(error))
            return None
        if held.held_root:
            self._survey.error(Fault.HELD, place, "it holds a metadata snapshot itself")
        return held

    # Trees

    def _check_trees(self, trees: _Trees) -> None:
        survey, held = self._survey, trees.held
        superblock = trees.superblock
        survey.tree(
            Owner.DEVICE_ROOTS, superblock.mapping_root, Place("mapping tree", held=held), self._on_roots
        )
        records_place = Place("device records", held=held)
        survey.tree(Owner.RECORDS, superblock.details_root, records_place, lambda *_: None)
        ids, roots, roots_complete = salvage(self._store, 8, superblock.mapping_root)
        record_ids, records, records_complete = salvage(self._store, 24, superblock.details_root)
        places = [
            Place("mappings", self._device_paths.get(root, ()), device=device, held=held)
            for device, root in zip(ids.tolist(), roots.tolist(), strict=True)
        ]
        sharing = SharingTimes(
            0 if held else self._data.blocks,
            dict(zip(record_ids.tolist(), records["snapshotted_time"].tolist(), strict=True)),
        )

        def on_mappings(leaves: Leaves, place_of: PlaceOf) -> None:
            self._on_mappings(leaves, place_of, superblock.time)
            if not held:
                sharing.note(leaves, place_of)

        if self._extent is not Extent.NO_MAPPINGS:
            survey.trees(Owner.MAPPINGS, roots, places, on_mappings)
        self._check_ids(ids, held)
        if records_complete:
            self._without(ids, record_ids, Fault.NO_RECORD, held)
        if roots_complete:
            self._without(record_ids, ids, Fault.NO_TREE, held)
        root_of = dict(zip(ids.tolist(), roots.tolist(), strict=True))
        if self._extent is Extent.WHOLE and not held:
            self._check_sharing(sharing, root_of)
        for device, record in zip(record_ids.tolist(), records, strict=True):
            self._check_record(device, record, root_of.get(device), trees)

    def _on_roots(self, leaves: Leaves, place_of: PlaceOf) -> None:
        self._survey.refer(leaves.values)
        begin = 0
        for position, end in zip(leaves.positions.tolist(), leaves.ends.tolist(), strict=True):
            path = place_of(position).path
            for root in leaves.values[begin:end].tolist():
                self._device_paths.setdefault(root, path)
            begin = end

    def _check_sharing(self, sharing: SharingTimes, root_of: Mapping[int, int]) -> None:
        """The references are those of the live trees as yet: the metadata snapshot's come later, and do not count."""
        for found in sharing.judge(self._survey, root_of, self._data.chunk, bitmaps_for(self._data.blocks)):
            place = Place("mappings", found.path, found.begin, found.end, found.device)
            detail = f"the youngest has time {found.time}, that snapshot {found.since}: a write would not copy them"
            problem = Problem(
                Severity.ERROR,
                Fault.SHARED_AS_OWN,
                place,
                detail,
                expected=found.time + 1,
                found=found.since,
            )
            self._survey.report(problem)

    def _on_mappings(self, leaves: Leaves, place_of: PlaceOf, time: int) -> None:
        blocks = leaves.values >> _TIME_BITS
        outside = blocks >= self._data.blocks
        if outside.any():
            self._complain(leaves, place_of, outside, Fault.DATA_OUTSIDE)
            blocks = blocks[~outside]
        self._data.add(blocks)
        late = (leaves.values & _TIME_MASK) > time
        if late.any():
            self._complain(leaves, place_of, late, Fault.FUTURE_TIME)

    def _complain(self, leaves: Leaves, place_of: PlaceOf, wrong: np.ndarray, fault: Fault) -> None:
        """Report mappings, one record for each leaf that has any."""
        owner = np.repeat(np.arange(len(leaves.positions)), leaves.counts)
        for number in np.unique(owner[wrong]).tolist():
            chosen = wrong & (owner == number)
            keys, values = leaves.keys[chosen], leaves.values[chosen]
            place = place_of(int(leaves.positions[number])).narrowed(int(keys[0]), int(keys[-1]) + 1)
            first = int(values[0])
            detail = f"{len(keys)} of them, the first to data block {first >> TIME_BITS}"
            if fault is Fault.FUTURE_TIME:
                detail = f"{len(keys)} of them, the first with time {first & (TIME_LIMIT - 1)}"
            self._survey.report(Problem(Severity.ERROR, fault, place, detail), place.path)

    # Devices

    def _check_ids(self, ids: U64Array, held: bool) -> None:
        for device in ids[ids >= DEVICE_ID_LIMIT].tolist():
            place = Place("mapping tree", (), device, device + 1, held=held)
            self._survey.report(Problem(Severity.ERROR, Fault.DEVICE_ID, place, f"device {device}"))

    def _without(self, these: U64Array, those: U64Array, fault: Fault, held: bool) -> None:
        for device in np.setdiff1d(these, those).tolist():
            place = Place("mapping tree" if fault is Fault.NO_TREE else "device records", (), held=held)
            affected = (Affected(device, 0, KEY_LIMIT, held),)
            self._survey.report(Problem(Severity.ERROR, fault, place, f"device {device}", affects=affected))

    def _check_record(self, device: int, record: np.void, root: int | None, trees: _Trees) -> None:
        place = Place("device records", (), device, device + 1, held=trees.held)
        affected = (Affected(device, 0, KEY_LIMIT, trees.held),)
        created, snapshotted = int(record["creation_time"]), int(record["snapshotted_time"])
        if not created <= snapshotted <= trees.superblock.time:
            detail = f"created at {created}, last snapshot at {snapshotted}, now {trees.superblock.time}"
            self._survey.report(Problem(Severity.HINT, Fault.RECORD_TIME, place, detail, affects=affected))
        mapped = None if root is None else self._survey.entries_below(root)
        recorded = int(record["mapped_blocks"])
        if mapped is not None and mapped != recorded:
            self._survey.report(
                Problem(
                    Severity.HINT,
                    Fault.MAPPED_BLOCKS,
                    place,
                    f"device {device}",
                    expected=mapped,
                    found=recorded,
                    affects=affected,
                )
            )

    # Space maps

    def _check_spaces(self, superblock: Superblock) -> None:
        survey = self._survey
        data = SpaceAudit(survey, self._data_map(superblock.data_space))
        metadata = SpaceAudit(survey, self._metadata_map(superblock.metadata_space))
        data.claim()
        metadata.claim()
        all_visited = self._extent is Extent.WHOLE
        whole = all_visited and not survey.unread
        needed = {Owner.SUPERBLOCK, Owner.DEVICE_ROOTS, Owner.MAPPINGS}
        mappings_whole = all_visited and not survey.unread & needed
        data.compare(self._data.chunk, trusted=mappings_whole)
        self._check_references_beyond(superblock.metadata_space.blocks)
        metadata.compare(self._metadata_chunk, trusted=whole)

    def _data_map(self, root: SpaceMapRoot) -> SpaceMap:
        numbers, records, complete = self._plain_tree(
            Owner.DATA_INDEX, root.bitmap_root, 16, Place("data space map index")
        )
        blocks, counts, all_counts = self._plain_tree(
            Owner.DATA_OVERFLOW, root.overflow_root, 4, Place("data space map counts")
        )
        return SpaceMap(_DATA_MAP, root, numbers, records, blocks, counts, complete and all_counts)

    def _metadata_map(self, root: SpaceMapRoot) -> SpaceMap:
        records, complete = self._metadata_index(root)
        blocks, counts, all_counts = self._plain_tree(
            Owner.METADATA_OVERFLOW, root.overflow_root, 4, Place("metadata space map counts")
        )
        numbers = np.arange(len(records), dtype=np.uint64)
        return SpaceMap(_METADATA_MAP, root, numbers, records, blocks, counts, complete and all_counts)

    def _plain_tree(
        self, owner: Owner, root: int, value_bytes: int, place: Place
    ) -> tuple[U64Array, ValueArray, bool]:
        self._survey.tree(owner, root, place, lambda *_: None)
        return salvage(self._store, value_bytes, root)

    def _metadata_index(self, root: SpaceMapRoot) -> tuple[ValueArray, bool]:
        location = root.bitmap_root
        place = Place("metadata space map index").child(location, 0, KEY_LIMIT)
        nothing = np.empty(0, INDEX_RECORD)
        if not self._survey.claim(Owner.INDEX, _one(location), lambda _: place).all():
            return nothing, False
        try:
            index = decode_index(self._store.read(location, 1), location)
        except (MetadataError, OSError) as error:
            self._survey.unread.add(Owner.INDEX)
            self._survey.error(Fault.UNREADABLE, place, fault_text(error))
            return nothing, False
        return index.entries[: bitmaps_for(root.blocks)], True

    def _metadata_chunk(self, number: int) -> U32Array | None:
        begin = number * ENTRIES_PER_BITMAP
        part = self._survey.references[begin : begin + ENTRIES_PER_BITMAP]
        return np.pad(part, (0, ENTRIES_PER_BITMAP - len(part)))

    def _check_references_beyond(self, blocks: int) -> None:
        size = self._survey.size_blocks
        begin = min(blocks, size)
        beyond = np.flatnonzero(self._survey.references[begin:]) + begin
        if len(beyond):
            place = _METADATA_MAP.narrowed(begin, size)
            detail = f"{len(beyond)} blocks are in use beyond {blocks}, where the space map ends"
            self._survey.report(Problem(Severity.ERROR, Fault.OUTSIDE, place, detail, int(beyond[0]), 1))


def _one(location: int) -> U64Array:
    return np.array([location], np.uint64)

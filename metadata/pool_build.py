# ruff: noqa: EM101, TRY003 -- what is passed to an error is a field, the sentence is made when it is printed
"""Making a whole pool in one go from devices and their mappings: what restore and repair write with.

In: devices one after another, their mappings in order, then space maps and superblock around them. Out: where the
mappings come from (restore, repair), changing a pool that exists (pool_metadata).

The superblock is destroyed before anything is written and written last, so a target that was interrupted is no pool.
Block numbers only grow; the metadata's own counts are complete when the last of its blocks is handed out, so nothing
has to be counted twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .counts import CountTable
from .errors import DeviceExists, MetadataFull, OutOfRange
from .layout import (
    BLOCK_BYTES,
    BLOCK_SECTORS,
    DATA_BLOCK_SECTORS_MAX,
    DATA_BLOCK_SECTORS_MIN,
    DETAILS_RECORD,
    ENTRIES_PER_BITMAP,
    SUPERBLOCK_LOCATION,
    SUPERBLOCK_MAGIC,
    SUPERBLOCK_VERSION,
    TIME_BITS,
    U32Array,
    U64Array,
    ValueArray,
    bitmaps_for,
)
from .space_map_build import SpaceMapBuilder, build_tree
from .store import BlockStore
from .superblock import SpaceMapRoot, Superblock
from .tree_build import BlockSink, TreeBuilder

_NO_COUNTS: U32Array = np.zeros(ENTRIES_PER_BITMAP, np.uint32)


@dataclass(frozen=True, slots=True)
class PoolFields:
    """What a pool has besides devices and mappings."""

    data_block_sectors: int
    data_blocks: int
    time: int = 0
    transaction_id: int = 0
    flags: int = 0
    uuid: bytes = bytes(16)


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What was made."""

    devices: int
    mapped_blocks: int
    data_blocks_allocated: int
    metadata_blocks_used: int


class PoolBuilder:
    """Writes a new pool over the whole of `store` (at most 4161600 blocks).

    Call `begin_device`, `add` and `end_device` for each device in any order, then `finish`. Every call may raise
    MetadataFull (the store is too small) and OSError; the store then holds no pool.
    """

    def __init__(self, store: BlockStore, fields: PoolFields) -> None:
        sectors = fields.data_block_sectors
        if (
            sectors % DATA_BLOCK_SECTORS_MIN
            or not DATA_BLOCK_SECTORS_MIN <= sectors <= DATA_BLOCK_SECTORS_MAX
        ):
            raise OutOfRange(
                "data block size in sectors", sectors, DATA_BLOCK_SECTORS_MIN, DATA_BLOCK_SECTORS_MAX
            )
        self._store = store
        self._fields = fields
        self._sink = BlockSink(store, SUPERBLOCK_LOCATION + 1)
        bitmaps = bitmaps_for(fields.data_blocks)
        if bitmaps >= self._sink.size_blocks:
            raise MetadataFull(bitmaps, self._sink.size_blocks, 0)
        self._data = CountTable("data", fields.data_blocks, lambda _: _NO_COUNTS)
        self._mappings = TreeBuilder(self._sink, 8, self._count_data)
        self._roots: dict[int, int] = {}
        self._records: dict[int, tuple[int, int, int, int]] = {}
        self._device: tuple[int, int, int, int] | None = None
        self._mapped = 0
        store.write(SUPERBLOCK_LOCATION, bytes(BLOCK_BYTES))
        store.flush()

    def _count_data(self, values: ValueArray) -> None:
        self._data.increase(values >> np.uint64(TIME_BITS))

    def begin_device(
        self, device_id: int, transaction_id: int, creation_time: int, snapshotted_time: int
    ) -> None:
        """Start a device. Raises DeviceExists."""
        if device_id in self._roots:
            raise DeviceExists(device_id)
        self._device = device_id, transaction_id, creation_time, snapshotted_time

    def add(self, keys: U64Array, values: U64Array) -> None:
        """Mappings of the device, ascending and above those before. Raises OutOfRange."""
        if not len(keys):
            return
        highest = int(values.max()) >> TIME_BITS
        if highest >= self._fields.data_blocks:
            raise OutOfRange("data block", highest, 0, self._fields.data_blocks - 1)
        self._mappings.add(keys, values)

    def end_device(self) -> None:
        """The device is complete."""
        assert self._device is not None
        device_id, *numbers = self._device
        mapped = self._mappings.entries
        self._mapped += mapped
        self._roots[device_id] = self._mappings.finish()
        self._records[device_id] = (mapped, *numbers)  # type: ignore[assignment]
        self._device = None

    def finish(self) -> BuildReport:
        """Write what holds the devices together, flush, and only then the superblock."""
        sink = self._sink
        ids = np.array(sorted(self._roots), np.uint64)
        roots = np.array([self._roots[device] for device in ids.tolist()], np.uint64)
        mapping_root = build_tree(sink, ids, roots, TreeBuilder(sink, 8, sink.refer))
        records = np.array([self._records[device] for device in ids.tolist()], DETAILS_RECORD)
        details_root = build_tree(sink, ids, records, TreeBuilder(sink, 24))
        maps = SpaceMapBuilder(sink)
        touched = set(self._data.touched())
        data_space = maps.data_space(
            self._fields.data_blocks, lambda number: self._data.chunk(number) if number in touched else None
        )
        metadata_space = maps.metadata_space(sink.size_blocks)
        sink.flush()
        self._store.flush()
        superblock = self._superblock(mapping_root, details_root, data_space, metadata_space)
        self._store.write(SUPERBLOCK_LOCATION, superblock.pack())
        self._store.flush()
        return BuildReport(len(ids), self._mapped, data_space.allocated, metadata_space.allocated)

    def _superblock(
        self, mapping_root: int, details_root: int, data_space: SpaceMapRoot, metadata_space: SpaceMapRoot
    ) -> Superblock:
        fields = self._fields
        return Superblock(
            flags=fields.flags,
            location=SUPERBLOCK_LOCATION,
            uuid=fields.uuid,
            magic=SUPERBLOCK_MAGIC,
            version=SUPERBLOCK_VERSION,
            time=fields.time,
            transaction_id=fields.transaction_id,
            held_root=0,
            data_space=data_space,
            metadata_space=metadata_space,
            mapping_root=mapping_root,
            details_root=details_root,
            data_block_sectors=fields.data_block_sectors,
            metadata_block_sectors=BLOCK_SECTORS,
            metadata_blocks_at_format=metadata_space.blocks,
            compat_flags=0,
            compat_ro_flags=0,
            incompat_flags=0,
        )

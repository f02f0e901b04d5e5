# ruff: noqa: EM101, TRY003 -- what is passed to an error is a field, the sentence is made when it is printed
"""The metadata of one pool: the package's front door.

In: every operation on a pool's metadata, as methods of `PoolMetadata`. Out: data, names, sizes of devices,
policy; also choosing data blocks, which the caller does, the metadata only counts.

Changes collect in memory until a commit; `abort` forgets them. The commit comes in three parts so that its
I/O can run while others read. Thread safety is the caller's: one mutator at a time, readers under a lock.
An operation that fails with BlockDamaged or CountDamaged may have done half of its work: abort then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from bitarray import bitarray

from . import metadata_snapshot
from .block_cache import CACHED_NODES_DEFAULT, BlockCache
from .commit import CommitReport, PreparedCommit, encode_commit, write_prepared
from .devices import DeviceRecord
from .difference import Difference, differences
from .errors import (
    ClockExhausted,
    CommitPending,
    DeviceExists,
    MetadataTooShort,
    OutOfRange,
    ReadOnlyMetadata,
)
from .freeing import Freeing
from .layout import (
    DATA_BLOCK_LIMIT,
    DEVICE_ID_LIMIT,
    KEY_LIMIT,
    METADATA_BLOCKS_MAX,
    NEEDS_CHECK_FLAG,
    TIME_BITS,
    TIME_LIMIT,
    BoolArray,
    U32Array,
    U64Array,
    bitmaps_for,
)
from .pool_state import PoolState
from .store import BlockStore
from .superblock import Superblock

_EMPTY = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class LeafView:
    """Mappings of one leaf; it answers for begin <= thin block < end (`end` may be 2**64).

    `keys` and `values` have shape (n,), uint64, ascending keys; values are packed (block << 24 | time).
    """

    begin: int
    end: int
    keys: U64Array
    values: U64Array


@dataclass(frozen=True, slots=True)
class Usage:
    """Space of one device: mappings, and data blocks that deleting it would free."""

    mapped_blocks: int
    exclusive_blocks: int


class PoolMetadata:
    """Open pool metadata. Create with `open`; every method may raise BlockDamaged and OSError when reading."""

    def __init__(self, store: BlockStore, cache: BlockCache, state: PoolState, *, writable: bool) -> None:
        self._store = store
        self._cache = cache
        self._state = state
        self._writable = writable
        self._pending = False
        self._limit: int | None = None
        self._more_room: Callable[[int], None] = lambda free_blocks: None

    @classmethod
    def open(
        cls, store: BlockStore, *, writable: bool = True, cached_nodes: int = CACHED_NODES_DEFAULT
    ) -> PoolMetadata:
        """Read the superblock and what finds everything else; checks no more than it reads.

        Raises:
            NotPoolMetadata: block 0 is no thin pool superblock.
            UnsupportedPool: features or a version this code must not touch.
            MetadataTooShort: the storage is shorter than the pool.
            BlockDamaged, CountDamaged: the superblock, or (when writable) the metadata space map is damaged.
        """
        cache = BlockCache(store, cached_nodes)
        return cls(store, cache, PoolState.load(store, cache, writable=writable), writable=writable)

    # Properties of the pool

    @property
    def state(self) -> PoolState:
        """The structures inside, for the modules of this package that walk them (dump, recount)."""
        return self._state

    @property
    def superblock(self) -> Superblock:
        """The superblock as this transaction has it; roots and space maps are brought up to date at commit."""
        return self._state.superblock

    @property
    def data_block_sectors(self) -> int:
        """Size of a data block in sectors of 512 bytes."""
        return self._state.superblock.data_block_sectors

    @property
    def transaction_id(self) -> int:
        """The word userspace ties its own records to a commit with."""
        return self._state.superblock.transaction_id

    @property
    def time(self) -> int:
        """The snapshot clock: new mappings are stamped with it."""
        return self._state.superblock.time

    @property
    def needs_check(self) -> bool:
        """Whether the pool must be checked before it is used again."""
        return self._state.superblock.needs_check

    @property
    def held_root(self) -> int:
        """Block of the metadata snapshot, 0 when none is held."""
        return self._state.superblock.held_root

    @property
    def uuid(self) -> bytes:
        """The superblock's 16 bytes of uuid, zero in kernel-made pools."""
        return self._state.superblock.uuid

    @property
    def flags(self) -> int:
        """All flags of the superblock."""
        return self._state.superblock.flags

    @property
    def data_blocks(self) -> int:
        """Size of the data space in data blocks."""
        return self._state.data_space.counts.blocks

    @property
    def data_blocks_allocated(self) -> int:
        """Data blocks in use, this transaction included."""
        return self._state.data_space.allocated

    @property
    def metadata_blocks(self) -> int:
        """Size of the metadata space in blocks."""
        return self._state.metadata_space.counts.blocks

    @property
    def metadata_blocks_allocated(self) -> int:
        """Metadata blocks in use, this transaction included."""
        return self._state.metadata_space.allocated

    @property
    def metadata_blocks_free(self) -> int:
        """Metadata blocks that are not in use, the reserve included."""
        if not self._writable or self._limit is not None:
            return self.metadata_blocks - self.metadata_blocks_allocated
        return self._state.transaction.free_blocks

    @property
    def metadata_blocks_usable(self) -> int:
        """Those that can still be allocated in this transaction: as the last, but none behind the limit."""
        return self._state.transaction.free_blocks

    def end_of_free(self, free_blocks: int) -> int:
        """The smallest limit that leaves so many blocks usable; the size where even that does not."""
        return self._state.transaction.end_of_free(free_blocks)

    def limit(self, blocks: int | None, more_room: Callable[[int], None]) -> None:
        """Change no block from this one on, for which the storage may have no space; None: any may be.

        `more_room` is called with the number of usable blocks that an operation needs where there are fewer, and may
        set a higher limit. The limit may only rise, but for the first one.
        """
        self._limit, self._more_room = blocks, more_room
        self._state.transaction.limit(blocks)
        self._state.more_room = more_room

    @property
    def metadata_reserve(self) -> int:
        """Free metadata blocks kept back for commits and deletions."""
        return self._state.reserve

    @property
    def metadata_kept(self) -> int:
        """Free metadata blocks that additions leave beside that, for a removal, deletions and a rollback."""
        return self._state.kept_from_additions()

    @property
    def metadata_room(self) -> int:
        """Metadata blocks that operations which add something may still use; negative when none may."""
        return self._state.room

    @property
    def dirty(self) -> bool:
        """Whether there is something to commit."""
        return self._state.changed

    # Devices

    def devices(self) -> list[DeviceRecord]:
        """All devices, ascending by id."""
        return self._state.devices.all()

    def device(self, device_id: int) -> DeviceRecord:
        """One device. Raises NoSuchDevice."""
        return self._state.devices.get(device_id)

    def create_device(self, device_id: int) -> None:
        """Add an empty device. Raises DeviceExists, OutOfRange, MetadataFull."""
        state = self._changing("create a device")
        self._check_new_id(device_id)
        state.require_for_device()
        state.mapping.create(device_id)
        superblock = state.superblock
        state.devices.set(
            DeviceRecord(device_id, 0, superblock.transaction_id, superblock.time, superblock.time)
        )

    def create_snapshot(self, device_id: int, origin_id: int, *, replacing: bool = False) -> None:
        """Add a device sharing all mappings of another; the snapshot clock advances.

        `replacing`: the caller deletes another device in the same transaction, so there is room when all else is full.

        Raises DeviceExists, NoSuchDevice, OutOfRange, ClockExhausted, MetadataFull.
        """
        state = self._changing("create a snapshot")
        self._check_new_id(device_id)
        origin = state.devices.get(origin_id)
        superblock = state.superblock
        time = superblock.time + 1
        if time >= TIME_LIMIT:
            raise ClockExhausted(superblock.time)
        state.require_for_device(replacing=replacing)
        state.mapping.copy(device_id, origin_id)
        state.superblock = replace(superblock, time=time)
        state.devices.set(replace(origin, snapshotted_time=time))
        state.devices.set(
            DeviceRecord(device_id, origin.mapped_blocks, superblock.transaction_id, time, time)
        )

    def delete_device(self, device_id: int) -> None:
        """Remove a device and all mappings only it reached.

        Raises:
            NoSuchDevice: there is no such device.
            MetadataFull: many were deleted in this transaction; nothing has been changed, commit and try again.
        """
        state = self._changing("delete a device")
        state.devices.get(device_id)
        state.require_for_deletion()
        state.mapping.delete(device_id)
        state.devices.delete(device_id)

    def _check_new_id(self, device_id: int) -> None:
        if not 0 <= device_id < DEVICE_ID_LIMIT:
            raise OutOfRange("device id", device_id, 0, DEVICE_ID_LIMIT - 1)
        if self._state.devices.find(device_id) is not None:
            raise DeviceExists(device_id)

    # Mappings

    def lookup(self, device_id: int, thin_block: int) -> int | None:
        """Packed value (block << 24 | time) of one thin block, None when unmapped. Raises NoSuchDevice."""
        if not 0 <= thin_block < KEY_LIMIT:
            raise OutOfRange("thin block", thin_block, 0, KEY_LIMIT - 1)
        return self._state.mapping.lookup(device_id, thin_block)

    def leaf(self, device_id: int, thin_block: int) -> LeafView:
        """The leaf that answers for one thin block, mapped or not. Raises NoSuchDevice."""
        if not 0 <= thin_block < KEY_LIMIT:
            raise OutOfRange("thin block", thin_block, 0, KEY_LIMIT - 1)
        leaf = self._state.mapping.leaf(device_id, thin_block)
        return LeafView(leaf.begin, leaf.end, leaf.node.keys, leaf.node.values)

    def mappings(
        self, device_id: int, begin: int = 0, end: int = KEY_LIMIT
    ) -> Iterator[tuple[U64Array, U64Array]]:
        """Mappings with begin <= thin block < end, a pair (keys, values) per leaf, ascending.

        Nothing may change while the iterator is in use. Raises NoSuchDevice.
        """
        return self._state.mapping.mappings(device_id, max(begin, 0), min(end, KEY_LIMIT))

    def differences(
        self, old_id: int | None, new_id: int, begin: int = 0, end: int = KEY_LIMIT
    ) -> Iterator[Difference]:
        """What two devices map differently, in batches; None is a device without mappings. Shared subtrees are skipped.

        Nothing may change while the iterator is in use. Raises NoSuchDevice, BlockDamaged.
        """
        mapping = self._state.mapping
        old_root = None if old_id is None else mapping.device_root(old_id)
        return differences(self._state.transaction, old_root, mapping.device_root(new_id), begin, end)

    def device_root(self, device_id: int) -> int:
        """Metadata block of the root of a device's mapping tree. Raises NoSuchDevice."""
        return self._state.mapping.device_root(device_id)

    def highest_mapped(self, device_id: int) -> int | None:
        """The last mapped thin block of a device, None when nothing is mapped. Raises NoSuchDevice."""
        return self._state.mapping.highest(device_id)

    def insert(self, device_id: int, keys: U64Array, values: U64Array) -> None:
        """Map thin blocks, strictly ascending `keys`, to packed `values`; both shape (n,), uint64.

        A block newly named gains a reference, a block replaced loses one; the same block with another time is only
        stamped anew.

        Raises:
            NoSuchDevice: there is no such device.
            OutOfRange: keys not ascending, or a data block outside the pool.
            MetadataFull: not enough room; nothing has been changed. Commit and try again once.
        """
        state = self._changing("insert mappings")
        record = state.devices.get(device_id)
        keys, values = np.asarray(keys, np.uint64), np.asarray(values, np.uint64)
        if not len(keys):
            return
        self._check_batch(keys, values)
        state.require_for_insert(device_id, len(keys), state.mapping.touched_nodes(device_id, keys))
        added = state.mapping.insert(device_id, keys, values)
        if added:
            state.devices.set(replace(record, mapped_blocks=record.mapped_blocks + added))

    def _check_batch(self, keys: U64Array, values: U64Array) -> None:
        if len(keys) != len(values):
            raise OutOfRange("number of values", len(values), len(keys), len(keys))
        ascending = keys[1:] > keys[:-1]
        if not ascending.all():
            place = int(np.argmin(ascending)) + 1
            raise OutOfRange(
                "thin block (keys must ascend)", int(keys[place]), int(keys[place - 1]) + 1, KEY_LIMIT
            )
        highest = int(values.max()) >> TIME_BITS
        if highest >= self.data_blocks:
            raise OutOfRange("data block", highest, 0, self.data_blocks - 1)

    def remove(self, device_id: int, begin: int, end: int) -> int:
        """Unmap begin <= thin block < end; returns how many mappings went.

        Raises:
            NoSuchDevice: there is no such device.
            MetadataFull: not enough room in this transaction; nothing has been changed. Commit and try again.
        """
        state = self._changing("remove mappings")
        record = state.devices.get(device_id)
        begin, end = max(begin, 0), min(end, KEY_LIMIT)
        if begin >= end:
            return 0
        state.require_for_removal(device_id, begin, end)
        removed = state.mapping.remove(device_id, begin, end)
        if removed:
            state.devices.set(replace(record, mapped_blocks=max(record.mapped_blocks - removed, 0)))
        return removed

    def exclusive(self, device_id: int, keys: U64Array) -> BoolArray:
        """For each of the ascending `keys`: is it mapped to a block nothing but this device's tree reaches.

        Shape (n,). True only when every node on the path, root and top level included, and the data block itself
        have a count of one. Raises NoSuchDevice.
        """
        return self._state.mapping.exclusive(device_id, np.asarray(keys, np.uint64))

    def usage(self, device_id: int) -> Usage:
        """Mapped and exclusively held blocks; shared subtrees are skipped unread. Raises NoSuchDevice."""
        record = self._state.devices.get(device_id)
        return Usage(record.mapped_blocks, self._state.mapping.exclusive_blocks(device_id))

    def freeing(self) -> Freeing:
        """For finding out what deletions would free; nothing may change while it is in use."""
        return Freeing(self._state)

    # Space

    def data_counts(self, first: int, count: int) -> U32Array:
        """Present reference counts of data blocks first..first+count-1, shape (count,), uint32."""
        if first < 0 or count < 0 or first + count > self.data_blocks:
            raise OutOfRange("data block", first + count - 1, 0, self.data_blocks - 1)
        return self._state.data_space.counts.span(first, count)

    def unavailable_data(self) -> bitarray:
        """One bit per data block, set when it is in use in the committed map or now. Reads all bitmaps."""
        bits = bitarray(endian="big")
        bits.frombytes(self._state.data_space.used_bits().tobytes())
        del bits[self.data_blocks :]
        return bits

    def grow_data(self, data_blocks: int) -> None:
        """Enlarge the data space. Raises OutOfRange when it would shrink, MetadataFull."""
        state = self._changing("grow the data space")
        if not self.data_blocks <= data_blocks <= DATA_BLOCK_LIMIT:
            raise OutOfRange("number of data blocks", data_blocks, self.data_blocks, DATA_BLOCK_LIMIT)
        bitmaps = bitmaps_for(data_blocks) - bitmaps_for(self.data_blocks)
        state.require(bitmaps + bitmaps // 56 + 4)
        state.data_space.grow(data_blocks)

    def grow_metadata(self) -> None:
        """Use all of the storage, at most 4161600 blocks. Raises MetadataTooShort when it has shrunk."""
        state = self._changing("grow the metadata")
        blocks = min(self._store.size_blocks(), METADATA_BLOCKS_MAX)
        if blocks < self.metadata_blocks:
            raise MetadataTooShort(self.metadata_blocks, blocks)
        if blocks > self.metadata_blocks:
            self._cache.clear()
            state.metadata_space.grow(blocks)

    # Pool-wide changes

    def set_transaction_id(self, value: int) -> None:
        """Set the userspace transaction id, effective with the commit."""
        state = self._changing("set the transaction id")
        if not 0 <= value < 2**64:
            raise OutOfRange("transaction id", value, 0, 2**64 - 1)
        state.superblock = replace(state.superblock, transaction_id=value)

    def set_needs_check(self, value: bool) -> None:
        """Set or clear the flag that keeps the pool from being activated, effective with the commit."""
        state = self._changing("set the needs-check flag")
        flags = state.superblock.flags & ~NEEDS_CHECK_FLAG | (NEEDS_CHECK_FLAG if value else 0)
        state.superblock = replace(state.superblock, flags=flags)

    def reserve_metadata_snapshot(self) -> int:
        """Hold the present metadata as a snapshot; returns its block. Raises MetadataSnapshotExists, MetadataFull."""
        return metadata_snapshot.reserve(self._changing("reserve a metadata snapshot"))

    def release_metadata_snapshot(self) -> None:
        """Give up the metadata snapshot. Raises NoMetadataSnapshot."""
        metadata_snapshot.release(self._changing("release the metadata snapshot"))

    # Commit

    def _changing(self, operation: str) -> PoolState:
        if not self._writable:
            raise ReadOnlyMetadata(operation)
        if self._pending:
            raise CommitPending(operation)
        return self._state

    def prepare_commit(self) -> PreparedCommit:
        """Settle everything in memory and encode it. Nothing may be changed until `finish_commit` or `abort`.

        Raises MetadataFull, BlockDamaged, CountDamaged: abort then.
        """
        state = self._changing("commit")
        if not state.changed:
            prepared = PreparedCommit(None, (), 0)
        else:
            superblock = state.settle()
            prepared = encode_commit(superblock, state.transaction.dirty())
        self._pending = True
        return prepared

    def write_commit(self, prepared: PreparedCommit) -> None:
        """Write: blocks, flush, superblock, flush. Touches nothing else.

        Raises OSError, and MetadataTooShort where somebody else cut the storage off: the pool is to be given up.
        """
        blocks, committed = self._store.size_blocks(), self._state.committed.metadata_space.blocks
        if blocks < committed:
            # Writing would lengthen a file again, with zeros where there were blocks.
            raise MetadataTooShort(committed, blocks)
        write_prepared(self._store, prepared)

    def finish_commit(self, prepared: PreparedCommit) -> CommitReport:
        """Make the written transaction the committed one and begin the next."""
        self._pending = False
        freed = _EMPTY
        if prepared.superblock is not None:
            freed = self._state.data_space.finish()
            self._state.finish()
        return CommitReport(self.transaction_id, prepared.blocks, freed)

    def commit(self, flush_data: Callable[[], None] = lambda: None) -> CommitReport:
        """Flush the data, then the three parts. Raises as they do."""
        flush_data()
        prepared = self.prepare_commit()
        self.write_commit(prepared)
        return self.finish_commit(prepared)

    def abort(self) -> None:
        """Forget the transaction and read the pool again from its superblock. Raises as `open`."""
        self._cache.clear()
        self._state = PoolState.load(self._store, self._cache, writable=self._writable)
        self.limit(self._limit, self._more_room)
        self._pending = False

    def close(self) -> None:
        """Close the storage; what was not committed is forgotten."""
        self._store.close()

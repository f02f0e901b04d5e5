"""What the used data of a pool is used for, to the block: by one device alone, by several, by none.

In: the mappings of all devices, counted one by one. Out: figures from the reference counts, which cost less
(`description.py`), what deletions would free (`metadata/freeing.py`), finding leaks (`metadata/recount.py`).

The parts add up to what is used, whatever happened to the pool: what no device reaches is held by a metadata snapshot,
or leaked. Of a device with snapshots it is told apart what it shows itself and what only its snapshots still hold: data
that was deleted in it, trimmed or overwritten since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from metadata import PoolMetadata

    from .catalog_rows import CatalogEntry

TIME_BITS = np.uint64(24)
TIME_MASK = np.uint64((1 << 24) - 1)


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """One device. `live_bytes` it shows, `alone_bytes` of that nobody else does.

    `held_bytes` its snapshots hold and it does not show any more; `held_by` are those that hold some of it.
    """

    name: str
    live_bytes: int
    alone_bytes: int
    held_bytes: int
    held_by: list[str]


@dataclass(frozen=True, slots=True)
class SpaceUse:
    """`used_bytes` is the sum of the three after it. `reserved_bytes` of what is free are set aside for devices."""

    used_bytes: int
    alone_bytes: int
    shared_bytes: int
    unreached_bytes: int
    reserved_bytes: int
    metadata_used_bytes: int
    metadata_snapshot_held: bool
    devices: list[DeviceUse]

    def to_json(self) -> dict[str, Any]:
        """A JSON object, sizes as integers."""
        return asdict(self)


def describe_use(
    metadata: PoolMetadata,
    entries: Sequence[CatalogEntry],
    block_bytes: int,
    *,
    reserved_bytes: int,
    metadata_used_bytes: int,
) -> SpaceUse:
    """Count everything; nothing may change meanwhile. Raises MetadataError, OSError.

    Takes as long as there are mappings in all devices together, and two bytes of memory a data block.
    """
    reached = np.zeros(metadata.data_blocks, np.uint8)  # by how many devices, 2 for more
    for entry in entries:
        for blocks in _blocks(metadata, entry):
            reached[blocks] = np.minimum(reached[blocks] + np.uint8(1), 2)
    devices = [_device(metadata, entry, entries, reached, block_bytes) for entry in entries]
    alone, shared = int(np.count_nonzero(reached == 1)), int(np.count_nonzero(reached == 2))
    used = metadata.data_blocks_allocated
    return SpaceUse(
        used_bytes=used * block_bytes,
        alone_bytes=alone * block_bytes,
        shared_bytes=shared * block_bytes,
        unreached_bytes=(used - alone - shared) * block_bytes,
        reserved_bytes=reserved_bytes,
        metadata_used_bytes=metadata_used_bytes,
        metadata_snapshot_held=bool(metadata.held_root),
        devices=devices,
    )


def _device(
    metadata: PoolMetadata,
    entry: CatalogEntry,
    entries: Sequence[CatalogEntry],
    reached: NDArray[np.uint8],
    block_bytes: int,
) -> DeviceUse:
    live = alone = held = 0
    for blocks in _blocks(metadata, entry):
        live += len(blocks)
        alone += int(np.count_nonzero(reached[blocks] == 1))
    held_by: list[str] = []
    snapshots = _snapshots(entry, entries)
    if snapshots:
        seen = np.zeros(metadata.data_blocks, np.bool_)
        for blocks in _blocks(metadata, entry):
            seen[blocks] = True
        shown = seen.copy()
        for snapshot in snapshots:
            holds = False
            for blocks in _inherited(metadata, snapshot):
                holds |= not shown[blocks].all()
                held += int(np.count_nonzero(~seen[blocks]))
                seen[blocks] = True
            if holds:
                held_by.append(snapshot.name)
    return DeviceUse(entry.name, live * block_bytes, alone * block_bytes, held * block_bytes, held_by)


def _snapshots(entry: CatalogEntry, entries: Sequence[CatalogEntry]) -> list[CatalogEntry]:
    return [other for other in entries if other.origin == entry.name]


def _inherited(metadata: PoolMetadata, snapshot: CatalogEntry) -> Iterator[NDArray[np.uint64]]:
    """What a snapshot has from its origin: what it was made with, without what was written to it since."""
    made = np.uint64(metadata.device(snapshot.device_id).creation_time)
    for _, values in metadata.mappings(snapshot.device_id):
        yield values[(values & TIME_MASK) < made] >> TIME_BITS


def _blocks(metadata: PoolMetadata, entry: CatalogEntry) -> Iterator[NDArray[np.uint64]]:
    for _, values in metadata.mappings(entry.device_id):
        yield values >> TIME_BITS

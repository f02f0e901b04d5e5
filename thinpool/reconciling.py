"""The names of a pool that is being opened follow its metadata, whatever happened to either meanwhile.

In: devices that were made or deleted by the kernel, a catalogue or metadata of another day put back, bare pools.
Out: finishing a change that a kill interrupted (`catalog.py`), names of LVM's configuration (`lvm_names.py`).

A number says little about which device it was: the number of a deleted device is given out again. So each row notes the
transaction in which its device was made, which the metadata record as well; where the two differ the row is of another
device. Nothing is refused: a name without its device is dropped, a device without a name is called `thin-ID`.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from metadata import DeviceRecord, PoolMetadata

from .catalog import Catalog, CatalogEntry, Drop, Put
from .content_identity import frozen_content_id, identity_of_unnamed
from .lvm_names import read_names

# A device found without a name is as long as its last mapping says, rounded to LVM's usual extent.
UNNAMED_SIZE_STEP_BYTES = 4 << 20

log = logging.getLogger("thinpool")


def reconcile(catalog: Catalog, metadata: PoolMetadata, block_bytes: int) -> None:
    """Let the rows of a recovered catalogue be those of the metadata's devices. Raises CatalogFailed, MetadataError."""
    records = {record.device_id: record for record in metadata.devices()}
    rows = catalog.entries()
    names = {entry.name for entry in rows}
    kept: set[int] = set()
    changes: list[Put | Drop] = []
    _compare_transactions(catalog, metadata.transaction_id)
    for entry in rows:
        record = records.get(entry.device_id)
        if record is None:
            log.warning(
                "device %r (id %d) is not in the metadata any more; its name is dropped",
                entry.name,
                entry.device_id,
            )
            changes.append(Drop(entry.device_id))
        elif entry.made_in == record.transaction_id:
            kept.add(entry.device_id)
        elif entry.made_in is None or _made_anew(record, metadata):
            kept.add(entry.device_id)
            changes.append(Put(replace(entry, made_in=record.transaction_id)))
        else:
            log.warning(
                "the name %r is of a device %d made in transaction %d, the metadata have one made in transaction %d: "
                "another device has its number, so the name is dropped",
                entry.name,
                entry.device_id,
                entry.made_in,
                record.transaction_id,
            )
            changes.append(Drop(entry.device_id))
    changes += _unnamed(metadata, records, kept, names, block_bytes)
    if changes:
        catalog.apply(changes)


def _compare_transactions(catalog: Catalog, transaction_id: int) -> None:
    """Say it where the catalogue and the metadata are of two moments. What of it matters is found row by row."""
    noted = catalog.transaction_id
    if noted is not None and noted != transaction_id:
        log.warning(
            "the names are of transaction %d, the metadata of transaction %d: was one of them put back from a copy? "
            "The metadata decide which devices there are",
            noted,
            transaction_id,
        )
        catalog.note_transaction(transaction_id)


def _made_anew(record: DeviceRecord, metadata: PoolMetadata) -> bool:
    """Whether a repair made this record, because the device's own was lost: such a one tells of no other device."""
    return record.transaction_id == metadata.transaction_id and record.creation_time == 0


def _unnamed(
    metadata: PoolMetadata,
    records: Mapping[int, DeviceRecord],
    named: set[int],
    names: set[str],
    block_bytes: int,
) -> list[Put | Drop]:
    """Rows for devices that have none."""
    changes: list[Put | Drop] = []
    for device_id in sorted(records.keys() - named):
        plain = f"thin-{device_id}"
        candidates = itertools.chain([plain], (f"{plain}.{number}" for number in itertools.count(2)))
        name = next(candidate for candidate in candidates if candidate not in names)
        names.add(name)
        entry = CatalogEntry(
            device_id,
            name,
            _length_found(metadata, device_id, block_bytes),
            read_only=False,
            origin=None,
            created=time.time(),
            uuid=identity_of_unnamed(metadata, device_id),
            made_in=records[device_id].transaction_id,
        )
        changes.append(Put(entry))
    return changes


def take_names(catalog: Catalog, metadata: PoolMetadata, path: Path, block_bytes: int) -> None:
    """Name the devices of a bare pool after a file. Raises NamesUnusable, BadName, OSError."""
    present = {record.device_id for record in metadata.devices()}
    now = time.time()
    changes = []
    for device in read_names(path, present):
        size_bytes = device.size_bytes or _length_found(metadata, device.device_id, block_bytes)
        entry = CatalogEntry(device.device_id, device.name, size_bytes, device.read_only, device.origin, now)
        found = identity_of_unnamed(metadata, device.device_id)
        content_id = frozen_content_id(found, read_only=device.read_only)
        changes.append(Put(replace(entry, uuid=found, content_id=content_id)))
    catalog.apply(changes)


def _length_found(metadata: PoolMetadata, device_id: int, block_bytes: int) -> int:
    """How long a device is that nobody told the length of."""
    steps = -(-(_highest_mapped(metadata, device_id) + 1) * block_bytes // UNNAMED_SIZE_STEP_BYTES)
    return max(steps, 1) * UNNAMED_SIZE_STEP_BYTES


def _highest_mapped(metadata: PoolMetadata, device_id: int) -> int:
    """The last mapped virtual block of a device, -1 when there is none: a binary search over the tree."""
    low, high = -1, 1 << 64
    while high - low > 1:
        middle = (low + high) // 2
        if next(iter(metadata.mappings(device_id, middle)), None) is None:
            high = middle
        else:
            low = middle
    return low

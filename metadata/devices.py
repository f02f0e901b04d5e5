"""Thin devices as the pool records them: the details tree.

In: the record of a device, and a table of changed records over the tree. Out: mappings (mapping).

Records change with every insertion (the number of mapped blocks), so changes are collected and put into
the tree in one batch at commit, or when the tree itself is about to be shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .btree import leaves, lookup
from .btree_edit import TreeEditor
from .btree_insert import TreeInserter
from .btree_remove import TreeRemover
from .errors import NoSuchDevice
from .layout import DETAILS_RECORD
from .transaction import Transaction
from .tree_kind import TreeKind

DETAILS_KIND = TreeKind("device details", 24)


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """What the pool knows of one thin device (struct disk_device_details).

    Attributes:
        device_id: 24-bit number.
        mapped_blocks: mappings in the device's tree.
        transaction_id: the pool's transaction id when the device was created.
        creation_time: the snapshot clock at creation.
        snapshotted_time: the clock when this device was last snapshotted (or created); mappings older
            than this may be shared.
    """

    device_id: int
    mapped_blocks: int
    transaction_id: int
    creation_time: int
    snapshotted_time: int


def _record(device_id: int, value: Any) -> DeviceRecord:
    return DeviceRecord(int(device_id), *(int(field) for field in value.tolist()))


class DeviceTable:
    """Records of the committed tree, overlaid by those changed in this transaction."""

    def __init__(self, transaction: Transaction, root: int) -> None:
        self._transaction = transaction
        self.root = root
        self._changed: dict[int, DeviceRecord | None] = {}

    @property
    def pending(self) -> int:
        """Records waiting to be put into the tree."""
        return len(self._changed)

    def find(self, device_id: int) -> DeviceRecord | None:
        """The record, None when there is no such device. Raises BlockDamaged."""
        if device_id in self._changed:
            return self._changed[device_id]
        value = lookup(self._transaction, 24, self.root, device_id)
        return None if value is None else _record(device_id, value)

    def get(self, device_id: int) -> DeviceRecord:
        """The record. Raises NoSuchDevice, BlockDamaged."""
        record = self.find(device_id)
        if record is None:
            raise NoSuchDevice(device_id)
        return record

    def set(self, record: DeviceRecord) -> None:
        """Add or replace a record."""
        self._changed[record.device_id] = record

    def delete(self, device_id: int) -> None:
        """Remove a record."""
        self._changed[device_id] = None

    def all(self) -> list[DeviceRecord]:
        """All records, ascending by id. Raises BlockDamaged."""
        records = {record.device_id: record for record in self._stored()}
        for device_id, changed in self._changed.items():
            if changed is None:
                records.pop(device_id, None)
            else:
                records[device_id] = changed
        return [records[device_id] for device_id in sorted(records)]

    def _stored(self) -> Iterator[DeviceRecord]:
        for keys, values in leaves(self._transaction, 24, self.root):
            for device_id, value in zip(keys.tolist(), values, strict=True):
                yield _record(device_id, value)

    def settle(self) -> None:
        """Put the changed records into the tree. Raises BlockDamaged, MetadataFull."""
        if not self._changed:
            return
        editor = TreeEditor(self._transaction, DETAILS_KIND)
        ordered = sorted(self._changed.items())
        kept = [record for _, record in ordered if record is not None]
        gone = [device_id for device_id, record in ordered if record is None]
        values = np.array(
            [
                (record.mapped_blocks, record.transaction_id, record.creation_time, record.snapshotted_time)
                for record in kept
            ],
            DETAILS_RECORD,
        )
        keys = np.array([record.device_id for record in kept], np.uint64)
        self.root = TreeInserter(editor).insert(self.root, keys, values)
        self.root = TreeRemover(editor).remove_keys(self.root, np.array(gone, np.uint64))
        self._changed.clear()

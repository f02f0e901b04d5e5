"""Rows of the catalogue: what is kept of a device, and how it becomes columns.

In: the entry, the two kinds of change, their columns in SQLite. Out: the database (`catalog.py`).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from .content_identity import derived_identity, frozen_content_id, new_identity

COLUMNS = (
    "device_id, name, size_bytes, read_only, origin, created, tags, uuid, content_id, receiving, "
    "reservation_bytes, made_in"
)
COLUMNS_COUNT = COLUMNS.count(",") + 1
CREATED_SECONDS_MAX = 253402300800  # the year 10000, where datetime ends


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One device as the catalogue knows it. `origin` is a name; whoever renames puts the dependants anew as well.

    `content_id` is None where the content may have changed since it had one (`content_identity.py`). `receiving` is
    None for every device that is whole; otherwise it is the JSON of how far receiving it got. `reservation_bytes` are
    set aside for the device (`reservations.py`), 0 for none. `made_in` is the metadata's transaction id when the device
    was made, as its record there has it; None where that is not known yet (`reconciling.py`).
    """

    device_id: int
    name: str
    size_bytes: int
    read_only: bool
    origin: str | None
    created: float  # seconds since the epoch; for people only, nothing is ordered by it
    tags: dict[str, str] = field(default_factory=dict)
    uuid: str = field(default_factory=new_identity)
    content_id: str | None = None
    receiving: str | None = None
    reservation_bytes: int = 0
    made_in: int | None = None


@dataclass(frozen=True, slots=True)
class Put:
    """Insert a device's row, or replace it."""

    entry: CatalogEntry


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove a device's row, if there is one."""

    device_id: int


Change = Put | Drop


def device_id_of(change: Change) -> int:
    """Return the device a change is about."""
    return change.entry.device_id if isinstance(change, Put) else change.device_id


def row_of(entry: CatalogEntry) -> tuple[object, ...]:
    """Return the columns of a device row."""
    return (
        entry.device_id,
        entry.name,
        entry.size_bytes,
        int(entry.read_only),
        entry.origin,
        float(entry.created),
        json.dumps(entry.tags, sort_keys=True),
        entry.uuid,
        entry.content_id,
        entry.receiving,
        entry.reservation_bytes,
        # Transaction ids have 64 unsigned bits and SQLite's integers 63: kept as text.
        None if entry.made_in is None else str(entry.made_in),
    )


def staged_row_of(transaction_id: int, change: Change) -> tuple[object, ...]:
    """Return the columns of a staged row, after its sequence number."""
    if isinstance(change, Drop):
        return (str(transaction_id), change.device_id, 1, *[None] * (COLUMNS_COUNT - 1))
    device_id, *rest = row_of(change.entry)
    return (str(transaction_id), device_id, 0, *rest)


def entry_of(row: Sequence[object]) -> CatalogEntry:
    """Return the entry a row holds. Raises TypeError, ValueError for rows that make no sense."""
    (
        device_id,
        name,
        size_bytes,
        read_only,
        origin,
        created,
        tags,
        device_uuid,
        content_id,
        receiving,
        reserved,
        made_in,
    ) = row
    decoded = json.loads(str(tags))
    if not isinstance(device_id, int) or not isinstance(size_bytes, int) or not isinstance(decoded, dict):
        raise TypeError("wrong column type")  # noqa: TRY003, EM101 -- becomes CatalogDamaged
    if not isinstance(reserved, int) or not 0 <= reserved <= size_bytes:
        raise ValueError("reservation out of range")  # noqa: TRY003, EM101 -- becomes CatalogDamaged
    created_seconds = float(created)  # type: ignore[arg-type]
    if not 0 <= device_id < 1 << 24 or size_bytes <= 0 or not 0 <= created_seconds < CREATED_SECONDS_MAX:
        raise ValueError("column out of range")  # noqa: TRY003, EM101 -- becomes CatalogDamaged
    return CatalogEntry(
        device_id=device_id,
        name=str(name),
        size_bytes=size_bytes,
        read_only=bool(read_only),
        origin=None if origin is None else str(origin),
        created=created_seconds,
        tags={str(key): str(value) for key, value in decoded.items()},
        uuid=str(uuid.UUID(str(device_uuid))),
        content_id=None if content_id is None else str(uuid.UUID(str(content_id))),
        receiving=None if receiving is None else str(receiving),
        reservation_bytes=reserved,
        made_in=None if made_in is None else int(str(made_in)),
    )


def identities_of_first_version(row: Sequence[object]) -> tuple[str, str | None]:
    """The uuid and content id of a row of version 1 (device_id, name, read_only, created), which had neither."""
    device_id, name, read_only, created = row
    device_uuid = derived_identity("version 1", device_id, name, created)
    return device_uuid, frozen_content_id(device_uuid, read_only=bool(read_only))

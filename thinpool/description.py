"""Looking at a pool and its devices: figures for people and programs, changing nothing.

In: `DeviceInfo` and `PoolStatus` of a pool that is open, its mode, dm-thin's status lines. Out: the forms of these
(`status.py`, `dm_status.py`), bringing new mappings into the tree before (`pool.py`). The transaction is held.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .catalog import CatalogEntry
from .dm_status import DmDevice, device_line, pool_line
from .engine import Engine
from .status import DeviceInfo, PoolStatus, ReclaimInfo
from .usage_history import Forecast

if TYPE_CHECKING:
    from .pool import Pool
    from .space_usage import SpaceUse

METADATA_BLOCK_BYTES = 4096


def describe_device(
    engine: Engine, entry: CatalogEntry, remote_bytes: int, resume_token: str | None, *, figures: bool = True
) -> DeviceInfo:
    """One device as data; `remote_bytes` of it are still in an object store. Without `figures` nothing is read.

    Raises MetadataError, OSError.
    """
    device = engine.devices.get(entry.device_id)
    mapped = exclusive = shared = None
    if figures:
        with engine.looking_at_tree() as metadata:
            usage = metadata.usage(entry.device_id)
        mapped = usage.mapped_blocks * engine.block_bytes
        exclusive = usage.exclusive_blocks * engine.block_bytes
        shared = mapped - exclusive
    created = datetime.datetime.fromtimestamp(entry.created, datetime.UTC)
    return DeviceInfo(
        name=entry.name,
        device_id=entry.device_id,
        size_bytes=entry.size_bytes,
        mapped_bytes=mapped,
        exclusive_bytes=exclusive,
        shared_bytes=shared,
        origin=entry.origin,
        created=created.isoformat(timespec="seconds"),
        read_only=entry.read_only,
        open_count=len(device.sessions) if device is not None else 0,
        uuid=entry.uuid,
        content_id=entry.content_id,
        receiving=entry.receiving is not None,
        remote_bytes=remote_bytes,
        resume_token=resume_token,
        reservation_bytes=entry.reservation_bytes,
    )


def describe_pool(pool: Pool) -> PoolStatus:
    """The pool as data."""
    engine, metadata = pool.engine, pool.engine.metadata
    entries = pool.catalog.entries()
    used = metadata.data_blocks_allocated
    settings = pool.settings
    data, of_metadata = pool.watch.forecasts() if pool.watch is not None else (Forecast(), Forecast())
    return PoolStatus(
        location=str(pool.location),
        mode=mode_of(pool),
        needs_check=metadata.needs_check,
        block_bytes=pool.block_bytes,
        data_bytes=metadata.data_blocks * pool.block_bytes,
        data_used_bytes=used * pool.block_bytes,
        data_free_bytes=(metadata.data_blocks - used) * pool.block_bytes,
        data_reclaiming_bytes=engine.reclaimer.waiting_blocks * pool.block_bytes,
        file_bytes=engine.data.allocated_bytes(),
        metadata_bytes=metadata.metadata_blocks * METADATA_BLOCK_BYTES,
        metadata_used_bytes=metadata.metadata_blocks_allocated * METADATA_BLOCK_BYTES,
        metadata_free_bytes=metadata.metadata_blocks_free * METADATA_BLOCK_BYTES,
        transaction_id=metadata.transaction_id,
        time=metadata.time,
        held_root=metadata.held_root,
        devices=len(entries),
        virtual_bytes=sum(entry.size_bytes for entry in entries),
        failure=None if engine.failure is None else str(engine.failure),
        when_full=engine.full.when_full,
        queue_timeout_seconds=engine.full.timeout_seconds,
        refusing=engine.full.refuses,
        waiting_connections=engine.full.waiting_sessions,
        watched=pool.watch is not None,
        data_low_water_bytes=_mark(metadata.data_blocks * pool.block_bytes, settings.data_low_water),
        metadata_low_water_bytes=_mark(
            metadata.metadata_blocks * METADATA_BLOCK_BYTES, settings.metadata_low_water
        ),
        autogrow_limit_bytes=settings.autogrow_limit,
        metadata_autogrow_limit_bytes=settings.metadata_autogrow_limit,
        data_rate_bytes_per_second=data.rate,
        data_full_in_seconds=data.full_in,
        metadata_rate_bytes_per_second=of_metadata.rate,
        metadata_full_in_seconds=of_metadata.full_in,
        data_reserved_bytes=engine.free.promised * pool.block_bytes,
    )


def _mark(size_bytes: int, percent: int) -> int | None:
    return size_bytes * percent // 100 if percent else None


def describe_freeing(engine: Engine, entries: Sequence[CatalogEntry]) -> list[ReclaimInfo]:
    """What deleting snapshots would free, in the order in which they were made."""
    found = []
    with engine.looking_at_tree():
        records = {record.device_id: record for record in engine.metadata.devices()}
        series = engine.metadata.freeing()
        together = 0
        for entry in sorted(
            entries, key=lambda entry: (records[entry.device_id].creation_time, entry.device_id)
        ):
            if entry.origin is None and not entry.read_only:
                continue
            together += series.delete(entry.device_id)
            device = engine.devices.get(entry.device_id)
            created = datetime.datetime.fromtimestamp(entry.created, datetime.UTC)
            found.append(
                ReclaimInfo(
                    name=entry.name,
                    created=created.isoformat(timespec="seconds"),
                    origin=entry.origin,
                    read_only=entry.read_only,
                    open_count=len(device.sessions) if device is not None else 0,
                    alone_bytes=engine.metadata.usage(entry.device_id).exclusive_blocks * engine.block_bytes,
                    together_bytes=together * engine.block_bytes,
                )
            )
    return found


def describe_space(pool: Pool) -> SpaceUse:
    """What the used data is used for. Raises MetadataError, OSError."""
    from .space_usage import describe_use

    engine = pool.engine
    entries = sorted(pool.catalog.entries(), key=lambda entry: entry.name)
    with engine.looking_at_tree() as metadata:
        return describe_use(
            metadata,
            entries,
            engine.block_bytes,
            reserved_bytes=engine.free.promised * engine.block_bytes,
            metadata_used_bytes=metadata.metadata_blocks_allocated * METADATA_BLOCK_BYTES,
        )


def dm_lines(pool: Pool) -> list[str]:
    """What `dmsetup status` would print: a line for the pool, then one for each device, by name."""
    engine = pool.engine
    entries = sorted(pool.catalog.entries(), key=lambda entry: entry.name)
    pool_name = "pool" if pool.location.root is None else pool.location.root.absolute().name
    with engine.looking_at_tree():
        lines = [f"{pool_name}: {pool_line(engine.metadata, mode_of(pool), refuses=engine.full.refuses)}"]
        for entry in entries:
            device = DmDevice(entry.name, entry.device_id, entry.size_bytes)
            lines.append(f"{entry.name}: {device_line(engine.metadata, device)}")
    return lines


def mode_of(pool: Pool) -> str:
    """One of dm-thin's modes (docs/full-pools.md)."""
    engine, metadata = pool.engine, pool.engine.metadata
    if engine.failed_for_good:
        return "fail"
    changeable = engine.writable or (pool.only_looking and not metadata.needs_check)
    if engine.failure is not None or not changeable:
        return "read_only"
    if metadata.data_blocks_allocated >= metadata.data_blocks:
        return "out_of_data_space"
    return "rw" if engine.can_map else "out_of_metadata_space"

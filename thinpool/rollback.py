"""Rolling a device back to a snapshot: a new device takes its name, in one step with what becomes of the old one.

In: which rows change, the order, the name under which the prior state is kept. Out: the step (`pool.py`), the snapshot
(`device.py`), what is set aside for the device (`reserved_devices.py`).
"""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import TYPE_CHECKING

from .catalog import CatalogEntry, Drop, Put
from .content_identity import new_identity
from .errors import DeviceExists

if TYPE_CHECKING:
    from .pool import Pool


def roll_back(pool: Pool, name: str, snapshot: str, keep: str | bool | None) -> None:
    """Give `name` the content of `snapshot`; the engine's transaction is held. See `Pool.rollback`."""
    entry, source = pool._entry(name), pool._entry(snapshot)
    if entry.device_id == source.device_id:
        raise DeviceExists(name)
    pool.require_idle(entry)
    pool.lazy.require_whole(entry)
    pool.lazy.require_whole(source)
    fresh = CatalogEntry(
        pool._new_id(), name, source.size_bytes, entry.read_only, snapshot, entry.created, entry.tags
    )
    reservation_bytes = min(entry.reservation_bytes, source.size_bytes)
    fresh = replace(fresh, uuid=entry.uuid, content_id=source.content_id, reservation_bytes=reservation_bytes)
    fresh = replace(fresh, made_in=pool.engine.metadata.transaction_id)
    changes: list[Put | Drop] = []
    if keep is False:
        changes = [Drop(entry.device_id), *pool.changes.reparented(name, name)]
    else:
        kept = keep if isinstance(keep, str) else _kept_name(pool, name)
        pool._new_name(kept)
        content_id = entry.content_id or new_identity()
        prior = replace(entry, name=kept, read_only=True, uuid=new_identity(), content_id=content_id)
        changes = [Put(replace(prior, reservation_bytes=0))]
    # In a transaction of its own there is always room for the deletion.
    pool.engine.commit()
    moving = pool.reserved.moving(entry, fresh, old_is_deleted=keep is False)
    with moving, pool.changes.step([*changes, Put(fresh)]):
        pool.device(source).take_point_in_time(fresh.device_id, replacing=keep is False)
        if keep is False:
            replace_tree(pool, entry)
    pool.engine.forget(entry.device_id)
    pool.engine.reclaim()


def replace_tree(pool: Pool, entry: CatalogEntry) -> None:
    """Delete a tree in a step that made another; a step half done must never be committed."""
    try:
        pool.delete_tree(entry)
    except Exception as error:
        pool.engine.poison(error)
        raise


def _kept_name(pool: Pool, name: str) -> str:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    base = f"{name.encode()[:200].decode(errors='ignore')}-before-rollback-{stamp}"
    candidates = (base, *(f"{base}-{number}" for number in range(2, 10_000)))
    return next(candidate for candidate in candidates if pool.catalog.by_name(candidate) is None)

"""Devices that travel, as a pool sees them: half-received ones, and ones that are kept in place while they are read.

In: making a hidden device for what arrives, noting how far it got, giving it its name when it is whole; holds. Out:
streams (`sending.py`, `receiving.py`), who may ask (`operations.py`, `control.py`).

A device that is being received has a name no user can type ("disk/receiving": a name holds no slash) and a state in
the catalogue. Nothing but this module touches it: it is no export, and every operation refuses it. It becomes the
device it was meant to be in one step, after all its data is durable, so a kill at any instant leaves a half-received
device or a whole one, and never one that only looks whole.

An increment begins as a snapshot of its base, so whatever did not change is shared with it and costs nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from .catalog_rows import CatalogEntry, Drop, Put
from .content_identity import new_identity
from .errors import (
    BaseMissing,
    DeviceExists,
    DeviceHeld,
    DeviceInUse,
    NotReceiving,
    PartlyReceived,
    TargetDiverged,
)
from .names import check_name
from .receiving_state import ReceivingState, Wanted
from .remote_blocks import is_lazy
from .rollback import replace_tree

if TYPE_CHECKING:
    from .pool import Pool
    from .session import Session
    from .status import DeviceInfo

HIDDEN_SUFFIX = "/receiving"
TEMPORARY_TAG = "temporary"


def is_temporary(entry: CatalogEntry) -> bool:
    """Whether a device is there only for as long as it is sent."""
    return TEMPORARY_TAG in entry.tags


class Transfers:
    """Half-received devices and holds of one pool. Every change runs under the engine's transaction lock."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._held: Counter[int] = Counter()
        self._written: set[int] = set()  # half-received devices that a stream is running into

    # --- receiving ---

    def partial(self, name: str) -> tuple[CatalogEntry, ReceivingState] | None:
        """The half-received device that is to be called `name`."""
        entry = self._pool.catalog.by_name(name + HIDDEN_SUFFIX)
        if entry is None or entry.receiving is None:
            return None
        return entry, ReceivingState.from_text(entry.receiving)

    def fitting(self, wanted: Wanted) -> tuple[CatalogEntry | None, CatalogEntry | None]:
        """The base an increment would begin with, and the device it would take the place of. Changes nothing.

        Raises BadName, PartlyReceived, BaseMissing, DeviceExists, DeviceInUse, TargetDiverged.
        """
        check_name(wanted.name)
        leftover = self.partial(wanted.name)
        if leftover is not None and leftover[1].resumable:
            raise PartlyReceived(wanted.name, leftover[1].token)
        base = None if wanted.base_content_id is None else self._base(wanted)
        return base, self._replaced(wanted)

    def begin(self, wanted: Wanted) -> CatalogEntry:
        """Make the hidden device, once everything was found to fit. Nothing is changed where it does not.

        A partial device that was not meant to be resumed is dropped. Raises as `fitting`, PoolReadOnly, MetadataFull.
        """
        pool = self._pool
        with pool.engine.transaction:
            pool.engine.require_writable()
            base, replaced = self.fitting(wanted)
            if self.partial(wanted.name) is not None:
                self.abort(wanted.name)
            state = ReceivingState(
                target=wanted.name,
                content_id=wanted.content_id,
                base_content_id=wanted.base_content_id,
                size_bytes=wanted.size_bytes,
                read_only=wanted.read_only,
                resumable=wanted.resumable,
                replaces=None if replaced is None else replaced.uuid,
            )
            return self._make(state, base)

    def _make(self, state: ReceivingState, base: CatalogEntry | None) -> CatalogEntry:
        pool = self._pool
        entry = CatalogEntry(
            device_id=pool._new_id(),
            name=state.target + HIDDEN_SUFFIX,
            size_bytes=state.size_bytes if base is None else base.size_bytes,
            read_only=False,
            origin=None if base is None else base.name,
            created=time.time(),
            receiving=state.to_text(),
            made_in=pool.engine.metadata.transaction_id,
        )
        with pool.changes.step([Put(entry)]):
            if base is None:
                with pool.engine.changing_tree():
                    pool.engine.metadata.create_device(entry.device_id)
            else:
                pool.device(base).take_point_in_time(entry.device_id)
        return self._sized(entry, state)

    def resumed(self, entry: CatalogEntry, state: ReceivingState) -> CatalogEntry:
        """Go on with a half-received device, claimed. Raises DeviceInUse."""
        self.claim(entry)
        try:
            return self._sized(entry, state)
        except BaseException:
            self.unclaim(entry)
            raise

    def _sized(self, entry: CatalogEntry, state: ReceivingState) -> CatalogEntry:
        """The hidden device at its final size: an increment may be longer or shorter than its base."""
        if entry.size_bytes != state.size_bytes:
            self._pool.sizes.set_size(entry, state.size_bytes)
            return replace(entry, size_bytes=state.size_bytes, content_id=None)
        return entry

    def _base(self, wanted: Wanted) -> CatalogEntry:
        assert wanted.base_content_id is not None
        holders = [
            entry
            for entry in self._pool.catalog.entries()
            if entry.content_id == wanted.base_content_id and entry.receiving is None
        ]
        if holders:
            # One that is all here is as good as any other, whatever else is being fetched; the namesake is better.
            holder = max(
                reversed(holders), key=lambda entry: (not is_lazy(entry), entry.name == wanted.base_name)
            )
            self._pool.lazy.require_whole(holder)
            return holder
        self._refuse_diverged(wanted)
        namesake = self._pool.catalog.by_name(wanted.base_name)
        found = "" if namesake is None else namesake.content_id or "changed"
        raise BaseMissing(wanted.base_name, wanted.base_content_id, found)

    def _refuse_diverged(self, wanted: Wanted) -> None:
        """Where the target itself is what should be brought forward, it is the one to talk about."""
        target = self._pool.catalog.by_name(wanted.name)
        if target is None or target.receiving is not None:
            return
        self._pool.require_idle(target)
        if wanted.base_content_id is not None:
            raise TargetDiverged(wanted.name, wanted.base_content_id, target.content_id or "")

    def _replaced(self, wanted: Wanted) -> CatalogEntry | None:
        """The device of that name, where it is exactly what the increment begins with."""
        target = self._pool.catalog.by_name(wanted.name)
        if target is None:
            return None
        self._pool.require_idle(target)
        self._pool.lazy.require_whole(target)
        if wanted.base_content_id is None:
            raise DeviceExists(wanted.name)
        if target.content_id != wanted.base_content_id:
            raise TargetDiverged(wanted.name, wanted.base_content_id, target.content_id or "")
        return target

    def claim(self, entry: CatalogEntry) -> CatalogEntry:
        """Be the one stream that runs into a half-received device, until `unclaim`. Raises DeviceInUse."""
        with self._pool.engine.transaction:
            if entry.device_id in self._written:
                raise DeviceInUse(entry.name, 1)
            self._written.add(entry.device_id)
        return entry

    def unclaim(self, entry: CatalogEntry) -> None:
        """Let others go on with it, or drop it."""
        with self._pool.engine.transaction:
            self._written.discard(entry.device_id)

    @contextmanager
    def writing(self, entry: CatalogEntry) -> Iterator[Session]:
        """A session on the hidden device."""
        pool = self._pool
        with pool.engine.transaction:
            session = pool.device(entry).open()
        try:
            yield session
        finally:
            session.close()

    def note(self, entry: CatalogEntry, position_bytes: int) -> CatalogEntry:
        """Everything below `position_bytes` is there: made durable first, noted then."""
        pool = self._pool
        with pool.engine.transaction:
            present = self._present(entry)
            state = ReceivingState.from_text(present.receiving or "")
            moved = replace(present, receiving=replace(state, position_bytes=position_bytes).to_text())
            pool.engine.commit_if_dirty()
            pool.catalog.apply([Put(moved)])
        return moved

    def finish(self, entry: CatalogEntry) -> DeviceInfo:
        """Give the whole device its name, in one step; what it replaces goes in the same one. Raises as `begin`."""
        pool = self._pool
        with pool.engine.transaction:
            entry = self._present(entry)
            state = ReceivingState.from_text(entry.receiving or "")
            replaced = pool.catalog.by_name(state.target)
            if replaced is not None:
                pool.require_idle(replaced)
                if replaced.uuid != state.replaces or replaced.content_id != state.base_content_id:
                    raise TargetDiverged(state.target, state.base_content_id or "", replaced.content_id or "")
            whole = self._whole(entry, state, replaced)
            if replaced is None:
                # All data and mappings first: the name must not be there before them.
                pool.engine.commit_if_dirty()
                pool.catalog.apply([Put(whole)])
            else:
                # In a transaction of its own there is always room for the deletion.
                pool.engine.commit()
                moving = pool.reserved.moving(replaced, whole, old_is_deleted=True)
                with moving, pool.changes.step([Drop(replaced.device_id), Put(whole)]):
                    replace_tree(pool, replaced)
                pool.engine.forget(replaced.device_id)
            pool.engine.forget(entry.device_id)
            pool.engine.reclaim()
            return pool._done(state.target)

    def _present(self, entry: CatalogEntry) -> CatalogEntry:
        """The row as it is now: while a stream comes in, its base may be renamed or deleted."""
        present = self._pool.catalog.by_id(entry.device_id)
        return entry if present is None else present

    def _whole(
        self, entry: CatalogEntry, state: ReceivingState, replaced: CatalogEntry | None
    ) -> CatalogEntry:
        origin = entry.origin
        if replaced is not None and origin == replaced.name:
            origin = replaced.origin
        return replace(
            entry,
            name=state.target,
            read_only=state.read_only if replaced is None else replaced.read_only,
            content_id=state.content_id,
            receiving=None,
            origin=origin,
            uuid=entry.uuid if replaced is None else replaced.uuid,
            tags=entry.tags if replaced is None else replaced.tags,
            reservation_bytes=0 if replaced is None else min(replaced.reservation_bytes, entry.size_bytes),
        )

    def abort(self, name: str) -> None:
        """Drop a half-received device. Raises NotReceiving, DeviceInUse while it is being written."""
        pool = self._pool
        with pool.engine.transaction:
            found = self.partial(name)
            if found is None:
                raise NotReceiving(name)
            entry = found[0]
            if entry.device_id in self._written:
                raise DeviceInUse(entry.name, 1)
            with pool.changes.step([Drop(entry.device_id)]):
                pool.delete_tree(entry)
            pool.engine.forget(entry.device_id)
            pool.engine.reclaim()

    # --- holding ---

    def hold(self, device_ids: list[int]) -> None:
        """Keep devices from being deleted, shrunk or replaced until `release`."""
        with self._pool.engine.transaction:
            self._held.update(device_ids)

    def release(self, device_ids: list[int]) -> None:
        """End a hold."""
        with self._pool.engine.transaction:
            self._held.subtract(device_ids)

    def require_not_held(self, entry: CatalogEntry) -> None:
        """Raise DeviceHeld where a device is being read."""
        if self._held[entry.device_id] > 0:
            raise DeviceHeld(entry.name)

    def frozen_copy(self, entry: CatalogEntry) -> CatalogEntry:
        """A read-only snapshot of a device that may change, for as long as it is read."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        name = f"{entry.name.encode()[:200].decode(errors='ignore')}-sending-{stamp}-{new_identity()[:8]}"
        pool = self._pool
        with pool.engine.transaction:
            made = CatalogEntry(
                device_id=pool._new_id(),
                name=name,
                size_bytes=entry.size_bytes,
                read_only=True,
                origin=entry.name,
                created=time.time(),
                tags={TEMPORARY_TAG: "send"},
                content_id=entry.content_id or new_identity(),
                made_in=pool.engine.metadata.transaction_id,
            )
            with pool.changes.step([Put(made)]):
                pool.device(entry).take_point_in_time(made.device_id)
        return made

    def drop_frozen_copies(self) -> None:
        """Delete the snapshots of sends that died. Called while nobody can be sending."""
        for entry in self._pool.catalog.entries():
            if is_temporary(entry):
                self._pool.delete(entry.name)

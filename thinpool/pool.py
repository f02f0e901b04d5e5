"""A pool: an engine plus the names of its devices, and everything that changes both at once.

Names and device ids live in two stores. A change of both is one step all the same, through the transaction id
that dm-thin keeps for its users: the intended catalogue rows are made durable first, stamped N+1; then the
metadata is committed with transaction id N+1; then the rows are promoted. A kill between any two of these leaves
either the old state (rows stamped with an id the superblock does not have are dropped on opening) or the new one
(rows stamped with exactly that id are promoted). There is never a name without a device, a device without a
name, or a new device that shows an old one's data.

A pool opened from two bare paths (LVM's) has no catalogue of its own and its transaction id is left alone: LVM
refuses a pool whose id moved.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from metadata import MetadataError, PoolMetadata

from .admission import require_promise, require_space
from .catalog import Catalog, CatalogEntry, Drop, Put
from .content_identity import new_identity
from .description import (
    METADATA_BLOCK_BYTES,
    describe_device,
    describe_freeing,
    describe_pool,
    describe_space,
    dm_lines,
)
from .device import ThinDevice
from .device_diff import DiffPage, compare
from .device_sizes import DeviceSizes, check_device_size
from .engine import Engine
from .errors import (
    BadSetting,
    BadSize,
    DeviceExists,
    DeviceInUse,
    DeviceReceiving,
    NoSuchDevice,
    NotBeingPulled,
    TooLittleFree,
)
from .growth import Growth
from .lazy_devices import LazyDevices, PullRequest
from .metadata_readers import MetadataReaders
from .named_changes import NamedChanges
from .names import check_name
from .pool_location import PoolLocation
from .pool_settings import PoolSettings, checked
from .receiving_state import token_of
from .remote_blocks import is_lazy
from .reserved_devices import ReservedDevices
from .rollback import roll_back
from .session import Session
from .status import DeviceInfo, PoolStatus, ReclaimInfo
from .transfers import Transfers

if TYPE_CHECKING:
    from .space_usage import SpaceUse
    from .space_watch import SpaceWatch

log = logging.getLogger("thinpool")

DEVICE_ID_MAX = (1 << 24) - 1


class Pool:
    """An open pool. Thread-safe: every change runs under the engine's transaction lock.

    Made by `thinpool.opening.open_pool`. Errors are `ThinPoolError` leaves, and `MetadataError` where the
    metadata is damaged or full.
    """

    def __init__(self, location: PoolLocation, engine: Engine, catalog: Catalog, held: list[object]) -> None:
        self.location = location
        self.engine = engine
        self.catalog = catalog
        self.block_bytes = engine.block_bytes
        # Set where a command looks at a pool that nobody serves: its mode is what it would be if it were served.
        self.only_looking = False
        self.metadata_readers = MetadataReaders(engine, catalog)
        self.lazy = LazyDevices(self)
        self.changes = NamedChanges(engine, catalog, own_id=location.has_catalog)
        self.sizes = DeviceSizes(self)
        self._held = held  # locks, released by closing
        self.transfers = Transfers(self)
        self._closed = False
        self.overrides: Mapping[str, str] = {}
        self.watch: SpaceWatch | None = None  # of a served pool
        self.growth = Growth(self)
        self.reserved = ReservedDevices(self)
        engine.more_space = self.growth.of_what_is_all_taken
        self._configure()

    @property
    def writable(self) -> bool:
        """Whether anything may change."""
        return self.engine.writable and self.engine.failure is None

    @property
    def _metadata(self) -> PoolMetadata:
        return self.engine.metadata

    def _entry(self, name: str) -> CatalogEntry:
        entry = self.catalog.by_name(name)
        if entry is None:
            raise NoSuchDevice(name, str(self.location))
        if entry.receiving is not None:
            raise DeviceReceiving(name)
        return entry

    def _new_name(self, name: str) -> None:
        check_name(name)
        if self.catalog.by_name(name) is not None:
            raise DeviceExists(name)

    def _new_id(self) -> int:
        """An unused device id: one more than the highest, or the first gap when those have run out."""
        taken = {record.device_id for record in self._metadata.devices()}
        candidate = max(taken, default=0) + 1
        if candidate <= DEVICE_ID_MAX:
            return candidate
        return next(number for number in range(1, DEVICE_ID_MAX + 1) if number not in taken)

    def require_idle(self, entry: CatalogEntry) -> None:
        """Raise DeviceInUse where a client has the device open, or something is made from it."""
        device = self.engine.devices.get(entry.device_id)
        if device is not None and device.sessions:
            raise DeviceInUse(entry.name, len(device.sessions))
        self.transfers.require_not_held(entry)

    # --- devices ---

    def _admit(self, more_bytes: int, *, force: bool) -> None:
        """Refuse another device where the pool is too full or promises too much. See `admission`."""
        if force or not self.writable:
            return
        require_promise(self.settings, self.status(), more_bytes)
        try:
            require_space(self.settings, self.status())
        except TooLittleFree as lacking:
            if not self.growth.by_itself(data=lacking.what == "data", metadata=lacking.what == "metadata"):
                raise
            require_space(self.settings, self.status())

    def create_device(
        self, name: str, size_bytes: int, *, force: bool = False, reservation_bytes: int = 0
    ) -> DeviceInfo:
        """Create an empty device; `force` overrules the floors of free space and the overcommit limit.

        Raises BadName, BadSize, DeviceExists, MetadataFull, TooLittleFree, OvercommitExceeded, and as `reserve`.
        """
        with self.engine.transaction:
            self.create_entry(
                name,
                size_bytes,
                lambda entry: replace(entry, reservation_bytes=reservation_bytes),
                force=force,
            )
            return self._done(name)

    def create_entry(
        self,
        name: str,
        size_bytes: int,
        finished: Callable[[CatalogEntry], CatalogEntry],
        *,
        force: bool = False,
    ) -> CatalogEntry:
        """Create an empty device whose row `finished` completes. Raises as `create_device`."""
        check_device_size(size_bytes)
        with self.engine.transaction:
            self._new_name(name)
            self._admit(size_bytes, force=force)
            fresh = CatalogEntry(self._new_id(), name, size_bytes, False, None, time.time(), {})
            entry = finished(replace(fresh, made_in=self._metadata.transaction_id))
            with self.reserved.of_new(entry), self.changes.step([Put(entry)]), self.engine.changing_tree():
                self._metadata.create_device(entry.device_id)
            return entry

    def create_snapshot(
        self,
        origin: str,
        name: str,
        *,
        read_only: bool = False,
        force: bool = False,
        size_bytes: int | None = None,
    ) -> DeviceInfo:
        """Snapshot a device, in use or not. What was acknowledged before is in it; it never changes by itself.

        `size_bytes`: a larger size than the origin's; what is beyond that reads zeros. Raises BadSize.
        `force` and what is raised: as `create_device`; ReservationNotCovered for the reservation of the origin.
        """
        with self.engine.transaction:
            source = self._entry(origin)
            self._new_name(name)
            size_bytes = source.size_bytes if size_bytes is None else size_bytes
            self._admit(size_bytes, force=force)
            self.sizes.prepare_longer_copy(source, size_bytes)
            entry = CatalogEntry(self._new_id(), name, size_bytes, read_only, origin, time.time(), {})
            same = source.content_id if size_bytes == source.size_bytes else None
            content_id = same or new_identity()
            entry = replace(entry, content_id=content_id, made_in=self._metadata.transaction_id)
            entry, fork = self.lazy.forked(source, entry)
            with self.changes.step([Put(entry)]):
                self.device(source).take_point_in_time(entry.device_id, fork)
            self.lazy.of(entry)
            return self._done(name)

    def delete(self, name: str) -> None:
        """Delete a device or snapshot; blocks nobody else uses come back. Raises DeviceInUse."""
        with self.engine.transaction:
            entry = self._entry(name)
            self.require_idle(entry)
            self.delete_entry(entry)
        self.lazy.release_holds()

    def delete_entry(self, entry: CatalogEntry) -> None:
        """Delete an idle device; `transaction` is held."""
        with (
            self.lazy.ending(entry),
            self.changes.step([Drop(entry.device_id), *self.changes.reparented(entry.name, None)]),
        ):
            self.delete_tree(entry)
        self.engine.reservations.drop(entry.device_id)
        self.engine.forget(entry.device_id)
        self.engine.reclaim()

    def delete_tree(self, entry: CatalogEntry) -> None:
        """Delete what a device maps, within a step that takes its row away; `transaction` is held."""
        device = self.engine.devices.get(entry.device_id)
        if device is not None:
            device.apply_pending()  # nothing of it may be left for the commit to insert
        with self.engine.changing_tree():
            self._metadata.delete_device(entry.device_id)

    def rename(self, old: str, new: str, *, exchange: bool = False) -> DeviceInfo:
        """Rename a device; clients that have it open keep it.

        `exchange`: `new` is a device too, which is called `old` from the same instant on.
        """
        with self.engine.transaction:
            self.engine.require_writable()
            entry = self._entry(old)
            if exchange:
                self._entry(new)
                self.catalog.apply(self.changes.exchanged(old, new))
            else:
                self._new_name(new)
                self.catalog.apply([Put(replace(entry, name=new)), *self.changes.reparented(old, new)])
            return self._done(new)

    def reserve(self, name: str, reservation_bytes: int) -> DeviceInfo:
        """Set data blocks aside so that a device can always have so many bytes for itself; 0 for none.

        Raises BadReservation, ReservationNotCovered.
        """
        with self.engine.transaction:
            self.engine.require_writable()
            self.reserved.change(self._entry(name), reservation_bytes)
            return self._done(name)

    def resize(self, name: str, size_bytes: int, *, shrink: bool = False) -> DeviceInfo:
        """Change a device's size. Clients see a larger size when they connect again.

        Shrinking drops what lies beyond the new end and must be asked for. Raises BadSize, DeviceInUse.
        """
        with self.engine.transaction:
            self.engine.require_writable()
            self.sizes.resize(self._entry(name), size_bytes, shrink=shrink)
            return self._done(name)

    def rollback(self, name: str, snapshot: str, *, keep: str | bool | None = None) -> DeviceInfo:
        """Give `name` the content of `snapshot`, in one step; the snapshot stays.

        The prior state is kept as a snapshot called `keep`, or by a name made from the device's when None;
        False throws it away. Raises DeviceInUse while clients have the device open, ReservationNotCovered.
        """
        with self.engine.transaction:
            roll_back(self, name, snapshot, keep)
            return self._done(name)

    # --- the pool itself ---

    def grow(self, size_bytes: int | None = None, metadata_bytes: int | None = None) -> PoolStatus:
        """Grow data or metadata or both, while in use. Raises BadSize for what is not larger."""
        with self.engine.transaction:
            self.engine.require_writable()
            if metadata_bytes is not None:
                self._grow_metadata(metadata_bytes)
            if size_bytes is not None:
                blocks = -(-size_bytes // self.block_bytes)
                if blocks <= self._metadata.data_blocks:
                    present = self._metadata.data_blocks * self.block_bytes
                    raise BadSize(
                        str(size_bytes), f"is not more than the present {present} bytes; pools only grow"
                    )
                self.engine.grow_data(blocks)
            return self.status()

    def _grow_metadata(self, metadata_bytes: int) -> None:
        blocks = metadata_bytes // METADATA_BLOCK_BYTES
        if blocks <= self._metadata.metadata_blocks:
            present = self._metadata.metadata_blocks * METADATA_BLOCK_BYTES
            raise BadSize(str(metadata_bytes), f"is not more than the present {present} bytes of metadata")
        if self.engine.journal is not None:
            self.engine.journal.about_to_lengthen()
        self._lengthen_metadata(blocks * METADATA_BLOCK_BYTES)
        with self.engine.changing_tree():
            self._metadata.grow_metadata()
        self.engine.commit()

    def _lengthen_metadata(self, length_bytes: int) -> None:
        """Make the file longer, durably: no superblock may tell of blocks that a power cut takes away."""
        path = self.location.metadata_path
        if not stat.S_ISREG(path.stat().st_mode):
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, length_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def commit(self) -> None:
        """Make everything durable now."""
        self.engine.commit_if_dirty()

    def close(self) -> None:
        """Commit, close, let the lock go. The caller has ended the sessions."""
        if self._closed:
            return
        self._closed = True
        try:
            self.engine.close()
        finally:
            self.catalog.close()
            for held in self._held:
                close = getattr(held, "close", None)
                if close is not None:
                    close()

    # --- looking ---

    def device(self, entry: CatalogEntry) -> ThinDevice:
        """The device of a row, in memory; `transaction` is held. Raises MetadataError, OSError."""
        return self.engine.open_device(entry.device_id, entry.size_bytes, read_only=entry.read_only)

    def open_session(self, entry: CatalogEntry) -> Session:
        """A session on a device, if it is still what `entry` says. Raises NoSuchDevice."""
        with self.engine.transaction:
            present = self.catalog.by_name(entry.name)
            if self._closed or present is None or present.device_id != entry.device_id:
                raise NoSuchDevice(entry.name, str(self.location))
            if present.receiving is not None:
                raise DeviceReceiving(entry.name)
            if present.content_id is not None and not present.read_only and self.writable:
                # From here on the client may write. On disk before it can: no changed device passes for a base.
                present = replace(present, content_id=None)
                self.catalog.apply([Put(present)])
            device = self.device(present)
            device.contexts = self.relatives(present)
            return device.open(self.lazy.of(present))

    def relatives(self, entry: CatalogEntry) -> dict[str, int]:
        """Snapshots a device can be compared with, newest first: name -> device id.

        Its snapshots, what it was made from, and the snapshots of that.
        """
        others = [other for other in self.catalog.entries() if other.device_id != entry.device_id]
        names = {entry.name, entry.origin}
        kin = [
            other
            for other in others
            if not (other.receiving or is_lazy(other) or is_lazy(entry))
            and (other.name == entry.origin or (other.origin in names and other.origin))
        ]
        return {other.name: other.device_id for other in sorted(kin, key=lambda other: -other.device_id)}

    def info(self, name: str) -> DeviceInfo:
        """One device as data."""
        with self.engine.transaction:
            return self._describe(self._entry(name))

    def devices(self) -> list[DeviceInfo]:
        """All devices, by name; of a damaged one without what cannot be counted."""
        with self.engine.transaction:
            return [self._listed(entry) for entry in sorted(self.catalog.entries(), key=lambda e: e.name)]

    def _listed(self, entry: CatalogEntry) -> DeviceInfo:
        try:
            return self._describe(entry)
        except MetadataError as error:
            log.warning("what %r holds cannot be counted: %s", entry.name, error)
            return self._without_figures(entry)

    def _without_figures(self, entry: CatalogEntry) -> DeviceInfo:
        remote_bytes, token = self.lazy.remote_bytes(entry), token_of(entry.receiving)
        return describe_device(self.engine, entry, remote_bytes, token, figures=False)

    def _done(self, name: str) -> DeviceInfo:
        """A device as a change left it. That is done: figures that cannot be read now do not undo it."""
        entry = self._entry(name)
        try:
            return self._describe(entry)
        except (OSError, MetadataError) as error:
            log.warning("%r was changed; its figures cannot be read: %s", name, error)
            return self._without_figures(entry)

    def _describe(self, entry: CatalogEntry) -> DeviceInfo:
        device = self.engine.devices.get(entry.device_id)
        if device is not None and self.writable:
            device.apply_pending()
        return describe_device(self.engine, entry, self.lazy.remote_bytes(entry), token_of(entry.receiving))

    def status(self) -> PoolStatus:
        """The pool as data."""
        with self.engine.transaction:
            if self.writable:
                self.engine.collect()
            self.engine.reservations.measure()
            return describe_pool(self)

    def begin_pull(self, request: PullRequest) -> dict[str, Any]:
        """Begin to pull a snapshot from an object store, or go on. Raises DeviceExists, the store's errors."""
        # Without the transaction: the store is asked for minutes perhaps, and clients wait for commits.
        self.engine.require_writable()
        self.lazy.pull(request)
        return self.pull_state(request.name)

    def abort_pull(self, name: str) -> None:
        """Drop a device that was not pulled to its end. Raises NoSuchDevice, DeviceInUse, NotBeingPulled."""
        with self.engine.transaction:
            entry = self.catalog.by_name(name)
            half = self.transfers.partial(name) if entry is None else None
            if half is not None and not half[1].resumable:
                self.transfers.abort(name)  # killed before it had its name
                return
            if entry is None:
                raise NoSuchDevice(name, str(self.location))
            if not is_lazy(entry):
                raise NotBeingPulled(name)
            self.require_idle(entry)
            self.delete_entry(entry)
        self.lazy.release_holds()

    def pull_state(self, name: str) -> dict[str, Any]:
        """How far a pull got. Raises NoSuchDevice."""
        with self.engine.transaction:
            return self.lazy.state(name)

    def diff(self, old: str, new: str, begin_bytes: int = 0) -> DiffPage:
        """What changed from one device to another, from an offset on.

        Raises NoSuchDevice, MetadataError, and PoolPoisoned for devices that may hold what was never committed.
        """
        with self.engine.transaction:
            entries = self._entry(old), self._entry(new)
            for entry in entries:
                self.lazy.require_whole(entry)
            if self.engine.failure is not None and not all(entry.read_only for entry in entries):
                self.engine.require_writable()  # changes that were never committed are in no tree
            if self.writable:
                self.engine.collect()
            with self.engine.looking_at_tree():
                return compare(self._metadata, *entries, self.block_bytes, begin_bytes)

    def dm_status(self) -> list[str]:
        """What `dmsetup status` would print: a line for the pool, then one for each device, by name."""
        with self.engine.transaction:
            if self.writable:
                self.engine.commit_if_dirty()  # as the kernel does
            return dm_lines(self)

    def freeing(self) -> list[ReclaimInfo]:
        """What deleting the snapshots would give back: each alone, and together with all older ones; oldest first."""
        with self.engine.transaction:
            if self.writable:
                self.engine.collect()
            return describe_freeing(self.engine, self.catalog.entries())

    def space_use(self) -> SpaceUse:
        """What the used data is used for, to the block. Raises MetadataError, OSError."""
        with self.engine.transaction:
            if self.writable:
                self.engine.collect()
            return describe_space(self)

    # --- settings ---

    def change_settings(self, changes: Mapping[str, object]) -> PoolSettings:
        """Set pool settings, durably; None sets one back to its default. Raises BadSetting, with nothing changed."""
        texts = checked(changes)
        with self.engine.transaction:
            self.engine.require_writable()
            if texts and not self.location.has_catalog:
                name, text = next(iter(texts.items()))
                raise BadSetting(
                    name, text or "default", "a pool of two bare paths keeps none; give it to `serve --set`"
                )
            self.catalog.set_settings(texts)
            self._configure()
            return self.settings

    def override_settings(self, overrides: Mapping[str, str]) -> None:
        """Settings that hold for as long as this process has the pool, whatever is set."""
        with self.engine.transaction:
            self.overrides = dict(overrides)
            self._configure()

    def _configure(self) -> None:
        self.settings = settings = PoolSettings.read({**self.catalog.settings(), **self.overrides})
        self.engine.full.configure(settings.when_full, settings.queue_timeout)

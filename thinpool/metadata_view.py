"""A pool's metadata for reading, wherever it is: an idle pool, one that is being served, a bare file or device.

In: finding a state that holds still while it is read, and the names of its devices. Out: what is read of it
(`cli/checking.py`, `cli/dumping.py`), changing anything.

An idle pool is locked for reading. A served one is read through a metadata snapshot that the server holds for as long
as this process keeps its connection; reading itself happens here, so clients of the server are not held up. A metadata
device that device mapper is using (an active LVM pool) changes under any reader: it is refused, unless its own metadata
snapshot is what was asked for.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from metadata import (
    BlockStore,
    Extent,
    Fault,
    FileStore,
    MetadataError,
    NotPoolMetadata,
    Place,
    Problem,
    Severity,
    capture_space_maps,
    snapshot_as_pool,
)
from metadata.superblock import read_superblock
from metadata.walk import salvage

from .errors import MetadataChanged, MetadataInUse, NotAPool, PoolBusy, ThinPoolError
from .operations import translating
from .pool_location import PoolLocation
from .pool_lock import PoolLock

if TYPE_CHECKING:
    from .control_client import MetadataHold

SECTOR_BYTES = 512
HOLD_ATTEMPTS = 5
BUSY_SECONDS = 3.0
RETRY_SECONDS = 0.05


@dataclass(slots=True)
class MetadataView:
    """Metadata that holds still.

    Attributes:
        store: what to check.
        extent: the most of it that holds still, and so can be checked.
        shown: what to dump: its live pool is the state that is meant.
        remark: what a reader should know of that state, "" for nothing.
        names: names by device id, of those devices that have one.
        block_bytes: size of a data block, 0 where the superblock does not tell.
        needs_check: whether the pool is marked as needing a check.
        data_blocks: size of the data space, 0 where the superblock does not tell.
        metadata_blocks: metadata blocks in use according to the space map, 0 where that is not known.
    """

    store: BlockStore
    extent: Extent
    shown: BlockStore
    remark: str = ""
    names: dict[int, str] = field(default_factory=dict)
    block_bytes: int = 0
    metadata_blocks: int = 0
    needs_check: bool = False
    data_blocks: int = 0

    def data_file_problems(self, location: PoolLocation) -> list[Problem]:
        """Whether the data file, where there is one, is as long as the metadata counts on; figures in data blocks."""
        try:
            found = location.data_path.stat()
        except OSError:
            return []  # metadata by themselves
        if not stat.S_ISREG(found.st_mode) or found.st_size >= self.data_blocks * self.block_bytes:
            return []
        has_blocks = found.st_size // self.block_bytes
        place, lost = Place("data file"), self.data_blocks - has_blocks
        return [
            Problem(
                Severity.ERROR, Fault.DATA_SHORT, place, "", has_blocks, lost, self.data_blocks, has_blocks
            )
        ]


@contextmanager
def view_metadata(
    location: PoolLocation, *, snapshot: bool = False, damaged: bool = False
) -> Iterator[MetadataView]:
    """The metadata of `location`, still until the end of the block; `snapshot`: its metadata snapshot.

    `damaged`: also what does not look like a pool any more.

    Raises PoolNotFound, NotAPool, PoolBusy, MetadataInUse, and MetadataChanged at the end where the state did not hold.
    """
    location.require()
    hold = _hold(location)
    if hold is None:
        with translating(str(location)), _view_idle(location, snapshot=snapshot, damaged=damaged) as view:
            yield view
        return
    try:
        with translating(str(location)), _open(location) as store:
            view, hold = _view_served(location, store, hold, snapshot=snapshot)
            yield view
            if not hold.lasts:
                raise MetadataChanged(str(location))
    finally:
        hold.close()


@contextmanager
def change_metadata(location: PoolLocation) -> Iterator[MetadataView]:
    """The metadata of an idle pool, for this process alone and for writing.

    Raises PoolNotFound, NotAPool, and PoolBusy (also for a pool that is being served, or active in the kernel).
    """
    location.require()
    lock = _lock(location, shared=False)
    try:
        with translating(str(location)), _open(location, writable=True) as store:
            yield _described(location, _view_store(store))
    finally:
        lock.close()


def _hold(location: PoolLocation) -> MetadataHold | None:
    """A hold on the metadata of a served pool, None where nobody serves it."""
    # Imported here: a file by itself has no server and no catalogue, and loading them takes as long as its check.
    if location.control_path is None or not location.control_path.exists():
        return None
    from .control_client import AnswerLostError, ControlClient, NotServedError

    try:
        return ControlClient(location.control_path).hold_metadata()
    except (NotServedError, AnswerLostError):
        return None  # who has the pool, if anybody, is for the lock to say


@contextmanager
def _view_idle(location: PoolLocation, *, snapshot: bool, damaged: bool) -> Iterator[MetadataView]:
    lock = _lock(location, shared=True)
    try:
        if not snapshot:
            _refuse_active(location)
        with _open(location) as store:
            yield _described(location, _view_store(store, snapshot=snapshot), damaged=damaged)
    finally:
        lock.close()


def _lock(location: PoolLocation, *, shared: bool) -> PoolLock:
    """A lock; a command that changes the pool meanwhile is waited for a moment. Raises PoolBusy."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return PoolLock.acquire(location, shared=shared)
        except PoolBusy:
            if time.monotonic() > deadline:
                raise
        time.sleep(RETRY_SECONDS)


def _refuse_active(location: PoolLocation) -> None:
    """Raise MetadataInUse where the kernel has the metadata device (open(2): O_EXCL on block devices)."""
    path = location.metadata_path
    if not stat.S_ISBLK(path.stat().st_mode):
        return
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise MetadataInUse(str(path)) from error
        raise


@contextmanager
def _open(location: PoolLocation, *, writable: bool = False) -> Iterator[FileStore]:
    store = FileStore(location.metadata_path, writable=writable)
    try:
        if store.size_blocks() == 0:
            raise NotAPool(str(location.metadata_path), "it is shorter than one metadata block")
        yield store
    finally:
        store.close()


def _view_store(store: BlockStore, *, snapshot: bool = False, remark: str = "") -> MetadataView:
    return MetadataView(store, Extent.SNAPSHOT if snapshot else Extent.WHOLE, store, remark)


def _view_served(
    location: PoolLocation, store: FileStore, hold: MetadataHold, *, snapshot: bool
) -> tuple[MetadataView, MetadataHold]:
    """What a hold lets us see, and the hold that it takes in the end."""
    if not hold.held_root or snapshot:
        return _described(location, _view_store(store, snapshot=snapshot)), hold
    from .control_client import ControlClient

    for _ in range(HOLD_ATTEMPTS if hold.fresh else 0):
        captured = capture_space_maps(store)
        if captured is not None:
            return _described(location, _view_store(captured)), hold
        # A commit came between: once more, with a snapshot of the state after it.
        hold.close()
        assert location.control_path is not None
        hold = ControlClient(location.control_path).hold_metadata()
        if not hold.fresh:
            break
    reason = "the pool is too busy" if hold.fresh else "that snapshot was there before"
    remark = f"seen through a metadata snapshot, without space maps: {reason}"
    view = MetadataView(store, Extent.SNAPSHOT, snapshot_as_pool(store), remark)
    return _described(location, view), hold


def _described(location: PoolLocation, view: MetadataView, *, damaged: bool = False) -> MetadataView:
    """The view, with names and what its superblock says. Raises NotAPool where there is no pool at all."""
    present: set[int] = set()
    try:
        superblock = read_superblock(view.store)
    except NotPoolMetadata as error:
        if not damaged:
            raise NotAPool(str(location.metadata_path), str(error)) from error
    except (MetadataError, OSError):
        pass  # a damaged superblock is for the reader to describe
    else:
        view.block_bytes = superblock.data_block_sectors * SECTOR_BYTES
        view.data_blocks = superblock.data_space.blocks
        view.needs_check = superblock.needs_check
        view.metadata_blocks = min(superblock.metadata_space.allocated, view.store.size_blocks())
        present.update(salvage(view.store, 24, superblock.details_root)[0].tolist())
    view.names = device_names(location, present)
    return view


def device_names(location: PoolLocation, present: AbstractSet[int]) -> dict[int, str]:
    """Names by device id; none where the catalogue is unreadable, which must keep nobody from the metadata.

    Raises NamesUnusable for a file of names that was asked for.
    """
    if location.names_path is not None:
        from .lvm_names import read_names

        return {device.device_id: device.name for device in read_names(location.names_path, present)}
    if location.catalog_path is None or not location.catalog_path.exists():
        return {}
    from .catalog import Catalog

    with suppress(ThinPoolError, OSError):
        catalog = Catalog.open(location.catalog_path, writable=False)
        try:
            return {entry.device_id: entry.name for entry in catalog.entries()}
        finally:
            catalog.close()
    return {}

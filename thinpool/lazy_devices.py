"""The devices of a pool that are not all here yet: who they are, how they begin, fork, and end.

In: the tag in the catalogue, the files beside it, pulling. Out: the content (`lazy_device.py`, `hydration.py`).

A device whose row carries the tag `remote` has a file of that name in the pool directory's `remote/`. The file is
written first, then the row, in one step with the metadata; at the end the row loses the tag first, then the file goes.
So a file without a row is what a kill left, and is deleted when the pool is opened for writing; a row without a file
does not happen, and such a device is refused, not read as zeros.

A device that is pulled without `--lazy` is the same thing, hidden until it is complete (`receiving`).
"""

from __future__ import annotations

import json
import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitarray import bitarray

from .catalog import CatalogEntry, Put
from .errors import DeviceExists, DeviceIncomplete, NoSuchDevice, PoolDamaged, StoreUnreachable, ThinPoolError
from .hydration import BackgroundHydration
from .lazy_device import LazyDevice
from .pull_base import PullBase, begun_from_base, differing_blocks, find_base
from .receiving_state import Wanted
from .remote_blocks import TAG, Origin, RemoteBlocks, is_lazy, remove_left_over, untagged
from .store.store import Store

if TYPE_CHECKING:
    from .pool import Pool
    from .store.manifests import Manifest

DIRECTORY = "remote"

log = logging.getLogger("thinpool")


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What is pulled into which device."""

    url: str
    snapshot: str
    name: str
    lazy: bool = False
    read_only: bool = False
    key_file: str | None = None
    base: str | None = None  # a device of the pool: what it shares with the snapshot is not fetched


class LazyDevices:
    """Those of one open pool. The engine's transaction guards the table."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._open: dict[int, LazyDevice] = {}
        self._running: dict[int, BackgroundHydration] = {}
        self._in_background = False
        # Completed since the pool was opened: whoever waited for one learns that it is done, not that it exists.
        self._completed: dict[int, Origin] = {}
        self._unheld: deque[LazyDevice] = deque()  # whose holds in stores are to be released

    # --- finding ---

    def _path(self, token: str) -> Path:
        assert self._pool.location.root is not None
        return self._pool.location.root / DIRECTORY / token

    def of(self, entry: CatalogEntry) -> LazyDevice | None:
        """The remote part of a device; None for a device that is all here. Raises PoolDamaged."""
        if not is_lazy(entry):
            return None
        with self._pool.engine.transaction:
            lazy = self._open.get(entry.device_id)
            if lazy is None:
                present = self._pool.catalog.by_id(entry.device_id)
                if present is None or not is_lazy(present):
                    return None  # it was completed, or deleted, since the caller read its row
                path = self._path(entry.tags[TAG])
                try:
                    remote = RemoteBlocks.open(path)
                except FileNotFoundError:
                    raise PoolDamaged(str(path), "the list of blocks still to be fetched is gone") from None
                lazy = self._opened(entry, remote)
            return lazy

    def _opened(self, entry: CatalogEntry, remote: RemoteBlocks) -> LazyDevice:
        pool = self._pool
        device = pool.engine.open_device(entry.device_id, entry.size_bytes, read_only=entry.read_only)
        lazy = LazyDevice(device, remote, pool.commit)
        self._open[entry.device_id] = lazy
        if self._in_background:
            self._start(entry, lazy)
        return lazy

    def remote_bytes(self, entry: CatalogEntry) -> int:
        """What is still to be fetched of a device, at most."""
        lazy = self.of(entry)
        return 0 if lazy is None else lazy.remote_blocks * self._pool.block_bytes

    def require_whole(self, entry: CatalogEntry) -> None:
        """Raise DeviceIncomplete for a device of which something may be missing."""
        if is_lazy(entry):
            raise DeviceIncomplete(entry.name, self.remote_bytes(entry))

    # --- beginning ---

    def pull(self, request: PullRequest) -> CatalogEntry:
        """Begin to pull, or go on with one that was begun. Raises DeviceExists, the store's errors."""
        present = self._pool.catalog.by_name(request.name)
        if present is not None and self._begun(present, request):
            return present
        secret = None
        if request.key_file is not None:
            secret = Path(request.key_file).read_bytes().removesuffix(b"\n")
        store = Store.open(request.url, secret)
        manifest = store.snapshot(request.snapshot)
        if present is not None:
            # Done before, and nobody wrote to it since: a command that was killed at its very end is run again.
            if present.receiving is None and present.content_id == manifest.about.device:
                return present
            raise DeviceExists(request.name)
        base = None if request.base is None else find_base(self._pool, store, request.base)
        manifest, origin = _held(store, manifest, request)
        try:
            if base is None:
                return self._create(request, manifest, origin)
            return self._derive(request, manifest, origin, base, store)
        except BaseException:
            # Unless the device is there all the same: it goes on fetching what the hold keeps.
            if origin.hold and self._pool.catalog.by_name(request.name) is None:
                with suppress(ThinPoolError):
                    store.release(origin.root)
            raise

    def _begun(self, present: CatalogEntry, request: PullRequest) -> bool:
        """Whether a device is being pulled from the same snapshot, or was since the pool was opened.

        Raises DeviceExists where it is being pulled from another.
        """
        lazy = self.of(present)
        origin = lazy.remote.origin if lazy is not None else self._completed.get(present.device_id)
        if origin is None:
            return False
        if (origin.url, origin.snapshot) != (request.url, request.snapshot):
            raise DeviceExists(request.name)
        running = self._running.get(present.device_id)
        if running is not None:
            running.hurry()
        return True

    def _create(self, request: PullRequest, manifest: Manifest, origin: Origin) -> CatalogEntry:
        from .store.manifests import SEGMENT_BYTES

        pool, about = self._pool, manifest.about
        blocks = -(-about.size_bytes // pool.block_bytes)
        bits = bitarray(blocks, endian="little")
        bits.setall(0)
        for number in manifest.segments:
            begin, end = number * SEGMENT_BYTES, (number + 1) * SEGMENT_BYTES
            bits[begin // pool.block_bytes : min(-(-end // pool.block_bytes), blocks)] = 1
        token = uuid.uuid4().hex
        with pool.engine.transaction:
            remote = RemoteBlocks.create(self._path(token), origin, bits)
            entry = pool.create_entry(
                request.name, about.size_bytes, lambda entry: _pulled(entry, request, manifest, token)
            )
            self._opened(entry, remote)
            return entry

    def _derive(
        self, request: PullRequest, manifest: Manifest, origin: Origin, base: PullBase, store: Store
    ) -> CatalogEntry:
        """As `_create`, beginning with what a device of the pool has already."""
        pool, about = self._pool, manifest.about
        bits = differing_blocks(store, base.manifest, manifest, pool.block_bytes)
        wanted = Wanted(request.name, about.device, about.size_bytes, base.content_id, base.name)
        pool._admit(about.size_bytes, force=False)
        with begun_from_base(pool, wanted, bits) as hidden, pool.engine.transaction:
            pool._new_name(request.name)
            token = uuid.uuid4().hex
            remote = RemoteBlocks.create(self._path(token), origin, bits)
            present = pool.catalog.by_id(hidden.device_id) or hidden  # its base may have another name by now
            entry = _pulled(replace(present, name=request.name), request, manifest, token)
            pool.catalog.apply([Put(entry)])
            pool.engine.forget(entry.device_id)
            self._opened(entry, remote)
            return entry

    def state(self, name: str) -> dict[str, Any]:
        """How far a pull got, as JSON. Raises NoSuchDevice."""
        entry = self._pool.catalog.by_name(name)
        if entry is None:
            raise NoSuchDevice(name, str(self._pool.location))
        return {
            "name": name,
            "size_bytes": entry.size_bytes,
            "remote_bytes": self.remote_bytes(entry),
            "complete": not is_lazy(entry),
            "usable": entry.receiving is None,
            **self._failure(entry),
        }

    # --- forking and ending ---

    def forked(
        self, source: CatalogEntry, entry: CatalogEntry
    ) -> tuple[CatalogEntry, Callable[[], None] | None]:
        """The row of a snapshot of `source`, and what is to be done at the very point in time that it shows.

        The hold stays the origin's; the snapshot reads the same object. Whoever ends last releases it.
        """
        lazy = self.of(source)
        if lazy is None:
            return entry, None
        token = uuid.uuid4().hex

        def fork() -> None:
            # Everybody is held off, so mappings and bits belong together. On disk before the snapshot is.
            RemoteBlocks.create(self._path(token), lazy.remote.origin, lazy.remote.bits.copy())

        return replace(entry, tags={**entry.tags, TAG: token}), fork

    @contextmanager
    def ending(self, entry: CatalogEntry) -> Iterator[None]:
        """Around the step that deletes a device: nothing is fetched into it any more."""
        self._completed.pop(entry.device_id, None)
        lazy = self._open.get(entry.device_id)
        if lazy is not None:
            lazy.close()
        try:
            yield
        except BaseException:
            if lazy is not None:
                lazy.closed = False
            raise
        self.drop(entry.device_id)

    def complete(self, entry: CatalogEntry) -> None:
        """A device is all here: forget where it came from. The checkpoint has been taken."""
        pool = self._pool
        with pool.engine.transaction:
            present = pool.catalog.by_id(entry.device_id)
            lazy = self._open.get(entry.device_id)
            if present is None or lazy is None or not is_lazy(present):
                return
            assert lazy.remote.bits.find(1) < 0
            pool.commit()
            pool.catalog.apply([Put(replace(present, tags=untagged(present.tags), receiving=None))])
            self._completed[entry.device_id] = lazy.remote.origin
            self.drop(entry.device_id)
        self.release_holds()
        log.info("%r is complete", present.name)

    def drop(self, device_id: int) -> None:
        """A device is complete or deleted: its file goes, and the hold if nobody else uses it (`release_holds`)."""
        lazy = self._open.pop(device_id, None)
        running = self._running.pop(device_id, None)
        if lazy is None:
            return
        lazy.close()
        if running is not None:
            running.request_stop()
        lazy.remote.remove()
        origin = lazy.remote.origin
        if origin.hold and not self._used_by_others(origin):
            self._unheld.append(lazy)

    def release_holds(self) -> None:
        """Ask stores to let go of what no device needs any more; `transaction` is not held, for that may take long."""
        while self._unheld:
            self._release(self._unheld.popleft())

    def _used_by_others(self, origin: Origin) -> bool:
        """Whether another device fetches from the same hold, or one may of which the list could not be read."""
        if any(
            is_lazy(entry) and entry.device_id not in self._open for entry in self._pool.catalog.entries()
        ):
            return True
        return any(other.remote.origin.root == origin.root for other in self._open.values())

    def _release(self, lazy: LazyDevice) -> None:
        """Best effort: a hold that stays costs space in the store, and `gc` tells of it."""
        try:
            reader = lazy.reader(1)
            reader.store.release(lazy.remote.origin.root)
        except (ThinPoolError, OSError) as error:
            log.warning("the hold %s in %s stays: %s", lazy.remote.origin.root, lazy.remote.origin.url, error)

    def sweep(self) -> None:
        """Delete files that a kill left; the pool was opened for writing."""
        root = self._pool.location.root
        if root is None:
            return
        known = {entry.tags[TAG] for entry in self._pool.catalog.entries() if is_lazy(entry)}
        remove_left_over(root / DIRECTORY, known)
        for entry in self._pool.catalog.entries():
            try:
                self.of(entry)
            except (PoolDamaged, OSError) as error:
                log.warning("%r cannot be used: %s", entry.name, error)

    # --- the background ---

    def start_background(self) -> None:
        """From now on every such device is fetched in the background."""
        with self._pool.engine.transaction:
            self._in_background = True
            for entry in self._pool.catalog.entries():
                lazy = self._open.get(entry.device_id)
                if lazy is not None and entry.device_id not in self._running:
                    self._start(entry, lazy)

    def _start(self, entry: CatalogEntry, lazy: LazyDevice) -> None:
        running = BackgroundHydration(entry.name, lazy, lambda: self.complete(entry))
        self._running[entry.device_id] = running
        running.start()

    def _failure(self, entry: CatalogEntry) -> dict[str, Any]:
        """What the background met last, and whether that may pass by itself."""
        running = self._running.get(entry.device_id)
        failure = None if running is None else running.failure
        return {
            "failure": None if failure is None else str(failure),
            "may_pass": isinstance(failure, StoreUnreachable),
        }

    def stop_background(self) -> None:
        """End it; what was fetched is recorded. Called without locks, before the pool is closed."""
        self._in_background = False
        for running in list(self._running.values()):
            running.request_stop()
        for running in list(self._running.values()):
            running.stop()


def _pulled(entry: CatalogEntry, request: PullRequest, manifest: Manifest, token: str) -> CatalogEntry:
    """The row of a device that begins to be fetched."""
    return replace(
        entry,
        read_only=request.read_only,
        tags={TAG: token},
        content_id=manifest.about.device if request.read_only or not request.lazy else None,
        receiving=None if request.lazy else _receiving(request, manifest),
    )


def _receiving(request: PullRequest, manifest: Manifest) -> str:
    """The state of a device that is being received, in the form that all such devices have; no stream resumes it."""
    return json.dumps(
        {
            "target": request.name,
            "content_id": manifest.about.device,
            "base_content_id": None,
            "size_bytes": manifest.about.size_bytes,
            "read_only": request.read_only,
            "resumable": False,
        }
    )


def _held(store: Store, manifest: Manifest, request: PullRequest) -> tuple[Manifest, Origin]:
    """Keep the snapshot's packs from the collector. Where we may not write, the snapshot itself has to stay.

    Returns the manifest that is held: another one where the snapshot was forgotten and pushed again meanwhile.
    """
    hold: str | None = None
    try:
        hold = store.hold(manifest)
    except ThinPoolError as error:
        log.warning("no hold could be written, the snapshot must not be forgotten meanwhile: %s", error)
    if hold is not None:
        try:
            # Still there, and the same: so the collector sees one of the two.
            present = store.snapshot(request.snapshot)
        except BaseException:
            store.release(hold)
            raise
        if present.encode() != manifest.encode():
            store.release(hold)
            return _held(store, present, request)
    return manifest, Origin(
        url=request.url,
        snapshot=request.snapshot,
        content_id=manifest.about.device,
        root=hold or store.snapshot_key(request.snapshot),
        hold=hold is not None,
        key_file=None if request.key_file is None else str(Path(request.key_file).absolute()),
    )

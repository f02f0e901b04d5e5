"""A host: a real pool beside a model of every device in it, compared in content and allocation.

In: changes made to both, restarts, kills, the comparison, for whole devices and for those that are partly in a store.
Out: stores, streams and the order of steps (`travel_history.py`).
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.fakes.device_model import ModelDevice, blocks_in
from tests.fakes.store_place import StorePlace
from tests.fakes.transfer_pools import session_on
from thinpool.catalog import CatalogEntry
from thinpool.extents import HOLE
from thinpool.hydration import StoppedError, hydrate
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.push_source import OpenPoolSource
from thinpool.remote_blocks import is_lazy
from thinpool.session import Session
from thinpool.store.known_chunks import KnownChunks

POOL_BYTES = 512 << 20


class Host:
    """One pool and what it must hold. `background`: lazy devices are fetched as a server does it."""

    def __init__(self, path: Path, block_bytes: int, *, background: bool = False) -> None:
        self.path = path
        self.block_bytes = block_bytes
        self.models: dict[str, ModelDevice] = {}
        self.known = KnownChunks(None)
        self._background = background
        create_pool(path, size_bytes=POOL_BYTES, block_bytes=block_bytes, metadata_bytes=4 << 20)
        self._open()

    def _open(self) -> None:
        self.pool: Pool = open_pool(PoolLocation.directory(self.path))
        if self._background:
            self.pool.lazy.start_background()

    def close(self) -> None:
        """Close the pool; what it holds is durable."""
        self.pool.lazy.stop_background()
        self.pool.close()
        self.settle()

    def restart(self) -> None:
        """Close and open."""
        self.close()
        self._open()

    def settle(self) -> None:
        """Everything was committed."""
        for model in self.models.values():
            model.settle()

    def kill(self, place: StorePlace, *, power_cut: bool = False) -> None:
        """Go on with what the files hold at this instant, and take over what survived.

        With `power_cut` without the journal, which helps after kills of the process only. The killed process cannot reach the store any more: it must not release what its successor needs.
        """
        killed = self.path.with_name(self.path.name + "-killed")
        with place.gone():
            with self._standing_still():
                subprocess.run(["cp", "-r", "--sparse=always", str(self.path), str(killed)], check=True)
            self.pool.lazy.stop_background()
            self.pool.close()
        shutil.rmtree(self.path)
        journal = PoolLocation.directory(killed).journal_path
        if power_cut and journal is not None:
            journal.unlink(missing_ok=True)
        killed.rename(self.path)
        background, self._background = self._background, False
        self._open()
        names = {entry.name for entry in self.pool.catalog.entries()}
        assert names == set(self.models), "a kill changed which devices there are"
        for name, model in self.models.items():
            model.survives_as(self._found(name))
        if background:
            self._background = True
            self.pool.lazy.start_background()

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Nothing is written: neither committed nor fetched. A copy takes longer than an instant."""
        with ExitStack() as held:
            held.enter_context(self.pool.engine.transaction)
            for device in list(self.pool.engine.devices.values()):
                held.enter_context(device.quiet())
            yield

    # --- finding ---

    def entry(self, name: str) -> CatalogEntry:
        """The row of a device."""
        entry = self.pool.catalog.by_name(name)
        assert entry is not None, name
        return entry

    def is_lazy(self, name: str) -> bool:
        """Whether part of a device may still be in the store."""
        return is_lazy(self.entry(name))

    def names(self, *, writable: bool | None = None, lazy: bool | None = None) -> list[str]:
        """Devices that are or are not writable, partly in a store; None for either."""
        return [
            name
            for name in self.models
            if writable in (None, not self.entry(name).read_only) and lazy in (None, self.is_lazy(name))
        ]

    def named(self, content_id: str) -> str | None:
        """The whole device with a content id that a stream would take for its base: the last one."""
        found = [e.name for e in self.pool.catalog.entries() if e.content_id == content_id and not is_lazy(e)]
        return found[-1] if found else None

    def mapped(self, name: str) -> set[int]:
        """Mapped blocks of a device, by the metadata."""
        device_id = self.entry(name).device_id
        with self.pool.engine.transaction:
            device = self.pool.engine.devices.get(device_id)
            if device is not None:
                device.apply_pending()
            found = self.pool.engine.metadata.mappings(device_id)
            return {key for keys, _ in found for key in keys.tolist()}

    def missing(self, name: str) -> set[int]:
        """Blocks of which it is not known here what they hold."""
        lazy = self.pool.lazy.of(self.entry(name))
        if lazy is None:
            return set()
        bits = {number for number, bit in enumerate(lazy.remote.bits) if bit}
        return bits - self.mapped(name)

    def _found(self, name: str) -> dict[int, bytes]:
        """What a device holds, also where that is in the store still."""
        model = self.models[name]
        remote = self.missing(name)
        found = {number: content for number, content in model.remote.items() if number in remote}
        device = self.pool.device(self.entry(name))
        plain = Session(device)
        for number in self.mapped(name):
            found[number] = bytes(plain.read_bytes(number * model.block_bytes, model.block_bytes))
        return found

    # --- comparing ---

    def check(self, name: str) -> None:
        """Content, allocation, size; of a lazy device what is here, and that nothing is forgotten of the rest."""
        model, entry = self.models[name], self.entry(name)
        assert entry.size_bytes == model.size_bytes, name
        missing, mapped = self.missing(name), self.mapped(name)
        if self._background:
            missing -= self.mapped(name)  # fetched in between
            mapped = self.mapped(name)
        assert mapped <= set(model.blocks), (name, "not a hole any more", mapped - set(model.blocks))
        lost = set(model.blocks) - mapped - missing
        if self._background:
            lost -= self.mapped(name)
        assert not lost, (name, "became a hole", lost)
        with session_on(self.pool, name) as session:
            for number in sorted(mapped):
                length = model.inside(number)
                at = number * model.block_bytes
                assert session.read_bytes(at, length) == model.blocks[number][:length], (name, number)
            self._check_extents(session, model)

    def _check_extents(self, session: Session, model: ModelDevice) -> None:
        """What is told to be a hole is one. What may be one may be told as data while the store is away."""
        offset = 0
        while offset < model.size_bytes:
            found = session.extents(offset, model.size_bytes - offset)
            for length, kind in found:
                touched = blocks_in([(offset, length)], model.block_bytes)
                assert kind != HOLE or touched.isdisjoint(model.blocks), (offset, length)
                offset += length

    def check_all(self) -> None:
        """Every device, and that there is no other one."""
        assert {entry.name for entry in self.pool.catalog.entries()} == set(self.models)
        for name in self.models:
            self.check(name)

    # --- changing ---

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write; the model follows where the device took it. Raises OSError as the session."""
        with session_on(self.pool, name) as session:
            session.enter()
            try:
                session.write(offset, memoryview(data))
            finally:
                session.leave()
                session.sent()
        self.models[name].write(offset, data)

    def zero(self, name: str, offset: int, length: int, *, keep: bool) -> None:
        """Zero; see `write`."""
        with session_on(self.pool, name) as session:
            session.zero(offset, length, keep_allocated=keep, fast_only=False)
        self.models[name].zero(offset, length, keep=keep)

    def trim(self, name: str, offset: int, length: int) -> None:
        """Discard; see `write`."""
        with session_on(self.pool, name) as session:
            session.trim(offset, length)
        self.models[name].trim(offset, length)

    def read(self, name: str, offset: int, length: int) -> None:
        """Read and compare. Raises OSError as the session."""
        with session_on(self.pool, name) as session:
            assert session.read_bytes(offset, length) == self.models[name].read(offset, length), (
                name,
                offset,
            )

    def snapshot(self, origin: str, name: str, *, read_only: bool) -> None:
        """Snapshot or clone."""
        self.pool.create_snapshot(origin, name, read_only=read_only)
        self.models[name] = self.models[origin].copy()
        self.settle()

    def forget_model(self, name: str) -> None:
        """A device was deleted."""
        del self.models[name]
        self.settle()

    def hydrate(self, name: str, windows: int | None = None) -> bool:
        """Fetch what is missing, or so many windows of it; whether the device is complete then."""
        lazy = self.pool.lazy.of(self.entry(name))
        if lazy is None:
            return True
        stop = threading.Event()
        left = windows

        def count(done: int, total: int) -> None:
            nonlocal left
            if left is not None:
                left -= 1
                if left <= 0:
                    stop.set()

        try:
            hydrate(lazy, stop, count, attempts=1)
        except StoppedError:
            return False
        if not stop.is_set():
            self.pool.lazy.complete(self.entry(name))
        return not self.is_lazy(name)


class WatchedSource(OpenPoolSource):
    """What a push reads, with a list of the ranges it read."""

    def __init__(self, pool: Pool, name: str) -> None:
        super().__init__(pool, name)
        self.ranges: list[tuple[int, int]] = []

    def read(self, offset: int, length_bytes: int) -> bytearray:
        self.ranges.append((offset, length_bytes))
        return super().read(offset, length_bytes)

    def relatives_by_name(self) -> list[tuple[str, str | None]]:
        """Name and content id of what it is compared with, in order: several devices may have one content."""
        return [(entry.name, entry.content_id) for entry in self._others()]

    def close(self) -> None:
        self._session.close()


@contextmanager
def watched_source(pool: Pool, name: str) -> Iterator[WatchedSource]:
    source = WatchedSource(pool, name)
    try:
        yield source
    finally:
        source.close()


def chunks_of(blocks: Iterable[int], block_bytes: int, chunk_bytes: int) -> set[int]:
    """Chunks that lie in blocks."""
    each = block_bytes // chunk_bytes
    return {chunk for number in blocks for chunk in range(number * each, (number + 1) * each)}

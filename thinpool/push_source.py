"""What `push` reads, out of a pool that is open here or one that a server has.

In: the two kinds of source. Out: what a push does with them (`store/pushing.py`).

Only content that cannot change may be pushed: a device with a content id (`content_identity.py`) that nobody can write
to. A pool that nobody serves is opened for reading. Of a served one the mappings come over the control socket and the
content over NBD, a connection for each thread that reads.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nbd.client import Client

from .device_diff import all_pages
from .errors import DeviceIncomplete, DeviceNotFrozen, NoSuchDevice, PoolNotServed, ServerUnreachable
from .pool_access import PoolAccess, open_here
from .pool_location import PoolLocation
from .remote_blocks import is_lazy
from .store.keys import CHUNK_BYTES
from .store.source import Ranges

if TYPE_CHECKING:
    from .catalog_rows import CatalogEntry
    from .pool import Pool
    from .store.source import BlockSource

STATUS_BYTES = 1 << 30
HOLE = 1  # NBD_STATE_HOLE of base:allocation


@contextlib.contextmanager
def push_source(location: PoolLocation, name: str) -> Iterator[BlockSource]:
    """A snapshot to push, wherever its pool is. Raises NoSuchDevice, DeviceNotFrozen, and what opening raises."""
    access = PoolAccess(location)
    try:
        access.server()
    except PoolNotServed:
        pool = open_here(location, read_only=True)
        try:
            yield OpenPoolSource(pool, name)
        finally:
            pool.close()
        return
    source = ServedSource(access, location, name)
    try:
        yield source
    finally:
        source.close()


class OpenPoolSource:
    """A snapshot of a pool that is open in this process."""

    def __init__(self, pool: Pool, name: str) -> None:
        entry = pool.catalog.by_name(name)
        if entry is None:
            raise NoSuchDevice(name, str(pool.location))
        self.identity = _frozen(
            name,
            read_only=entry.read_only,
            content_id=entry.content_id,
            receiving=entry.receiving is not None,
        )
        pool.lazy.require_whole(entry)
        self.size_bytes = entry.size_bytes
        self.block_bytes = pool.block_bytes
        self.created = entry.created
        self._pool = pool
        self._entry = entry
        self._session = pool.open_session(entry)

    def relatives(self) -> list[str]:
        """See `BlockSource`."""
        return [str(entry.content_id) for entry in self._others()]

    def _others(self) -> list[CatalogEntry]:
        mine = self._entry
        others = [
            entry
            for entry in self._pool.catalog.entries()
            if entry.read_only
            and entry.content_id not in (None, mine.content_id)
            and entry.receiving is None
            and not is_lazy(entry)
        ]
        return sorted(
            others,
            key=lambda other: (
                other.origin not in (mine.origin, mine.name) and mine.origin != other.name,
                abs(other.device_id - mine.device_id),
            ),
        )

    def _bases(self, content_id: str) -> Iterator[CatalogEntry]:
        return (entry for entry in self._others() if entry.content_id == content_id)

    def _maps(self, entry: CatalogEntry, stored_bytes: int) -> bool:
        blocks = self._pool.engine.metadata.device(entry.device_id).mapped_blocks
        return _agree(stored_bytes, blocks * self.block_bytes, entry.size_bytes, self.block_bytes)

    def mapped(self, begin_bytes: int, end_bytes: int) -> Ranges:
        """See `BlockSource`."""
        from .delta import joined

        first, end = begin_bytes // self.block_bytes, -(-end_bytes // self.block_bytes)
        found = self._pool.engine.metadata.differences(None, self._entry.device_id, first, end)
        for changed in joined(found, self.block_bytes, self.size_bytes):
            low, high = max(changed.offset_bytes, begin_bytes), min(changed.end_bytes, end_bytes)
            if low < high:
                yield low, high - low, True

    def changes(self, base: str, mapped_bytes: int) -> Ranges | None:
        """See `BlockSource`."""
        from .delta import Change, changed_ranges

        old = next((entry for entry in self._bases(base) if self._maps(entry, mapped_bytes)), None)
        if old is None:
            return None
        found = changed_ranges(
            self._pool.engine.metadata,
            old.device_id,
            self._entry.device_id,
            self.block_bytes,
            self.size_bytes,
        )
        return ((each.offset_bytes, each.length_bytes, each.change == Change.DATA) for each in found)

    def read(self, offset: int, length_bytes: int) -> bytearray:
        """See `BlockSource`."""
        return self._session.read_bytes(offset, length_bytes)


class ServedSource:
    """A snapshot of a pool that a server has."""

    def __init__(self, access: PoolAccess, location: PoolLocation, name: str) -> None:
        server = access.server()
        self._access = access
        self._devices: list[dict[str, Any]] = access.operate("list", {})["devices"]
        found = next((device for device in self._devices if device["name"] == name), None)
        if found is None:
            raise NoSuchDevice(name, str(location))
        uris = server["uris"].get(name, [])
        if not uris:
            raise ServerUnreachable(str(location), f"it exports no device {name!r}")
        self._device = found
        self._uri = str(uris[0])
        self._location = location
        self._local = threading.local()
        self._clients: list[Client] = []
        self.identity = _frozen(
            name,
            read_only=found["read_only"],
            content_id=found["content_id"],
            receiving=found["receiving"],
        )
        if found["remote_bytes"]:
            raise DeviceIncomplete(name, int(found["remote_bytes"]))
        self.size_bytes = int(found["size_bytes"])
        self.block_bytes = int(access.operate("status", {})["status"]["block_bytes"])
        self.created = datetime.datetime.fromisoformat(found["created"]).timestamp()
        try:
            self._client()  # from here on it is in use, and not deleted while the store is looked at
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connections."""
        for client in self._clients:
            client.close()

    def _client(self) -> Client:
        client: Client | None = getattr(self._local, "client", None)
        if client is None:
            client = self._local.client = Client.connect(self._uri, contexts=["base:allocation"])
            self._clients.append(client)
            self._require_same()
        return client

    def _require_same(self) -> None:
        """A name may come to mean another device, and every connection is made by name. Raises NoSuchDevice."""
        name = str(self._device["name"])
        asked = {
            "old": name,
            "new": name,
            "begin_bytes": self.size_bytes,
        }  # an empty page, for who it is about
        if self._access.operate("diff", asked)["new"]["content_id"] != self.identity:
            raise NoSuchDevice(name, str(self._location))

    def relatives(self) -> list[str]:
        """See `BlockSource`."""
        return [str(device["content_id"]) for device in self._others()]

    def _others(self) -> list[Mapping[str, Any]]:
        mine = self._device
        others = [
            device
            for device in self._devices
            if device["read_only"]
            and device["content_id"] not in (None, mine["content_id"])
            and not device["receiving"]
            and not device["remote_bytes"]
        ]
        return sorted(
            others,
            key=lambda other: (
                other["origin"] not in (mine["origin"], mine["name"]) and mine["origin"] != other["name"],
                abs(other["device_id"] - mine["device_id"]),
            ),
        )

    def mapped(self, begin_bytes: int, end_bytes: int) -> Ranges:
        """See `BlockSource`."""
        position = begin_bytes
        client = self._client()
        while position < end_bytes:
            asked = min(STATUS_BYTES, end_bytes - position)
            for length, flags in client.block_status(position, asked)["base:allocation"]:
                if not flags & HOLE:
                    yield position, length, True
                position += length

    def changes(self, base: str, mapped_bytes: int) -> Ranges | None:
        """See `BlockSource`."""
        found = (device for device in self._others() if device["content_id"] == base)
        old = next((device for device in found if self._maps(device, mapped_bytes)), None)
        return None if old is None else self._pages(str(old["name"]), base)

    def _maps(self, device: Mapping[str, Any], stored_bytes: int) -> bool:
        mapped_bytes, size_bytes = int(device["mapped_bytes"]), int(device["size_bytes"])
        return _agree(stored_bytes, mapped_bytes, size_bytes, self.block_bytes)

    def _pages(self, old: str, base: str) -> Ranges:
        asked = {"old": old, "new": str(self._device["name"])}
        for page in all_pages(lambda begin: self._access.operate("diff", {**asked, "begin_bytes": begin})):
            for side, content_id in (("old", base), ("new", self.identity)):
                if page[side]["content_id"] != content_id:
                    raise NoSuchDevice(page[side]["name"], str(self._location))
            for offset, length, state in page["ranges"]:
                yield offset, length, state == 1

    def read(self, offset: int, length_bytes: int) -> bytes:
        """See `BlockSource`."""
        return self._client().read(offset, length_bytes)


def _agree(stored_bytes: int, mapped_bytes: int, size_bytes: int, block_bytes: int) -> bool:
    """Whether a store has as much of a device as a pool: of the last block only chunks before the end are stored."""
    beyond = (-size_bytes % block_bytes) // CHUNK_BYTES * CHUNK_BYTES
    return stored_bytes in (mapped_bytes, mapped_bytes - beyond)


def _frozen(name: str, *, read_only: bool, content_id: str | None, receiving: bool) -> str:
    if not read_only or content_id is None or receiving:
        raise DeviceNotFrozen(name)
    return content_id

"""A pool into which snapshots are pulled, and what they are compared with."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fakes.store_source import FakeDevice, FakeSnapshot
from thinpool.catalog import CatalogEntry
from thinpool.hydration import hydrate
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.session import Session
from thinpool.store.keys import CHUNK_BYTES
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.pushing import Push
from thinpool.store.store import Store

MIB = 1 << 20


@contextmanager
def opening_one(directory: Path) -> Iterator[Callable[..., Pool]]:
    """A function that makes or opens the pool; whatever is open at the end is closed."""
    opened: list[Pool] = []

    def open_one(block_bytes: int = CHUNK_BYTES) -> Pool:
        if not directory.exists():
            create_pool(directory, size_bytes=256 * MIB, block_bytes=block_bytes)
        opened.append(open_pool(PoolLocation.directory(directory)))
        return opened[-1]

    yield open_one
    for pool in opened:
        pool.close()


def pushed(url: str, name: str = "image") -> FakeSnapshot:
    """A device of 130 MiB and a bit with data, allocated zeros and holes."""
    store = Store.open(url, create=True)
    device = FakeDevice(130 * MIB + 4096)
    for block in (*range(40), *range(1020, 1030), *range(2000, 2100, 3), 2080):
        device.write(block, secrets.token_bytes(24))
    device.write(50, b"\0")
    snapshot = device.snapshot()
    Push(store, snapshot, name, KnownChunks(None)).run()
    return snapshot


def entry_of(pool: Pool, name: str) -> CatalogEntry:
    entry = pool.catalog.by_name(name)
    assert entry is not None
    return entry


def content(session: Session, offset: int, length: int) -> bytes:
    return bytes(session.read_bytes(offset, length))


def is_equal(session: Session, snapshot: FakeSnapshot) -> bool:
    return all(
        content(session, at, min(MIB, snapshot.size_bytes - at))
        == snapshot.content(at, min(MIB, snapshot.size_bytes - at))
        for at in range(0, snapshot.size_bytes, MIB)
    )


def mapped_blocks(pool: Pool, name: str) -> set[int]:
    found = pool.engine.metadata.mappings(entry_of(pool, name).device_id, 0, 1 << 40)
    return {int(key) for keys, _ in found for key in keys}


def complete(pool: Pool, name: str) -> None:
    lazy = pool.lazy.of(entry_of(pool, name))
    assert lazy is not None
    hydrate(lazy, threading.Event())
    pool.lazy.complete(entry_of(pool, name))

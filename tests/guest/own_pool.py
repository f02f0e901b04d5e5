"""A pool of ours on two files, worked on in this process: what the tests do between turns of the kernel.

In: device operations by dm-thin id, contents, the judgement of our recount and of thin_check. Out: the kernel's half
(`kernel_pool.py`), the model both are compared with (`exchange_model.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from metadata import FileStore
from metadata.recount import recount
from tests.fakes.thin_tools import assert_clean
from thinpool.catalog import CatalogEntry
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.session import Session

METADATA_BLOCK_BYTES = 4096


class OwnPool:
    """An open pool whose devices are called by id. Get one from `opened`."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def entry(self, device_id: int) -> CatalogEntry:
        entry = self.pool.catalog.by_id(device_id)
        assert entry is not None, f"no device {device_id}"
        return entry

    def ids(self) -> list[int]:
        return sorted(entry.device_id for entry in self.pool.catalog.entries())

    def create(self, size_bytes: int) -> int:
        """An empty device; its id."""
        return self.pool.create_device(self._fresh_name(), size_bytes).device_id

    def snapshot(self, origin_id: int) -> int:
        """A snapshot; its id."""
        return self.pool.create_snapshot(self.entry(origin_id).name, self._fresh_name()).device_id

    def _fresh_name(self) -> str:
        names = {entry.name for entry in self.pool.catalog.entries()}
        return next(name for name in (f"device-{number}" for number in range(10_000)) if name not in names)

    def delete(self, device_id: int) -> None:
        self.pool.delete(self.entry(device_id).name)

    def resize(self, device_id: int, size_bytes: int) -> None:
        """Lengthen a device; one found without a name is only as long as its last mapping."""
        entry = self.entry(device_id)
        if entry.size_bytes != size_bytes:
            self.pool.resize(entry.name, size_bytes)

    def write(self, device_id: int, offset: int, data: bytes) -> None:
        with self.session(device_id) as session:
            session.enter()
            try:
                session.write(offset, memoryview(data))
            finally:
                session.leave()
                session.sent()

    def trim(self, device_id: int, offset: int, length: int) -> None:
        with self.session(device_id) as session:
            session.trim(offset, length)

    def read(self, device_id: int) -> bytes:
        """A device in full."""
        with self.session(device_id) as session:
            session.enter()
            try:
                return bytes(session.read_copy(0, self.entry(device_id).size_bytes))
            finally:
                session.leave()
                session.sent()

    @contextlib.contextmanager
    def session(self, device_id: int) -> Iterator[Session]:
        session = self.pool.open_session(self.entry(device_id))
        try:
            yield session
        finally:
            session.close()


@contextlib.contextmanager
def opened(location: PoolLocation, *, read_only: bool = False) -> Iterator[OwnPool]:
    """Open a pool for the time of a with block."""
    pool = open_pool(location, read_only=read_only)
    try:
        yield OwnPool(pool)
    finally:
        pool.close()


def make_pool(
    directory: Path, *, size_bytes: int, block_bytes: int = 65536, metadata_bytes: int = 4 << 20
) -> PoolLocation:
    """A new pool; where it is."""
    create_pool(directory, size_bytes=size_bytes, block_bytes=block_bytes, metadata_bytes=metadata_bytes)
    return PoolLocation.directory(directory)


def judge(location: PoolLocation) -> None:
    """Assert that neither our recount of a closed pool nor thin_check finds anything at all."""
    store = FileStore(location.metadata_path, writable=False)
    try:
        problems = recount(store)
    finally:
        store.close()
    assert not problems, [str(problem) for problem in problems]
    assert_clean(location.metadata_path)

"""The list of blocks that are still in a store, when its file cannot be written."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitarray import bitarray

from metadata import FileStore, PoolMetadata
from tests.fakes.store_source import FakeDevice
from thinpool import remote_blocks
from thinpool.lazy_devices import PullRequest
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.remote_blocks import Origin, RemoteBlocks
from thinpool.store.keys import CHUNK_BYTES
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.pushing import Push
from thinpool.store.store import Store

ORIGIN = Origin("memory://x", "s", "c", "holds/x", hold=True, key_file=None)


def refuse(*_arguments: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def set_bits(path: Path) -> list[int]:
    return list(RemoteBlocks.open(path).bits.search(bitarray("1")))


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
@pytest.mark.parametrize("by_discard", [True, False])
def test_what_could_not_be_written_is_written_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, by_discard: bool
) -> None:
    """Or a block that was discarded, and answered, would come back from the store after a restart."""
    bits = bitarray("1111", endian="little")
    path = tmp_path / "remote" / "token"
    remote = RemoteBlocks.create(path, ORIGIN, bits)
    with monkeypatch.context() as patch:
        patch.setattr(remote_blocks.os, call, refuse)
        with pytest.raises(OSError, match="error"):
            if by_discard:
                remote.clear_durably(1, 2)
            else:
                remote.checkpoint(bitarray("1011", endian="little"))
    written: list[int] = []
    monkeypatch.setattr(remote_blocks.os, "fdatasync", written.append)
    remote.clear_durably(1, 2)
    assert set_bits(path) == [0, 2, 3]
    assert len(written) == 1


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    create_pool(tmp_path / "pool", size_bytes=64 * CHUNK_BYTES)
    pool = open_pool(PoolLocation.directory(tmp_path / "pool"))
    yield pool
    pool.close()


@pytest.fixture
def lazy_pool(pool: Pool) -> Pool:
    pytest.importorskip("obstore", reason="needs the package obstore")
    url = f"memory://{secrets.token_hex(8)}"
    device = FakeDevice(8 * CHUNK_BYTES)
    device.write(3, b"something")
    Push(Store.open(url, create=True), device.snapshot(), "image", KnownChunks(None)).run()
    pool.begin_pull(PullRequest(url, "image", "copy", lazy=True))
    return pool


def test_a_snapshot_whose_list_cannot_be_written_is_not_made(
    lazy_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even without a name: the next commit would have made that durable."""
    with monkeypatch.context() as patch:
        patch.setattr(remote_blocks.os, "fsync", refuse)
        with pytest.raises(OSError, match="error"):
            lazy_pool.create_snapshot("copy", "monday")
    lazy_pool.create_device("other", CHUNK_BYTES)
    store = FileStore(lazy_pool.location.metadata_path, writable=False)
    devices = {record.device_id for record in PoolMetadata.open(store, writable=False).devices()}
    store.close()
    assert devices == {entry.device_id for entry in lazy_pool.catalog.entries()}
    assert {entry.name for entry in lazy_pool.catalog.entries()} == {"copy", "other"}

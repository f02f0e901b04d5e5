"""A pool on a file system that is full, or that loses its end: a small tmpfs, real files, real connections."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbd.client import Client
from nbd.constants import Command, Errno
from nbd.errors import RemoteError
from nbd.server import Server
from nbd.uri import unix_uri
from tests.fakes.store_source import FakeDevice, restored
from thinpool.errors import ExitCode, PoolReadOnly, StoreFull
from thinpool.exports import PoolExports
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.store.collecting import collect
from thinpool.store.fetching import SnapshotReader
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.pushing import Push
from thinpool.store.store import Store

BLOCK = 65536
MIB = 1 << 20

pytestmark = pytest.mark.root


@pytest.fixture
def small() -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root for mounts")
    with tempfile.TemporaryDirectory(prefix="small-") as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip(f"machine: no tmpfs mounts: {mounted.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


class Served:
    """A pool and its server; the socket lies elsewhere than the pool."""

    def __init__(self, pool: Pool, work: Path) -> None:
        self.pool = pool
        self.server = Server(PoolExports(pool))
        self.server.listen_unix(work / "s")
        self.server.start()
        self.client = Client.connect(unix_uri(work / "s", "vol"), timeout_seconds=20)

    def close(self) -> None:
        self.client.close()
        self.server.shutdown(1)


def stamped(index: int) -> bytes:
    return index.to_bytes(8, "little") * (BLOCK // 8)


def test_writes_wait_until_the_disk_has_room(small: Path, tmp_path: Path) -> None:
    create_pool(small / "pool", size_bytes=64 * MIB)
    # Only the data are on the small disk, as with a separate disk for metadata.
    metadata = tmp_path / "metadata"
    metadata.write_bytes((small / "pool" / "metadata").read_bytes())
    (small / "pool" / "metadata").unlink()
    pool = open_pool(PoolLocation.bare(metadata, small / "pool" / "data"))
    pool.create_device("vol", 64 * MIB)
    with tempfile.TemporaryDirectory(prefix="s-") as work:
        served = Served(pool, Path(work))
        try:
            client, index = served.client, 0
            while not pool.engine.full.waiting_sessions and index < 1000:
                cookie = client.send_request(Command.WRITE, index * BLOCK, BLOCK, payload=stamped(index))
                client.socket.settimeout(0.5)
                try:
                    assert client.reply_to(cookie).error == 0
                except TimeoutError:
                    break
                index += 1
            assert 60 <= index < 130
            client.socket.settimeout(20)
            assert client.read(0, BLOCK) == stamped(0)
            assert pool.status().mode == "rw"  # it is the disk that is full
            subprocess.run(["mount", "-o", "remount,size=16M", str(small)], check=True)
            assert client.reply_to(cookie).error == 0
            client.flush()
            for number in range(index + 1):
                assert client.read(number * BLOCK, BLOCK) == stamped(number)
        finally:
            served.close()
            pool.close()


def test_what_was_flushed_before_the_disk_was_full_is_there_afterwards(small: Path) -> None:
    create_pool(small / "pool", size_bytes=64 * MIB)
    pool = open_pool(PoolLocation.directory(small / "pool"))
    pool.change_settings({"when-full": "error"})
    pool.create_device("vol", 64 * MIB)
    flushed, index = 0, 0
    with tempfile.TemporaryDirectory(prefix="s-") as work:
        served = Served(pool, Path(work))
        try:
            while index < 1000:
                try:
                    served.client.write(index * BLOCK, stamped(index))
                    index += 1
                    if index % 7 == 0:
                        served.client.flush()
                        flushed = index
                except RemoteError as error:
                    assert error.error in (Errno.ENOSPC, Errno.EIO)
                    break
            # Half of the disk is set aside for metadata, so a commit finds room for them all the same.
            assert 30 < flushed <= index < 130
            served.client.flush()
            flushed = index
            assert pool.status().mode in ("rw", "out_of_metadata_space")
            for number in range(flushed):
                assert served.client.read(number * BLOCK, BLOCK) == stamped(number)
        finally:
            served.close()
            with contextlib.suppress(OSError):
                pool.close()
    subprocess.run(["mount", "-o", "remount,size=16M", str(small)], check=True)
    reopened = open_pool(PoolLocation.directory(small / "pool"))
    session = reopened.open_session(reopened.catalog.by_name("vol"))  # type: ignore[arg-type]
    for number in range(flushed):
        assert session.read_bytes(number * BLOCK, BLOCK) == stamped(number)
    session.close()
    reopened.close()


def test_a_read_only_file_system_is_served_read_only_or_refused_in_words(small: Path) -> None:
    create_pool(small / "pool", size_bytes=MIB)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        open_pool(PoolLocation.directory(small / "pool"))
    pool = open_pool(PoolLocation.directory(small / "pool"), read_only=True)
    assert pool.status().mode == "read_only"
    with pytest.raises(PoolReadOnly):
        pool.create_device("more", MIB)
    pool.close()


def _device(blocks: int) -> FakeDevice:
    device = FakeDevice(16 * MIB)
    for number in range(blocks):
        device.write(number, os.urandom(BLOCK))
    return device


def _fill(path: Path) -> None:
    """Take whatever room there is, to the last page."""
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_store_is_named_and_can_be_emptied_although_marks_need_room(small: Path) -> None:
    pytest.importorskip("obstore", reason="needs the package obstore")
    store = Store.open((small / "store").as_uri(), create=True)
    first = _device(30).snapshot()
    Push(store, first, "first", KnownChunks(None)).run()
    with pytest.raises(StoreFull, match=r"has no room for packs/.*thinpool gc") as full:
        Push(store, _device(200).snapshot(), "second", KnownChunks(None)).run()
    assert full.value.exit_code == ExitCode.NO_SPACE
    assert restored(SnapshotReader(store, store.snapshot("first"))) == {
        number: first.content(number * BLOCK, BLOCK) for number in range(30)
    }
    _fill(small / "filler")
    before = len(store.packs())
    store.forget("first")  # gives back one page: room for one mark
    report = collect(store, grace_seconds=0, lease_seconds=0)
    assert 0 < report.deleted <= before
    collect(store, grace_seconds=0, lease_seconds=0)
    assert not store.packs()
    (small / "filler").unlink()
    Push(store, first, "again", KnownChunks(None)).run()


def test_a_full_store_in_which_nothing_can_go_says_so(small: Path) -> None:
    pytest.importorskip("obstore", reason="needs the package obstore")
    store = Store.open((small / "store").as_uri(), create=True)
    Push(store, _device(30).snapshot(), "first", KnownChunks(None)).run()
    manifest = store.snapshot("first")
    store.forget("first")
    _fill(small / "filler")
    with pytest.raises(StoreFull, match="has no room for condemned/"):
        collect(store, grace_seconds=0)
    assert set(store.packs()) == set(manifest.packs)

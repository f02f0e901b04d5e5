"""A real server on a real ext4 that fills up or turns read-only below it. tmpfs is in `test_full_disk.py`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbd.client import Client
from nbd.constants import Command, Errno
from tests.conformance.running_pool import ENVIRONMENT, RunningPool, require_loop_mounts, run
from tests.conformance.stamped_pool import (
    BLOCK,
    MIB,
    answer,
    eventually_read_only,
    in_one_sentence,
    require_kept,
    stamped,
    two_devices,
)
from thinpool.errors import PoolPoisoned
from thinpool.pool_access import PoolAccess
from thinpool.pool_location import PoolLocation

DISK_BYTES = 32 * MIB

pytestmark = pytest.mark.root


class SmallDisk:
    """An ext4 of its own in a file, and a pool on it whose sockets lie elsewhere."""

    def __init__(self, work: Path) -> None:
        self.image = work / "image"
        self.place = work / "m"
        self.place.mkdir()
        with self.image.open("wb") as file:
            file.truncate(DISK_BYTES)
        # Without blocks set aside for root, who runs the tests.
        run("mkfs.ext4", "-q", "-m", "0", self.image)
        self.mount()
        self.pool = RunningPool(work)
        self.pool.path = self.place / "pool"
        self.pool.access = PoolAccess(PoolLocation.directory(self.pool.path))

    def mount(self, *options: str) -> None:
        run("mount", "-o", ",".join(("loop", *options)), self.image, self.place)

    def unmount(self) -> None:
        run("umount", self.place)

    def fail_read_only(self) -> None:
        """What ext4 does to itself after an error, with `errors=remount-ro`."""
        run("mount", "-o", "remount,abort", self.place)

    def free_bytes(self) -> int:
        figures = os.statvfs(self.place)
        return figures.f_bfree * figures.f_frsize

    def fill(self, leave_bytes: int) -> Path:
        """Take all space but so much with another file."""
        filler = self.place / "filler"
        end = 0
        with filler.open("wb") as file, contextlib.suppress(OSError):
            for piece in (256 << 10, 4 << 10):
                while self.free_bytes() >= leave_bytes + piece:
                    os.posix_fallocate(file.fileno(), end, piece)
                    end += piece
        return filler


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    require_loop_mounts()
    work = Path(tempfile.mkdtemp(prefix="tp-"))
    pool = RunningPool(work)  # for its clean-up
    try:
        small = SmallDisk(work)
        pool = small.pool
        yield small
    finally:
        if pool.server is not None:
            pool.server.kill()
            pool.server.wait()
        subprocess.run(["umount", "-l", str(work / "m")], capture_output=True, env=ENVIRONMENT, check=False)
        pool.clean_up()


def serve(disk: SmallDisk, size_bytes: int = 256 * MIB, **settings: str) -> RunningPool:
    two_devices(
        disk.pool.path, size_bytes, **{name.replace("_", "-"): value for name, value in settings.items()}
    )
    disk.pool.start()
    disk.pool.access.server()
    return disk.pool


# --- read-only ---


def test_a_file_system_that_turns_read_only_under_a_server(disk: SmallDisk) -> None:
    pool = serve(disk)
    a, b = (Client.connect(pool.uri(name), timeout_seconds=20) for name in ("a", "b"))
    for number in range(8):
        a.write(number * BLOCK, stamped(number))
    a.flush()
    disk.fail_read_only()
    assert answer(lambda: a.write(0, stamped(99))) in (Errno.EPERM, Errno.EIO)
    assert answer(lambda: b.write(0, stamped(99))) in (Errno.EPERM, Errno.EIO)
    eventually_read_only(pool)
    assert answer(a.flush) == answer(b.flush) == Errno.EIO
    assert [a.read(number * BLOCK, BLOCK) for number in range(8)] == [stamped(number) for number in range(8)]
    assert b.read(0, BLOCK) == bytes(BLOCK)
    with pytest.raises(PoolPoisoned, match="Read-only file system"):
        pool.operate("create", name="c", size_bytes=MIB)
    a.close()
    b.close()
    pool.command("stop")
    assert pool.server is not None
    assert pool.server.wait(20) == 0, pool.log()
    assert "Traceback" not in pool.log()
    disk.unmount()
    disk.mount()
    require_kept(pool, "a", {number: number for number in range(8)})


def test_a_pool_on_a_read_only_file_system(disk: SmallDisk) -> None:
    """Commands that look work, others say why not; it may be served read-only."""
    two_devices(disk.pool.path)
    disk.unmount()
    disk.mount("ro")
    pool = disk.pool
    assert pool.command("list").stdout.count("16 MiB") == 2
    in_one_sentence(pool.command("create", "c", "--size", "1M", check=False), 1)
    in_one_sentence(pool.command("serve", check=False), 1)
    pool.start("--read-only")
    client = Client.connect(pool.uri("a"), timeout_seconds=20)
    assert client.read(0, BLOCK) == bytes(BLOCK)
    assert answer(lambda: client.write(0, stamped(1))) == Errno.EPERM
    client.close()
    assert pool.server is not None
    pool.server.terminate()
    assert pool.server.wait(20) == 0, pool.log()
    assert "Traceback" not in pool.log()


# --- full ---


def written_until_refused(client: Client, first: int = 0) -> tuple[int, int]:
    """Stamps on new blocks, flushed now and then, until there is no space: the next block, and where it was flushed."""
    flushed = first
    for number in range(first, 16 * MIB // BLOCK):
        error = answer(lambda: client.write(number * BLOCK, stamped(number)))  # noqa: B023 -- called at once
        if error:
            assert error == Errno.ENOSPC
            return number, flushed
        if number % 5 == 4:
            client.flush()
            flushed = number + 1
    raise AssertionError("the disk did not fill up")


def test_a_full_disk_refuses_and_goes_on_when_it_has_room(disk: SmallDisk) -> None:
    pool = serve(disk, when_full="error")
    client = Client.connect(pool.uri("a"), timeout_seconds=20)
    filler = disk.fill(3 * MIB)
    refused, flushed = written_until_refused(client)
    assert refused > 10
    client.flush()
    for number in range(flushed):
        client.write(number * BLOCK, stamped(number))  # in place: needs nothing
    client.flush()
    assert pool.operate("status")["status"]["failure"] is None
    client.trim(0, 2 * BLOCK)  # what a guest gives back is there for its next writes
    client.write(refused * BLOCK, stamped(refused))
    client.flush()
    filler.unlink()
    for number in (0, 1, refused + 1):
        client.write(number * BLOCK, stamped(number))
    client.flush()
    client.close()
    pool.stop()
    pool.check_metadata()
    require_kept(pool, "a", {number: number for number in range(refused + 2)})


def test_writes_wait_while_the_disk_is_full(disk: SmallDisk) -> None:
    pool = serve(disk, when_full="queue", queue_timeout="0")
    client, other = (Client.connect(pool.uri(name), timeout_seconds=30) for name in ("a", "b"))
    filler = disk.fill(2 * MIB)
    cookies = [
        client.send_request(Command.WRITE, number * BLOCK, BLOCK, payload=stamped(number))
        for number in range(60)
    ]
    deadline = time.monotonic() + 20
    while "wait for space" not in pool.log():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    other.flush()
    assert other.read(0, 512) == bytes(512)
    filler.unlink()
    assert [client.reply_to(cookie).error for cookie in cookies] == [0] * 60
    client.flush()
    client.close()
    other.close()
    pool.stop()
    require_kept(pool, "a", {number: number for number in range(60)})


def test_a_commit_finds_room_for_metadata_on_a_full_disk(disk: SmallDisk) -> None:
    """The data file is all real, so writes need no space of the disk, but the mappings do."""
    two_devices(disk.pool.path, 16 * MIB, **{"when-full": "error"})
    with (disk.pool.path / "data").open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 16 * MIB)
    disk.pool.start()
    pool = disk.pool
    pool.access.server()
    client = Client.connect(pool.uri("a"), timeout_seconds=20)
    disk.fill(0)
    before = (pool.path / "metadata").stat().st_blocks
    for number in range(16 * MIB // BLOCK):
        client.write(number * BLOCK, stamped(number))
        if number % 8 == 7:
            client.flush()
    assert pool.operate("status")["status"]["failure"] is None
    assert (pool.path / "metadata").stat().st_blocks == before
    client.close()
    pool.stop()
    pool.check_metadata()
    require_kept(pool, "a", {number: number for number in range(16 * MIB // BLOCK)})


@pytest.mark.parametrize("served", [True, False], ids=["served", "idle"])
def test_names_change_on_a_full_disk_so_that_deleting_makes_room(disk: SmallDisk, *, served: bool) -> None:
    pool = serve(disk)
    client = Client.connect(pool.uri("a"), timeout_seconds=20)
    for number in range(100):
        client.write(number * BLOCK, stamped(number))
    client.flush()
    pool.operate("snapshot", origin="a", name="a@mon")
    client.trim(0, 100 * BLOCK)
    client.flush()
    client.close()
    if not served:
        pool.stop()
    disk.fill(0)
    full_bytes = disk.free_bytes()  # what ext4 keeps for itself
    with pytest.raises(OSError, match="No space"):
        (disk.place / "more").write_bytes(bytes(4096))
    for number in range(20):
        pool.operate("snapshot", origin="b", name=f"b@{number}")
    pool.operate("rename", old="b", new="c")  # one row for the device and for each of its snapshots
    pool.operate("rollback", name="c", snapshot="b@7")
    for number in range(20):
        pool.operate("delete", name=f"b@{number}")
    assert disk.free_bytes() < full_bytes + MIB
    pool.command("delete", "a@mon")
    assert disk.free_bytes() > full_bytes + 100 * BLOCK - MIB
    assert pool.operate("status")["status"]["failure"] is None
    if served:
        pool.stop()
    pool.check_metadata()
    names = {device["name"] for device in pool.operate("list")["devices"]}
    assert {"a", "c"} <= names
    assert not any(name.startswith(("b", "a@")) for name in names)

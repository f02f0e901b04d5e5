"""What clients see of a pool that is full: both policies, over NBD on a real pool, and what ends the waiting."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from nbd.client import Client
from nbd.constants import Command, CommandFlag, Errno
from nbd.server import Server
from nbd.uri import unix_uri
from tests.property.test_served_model import certificates
from thinpool.exports import PoolExports
from thinpool.full_pool import NO_DATA, NO_METADATA, FullPool, NoFreeBlock
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

BLOCK = 65536
POOL_BLOCKS = 16
FORMS = {"simple": {"structured": False}, "structured": {}, "extended": {"extended": True}}


class Full:
    """A pool of 16 blocks, all of them taken by `vol`, which has room for many more."""

    def __init__(self, folder: Path, form: str = "structured") -> None:
        self.location = PoolLocation.directory(folder / "pool")
        create_pool(folder / "pool", size_bytes=POOL_BLOCKS * BLOCK)
        self.pool = open_pool(self.location)
        self.pool.create_device("vol", 256 * BLOCK)
        self.pool.create_device("other", 4 * BLOCK)
        self.server = Server(PoolExports(self.pool))
        self.socket = folder / "s"
        self.server.listen_unix(self.socket)
        self.server.start()
        self.form = FORMS[form]
        self.clients: list[Client] = []
        self.stopped = False
        self.other = self.client("other")
        self.other.write(0, b"o" * BLOCK)
        self.vol = self.client("vol")
        self.vol.write(0, b"v" * ((POOL_BLOCKS - 1) * BLOCK))

    def client(self, name: str) -> Client:
        client = Client.connect(unix_uri(self.socket, name), timeout_seconds=20, **self.form)  # type: ignore[arg-type]
        self.clients.append(client)
        return client

    def send(self, client: Client, offset: int, data: bytes, flags: int = 0) -> int:
        flags |= CommandFlag.PAYLOAD_LEN if client.extended else 0
        return client.send_request(Command.WRITE, offset, len(data), flags=flags, payload=data)

    def wait_until_waiting(self, count: int = 1) -> None:
        deadline = monotonic() + 10
        while self.pool.engine.full.waiting_sessions < count:
            assert monotonic() < deadline, "nobody waits"
            sleep(0.005)

    def grow(self, blocks: int) -> None:
        self.pool.grow((self.pool.engine.metadata.data_blocks + blocks) * BLOCK)

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            for client in self.clients:
                client.close()
            self.server.shutdown(1)
            self.pool.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="full-") as path:
        yield Path(path)


@pytest.fixture
def full(folder: Path) -> Iterator[Full]:
    made = Full(folder)
    yield made
    made.stop()


@pytest.mark.parametrize("form", FORMS)
def test_what_needs_no_block_goes_on_behind_a_write_that_waits(folder: Path, form: str) -> None:
    full = Full(folder, form)
    try:
        waiting = [full.send(full.vol, (100 + 2 * n) * BLOCK, bytes([n + 1]) * 5000) for n in range(3)]
        full.wait_until_waiting()
        assert full.vol.read(3 * BLOCK, BLOCK) == b"v" * BLOCK
        full.vol.write(4 * BLOCK + 7, b"new")
        assert full.vol.read(4 * BLOCK + 6, 5) == b"vnewv"
        assert full.vol.read(100 * BLOCK, 5000) == bytes(5000)
        full.vol.flush()
        assert full.pool.status().mode == "out_of_data_space"
        assert full.pool.status().waiting_connections == 1
        full.vol.trim(10 * BLOCK, 3 * BLOCK)  # on the same connection: gives them their space
        assert [full.vol.reply_to(cookie).error for cookie in waiting] == [0, 0, 0]
        for n in range(3):
            content = full.vol.read((100 + 2 * n) * BLOCK, BLOCK)
            assert content == bytes([n + 1]) * 5000 + bytes(BLOCK - 5000)
        assert full.pool.engine.full.waiting_sessions == 0
        full.vol.write(0, b"as quick as before")
    finally:
        full.stop()


def test_tls_connections_go_on_as_well(folder: Path) -> None:
    from nbd.tls import CertificateTls

    full = Full(folder)
    server = Server(PoolExports(full.pool), tls=CertificateTls(certificates()))
    server.listen_unix(folder / "t")
    server.start()
    try:
        uri = unix_uri(folder / "t", "vol", tls=True)
        uri += f"&tls-certificates={certificates()}&tls-hostname=localhost"
        client = Client.connect(uri, timeout_seconds=20)
        waiting = full.send(client, 100 * BLOCK, b"w" * BLOCK)
        full.wait_until_waiting()
        assert client.read(0, 9) == b"v" * 9
        full.vol.trim(0, BLOCK)
        assert client.reply_to(waiting).error == 0
        assert client.read(100 * BLOCK, BLOCK) == b"w" * BLOCK
        client.close()
    finally:
        server.shutdown(1)
        full.stop()


@pytest.mark.parametrize("length", [512, BLOCK, 3 * BLOCK + 17, 1 << 20, (2 << 20) + 12345])
def test_growth_lets_writes_of_any_length_go_on(full: Full, length: int) -> None:
    data = bytes(range(256)) * (length // 256 + 1)
    answers: list[int] = []
    # What is longer than the server puts aside is still being sent while it waits.
    sender = threading.Thread(
        target=lambda: answers.append(
            full.vol.reply_to(full.send(full.vol, 50 * BLOCK + 9, data[:length])).error
        )
    )
    sender.start()
    full.wait_until_waiting()
    while sender.is_alive():
        full.grow(7)
        sender.join(0.05)
    assert answers == [0]
    assert full.vol.read(50 * BLOCK + 9, length) == data[:length]
    assert full.vol.read(50 * BLOCK, 9) == bytes(9)


def test_a_deletion_by_somebody_else_lets_writes_go_on(full: Full) -> None:
    waiting = full.send(full.vol, 100 * BLOCK, b"w" * BLOCK, CommandFlag.FUA)
    full.wait_until_waiting()
    assert full.server.disconnect("other") == 1
    full.pool.delete("other")
    assert full.vol.reply_to(waiting).error == 0


def test_zeroes_that_must_be_allocated_wait_too(full: Full) -> None:
    waiting = full.vol.send_request(Command.WRITE_ZEROES, 100 * BLOCK, 2 * BLOCK, flags=CommandFlag.NO_HOLE)
    full.wait_until_waiting()
    assert full.vol.read(0, 3) == b"vvv"
    full.grow(2)
    assert full.vol.reply_to(waiting).error == 0
    assert full.pool.status().data_free_bytes == 0


def test_after_the_time_out_writes_fail_at_once_until_space_comes_back(full: Full) -> None:
    full.pool.change_settings({"queue-timeout": "1"})
    began = monotonic()
    waiting = full.send(full.vol, 100 * BLOCK, b"w" * BLOCK)
    assert full.vol.reply_to(waiting).error == Errno.ENOSPC
    assert 0.9 < monotonic() - began < 5
    assert full.pool.status().refusing
    assert "error_if_no_space" in full.pool.dm_status()[0]
    began = monotonic()
    assert full.vol.reply_to(full.send(full.vol, 101 * BLOCK, b"w")).error == Errno.ENOSPC
    assert monotonic() - began < 0.9
    full.grow(1)
    assert not full.pool.status().refusing
    full.vol.write(100 * BLOCK, b"w" * BLOCK)
    waiting = full.send(full.vol, 101 * BLOCK, b"x")
    full.wait_until_waiting()  # the policy holds again
    full.grow(1)
    assert full.vol.reply_to(waiting).error == 0


def test_a_change_of_policy_reaches_writes_that_wait(full: Full) -> None:
    full.pool.change_settings({"queue-timeout": "0"})
    waiting = full.send(full.vol, 100 * BLOCK, b"w")
    full.wait_until_waiting()
    full.pool.change_settings({"when-full": "error"})
    assert full.vol.reply_to(waiting).error == Errno.ENOSPC
    assert full.pool.status().refusing


@pytest.mark.parametrize("length", [512, 1 << 20, 3 << 20])
def test_a_stopping_server_answers_what_waits(full: Full, length: int) -> None:
    sent: list[int] = []
    sender = threading.Thread(target=lambda: sent.append(full.send(full.vol, 50 * BLOCK, bytes(length))))
    sender.start()
    full.wait_until_waiting()
    stopper = threading.Thread(target=full.server.shutdown, args=(10,))
    stopper.start()
    sender.join(10)
    assert full.vol.reply_to(sent[0]).error == Errno.ESHUTDOWN
    stopper.join(10)
    assert not stopper.is_alive()


def test_a_leaving_client_gets_its_answers(full: Full) -> None:
    waiting = full.send(full.vol, 100 * BLOCK, b"w")
    full.wait_until_waiting()
    full.vol.send_request(Command.DISC)
    assert full.vol.reply_to(waiting).error == Errno.ENOSPC
    assert full.vol.socket.recv(1) == b""


@pytest.mark.parametrize("length", [512, 3 << 20])
def test_a_client_that_vanishes_leaves_the_device_free(full: Full, length: int) -> None:
    client = full.client("vol")
    sender = threading.Thread(target=lambda: _ignoring(lambda: full.send(client, 50 * BLOCK, bytes(length))))
    sender.start()
    full.wait_until_waiting()
    assert full.server.disconnect("vol") == 2
    sender.join(10)
    assert full.pool.info("vol").open_count == 0
    assert full.pool.engine.full.waiting_sessions == 0
    full.pool.delete("vol")


def _ignoring(act) -> None:
    with contextlib.suppress(OSError):
        act()


def test_error_says_so_at_once_and_shared_blocks_stay_whole(full: Full) -> None:
    full.pool.change_settings({"when-full": "error"})
    full.pool.create_snapshot("vol", "snap", read_only=True)
    assert full.vol.reply_to(full.send(full.vol, BLOCK, b"new")).error == Errno.ENOSPC
    assert full.vol.read(0, 3 * BLOCK) == full.client("snap").read(0, 3 * BLOCK) == b"v" * (3 * BLOCK)
    full.other.write(5, b"exclusive")
    assert full.other.read(4, 11) == b"oexclusiveo"
    # A write over blocks that are there and one that is not: applied up to that one, in order, and refused.
    full.other.trim(0, 4 * BLOCK)
    full.pool.commit()
    full.pool.engine.reclaim()
    full.other.write(0, b"1" * BLOCK)
    assert full.other.reply_to(full.send(full.other, BLOCK // 2, b"2" * (2 * BLOCK))).error == Errno.ENOSPC
    assert full.other.read(0, 3 * BLOCK) == b"1" * (BLOCK // 2) + b"2" * (BLOCK // 2) + bytes(2 * BLOCK)


def test_memory_for_waiting_writes_is_bounded(folder: Path) -> None:
    from nbd.limits import Limits

    full = Full(folder)
    server = Server(PoolExports(full.pool), limits=Limits(queued_bytes_max=2 * BLOCK))
    server.listen_unix(folder / "t")
    server.start()
    try:
        client = Client.connect(unix_uri(folder / "t", "vol"), timeout_seconds=20)
        waiting = [full.send(client, (100 + n) * BLOCK, b"w" * BLOCK) for n in range(3)]
        full.wait_until_waiting()
        read = client.send_request(Command.READ, 0, 3)
        client.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.reply_to(read)  # the third one has taken the whole connection
        client.socket.settimeout(20)
        full.grow(3)
        assert [client.reply_to(cookie).error for cookie in waiting] == [0, 0, 0]
        assert client.reply_to(read).data == b"vvv"
        client.close()
    finally:
        server.shutdown(1)
        full.stop()


class TestFullPool:
    """The clock of the policy."""

    def setup_method(self) -> None:
        self.now = 100.0
        self.disk_free = 0
        self.log: list[str] = []
        self.full = FullPool(self.log.append, lambda: self.disk_free, lambda: self.now)

    def asks(self, refused: OSError, after: float) -> bool:
        since, self.now = self.now, self.now + after
        return self.full.may_wait(refused, since)

    def test_the_time_runs_for_the_pool_not_for_each_write(self) -> None:
        assert self.asks(NoFreeBlock(NO_DATA), 0)
        assert self.asks(NoFreeBlock(NO_METADATA), 59)
        assert not self.asks(NoFreeBlock(NO_DATA), 1)
        assert not self.asks(NoFreeBlock(NO_DATA), 0)
        assert len(self.log) == 2
        self.full.space_came()
        assert self.asks(NoFreeBlock(NO_DATA), 0)
        assert len(self.log) == 4

    def test_zero_is_for_ever(self) -> None:
        self.full.configure("queue", 0)
        assert self.asks(NoFreeBlock(NO_DATA), 0)
        assert self.asks(NoFreeBlock(NO_DATA), 1e9)
        assert not self.full.refuses

    def test_a_full_disk_counts_as_full_until_it_has_room(self) -> None:
        disk_full = OSError(28, "No space left on device")
        assert self.asks(disk_full, 0)
        assert not self.asks(disk_full, 60)
        self.full.space_came()  # of the pool, which is something else
        assert not self.asks(disk_full, 0)
        self.disk_free = 1 << 30
        assert self.asks(disk_full, 0)
        # Not even then for ever: a quota may be full where the file system is not.
        assert not self.asks(disk_full, 60)

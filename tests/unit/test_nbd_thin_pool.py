"""What the protocol demands of the data behind it, over NBD on a real pool: rows of section 3.3 of docs/nbd.md."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from nbd.client import Client
from nbd.constants import CommandFlag, Errno
from nbd.errors import RemoteError
from nbd.server import Server
from nbd.uri import unix_uri
from thinpool.exports import PoolExports
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

BLOCK = 65536
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"


class Pool:
    """A pool of 64 blocks with a device `vol`, served; `client` connects with extended headers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = PoolLocation.directory(folder / "pool")
        create_pool(folder / "pool", size_bytes=64 * BLOCK)
        self.socket = folder / "s"
        self.clients: list[Client] = []
        self.start()
        self.pool.create_device("vol", 128 * BLOCK + 1000)

    def start(self) -> None:
        self.pool = open_pool(self.location)
        self.pool.override_settings({"when-full": "error"})
        self.server = Server(PoolExports(self.pool))
        self.server.listen_unix(self.socket)
        self.server.start()

    def client(self, name: str = "vol", *contexts: str, extended: bool = True) -> Client:
        uri = unix_uri(self.socket, name)
        client = Client.connect(uri, extended=extended, contexts=contexts or (BASE, DEPTH))
        self.clients.append(client)
        return client

    def hang_up(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()

    def stop(self) -> None:
        self.hang_up()
        self.server.shutdown(1)
        self.pool.close()

    @property
    def used_bytes(self) -> int:
        self.pool.commit()
        return sum(info.mapped_bytes for info in self.pool.devices())


@pytest.fixture
def pool() -> Iterator[Pool]:
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        served = Pool(Path(folder))
        yield served
        served.stop()


def status(client: Client, offset: int, length: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    found = client.block_status(offset, length)
    return found[BASE], found[DEPTH]


def test_reading_never_written_blocks_gives_zeros_and_allocates_nothing(pool: Pool) -> None:
    client = pool.client()
    assert client.read(0, 5 * BLOCK) == bytes(5 * BLOCK)
    assert pool.used_bytes == 0
    assert status(client, 0, 5 * BLOCK) == ([(5 * BLOCK, 3)], [(5 * BLOCK, 0)])


def test_trim_unmaps_and_gives_the_space_back(pool: Pool) -> None:
    client = pool.client()
    client.write(0, b"x" * (4 * BLOCK))
    assert pool.used_bytes == 4 * BLOCK
    client.trim(BLOCK, 2 * BLOCK)
    assert client.read(BLOCK - 1, 2 * BLOCK + 2) == b"x" + bytes(2 * BLOCK) + b"x"
    assert pool.used_bytes == 2 * BLOCK


def test_trim_inside_a_block_touches_no_neighbour(pool: Pool) -> None:
    client = pool.client()
    client.write(0, b"x" * BLOCK)
    client.trim(1000, 500)
    data = client.read(0, BLOCK)
    assert data[:1000] == b"x" * 1000
    assert data[1500:] == b"x" * (BLOCK - 1500)
    assert data[1000:1500] in (bytes(500), b"x" * 500)


def test_trim_of_a_shared_block_spares_the_snapshot(pool: Pool) -> None:
    client = pool.client()
    client.write(0, b"x" * (2 * BLOCK))
    pool.pool.create_snapshot("vol", "snap", read_only=True)
    client.trim(0, BLOCK)
    client.zero(BLOCK, BLOCK)
    assert client.read(0, 2 * BLOCK) == bytes(2 * BLOCK)
    assert pool.client("snap").read(0, 2 * BLOCK) == b"x" * (2 * BLOCK)


def test_zeroing_unmaps_and_allocates_nothing(pool: Pool) -> None:
    client = pool.client()
    client.write(0, b"x" * (2 * BLOCK))
    client.zero(0, 10 * BLOCK)
    assert client.read(0, 10 * BLOCK) == bytes(10 * BLOCK)
    assert pool.used_bytes == 0


def test_unaligned_zeroing_has_exact_edges(pool: Pool) -> None:
    client = pool.client()
    client.write(0, b"x" * (4 * BLOCK))
    client.zero(100, 3 * BLOCK)
    data = client.read(0, 4 * BLOCK)
    assert data == b"x" * 100 + bytes(3 * BLOCK) + b"x" * (BLOCK - 100)


def test_no_hole_provisions_so_that_writes_cannot_run_out(pool: Pool) -> None:
    client = pool.client()
    client.zero(0, 8 * BLOCK, flags=CommandFlag.NO_HOLE)
    assert status(client, 0, 8 * BLOCK) == ([(8 * BLOCK, 0)], [(8 * BLOCK, 1)])
    assert client.read(0, 8 * BLOCK) == bytes(8 * BLOCK)
    with pytest.raises(RemoteError) as caught:
        client.write(8 * BLOCK, b"y" * (100 * BLOCK))
    assert caught.value.error == Errno.ENOSPC
    client.write(0, b"z" * (8 * BLOCK))
    assert client.read(0, 8 * BLOCK) == b"z" * (8 * BLOCK)


def test_fast_zero_is_fast_or_refused(pool: Pool) -> None:
    client = pool.client()
    client.write(0, b"x" * (2 * BLOCK))
    client.zero(0, BLOCK, flags=CommandFlag.FAST_ZERO)
    assert client.read(0, BLOCK) == bytes(BLOCK)
    reply = client.request(6, BLOCK, BLOCK, flags=CommandFlag.FAST_ZERO | CommandFlag.NO_HOLE)
    assert reply.error in (0, Errno.ENOTSUP)
    assert client.read(BLOCK, BLOCK) == (b"x" * BLOCK if reply.error else bytes(BLOCK))


def test_a_full_pool_says_no_space_and_keeps_everything_else(pool: Pool) -> None:
    client = pool.client()
    written = 0
    with pytest.raises(RemoteError) as caught:
        for index in range(65):
            client.write(index * BLOCK, bytes([index]) * BLOCK)
            written += 1
    assert caught.value.error == Errno.ENOSPC
    assert written >= 60
    for index in range(written):
        assert client.read(index * BLOCK, 16) == bytes([index]) * 16
    client.write(0, b"overwriting goes on")
    client.trim(0, 4 * BLOCK)
    client.flush()
    client.write(70 * BLOCK, b"x" * BLOCK)


def test_flush_makes_data_and_mappings_of_all_connections_durable(pool: Pool) -> None:
    one, two = pool.client(), pool.client(extended=False)
    one.write(3 * BLOCK + 7, b"by one")
    two.flush()
    two.write(9 * BLOCK, b"by two", flags=CommandFlag.FUA)
    metadata = pool.folder / "pool" / "metadata"
    copied = metadata.read_bytes()
    pool.stop()
    metadata.write_bytes(copied)  # as if the power had failed here
    pool.start()
    client = pool.client()
    assert client.read(3 * BLOCK + 7, 6) == b"by one"
    assert client.read(9 * BLOCK, 6) == b"by two"


def test_shared_blocks_are_told_from_own_ones(pool: Pool) -> None:
    client = pool.client()
    client.write(0, b"x" * (3 * BLOCK))
    pool.pool.create_snapshot("vol", "snap", read_only=True)
    client.write(BLOCK, b"y" * BLOCK)
    base, depth = status(client, 0, 4 * BLOCK)
    assert base == [(3 * BLOCK, 0), (BLOCK, 3)]
    assert depth == [(BLOCK, 2), (BLOCK, 1), (BLOCK, 2), (BLOCK, 0)]


def test_snapshots_are_offered_as_dirty_bitmaps(pool: Pool) -> None:
    client = pool.client()
    client.write(0, b"x" * (3 * BLOCK))
    pool.pool.create_snapshot("vol", "snap", read_only=True)
    client.write(BLOCK, b"y")
    context = "qemu:dirty-bitmap:snap"
    extents = pool.client("vol", context).block_status(0, 4 * BLOCK)[context]
    at, changed = 0, []
    for length, flag in extents:
        changed += [at] if flag else []
        at += length
    assert BLOCK in changed or any(flag and length > BLOCK for length, flag in extents)


def test_a_read_only_snapshot_refuses_changes(pool: Pool) -> None:
    pool.client().write(0, b"x" * BLOCK)
    pool.pool.create_snapshot("vol", "snap", read_only=True)
    snapshot = pool.client("snap")
    assert snapshot.info.flags & 2
    for call in (
        lambda: snapshot.write(0, b"y"),
        lambda: snapshot.trim(0, BLOCK),
        lambda: snapshot.zero(0, BLOCK),
    ):
        with pytest.raises(RemoteError) as caught:
            call()
        assert caught.value.error == Errno.EPERM
    snapshot.flush()
    assert snapshot.read(0, 4) == b"xxxx"


def test_the_odd_end_of_a_device_is_usable(pool: Pool) -> None:
    client = pool.client()
    end = 128 * BLOCK + 1000
    client.write(end - 3, b"end")
    assert client.read(end - 5, 5) == b"\0\0end"
    client.zero(end - 1000, 1000)
    assert client.read(end - 5, 5) == bytes(5)


@pytest.mark.parametrize("length", [(1 << 32) - 4096, 1 << 45])
def test_huge_ranges_are_zeroed_trimmed_and_mapped_at_once(pool: Pool, length: int) -> None:
    pool.pool.create_device("huge", 1 << 50)
    client = pool.client("huge")
    client.write(BLOCK, b"x" * BLOCK)
    client.write(length, b"y" * BLOCK)
    started = monotonic()
    client.zero(0, length)
    client.trim(0, length)
    client.zero(0, length // BLOCK * BLOCK, flags=CommandFlag.FAST_ZERO)
    assert client.read(BLOCK, BLOCK) == bytes(BLOCK)
    assert client.read(length, 1) == b"y"
    extents, _ = status(client, 0, length)
    assert extents[0][1] == 3
    assert monotonic() - started < 5

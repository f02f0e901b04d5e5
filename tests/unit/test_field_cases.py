"""Situations that people met with other thin pools, each held here where no other test holds it already.

docs/crash-safety.md lists them all, with the test of each.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import median

import numpy as np
import pytest

from metadata import BLOCK_BYTES, FileStore, MetadataFull, PoolMetadata, recount
from metadata.node import decode_node
from tests.fakes.metadata_pools import contents, new_pool, packed, span
from thinpool.errors import DeviceExists, PoolBusy, TooLittleFree
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.session import Session
from thinpool.space_watch import SpaceWatch

BLOCK = 65536


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Pool]]:
    """A function that makes and opens a pool of so many data blocks."""
    opened = []

    def made(blocks: int, **options: int) -> Pool:
        create_pool(tmp_path / "pool", size_bytes=blocks * BLOCK, **options)
        opened.append(open_pool(PoolLocation.directory(tmp_path / "pool")))
        return opened[-1]

    yield made
    for pool in opened:
        pool.close()


def session_on(pool: Pool, name: str) -> Session:
    entry = pool.catalog.by_name(name)
    assert entry is not None
    return pool.open_session(entry)


def write(session: Session, offset: int, data: bytes) -> None:
    session.enter()
    try:
        session.write(offset, memoryview(data))
    finally:
        session.leave()
        session.sent()


def stamp(number: int) -> bytes:
    return bytes([number % 251 + 1]) * BLOCK


def fill(pool: Pool, name: str, blocks: range) -> None:
    session = session_on(pool, name)
    for block in blocks:
        write(session, block * BLOCK, stamp(block))
    session.flush()
    session.close()


def test_a_full_pool_changes_what_it_may_and_keeps_what_is_shared(make: Callable[..., Pool]) -> None:
    """B03: own blocks can still be overwritten, shared ones keep their content for both who share them."""
    pool = make(8)
    pool.create_device("disk", 16 * BLOCK)
    fill(pool, "disk", range(4))
    pool.create_snapshot("disk", "before")
    fill(pool, "disk", range(2))  # two copies
    fill(pool, "disk", range(4, 6))
    session = session_on(pool, "disk")
    write(session, 4 * BLOCK, stamp(90))
    for offset in (2 * BLOCK, 9 * BLOCK):  # shared, unmapped
        with pytest.raises(OSError, match="no data block") as caught:
            write(session, offset + 512, b"x" * 4096)
        assert caught.value.errno == errno.ENOSPC
    assert session.read_bytes(2 * BLOCK, BLOCK) == stamp(2)
    assert session.read_bytes(4 * BLOCK, BLOCK) == stamp(90)
    assert not any(session.read_bytes(9 * BLOCK, BLOCK))
    session.close()
    snapshot = session_on(pool, "before")
    assert snapshot.read_bytes(2 * BLOCK, BLOCK) == stamp(2)
    snapshot.close()


def full_of_snapshots(make: Callable[..., Pool]) -> Pool:
    """A pool without a free block: a device whose eight blocks were written before each of nine snapshots."""
    pool = make(80)
    pool.create_device("disk", 8 * BLOCK)
    for turn in range(10):
        fill(pool, "disk", range(8))
        if turn < 9:
            pool.create_snapshot("disk", f"s{turn}")
    assert pool.status().data_free_bytes == 0
    return pool


def test_deleting_in_a_full_pool_takes_no_block(make: Callable[..., Pool]) -> None:
    """B11: the middle of many snapshots goes, and the space that is free only grows."""
    pool = full_of_snapshots(make)
    free = [0]
    for name in ("s4", "s0", "s8", "s5"):
        pool.delete(name)
        free.append(pool.status().data_free_bytes)
    assert free == [8 * BLOCK * turn for turn in range(5)]
    fill(pool, "disk", range(8))


def test_a_full_pool_opens_and_is_emptied_without_a_server(make: Callable[..., Pool]) -> None:
    """B13: nothing is allocated by opening, reading, listing and deleting."""
    full_of_snapshots(make).close()
    pool = open_pool(PoolLocation.directory(full_path(make)))
    before = pool.status().data_used_bytes
    assert len(pool.devices()) == 10
    session = session_on(pool, "s3")
    assert session.read_bytes(0, BLOCK) == stamp(0)
    session.close()
    assert pool.status().data_used_bytes == before == 80 * BLOCK
    for turn in range(9):
        pool.delete(f"s{turn}")
    assert pool.status().data_used_bytes == 8 * BLOCK
    pool.close()


def full_path(make: Callable[..., Pool]) -> Path:
    cells = make.__closure__
    assert cells is not None
    return next(cell.cell_contents for cell in cells if isinstance(cell.cell_contents, Path)) / "pool"


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_metadata_grow_with_what_is_mapped(order: str) -> None:
    """B19: about 16 bytes a mapping written in order, twice that at random, and leaves alone for a snapshot."""
    count, store_pool = 60_000, new_pool(4000, 400_000)
    pool = store_pool[1]
    pool.create_device(1)
    pool.commit()
    base = pool.metadata_blocks_allocated
    keys = span(0, count)
    if order == "shuffled":
        np.random.Generator(np.random.PCG64(3)).shuffle(keys)
    for piece in np.array_split(keys, 60):
        pool.insert(1, np.sort(piece), packed(np.sort(piece)))
    pool.commit()
    used = (pool.metadata_blocks_allocated - base) * 4096 / count
    assert used <= (19.2 if order == "ascending" else 34)
    leaves = pool.metadata_blocks_allocated - base
    for turn in range(3):
        pool.create_snapshot(2 + turn, 1)
        pool.insert(1, np.sort(keys), packed(span(100_000 * (turn + 1), count), pool.time))
        pool.commit()
    assert pool.metadata_blocks_allocated - base <= 4.4 * leaves


def test_unmapping_at_random_keeps_the_snapshot_and_every_count(make: Callable[..., Pool]) -> None:
    """B25: leaves merge under a tree of three levels that a snapshot shares; a recount agrees after each step."""
    store, pool = new_pool(3000, 200_000)
    random, count = Random(25), 70_000
    pool.create_device(1)
    for first in range(0, count, 10_000):
        pool.insert(1, span(first, 10_000), packed(span(first, 10_000)))
    pool.commit()
    pool.create_snapshot(2, 1)
    pool.commit()
    promised = contents(pool, 2)
    left = set(range(count))
    for turn in range(12):
        for _ in range(25):
            first = random.randrange(count)
            end = min(first + random.choice((1, 50, 300, 2000)), count)
            pool.remove(1, first, end)
            left -= set(range(first, end))
        fresh = span(count + turn * 500, 500)
        pool.insert(1, fresh, packed(fresh + np.uint64(50_000), pool.time))
        left |= set(fresh.tolist())
        pool.commit()
        assert not recount(store)
    assert contents(pool, 2) == promised
    assert contents(pool, 1).keys() == left


def test_a_snapshot_that_fails_lets_writers_go_on(
    make: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B29 and B71: writes are held up for a moment only, and what failed has left nothing behind."""
    pool = make(64)
    pool.create_device("disk", 16 * BLOCK)
    fill(pool, "disk", range(4))

    def refuse(*_: object, **__: object) -> None:
        time.sleep(0.05)  # clients wait meanwhile
        raise MetadataFull(1, 0, 0)

    session, stop, written = session_on(pool, "disk"), threading.Event(), [0]

    def client() -> None:
        while not stop.is_set():
            write(session, 0, stamp(7))
            written[0] += 1

    writer = threading.Thread(target=client)
    writer.start()
    with monkeypatch.context() as patch:
        patch.setattr(PoolMetadata, "create_snapshot", refuse)
        for _ in range(3):
            with pytest.raises(MetadataFull):
                pool.create_snapshot("disk", "never")
            before = written[0]
            while written[0] <= before + 1:  # the test's time limit is the bound
                time.sleep(0.001)
    stop.set()
    writer.join()
    session.close()
    assert [device.name for device in pool.devices()] == ["disk"]
    pool.create_snapshot("disk", "never")
    pool.delete("never")
    pool.delete("disk")


def test_the_lock_is_on_the_files_not_on_their_names(tmp_path: Path) -> None:
    """B31: the same pool by another path, or as two bare files, is busy all the same."""
    create_pool(tmp_path / "pool", size_bytes=8 * BLOCK)
    pool = open_pool(PoolLocation.directory(tmp_path / "pool"))
    (tmp_path / "link").symlink_to(tmp_path / "pool")
    (tmp_path / "meta").hardlink_to(tmp_path / "pool" / "metadata")
    others = [
        PoolLocation.directory(tmp_path / "link"),
        PoolLocation.bare(tmp_path / "meta", tmp_path / "pool" / "data"),
    ]
    for location in others:
        with pytest.raises(PoolBusy):
            open_pool(location)
    pool.close()
    for location in others:
        open_pool(location).close()


def test_deleting_a_snapshot_shrinks_the_file_below(make: Callable[..., Pool]) -> None:
    """B47: what only the snapshot had goes back to the file system."""
    pool = make(128)
    pool.create_device("disk", 32 * BLOCK)
    fill(pool, "disk", range(32))
    pool.create_snapshot("disk", "old")
    fill(pool, "disk", range(20))
    pool.commit()
    before = pool.status().file_bytes
    pool.delete("old")
    assert before - pool.status().file_bytes == 20 * BLOCK


@pytest.mark.parametrize("generations", [150, pytest.param(1000, marks=pytest.mark.deep)])
def test_snapshots_of_snapshots_of_snapshots(
    make: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch, generations: int
) -> None:
    """B67: each generation changes one block; ancestors go first; every block is the one written last."""
    pool = make(2 * generations + 50)
    pool.create_device("g0", 16 * BLOCK)
    written, costs, write_blocks = [0], [], FileStore.write

    def count(store: FileStore, first: int, data: bytes) -> None:
        written[0] += len(data)
        write_blocks(store, first, data)

    monkeypatch.setattr(FileStore, "write", count)
    for turn in range(generations):
        session = session_on(pool, f"g{turn}")
        write(session, turn % 16 * BLOCK, stamp(turn))
        session.close()
        begun = written[0]
        pool.create_snapshot(f"g{turn}", f"g{turn + 1}")
        costs.append(written[0] - begun)
    for turn in Random(67).sample(range(generations), generations):
        pool.delete(f"g{turn}")
    last = session_on(pool, f"g{generations}")
    for block in range(16):
        newest = max(turn for turn in range(generations) if turn % 16 == block)
        assert last.read_bytes(block * BLOCK, BLOCK) == stamp(newest)
    last.close()
    assert pool.status().data_used_bytes == 16 * BLOCK
    # More devices make three trees (mappings, details, counts of metadata) a level taller: one node more on each path.
    tenth = generations // 10
    growth_bytes = median(costs[-tenth:]) - median(costs[:tenth])
    assert growth_bytes <= 3 * BLOCK_BYTES, "a snapshot writes more the longer the chain is"
    assert max(costs) <= 2 * median(costs), "some snapshots write more than paths and what splits on them"


def test_one_of_many_makes_the_name(make: Callable[..., Pool]) -> None:
    """B73: a hundred snapshots of one name at once: one is made, the others are told so."""
    pool = make(64)
    pool.create_device("disk", 4 * BLOCK)
    outcomes: list[str] = []

    def take() -> None:
        try:
            pool.create_snapshot("disk", "x")
            outcomes.append("made")
        except DeviceExists:
            outcomes.append("exists")

    threads = [threading.Thread(target=take) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["exists"] * 99 + ["made"]
    with pytest.raises(DeviceExists):
        pool.rename("disk", "x")
    assert sorted(device.name for device in pool.devices()) == ["disk", "x"]


def test_snapshots_go_in_any_order(make: Callable[..., Pool]) -> None:
    """B75: the newest, the oldest, the origin, the only one left."""
    pool = make(64)
    pool.create_device("disk", 4 * BLOCK)
    for turn in range(4):
        fill(pool, "disk", range(turn, turn + 1))
        pool.create_snapshot("disk", f"s{turn}")
    for name in ("s3", "s0", "disk", "s1", "s2"):
        pool.delete(name)
    assert not pool.devices()
    assert pool.status().data_used_bytes == 0


# A thirtieth of the pool of the case, whose default metadata are a thirtieth of it as well: one volume of thirty.
SHARE_BYTES = 500 * 10**9 // 30
CHURN = 0.05
SNAPSHOTS = 100


def rotate(pool: Pool, look: Callable[[], None]) -> int:
    """Fill a volume so that 100 snapshots at 5 % churn take 80 % of the data; returns how many could be taken.

    Mappings are entered without writing data, which is what makes this quick. `look` is called after each commit.
    """
    blocks = int(0.8 * (SHARE_BYTES // BLOCK) / (1 + SNAPSHOTS * CHURN))
    random = np.random.Generator(np.random.PCG64(15))
    pool.create_device("volume", blocks * BLOCK)
    number, taken = pool.info("volume").device_id, 0

    def churn(keys: np.ndarray) -> None:
        nonlocal taken
        with pool.engine.transaction, pool.engine.changing_tree():
            values = span(taken, len(keys)) << np.uint64(24) | np.uint64(pool.engine.metadata.time)
            pool.engine.metadata.insert(number, keys, values)
        taken += len(keys)
        pool.commit()
        look()

    churn(span(0, blocks))
    for turn in range(SNAPSHOTS):
        try:
            pool.create_snapshot("volume", f"day{turn}", read_only=True)
            churn(np.sort(random.choice(blocks, int(blocks * CHURN), replace=False)).astype(np.uint64))
        except (TooLittleFree, MetadataFull):
            assert pool.writable
            return turn
    assert pool.status().data_used_bytes >= 0.79 * SHARE_BYTES
    return SNAPSHOTS


@pytest.fixture
def default_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setattr(FileStore, "flush", lambda _: None)
    create_pool(tmp_path / "pool", size_bytes=SHARE_BYTES)
    pool = open_pool(PoolLocation.directory(tmp_path / "pool"))
    assert pool.status().metadata_bytes == 64 << 20
    yield pool
    pool.close()


def test_default_metadata_tell_before_they_refuse_and_data_run_out_first(
    default_pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    """B15, B17, where metadata may not grow: an event at 80 %, snapshots refused at 90 %, never read-only."""
    pool = default_pool
    pool.change_settings({"metadata-autogrow-limit": "off"})
    watch = SpaceWatch(pool)
    assert rotate(pool, watch.look) == SNAPSHOTS, "metadata were full before 80 % of the data"
    assert "the metadata of the pool is 80." in caplog.text
    session = session_on(pool, "volume")
    with pytest.raises(TooLittleFree):
        for turn in range(SNAPSHOTS):
            pool.create_snapshot("volume", f"more{turn}", read_only=True)
            with pool.engine.transaction, pool.engine.changing_tree():
                free = span(SHARE_BYTES // BLOCK - (turn + 1) * 300, 300)
                values = free << np.uint64(24) | np.uint64(pool.engine.metadata.time)
                pool.engine.metadata.insert(1, span(0, 300) * 100, values)
            pool.commit()
    status = pool.status()
    assert status.mode == "rw"
    assert 0.9 <= status.metadata_used_bytes / status.metadata_bytes < 0.93
    with pytest.MonkeyPatch.context() as patch:
        # What was entered without asking for blocks is not known to be taken.
        patch.setattr(pool.engine.free, "allocate", lambda _: SHARE_BYTES // BLOCK - 40_000)
        write(session, 0, stamp(1))
    pool.commit()
    assert session.read_bytes(0, BLOCK) == stamp(1)
    session.close()


@pytest.mark.deep
def test_default_metadata_grow_by_themselves(default_pool: Pool) -> None:
    """B15 as it is set by default."""
    assert rotate(default_pool, SpaceWatch(default_pool).look) == SNAPSHOTS
    status = default_pool.status()
    assert status.mode == "rw"
    assert status.metadata_bytes > 64 << 20


def test_other_devices_are_served_beside_a_damaged_one(tmp_path: Path) -> None:
    """B125: a leaf of one device is spoilt; its range is an error, all else is read and written, and nothing poisons."""
    create_pool(path := tmp_path / "pool", size_bytes=4096 * BLOCK)
    location = PoolLocation.directory(path)
    pool = open_pool(location)
    for name in ("spoilt", "sound"):
        pool.create_device(name, 2048 * BLOCK)
        fill(pool, name, range(0, 1200, 40))
        fill(pool, name, range(1, 1200, 40))
    number = pool.info("spoilt").device_id
    # One mapping a leaf would do; several leaves are made by entering mappings without data.
    with pool.engine.transaction, pool.engine.changing_tree():
        pool.engine.metadata.insert(number, span(1300, 600), packed(span(3000, 600)))
    pool.commit()
    last = pool.engine.metadata.leaf(number, 1899)
    root = pool.engine.metadata.device_root(number)
    pool.close()
    assert last.begin > 0, "the device has one leaf only"
    store = FileStore(location.metadata_path, writable=True)
    children = decode_node(store.read(root, 1), root).values
    store.write(int(children[-1]), bytes(4096))
    store.close()
    pool = open_pool(location)
    assert pool.writable
    spoilt, sound = session_on(pool, "spoilt"), session_on(pool, "sound")
    with pytest.raises(OSError, match="damaged"):
        spoilt.read_bytes(1899 * BLOCK, BLOCK)
    assert spoilt.read_bytes(0, BLOCK) == sound.read_bytes(0, BLOCK)
    figures = {info.name: info.exclusive_bytes for info in pool.devices()}
    assert figures == {"sound": 60 * BLOCK, "spoilt": None}
    write(sound, 0, stamp(5))
    write(sound, 2000 * BLOCK, stamp(6))
    sound.flush()
    assert sound.read_bytes(2000 * BLOCK, BLOCK) == stamp(6)
    write(spoilt, 0, stamp(7))
    spoilt.flush()
    assert spoilt.read_bytes(0, BLOCK) == stamp(7)
    spoilt.close()
    sound.close()
    pool.create_snapshot("sound", "sound@1")
    assert pool.writable
    pool.close()

"""Rules of crash safety, one test for each mistake that the crash search (or reading for it) found in the engine."""

from __future__ import annotations

import errno
import threading

import pytest

from tests.fakes.disk_history import Contents, Image, Kind, Replay
from tests.fakes.simulated_disk import SimulatedDisk
from thinpool.pool import Pool

BLOCK = 65536


@pytest.fixture
def disk():
    made = SimulatedDisk(Contents(), metadata_blocks=256)
    made.format(data_blocks=24)
    return made


def session(pool: Pool, name: str):
    return pool.open_session(pool.catalog.by_name(name))


def write(opened, offset: int, data: bytes) -> None:
    opened.enter()
    try:
        opened.write(offset, memoryview(data))
    finally:
        opened.leave()
        opened.sent()


def durable_only(disk: SimulatedDisk) -> Image:
    """The image when nothing that was not flushed arrived."""
    return replayed(disk).durable


def replayed(disk: SimulatedDisk) -> Replay:
    replay = Replay(disk.start.copy())
    for event in disk.events:
        replay.apply(event)
    return replay


def reopened(disk: SimulatedDisk, image: Image) -> Pool:
    return SimulatedDisk(disk.contents, image).open()


def content(pool: Pool, name: str) -> bytes:
    opened = session(pool, name)
    try:
        return bytes(opened.read_bytes(0, opened.device.size_bytes))
    finally:
        opened.close()


def test_a_block_whose_sharer_let_go_without_a_commit_is_still_copied(disk):
    # The snapshot has unmapped its block, but a power cut brings the mapping back: the block is not ours yet.
    pool = disk.open()
    pool.create_device("origin", 4 * BLOCK)
    origin = session(pool, "origin")
    write(origin, 0, b"a" * BLOCK)
    pool.create_snapshot("origin", "copy")
    copy = session(pool, "copy")
    copy.flush()
    copy.trim(0, BLOCK)
    write(origin, 0, b"b" * 4096)
    assert content(reopened(disk, replayed(disk).latest()), "copy")[:BLOCK] == b"a" * BLOCK


def test_after_the_commit_it_is_written_in_place(disk):
    pool = disk.open()
    pool.create_device("origin", 4 * BLOCK)
    origin = session(pool, "origin")
    write(origin, 0, b"a" * BLOCK)
    pool.create_snapshot("origin", "copy")
    session(pool, "copy").trim(0, BLOCK)
    pool.commit()
    used = pool.engine.metadata.data_blocks_allocated
    write(origin, 0, b"b" * 4096)
    pool.commit()
    assert pool.engine.metadata.data_blocks_allocated == used


def test_a_commit_waits_for_a_write_that_has_its_block_but_no_mapping_yet(disk):
    # Otherwise the commit takes the block for one that nobody came to use, and gives it to somebody else.
    pool = disk.open()
    pool.create_device("one", 4 * BLOCK)
    writer = session(pool, "one")
    committing = []

    def commit_meanwhile(operation: str, count: int) -> int:
        if operation == "data write" and not committing:
            committing.append(threading.Thread(target=pool.commit))
            committing[0].start()
            committing[0].join(0.2)
        return count

    disk.before = commit_meanwhile
    write(writer, 0, b"a" * 4096)
    committing[0].join(10)
    pool.commit()
    pool.engine.reclaim()
    assert content(pool, "one")[:4096] == b"a" * 4096
    assert pool.engine.free.free_blocks == 23


def test_shrinking_is_one_step_also_inside_the_last_block(disk):
    pool = disk.open()
    pool.create_device("one", BLOCK)
    opened = session(pool, "one")
    write(opened, 0, b"a" * BLOCK)
    opened.flush()
    opened.close()
    before = len(disk.events)
    pool.resize("one", 4096, shrink=True)
    replay = Replay(disk.start.copy())
    for number, event in enumerate(disk.events):
        replay.apply(event)
        if number >= before - 1:
            found = content(reopened(disk, replay.latest()), "one")
            assert found in (b"a" * BLOCK, b"a" * 4096), f"after event {number}"


def test_what_a_shrink_cut_off_does_not_come_back_with_growth(disk):
    pool = disk.open()
    pool.create_device("one", BLOCK)
    opened = session(pool, "one")
    write(opened, 0, b"a" * BLOCK)
    opened.close()
    pool.create_snapshot("one", "copy", read_only=True)
    pool.resize("one", 4096, shrink=True)
    before = len(disk.events)
    pool.resize("one", 2 * BLOCK)
    assert content(pool, "one") == b"a" * 4096 + bytes(2 * BLOCK - 4096)
    assert content(pool, "copy") == b"a" * BLOCK
    replay = Replay(disk.start.copy())
    for number, event in enumerate(disk.events):
        replay.apply(event)
        if number >= before - 1:
            for image in (replay.durable, replay.latest()):
                found = content(reopened(disk, image), "one")
                assert found.rstrip(b"\0") == b"a" * 4096, f"after event {number}"


def test_growth_does_not_trust_zeros_that_are_not_committed(disk):
    pool = disk.open()
    pool.create_device("one", BLOCK)
    opened = session(pool, "one")
    write(opened, 0, b"a" * BLOCK)
    opened.close()
    pool.resize("one", 4096, shrink=True)
    opened = session(pool, "one")
    opened.trim(0, 4096)  # the whole of the device, so the block goes
    opened.close()
    pool.resize("one", BLOCK)
    assert not content(reopened(disk, durable_only(disk)), "one")[4096:].strip(b"\0")


def test_no_superblock_tells_of_metadata_blocks_that_a_cut_takes_away(disk):
    pool = disk.open()
    pool.grow(None, 300 * 4096)
    kinds = [event.kind for event in disk.events]
    replay = replayed(disk)
    assert Kind.SIZE in kinds
    assert reopened(disk, replay.durable).status().metadata_bytes == 300 * 4096


def test_a_list_of_mappings_survives_an_insertion_that_found_no_room(disk, monkeypatch):
    from metadata import MetadataFull

    pool = disk.open()
    pool.create_device("one", 4 * BLOCK)
    opened = session(pool, "one")
    write(opened, 0, b"a" * 4096)

    def full(*_args: object) -> None:
        raise MetadataFull(1, 0, 0)

    with monkeypatch.context() as patch:
        patch.setattr(pool.engine.metadata, "insert", full)
        with pytest.raises(MetadataFull):
            pool.status()
    opened.flush()
    assert content(reopened(disk, durable_only(disk)), "one")[:4096] == b"a" * 4096


def test_an_insertion_that_failed_half_way_is_never_committed(disk, monkeypatch):
    pool = disk.open()
    pool.create_device("one", 4 * BLOCK)
    opened = session(pool, "one")
    write(opened, 0, b"a" * 4096)

    def broken(*_args: object) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(pool.engine.metadata, "insert", broken)
        with pytest.raises(OSError, match="injected"):
            pool.status()
    with pytest.raises(OSError, match="read-only"):
        opened.flush()


def test_a_poisoned_pool_refuses_writes_to_blocks_it_has_too(disk):
    pool = disk.open()
    pool.create_device("one", 4 * BLOCK)
    opened = session(pool, "one")
    write(opened, 0, b"a" * 2 * BLOCK)
    opened.flush()

    def fail_flush(operation: str, count: int) -> int:
        if operation == "data flush":
            raise OSError(errno.EIO, "injected")
        return count

    disk.before = fail_flush
    write(opened, 0, b"b" * 512)
    with pytest.raises(OSError, match="injected"):
        opened.flush()
    disk.before = None
    for length in (512, BLOCK, 2 * BLOCK):
        with pytest.raises(OSError, match="read-only") as caught:
            write(opened, 0, b"c" * length)
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="read-only"):
        opened.flush()
    assert content(pool, "one")[BLOCK : 2 * BLOCK] == b"a" * BLOCK


def test_a_read_only_pool_shows_the_names_of_a_step_that_was_cut_and_writes_nothing(disk):
    pool = disk.open()
    pool.create_device("one", BLOCK)
    promoted = max(n for n, event in enumerate(disk.events) if event.kind is Kind.CATALOG)
    replay = Replay(disk.start.copy())
    for event in disk.events[:promoted]:
        replay.apply(event)
    again = SimulatedDisk(disk.contents, replay.durable)
    opened = again.open(read_only=True)
    assert [entry.name for entry in opened.catalog.entries()] == ["one"]
    assert not again.events

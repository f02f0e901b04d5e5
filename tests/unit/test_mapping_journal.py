"""The journal for killed servers: when it is believed, when not, and what happens where it cannot be written.

That what it holds is replayed right is shown by `tests/property/test_process_kills.py`.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from thinpool import mapping_journal
from thinpool.mapping_journal import Dropped, Entry, Mapped, MappingJournal, Witness, left_behind
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation

BLOCK = 65536


@pytest.fixture
def location(tmp_path: Path) -> PoolLocation:
    create_pool(tmp_path / "pool", size_bytes=64 * BLOCK)
    location = PoolLocation.directory(tmp_path / "pool")
    pool = open_pool(location)
    pool.create_device("disk", 32 * BLOCK)
    pool.close()
    return location


def write(pool: Pool, block: int, content: bytes) -> None:
    entry = pool.catalog.by_name("disk")
    assert entry is not None
    session = pool.open_session(entry)
    pool.engine.committer.stop()  # no commit comes by itself
    session.enter()
    session.write(block * BLOCK, memoryview(content))
    session.leave()
    session.sent()
    session.close()


def read(pool: Pool, block: int, length: int) -> bytes:
    entry = pool.catalog.by_name("disk")
    assert entry is not None
    session = pool.open_session(entry)
    try:
        return bytes(session.read_bytes(block * BLOCK, length))
    finally:
        session.close()


def kill(pool: Pool) -> None:
    """What the death of the process does to its descriptors, and nothing else."""
    pool.engine.committer.stop()
    assert pool.engine.journal is not None
    pool.engine.journal.close()
    pool.engine.data.close()
    pool.engine.metadata.close()
    for held in pool._held:
        held.close()  # type: ignore[attr-defined]


def entries_of(location: PoolLocation) -> list[Entry]:
    assert location.journal_path is not None
    witness = Witness(location.metadata_path, location.data_path)
    try:
        return left_behind(location.journal_path, witness)
    finally:
        witness.close()


def test_writes_and_trims_of_a_killed_process_are_there(location: PoolLocation):
    pool = open_pool(location)
    write(pool, 3, b"first")
    write(pool, 7, b"second")
    pool.engine.devices[1].unmap(3, 4)
    kill(pool)
    assert entries_of(location) == [Mapped(1, 3, 0), Mapped(1, 7, 1), Dropped(1, 3, 4)]
    for read_only in (True, False, True):  # a reader changes nothing; a writer commits
        again = open_pool(location, read_only=read_only)
        assert read(again, 7, 6) == b"second"
        assert read(again, 3, 5) == bytes(5)
        again.close()
    assert entries_of(location) == []


def test_a_commit_leaves_nothing_to_replay(location: PoolLocation):
    pool = open_pool(location)
    write(pool, 3, b"first")
    pool.commit()
    assert entries_of(location) == []
    write(pool, 4, b"then")
    kill(pool)
    assert entries_of(location) == [Mapped(1, 4, 1)]


@pytest.mark.parametrize("how", ["reboot", "touched", "torn", "cut short", "old", "other data"])
def test_what_is_not_believed(location: PoolLocation, how: str, monkeypatch: pytest.MonkeyPatch):
    pool = open_pool(location)
    write(pool, 3, b"first")
    kill(pool)
    assert location.journal_path is not None
    at = mapping_journal.HEADER_BYTES + mapping_journal.ENTRIES_MAX * mapping_journal.ENTRY_BYTES
    if how == "reboot":
        monkeypatch.setattr(Witness, "_boot", staticmethod(lambda: "another"))
    elif how == "touched":
        os.utime(location.metadata_path)
    elif how == "torn":
        with location.journal_path.open("r+b") as file:
            file.seek(at + 20)
            file.write(b"\x07")
    elif how == "cut short":
        os.truncate(location.journal_path, at + 8)
    elif how == "old":
        later = location.data_path.stat().st_mtime_ns + 2 * mapping_journal.BELIEVED_NS
        os.utime(location.data_path, ns=(later, later))
    else:
        copy = location.data_path.with_name("copy")
        copy.write_bytes(location.data_path.read_bytes())
        copy.rename(location.data_path)
    assert entries_of(location) == []
    again = open_pool(location)
    assert read(again, 3, 5) == bytes(5)  # as after a power cut
    again.close()


def test_entries_that_do_not_fit_are_left_out_together(location: PoolLocation):
    pool = open_pool(location)
    write(pool, 3, b"first")
    pool.commit()
    journal = pool.engine.journal
    assert journal is not None
    journal.mapped(1, 9, 5)
    journal.mapped(1, 10, 0)  # in use by block 3
    kill(pool)
    again = open_pool(location)
    assert read(again, 3, 5) == b"first"
    assert again.engine.metadata.device(1).mapped_blocks == 1
    again.close()


def test_a_full_journal_asks_for_a_commit(location: PoolLocation):
    pool = open_pool(location)
    journal = pool.engine.journal
    assert journal is not None
    journal._full_at = 4
    for block in range(4):
        write(pool, block, b"x")
    with pytest.raises(OSError, match="journal") as caught:
        write(pool, 4, b"x")
    assert caught.value.errno == errno.ENOSPC
    assert pool.engine.make_space()
    write(pool, 4, b"x")
    kill(pool)
    assert entries_of(location) == [Mapped(1, 4, 4)]


def test_a_journal_that_cannot_be_written_is_given_up_and_the_pool_goes_on(
    location: PoolLocation, caplog: pytest.LogCaptureFixture
):
    pool = open_pool(location)
    write(pool, 0, b"kept")
    journal = pool.engine.journal
    assert journal is not None

    def refuse(_data: bytes, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "no room")

    journal._pwrite = refuse
    write(pool, 1, b"more")
    write(pool, 2, b"more")
    assert caplog.text.count("no longer outlive a killed server") == 1
    assert entries_of(location) == []  # half of the entries would be no harm, and no use
    pool.commit()
    assert read(pool, 2, 4) == b"more"
    pool.close()


def test_bare_pools_have_none(location: PoolLocation):
    bare = PoolLocation.bare(location.metadata_path, location.data_path)
    pool = open_pool(bare)
    assert pool.engine.journal is None
    pool.close()


def test_a_pool_closed_well_leaves_an_empty_file(location: PoolLocation):
    pool = open_pool(location)
    write(pool, 0, b"x")
    assert isinstance(pool.engine.journal, MappingJournal)
    pool.close()
    assert location.journal_path is not None
    assert location.journal_path.stat().st_size == 0


def test_a_metadata_file_that_is_lengthened_while_a_commit_runs_costs_nothing(location: PoolLocation):
    pool = open_pool(location)
    write(pool, 3, b"answered")
    journal = pool.engine.journal
    assert journal is not None
    journal.cut()
    journal.about_to_lengthen()
    os.utime(location.metadata_path, ns=(1, 1))
    kill(pool)
    assert [entry.thin_block for entry in entries_of(location) if isinstance(entry, Mapped)] == [3]

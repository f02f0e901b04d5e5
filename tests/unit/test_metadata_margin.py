"""Space for metadata is taken from the file system ahead of use; when there is no more, nothing that was answered suffers."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadata import FileStore, MetadataFull
from metadata.layout import BLOCK_BYTES
from thinpool import metadata_margin
from thinpool.allocated import allocated_up_to
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.session import Session

BLOCK = 65536
MIB = 1 << 20
CHUNK = 512 * BLOCK


class LimitedFiles:
    """A file system that allocates so many metadata blocks for a file and no more, or cannot allocate ahead at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks = 1 << 30
        self.error = errno.ENOSPC
        self.calls = 0
        self.highest_written = 0
        write = FileStore.write

        def refusing(_descriptor: int, _mode: int, offset: int, length_bytes: int) -> None:
            self.calls += 1
            if (offset + length_bytes) // BLOCK_BYTES > self.blocks:
                raise OSError(self.error, os.strerror(self.error))

        def watched(store: FileStore, first: int, data: bytes) -> None:
            self.highest_written = max(self.highest_written, first + len(data) // BLOCK_BYTES)
            write(store, first, data)

        monkeypatch.setattr(metadata_margin, "fallocate", refusing)
        monkeypatch.setattr(metadata_margin, "MARGIN_BLOCKS", 128)
        monkeypatch.setattr(FileStore, "write", watched)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> LimitedFiles:
    return LimitedFiles(monkeypatch)


@pytest.fixture
def reopened(tmp_path: Path) -> Iterator[Callable[[], Pool]]:
    """Closes the pool that is open and opens it (again)."""
    memory = Path("/dev/shm")  # noqa: S108 -- many commits, and no power cut is meant
    place = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    create_pool(place / "pool", size_bytes=1024 * MIB, metadata_bytes=64 * MIB)
    opened: list[Pool] = []

    def again() -> Pool:
        while opened:
            opened.pop().close()
        pool = open_pool(PoolLocation.directory(place / "pool"))
        pool.override_settings({"when-full": "error", "min-free-metadata": "off"})
        opened.append(pool)
        return pool

    yield again
    while opened:
        opened.pop().close()
    shutil.rmtree(place)


def session_on(pool: Pool, name: str) -> Session:
    entry = pool.catalog.by_name(name)
    assert entry is not None
    return pool.open_session(entry)


def write(session: Session, chunk: int) -> None:
    """First write to a chunk of its own; as the server does, after a refusal once more when that is worth it."""
    for attempt in range(2):
        session.enter()
        try:
            session.write(chunk * CHUNK, memoryview(chunk.to_bytes(8, "little") * 64))
        except OSError as error:
            if attempt or error.errno != errno.ENOSPC:
                raise
        else:
            return
        finally:
            session.leave()
            session.sent()
        if not session.wait_for_space():
            raise OSError(errno.ENOSPC, "no space")


def fill_up(pool: Pool) -> int:
    """Snapshots, each with writes that copy paths of the tree, until something is refused; how many writes went."""
    session = session_on(pool, "disk")
    done = 0
    try:
        for number in range(2000):
            pool.create_snapshot("disk", f"s{number}")
            for chunk in range(6):
                write(session, chunk + number % 7)
                done += 1
    except (MetadataFull, OSError) as error:
        assert isinstance(error, MetadataFull) or error.errno == errno.ENOSPC
        return done
    finally:
        session.close()
    raise AssertionError("nothing was refused")


def test_without_more_space_new_mappings_are_refused_and_all_else_goes_on(
    files: LimitedFiles, reopened: Callable[[], Pool]
) -> None:
    pool = reopened()
    files.blocks = files.highest_written + 600
    pool.create_device("disk", 4 << 30)
    assert fill_up(pool) > 50
    assert pool.engine.failure is None
    assert not pool.engine.can_map
    assert files.highest_written <= files.blocks
    assert pool.status().metadata_bytes == 64 * MIB  # it does not grow by itself for that
    assert pool.status().metadata_free_bytes > 32 * MIB
    session = session_on(pool, "disk")
    session.flush()
    for number in range(20):
        pool.delete(f"s{number}")
    session.trim(0, CHUNK)
    session.flush()
    assert pool.engine.failure is None
    assert files.highest_written <= files.blocks
    session.close()
    names = {entry.name for entry in pool.catalog.entries()}
    pool = reopened()  # as full as before: opens, and finds what was set aside
    assert {entry.name for entry in pool.catalog.entries()} == names
    files.blocks = 1 << 30
    session = session_on(pool, "disk")
    for chunk in range(40):
        write(session, chunk)
    session.flush()
    assert pool.engine.can_map
    session.close()


def test_a_commit_costs_no_call_while_there_is_enough(
    files: LimitedFiles, reopened: Callable[[], Pool]
) -> None:
    pool = reopened()
    pool.create_device("disk", 4 << 30)
    session = session_on(pool, "disk")
    write(session, 0)
    session.flush()
    before = files.calls
    for block in range(1, 40):
        session.enter()
        session.write(block * BLOCK, memoryview(b"x" * 512))
        session.leave()
        session.sent()
        session.flush()
    assert files.calls == before
    session.close()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_files_that_cannot_be_allocated_ahead_are_used_as_they_are(
    files: LimitedFiles, reopened: Callable[[], Pool], number: int
) -> None:
    files.blocks, files.error = 0, number
    pool = reopened()
    pool.create_device("disk", 4 << 30)
    session = session_on(pool, "disk")
    for chunk in range(100):
        write(session, chunk)
    session.flush()
    assert pool.engine.can_map
    session.close()


def test_a_large_metadata_file_is_real_in_small_part_only(tmp_path: Path) -> None:
    create_pool(tmp_path / "pool", size_bytes=1 << 40, metadata_bytes=4 << 30)
    location = PoolLocation.directory(tmp_path / "pool")
    pool = open_pool(location)
    pool.create_device("disk", 4 << 30)
    pool.close()
    found = location.metadata_path.stat()
    assert stat.S_ISREG(found.st_mode)
    assert 4 * MIB <= found.st_blocks * 512 <= 16 * MIB


def test_on_a_full_disk_what_the_file_has_is_enough_to_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xfs refuses to allocate on a full disk even what is allocated."""
    create_pool(tmp_path / "pool", size_bytes=64 * MIB)
    location = PoolLocation.directory(tmp_path / "pool")
    pool = open_pool(location)
    pool.create_device("disk", 8 * MIB)
    pool.create_snapshot("disk", "snap")
    assert pool.engine.margin is not None
    secured = pool.engine.margin._secured
    pool.close()
    with location.metadata_path.open("rb") as file:
        present = allocated_up_to(file.fileno(), 0) // BLOCK_BYTES
    if not present:
        pytest.skip("the file system does not tell what a file has (FIEMAP)")
    assert present >= secured

    def refusing(_descriptor: int, _mode: int, _offset: int, _length_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metadata_margin, "fallocate", refusing)
    pool = open_pool(location)
    assert pool.engine.metadata.metadata_blocks_usable > secured // 2
    pool.delete("snap")
    pool.close()


def test_how_far_the_space_of_a_file_reaches(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w+b") as file:
        os.ftruncate(file.fileno(), 64 * MIB)
        assert allocated_up_to(file.fileno(), 0) == 0
        os.posix_fallocate(file.fileno(), 0, MIB)
        if not allocated_up_to(file.fileno(), 0):
            pytest.skip("the file system does not tell what a file has (FIEMAP)")
        for number in range(4, 600, 2):  # more pieces than are asked for at once
            os.posix_fallocate(file.fileno(), number * BLOCK, BLOCK)
        os.posix_fallocate(file.fileno(), MIB, 40 * MIB)
        assert allocated_up_to(file.fileno(), 0) == 41 * MIB
        assert allocated_up_to(file.fileno(), 5 * MIB) == 41 * MIB
        assert allocated_up_to(file.fileno(), 50 * MIB) == 50 * MIB

"""The file system under a pool is full: what was freed is given back to it before anything is refused."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from tests.fakes.disk_history import Contents
from tests.fakes.simulated_disk import SimulatedDisk
from thinpool.pool import Pool
from thinpool.receiving import _Receiving
from thinpool.session import Session

BLOCK = 65536


@pytest.fixture
def full() -> Iterator[tuple[Pool, Session]]:
    """Nothing can be written any more until a block that was trimmed is punched out of the data file."""
    disk = SimulatedDisk(Contents(), metadata_blocks=256)
    disk.format(data_blocks=24)
    pool = disk.open()
    pool.create_device("disk", 8 * BLOCK)
    entry = pool.catalog.by_name("disk")
    assert entry is not None
    session = pool.open_session(entry)
    pool.engine.committer.stop()  # nothing comes back by itself
    session.enter()
    session.write(0, memoryview(b"x" * BLOCK))
    session.leave()
    session.sent()
    pool.commit()
    session.trim(0, BLOCK)
    punched = False

    def before(operation: str, count: int) -> int:
        nonlocal punched
        punched = punched or operation == "data punch"
        if operation == "data write" and not punched:
            raise OSError(errno.ENOSPC, "no space left")
        return count

    disk.before = before
    yield pool, session
    disk.before = None
    session.close()
    pool.close()
    disk.close()


def zero(session: Session) -> None:
    session.zero(BLOCK + 512, 4096, keep_allocated=True, fast_only=False)
    session.zero(2 * BLOCK, BLOCK, keep_allocated=True, fast_only=False)


def receive(session: Session) -> None:
    receiving = _Receiving.__new__(_Receiving)  # only what writes a record
    receiving._write(session, BLOCK, memoryview(b"y" * 4096))
    assert session.read_bytes(BLOCK, 4096) == b"y" * 4096


@pytest.mark.parametrize("use", [zero, receive])
def test_what_was_freed_is_given_back_first(
    full: tuple[Pool, Session], use: Callable[[Session], None]
) -> None:
    pool, session = full
    assert pool.status().data_free_bytes > 2 * BLOCK, "it is not the pool that is full"
    use(session)

"""Reservations as people meet them: what is refused and how, what is shown, what stays after opening again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from thinpool.errors import BadReservation, ExitCode, ReservationNotCovered
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.session import Session

BLOCK = 65536


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    create_pool(tmp_path / "pool", size_bytes=20 * BLOCK)
    opened = open_pool(PoolLocation.directory(tmp_path / "pool"))
    yield opened
    opened.close()


def opened(pool: Pool, name: str) -> Session:
    entry = pool.catalog.by_name(name)
    assert entry is not None
    return pool.open_session(entry)


def try_write(session: Session, first: int, count: int = 1) -> None:
    session.enter()
    try:
        session.write(first * BLOCK, memoryview(b"x" * (count * BLOCK)))
    finally:
        session.leave()
        session.sent()


def test_others_meet_the_end_of_the_pool_first(pool: Pool) -> None:
    pool.create_device("kept", 10 * BLOCK, reservation_bytes=8 * BLOCK)
    pool.create_device("other", 30 * BLOCK)
    kept, other = opened(pool, "kept"), opened(pool, "other")
    try_write(other, 0, 12)
    with pytest.raises(OSError, match="reserved for other devices") as caught:
        try_write(other, 12)
    assert caught.value.errno == errno.ENOSPC
    assert not other.wait_for_space()
    assert pool.status().data_reserved_bytes == pool.status().data_free_bytes == 8 * BLOCK
    try_write(kept, 0, 8)
    assert pool.status().data_reserved_bytes == 0
    with pytest.raises(OSError, match="no data block is free"):
        try_write(kept, 8)
    kept.trim(0, 3 * BLOCK)
    assert not other.wait_for_space(), "what a device gives back of its reservation stays its own"
    try_write(kept, 1, 2)
    other.close()
    kept.close()


def test_a_snapshot_needs_the_reservation_once_more(pool: Pool) -> None:
    pool.create_device("kept", 8 * BLOCK, reservation_bytes=8 * BLOCK)
    session = opened(pool, "kept")
    try_write(session, 0, 8)
    pool.create_snapshot("kept", "first", read_only=True)
    assert pool.status().data_reserved_bytes == 8 * BLOCK
    try_write(session, 0, 5)
    with pytest.raises(ReservationNotCovered) as caught:
        pool.create_snapshot("kept", "second")
    assert caught.value.exit_code == ExitCode.NO_SPACE
    for part in ("shares all blocks", f"{8 * BLOCK} bytes are needed", f"{7 * BLOCK} bytes are free"):
        assert part in str(caught.value)
    assert [info.name for info in pool.devices()] == ["first", "kept"]
    try_write(session, 5, 3)
    pool.delete("first")
    pool.create_snapshot("kept", "second")
    session.close()


def test_a_reservation_is_refused_where_the_pool_cannot_cover_it(pool: Pool) -> None:
    pool.create_device("a", 15 * BLOCK, reservation_bytes=12 * BLOCK)
    with pytest.raises(ReservationNotCovered) as caught:
        pool.create_device("b", 15 * BLOCK, reservation_bytes=9 * BLOCK)
    for part in (
        f"{9 * BLOCK} bytes are needed",
        f"{8 * BLOCK} bytes are free",
        f"{12 * BLOCK} bytes reserved",
    ):
        assert part in str(caught.value)
    pool.create_device("b", 15 * BLOCK, reservation_bytes=8 * BLOCK)
    for name in ("a", "b"):
        with pytest.raises(ReservationNotCovered):
            pool.reserve(name, 15 * BLOCK)
    assert [info.reservation_bytes for info in pool.devices()] == [12 * BLOCK, 8 * BLOCK]
    pool.reserve("a", 5 * BLOCK)
    pool.reserve("b", 15 * BLOCK)
    assert pool.engine.free.promised == 20
    pool.create_device("c", BLOCK)  # an empty device takes nothing
    with pytest.raises(BadReservation, match="size of the device"):
        pool.reserve("c", 2 * BLOCK)
    pool.create_snapshot("c", "frozen", read_only=True)
    with pytest.raises(BadReservation, match="nobody may write"):
        pool.reserve("frozen", BLOCK)


def test_reservations_stay_follow_the_name_and_end_with_the_device(pool: Pool) -> None:
    pool.create_device("a", 10 * BLOCK, reservation_bytes=6 * BLOCK)
    pool.create_snapshot("a", "s")
    pool.rename("a", "b")
    pool.rollback("b", "s", keep="before")
    assert {i.name: i.reservation_bytes for i in pool.devices()} == {"before": 0, "b": 6 * BLOCK, "s": 0}
    pool.rollback("b", "s", keep=False)
    location = pool.location
    pool.close()
    again = open_pool(location)
    assert again.status().data_reserved_bytes == 6 * BLOCK
    assert again.info("b").to_json()["reservation_bytes"] == 6 * BLOCK
    again.resize("b", 2 * BLOCK, shrink=True)
    assert again.info("b").reservation_bytes == again.status().data_reserved_bytes == 2 * BLOCK
    again.delete("b")
    assert again.status().data_reserved_bytes == 0
    again.close()


def test_what_waits_goes_on_when_a_reservation_ends(pool: Pool) -> None:
    pool.create_device("kept", 20 * BLOCK, reservation_bytes=20 * BLOCK)
    pool.create_device("other", 20 * BLOCK)
    session = opened(pool, "other")
    with pytest.raises(OSError, match="reserved"):
        try_write(session, 0)
    descriptor = session.space_descriptor()
    pool.reserve("kept", 19 * BLOCK)
    assert os.eventfd_read(descriptor) > 0
    try_write(session, 0)
    with pytest.raises(OSError, match="reserved"):
        try_write(session, 1)
    pool.reserve("kept", 0)
    assert os.eventfd_read(descriptor) > 0
    try_write(session, 1, 19)
    session.close()


def test_what_another_device_lets_go_of_counts_before_anybody_is_refused(pool: Pool) -> None:
    pool.create_device("kept", 10 * BLOCK, reservation_bytes=5 * BLOCK)
    session = opened(pool, "kept")
    try_write(session, 0, 5)
    pool.create_snapshot("kept", "copy")
    pool.create_device("other", 20 * BLOCK)
    copy = opened(pool, "copy")
    copy.trim(0, 10 * BLOCK)
    copy.close()
    other = opened(pool, "other")
    try_write(other, 0, 10)
    with pytest.raises(OSError, match="reserved"):
        try_write(other, 10)
    assert other.wait_for_space()
    try_write(other, 10, 5)
    assert pool.engine.free.free_blocks == 0
    other.close()
    session.close()


def test_a_pool_of_two_bare_paths_keeps_no_reservations(pool: Pool) -> None:
    bare = PoolLocation.bare(pool.location.metadata_path, pool.location.data_path)
    pool.close()
    looked = open_pool(bare)
    with pytest.raises(BadReservation, match="two bare paths"):
        looked.create_device("a", BLOCK, reservation_bytes=BLOCK)
    assert looked.devices() == []
    looked.close()

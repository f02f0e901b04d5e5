"""Which new devices a pool refuses: floors of free space, and a limit to what is promised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from thinpool.errors import ExitCode, OvercommitExceeded, TooLittleFree
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation

BLOCK = 65536
MIB = 1 << 20


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    create_pool(tmp_path / "pool", size_bytes=100 * BLOCK)
    opened = open_pool(PoolLocation.directory(tmp_path / "pool"))
    opened.create_device("vol", 200 * BLOCK)
    yield opened
    opened.close()


def write(pool: Pool, first: int, count: int) -> None:
    session = pool.open_session(pool.catalog.by_name("vol"))  # type: ignore[arg-type]
    for index in range(first, first + count):
        session.enter()
        session.write(index * BLOCK, memoryview(bytes(BLOCK)))
        session.leave()
        session.sent()
    session.flush()
    session.close()


def test_below_the_floor_new_devices_are_refused_and_writes_are_not(pool: Pool) -> None:
    pool.change_settings({"min-free-data": "10%"})
    write(pool, 0, 90)
    pool.create_snapshot("vol", "at-the-floor")
    pool.delete("at-the-floor")
    write(pool, 90, 1)
    for refused in (lambda: pool.create_device("new", MIB), lambda: pool.create_snapshot("vol", "snap")):
        with pytest.raises(TooLittleFree) as caught:
            refused()
        assert caught.value.exit_code == ExitCode.NO_SPACE
        for part in ("data", "576 KiB of 6.25 MiB", "9.0 %", "min-free-data", "10 %", "--force"):
            assert part in str(caught.value)
    write(pool, 91, 9)
    assert [info.name for info in pool.devices()] == ["vol"]
    pool.create_snapshot("vol", "snap", force=True)
    pool.create_device("new", MIB, force=True)


def test_a_pool_that_may_grow_does_so_instead(pool: Pool) -> None:
    pool.change_settings({"min-free-data": "10%", "autogrow-limit": "1G"})
    write(pool, 0, 95)
    pool.create_snapshot("vol", "snap")
    assert pool.status().data_bytes == 120 * BLOCK


def test_metadata_have_a_floor_of_their_own(tmp_path: Path) -> None:
    create_pool(tmp_path / "small", size_bytes=1 << 36, metadata_bytes=1024 * 4096)
    pool = open_pool(PoolLocation.directory(tmp_path / "small"))
    pool.create_device("first", MIB)
    percent = 100 * pool.status().metadata_free_bytes // pool.status().metadata_bytes
    pool.change_settings({"min-free-metadata": f"{percent + 1}%", "metadata-autogrow-limit": "off"})
    with pytest.raises(TooLittleFree, match="--metadata-size") as caught:
        pool.create_device("second", MIB)
    assert caught.value.what == "metadata"
    pool.change_settings({"metadata-autogrow-limit": None, "autogrow-step": "200%"})
    pool.create_device("second", MIB)
    pool.close()


def test_promises_are_limited_with_the_figures_told(pool: Pool) -> None:
    pool.change_settings({"overcommit": "2.5"})
    pool.create_device("fits", 50 * BLOCK)
    with pytest.raises(OvercommitExceeded) as caught:
        pool.create_device("more", BLOCK)
    for part in (
        "15.62 MiB are promised",
        "64 KiB more",
        "overcommit 2.5 allows 15.62 MiB",
        "6.25 MiB of data",
    ):
        assert part in str(caught.value)
    with pytest.raises(OvercommitExceeded):
        pool.create_snapshot("fits", "snap")
    with pytest.raises(OvercommitExceeded):
        pool.resize("fits", 51 * BLOCK)
    pool.resize("fits", 40 * BLOCK, shrink=True)
    pool.create_device("more", 10 * BLOCK)
    pool.create_device("forced", 1 << 40, force=True)
    pool.change_settings({"overcommit": "off"})
    pool.create_snapshot("forced", "snap")

"""Names and metadata of different days: nothing is refused, and no device is taken for another (field case B131)."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from metadata import FileStore, PoolMetadata
from tests.unit.test_field_cases import BLOCK, fill, session_on
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A pool with a device that is there throughout and one that is not."""
    create_pool(path := tmp_path / "pool", size_bytes=64 * BLOCK)
    pool = open_pool(PoolLocation.directory(path))
    pool.create_device("kept", 4 * BLOCK)
    pool.create_device("gone", 4 * BLOCK)
    fill(pool, "kept", range(2))
    pool.close()
    shutil.copytree(path, tmp_path / "yesterday")
    pool = open_pool(PoolLocation.directory(path))
    pool.delete("gone")
    pool.create_device("other", 4 * BLOCK)
    assert pool.info("other").device_id == 2, "the number is given out again, or this tests nothing"
    fill(pool, "other", range(4))
    pool.close()
    return path


@pytest.fixture
def yesterday(path: Path) -> Path:
    return path.with_name("yesterday")


def names(path: Path, *, read_only: bool = False) -> dict[str, int]:
    pool = open_pool(PoolLocation.directory(path), read_only=read_only)
    try:
        return {device.name: device.device_id for device in pool.devices()}
    finally:
        pool.close()


def test_yesterdays_names_with_todays_metadata(
    path: Path, yesterday: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(yesterday / "catalog", path / "catalog")
    assert names(path, read_only=True) == {"kept": 1, "thin-2": 2}, "who only looks sees the same"
    caplog.clear()
    pool = open_pool(PoolLocation.directory(path))
    assert {device.name for device in pool.devices()} == {"kept", "thin-2"}
    assert "the names are of transaction 2, the metadata of transaction 4" in caplog.text
    assert "'gone'" in caplog.text
    assert "made in transaction 1, the metadata have one made in transaction 3" in caplog.text
    whole = session_on(pool, "thin-2")
    assert len({bytes(whole.read_bytes(block * BLOCK, BLOCK)) for block in range(4)}) == 4
    whole.close()
    # Adopted or dropped by the ordinary commands.
    pool.rename("thin-2", "other")
    pool.create_device("gone", 4 * BLOCK)
    fresh = session_on(pool, "gone")
    assert not any(fresh.read_bytes(0, 4 * BLOCK))
    fresh.close()
    pool.close()
    caplog.clear()
    assert names(path) == {"gone": 3, "kept": 1, "other": 2}
    assert not caplog.text, "it is said once"


def test_yesterdays_metadata_with_todays_names(path: Path, yesterday: Path) -> None:
    shutil.copy(yesterday / "metadata", path / "metadata")
    assert names(path) == {"kept": 1, "thin-2": 2}


def test_where_only_the_moment_differs_all_names_stay(
    yesterday: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = (yesterday / "catalog").read_bytes()
    pool = open_pool(PoolLocation.directory(yesterday))
    pool.create_snapshot("kept", "monday")
    pool.delete("monday")
    pool.close()
    (yesterday / "catalog").write_bytes(saved)
    assert names(yesterday) == {"gone": 2, "kept": 1}
    assert "the names are of transaction 2, the metadata of transaction 4" in caplog.text
    assert "dropped" not in caplog.text


@pytest.fixture
def third_version(path: Path) -> Iterator[Path]:
    """The catalogue as the version before wrote it: without knowing in which transaction a device was made."""
    with sqlite3.connect(path / "catalog") as connection:
        for table in ("device", "staged"):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN made_in")
        connection.execute("DELETE FROM setting WHERE key = 'transaction-id'")
        connection.execute("PRAGMA user_version=3")
    connection.close()
    yield path


def test_a_catalogue_of_the_third_version_is_taken_over(third_version: Path) -> None:
    before = (third_version / "catalog").read_bytes()
    assert names(third_version, read_only=True) == {"kept": 1, "other": 2}
    assert (third_version / "catalog").read_bytes() == before, "who only looks changes nothing"
    assert names(third_version) == {"kept": 1, "other": 2}
    pool = open_pool(PoolLocation.directory(third_version))
    assert [entry.made_in for entry in pool.catalog.entries()] == [0, 3]
    pool.close()


def made_ins(pool: Pool) -> dict[str, int | None]:
    return {entry.name: entry.made_in for entry in pool.catalog.entries()}


def test_every_way_to_make_a_device_notes_when(path: Path) -> None:
    pool = open_pool(PoolLocation.directory(path))
    pool.create_snapshot("kept", "monday")
    pool.rollback("kept", "monday", keep="before")
    pool.rollback("kept", "monday", keep=False)
    frozen = pool.transfers.frozen_copy(pool._entry("kept"))
    records = {record.device_id: record.transaction_id for record in pool.engine.metadata.devices()}
    for entry in pool.catalog.entries():
        assert entry.made_in == records[entry.device_id], entry.name
    assert frozen.name in made_ins(pool)
    pool.close()


def test_records_that_a_repair_made_keep_their_names(path: Path) -> None:
    location = PoolLocation.directory(path)
    metadata = PoolMetadata.open(FileStore(location.metadata_path, writable=True))
    state = metadata.state
    for record in metadata.devices():
        # As `metadata.repair` does where the tree of records is lost.
        made = type(record)(record.device_id, record.mapped_blocks, metadata.transaction_id, 0, metadata.time)
        state.devices.set(made)
    metadata.commit()
    metadata.close()
    assert names(path) == {"kept": 1, "other": 2}

"""Openings that the disk refuses: one sentence, nothing lost, nothing left open, and the next opening works.

Faults at every operation are tried by `tests/property/test_fault_injection.py`; here is what users read.
"""

from __future__ import annotations

import errno
import gc
import os

import pytest

from metadata import FileStore
from tests.unit.test_mapping_journal import kill, location, read, write
from thinpool import opening
from thinpool.catalog import Catalog
from thinpool.data_file import DataFile
from thinpool.errors import (
    CatalogFailed,
    OpeningFailed,
    PoolDamaged,
    RecoveryFailed,
    RecoveryLost,
    ThinPoolError,
)
from thinpool.mapping_journal import Witness
from thinpool.opening import open_pool
from thinpool.pool_location import PoolLocation

__all__ = ["location"]


def refuse(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def killed(location: PoolLocation) -> PoolLocation:
    pool = open_pool(location)
    write(pool, 3, b"answered")
    kill(pool)
    return location


def refused(location: PoolLocation, expected: type[ThinPoolError]) -> str:
    """The sentence of an opening that is refused and leaves no descriptor behind."""
    gc.collect()  # a memory map holds its file until it is collected
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(expected) as caught:
        open_pool(location)
    said = str(caught.value)
    del caught
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    return said


def answered(location: PoolLocation) -> bytes:
    pool = open_pool(location)
    try:
        return read(pool, 3, 8)
    finally:
        pool.close()


def test_an_unreadable_journal_is_no_empty_one(killed: PoolLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(opening, "left_behind", refuse)
        said = refused(killed, RecoveryFailed)
    assert "Input/output error" in said
    assert "move that file away" in said
    assert answered(killed) == b"answered"


def test_moving_an_unreadable_journal_away_opens_the_pool(
    killed: PoolLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert killed.journal_path is not None
    monkeypatch.setattr(opening, "left_behind", refuse)
    killed.journal_path.unlink()
    assert answered(killed) == bytes(8)


def test_a_superblock_that_cannot_be_read_costs_no_answered_write(
    killed: PoolLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Witness, "superblock", refuse)
        refused(killed, RecoveryFailed)
    assert answered(killed) == b"answered"


def test_metadata_that_cannot_be_written_costs_no_answered_write(
    killed: PoolLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "write", refuse)
        assert "nothing is lost yet" in refused(killed, RecoveryFailed)
    assert answered(killed) == b"answered"


def test_data_that_could_not_be_flushed_is_given_up_aloud(
    killed: PoolLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DataFile, "flush", refuse)
        assert "writes that no client had flushed are given up" in refused(killed, RecoveryLost)
    assert answered(killed) == bytes(8)


def test_a_catalogue_that_fails_while_a_step_is_finished(
    location: PoolLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = open_pool(location)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(pool.catalog, "promote", refuse)
        pool.create_snapshot("disk", "monday")
    kill(pool)
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "_apply", lambda catalog, *_, **__: fail_as_sqlite(catalog))
        assert "cannot be used" in refused(location, CatalogFailed)
    pool = open_pool(location)
    assert [entry.name for entry in pool.catalog.entries()] == ["disk", "monday"]
    pool.close()


def fail_as_sqlite(catalog: Catalog) -> None:
    raise CatalogFailed(catalog._path, "disk I/O error")


def test_metadata_that_cannot_be_read(location: PoolLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "read", refuse)
        said = refused(location, OpeningFailed)
    assert said.startswith(f"{location} cannot be opened: Input/output error; nothing is lost by that")
    open_pool(location).close()


def test_damage_found_behind_the_superblock_is_called_damage(location: PoolLocation) -> None:
    pool = open_pool(location)
    details = pool.engine.metadata.superblock.details_root
    pool.close()
    with location.metadata_path.open("r+b") as file:
        file.seek(details * 4096)
        file.write(bytes(4096))
    assert "is damaged" in refused(location, PoolDamaged)


def test_what_cannot_be_released_refuses_the_opening_and_leaves_nothing_open(
    location: PoolLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thinpool.metadata_readers.MetadataReaders.release_left_over", refuse)
    refused(location, OpeningFailed)

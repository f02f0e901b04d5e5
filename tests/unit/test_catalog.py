"""The catalogue: staged rows follow the superblock's transaction id, whatever was cut; damage is told, not repaired."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from thinpool.catalog import Catalog, CatalogEntry, Drop, Put
from thinpool.catalog_room import ROOM_BYTES, ROOM_BYTES_MIN, take_room
from thinpool.errors import CatalogDamaged, DeviceExists

DISK = CatalogEntry(1, "disk", 1 << 20, False, None, 1.5, {"a": "b"})
SNAP = CatalogEntry(2, "disk@1", 1 << 20, True, "disk", 2.5, {})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    catalog = Catalog.create(tmp_path / "catalog")
    catalog.apply([Put(DISK)])
    catalog.close()
    return tmp_path / "catalog"


def reopened(path: Path, transaction_id: int) -> list[CatalogEntry]:
    catalog = Catalog.open(path)
    catalog.recover(transaction_id)
    entries = sorted(catalog.entries(), key=lambda entry: entry.device_id)
    catalog.close()
    return entries


def test_rows_survive_and_round_trip(path: Path):
    assert reopened(path, 0) == [DISK]


@pytest.mark.parametrize(("found", "expected"), [(7, [DISK, SNAP]), (6, [DISK]), (8, [DISK]), (0, [DISK])])
def test_a_cut_between_staging_and_promoting(path: Path, found: int, expected: list[CatalogEntry]):
    catalog = Catalog.open(path)
    catalog.stage(7, [Put(SNAP)])
    assert catalog.by_name("disk@1") is None
    catalog.close()
    assert reopened(path, found) == expected
    assert reopened(path, 7) == expected, "what was dropped stays dropped"


def test_promotion_applies_all_changes_of_the_step(path: Path):
    catalog = Catalog.open(path)
    catalog.apply([Put(SNAP)])
    catalog.stage(9, [Drop(1), Put(replace(SNAP, origin=None)), Put(replace(DISK, device_id=3))])
    catalog.promote(9)
    assert catalog.by_id(1) is None
    assert catalog.by_name("disk") == replace(DISK, device_id=3)
    catalog.close()
    assert reopened(path, 9) == [replace(SNAP, origin=None), replace(DISK, device_id=3)]


def test_discarded_rows_are_gone(path: Path):
    catalog = Catalog.open(path)
    catalog.stage(7, [Put(SNAP)])
    catalog.discard_staged()
    catalog.close()
    assert reopened(path, 7) == [DISK]


def test_a_name_belongs_to_one_device(path: Path):
    catalog = Catalog.open(path)
    with pytest.raises(DeviceExists):
        catalog.apply([Put(replace(SNAP, name="disk"))])
    assert catalog.entries() == [DISK]
    catalog.close()


@pytest.mark.parametrize("name", ["a%s{}", "ü" * 100, "'; DROP TABLE device; --", "x" * 255])
def test_odd_names(path: Path, name: str):
    catalog = Catalog.open(path)
    catalog.apply([Put(replace(SNAP, name=name))])
    catalog.close()
    assert reopened(path, 0)[1].name == name


@pytest.mark.parametrize("content", [b"x", b"x" * 5000, b"SQLite format 3\0" + b"\0" * 5000])
def test_a_file_that_is_no_catalogue(tmp_path: Path, content: bytes):
    path = tmp_path / "catalog"
    path.write_bytes(content)
    with pytest.raises(CatalogDamaged):
        Catalog.open(path)
    assert path.read_bytes() == content


def test_flipped_pages_are_noticed_or_harmless(path: Path):
    raw = bytearray(path.read_bytes())
    for position in range(100, len(raw), 97):
        changed = bytearray(raw)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        try:
            catalog = Catalog.open(path)
        except CatalogDamaged:
            continue
        assert all(isinstance(entry, CatalogEntry) for entry in catalog.entries())
        catalog.close()


def test_a_creation_cut_short_leaves_an_empty_file_that_is_as_good_as_none(tmp_path: Path):
    (tmp_path / "catalog").touch()
    catalog = Catalog.open(tmp_path / "catalog")
    assert catalog.entries() == []
    catalog.apply([Put(DISK)])
    catalog.close()
    assert reopened(tmp_path / "catalog", 0) == [DISK]


FIRST_VERSION = """
CREATE TABLE device (
    device_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, size_bytes INTEGER NOT NULL,
    read_only INTEGER NOT NULL, origin TEXT, created REAL NOT NULL, tags TEXT NOT NULL
) STRICT;
CREATE TABLE staged (
    sequence INTEGER PRIMARY KEY, transaction_id TEXT NOT NULL, device_id INTEGER NOT NULL, dropped INTEGER NOT NULL,
    name TEXT, size_bytes INTEGER, read_only INTEGER, origin TEXT, created REAL, tags TEXT
) STRICT;
CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
INSERT INTO device VALUES (1, 'disk', 1048576, 0, NULL, 1.5, '{"a": "b"}');
INSERT INTO device VALUES (2, 'disk@1', 1048576, 1, 'disk', 2.5, '{}');
INSERT INTO staged VALUES (1, '7', 3, 0, 'disk@2', 1048576, 1, 'disk', 3.5, '{}');
INSERT INTO staged VALUES (2, '7', 1, 1, NULL, NULL, NULL, NULL, NULL, NULL);
PRAGMA application_id=1953001072;
PRAGMA user_version=1;
"""


def first_version(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(FIRST_VERSION)
    connection.close()


def test_a_catalogue_of_the_first_version_is_taken_over(tmp_path: Path):
    path = tmp_path / "catalog"
    first_version(path)
    before = path.read_bytes()
    looked = Catalog.open(path, writable=False)
    seen = looked.entries()
    looked.close()
    assert path.read_bytes() == before, "who only looks changes nothing"
    assert [entry.name for entry in reopened(path, 0)] == ["disk", "disk@1"]
    assert reopened(path, 0) == seen, "the identities that were seen are the ones that stay"
    assert seen[0].content_id is None, "a writable device may have changed"
    assert seen[1].content_id is not None
    assert len({seen[0].uuid, seen[1].uuid, seen[1].content_id}) == 3


def test_what_the_first_version_had_staged_is_promoted(tmp_path: Path):
    path = tmp_path / "catalog"
    first_version(path)
    entries = reopened(path, 7)
    assert [entry.name for entry in entries] == ["disk@1", "disk@2"]
    assert entries[1].content_id is not None


def test_how_far_receiving_got_is_kept(path: Path):
    half = replace(SNAP, receiving='{"position_bytes": 5}', content_id=None)
    catalog = Catalog.open(path)
    catalog.stage(3, [Put(half)])
    catalog.close()
    assert reopened(path, 3) == [DISK, half]


def test_a_catalogue_of_the_second_version_is_taken_over(tmp_path: Path):
    path = tmp_path / "catalog"
    first_version(path)
    connection = sqlite3.connect(path)
    for table in ("device", "staged"):
        for column in ("uuid", "content_id", "receiving"):
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} TEXT")
        connection.execute(f"UPDATE {table} SET uuid = ? WHERE name IS NOT NULL", (SNAP.uuid,))
    connection.execute("PRAGMA user_version=2")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    looked = Catalog.open(path, writable=False)
    assert [entry.reservation_bytes for entry in looked.entries()] == [0, 0]
    looked.close()
    assert path.read_bytes() == before, "who only looks changes nothing"
    entries = reopened(path, 7)
    assert [entry.name for entry in entries] == ["disk@1", "disk@2"]
    assert {entry.uuid for entry in entries} == {SNAP.uuid}, "identities stay"
    catalog = Catalog.open(path)
    catalog.apply([Put(replace(entries[0], reservation_bytes=4096))])
    catalog.close()
    assert [entry.reservation_bytes for entry in reopened(path, 0)] == [4096, 0]


def room_of(path: Path) -> tuple[int, int]:
    """Bytes on free pages of a catalogue, and of its journal."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (pages,) = connection.execute("PRAGMA freelist_count").fetchone()
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    return pages * page_bytes, path.with_name("catalog-journal").stat().st_size


def test_room_is_taken_beforehand_and_by_the_next_to_open(path: Path):
    free_bytes, journal_bytes = room_of(path)
    assert free_bytes >= ROOM_BYTES
    assert journal_bytes >= ROOM_BYTES
    catalog = Catalog.open(path)
    catalog.apply([Put(replace(SNAP, device_id=number, name=f"s{number}")) for number in range(2, 900)])
    assert room_of(path)[0] < ROOM_BYTES_MIN
    catalog.close()
    path.with_name("catalog-journal").unlink()  # a copy without it, or made before there was any room
    catalog = Catalog.open(path)
    assert len(catalog.entries()) == 899
    assert catalog.settings() == {}
    catalog.close()
    assert min(room_of(path)) >= ROOM_BYTES_MIN
    looked = Catalog.open(path, writable=False)
    assert looked.entries() == reopened(path, 0)
    looked.close()


def test_a_journal_that_is_in_use_is_not_lengthened(path: Path):
    journal = path.with_name("catalog-journal")
    journal.unlink()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode=PERSIST")
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO setting VALUES ('somebody', 'else')")
        in_use = journal.read_bytes()
        assert len(in_use) < ROOM_BYTES
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as ours:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                take_room(ours, path)
        assert journal.read_bytes() == in_use
        other.execute("ROLLBACK")
    Catalog.open(path).close()
    assert journal.stat().st_size >= ROOM_BYTES

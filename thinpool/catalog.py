"""The names of a pool's devices, and what dm-thin's metadata has no place for, in one SQLite file.

In: rows by device id (name, size, read-only flag, origin, creation time, tags), settings, and the three-step
protocol that ties a change of rows to a metadata commit. Out: the metadata side of that protocol, and which changes
belong together (`pool.py`).

Theory of operation. `stage` writes the intended rows, stamped with the transaction id the metadata is about to
get, and returns when they are on disk. After the metadata commit `promote` moves them into the table in one SQLite
transaction. On opening, `recover` promotes what is stamped with exactly the id the superblock has and forgets the
rest. Promoting twice has the same effect as once, so a kill at any point leaves one of two states.

Durability: `journal_mode=PERSIST` with `synchronous=EXTRA`. A transaction is over when the head of the journal is
overwritten with zeros and flushed; no name in a directory has to change for it, and no space to be found
(`catalog_room.py`).

All rows are kept in memory as well. Looking up is a dictionary access, safe from every thread; changes take a lock.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .catalog_room import take_room
from .catalog_rows import (
    COLUMNS,
    COLUMNS_COUNT,
    CatalogEntry,
    Change,
    Drop,
    Put,
    device_id_of,
    entry_of,
    identities_of_first_version,
    row_of,
    staged_row_of,
)
from .errors import CatalogDamaged, CatalogFailed, DeviceExists, NoSpace

__all__ = ["Catalog", "CatalogEntry", "Change", "Drop", "Put"]

MEMORY = ":memory:"
APPLICATION_ID = 0x74686E70  # "thnp", in the SQLite header: file(1) and we tell it from other databases
SCHEMA_VERSION = 4
TRANSACTION = "transaction-id"  # beside the settings: the metadata's, when a change of both was done last
BUSY_TIMEOUT_SECONDS = 5.0
HEADER = struct.Struct(
    ">68sI28x"
)  # sqlite.org/fileformat2.html 1.3: the application id is at offset 68 of 100
assert HEADER.size == 100
SCHEMA = """
CREATE TABLE device (
    device_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, size_bytes INTEGER NOT NULL,
    read_only INTEGER NOT NULL, origin TEXT, created REAL NOT NULL, tags TEXT NOT NULL,
    uuid TEXT, content_id TEXT, receiving TEXT, reservation_bytes INTEGER NOT NULL DEFAULT 0,
    made_in TEXT
) STRICT;
CREATE TABLE staged (
    sequence INTEGER PRIMARY KEY, transaction_id TEXT NOT NULL, device_id INTEGER NOT NULL, dropped INTEGER NOT NULL,
    name TEXT, size_bytes INTEGER, read_only INTEGER, origin TEXT, created REAL, tags TEXT,
    uuid TEXT, content_id TEXT, receiving TEXT, reservation_bytes INTEGER DEFAULT 0, made_in TEXT
) STRICT;
CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""
PLACES = ", ".join(["?"] * COLUMNS_COUNT)
STAGED_PLACES = f"?, ?, {PLACES}"


class Catalog:
    """An open catalogue.

    Raises CatalogDamaged, CatalogFailed, NoSpace, and DeviceExists for changes that would make a duplicate name.
    """

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self._connection = connection
        self._path = path
        self._lock = threading.Lock()
        self._by_id: dict[int, CatalogEntry] = {}
        self._by_name: dict[str, CatalogEntry] = {}

    # --- opening and closing ---

    @classmethod
    def create(cls, path: Path | str) -> Catalog:
        """Make an empty catalogue, in memory for ":memory:". Raises FileExistsError."""
        if str(path) == MEMORY:
            catalog = cls(_connect(MEMORY), MEMORY)
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.close(descriptor)
            catalog = cls(_connect(_uri(Path(path))), str(path))
        with catalog._failing():
            catalog._initialise()
            catalog._take_room()
        return catalog

    @classmethod
    def open(cls, path: Path | str, *, writable: bool = True) -> Catalog:
        """Open and verify a catalogue. Unless `writable`, changes stay in memory and the file is not touched."""
        _check_header(Path(path))
        with _failing(str(path)):
            connection = _connect(_uri(Path(path))) if writable else _private_copy(Path(path))
        catalog = cls(connection, str(path))
        try:
            with catalog._failing():
                catalog._verify()
                catalog._load()
                if writable:
                    catalog._take_room()
        except BaseException:
            connection.close()
            raise
        return catalog

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            self._connection.close()

    # --- looking up ---

    def entries(self) -> list[CatalogEntry]:
        """Return all devices, ascending id."""
        return list(self._by_id.values())

    def by_name(self, name: str) -> CatalogEntry | None:
        """Return the device of that name."""
        return self._by_name.get(name)

    def by_id(self, device_id: int) -> CatalogEntry | None:
        """Return the device of that id."""
        return self._by_id.get(device_id)

    # --- changes tied to a metadata commit ---

    def stage(self, transaction_id: int, changes: Sequence[Change]) -> None:
        """Make the intention durable: on disk before this returns. Forgets what was staged before."""
        self._resulting(changes)  # a duplicate name is refused before anything is written
        with self._transaction():
            self._connection.execute("DELETE FROM staged")
            self._connection.executemany(
                f"INSERT INTO staged VALUES (NULL, {STAGED_PLACES})",  # noqa: S608
                [staged_row_of(transaction_id, change) for change in changes],
            )

    def promote(self, transaction_id: int) -> None:
        """Apply what is staged for that id and forget all intentions, in one SQLite transaction."""
        with self._failing():
            changes = self._staged(transaction_id)
        self._apply(changes, promoted=transaction_id)

    def assume(self, changes: Sequence[Change]) -> None:
        """Know the rows after changes that are staged and whose metadata is committed, where they cannot be promoted.

        In memory only; `recover` promotes them when the pool is opened next.
        """
        self._remember(self._resulting(changes))

    def discard_staged(self) -> None:
        """Forget all intentions."""
        with self._transaction():
            self._connection.execute("DELETE FROM staged")

    def recover(self, superblock_transaction_id: int) -> None:
        """After opening: finish the change the metadata has committed, forget others. Usually writes nothing."""
        with self._failing(), self._lock:
            pending = self._connection.execute("SELECT count(*) FROM staged").fetchone()[0]
        if pending:
            self.promote(superblock_transaction_id)

    @property
    def transaction_id(self) -> int | None:
        """The metadata's transaction id when a change of both was done last; None where none was yet."""
        noted = self.setting(TRANSACTION)
        return int(noted) if noted is not None and noted.isascii() and noted.isdecimal() else None

    def note_transaction(self, transaction_id: int) -> None:
        """Take the metadata's present transaction id for that of the rows."""
        with self._transaction():
            self._note_transaction(transaction_id)

    # --- changes of the catalogue alone ---

    def apply(self, changes: Sequence[Change]) -> None:
        """Change rows in one durable SQLite transaction. The order of the changes does not matter to names."""
        self._apply(changes)

    def settings(self) -> dict[str, str]:
        """Return all pool settings."""
        with self._failing(), self._lock:
            rows = self._connection.execute("SELECT key, value FROM setting").fetchall()
        return {str(key): str(value) for key, value in rows}

    def setting(self, key: str) -> str | None:
        """Return one of them."""
        return self.settings().get(key)

    def set_setting(self, key: str, value: str | None) -> None:
        """Store one, or remove it with None."""
        self.set_settings({key: value})

    def set_settings(self, changes: Mapping[str, str | None]) -> None:
        """Store pool settings durably, all of them or none; None removes one."""
        with self._transaction():
            for key, value in changes.items():
                if value is None:
                    self._connection.execute("DELETE FROM setting WHERE key = ?", (key,))
                else:
                    self._connection.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (key, value))

    # --- inside ---

    def _apply(self, changes: Sequence[Change], *, promoted: int | None = None) -> None:
        resulting = self._resulting(changes)
        # By id, the last change of each counts; removed first and inserted then, so that names may change hands.
        final = {device_id_of(change): change for change in changes}
        with self._transaction():
            self._connection.executemany("DELETE FROM device WHERE device_id = ?", [(key,) for key in final])
            self._connection.executemany(
                f"INSERT INTO device VALUES ({PLACES})",  # noqa: S608
                [row_of(change.entry) for change in final.values() if isinstance(change, Put)],
            )
            if promoted is not None:
                self._connection.execute("DELETE FROM staged")
                self._note_transaction(promoted)
        self._remember(resulting)

    def _note_transaction(self, transaction_id: int) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO setting VALUES (?, ?)", (TRANSACTION, str(transaction_id))
        )

    def _resulting(self, changes: Sequence[Change]) -> dict[int, CatalogEntry]:
        """The rows after `changes`. Raises DeviceExists where two would have one name."""
        rows = dict(self._by_id)
        for change in changes:
            if isinstance(change, Put):
                rows[change.entry.device_id] = change.entry
            else:
                rows.pop(change.device_id, None)
        owners: dict[str, int] = {}
        for entry in rows.values():
            if owners.setdefault(entry.name, entry.device_id) != entry.device_id:
                raise DeviceExists(entry.name)
        return rows

    def _remember(self, rows: dict[int, CatalogEntry]) -> None:
        # New dictionaries, put in place whole: readers in other threads see the old ones or the new ones.
        self._by_id = dict(sorted(rows.items()))
        self._by_name = {entry.name: entry for entry in rows.values()}

    def _staged(self, transaction_id: int) -> list[Change]:
        with self._lock:
            rows = self._connection.execute(
                f"SELECT dropped, {COLUMNS} FROM staged WHERE transaction_id = ? ORDER BY sequence",  # noqa: S608
                (str(transaction_id),),
            ).fetchall()
        return [Drop(row[1]) if row[0] else Put(entry_of(row[1:])) for row in rows]

    def _initialise(self) -> None:
        self._connection.executescript(
            f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id={APPLICATION_ID}; "
            f"PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
        )

    def _verify(self) -> None:
        if self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,):
            self._initialise()  # a kill between making the file and its first commit
        (found,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise CatalogDamaged(self._path, str(found))
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if 1 <= version < SCHEMA_VERSION:
            self._take_over(version)
            version = SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise CatalogDamaged(self._path, f"its version is {version}, this program knows {SCHEMA_VERSION}")

    def _take_over(self, version: int) -> None:
        """Bring rows of an earlier version to this one, in one transaction: a kill leaves the one or the other."""
        with self._transaction():
            if version == 1:
                self._give_identities()
            if version <= 2:
                self._connection.execute(
                    "ALTER TABLE device ADD COLUMN reservation_bytes INTEGER NOT NULL DEFAULT 0"
                )
                self._connection.execute("ALTER TABLE staged ADD COLUMN reservation_bytes INTEGER DEFAULT 0")
            for table in ("device", "staged"):
                self._connection.execute(f"ALTER TABLE {table} ADD COLUMN made_in TEXT")
            self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _give_identities(self) -> None:
        for table in ("device", "staged"):
            for column in ("uuid", "content_id", "receiving"):
                self._connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} TEXT")
            rows = self._connection.execute(
                f"SELECT rowid, device_id, name, read_only, created FROM {table} WHERE name IS NOT NULL"  # noqa: S608
            ).fetchall()
            self._connection.executemany(
                f"UPDATE {table} SET uuid = ?, content_id = ? WHERE rowid = ?",  # noqa: S608
                [(*identities_of_first_version(row[1:]), row[0]) for row in rows],
            )

    def _take_room(self) -> None:
        if self._path != MEMORY:
            take_room(self._connection, Path(self._path))

    def _load(self) -> None:
        rows = self._connection.execute(f"SELECT {COLUMNS} FROM device").fetchall()  # noqa: S608
        self._remember({row[0]: entry_of(row) for row in rows})

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One SQLite transaction under the lock: committed and on disk at the end, or not done."""
        with self._lock, self._failing():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _failing(self) -> contextlib.AbstractContextManager[None]:
        return _failing(self._path)


@contextlib.contextmanager
def _failing(path: str) -> Iterator[None]:
    """SQLite's exceptions as ours."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary result code
        if code == sqlite3.SQLITE_FULL:
            raise NoSpace(
                what="the catalogue", needed_bytes=os.sysconf("SC_PAGE_SIZE"), free_bytes=_free_bytes(path)
            ) from error
        if code in (
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_BUSY,
        ):
            raise CatalogFailed(path, str(error)) from error
        raise CatalogDamaged(path, str(error)) from error
    except (ValueError, TypeError, IndexError) as error:
        raise CatalogDamaged(path, f"a row does not make sense: {error}") from error


def _check_header(path: Path) -> None:
    """Refuse what is no catalogue before SQLite opens it, which could already change a foreign file."""
    if not path.is_file():
        raise CatalogDamaged(str(path), "it is not a file")
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if not header:
        return
    if len(header) < HEADER.size or not header.startswith(b"SQLite format 3\0"):
        raise CatalogDamaged(str(path), "it is not an SQLite database")
    if HEADER.unpack(header)[1] != APPLICATION_ID:
        raise CatalogDamaged(str(path), "it is another program's database")


def _free_bytes(path: str) -> int:
    try:
        figures = os.statvfs(path)
    except OSError:
        return 0
    return figures.f_bavail * figures.f_frsize


def _uri(path: Path) -> str:
    return path.absolute().as_uri() + "?mode=rw"


def _connect(target: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        target,
        uri=target != MEMORY,
        isolation_level=None,  # we say BEGIN and COMMIT ourselves
        check_same_thread=False,  # every use is under the catalogue's lock
        timeout=BUSY_TIMEOUT_SECONDS,
    )
    try:
        connection.execute("PRAGMA trusted_schema=OFF")  # the file may come from anywhere
        connection.execute("PRAGMA journal_mode=PERSIST")
        connection.execute("PRAGMA synchronous=EXTRA")
    except BaseException:
        connection.close()
        raise
    return connection


def _private_copy(path: Path) -> sqlite3.Connection:
    """The catalogue in memory. A journal left by a kill is rolled back in a copy, not in the file."""
    with tempfile.TemporaryDirectory(prefix="thinpool-catalog-") as scratch:
        copy = Path(scratch, "catalog")
        copy.write_bytes(path.read_bytes())
        journal = path.with_name(path.name + "-journal")
        if journal.exists():
            copy.with_name("catalog-journal").write_bytes(journal.read_bytes())
        memory = _connect(MEMORY)
        try:
            with contextlib.closing(_connect(_uri(copy))) as source:
                source.backup(memory)
        except BaseException:
            memory.close()
            raise
    return memory

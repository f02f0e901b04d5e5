"""What this host knows to be in a store: a cache of chunk names, so that nothing is sent twice.

In: the SQLite file in the user's cache directory, filled by this host's pushes and by the indices of others. Out:
whether a pack is still there (`push.py` asks the store before it believes any of this).

Losing it costs sending what is there already, nothing else; a damaged one is thrown away. It is also what an
interrupted push resumes from: a pack is remembered as soon as the store has it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from .segments import Place

SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk (
    name BLOB PRIMARY KEY, pack BLOB NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY) STRICT;
CREATE TABLE IF NOT EXISTS pushed (device TEXT PRIMARY KEY, name TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS unfinished (push TEXT PRIMARY KEY) STRICT;
"""
MEMORY = ":memory:"
BUSY_SECONDS = 30.0


def cache_path(store_id: str) -> Path:
    """Where the cache of a store is: below XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 -- no home is no error
    return Path(home, "thinpool", f"{store_id}.sqlite")


class KnownChunks:
    """Thread-safe. Never raises: without a file it lives in memory."""

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        try:
            self._connection = _connect(path)
        except (sqlite3.Error, OSError):
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            try:
                self._connection = _connect(path)
            except (sqlite3.Error, OSError):
                self._connection = _connect(None)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def find(self, name: bytes) -> Place | None:
        """Where a chunk was seen last."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            row = self._connection.execute(
                "SELECT pack, offset, length FROM chunk WHERE name = ?", (name,)
            ).fetchone()
            return None if row is None else Place(row[0], row[1], row[2], name)
        return None

    def add(self, places: Iterable[Place], *, seen: str | None = None) -> None:
        """Remember chunks, and that the index `seen` was read."""
        with self._changing():
            self._connection.executemany(
                "INSERT OR REPLACE INTO chunk VALUES (?, ?, ?, ?)",
                [(place.name, place.pack, place.offset, place.length_bytes) for place in places],
            )
            if seen is not None:
                self._connection.execute("INSERT OR REPLACE INTO seen VALUES (?)", (seen,))

    def seen(self) -> set[str]:
        """Indices that were read."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            return {row[0] for row in self._connection.execute("SELECT key FROM seen")}
        return set()

    def remember_push(self, device: str, name: str) -> None:
        """Note that a device of this host is in the store under a name."""
        with self._changing():
            self._connection.execute("INSERT OR REPLACE INTO pushed VALUES (?, ?)", (device, name))

    def pushed_as(self, device: str) -> str | None:
        """The name under which a device was pushed last."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            row = self._connection.execute("SELECT name FROM pushed WHERE device = ?", (device,)).fetchone()
            return None if row is None else str(row[0])
        return None

    def begin(self, push: str) -> list[str]:
        """Note a push that begins; return those that never ended."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            before = [row[0] for row in self._connection.execute("SELECT push FROM unfinished")]
            self._connection.execute("INSERT OR REPLACE INTO unfinished VALUES (?)", (push,))
            return before
        return []

    def end(self, pushes: Iterable[str]) -> None:
        """Forget pushes that ended."""
        with self._changing():
            self._connection.executemany("DELETE FROM unfinished WHERE push = ?", [(p,) for p in pushes])

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """One transaction; a cache that cannot be written is no failure of the push."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except sqlite3.Error:
                self._connection.execute("ROLLBACK")


def _connect(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(
        MEMORY if path is None else path,
        isolation_level=None,
        check_same_thread=False,
        timeout=BUSY_SECONDS,
    )
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=OFF")  # losing it costs time only
        connection.executescript(SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection

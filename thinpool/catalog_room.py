"""Room for changes of names on a full disk: pages in the catalogue's file and in its journal, taken beforehand.

In: how much, taking it. Out: what is written into it (`catalog.py`).

On a full disk people delete snapshots, and that is a change of names. SQLite takes new rows from free pages of its file
first, and with `journal_mode=PERSIST` writes its rollback journal over the old one, so nothing has to be allocated as
long as both have room. Pages come free by a row that is written and deleted; the journal is made of zeros, which SQLite
takes for a journal that is over (sqlite.org/fileformat2.html, "The Rollback Journal"). A file system that writes
everything to new places (btrfs, ZFS) keeps no such promise, and there a full disk refuses changes as any would.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from pathlib import Path

ROOM_BYTES = 128 << 10
# Once this little is left, the next opening takes more.
ROOM_BYTES_MIN = ROOM_BYTES // 2
_KEY = "room"

log = logging.getLogger("thinpool")


def take_room(connection: sqlite3.Connection, path: Path) -> None:
    """See that a catalogue has room; where the disk is full by now it stays as it is. Raises sqlite3.Error."""
    try:
        _lengthen_journal(connection, path.with_name(path.name + "-journal"))
        _free_pages(connection)
    except (OSError, sqlite3.Error) as error:
        if not _is_full(error):
            raise
        log.warning("no room is left to set aside for changes of names: %s", error)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary result code
    return bool(code == sqlite3.SQLITE_FULL)


def _lengthen_journal(connection: sqlite3.Connection, journal: Path) -> None:
    """What a kill left in the journal was rolled back when the catalogue was read."""
    if _size_bytes(journal) >= ROOM_BYTES:
        return
    # The lock of the pool keeps out our own kind, and this whoever looks into the file with another program: a journal
    # that is in use must not be touched. Until we write a row SQLite has no use for it.
    connection.execute("BEGIN IMMEDIATE")
    try:
        _append_zeros(journal)
    finally:
        connection.execute("ROLLBACK")


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _append_zeros(journal: Path) -> None:
    descriptor = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while (present := os.fstat(descriptor).st_size) < ROOM_BYTES:
            os.pwrite(descriptor, bytes(ROOM_BYTES - present), present)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_pages(connection: sqlite3.Connection) -> None:
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    if free * page_bytes >= ROOM_BYTES_MIN:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (_KEY, " " * ROOM_BYTES))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("DELETE FROM setting WHERE key = ?", (_KEY,))

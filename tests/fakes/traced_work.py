"""The work of a process that is traced: a pool is made and everything done to it once, marking what is promised.

Run as a program with the path of the pool, and perhaps the name of a deliberate mistake. A mark is an access to a path that does not exist, so that it stands in
the trace among the other system calls; it carries the worlds that may be found from there on.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

from tests.fakes.traced_files import MARK
from thinpool import catalog, opening
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation

BLOCK = 65536
# By name: the size in bytes, and the bytes that a sector of the first block may be filled with.
World = dict[str, tuple[int, list[int]]]


class Work:
    """The pool and what is promised of it. None among the worlds: there may be no pool."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.world: World = {}

    def may_be(self, *worlds: World | None) -> None:
        os.access(MARK + json.dumps(worlds), os.F_OK)

    def step(self, act: Any, **changes: tuple[int, list[int]] | None) -> None:
        """Change names in one step: afterwards the world has `changes`, None taking a name away."""
        after = {name: device for name, device in {**self.world, **changes}.items() if device is not None}
        self.may_be(self.world, after)
        act()
        self.world = after
        self.may_be(after)

    def fill(self, pool: Pool, name: str, value: int) -> None:
        """Fill the first block and flush."""
        size_bytes, values = self.world[name]
        entry = pool.catalog.by_name(name)
        assert entry is not None
        session = pool.open_session(entry)
        self.may_be({**self.world, name: (size_bytes, [*values, value])})
        session.enter()
        try:
            session.write(0, memoryview(bytes([value]) * BLOCK))
        finally:
            session.leave()
        session.flush()
        self.world = {**self.world, name: (size_bytes, [value])}
        self.may_be(self.world)
        session.close()

    def run(self) -> None:
        """Everything once."""
        self.may_be(None, {})
        create_pool(self.path, size_bytes=64 * BLOCK, metadata_bytes=2 << 20)
        self.may_be({})
        pool = open_pool(PoolLocation.directory(self.path))
        small, large = 4 * BLOCK, 6 * BLOCK
        self.step(lambda: pool.create_device("a", small), a=(small, [0]))
        self.fill(pool, "a", 0x11)
        self.step(lambda: pool.create_snapshot("a", "s"), s=(small, [0x11]))
        self.fill(pool, "a", 0x22)
        self.step(lambda: pool.rename("s", "t"), s=None, t=(small, [0x11]))
        self.step(lambda: pool.resize("a", large), a=(large, [0x22]))
        pool.grow(80 * BLOCK, 3 << 20)
        self.step(lambda: pool.rollback("a", "t", keep="k"), a=(small, [0x11]), k=(large, [0x22]))
        self.step(lambda: pool.delete("k"), k=None)
        self.step(lambda: pool.resize("a", BLOCK, shrink=True), a=(BLOCK, [0x11]))
        self.step(lambda: pool.delete("t"), t=None)
        pool.close()
        pool = open_pool(PoolLocation.directory(self.path))
        self.fill(pool, "a", 0x33)
        pool.close()


def careless_sqlite(*pragmas: str) -> None:
    """The catalogue with other settings of SQLite than it needs."""
    connect = catalog._connect

    def careless(target: str) -> sqlite3.Connection:
        connection = connect(target)
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
        return connection

    catalog._connect = careless


def new_names_not_synced() -> None:
    """A pool that is made without flushing the directories it is made in."""
    opening._sync_directory = lambda _path: None


MISTAKES = {
    "synchronous-off": lambda: careless_sqlite("synchronous=OFF"),
    # FULL leaves the deletion of a journal unsynced; as long as it is overwritten instead, nothing is to be synced.
    "journal-deleted": lambda: careless_sqlite("journal_mode=DELETE", "synchronous=FULL"),
    "new-names-not-synced": new_names_not_synced,
}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        MISTAKES[name]()
    Work(Path(sys.argv[1])).run()

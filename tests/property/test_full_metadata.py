"""Pools whose metadata is full, by random histories: deleting, discarding and rolling back work, however they got there.

The disk is the simulated one, so nothing waits; the data are as full as they come to be. Discards of what a snapshot
shares cost metadata themselves (a leaf has to be copied), so of these only so many fit; the test holds that the others
never fail, that deletions and rollbacks never do, and that what is left is whole.
"""

from __future__ import annotations

import errno
import os
from random import Random

import pytest

from metadata import MetadataFull, recount
from tests.fakes.disk_history import Contents
from tests.fakes.simulated_disk import SimulatedDisk
from thinpool.pool import Pool

BLOCK = 65536
DEVICE_BLOCKS = 60_000
SEEDS = range(int(os.environ.get("THINPOOL_FULL_SEEDS", "4")))


class History:
    """Random changes until nothing that adds something fits any more."""

    def __init__(self, pool: Pool, random: Random) -> None:
        self.pool = pool
        self.random = random
        self.number = 0

    def names(self) -> list[str]:
        return [entry.name for entry in self.pool.catalog.entries()]

    def write(self) -> None:
        """Scattered first writes, so that leaves are many."""
        name = self.random.choice(self.names())
        session = self.pool.open_session(self.pool.catalog.by_name(name))  # type: ignore[arg-type]
        step, first = self.random.choice((1, 7, 97, 997)), self.random.randrange(DEVICE_BLOCKS)
        try:
            for index in range(self.random.randrange(1, 120)):
                block = (first + index * step) % DEVICE_BLOCKS
                session.enter()
                try:
                    session.write(block * BLOCK, memoryview(b"x" * 512))
                finally:
                    session.leave()
                    session.sent()
        finally:
            session.close()
        if self.random.random() < 0.5:
            self.pool.commit()

    def create(self) -> None:
        self.number += 1
        self.pool.create_device(f"d{self.number}", DEVICE_BLOCKS * BLOCK)

    def snapshot(self) -> None:
        self.number += 1
        self.pool.create_snapshot(self.random.choice(self.names()), f"s{self.number}")

    def fill(self) -> None:
        """Go on until every kind of addition has been refused, several times in a row."""
        self.create()
        refused = 0
        while refused < 12:
            act = self.random.choices((self.write, self.snapshot, self.create), (6, 3, 1))[0]
            try:
                act()
                refused = 0
            except MetadataFull:
                refused += 1
            except OSError as error:
                assert error.errno == errno.ENOSPC
                refused += 1

    def discard(self, *, whole: bool) -> None:
        name = self.random.choice(self.names())
        session = self.pool.open_session(self.pool.catalog.by_name(name))  # type: ignore[arg-type]
        first = 0 if whole else self.random.randrange(DEVICE_BLOCKS)
        length = DEVICE_BLOCKS - first if whole else self.random.randrange(1, DEVICE_BLOCKS - first + 1)
        try:
            session.trim(first * BLOCK, length * BLOCK)
        finally:
            session.close()

    def rollback(self) -> None:
        names = self.names()
        if len(names) > 1:
            name, source = self.random.sample(names, 2)
            self.pool.rollback(name, source, keep=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_deletions_and_rollbacks_always_work(seed: int) -> None:
    random = Random(seed)
    disk = SimulatedDisk(Contents(), metadata_blocks=random.choice((200, 256, 400)))
    disk.format(data_blocks=random.choice((300, 20_000)))
    pool = disk.open()
    history = History(pool, random)
    history.fill()
    # In order of what each costs: discards of whole devices, rollbacks, deletions, in any mixture.
    for _ in range(8):
        history.rollback()
    for _ in range(12):
        random.choice((history.rollback, lambda: history.discard(whole=True)))()
    for _ in range(30):
        try:
            history.discard(whole=False)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # a leaf that is shared had to be copied
    for _ in range(4):
        history.rollback()
    while names := history.names():
        if len(names) > 2 and random.random() < 0.3:
            history.rollback()
        pool.delete(random.choice(names))
    assert recount(pool.engine.metadata) == []
    pool.commit()
    status = pool.status()
    assert status.data_used_bytes == 0
    assert pool.engine.failure is None
    history.create()
    assert pool.engine.make_space()  # everything is as before
    assert recount(pool.engine.metadata) == []
    pool.close()
    disk.close()

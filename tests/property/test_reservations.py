"""Devices with reservations in small pools, by random histories: a promise holds, and nobody is refused without need.

What is true is counted apart from the engine, from the mappings of all devices. After every change: the promises are
covered by what is free; the engine counts no block for a device that it does not have for itself; it refuses a write, a
reservation or a snapshot only where the promises to others leave too little; a device always fills its reservation.
Kills (with a journal) and power cuts come in between, with what was not committed lost or partly there.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from metadata import recount
from tests.fakes.disk_history import Contents, Replay
from tests.fakes.simulated_disk import SimulatedDisk
from thinpool import reservations
from thinpool.catalog import CatalogEntry
from thinpool.errors import BadReservation, ReservationNotCovered
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation

BLOCK = 65536
SEEDS = range(int(os.environ.get("THINPOOL_RESERVATION_SEEDS", "40")))
STEPS = 90


@pytest.fixture(autouse=True)
def counted_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a moment must not make counting look too dear to be done again at once."""
    monkeypatch.setattr(reservations, "MEASURE_SECONDS", 600.0)


def write(pool: Pool, entry: CatalogEntry, index: int) -> bool:
    """Write into one block as a connection does; whether there was space."""
    session = pool.open_session(entry)
    try:
        for last in (False, True):
            session.enter()
            try:
                session.write(index * BLOCK, memoryview(b"x" * 512))
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                return True
            finally:
                session.leave()
                session.sent()
            if last or not session.wait_for_space():
                return False
        return False
    finally:
        session.close()


class Truth:
    """What each device has for itself and what is promised, from the mappings alone; the state is committed before."""

    def __init__(self, pool: Pool) -> None:
        pool.commit()
        pool.engine.reclaim()
        metadata = pool.engine.metadata
        blocks: dict[int, list[int]] = {}
        for entry in pool.catalog.entries():
            leaves = [values >> np.uint64(24) for _, values in metadata.mappings(entry.device_id)]
            blocks[entry.device_id] = [int(block) for leaf in leaves for block in leaf]
        holders = Counter(block for held in blocks.values() for block in held)
        self.free = metadata.data_blocks - len(holders)
        self.owned = {number: sum(holders[b] == 1 for b in held) for number, held in blocks.items()}
        self.reserved = {e.device_id: -(-e.reservation_bytes // BLOCK) for e in pool.catalog.entries()}
        self.left = {number: max(self.reserved[number] - self.owned[number], 0) for number in blocks}

    def free_for(self, device_id: int | None) -> int:
        """Blocks a device can have, or a new one."""
        return self.free - sum(left for number, left in self.left.items() if number != device_id)


class History:
    """Random changes of one pool, each judged by the truth before and after."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.disk = SimulatedDisk(Contents(), metadata_blocks=600)
        self.disk.format(data_blocks=random.choice((12, 24, 40)))
        self.pool = self.disk.open()
        self.number = 0
        self.refused = Counter[str]()

    def entry(self, *, writable: bool = False) -> CatalogEntry | None:
        entries = [e for e in self.pool.catalog.entries() if not (writable and e.read_only)]
        return self.random.choice(entries) if entries else None

    def name(self) -> str:
        self.number += 1
        return f"d{self.number}"

    def create(self) -> None:
        size, reserved = self.random.randint(1, 24), self.random.choice((0, 0, 2, 5, 9))
        reserved = min(size, reserved)
        try:
            self.pool.create_device(self.name(), size * BLOCK, reservation_bytes=reserved * BLOCK)
        except ReservationNotCovered:
            self.refused["create"] += 1
            assert reserved > Truth(self.pool).free_for(None)

    def reserve(self) -> None:
        entry = self.entry(writable=True)
        if entry is None:
            return
        size = min(
            entry.size_bytes, self.random.choice((0, 1, 3, 8, 16)) * BLOCK - self.random.choice((0, 512))
        )
        try:
            self.pool.reserve(entry.name, max(size, 0))
        except ReservationNotCovered as error:
            self.refused["reserve"] += 1
            truth = Truth(self.pool)
            assert error.free_bytes == max(truth.free_for(entry.device_id), 0) * BLOCK
            assert error.needed_bytes == -(-size // BLOCK) * BLOCK - truth.owned[entry.device_id] * BLOCK
            assert error.needed_bytes > error.free_bytes

    def write(self) -> None:
        entry = self.entry(writable=True)
        if entry is None:
            return
        blocks = -(-entry.size_bytes // BLOCK)
        for _ in range(self.random.randint(1, 10)):
            if not write(self.pool, entry, self.random.randrange(blocks)):
                self.refused["write"] += 1
                assert Truth(self.pool).free_for(entry.device_id) <= 0
                return

    def discard(self) -> None:
        entry = self.entry(writable=True)
        if entry is not None:
            session = self.pool.open_session(entry)
            first = self.random.randrange(-(-entry.size_bytes // BLOCK)) * BLOCK
            length = min(self.random.randint(1, 12) * BLOCK, entry.size_bytes - first)
            session.trim(first, length)
            session.close()

    def snapshot(self) -> None:
        entry = self.entry()
        if entry is None:
            return
        try:
            self.pool.create_snapshot(entry.name, self.name(), read_only=self.random.random() < 0.5)
        except ReservationNotCovered:
            self.refused["snapshot"] += 1
            truth = Truth(self.pool)
            assert truth.reserved[entry.device_id] > truth.free_for(entry.device_id)

    def rollback(self) -> None:
        entry, source = self.entry(), self.entry()
        if entry is None or source is None or entry.device_id == source.device_id:
            return
        keep = self.name() if self.random.random() < 0.5 else False
        try:
            self.pool.rollback(entry.name, source.name, keep=keep)
        except ReservationNotCovered:
            self.refused["rollback"] += 1
            assert keep or source.reservation_bytes, "throwing away the prior state is always covered"

    def delete(self) -> None:
        entry = self.entry()
        if entry is not None:
            self.pool.delete(entry.name)

    def resize(self) -> None:
        entry = self.entry(writable=True)
        if entry is not None:
            self.pool.resize(entry.name, self.random.randint(1, 24) * BLOCK, shrink=True)

    def grow(self) -> None:
        if self.pool.status().data_bytes < 60 * BLOCK:
            self.pool.grow(self.pool.status().data_bytes + 2 * BLOCK)

    def commit(self) -> None:
        self.pool.commit()
        self.pool.engine.reclaim()

    def abandon(self) -> None:
        self.pool._closed = True
        self.pool.engine.data.close()
        assert self.pool.engine.journal is not None
        self.pool.engine.journal.close()

    def reopen(self) -> None:
        self.pool.close()
        self.pool = self.disk.open()

    def kill(self) -> None:
        self.abandon()
        self.pool = self.disk.open()

    def power_cut(self) -> None:
        self.abandon()
        replay = Replay(self.disk.start.copy())
        for event in self.disk.events:
            replay.apply(event)
        image = replay.cut(
            np.random.default_rng(self.random.randrange(1 << 30)), self.random.random(), torn=True
        )
        contents = self.disk.contents
        self.disk.close()
        self.disk = SimulatedDisk(contents, image)
        self.pool = self.disk.open()

    def fill_a_reservation(self) -> None:
        """A device can have all that is reserved for it, now."""
        truth = Truth(self.pool)
        entries = [e for e in self.pool.catalog.entries() if truth.left[e.device_id] and not e.read_only]
        if not entries:
            return
        entry = self.random.choice(entries)
        for index in range(-(-entry.size_bytes // BLOCK)):
            if Truth(self.pool).owned[entry.device_id] >= truth.reserved[entry.device_id]:
                return
            assert write(self.pool, entry, index)
        assert Truth(self.pool).owned[entry.device_id] >= truth.reserved[entry.device_id]

    def check(self) -> None:
        truth, engine = Truth(self.pool), self.pool.engine
        assert sum(truth.left.values()) <= truth.free, "more is promised than there is"
        claims = {number: engine.reservations.of(number) for number in truth.left}
        assert {number for number, claim in claims.items() if claim} == {
            n for n, b in truth.reserved.items() if b
        }
        for number, claim in claims.items():
            if claim is not None:
                assert claim.blocks == truth.reserved[number]
                assert claim.owned <= truth.owned[number], "a block counts that is not the device's own"
        assert engine.free.promised == sum(claim.left for claim in claims.values() if claim)
        assert engine.free.free_blocks == truth.free
        if self.random.random() < 0.3:
            engine.reservations.changed(much=True)
            assert self.pool.status().data_reserved_bytes == sum(truth.left.values()) * BLOCK

    def run(self) -> None:
        weights = {
            self.write: 14,
            self.create: 3,
            self.reserve: 4,
            self.discard: 4,
            self.snapshot: 4,
            self.rollback: 2,
            self.delete: 3,
            self.resize: 1,
            self.grow: 0.2,
            self.commit: 2,
            self.reopen: 1,
            self.kill: 1,
            self.power_cut: 1,
            self.fill_a_reservation: 2,
        }
        for _ in range(STEPS):
            self.random.choices(list(weights), list(weights.values()))[0]()
            if self.random.random() < 0.4:
                self.check()
        self.check()
        assert recount(self.pool.engine.metadata) == []
        assert self.pool.engine.failure is None


@pytest.mark.parametrize("seed", SEEDS)
def test_promises_hold_and_nobody_is_refused_without_need(seed: int) -> None:
    history = History(Random(seed))
    history.run()
    history.pool.close()
    history.disk.close()


def test_the_histories_come_to_every_kind_of_refusal() -> None:
    refused = Counter[str]()
    for seed in range(1000, 1012):
        history = History(Random(seed))
        history.run()
        refused += history.refused
        history.pool.close()
        history.disk.close()
    assert refused.keys() == {"create", "reserve", "write", "snapshot", "rollback"}


def test_a_device_fills_its_reservation_while_others_take_what_they_can(tmp_path: Path) -> None:
    create_pool(tmp_path / "pool", size_bytes=400 * BLOCK)
    pool = open_pool(PoolLocation.directory(tmp_path / "pool"))
    pool.change_settings({"when-full": "error"})
    kept = [pool.create_device(f"kept{n}", 100 * BLOCK, reservation_bytes=100 * BLOCK) for n in range(2)]
    pool.create_snapshot("kept0", "empty")
    greedy = [pool.create_device(f"greedy{n}", 400 * BLOCK) for n in range(2)]
    results: dict[str, list[bool]] = {}

    def fill(name: str, blocks: int) -> None:
        entry = pool.catalog.by_name(name)
        assert entry is not None
        results[name] = [write(pool, entry, index) for index in range(blocks)]

    threads = [threading.Thread(target=fill, args=(info.name, 100)) for info in kept]
    threads += [threading.Thread(target=fill, args=(info.name, 150)) for info in greedy]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(results[info.name]) for info in kept)
    assert sum(sum(results[info.name]) for info in greedy) == 200
    truth = Truth(pool)
    assert truth.free == 0
    assert pool.engine.free.promised == 0
    with pytest.raises(BadReservation):
        pool.reserve("kept0", 101 * BLOCK)
    pool.close()

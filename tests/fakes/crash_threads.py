"""Scenarios in which several clients and an administrator are at work at the same time.

A round gives two to four of them something to do and lets them take turns (see `turns`); between rounds there are
ordinary steps. What one round's clients change never overlaps, because the order of overlapping requests in flight is
nobody's promise; but they meet in the same blocks: one writes the even slices of a device's blocks, another the
odd ones, while blocks are copied, snapshots taken, commits made and freed blocks handed out again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random

import numpy as np

from tests.fakes.crash_clients import Client
from tests.fakes.crash_oracle import Change, DeviceModel, Seen, Violation
from tests.fakes.crash_scenario import BLOCK_SECTORS, SECTOR_BYTES, Scenario, Shape
from tests.fakes.disk_history import Contents
from tests.fakes.reproducible import stamp
from tests.fakes.simulated_disk import SimulatedDisk
from tests.fakes.turns import Turns

SLICE_SECTORS = 8
Task = Callable[[], None]


class ThreadedScenario(Scenario):
    """Needs `turns.installed()` around everything it does."""

    def __init__(self, disk: SimulatedDisk, random: Random, turns: Turns, *, nbd: bool) -> None:
        self.turns = turns
        super().__init__(disk, random, nbd=nbd)
        disk.before = self._before

    def _before(self, _operation: str, count: int) -> int:
        self.turns.switch()
        self.prefer_low_blocks()
        return count

    def step(self) -> None:
        if self.oracle.world and self.random.random() < 0.6:
            self.round()
        else:
            super().step()

    def round(self) -> None:
        """Several at once, then a look at everything."""
        self.text.append("round:")
        names = [name for name, model in self.oracle.world.items() if model.half is None]
        if not names:
            return
        self.random.shuffle(names)
        tasks = self._participants(names)
        with self.timed():
            self.turns.run(tasks)
        for name in self.oracle.world:
            self.compare(name)

    # --- who takes part ---

    def _participants(self, names: list[str]) -> list[Task]:
        """Clients of the first of these devices, and others."""
        tasks: list[Task] = []
        for name in names[: self.random.randrange(1, 3)]:
            tasks += self._clients_of(name)
        others = (self._flusher(names[0]), self._committer, self._committer, self._administrator(names[0]))
        return tasks + self.random.sample(others, self.random.randrange(1, 3))

    def _clients_of(self, name: str) -> list[Task]:
        model = self.oracle.world[name]
        if model.read_only:
            return [self._reader(name)]
        if self.random.random() < 0.35:
            return [self._alone(name), *([self._reader(name)] if self.random.random() < 0.6 else [])]
        count = self.random.randrange(1, 4)
        return [self._slicer(self._session_for(name), model, part, count) for part in range(count)]

    def _session_for(self, name: str) -> Client:
        # A connection is one thread's: everybody gets one of their own.
        entry = self.pool.catalog.by_name(name)
        assert entry is not None
        client = self._kind(self, self.pool.open_session(entry), self.pool, name)
        self._clients.setdefault(name, []).append(client)
        return client

    def _slicer(self, client: Client, model: DeviceModel, part: int, parts: int) -> Task:
        """Writes its own slices of the first blocks; some with FUA."""

        def work() -> None:
            for _ in range(self.random.randrange(1, 7)):
                slices = min(model.sectors, 2 * BLOCK_SECTORS) // SLICE_SECTORS // parts
                if not slices:
                    return
                first = (self.random.randrange(slices) * parts + part) * SLICE_SECTORS
                client.write(self._stamped(model, first, SLICE_SECTORS), durable=self.random.random() < 0.15)

        return work

    def _alone(self, name: str) -> Task:
        """Writes, trims and zeroes whatever it likes of a device nobody else changes."""
        client, model = self._session_for(name), self.oracle.world[name]

        def work() -> None:
            for _ in range(self.random.randrange(2, 10)):
                first, count = self._range(model)
                choice = self.random.random()
                if choice < 0.2:
                    self.text[-1] += " flush"
                    self.flush_through(client)
                    self._reclaim()
                elif choice < 0.55:
                    client.write(self._stamped(model, first, count), durable=False)
                elif choice < 0.85:
                    first -= first % BLOCK_SECTORS
                    count = min(BLOCK_SECTORS, model.sectors - first)
                    zeros = np.zeros(count, np.int32)
                    self.text[-1] += f" trim {model.number}:{first}"
                    client.trim(Change(model.number, first, zeros, self.number()), first, count)
                else:
                    zeros = np.zeros(count, np.int32)
                    self.text[-1] += f" zero {model.number}:{first}+{count}"
                    client.zero(
                        Change(model.number, first, zeros, self.number()), keep_allocated=choice < 0.9
                    )

        return work

    def _stamped(self, model: DeviceModel, first: int, count: int) -> Change:
        number = self.number()
        self.text[-1] += f" write {model.number}:{first}+{count}"
        return Change(
            model.number, first, self.disk.contents.intern(stamp(model.number, number, first, count)), number
        )

    def _reader(self, name: str) -> Task:
        """Reads through the zero-copy path, and is slow to send what it got."""
        client, model = self._session_for(name), self.oracle.world[name]

        def work() -> None:
            watched = self.oracle.watch(model)
            length = model.sectors * SECTOR_BYTES
            target, parts = os.memfd_create("parts"), []  # type: ignore[var-annotated]
            session = client.session
            try:
                session.enter()
                try:
                    session.read(0, length, parts)
                finally:
                    session.leave()
                while parts:
                    for _ in range(self.random.randrange(1, 40)):
                        self.turns.switch()
                    os.writev(target, parts[:1])
                    del parts[:1]
                session.sent()
                actual = self.disk.contents.intern(os.pread(target, length, 0))
            finally:
                os.close(target)
                self.oracle.unwatch(watched)
            strangers = watched.strangers(actual)
            if len(strangers):
                text = f"device {model.number} was read wrong at sectors {strangers[:8].tolist()} under way"
                raise Violation(text)

        return work

    def _flusher(self, name: str) -> Task:
        client = self._session_for(name)

        def work() -> None:
            for _ in range(self.random.randrange(1, 4)):
                self.flush_through(client)

        return work

    def _committer(self) -> None:
        for _ in range(self.random.randrange(1, 4)):
            self.text[-1] += " commit"
            self._periodic()

    def _administrator(self, origin: str) -> Task:
        """Snapshots of devices in use, and what looks at them."""

        def work() -> None:
            for _ in range(self.random.randrange(1, 3)):
                made = set(self.oracle.world)
                if self.random.random() < 0.6:
                    self._snapshot(origin)
                else:
                    self.random.choice((self._look, self._create, self._metadata_snapshot))()
                for name in set(self.oracle.world) - made:
                    self._look_at(name)

        return work

    def _look_at(self, name: str) -> None:
        """Fix what a new snapshot holds: it was decided while it was made, and must stay from then on."""
        self.compare(name)
        model = self.oracle.world[name]
        session = self.client(name).session
        actual = self.disk.contents.intern(bytes(session.read_bytes(0, model.sectors * SECTOR_BYTES)))
        self.mark(Seen(model.number, actual))


def threaded_scenario_of(turns: Turns, steps_max: int, contents: Contents) -> ThreadedScenario:
    """The scenario of the seed of `turns`, with several at work. Only inside `turns.installed()`."""
    random = turns.random
    shape = Shape.of(random, steps_max)
    disk = SimulatedDisk(contents, metadata_blocks=shape.metadata_blocks)
    disk.punches = shape.punches
    disk.format(data_blocks=shape.data_blocks)
    return ThreadedScenario(disk, random, turns, nbd=shape.nbd)

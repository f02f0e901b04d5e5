"""Scenarios in which snapshots arrive while several clients are at work on the very devices that are being fetched.

A round is one of `crash_threads`; among those who take part are now whoever fetches in the background, and a stream.
Every request to the store is a point where others may go on.
"""

from __future__ import annotations

import contextlib
import threading
from random import Random
from typing import ClassVar

from tests.fakes.crash_scenario import Scenario
from tests.fakes.crash_threads import Task, ThreadedScenario
from tests.fakes.crash_transfers import TransferScenario, prepared
from tests.fakes.disk_history import Contents
from tests.fakes.simulated_disk import SimulatedDisk
from tests.fakes.travelling_snapshots import TravellingSnapshots
from tests.fakes.turns import Turns
from thinpool import hydration
from thinpool.errors import StoreRefused


class ThreadedTransfers(ThreadedScenario, TransferScenario):
    """Needs `turns.installed()` and `transfers_simulated()` around everything it does."""

    # Devices stay lazy for longer: fetching goes on in rounds.
    weights: ClassVar[dict[str, int]] = {**TransferScenario.weights, "pull": 14, "hydrate": 2, "resume": 7}

    def __init__(
        self, disk: SimulatedDisk, random: Random, turns: Turns, days: TravellingSnapshots, *, nbd: bool
    ) -> None:
        self.turns = turns
        TransferScenario.__init__(self, disk, random, days, nbd=nbd)
        disk.before = self._before

    def round(self) -> None:
        objects = self.disk.objects
        objects.refused = False
        if self.random.random() < 0.15:
            objects.refuse_after = self.random.randrange(12)
        objects.under_way = lambda _: self.turns.switch()
        try:
            super().round()
        finally:
            objects.under_way, objects.refuse_after = lambda _: None, None

    def _participants(self, names: list[str]) -> list[Task]:
        fetched = [name for name in self.oracle.world if self.oracle.world[name].remote]
        self.random.shuffle(fetched)
        # Two fetch into one device, as two readers do.
        tasks = [self._fetcher(name) for name in (fetched[:1] * 2)[: self.random.randrange(3)]]
        # Clients come to where fetching goes on.
        names = [name for name in fetched if name in names] + [name for name in names if name not in fetched]
        if self.random.random() < 0.3:
            return [*tasks, *self._clients_of(names[0]), self._receiver]
        return [*tasks, *super()._participants(names)]

    def _clients_of(self, name: str) -> list[Task]:
        return [self._excusing(task) for task in super()._clients_of(name)]

    def _administrator(self, origin: str) -> Task:
        return self._excusing(super()._administrator(origin))

    def _excusing(self, task: Task) -> Task:
        """A block that cannot be fetched for lack of space, or because the store refuses, ends a client's work."""

        def work() -> None:
            try:
                task()
            except OSError as error:
                if not self._excused(error):
                    raise

        return work

    def _fetcher(self, name: str) -> Task:
        lazy = self.pool.lazy.of(self._entry(name))
        assert lazy is not None

        def work() -> None:
            self.text[-1] += f" fetch {name}"
            with contextlib.suppress(StoreRefused, hydration.StoppedError):
                hydration.hydrate(lazy, threading.Event())

        return self._excusing(work)

    def _receiver(self) -> None:
        if self._halves(streamed=True):
            self.resume_something()
        else:
            self.receive_something()

    def _between_records(self, _done: int, _total: int) -> None:
        self.turns.switch()


def threaded_transfers_of(turns: Turns, steps_max: int, contents: Contents) -> Scenario:
    """The scenario of the seed of `turns`. Only inside `turns.installed()` and `transfers_simulated()`."""
    disk, days = prepared(turns.random, contents)
    return ThreadedTransfers(disk, turns.random, turns, days, nbd=turns.random.random() < 0.4)

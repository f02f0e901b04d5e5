"""Scenarios in which the server is killed at one operation of the disk or of the journal, in the middle of anything.

In: the kill, what clients were told before it, opening again, what must be there then. Out: power cuts, which
`crash_search` lays over kills between two steps too.

Unlike a power cut a kill loses nothing that was written, flushed or not. So everything that was answered must read
back; what was being done may have happened or not; a change of names and sizes wholly or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from random import Random

from metadata import recount
from tests.fakes.crash_arrivals import read_whole
from tests.fakes.crash_check import compare_names, describe_strangers
from tests.fakes.crash_oracle import (
    Change,
    End,
    Stage,
    Step,
    Violation,
    World,
)
from tests.fakes.crash_scenario import Scenario, Shape
from tests.fakes.crash_transfers import TransferScenario, prepared, transfers_simulated
from tests.fakes.disk_history import Contents
from tests.fakes.simulated_disk import SimulatedDisk, SimulatedStore
from tests.fakes.travelling_snapshots import TravellingSnapshots


class Killed(BaseException):
    """The process is dead. Not an Exception: nothing may handle it."""


class Kill:
    """A hook for both kinds of operations: dead from operation `number` on; -1 only counts them."""

    def __init__(self, number: int = -1) -> None:
        self.number = number
        self.done = 0
        self.struck = ""

    def before(self, operation: str, count: int) -> int:
        """Raises Killed."""
        here, self.done = self.done, self.done + 1
        if self.struck or here == self.number:
            self.struck = self.struck or operation
            raise Killed(self.struck)
        return count


class KilledScenario(Scenario):
    """Runs until the kill; `judge` opens the pool again."""

    def __init__(self, disk: SimulatedDisk, random: Random, kill: Kill, *, nbd: bool) -> None:
        super().__init__(disk, random, nbd=nbd)
        disk.before = disk.before_journal = kill.before

    def outcome(self, error: BaseException) -> bool | None:
        return None if isinstance(error, Killed) else super().outcome(error)

    @contextmanager
    def changing(self, change: Change, *, durable: bool = False) -> Iterator[None]:
        try:
            with super().changing(change, durable=durable):
                yield
        except Killed:
            self.mark(End(change, Stage.FAILED))
            raise

    def judge(self) -> None:
        """Open the pool and read everything. Raises Violation."""
        self._clients.clear()
        self.abandon_pool()
        self.disk.before = self.disk.before_journal = None
        self.pool = self._open()
        entries = self.pool.catalog.entries()
        problems = []
        for world in self.oracle.worlds():
            problem = compare_names(world, entries) or self._contents_differ(world)
            if problem is None:
                break
            problems.append(problem)
        else:
            raise Violation("; or: ".join(problems))
        self.pool.close()
        wrong = recount(SimulatedStore(self.disk, writable=False))  # type: ignore[arg-type]
        if wrong:
            raise Violation(f"the recount finds {wrong[0]}")

    def _contents_differ(self, world: World) -> str | None:
        for name, model in world.items():
            promised = model.copy()
            promised.fold({layer.change.number for layer in promised.layers})
            entry = self.pool.catalog.by_name(name)
            assert entry is not None
            actual = read_whole(self.pool, entry, self.disk.contents)
            if actual is None:
                continue  # no space to fetch what is still in the store
            problem = describe_strangers(name, promised, actual, self.disk.contents)
            if problem is not None:
                return problem
        return None


class KilledTransfers(KilledScenario, TransferScenario):
    """Snapshots arrive meanwhile. Only inside `transfers_simulated()`."""

    def __init__(
        self, disk: SimulatedDisk, random: Random, kill: Kill, days: TravellingSnapshots, *, nbd: bool
    ) -> None:
        self._kill = kill
        TransferScenario.__init__(self, disk, random, days, nbd=nbd)
        disk.before = disk.before_journal = kill.before

    @contextmanager
    def marked(self, step: Step) -> Iterator[None]:
        if self._kill.struck:
            yield  # the dead leave no marks: this is what would have been tidied up
            return
        with super().marked(step):
            yield


def killed_transfers_of(seed: int, kill: Kill) -> KilledTransfers:
    """The scenario of a seed with transfers, to be killed."""
    random = Random(f"killed {seed}")
    disk, days = prepared(random, Contents())
    return KilledTransfers(disk, random, kill, days, nbd=random.random() < 0.4)


def killed_scenario_of(seed: int, kill: Kill, steps: int) -> KilledScenario:
    """The scenario of a seed, to be killed."""
    random = Random(seed)
    shape = Shape.of(random, steps)
    disk = SimulatedDisk(Contents(), metadata_blocks=shape.metadata_blocks)
    disk.format(data_blocks=min(shape.data_blocks, 24))
    return KilledScenario(disk, random, kill, nbd=shape.nbd)


def run_and_kill(seed: int, number: int, steps: int, *, transfers: bool = False) -> int:
    """Kill the server of a seed's scenario at operation `number`; returns how many there were. Raises Violation."""
    kill = Kill(number)
    with transfers_simulated() if transfers else nullcontext():
        run = killed_transfers_of(seed, kill) if transfers else killed_scenario_of(seed, kill, steps)
        return _killed(run, kill, seed, steps)


def _killed(run: KilledScenario, kill: Kill, seed: int, steps: int) -> int:
    try:
        for _ in range(steps):
            run.step()
    except Killed:
        try:
            run.judge()
        except Exception as error:
            where = f"seed {seed}, killed at operation {kill.number} ({kill.struck}) of: {'; '.join(run.text[-5:])}"
            raise Violation(f"{where}: {error}") from error
    finally:
        run.close()
        run.disk.close()
    return kill.done

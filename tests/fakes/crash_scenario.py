"""Scenarios: what clients and administrators do to a pool on a simulated disk, decided by a seed.

In: the steps, their proportions, the marks they leave for the oracle, and comparing what can be read with it as
they go. Out: cutting (`crash_search`), how requests travel (`crash_clients`).

Everything is a function of the seed: one thread, no clock, the periodic commit is a step like any other. Pools are
small on purpose, a few dozen data blocks, so that freed blocks are handed out again all the time. A step that the
pool refuses for lack of space is a legal step; it must leave no trace.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np

from metadata import MetadataFull
from tests.fakes import crash_steps as steps
from tests.fakes.crash_clients import Client, DirectClient, NbdClient, read_by_kernel
from tests.fakes.crash_oracle import (
    Begin,
    Change,
    DeviceModel,
    End,
    FlushBegin,
    FlushEnd,
    Oracle,
    Stage,
    Step,
    StepBegin,
    StepEnd,
    Violation,
    World,
)
from tests.fakes.disk_history import Contents
from tests.fakes.reproducible import Identities, Ticking, stamp
from tests.fakes.simulated_disk import SimulatedCatalog, SimulatedDisk
from thinpool import content_identity
from thinpool import device as device_module
from thinpool import pool as pool_module
from thinpool.session import Session

if TYPE_CHECKING:
    from tests.fakes.travelling_snapshots import TravellingSnapshots

SECTOR_BYTES = 512
BLOCK_SECTORS = 128
BLOCK_BYTES = BLOCK_SECTORS * SECTOR_BYTES
DEVICES_MAX = 7
DEVICE_BLOCKS_MAX = 6
WINDOW_SECTORS = 32 * BLOCK_SECTORS


@dataclass(frozen=True, slots=True)
class Shape:
    """What kind of scenario a seed makes."""

    data_blocks: int
    metadata_blocks: int
    steps: int
    nbd: bool
    many_mappings: int = 0  # single-sector writes before history begins, for trees of several nodes
    punches: bool = True

    @classmethod
    def of(cls, random: Random, steps: int) -> Shape:
        if random.random() < 0.06:
            return cls(random.randrange(420, 560), 320, steps, False, random.randrange(260, 400))
        blocks, metadata_blocks = random.randrange(6, 22), random.choice((200, 256))
        return cls(blocks, metadata_blocks, steps, random.random() < 0.4, punches=random.random() < 0.85)


class Scenario:
    """One run on one disk. `world` is what the disk holds at its start."""

    kill_share = 0.04
    travelling: TravellingSnapshots | None = None

    def __init__(
        self,
        disk: SimulatedDisk,
        random: Random,
        *,
        nbd: bool,
        world: World | None = None,
        first_number: int = 0,
    ) -> None:
        self.disk = disk
        self.random = random
        self.start_world: World = world or {}
        self.oracle = Oracle({name: model.copy() for name, model in self.start_world.items()})
        self.text: list[str] = []
        self._kind: type[Client] = NbdClient if nbd else DirectClient
        self._clients: dict[str, list[Client]] = {}
        self._counter = first_number
        self._clock = Ticking()
        self._identities = Identities(first_number)
        self._low_blocks = random.random() < 0.5
        # Half of the scenarios copy shared blocks as those larger than that are copied.
        self._compose_bytes_max = random.choice((0, device_module.COMPOSE_BYTES_MAX))
        # Kills are drawn apart, so that a seed does the same with and without them.
        self._kills = Random(repr(random.getstate()[1][:2]))
        with self.timed():
            self.pool = self._open()

    # --- running ---

    def run(self, count: int) -> None:
        """Take `count` steps, then compare everything."""
        for _ in range(count):
            self.step()
        self.compare_all()

    def step(self) -> None:
        """One step, chosen at random among those possible."""
        if self._kills.random() < self.kill_share:
            self.kill()
        choice = self.choose()
        self.text.append(choice)
        self.prefer_low_blocks()
        with self.timed():
            self.take(choice)

    def choose(self) -> str:
        """One of `CHOICES`, by its weight."""
        return self.random.choices(list(CHOICES), [weight for weight, _ in CHOICES.values()])[0]

    def kill(self) -> None:
        """The server is killed between two requests and started again: all that was answered is there."""
        self.text.append("kill")
        self._clients.clear()
        self.abandon_pool()
        with self.timed():
            self.pool = self._open()
        self.compare_all()

    def abandon_pool(self) -> None:
        """Forget the pool as the death of a process does: descriptors are closed, nothing else happens."""
        engine = self.pool.engine
        if self.pool._closed:
            return
        self.pool._closed = True
        engine.data.close()
        if engine.journal is not None:
            engine.journal.close()

    def prefer_low_blocks(self) -> None:
        """In half of the scenarios the block freed last is the one handed out next, as in a pool nearly full."""
        if self._low_blocks:
            self.pool.engine.free._cursor = 0

    def take(self, choice: str) -> None:
        """Take one step of `CHOICES`."""
        getattr(self, CHOICES[choice][1].__name__)()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The pool sees the scenario's own clock, identities and way of copying."""
        compose = mock.patch.object(device_module, "COMPOSE_BYTES_MAX", self._compose_bytes_max)
        identities = mock.patch.object(content_identity, "uuid", self._identities)
        with mock.patch.object(pool_module, "time", self._clock), identities, compose:
            yield

    def close(self) -> None:
        """Let go of the pool without committing anything."""
        for clients in self._clients.values():
            for client in clients:
                client.close()
        self._clients.clear()
        self.abandon_pool()

    # --- marks ---

    def mark(self, what: object) -> None:
        self.disk.mark(what)
        self.oracle.hear(what)

    def number(self) -> int:
        self._counter += 1
        return self._counter

    @contextmanager
    def _structural(self, step: Step) -> Iterator[None]:
        """Marks around a change of names and sizes; refusals for lack of space are fine."""
        self.text[-1] += f" {_describe(step)}"
        try:
            with self.marked(step):
                yield
        except MetadataFull:
            pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    @contextmanager
    def marked(self, step: Step) -> Iterator[None]:
        """Marks around a change of names and sizes, and no more."""
        self.mark(StepBegin(step))
        try:
            yield
        except BaseException as error:
            self.mark(StepEnd(step, done=self.outcome(error)))
            raise
        else:
            self.mark(StepEnd(step))

    def outcome(self, error: BaseException) -> bool | None:
        """Whether a change that ended with an error was done all the same; None where that is not known."""
        return False

    @classmethod
    def successor(
        cls, run: Scenario, disk: SimulatedDisk, random: Random, world: World, first_number: int
    ) -> Scenario:
        """A scenario that goes on with what a cut of `run` left."""
        return Scenario(disk, random, nbd=False, world=world, first_number=first_number)

    @contextmanager
    def changing(self, change: Change, *, durable: bool = False) -> Iterator[None]:
        """Marks around a write, trim or zeroing; ENOSPC is an answer."""
        self.mark(Begin(change))
        try:
            yield
        except OSError as error:
            self.mark(End(change, Stage.FAILED))
            if error.errno != errno.ENOSPC:
                raise
        else:
            self.mark(End(change, Stage.ACKNOWLEDGED, durable))

    # --- choosing ---

    def _some_device(self, accept: Callable[[DeviceModel], bool] = lambda _: True) -> str | None:
        names = [name for name, model in self.oracle.world.items() if accept(model)]
        return self.random.choice(names) if names else None

    def _writable(self) -> tuple[str, DeviceModel, Client] | None:
        name = self._some_device(lambda model: not model.read_only)
        return None if name is None else (name, self.oracle.world[name], self.client(name))

    def client(self, name: str) -> Client:
        """One of up to two connections to a device."""
        clients = self._clients.setdefault(name, [])
        if len(clients) < 1 + (self.random.random() < 0.2):
            entry = self.pool.catalog.by_name(name)
            assert entry is not None
            clients.append(self._kind(self, self.pool.open_session(entry), self.pool, name))
            return clients[-1]
        return self.random.choice(clients)

    def _disconnect(self, name: str) -> None:
        for client in self._clients.pop(name, []):
            client.close()

    def _range(self, model: DeviceModel) -> tuple[int, int]:
        """Sectors for a write: often a whole block, often a few sectors, often where others wrote before."""
        random, sectors = self.random, model.sectors
        # The first blocks of all devices are busy ones, so that what is shared is changed by several.
        blocks = -(-sectors // BLOCK_SECTORS)
        block = random.randrange(min(blocks, 2) if random.random() < 0.6 else blocks) * BLOCK_SECTORS
        shape = random.random()
        if shape < 0.25:
            first, count = block, BLOCK_SECTORS
        elif shape < 0.4:
            first, count = block + random.randrange(BLOCK_SECTORS), random.randrange(1, 2 * BLOCK_SECTORS)
        else:
            first, count = block + random.randrange(BLOCK_SECTORS), random.choice((1, 2, 8, 8, 8, 31))
        first = min(first, sectors - 1)
        return first, min(count, sectors - first)

    # --- what clients do ---

    def _write(self) -> None:
        chosen = self._writable()
        if chosen is not None:
            _, model, client = chosen
            client.write(self.new_write(model), durable=self.random.random() < 0.15)

    def _pipeline(self) -> None:
        """Several requests sent at once, as clients with a queue do."""
        chosen = self._writable()
        if chosen is not None:
            _, model, client = chosen
            client.pipeline([self.new_write(model) for _ in range(self.random.randrange(2, 5))])

    def new_write(self, model: DeviceModel) -> Change:
        """A change with stamped content."""
        first, count = self._range(model)
        number = self.number()
        contents = self.disk.contents.intern(stamp(model.number, number, first, count))
        self.text[-1] += f" write {model.number}:{first}+{count}"
        return Change(model.number, first, contents, number)

    def _trim(self) -> None:
        chosen = self._writable()
        if chosen is None:
            return
        _, model, client = chosen
        first, count = self._range(model)
        if self.random.random() < 0.6:
            first -= first % BLOCK_SECTORS
            count = min(BLOCK_SECTORS * self.random.randrange(1, 4), model.sectors - first)
        self.text[-1] += f" {model.number}:{first}+{count}"
        begin = -(-first // BLOCK_SECTORS) * BLOCK_SECTORS
        end = first + count
        if end != model.sectors:
            end -= end % BLOCK_SECTORS
        zeros = np.zeros(max(end - begin, 0), np.int32)
        client.trim(Change(model.number, min(begin, model.sectors), zeros, self.number()), first, count)

    def _zero(self) -> None:
        chosen = self._writable()
        if chosen is not None:
            _, model, client = chosen
            first, count = self._range(model)
            self.text[-1] += f" {model.number}:{first}+{count}"
            change = Change(model.number, first, np.zeros(count, np.int32), self.number())
            client.zero(change, keep_allocated=self.random.random() < 0.4)

    def _flush(self) -> None:
        name = self._some_device()
        if name is not None:
            self.flush_through(self.client(name))

    def flush_through(self, client: Client) -> None:
        """A FLUSH on one connection."""
        number = self.number()
        self.mark(FlushBegin(number))
        client.flush()
        self.mark(FlushEnd(number))

    def _read(self) -> None:
        name = self._some_device()
        if name is not None:
            self.compare(name)

    # --- what administrators do ---

    def _create(self) -> None:
        if len(self.oracle.world) >= DEVICES_MAX:
            return
        step = steps.Create(f"d{self.number()}", self._counter, self._new_sectors())
        with self._structural(step):
            self.pool.create_device(step.name, step.sectors * SECTOR_BYTES)

    def _new_sectors(self) -> int:
        odd = self.random.choice((0, 0, 0, 1, 9, 127))
        return self.random.randrange(1, DEVICE_BLOCKS_MAX) * BLOCK_SECTORS + odd

    def _snapshot(self, origin: str | None = None) -> None:
        origin = origin or self._some_device()
        if origin is None or len(self.oracle.world) >= DEVICES_MAX:
            return
        step = steps.TakeSnapshot(origin, f"s{self.number()}", self._counter, self.random.random() < 0.4)
        with self._structural(step):
            self.pool.create_snapshot(origin, step.name, read_only=step.read_only)

    def _delete(self) -> None:
        name = self._some_device()
        if name is not None:
            self._disconnect(name)
            with self._structural(steps.Delete(name)):
                self.pool.delete(name)

    def _rename(self) -> None:
        name = self._some_device()
        if name is not None:
            new = f"r{self.number()}"
            with self._structural(steps.Rename(name, new)):
                self.pool.rename(name, new)
            if name in self._clients:
                self._clients[new] = self._clients.pop(name)

    def _resize(self) -> None:
        name = self._some_device(lambda model: not model.read_only)
        if name is None:
            return
        present = self.oracle.world[name].sectors
        near = present + self.random.choice((-128, -100, -60, -9, 9, 60, 100, 128))
        sectors = max(near, 1) if self.random.random() < 0.6 else self._new_sectors()
        # A client keeps the size it was told, and its session the block map it began with.
        self._disconnect(name)
        with self._structural(steps.Resize(name, sectors)):
            self.pool.resize(name, sectors * SECTOR_BYTES, shrink=True)

    def _rollback(self) -> None:
        name = self._some_device()
        snapshot = self._some_device()
        if name is None or snapshot is None or snapshot == name:
            return
        keep = self.random.random() < 0.5 and len(self.oracle.world) < DEVICES_MAX
        number = self.number()
        step = steps.Rollback(name, snapshot, number, f"k{number}" if keep else None)
        self._disconnect(name)
        with self._structural(step):
            self.pool.rollback(name, snapshot, keep=step.kept if step.kept else False)

    def _grow(self) -> None:
        status = self.pool.status()
        blocks = status.data_bytes // BLOCK_BYTES
        with self._structural(steps.PoolOnly("grow")):
            if self.random.random() < 0.4 and status.metadata_bytes < 400 * 4096:
                self.pool.grow(None, status.metadata_bytes + 4096 * self.random.randrange(1, 20))
            elif blocks < 64 or blocks > 400:
                self.pool.grow(status.data_bytes + BLOCK_BYTES * self.random.randrange(1, 5), None)

    def _metadata_snapshot(self) -> None:
        engine = self.pool.engine
        with self._structural(steps.PoolOnly("metadata snapshot")), engine.transaction:
            engine.require_writable()
            engine.collect()
            with engine.tree:
                if engine.metadata.held_root:
                    engine.metadata.release_metadata_snapshot()
                else:
                    engine.metadata.reserve_metadata_snapshot()
            if self.random.random() < 0.7:
                engine.commit()

    def _periodic(self) -> None:
        self.pool.engine.commit_if_dirty()
        self.pool.engine.reclaim()

    def _reclaim(self) -> None:
        self.pool.engine.reclaim()

    def _look(self) -> None:
        """Commands that look; they bring new mappings into the tree without committing."""
        self.pool.status()
        self.pool.devices()

    def _reopen(self) -> None:
        for name in list(self._clients):
            self._disconnect(name)
        number = self.number()
        self.mark(FlushBegin(number))
        self.pool.close()
        self.mark(FlushEnd(number))
        self.pool = self._open()

    def _open(self):
        return self.disk.open()

    # --- comparing ---

    def compare(self, name: str, *, exact: bool = True) -> None:
        """Read a device by both ways of reading; what was acknowledged must be there, in order.

        Not `exact`: what is promised must be there, the rest may.
        """
        model = self.oracle.world[name]
        session: Session = self.client(name).session
        first, count = self._window(model)
        window = slice(first, first + count)
        for read in (Session.read_bytes, read_by_kernel):
            read_bytes = bytes(read(session, first * SECTOR_BYTES, count * SECTOR_BYTES))
            actual = model.current()
            actual[window] = self.disk.contents.intern(read_bytes)
            loose = model.in_doubt or not exact
            strangers = model.strangers(actual) if loose else np.flatnonzero(actual != model.current())
            strangers = strangers[(strangers >= first) & (strangers < first + count)]
            if len(strangers):
                text = f"{name} reads wrong at sectors {strangers[:8].tolist()} by {read.__name__}, no cut involved"
                raise Violation(text)

    def _window(self, model: DeviceModel) -> tuple[int, int]:
        """Sectors to compare: all, but of a wide device only a part, because everything would take too long."""
        if model.sectors <= WINDOW_SECTORS:
            return 0, model.sectors
        return self.random.randrange(model.sectors - WINDOW_SECTORS + 1), WINDOW_SECTORS

    def compare_all(self) -> None:
        for name in self.oracle.world:
            self.compare(name)


def _describe(step: Step) -> str:
    if hasattr(step, "text"):
        return step.text
    return " ".join(str(getattr(step, name)) for name in step.__slots__)


CHOICES: dict[str, tuple[int, Callable[[Scenario], None]]] = {
    "write": (26, Scenario._write),
    "pipeline": (8, Scenario._pipeline),
    "trim": (10, Scenario._trim),
    "zero": (5, Scenario._zero),
    "flush": (9, Scenario._flush),
    "create": (7, Scenario._create),
    "snapshot": (9, Scenario._snapshot),
    "delete": (4, Scenario._delete),
    "rename": (2, Scenario._rename),
    "resize": (6, Scenario._resize),
    "rollback": (4, Scenario._rollback),
    "grow": (2, Scenario._grow),
    "metadata-snapshot": (2, Scenario._metadata_snapshot),
    "periodic": (4, Scenario._periodic),
    "reclaim": (2, Scenario._reclaim),
    "look": (5, Scenario._look),
    "reopen": (2, Scenario._reopen),
    "read": (2, Scenario._read),
}


def scenario_of(
    seed: int,
    *,
    steps_max: int = 60,
    contents: Contents | None = None,
    catalogs: type[SimulatedCatalog] = SimulatedCatalog,
) -> Scenario:
    """The scenario of a seed, formatted and prepared, ready to `run`."""
    random = Random(seed)
    shape = Shape.of(random, steps_max)
    disk = SimulatedDisk(contents or Contents(), metadata_blocks=shape.metadata_blocks, catalogs=catalogs)
    disk.punches = shape.punches
    disk.format(data_blocks=shape.data_blocks)
    scenario = Scenario(disk, random, nbd=shape.nbd)
    if shape.many_mappings:
        prepare_wide(scenario, shape.many_mappings)
    return scenario


def prepare_wide(scenario: Scenario, mappings: int) -> None:
    """A device with so many mappings that its tree has several leaves, and a snapshot of it."""
    scenario.text.append("prepare")
    step = steps.Create("wide", scenario.number(), mappings * BLOCK_SECTORS)
    with scenario.timed(), scenario._structural(step):
        scenario.pool.create_device("wide", step.sectors * SECTOR_BYTES)
    model, client = scenario.oracle.world["wide"], scenario.client("wide")
    for block in range(mappings):
        number, first = scenario.number(), block * BLOCK_SECTORS + block % BLOCK_SECTORS
        contents = scenario.disk.contents.intern(stamp(model.number, number, first, 1))
        client.write(Change(model.number, first, contents, number), durable=False)
    scenario.flush_through(client)

"""Clients that write sectors saying whose they are, against a server in another process that may be killed any time.

In: what each client and the administrator do, and the promises they hear, in one order under one lock. Out: the
server, killing it, judging what is left (`killed_pool`).

A mark is made later than what it tells of only where that makes the promise weaker: a change begins before it is
sent, and counts as answered once the answer was read. Clients of one device write slices of their own, because the
order of overlapping requests in flight is nobody's promise; they meet in the same blocks all the same.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.fakes import crash_steps as steps
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
    World,
)
from tests.fakes.crash_scenario import BLOCK_SECTORS, SECTOR_BYTES
from tests.fakes.disk_history import Contents
from tests.fakes.reproducible import stamp
from thinpool.error_root import ThinPoolError
from thinpool.errors import ServerUnreachable
from tools.disk_client import DiskClient

SLICE_SECTORS = 8
SNAPSHOTS_MAX = 5
Operate = Callable[[str, Mapping[str, Any]], object]


class Load:
    """One load on one served pool, from `start` to `join`. `failures` are errors that no kill explains."""

    def __init__(
        self, world: World, contents: Contents, seed: int, *, first_number: int, pool_bytes: int
    ) -> None:
        self.oracle = Oracle({name: model.copy() for name, model in world.items()})
        self.contents = contents
        self.failures: list[BaseException] = []
        self.acknowledged = 0
        self.flushed = 0
        self.administered = 0
        self.killed = threading.Event()
        self._seed = seed
        self._pool_bytes = pool_bytes
        self._counter = first_number
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, socket: Path, operate: Operate) -> None:
        """Two devices under load, one device that the administrator alone uses, and the administrator."""
        for client in range(3):
            self._spawn(client, lambda at, number=client: self._slices(at, socket, number, 3))
        self._spawn(3, lambda at: self._alone(at, socket))
        self._spawn(4, lambda at: self._flushes(at, socket))
        self._spawn(5, lambda at: self._administers(at, socket, operate))

    def join(self) -> None:
        """Wait for all of them; the server is gone or about to be."""
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client did not notice that its server is gone"

    @property
    def last_number(self) -> int:
        return self._counter

    def _spawn(self, number: int, work: Callable[[random.Random], None]) -> None:
        own = random.Random(self._seed * 16 + number)

        def live() -> None:
            try:
                while True:
                    work(own)
            except (ConnectionError, FileNotFoundError, ServerUnreachable, Killed):
                if not self.killed.is_set() and not self.killed.wait(5):
                    self.failures.append(AssertionError("a connection ended before the server was killed"))
            except BaseException as error:  # noqa: BLE001 -- told by the judge
                self.failures.append(error)

        thread = threading.Thread(target=live, daemon=True)
        self._threads.append(thread)
        thread.start()

    # --- marks ---

    def _mark(self, mark: object) -> None:
        with self._lock:
            self.oracle.hear(mark)

    def _number(self) -> int:
        with self._lock:
            self._counter += 1
            return self._counter

    @contextmanager
    def _changing(self, change: Change, *, durable: bool = False) -> Iterator[None]:
        self._mark(Begin(change))
        try:
            yield
        except ConnectionError:
            raise  # in flight for ever
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._mark(End(change, Stage.FAILED))
        else:
            self._mark(End(change, Stage.ACKNOWLEDGED, durable))
            self.acknowledged += 1

    def _flush(self, client: DiskClient) -> None:
        number = self._number()
        self._mark(FlushBegin(number))
        client.flush()
        self._mark(FlushEnd(number))
        self.flushed += 1

    def _model(self, name: str) -> DeviceModel:
        with self._lock:
            return self.oracle.world[name]

    def _write(self, at: random.Random, client: DiskClient, name: str, first: int, count: int) -> None:
        number, model = self._number(), self._model(name)
        data = stamp(model.number, number, first, count)
        with self._lock:
            contents = self.contents.intern(data)
        durable = at.random() < 0.1
        with self._changing(Change(model.number, first, contents, number), durable=durable):
            client.write(first * SECTOR_BYTES, data, fua=durable)

    # --- who takes part ---

    def _slices(self, at: random.Random, socket: Path, part: int, parts: int) -> None:
        sectors = self._model("shared").sectors
        with DiskClient(socket, "shared") as client:
            for _ in range(200):
                slot = at.randrange(sectors // SLICE_SECTORS // parts) * parts + part
                self._write(at, client, "shared", slot * SLICE_SECTORS, SLICE_SECTORS)
                if at.random() < 0.03:
                    self._flush(client)

    def _alone(self, at: random.Random, socket: Path) -> None:
        """Anything, on a device nobody else writes to."""
        with DiskClient(socket, "own") as client:
            for _ in range(200):
                self._any_request(at, client, "own")

    def _any_request(self, at: random.Random, client: DiskClient, name: str) -> None:
        model = self._model(name)
        block = at.randrange(model.sectors // BLOCK_SECTORS) * BLOCK_SECTORS
        choice = at.random()
        if choice < 0.4:
            self._write(at, client, name, block, BLOCK_SECTORS)
        elif choice < 0.8:
            first = min(block + at.randrange(BLOCK_SECTORS), model.sectors - 1)
            self._write(at, client, name, first, min(at.choice((1, 8, 31, 200)), model.sectors - first))
        elif choice < 0.95:
            zeros = np.zeros(BLOCK_SECTORS, np.int32)
            with self._changing(Change(model.number, block, zeros, self._number())):
                request = client.trim if choice < 0.9 else client.zero
                request(block * SECTOR_BYTES, BLOCK_SECTORS * SECTOR_BYTES)
        else:
            self._flush(client)

    def _flushes(self, at: random.Random, socket: Path) -> None:
        """Asks for flushes on a connection that never writes: they are about everybody's writes."""
        with DiskClient(socket, at.choice(("shared", "own"))) as client:
            for _ in range(20):
                if self.killed.wait(at.random() * 0.05):
                    raise Killed
                self._flush(client)

    def _administers(self, at: random.Random, socket: Path, operate: Operate) -> None:
        if self.killed.wait(at.random() * 0.03):
            raise Killed
        names = list(self.oracle.world)
        others = [name for name in names if name not in ("shared", "own", "idle")]
        choice = at.random()
        if choice < 0.2:
            # Another connection, so that rolling back has something to undo; closed again before anything else.
            with DiskClient(socket, "idle") as client:
                for _ in range(5):
                    self._any_request(at, client, "idle")
        elif choice < 0.55 and len(others) < SNAPSHOTS_MAX:
            number = self._number()
            step = steps.TakeSnapshot(at.choice(names), f"s{number}", number, at.random() < 0.5)
            given = {"origin": step.origin, "name": step.name, "read_only": step.read_only}
            self._step(step, operate, "snapshot", given)
        elif choice < 0.65 and others:
            name = at.choice(others)
            self._step(
                steps.Rename(name, new := f"r{self._number()}"), operate, "rename", {"old": name, "new": new}
            )
        elif choice < 0.8 and others:
            number = self._number()
            kept = f"k{number}" if len(others) < SNAPSHOTS_MAX else None
            step = steps.Rollback("idle", at.choice(others), number, kept)
            given = {"name": step.name, "snapshot": step.snapshot, "keep": kept or False}
            self._step(step, operate, "rollback", given)
        elif choice < 0.9 and others:
            name = at.choice(others)
            self._step(steps.Delete(name), operate, "delete", {"name": name})
        else:
            # In tiny steps, while everybody writes.
            self._pool_bytes += at.randrange(1, 4) * BLOCK_SECTORS * SECTOR_BYTES
            self._step(steps.PoolOnly("grow"), operate, "grow", {"size_bytes": self._pool_bytes})

    def _step(self, step: Step, operate: Operate, name: str, given: Mapping[str, Any]) -> None:
        if self.killed.is_set():
            raise Killed
        self._mark(StepBegin(step))
        try:
            operate(name, given)
        except ServerUnreachable:
            raise  # in flight for ever
        except ThinPoolError as error:
            # The server lets a connection go a moment after its client did; nothing is done then.
            if type(error).__name__ != "DeviceInUse":
                raise
            self._mark(StepEnd(step, done=False))
        else:
            self._mark(StepEnd(step))
            self.administered += 1


class Killed(Exception):
    """The server was killed: nothing more to do."""

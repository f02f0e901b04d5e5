"""Scenarios in which one operation of the disk fails, or all do from one on.

In: the fault, what clients then hear, what the oracle may still hold them to. Out: which operation (the test tries
every one), what the pool looks like afterwards (`crash_check`).

An error may be answered to whoever asked only after the fault happened. From then on: a request that failed may have
been carried out or not; a change of names that failed in a pool which goes on working was not, in a pool that gave up
it may have been, and the pool shows which: the names and the content of all devices, and the next to open it finds the
same. Only where not even `needs_check` could be written may it find the other. Everything that was answered with
success is promised as ever.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

from metadata import MetadataError
from tests.fakes.crash_clients import Client
from tests.fakes.crash_oracle import (
    Begin,
    Change,
    End,
    FlushBegin,
    FlushEnd,
    Restart,
    Settled,
    Stage,
    Step,
    StepBegin,
    StepEnd,
    Violation,
)
from tests.fakes.crash_scenario import SECTOR_BYTES, Scenario, Shape
from tests.fakes.disk_history import Contents
from tests.fakes.simulated_disk import SimulatedDisk
from thinpool.catalog import CatalogEntry
from thinpool.errors import ThinPoolError
from thinpool.extents import HOLE

FAILURES = (OSError, MetadataError, ThinPoolError)
SHORT_BYTES = 1536


@dataclass(slots=True)
class Fault:
    """`number` counts operations of the disk from the first on; -1 only counts them.

    `kind`: an errno name, or "short": the operation does a part, without an error. `lasting`: every later
    operation of the same file fails as well.
    """

    number: int = -1
    kind: str = "EIO"
    lasting: bool = False
    done: int = 0
    struck: str = ""

    def before(self, operation: str, count: int) -> int:
        """The hook of the disk."""
        here, self.done = self.done, self.done + 1
        file = operation.partition(" ")[0]
        again = self.lasting and self.struck.partition(" ")[0] == file
        if here != self.number and not again:
            return count
        if self.kind == "short":
            self.struck = operation
            # Entries of the journal are shorter than a sector; data and metadata come in whole ones.
            return count // 2 if file == "journal" else min(count, SHORT_BYTES)
        if not self.struck:
            self.struck = operation
        number = getattr(errno, self.kind)
        raise OSError(number, f"injected: {os.strerror(number)}")


# What can happen to an operation.
KINDS = {
    "metadata read": ("EIO", "short"),
    "metadata write": ("EIO", "ENOSPC", "short"),
    "metadata flush": ("EIO", "ENOSPC"),
    "metadata grow": ("EIO", "ENOSPC"),
    "data read": ("EIO",),
    "data write": ("EIO", "ENOSPC", "short"),
    "data flush": ("EIO", "ENOSPC"),
    "data punch": ("EIO", "EOPNOTSUPP"),
    "data grow": ("EIO", "ENOSPC"),
    "catalogue": ("EIO", "ENOSPC"),
    "journal write": ("EIO", "ENOSPC", "short"),
    "journal read": ("EIO",),
}


class FaultyScenario(Scenario):
    """Goes on after the fault for as long as the pool opens. Kills are another matter: they need no fault."""

    kill_share = 0.0

    def __init__(self, disk: SimulatedDisk, random: Random, fault: Fault, *, nbd: bool) -> None:
        self.fault = fault
        self.refused = 0
        self.over = False
        # The devices before a change of names of which it is not known whether it is on the disk.
        self._before_doubt: list[CatalogEntry] | None = None
        super().__init__(disk, random, nbd=nbd)
        disk.before = disk.before_journal = fault.before

    def heal(self) -> None:
        """From here on nothing fails."""
        self.disk.before = self.disk.before_journal = None

    def step(self) -> None:
        if self.over:
            return
        try:
            super().step()
        except FAILURES as error:
            if not self.fault.struck:
                raise
            self.refused += 1
            self.text[-1] += f" ({error})"

    @contextmanager
    def _structural(self, step: Step) -> Iterator[None]:
        self.text[-1] += f" {step.text if hasattr(step, 'text') else ''}"
        given_up_before = self.pool.engine.failure is not None
        before = self.pool.catalog.entries()
        self.mark(StepBegin(step))
        try:
            yield
        except FAILURES as error:
            # Without a fault only a lack of space is an answer, and it leaves no trace.
            gave_up = self.pool.engine.failure is not None and not given_up_before
            certain = not (gave_up and self.pool.engine.failed_for_good)
            if not certain:
                self._before_doubt = before
            self.mark(StepEnd(step, gave_up and self.pool.catalog.entries() != before, certain))
            if isinstance(error, OSError) and error.errno == errno.ENOSPC and not self.fault.struck:
                return
            raise
        else:
            self.mark(StepEnd(step))

    @contextmanager
    def changing(self, change: Change, *, durable: bool = False) -> Iterator[None]:
        self.mark(Begin(change))
        try:
            yield
        except FAILURES as error:
            self.mark(End(change, Stage.FAILED))
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                return
            raise
        else:
            self.mark(End(change, Stage.ACKNOWLEDGED, durable))

    def flush_through(self, client: Client) -> None:
        number = self.number()
        self.mark(FlushBegin(number))
        client.flush()
        self.mark(FlushEnd(number))

    def _reopen(self) -> None:
        for name in list(self._clients):
            self._disconnect(name)
        number = self.number()
        self.mark(FlushBegin(number))
        sound = self._was_sound()
        try:
            self.pool.close()
        except FAILURES:
            if not self.fault.struck:
                raise
            sound = False
        self.mark(FlushEnd(number) if sound else Restart())
        for attempt in range(2):
            try:
                self.pool = self._open()
            except FAILURES:
                if not self.fault.struck:
                    raise
                self.over = attempt == 1
            else:
                self._settle()
                return

    def _settle(self) -> None:
        """The pool was opened: it shows whether a step that was not certain is on the disk."""
        if self._before_doubt is not None:
            self.mark(Settled(self.pool.catalog.entries() != self._before_doubt))
            self._before_doubt = None

    def _was_sound(self) -> bool:
        """Whether closing was a flush: it is none where the pool had given up or could not be written."""
        return self.pool.engine.failure is None and self.pool.engine.writable

    def compare(self, name: str, *, exact: bool = True) -> None:
        # After giving up, blocks not looked at before come from the last committed state.
        sound = self._was_sound()
        super().compare(name, exact=exact and sound)
        if not sound:
            self._holes_are_zeros(name)

    def _holes_are_zeros(self, name: str) -> None:
        """What a pool that gave up says about holes fits what it shows."""
        session = self.client(name).session
        length = self.oracle.world[name].sectors * SECTOR_BYTES
        position = 0
        for length_bytes, kind in session.extents(0, length):
            if kind == HOLE and any(session.read_bytes(position, length_bytes)):
                text = f"{name} says that {length_bytes} bytes from {position} on are a hole, and shows data there"
                raise Violation(text)
            position += length_bytes
        if position != length:
            raise Violation(f"{name} tells of {position} bytes of {length}")


def faulty_scenario_of(seed: int, fault: Fault, steps: int) -> FaultyScenario:
    """The scenario of a seed, with a fault in it."""
    random = Random(seed)
    shape = Shape.of(random, steps)
    disk = SimulatedDisk(Contents(), metadata_blocks=shape.metadata_blocks)
    disk.format(data_blocks=min(shape.data_blocks, 24))
    return FaultyScenario(disk, random, fault, nbd=shape.nbd)

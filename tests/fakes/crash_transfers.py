"""Scenarios in which snapshots arrive, by streams and from an object store, while everything else goes on as ever.

In: receiving in full, as an increment, in place of its base, cut and resumed; pulling; devices that are usable while
they are fetched, by readers, in the background and with a store that refuses; what other clients do between two records
and while a request is under way. Out: what arrives (`travelling_snapshots`), ordinary steps (`crash_scenario`).

The steps of the real code that change names or promise something, down to each note of how far a stream got, leave
their marks from inside of it (`MarkedTransfers`).
"""

from __future__ import annotations

import errno
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from random import Random
from typing import Any, ClassVar
from unittest import mock

import numpy as np
from bitarray import bitarray

from metadata import MetadataFull
from tests.fakes import crash_steps as steps
from tests.fakes.crash_arrivals import read_hidden
from tests.fakes.crash_clients import DirectClient
from tests.fakes.crash_oracle import Change, DeviceModel, Half, Step, Violation, World
from tests.fakes.crash_scenario import (
    BLOCK_BYTES,
    BLOCK_SECTORS,
    CHOICES,
    DEVICES_MAX,
    Scenario,
)
from tests.fakes.disk_history import Contents
from tests.fakes.reproducible import Identities, stamp
from tests.fakes.simulated_disk import SimulatedDisk
from tests.fakes.simulated_files import IN_PLACE_OF_OS
from tests.fakes.simulated_objects import URL, SimulatedObjects
from tests.fakes.transfer_steps import BeginPull, BeginReceiving, Complete, Finish, Note, SizeReceiving
from tests.fakes.travelling_snapshots import Day, TravellingSnapshots
from thinpool import hydration, lazy_device, lazy_devices, receiving, remote_blocks
from thinpool.catalog import CatalogEntry
from thinpool.engine import CHUNK_COST_BLOCKS
from thinpool.errors import (
    BaseMissing,
    DeviceExists,
    DeviceIncomplete,
    DeviceInUse,
    NoSpace,
    StoreRefused,
    StreamDamaged,
    TargetDiverged,
    TooLittleFree,
)
from thinpool.lazy_device import LazyDevice
from thinpool.lazy_devices import PullRequest
from thinpool.receiving import ReceiveOptions, receive
from thinpool.receiving_state import ReceivingState
from thinpool.remote_blocks import is_lazy
from thinpool.store import store as store_module
from thinpool.store.objects import Objects
from thinpool.transfers import HIDDEN_SUFFIX, Transfers

AT_ONCE, NEVER = -1.0, 1e9
ROOM_BLOCKS = 3
# What a transfer may be answered; what is left behind then is the oracle's business.
ANSWERS = (
    BaseMissing,
    DeviceExists,
    DeviceIncomplete,
    DeviceInUse,
    MetadataFull,
    NoSpace,
    StoreRefused,
    StreamDamaged,
    TargetDiverged,
    TooLittleFree,
)


class InTurn:
    """`ThreadPoolExecutor` whose tasks run when they are handed in."""

    def __init__(self, *_arguments: object, **_options: object) -> None:
        pass

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: object) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:  # handed over, as an executor does
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None:
        pass


class Hexes(Identities):
    """`secrets` for the store: random to look at, the same in every run."""

    def token_hex(self, count: int) -> str:
        return self._random.randbytes(count).hex()


@contextmanager
def transfers_simulated() -> Iterator[None]:
    """Small files are simulated, and the store is the one of the disk whose pool was opened last."""

    def open_objects(url: str) -> Objects:
        return Objects(url, SimulatedObjects.in_use, attempts=1)

    with ExitStack() as patches:
        for owner, name, value in (
            (remote_blocks, "os", IN_PLACE_OF_OS),
            (lazy_device, "open_objects", open_objects),
            (store_module, "open_objects", open_objects),
            (hydration, "ThreadPoolExecutor", InTurn),
            (hydration, "WINDOW_BYTES", BLOCK_BYTES),
            (lazy_device, "READAHEAD_BYTES", BLOCK_BYTES),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


class MarkedTransfers(Transfers):
    """Leaves marks around every step of a transfer."""

    def __init__(self, scenario: TransferScenario) -> None:
        super().__init__(scenario.pool)
        self._scenario = scenario
        self._beginning: ExitStack | None = None

    def _make(self, state: ReceivingState, base: CatalogEntry | None) -> CatalogEntry:
        scenario = self._scenario
        half = Half(
            target=state.target,
            content_id=state.content_id,
            contents=scenario.days.by_content_id[state.content_id].contents,
            streamed=True,
            base_content_id=state.base_content_id,
            resumable=state.resumable,
            read_only=state.read_only,
        )
        step = BeginReceiving(
            state.target + HIDDEN_SUFFIX, scenario.number(), half, None if base is None else base.name
        )
        with ExitStack() as self._beginning:
            self._beginning.enter_context(scenario.marked(step))
            return super()._make(state, base)

    def _sized(self, entry: CatalogEntry, state: ReceivingState) -> CatalogEntry:
        if self._beginning is not None:
            # From inside of `_make`: the device is there from here on.
            self._beginning.close()
            self._beginning = None
        if entry.size_bytes == state.size_bytes:
            return super()._sized(entry, state)
        with self._scenario.marked(SizeReceiving(entry.name)):
            return super()._sized(entry, state)

    def note(self, entry: CatalogEntry, position_bytes: int) -> CatalogEntry:
        with self._scenario.marked(Note(entry.name, position_bytes)):
            return super().note(entry, position_bytes)

    def finish(self, entry: CatalogEntry) -> Any:
        with self._scenario.marked(Finish(entry.name)):
            return super().finish(entry)

    def abort(self, name: str) -> None:
        with self._scenario.marked(steps.Delete(name + HIDDEN_SUFFIX)):
            super().abort(name)


class TransferScenario(Scenario):
    """One run. What there is to travel is `days`. Only inside `transfers_simulated()`."""

    def __init__(
        self,
        disk: SimulatedDisk,
        random: Random,
        days: TravellingSnapshots,
        *,
        nbd: bool,
        world: World | None = None,
        first_number: int = 0,
    ) -> None:
        self.travelling = self.days = days
        self._hexes = Hexes(first_number)
        self._checkpoint_seconds = random.choice((AT_ONCE, AT_ONCE, NEVER))
        self._note_seconds = random.choice((AT_ONCE, AT_ONCE, NEVER))
        self._meddling = False
        super().__init__(disk, random, nbd=nbd, world=world, first_number=first_number)

    @classmethod
    def successor(
        cls, run: Scenario, disk: SimulatedDisk, random: Random, world: World, first_number: int
    ) -> Scenario:
        assert run.travelling is not None
        return TransferScenario(
            disk, random, run.travelling, nbd=False, world=world, first_number=first_number
        )

    def _open(self):
        pool = super()._open()
        self.pool = pool
        pool.transfers = MarkedTransfers(self)
        return pool

    @contextmanager
    def timed(self) -> Iterator[None]:
        with (
            super().timed(),
            mock.patch.object(hydration, "CHECKPOINT_SECONDS", self._checkpoint_seconds),
            mock.patch.object(receiving, "NOTE_SECONDS", self._note_seconds),
            mock.patch.object(lazy_devices, "uuid", self._identities),
            mock.patch.object(store_module, "secrets", self._hexes),
        ):
            yield

    # --- choosing ---

    # How often each is chosen, when any is.
    weights: ClassVar[dict[str, int]] = {
        "receive": 7,
        "resume": 14,
        "abort": 2,
        "pull": 6,
        "hydrate": 12,
        "abort-pull": 2,
    }

    def choose(self) -> str:
        transfers = [name for name, (_, possible) in TRANSFERS.items() if possible(self)]
        if transfers and self.random.random() < 0.5:
            return self.random.choices(transfers, [self.weights[name] for name in transfers])[0]
        return super().choose()

    def take(self, choice: str) -> None:
        self.disk.objects.refused = False
        if self.random.random() < 0.1:
            self.disk.objects.refuse_after = self.random.randrange(6)
        try:
            if choice in TRANSFERS:
                TRANSFERS[choice][0](self)
            else:
                super().take(choice)
        except OSError as error:
            if not self._excused(error):
                raise
            self.text[-1] += f" ({error})"
        finally:
            self.disk.objects.refuse_after = None

    def _excused(self, error: OSError) -> bool:
        """A block that the store refuses, or that there is no space for, is an I/O error to a reader, and no loss."""
        lacking = self.disk.objects.refused or not self.pool.engine._has_space()
        return error.errno == errno.ENOSPC or (error.errno == errno.EIO and lacking)

    def _some_device(self, accept: Callable[[DeviceModel], bool] = lambda _: True) -> str | None:
        return super()._some_device(lambda model: model.half is None and accept(model))

    @contextmanager
    def _structural(self, step: Step) -> Iterator[None]:
        try:
            with super()._structural(step):
                yield
        except ANSWERS as error:
            self.text[-1] += f" ({type(error).__name__})"

    def _halves(self, *, streamed: bool) -> list[str]:
        world = self.oracle.world
        return [name for name, model in world.items() if model.half and model.half.streamed == streamed]

    def _entry(self, name: str) -> CatalogEntry:
        entry = self.pool.catalog.by_name(name)
        assert entry is not None, name
        return entry

    # --- streams ---

    def receive_something(self) -> None:
        """A stream into a new device, or an increment in place of its base."""
        if len(self.oracle.world) >= DEVICES_MAX + 1:
            return
        day = self.random.choice(self.days.days)
        bases = self._bases(day)
        increment = bool(bases) and self.random.random() < 0.8
        name = f"t{self.number()}"
        if increment and self.random.random() < 0.5:
            name = self.random.choice(bases)
            self._disconnect(name)
        stream = self.days.stream(day, increment=increment)
        options = ReceiveOptions(name, self.random.random() < 0.6, self.random.random() < 0.7)
        self.text[-1] += f" {day.name}{' increment' if increment else ''} as {name}"
        self._take_in(stream, options)

    def _bases(self, day: Day) -> list[str]:
        """Whole devices that hold the day before."""
        if not day.number:
            return []
        wanted = self.days.days[day.number - 1].content_id
        return [
            entry.name
            for entry in self.pool.catalog.entries()
            if entry.content_id == wanted and entry.receiving is None and not is_lazy(entry)
        ]

    def resume_something(self) -> None:
        """Go on with a half-received device, or begin it anew where it cannot be gone on with."""
        name = self.random.choice(self._halves(streamed=True))
        half = self.oracle.world[name].half
        assert half is not None
        day = self.days.by_content_id[half.content_id]
        start = half.position_bytes if half.resumable else 0
        self._disconnect(half.target)
        stream = self.days.stream(day, increment=half.base_content_id is not None, start_bytes=start)
        self.text[-1] += f" {name} from {start}"
        self._take_in(stream, ReceiveOptions(half.target, half.resumable, half.read_only))

    def abort_something(self) -> None:
        name = self.random.choice(self._halves(streamed=True))
        self.text[-1] += f" {name}"
        self.pool.transfers.abort(name.removesuffix(HIDDEN_SUFFIX))

    def _take_in(self, stream: bytes, options: ReceiveOptions) -> None:
        if self.random.random() < 0.4:
            stream = stream[: self.random.randrange(len(stream))]
            self.text[-1] += f" cut at {len(stream)}"
        try:
            receive(self.pool, io.BytesIO(stream).readinto, options, self._between_records)
        except ANSWERS as error:
            self.text[-1] += f" ({type(error).__name__})"

    def _between_records(self, _done: int, _total: int) -> None:
        """What others do while a stream comes in."""
        if self.random.random() < 0.25:
            choice = self.random.choice(
                ("write", "trim", "flush", "periodic", "snapshot", "delete", "rename")
            )
            self.text[-1] += f" [{choice}"
            getattr(self, CHOICES[choice][1].__name__)()
            self.text[-1] += "]"

    # --- the store ---

    def pull_something(self) -> None:
        if len(self.oracle.world) >= DEVICES_MAX:
            return
        day, lazily = self.random.choice(self.days.days), self.random.random() < 0.65
        read_only, name = self.random.random() < 0.3, f"p{self.number()}"
        half = None
        if not lazily:
            half = Half(name, day.content_id, day.contents, streamed=False, read_only=read_only)
        with self._structural(BeginPull(name, self.number(), day.contents, read_only, half)):
            self.pool.begin_pull(PullRequest(URL, day.name, name, lazily, read_only))

    def _remote_devices(self) -> list[str]:
        return [name for name, model in self.oracle.world.items() if model.remote]

    def hydrate_something(self) -> None:
        """Fetch what is missing, as the background does; others are at work meanwhile."""
        name = self.random.choice(self._remote_devices())
        self.text[-1] += f" {name}"
        entry, model = self._entry(name), self.oracle.world[name]
        lazy = self.pool.lazy.of(entry)
        assert lazy is not None
        objects = self.disk.objects
        if self.random.random() < 0.4:
            objects.refuse_after = self.random.randrange(12)
        objects.under_way = lambda key: self._meddle(key, name, model)
        alone = self.disk.before is None
        if alone:
            self.disk.before = lambda operation, count: self._read_while_flushing(lazy, operation, count)
        try:
            hydration.hydrate(lazy, threading.Event())
        except (StoreRefused, hydration.StoppedError) as error:
            self.text[-1] += f" ({type(error).__name__})"
            return
        finally:
            objects.under_way, objects.refuse_after = lambda _: None, None
            if alone:
                self.disk.before = None
        if self.oracle.world.get(name) is not None and self.oracle.world[name].number == model.number:
            with self.marked(Complete(name)):
                self.pool.lazy.complete(entry)

    def _read_while_flushing(self, lazy: LazyDevice, operation: str, count: int) -> int:
        """While a commit waits for the disk, a reader has another block fetched; nothing keeps it from that."""
        engine = self.pool.engine
        remote = [block for block in lazy.remote.bits.search(bitarray("1")) if block not in lazy._flying]
        # Where space had to be made, the reader would wait for the end of the commit.
        roomy = engine.free.free_blocks > ROOM_BLOCKS and engine._room_blocks >= CHUNK_COST_BLOCKS
        flushing = operation in ("data flush", "metadata flush")
        if flushing and remote and roomy and not self._meddling and self.random.random() < 0.3:
            self._meddling = True
            try:
                block = self.random.choice(remote)
                self.text[-1] += f" [read {block}]"
                with suppress(OSError):
                    lazy.ensure_local(block, block + 1)
            finally:
                self._meddling = False
        return count

    def abort_pull(self) -> None:
        name = self.random.choice(self._halves(streamed=False))
        with self._structural(steps.Delete(name)):
            self.pool.abort_pull(name)

    def _meddle(self, key: str, name: str, model: DeviceModel) -> None:
        """While a pack is on its way into a device, somebody else changes that very device."""
        if not key.startswith("packs/") or self._meddling or self.random.random() < 0.5:
            return
        if self.oracle.world.get(name) is not model:
            return
        self._meddling = True
        refuse_after, self.disk.objects.refuse_after = self.disk.objects.refuse_after, None
        try:
            choice = self.random.random()
            if choice < 0.2:
                self.text[-1] += " [periodic]"
                self._periodic()
            elif model.half is not None:
                self._look()
            elif choice < 0.35 and len(self.oracle.world) < DEVICES_MAX:
                self.text[-1] += " [snapshot]"
                self._snapshot(name)
            elif choice < 0.4:
                self.text[-1] += " [delete]"
                self._disconnect(name)
                with self._structural(steps.Delete(name)):
                    self.pool.delete(name)
            elif not model.read_only:
                self._change_blocks(name, model, self._block_on_its_way(name))
        finally:
            self._meddling = False
            self.disk.objects.refuse_after = refuse_after

    def _block_on_its_way(self, name: str) -> int | None:
        """The block that the request is about, more often than not."""
        lazy = self.pool.lazy.of(self._entry(name))
        flying = [] if lazy is None else sorted(lazy._flying)
        return flying[0] if flying and self.random.random() < 0.7 else None

    def _change_blocks(self, name: str, model: DeviceModel, block: int | None) -> None:
        """Write, zero or discard whole blocks; they need not be fetched for that."""
        random = self.random
        client = DirectClient(self, self.pool.open_session(self._entry(name)), self.pool, name)
        try:
            if block is None:
                block = random.randrange(-(-model.sectors // BLOCK_SECTORS))
            first = block * BLOCK_SECTORS
            count = min(BLOCK_SECTORS * random.randrange(1, 3), model.sectors - first)
            choice, number = random.random(), self.number()
            zeros = Change(model.number, first, np.zeros(count, np.int32), number)
            if choice < 0.45:
                self.text[-1] += f" [write {model.number}:{first}+{count}]"
                written = self.disk.contents.intern(stamp(model.number, number, first, count))
                client.write(Change(model.number, first, written, number), durable=random.random() < 0.2)
            elif choice < 0.75:
                self.text[-1] += f" [trim {model.number}:{first}+{count}]"
                client.trim(zeros, first, count)
            else:
                self.text[-1] += f" [zero {model.number}:{first}+{count}]"
                client.zero(zeros, keep_allocated=random.random() < 0.5)
            if random.random() < 0.3:
                self.flush_through(client)
        finally:
            client.close()

    # --- comparing ---

    def compare(self, name: str, *, exact: bool = True) -> None:
        model = self.oracle.world[name]
        try:
            if model.half is None:
                super().compare(name, exact=exact)
            else:
                self._compare_half(name, model)
        except OSError as error:
            if not (model.remote and self._excused(error)):
                raise

    def _compare_half(self, name: str, model: DeviceModel) -> None:
        actual = self.disk.contents.intern(read_hidden(self.pool, self._entry(name)))
        strangers = model.strangers(actual)
        if len(strangers):
            raise Violation(
                f"{name} holds what it must not at sectors {strangers[:8].tolist()}, no cut involved"
            )


# What is done, and when it is possible.
TRANSFERS: dict[str, tuple[Callable[[TransferScenario], None], Callable[[TransferScenario], object]]] = {
    "receive": (TransferScenario.receive_something, lambda _: True),
    "resume": (TransferScenario.resume_something, lambda run: run._halves(streamed=True)),
    "abort": (TransferScenario.abort_something, lambda run: run._halves(streamed=True)),
    "pull": (TransferScenario.pull_something, lambda _: True),
    "hydrate": (TransferScenario.hydrate_something, TransferScenario._remote_devices),
    "abort-pull": (TransferScenario.abort_pull, lambda run: run._halves(streamed=False)),
}


def transfer_scenario_of(seed: int, *, steps_max: int, contents: Contents) -> TransferScenario:
    """The scenario of a seed, ready to `run`. Only inside `transfers_simulated()`."""
    random = Random(f"transfers {seed}")
    disk, days = prepared(random, contents)
    return TransferScenario(disk, random, days, nbd=random.random() < 0.4)


def prepared(random: Random, contents: Contents) -> tuple[SimulatedDisk, TravellingSnapshots]:
    """An empty pool, and a store with what is to travel."""
    days = TravellingSnapshots(random.getrandbits(64), contents)
    disk = SimulatedDisk(contents, metadata_blocks=random.choice((200, 256)))
    disk.objects.objects = dict(days.objects)
    disk.start.store = dict(days.objects)
    disk.punches = random.random() < 0.85
    disk.format(data_blocks=random.randrange(12, 44))
    return disk, days

"""Deliberate mistakes in the engine, to show that the crash search finds mistakes.

Each mutant is a context manager that replaces functions of the real packages for its duration, in tests only. Some
are mistakes that the search did find once. What a mutant breaks is said in `MUTANTS`, with the number of crash
states within which it must be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np

from metadata import pool_metadata
from metadata.pool_metadata import PoolMetadata
from metadata.transaction import Transaction
from nbd.constants import CommandFlag
from nbd.execution import Executor
from tests.fakes.crash_search import Budget, Found, Search
from tests.fakes.journal_mutants import journal_believed_after_a_reboot, replay_commits_unflushed_data
from tests.fakes.simulated_disk import SimulatedCatalog, SimulatedData, SimulatedDisk
from thinpool.block_map import MAPPED
from thinpool.catalog import Catalog, Put
from thinpool.committer import Committer
from thinpool.device import ThinDevice
from thinpool.engine import Engine
from thinpool.free_map import FreeMap
from thinpool.pool import Pool
from thinpool.reclaim import Reclaimer
from thinpool.session import Session


def _instead(owner: object, name: str, function: object) -> AbstractContextManager[object]:
    return mock.patch.object(owner, name, function)


def data_not_flushed() -> AbstractContextManager[object]:
    return _instead(SimulatedData, "flush", lambda self: None)


def superblock_first() -> AbstractContextManager[object]:
    def write(store, prepared) -> None:  # noqa: ANN001
        if prepared.superblock is not None:
            store.write(0, prepared.superblock.pack())
            for first, data in prepared.runs:
                store.write(first, data)
            store.flush()

    return _instead(pool_metadata, "write_prepared", write)


def one_metadata_flush() -> AbstractContextManager[object]:
    def write(store, prepared) -> None:  # noqa: ANN001
        if prepared.superblock is not None:
            for first, data in prepared.runs:
                store.write(first, data)
            store.write(0, prepared.superblock.pack())
            store.flush()

    return _instead(pool_metadata, "write_prepared", write)


def superblock_not_flushed() -> AbstractContextManager[object]:
    def write(store, prepared) -> None:  # noqa: ANN001
        if prepared.superblock is not None:
            for first, data in prepared.runs:
                store.write(first, data)
            store.flush()
            store.write(0, prepared.superblock.pack())

    return _instead(pool_metadata, "write_prepared", write)


@contextmanager
def _early_frees(use: Callable[[Engine, np.ndarray], None], *, reused: bool) -> Iterator[None]:
    """Data blocks that an unmapping frees are used by `use` at once, not after the commit."""
    early: set[int] = set()
    original_remove, original_add = ThinDevice._remove, Reclaimer.add

    def remove(self, begin: int, end: int) -> int:  # noqa: ANN001
        metadata = self.engine.metadata
        before = metadata.data_counts(0, metadata.data_blocks)
        removed = original_remove(self, begin, end)
        after = metadata.data_counts(0, metadata.data_blocks)
        freed = np.flatnonzero((before > 0) & (after == 0)).astype(np.uint64)
        if reused:
            early.update(freed.tolist())
        use(self.engine, freed)
        return removed

    def add(self, blocks: np.ndarray) -> None:  # noqa: ANN001
        known = np.array([block in early for block in blocks.tolist()], np.bool_)
        early.difference_update(blocks.tolist())
        original_add(self, blocks[~known])

    with _instead(ThinDevice, "_remove", remove), _instead(Reclaimer, "add", add):
        yield


def _punch(engine: Engine, blocks: np.ndarray) -> None:
    for block in blocks.tolist():
        engine.data.punch(block * engine.block_bytes, engine.block_bytes)


def _release(engine: Engine, blocks: np.ndarray) -> None:
    # Not punched: that would be another mistake. Their first user clears them.
    engine.free.release(blocks)
    engine.free._scrubbed[: len(engine.free._scrubbed)] = 0


def freed_data_reused_at_once() -> AbstractContextManager[object]:
    return _early_frees(_release, reused=True)


def punched_before_commit() -> AbstractContextManager[object]:
    return _early_frees(_punch, reused=False)


@contextmanager
def names_promoted_early() -> Iterator[None]:
    original = Catalog.stage

    def stage(self, transaction_id: int, changes) -> None:  # noqa: ANN001
        original(self, transaction_id, changes)
        self.promote(transaction_id)

    with _instead(Catalog, "stage", stage):
        yield


@contextmanager
def names_staged_in_memory_only() -> Iterator[None]:
    waiting: list = []

    def stage(self, transaction_id: int, changes) -> None:  # noqa: ANN001
        waiting[:] = changes

    with (
        _instead(Catalog, "stage", stage),
        _instead(Catalog, "promote", lambda self, transaction_id: self.apply(list(waiting))),
    ):
        yield


def staged_names_forgotten_on_open() -> AbstractContextManager[object]:
    return _instead(Catalog, "recover", lambda self, transaction_id: self.discard_staged())


@contextmanager
def staged_names_always_promoted_on_open() -> Iterator[None]:
    def recover(self, transaction_id: int) -> None:  # noqa: ANN001
        found = self._connection.execute("SELECT transaction_id FROM staged").fetchone()
        if found is not None:
            self.promote(int(found[0]))

    with _instead(Catalog, "recover", recover):
        yield


def transaction_id_not_moved() -> AbstractContextManager[object]:
    return _instead(PoolMetadata, "set_transaction_id", lambda self, value: None)


def flush_acknowledged_early() -> AbstractContextManager[object]:
    return _instead(Session, "flush", lambda self: None)


@contextmanager
def fua_ignored() -> Iterator[None]:
    original = Executor._modify

    def modify(self, request, payload) -> None:  # noqa: ANN001
        original(self, request._replace(flags=request.flags & ~CommandFlag.FUA), payload)

    with _instead(Executor, "_modify", modify):
        yield


def flush_skips_unmappings() -> AbstractContextManager[object]:
    def commit(self) -> None:  # noqa: ANN001
        with self.transaction:
            if any(device.pending for device in self.devices.values()):
                self.commit()
            else:
                self.data.flush()

    return _instead(Engine, "commit_if_dirty", commit)


def free_blocks_not_scrubbed() -> AbstractContextManager[object]:
    def scrub(self, region: int) -> None:  # noqa: ANN001
        self._scrubbed[region] = 1

    return _instead(FreeMap, "_scrub_region", scrub)


def freed_blocks_not_punched() -> AbstractContextManager[object]:
    def give_back(self, blocks: np.ndarray) -> int:  # noqa: ANN001
        self._free.release(blocks)
        return len(blocks)

    return _instead(Reclaimer, "_return", give_back)


def freed_metadata_reused_at_once() -> AbstractContextManager[object]:
    def list_free(self, chunk: int) -> list[int]:  # noqa: ANN001
        free = np.flatnonzero(self.counts.chunk(chunk) == 0)
        inside = free[free < self.counts.blocks]
        return inside[::-1].tolist()

    return _instead(Transaction, "_list_free", list_free)


@contextmanager
def metadata_changed_in_place() -> Iterator[None]:
    original = Transaction.replace

    def change(self, location: int) -> tuple[int, bool]:  # noqa: ANN001
        if not self.is_shared(location):
            self._fresh.add(location)
        return original(self, location)

    with _instead(Transaction, "replace", change):
        yield


@contextmanager
def snapshot_misses_new_mappings() -> Iterator[None]:
    def take(self, device_id: int, then=None, *, replacing: bool = False) -> None:  # noqa: ANN001
        engine = self.engine
        with self.quiet():
            with engine.changing_tree():
                engine.metadata.create_snapshot(device_id, self.device_id, replacing=replacing)
                engine.time = engine.metadata.time
                self.shared_before = engine.metadata.device(self.device_id).snapshotted_time
            self._judged.setall(0)
            if then is not None:
                then()

    # Admission looks at the space there is, which brings mappings into the tree as well.
    admit = _instead(Pool, "_admit", lambda self, *_, **__: None)
    with admit, _instead(ThinDevice, "take_point_in_time", take):
        yield


@contextmanager
def origin_writes_into_its_snapshot() -> Iterator[None]:
    original = ThinDevice.take_point_in_time

    def take(self, device_id: int, *arguments, **named) -> None:  # noqa: ANN001, ANN002, ANN003
        before = self.shared_before
        original(self, device_id, *arguments, **named)
        self.shared_before = before

    with _instead(ThinDevice, "take_point_in_time", take):
        yield


@contextmanager
def shared_block_not_copied() -> Iterator[None]:
    original = ThinDevice._fill

    def fill(self, block: int, old_entry: int, inside: int, data) -> None:  # noqa: ANN001
        original(self, block, 1, inside, data)

    with _instead(ThinDevice, "_fill", fill):
        yield


@contextmanager
def half_of_the_shared_block_copied() -> Iterator[None]:
    original = ThinDevice._fill

    def fill(self, block: int, old_entry: int, inside: int, data) -> None:  # noqa: ANN001
        original(self, block, old_entry, inside, data)
        half = self.block_bytes // 2
        if old_entry >= MAPPED and inside + len(data) <= half:
            self.engine.data.zero(block * self.block_bytes + half, half)

    with _instead(ThinDevice, "_fill", fill):
        yield


@contextmanager
def sharing_judged_in_transaction() -> Iterator[None]:
    original = ThinDevice._judge_sharing

    def judge(self, index: int) -> None:  # noqa: ANN001
        with mock.patch.object(PoolMetadata, "dirty", new=False):
            original(self, index)

    with _instead(ThinDevice, "_judge_sharing", judge):
        yield


def metadata_length_not_durable() -> AbstractContextManager[object]:
    import os

    from tests.fakes.disk_history import File

    def lengthen(self, length_bytes: int) -> None:  # noqa: ANN001
        os.ftruncate(self.metadata, length_bytes)
        self.resized(File.METADATA, length_bytes)

    return _instead(SimulatedDisk, "_lengthen_metadata", lengthen)


def data_length_not_durable() -> AbstractContextManager[object]:
    import os

    from tests.fakes.disk_history import File

    def grow(self, blocks: int) -> None:  # noqa: ANN001
        os.ftruncate(self.descriptor, blocks * self.block_bytes)
        self._disk.resized(File.DATA, blocks * self.block_bytes)
        self._map(blocks)

    @contextmanager
    def both() -> Iterator[None]:
        # The data flush of the commit that tells of the new length would hide it.
        with _instead(SimulatedData, "grow", grow), overwrites_not_flushed():
            yield

    return both()


@contextmanager
def overwrites_not_flushed() -> Iterator[None]:
    original_flush, original_commit = SimulatedData.flush, Engine._commit

    def commit(self, *given):  # noqa: ANN001, ANN002, ANN202
        fresh = bool(len(self.free._fresh)) or any(device.pending for device in self.devices.values())
        flush = original_flush if fresh else (lambda data: None)
        with mock.patch.object(SimulatedData, "flush", flush):
            return original_commit(self, *given)

    with _instead(Engine, "_commit", commit):
        yield


@contextmanager
def flush_of_one_device_only() -> Iterator[None]:
    original_flush, original_collect = Session.flush, Engine.collect

    def flush(self) -> None:  # noqa: ANN001
        own = self.device
        with mock.patch.object(Engine, "collect", lambda engine: own.apply_pending()):
            original_flush(self)

    with _instead(Session, "flush", flush), _instead(Engine, "collect", original_collect):
        yield


def rollback_in_two_steps() -> AbstractContextManager[object]:
    original = Pool.rollback

    def rollback(self, name: str, snapshot: str, *, keep=None):  # noqa: ANN001, ANN202
        if keep is not False:
            return original(self, name, snapshot, keep=keep)
        read_only = self._entry(name).read_only
        self.delete(name)
        return self.create_snapshot(snapshot, name, read_only=read_only)

    return _instead(Pool, "rollback", rollback)


@contextmanager
def shrink_zeroes_first() -> Iterator[None]:
    def cut(self, entry, size_bytes: int) -> None:  # noqa: ANN001
        end = -(-size_bytes // self.block_bytes)
        tail = min(end * self.block_bytes, entry.size_bytes) - size_bytes
        if tail:
            session = self._device(entry).open()
            session.zero(size_bytes, tail, keep_allocated=False, fast_only=False)
            session.close()
        with self._step([Put(replace(entry, size_bytes=size_bytes))]):
            last = max(end, -(-entry.size_bytes // self.block_bytes))
            self._device(entry).unmap(end, last, with_the_step=True)

    with _instead(Pool, "_cut", cut):
        yield


def growth_shows_the_old_tail() -> AbstractContextManager[object]:
    return _instead(Pool, "_clear_past_end", lambda self, entry: None)


def rename_forgets_the_snapshots() -> AbstractContextManager[object]:
    return _instead(Pool, "_reparented", lambda self, origin, new_origin: [])


def catalogue_written_in_two_steps() -> AbstractContextManager[object]:
    def apply(self, changes, *, forget_staged: bool) -> None:  # noqa: ANN001
        for change in changes:
            original(self, [change], forget_staged=False)
        if forget_staged:
            self.discard_staged()

    original = Catalog._apply
    return _instead(SimulatedCatalog, "_apply", apply)


def mapped_before_filled() -> AbstractContextManager[object]:
    def provision(self, index: int, inside: int, data) -> int:  # noqa: ANN001
        engine = self.engine
        # Without the lock while the block is filled, or nobody could see that it is mapped too early.
        with self.lock:
            entry = self._own(index)
            if entry:
                engine.data.write(((entry >> 24) - 1) * self.block_bytes + inside, data)
                return entry
            block, old = engine.take_block(self.device_id), self.block_map.entries[index]
            entry = self._map(index, block)
        self._fill(block, old, inside, data)
        return entry

    return _instead(ThinDevice, "provision", provision)


@contextmanager
def data_flushed_before_the_lists_are_taken() -> Iterator[None]:
    original = Engine.collect

    def commit(self, *given):  # noqa: ANN001, ANN002, ANN202
        self.data.flush()
        with mock.patch.object(SimulatedData, "flush", lambda self: None):
            return original_commit(self, *given)

    original_commit = Engine._commit
    with _instead(Engine, "_commit", commit), _instead(Engine, "collect", original):
        yield


@contextmanager
def write_under_way_not_waited_for() -> Iterator[None]:
    original = ThinDevice.apply_pending

    def apply(self) -> None:  # noqa: ANN001
        if self.pending:
            original(self)

    with _instead(ThinDevice, "apply_pending", apply):
        yield


def readers_not_waited_for() -> AbstractContextManager[object]:
    from thinpool.reclaim import UNPINNED

    return _instead(Engine, "oldest_pin", lambda self: UNPINNED)


def snapshot_waits_for_nobody() -> AbstractContextManager[object]:
    @contextmanager
    def quiet(self) -> Iterator[None]:  # noqa: ANN001
        yield

    return _instead(ThinDevice, "quiet", quiet)


def flush_joins_the_running_commit() -> AbstractContextManager[object]:
    def flush(self) -> None:  # noqa: ANN001
        with self._turn:
            if self._running:
                number = self._started
                while self._done < number:
                    self._turn.wait()
                return
        original(self)

    original = Committer.flush
    return _instead(Committer, "flush", flush)


@dataclass(frozen=True, slots=True)
class Mutant:
    """`states`: images within which the search, from the first seed on, must have found it.

    `first_seed`: where the default tests begin, so that they need not go all the way every time.
    `threads`: only several at work can show it. `uncut`: it shows without any power cut, to a rare order of events
    only; scenarios are run and not cut then, and `states` is their number.
    """

    switch: Callable[[], AbstractContextManager[object]]
    breaks: str
    states: int
    first_seed: int = 0
    threads: bool = False
    uncut: bool = False

    @property
    def name(self) -> str:
        return self.switch.__name__


MUTANTS = [
    Mutant(journal_believed_after_a_reboot, "replays a journal that a power cut left", 20_000),
    Mutant(
        replay_commits_unflushed_data, "commits what a killed server answered without flushing it", 20_000
    ),
    Mutant(data_not_flushed, "commits without flushing the data first", 20_000),
    Mutant(superblock_first, "writes the superblock before the blocks it names", 20_000),
    Mutant(one_metadata_flush, "no flush between the blocks and the superblock", 20_000),
    Mutant(superblock_not_flushed, "no flush after the superblock", 20_000),
    Mutant(metadata_changed_in_place, "overwrites unshared committed blocks", 20_000),
    Mutant(freed_metadata_reused_at_once, "reuses metadata blocks freed in the transaction", 20_000),
    Mutant(freed_data_reused_at_once, "reuses data blocks freed in the transaction", 50_000, first_seed=3),
    Mutant(
        punched_before_commit, "punches data blocks before the commit that frees them", 75_000, first_seed=5
    ),
    Mutant(freed_blocks_not_punched, "hands out freed blocks with their old content", 20_000),
    Mutant(free_blocks_not_scrubbed, "trusts free blocks after a cut to read zeros", 20_000),
    Mutant(names_promoted_early, "promotes names before the metadata commit", 20_000),
    Mutant(names_staged_in_memory_only, "stages names without making them durable", 20_000),
    Mutant(staged_names_forgotten_on_open, "drops staged names whose metadata is committed", 20_000),
    Mutant(staged_names_always_promoted_on_open, "promotes staged names whose metadata is not", 20_000),
    Mutant(transaction_id_not_moved, "does not tie names to a commit", 20_000),
    Mutant(catalogue_written_in_two_steps, "promotes rows one by one", 20_000),
    Mutant(rename_forgets_the_snapshots, "leaves origins with the old name", 20_000),
    Mutant(flush_acknowledged_early, "acknowledges FLUSH without a commit", 20_000),
    Mutant(fua_ignored, "acknowledges FUA without a commit", 20_000),
    Mutant(flush_skips_unmappings, "a flush does not commit when only trims happened", 30_000, first_seed=1),
    Mutant(snapshot_misses_new_mappings, "a snapshot leaves out mappings not in the tree yet", 20_000),
    Mutant(origin_writes_into_its_snapshot, "the origin does not copy after a snapshot", 20_000),
    Mutant(shared_block_not_copied, "breaking of sharing does not copy", 20_000),
    Mutant(half_of_the_shared_block_copied, "copies less of a shared block than it must", 20_000),
    Mutant(overwrites_not_flushed, "a flush skips the data when nothing was allocated", 20_000),
    Mutant(flush_of_one_device_only, "a flush covers its own device only", 30_000, first_seed=1),
    Mutant(rollback_in_two_steps, "rolls back by deleting first", 20_000),
    Mutant(data_length_not_durable, "names data blocks a cut takes away", 20_000),
    Mutant(
        sharing_judged_in_transaction,
        "takes a block for its own whose sharer is not committed gone",
        50_000,
        first_seed=2,
    ),
    Mutant(metadata_length_not_durable, "names metadata blocks a cut takes away", 30_000),
    Mutant(shrink_zeroes_first, "shrinking destroys what it has not cut off yet", 20_000),
    Mutant(growth_shows_the_old_tail, "growing shows what shrinking cut off", 200_000, first_seed=13),
    Mutant(mapped_before_filled, "maps a block before its first content is written", 75_000, threads=True),
    Mutant(
        data_flushed_before_the_lists_are_taken,
        "flushes the data before taking the lists",
        75_000,
        threads=True,
    ),
    Mutant(
        write_under_way_not_waited_for,
        "commits past a write that has its block only",
        75_000,
        first_seed=1,
        threads=True,
    ),
    Mutant(
        readers_not_waited_for,
        "hands out blocks that are still being sent",
        300,
        first_seed=9,
        threads=True,
        uncut=True,
    ),
    Mutant(
        snapshot_waits_for_nobody,
        "takes a snapshot in the middle of a write",
        300,
        first_seed=79,
        threads=True,
        uncut=True,
    ),
    Mutant(
        flush_joins_the_running_commit,
        "a flush counts on a commit that began before it",
        200_000,
        first_seed=7,
        threads=True,
    ),
]


UNFIT = ("TypeError", "AttributeError", "NameError", "UnboundLocalError")
BUDGET = Budget(images_per_cut=12)


@dataclass(frozen=True, slots=True)
class Detection:
    """After how many crash states (or, uncut, scenarios) a mutant was found, and with which seed."""

    states: int
    seed: int


def detect(mutant: Mutant, first_seed: int = 0) -> Detection | None:
    """Search from a seed on until a mutant is found; None where it is not within `mutant.states`."""
    search, seed = Search(BUDGET), first_seed

    def spent() -> int:
        return seed - first_seed if mutant.uncut else search.tally.images + search.tally.nested_images

    while spent() <= mutant.states:
        with mutant.switch():
            try:
                if mutant.uncut:
                    search.uncut(seed)
                else:
                    search.seed(seed, threads=mutant.threads)
            except Found as found:
                # A function that no longer fits its caller is no mistake of the engine.
                assert not found.what.startswith(UNFIT), found.what
                return Detection(spent() + mutant.uncut, seed)
        seed += 1
    return None

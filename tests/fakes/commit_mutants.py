"""Deliberate mistakes in committing: what is durable when, and when a freed block is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import numpy as np

from metadata import pool_metadata
from metadata.transaction import Transaction
from tests.fakes.mutation import instead as _instead
from tests.fakes.simulated_disk import SimulatedData, SimulatedDisk
from thinpool.committer import Committer
from thinpool.device import ThinDevice
from thinpool.engine import Engine
from thinpool.free_map import FreeMap
from thinpool.reclaim import Reclaimer


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
def metadata_changed_in_place() -> Iterator[None]:
    original = Transaction.replace

    def change(self, location: int) -> tuple[int, bool]:  # noqa: ANN001
        if not self.is_shared(location):
            self._fresh.add(location)
        return original(self, location)

    with _instead(Transaction, "replace", change):
        yield


def freed_metadata_reused_at_once() -> AbstractContextManager[object]:
    def list_free(self, chunk: int) -> list[int]:  # noqa: ANN001
        free = np.flatnonzero(self.counts.chunk(chunk) == 0)
        inside = free[free < self.counts.blocks]
        return inside[::-1].tolist()

    return _instead(Transaction, "_list_free", list_free)


@contextmanager
def _early_frees(use: Callable[[Engine, np.ndarray], None], *, reused: bool) -> Iterator[None]:
    """Data blocks that an unmapping frees are used by `use` at once, not after the commit."""
    early: set[int] = set()
    original_remove, original_add = ThinDevice._remove, Reclaimer.add

    def remove(self, begin: int, end: int, *, may_commit: bool) -> int:  # noqa: ANN001
        metadata = self.engine.metadata
        before = metadata.data_counts(0, metadata.data_blocks)
        removed = original_remove(self, begin, end, may_commit=may_commit)
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


def freed_blocks_not_punched() -> AbstractContextManager[object]:
    def give_back(self, blocks: np.ndarray) -> int:  # noqa: ANN001
        self._free.release(blocks)
        return len(blocks)

    return _instead(Reclaimer, "_return", give_back)


def free_blocks_not_scrubbed() -> AbstractContextManager[object]:
    def scrub(self, region: int) -> None:  # noqa: ANN001
        self._scrubbed[region] = 1

    return _instead(FreeMap, "_scrub_region", scrub)


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

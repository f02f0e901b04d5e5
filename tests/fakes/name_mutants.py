"""Deliberate mistakes in changes of names and sizes, which must be one step with the metadata."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from metadata.pool_metadata import PoolMetadata
from tests.fakes.mutation import instead as _instead
from tests.fakes.simulated_disk import SimulatedCatalog
from thinpool.catalog import Catalog, Put
from thinpool.device_sizes import DeviceSizes
from thinpool.named_changes import NamedChanges
from thinpool.pool import Pool


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


def catalogue_written_in_two_steps() -> AbstractContextManager[object]:
    def apply(self, changes, *, promoted: int | None = None) -> None:  # noqa: ANN001
        for change in changes:
            original(self, [change])
        if promoted is not None:
            original(self, [], promoted=promoted)

    original = Catalog._apply
    return _instead(SimulatedCatalog, "_apply", apply)


def rename_forgets_the_snapshots() -> AbstractContextManager[object]:
    return _instead(NamedChanges, "reparented", lambda self, origin, new_origin: [])


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
        pool = self._pool
        end = -(-size_bytes // pool.block_bytes)
        tail = min(end * pool.block_bytes, entry.size_bytes) - size_bytes
        if tail:
            session = pool.device(entry).open()
            session.zero(size_bytes, tail, keep_allocated=False, fast_only=False)
            session.close()
        with pool.changes.step([Put(replace(entry, size_bytes=size_bytes))]):
            last = max(end, -(-entry.size_bytes // pool.block_bytes))
            pool.device(entry).unmap(end, last, with_the_step=True)

    with _instead(DeviceSizes, "_cut", cut):
        yield


def growth_shows_the_old_tail() -> AbstractContextManager[object]:
    return _instead(DeviceSizes, "_clear_past_end", lambda self, entry: None)

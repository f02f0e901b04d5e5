"""Deliberate mistakes in receiving and pulling: what is said to be here before it is, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from unittest import mock

from tests.fakes.mutation import instead
from tests.fakes.simulated_files import SimulatedOs
from thinpool import hydration
from thinpool.catalog import Put
from thinpool.engine import Engine
from thinpool.lazy_device import LazyDevice
from thinpool.lazy_devices import LazyDevices
from thinpool.pool import Pool
from thinpool.receiving import _Receiving
from thinpool.remote_blocks import untagged
from thinpool.transfers import Transfers


def _without_commit(owner: type, name: str) -> AbstractContextManager[object]:
    """What a function does, but for the commit that it begins with."""
    original = getattr(owner, name)

    def function(self, *arguments):  # noqa: ANN001, ANN002, ANN202
        with mock.patch.object(Engine, "commit_if_dirty", lambda engine: None):
            return original(self, *arguments)

    return instead(owner, name, function)


def named_before_its_data_is_durable() -> AbstractContextManager[object]:
    return _without_commit(Transfers, "finish")


def token_before_the_data_is_durable() -> AbstractContextManager[object]:
    return _without_commit(Transfers, "note")


def token_ahead_of_the_data() -> AbstractContextManager[object]:
    """The record that is about to be written counts already."""
    original = _Receiving._write

    def write(self, session, offset: int, data) -> None:  # noqa: ANN001
        self._position = offset + len(data)
        if self._resumable:
            self._note()
        original(self, session, offset, data)

    return instead(_Receiving, "_write", write)


def noted_with_an_old_row() -> AbstractContextManager[object]:
    return instead(Transfers, "_present", lambda self, entry: entry)


def replaced_in_two_steps() -> AbstractContextManager[object]:
    original = Transfers._whole

    def whole(self, entry, state, replaced):  # noqa: ANN001, ANN202
        made = original(self, entry, state, replaced)
        if replaced is not None:
            self._pool.catalog.apply([Put(replace(replaced, name=f"{replaced.name}/replaced"))])
        return made

    return instead(Transfers, "_whole", whole)


def written_device_passes_for_a_base() -> AbstractContextManager[object]:
    def open_session(self, entry):  # noqa: ANN001, ANN202
        with self.engine.transaction:
            present = self.catalog.by_name(entry.name)
            device = self.device(present)
            device.contexts = self.relatives(present)
            return device.open(self.lazy.of(present))

    return instead(Pool, "open_session", open_session)


def fetched_said_before_durable() -> AbstractContextManager[object]:
    def checkpoint(self) -> None:  # noqa: ANN001
        with self.device.lock:
            if not self.closed:
                self.remote.checkpoint(self.remote.bits.copy())
        self._commit()

    return instead(LazyDevice, "checkpoint", checkpoint)


def bits_copied_after_the_commit() -> AbstractContextManager[object]:
    def checkpoint(self) -> None:  # noqa: ANN001
        self._commit()
        with self.device.lock:
            if not self.closed:
                self.remote.checkpoint(self.remote.bits.copy())

    return instead(LazyDevice, "checkpoint", checkpoint)


def fetched_over_newer_content() -> AbstractContextManager[object]:
    def put(self, block: int, data) -> None:  # noqa: ANN001
        device = self.device
        with device.lock:
            device.block_map.ensure(block, block)
            if not self.closed and data is not None:
                if len(data):
                    device.provision(block, 0, data)
                else:
                    device.claim_zeroed(block)
            self.remote.bits[block] = 0

    return instead(LazyDevice, "_put", put)


def discards_not_recorded() -> AbstractContextManager[object]:
    def discard(self, begin: int, end: int) -> None:  # noqa: ANN001
        with self.device.lock:
            self.remote.bits[begin : min(end, len(self.remote.bits))] = 0

    return instead(LazyDevice, "discard", discard)


def lists_not_flushed() -> AbstractContextManager[object]:
    return instead(SimulatedOs, "fsync", lambda self, descriptor: None)


@contextmanager
def last_blocks_not_fetched() -> Iterator[None]:
    original = hydration._windows

    def windows(lazy):  # noqa: ANN001, ANN202
        yield from list(original(lazy))[:-1]
        lazy.remote.bits.setall(0)

    with instead(hydration, "_windows", windows):
        yield


@contextmanager
def complete_before_durable() -> Iterator[None]:
    with (
        instead(LazyDevice, "checkpoint", lambda self: None),
        _without_commit(LazyDevices, "complete"),
    ):
        yield


def _complete_by_hand(self, entry, release) -> None:  # noqa: ANN001
    """`LazyDevices.complete` with something let go of before the row says so."""
    pool = self._pool
    present, lazy = pool.catalog.by_id(entry.device_id), self._open.get(entry.device_id)
    if present is None or lazy is None:
        return
    pool.commit()
    release(self, lazy)
    pool.catalog.apply([Put(replace(present, tags=untagged(present.tags), receiving=None))])
    self.drop(entry.device_id)


def list_removed_before_the_row_says_so() -> AbstractContextManager[object]:
    def complete(self, entry) -> None:  # noqa: ANN001
        _complete_by_hand(self, entry, lambda _, lazy: lazy.remote.remove())

    return instead(LazyDevices, "complete", complete)


def hold_released_before_the_row_says_so() -> AbstractContextManager[object]:
    def release(devices, lazy) -> None:  # noqa: ANN001
        root = lazy.remote.origin.root
        others = [other for other in devices._open.values() if other is not lazy]
        if not any(other.remote.origin.root == root for other in others):
            devices._release(lazy)

    def complete(self, entry) -> None:  # noqa: ANN001
        _complete_by_hand(self, entry, release)

    return instead(LazyDevices, "complete", complete)


@contextmanager
def snapshot_shares_the_list() -> Iterator[None]:
    with instead(
        LazyDevices, "forked", lambda self, source, entry: (replace(entry, tags=dict(source.tags)), None)
    ):
        yield

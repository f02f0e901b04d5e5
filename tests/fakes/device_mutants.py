"""Deliberate mistakes in what a client asks of a device: flushes, first writes, sharing, snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

from metadata.pool_metadata import PoolMetadata
from nbd.constants import CommandFlag
from nbd.execution import Executor
from tests.fakes.mutation import instead as _instead
from thinpool.block_map import MAPPED
from thinpool.device import ThinDevice
from thinpool.engine import Engine
from thinpool.pool import Pool
from thinpool.session import Session


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


@contextmanager
def flush_of_one_device_only() -> Iterator[None]:
    original_flush, original_collect = Session.flush, Engine.collect

    def flush(self) -> None:  # noqa: ANN001
        own = self.device
        with mock.patch.object(Engine, "collect", lambda engine: own.apply_pending()):
            original_flush(self)

    with _instead(Session, "flush", flush), _instead(Engine, "collect", original_collect):
        yield


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


def snapshot_waits_for_nobody() -> AbstractContextManager[object]:
    @contextmanager
    def quiet(self) -> Iterator[None]:  # noqa: ANN001
        yield

    return _instead(ThinDevice, "quiet", quiet)

"""One operation of the disk fails: every one of a scenario in turn, in every way it can.

After it the request that met it fails and others go on, or the pool gives up; a flush that is acknowledged later is
one all the same; a failed commit leaves the pool read-only, marked as needing a check where that could still be
written; and what was committed is intact, after a cut at once and after opening again.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadata import FileStore, ShortRead
from tests.fakes.crash_oracle import Violation
from tests.fakes.disk_history import Contents
from tests.fakes.fault_search import Count, faults, with_fault
from tests.fakes.opening_faults import kills, open_with_fault
from tests.fakes.simulated_disk import SimulatedData, SimulatedDisk
from thinpool.data_file import DataFile
from thinpool.errors import ThinPoolError
from thinpool.mapping_journal import MappingJournal
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

SEEDS = tuple(range(int(os.environ.get("THINPOOL_FAULT_SEEDS", "4"))))
SHARDS = 4


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("seed", SEEDS)
def test_every_operation_fails_once(seed: int, shard: int) -> None:
    once = [fault for _, fault in faults(seed) if not fault.lasting]
    count = Count()
    for fault in once[shard::SHARDS]:
        with_fault(seed, fault, count)
    assert count.tried == len(once[shard::SHARDS])


@pytest.fixture
def one_kibibyte_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """System calls that do a part of what they were asked for, as they may."""
    pread, preadv, pwrite = os.pread, os.preadv, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: pread(fd, min(count, 1024), offset))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, offset: preadv(fd, [parts[0][:1000]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, memoryview(data)[:1000], offset))
    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *at: copy(a, b, min(count, 1000), *at))


@pytest.mark.usefixtures("one_kibibyte_at_a_time")
def test_short_transfers_are_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * 65536))
    store = FileStore(path, writable=True)
    content = bytes(range(256)) * 48
    store.write(1, content)
    assert store.read(1, 3) == content
    store.close()
    data = DataFile(path, block_bytes=65536, blocks=4, writable=True)
    data.write(65536, content)
    data.copy(65536, 3 * 65536, len(content))
    assert data.read(3 * 65536, len(content)) == content
    data.close()


def test_files_that_end_early_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(65536))
    store = FileStore(path, writable=True)
    data = DataFile(path, block_bytes=65536, blocks=1, writable=True)
    os.truncate(path, 6000)
    with pytest.raises(ShortRead):
        store.read(1, 1)
    with pytest.raises(OSError, match="ends before") as caught:
        data.read(0, 65536)
    assert caught.value.errno == errno.EIO
    store.close()
    data.close()


def test_no_memory_for_a_larger_map_leaves_the_pool_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk(Contents(), metadata_blocks=256)
    disk.format(data_blocks=8)
    pool = disk.open()
    pool.create_device("one", 4 * 65536)

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        with pytest.raises(OSError, match="memory"):
            pool.grow(16 * 65536, None)
    assert pool.status().data_bytes == 8 * 65536
    session = pool.open_session(pool.catalog.by_name("one"))  # type: ignore[arg-type]
    session.enter()
    session.write(0, memoryview(b"a" * 65536))
    session.leave()
    session.sent()
    session.flush()
    pool.grow(16 * 65536, None)
    assert session.read_bytes(0, 4) == b"aaaa"
    pool.close()


def test_an_opening_that_runs_out_of_descriptors_lets_go_of_everything(tmp_path: Path) -> None:
    location = PoolLocation.directory(tmp_path / "pool")
    create_pool(tmp_path / "pool", size_bytes=1 << 20)
    open_pool(location).close()
    results = []
    with no_gaps_between_descriptors() as next_free:
        for spare in range(12):
            try:
                with descriptors_limited_to(next_free + spare):
                    open_pool(location).close()
                results.append(True)
            except (OSError, ThinPoolError):
                results.append(False)
            gc.collect()  # a memory map holds its file until it is collected
            assert os.dup(0) == next_free, f"left open with {spare} descriptors to spare"
            os.close(next_free)
    assert results[0] is False
    assert results[-1] is True


@contextlib.contextmanager
def no_gaps_between_descriptors() -> Iterator[int]:
    """Every number below the one given is taken."""
    gc.collect()  # what earlier tests left
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken = [os.dup(0)]
    while taken[-1] < highest:
        taken.append(os.dup(0))
    try:
        yield taken[-1] + 1
    finally:
        for descriptor in taken:
            os.close(descriptor)


@contextlib.contextmanager
def descriptors_limited_to(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_fails_from_an_operation_on(seed: int) -> None:
    count = Count()
    for fault in [fault for _, fault in faults(seed) if fault.lasting][::7]:
        with_fault(seed, fault, count)
    assert count.refused
    assert count.gave_up


@pytest.mark.parametrize("seed", [0, 1, 3, 4])  # where something is left to replay
def test_opening_after_a_kill_survives_every_fault(seed: int) -> None:
    count = Count()
    for kill in kills(seed, 1):
        for _, fault in kill.faults():
            open_with_fault(kill, fault, count)
    assert count.refused


def first_violation(seeds: range, wanted: str) -> str:
    """What the search says first about faults of one kind of operation."""
    for seed in seeds:
        for operation, fault in faults(seed):
            if operation == wanted and not fault.lasting:
                try:
                    with_fault(seed, fault, Count())
                except Violation as found:
                    return str(found)
    return ""


def test_a_flush_that_is_tried_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake of many databases: the second fsync succeeds, and the pages are gone."""
    once = SimulatedData.flush

    def twice(data: SimulatedData) -> None:
        with contextlib.suppress(OSError):
            return once(data)
        return once(data)

    monkeypatch.setattr(SimulatedData, "flush", twice)
    assert "not change" in first_violation(range(6), "data flush")


def test_a_journal_forgotten_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An opening that could not read what it needs to replay, and starts a journal anew: answered writes are gone."""

    def first_violation_of_opening() -> None:
        for kill in kills(0, 1):
            for operation, fault in kill.faults():
                if operation == "journal read":
                    open_with_fault(kill, fault, Count())

    first_violation_of_opening()
    asked = SimulatedDisk._asked

    def caught(disk: SimulatedDisk, operation: str, do: Callable[..., object]) -> Callable[..., object]:
        real = asked(disk, operation, do)

        def careless(*arguments: object) -> object:
            try:
                return real(*arguments)
            except OSError:
                return []

        return careless

    monkeypatch.setattr(SimulatedDisk, "_asked", caught)
    with pytest.raises(Violation, match="wrong sectors"):
        first_violation_of_opening()


def test_a_journal_that_goes_on_with_a_gap_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MappingJournal, "give_up", lambda *_: None)
    assert "after a kill" in first_violation(range(6), "journal write")

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from metadata import FileStore, PoolMetadata, ShortRead
from tests.fakes.crash_check import Checker, ImageStore
from tests.fakes.crash_faults import FAILURES, KINDS, Fault, FaultyScenario, faulty_scenario_of
from tests.fakes.crash_oracle import Oracle, Violation
from tests.fakes.crash_search import subsets
from tests.fakes.disk_history import Contents, Kind, Replay
from tests.fakes.simulated_disk import SimulatedDisk
from thinpool.data_file import DataFile
from thinpool.errors import PoolPoisoned, ThinPoolError
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

STEPS = 22
SEEDS = tuple(range(int(os.environ.get("THINPOOL_FAULT_SEEDS", "6"))))
SHARDS = 4


@dataclass
class Count:
    """What was tried; printed by the deep runs."""

    runs: int = 0
    refused: int = 0
    gave_up: int = 0
    marked: int = 0
    images: int = 0


def operations(seed: int) -> list[str]:
    """The operations of a run without faults."""
    seen: list[str] = []
    fault = Fault()
    run = faulty_scenario_of(seed, fault, STEPS)

    def note(operation: str, count: int) -> int:
        seen.append(operation)
        return count

    run.disk.before = note
    run.run(STEPS)
    run.close()
    run.disk.close()
    return seen


def with_fault(seed: int, fault: Fault, count: Count) -> None:
    run = faulty_scenario_of(seed, fault, STEPS)
    text = f"seed {seed}, operation {fault.number} ({fault.kind}{', lasting' if fault.lasting else ''})"
    try:
        for _ in range(STEPS):
            run.step()
        where = f"{text}, {fault.struck}"
        if not fault.lasting:
            compare(run)
        if not run.over:
            behaves_after_giving_up(run)
        count.runs += 1
        count.refused += run.refused
        count.gave_up += run.pool.engine.failure is not None
        look_after_a_cut(run, count)
    except Exception as error:
        raise AssertionError(
            f"{text}, {fault.struck or 'never reached'}: {error!r}; did {'; '.join(run.text)}"
        ) from error
    finally:
        run.close()
        run.disk.close()
    # Comparing at the end is left out where everything fails.
    assert fault.struck or fault.lasting, f"{where} was never reached"


def compare(run: FaultyScenario) -> None:
    """Everything reads right; where the fault falls into reading itself, at the second try."""
    try:
        run.compare_all()
    except FAILURES:
        if not run.fault.struck:
            raise
        run.compare_all()


def behaves_after_giving_up(run: FaultyScenario) -> None:
    """A pool that gave up says so to everybody, for good."""
    engine = run.pool.engine
    if engine.failure is None:
        return
    run.disk.before = None
    with pytest.raises(PoolPoisoned):
        engine.commit_if_dirty()
    for name in run.oracle.world:
        entry = run.pool.catalog.by_name(name)
        if entry is None or entry.read_only:
            continue
        session = run.pool.open_session(entry)
        with pytest.raises(OSError, match="read-only"):
            session.flush()
        for length in (512, min(65536, entry.size_bytes)):
            session.enter()
            try:
                with pytest.raises(OSError, match="read-only"):
                    session.write(0, memoryview(bytes(length)))
            finally:
                session.leave()
                session.sent()
        session.close()


def look_after_a_cut(run: FaultyScenario, count: Count) -> None:
    """Images that a cut now would leave, or a kill, or closing as well as it goes."""
    # Where only the names could not be written, the metadata needs no check.
    poisoned = run.pool.engine.failure is not None and not run.fault.struck.startswith("catalogue")
    try:
        run.pool.close()
    except FAILURES as error:
        if not run.fault.struck:
            raise Violation(f"closing failed without a fault: {error}") from error
    replay, oracle = Replay(run.disk.start.copy()), Oracle()
    for event in run.disk.events:
        replay.apply(event)
        if event.kind is Kind.MARK:
            oracle.hear(event.payload)
    checker = Checker(run.disk.contents, after_faults=True)
    worlds = list(oracle.worlds())
    for image in subsets(replay, np.random.Generator(np.random.PCG64(run.fault.number)), 8):
        checker.check(image, worlds)
        count.images += 1
    latest = replay.latest()
    checker.look(latest, worlds)
    if poisoned and not run.fault.lasting:
        store = ImageStore(run.disk.contents.bytes_of(latest.metadata.contents[: latest.metadata.sectors]))
        marked = PoolMetadata.open(store, writable=False).needs_check  # type: ignore[arg-type]
        assert marked, "a failed commit could have been recorded"
        count.marked += 1


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("seed", SEEDS)
def test_every_operation_fails_once(seed: int, shard: int) -> None:
    count = Count()
    for number, operation in list(enumerate(operations(seed)))[shard::SHARDS]:
        for kind in KINDS[operation]:
            with_fault(seed, Fault(number, kind), count)
    print(seed, shard, count)


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
    for number, operation in list(enumerate(operations(seed)))[::3]:
        with_fault(
            seed, Fault(number, "ENOSPC" if "ENOSPC" in KINDS[operation] else "EIO", lasting=True), count
        )
    print(seed, count)

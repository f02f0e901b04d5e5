"""One operation of the disk fails: every one of a scenario in turn, in every way it can.

After it the request that met it fails and others go on, or the pool gives up; a flush that is acknowledged later is
one all the same; a failed commit leaves the pool read-only, marked as needing a check where that could still be
written; and what was committed is intact, after a cut at once and after opening again.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import numpy as np
import pytest

from metadata import FileStore, PoolMetadata, ShortRead
from tests.fakes.crash_check import Checker, ImageStore
from tests.fakes.crash_faults import FAILURES, KINDS, Fault, FaultyScenario, faulty_scenario_of
from tests.fakes.crash_oracle import Oracle, Violation
from tests.fakes.crash_search import subsets
from tests.fakes.disk_history import Kind, Replay
from thinpool.data_file import DataFile
from thinpool.errors import PoolPoisoned

STEPS = 22
SEEDS = tuple(range(int(os.environ.get("THINPOOL_FAULT_SEEDS", "3"))))
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
    assert fault.struck, f"{where} was never reached"


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


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_fails_from_an_operation_on(seed: int) -> None:
    count = Count()
    for number, operation in list(enumerate(operations(seed)))[::3]:
        with_fault(
            seed, Fault(number, "ENOSPC" if "ENOSPC" in KINDS[operation] else "EIO", lasting=True), count
        )
    print(seed, count)

"""A real server under real load is killed at random instants; the pool keeps the promise each time.

`tools/kill-runs` goes on where this ends.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.crash_oracle import Violation
from tests.fakes.killed_pool import KilledPool
from thinpool.pool_errors import DataFileTooShort


@pytest.fixture
def work() -> Iterator[Path]:
    # Not pytest's tmp_path: the address of a Unix socket ends at 107 bytes.
    place = Path(tempfile.mkdtemp(prefix="tp-"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def test_a_few_kills(work: Path) -> None:
    """What was flushed is there, names and metadata agree, the pool opens: however the server ended."""
    pool = KilledPool(work, seed=4)
    for _ in range(5):
        pool.run()
    assert pool.totals.acknowledged
    assert pool.totals.flushed


@pytest.mark.deep
@pytest.mark.timeout(0)
def test_many_kills(work: Path) -> None:
    for seed in range(10 * int(os.environ.get("THINPOOL_DEEP_MINUTES", "30")) // 30 + 1):
        (place := work / str(seed)).mkdir()
        pool = KilledPool(place, seed=100 + seed)
        for _ in range(25):
            pool.run()
        shutil.rmtree(place)


@pytest.mark.parametrize("lost", ["data", "metadata"])
def test_the_judge_sees_what_was_lost(work: Path, lost: str) -> None:
    """One of the pool's files goes back to what it was before: that must not pass."""
    pool = KilledPool(work, seed=5, cli=False)
    pool.run(load_seconds=0.5)
    file = work / "pool" / lost
    before = file.read_bytes()
    pool.before_judging = lambda: file.write_bytes(before)
    with pytest.raises((Violation, DataFileTooShort)):  # the latter where the pool had grown
        pool.run(load_seconds=0.5)

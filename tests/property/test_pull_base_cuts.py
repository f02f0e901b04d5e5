"""Power cuts while a pull on a base begins, fetches and ends: every device that shows is the day it is called after.

The days of one device that grows and shrinks are pulled one on top of the other. The power is cut after every event of
metadata, data, catalogue, lists and store, in several ways; then the pool is opened, what is there is fetched to its end
and compared, and the last day is pulled again on whatever base is left.
"""

from __future__ import annotations

import threading
from random import Random

import numpy as np
import pytest

from metadata import recount
from tests.fakes.crash_search import subsets
from tests.fakes.crash_transfers import prepared, transfers_simulated
from tests.fakes.disk_history import Contents, Image, Kind, Replay
from tests.fakes.simulated_disk import SimulatedDisk
from tests.fakes.simulated_objects import URL
from tests.fakes.travelling_snapshots import Day, TravellingSnapshots
from thinpool import pull_base
from thinpool.catalog import CatalogEntry
from thinpool.hydration import hydrate
from thinpool.lazy_devices import PullRequest
from thinpool.pool import Pool

IMAGES = 3


class Wrong(Exception):  # noqa: N818 -- what a test is to find
    """A device is not what its name says."""


def entry_of(pool: Pool, name: str) -> CatalogEntry:
    entry = pool.catalog.by_name(name)
    assert entry is not None
    return entry


def fetched(pool: Pool, name: str) -> None:
    """Fetch a device to its end, as the background of a server does."""
    lazy = pool.lazy.of(entry_of(pool, name))
    if lazy is not None:
        hydrate(lazy, threading.Event())
        pool.lazy.complete(entry_of(pool, name))


def pull(pool: Pool, day: Day, base: str | None, *, lazily: bool) -> None:
    pool.begin_pull(PullRequest(URL, day.name, day.name, lazily, read_only=True, base=base))
    fetched(pool, day.name)


def require_day(pool: Pool, day: Day) -> None:
    entry = entry_of(pool, day.name)
    session = pool.open_session(entry)
    try:
        content = bytes(session.read_bytes(0, entry.size_bytes))
    finally:
        session.close()
    if content != day.snapshot.content(0, day.snapshot.size_bytes):
        raise Wrong(f"{day.name} is not what it was")


def after_a_cut(contents: Contents, image: Image, days: TravellingSnapshots) -> None:
    """Open, fetch, compare, pull again."""
    disk = SimulatedDisk(contents, image)
    try:
        pool = disk.open()
        here = [day for day in days.days if pool.catalog.by_name(day.name) is not None]
        for day in here:
            fetched(pool, day.name)
            require_day(pool, day)
        pull(pool, days.days[-1], here[-1].name if here else None, lazily=False)
        require_day(pool, days.days[-1])
        for day in days.days[:-1]:
            if pool.transfers.partial(day.name) is not None:
                pool.abort_pull(day.name)
        pool.commit()
        assert not recount(pool.engine.metadata)
        assert not any(entry.receiving for entry in pool.catalog.entries())
        pool.close()
    finally:
        disk.close()


def cut_everywhere(seed: int, *, lazily: bool) -> int:
    """How many images were looked at. Raises Wrong."""
    contents, looked_at = Contents(), 0
    with transfers_simulated():
        disk, days = prepared(Random(f"pull on a base {seed}"), contents)
        pool = disk.open()
        pull(pool, days.days[0], None, lazily=False)
        first = len(disk.events)
        for base, day in zip(days.days, days.days[1:], strict=False):
            pull(pool, day, base.name, lazily=lazily)
            require_day(pool, day)
        pool.close()
        replay, random = Replay(disk.start.copy()), np.random.Generator(np.random.PCG64(seed))
        for number, event in enumerate(disk.events):
            replay.apply(event)
            if number < first or event.kind in (Kind.MARK, Kind.JOURNAL):
                continue
            for image in subsets(replay, random, IMAGES):
                after_a_cut(contents, image, days)
                looked_at += 1
        disk.close()
    return looked_at


@pytest.mark.parametrize(("seed", "lazily"), [(0, False), (1, True)])
def test_a_cut_at_every_event(seed: int, lazily: bool) -> None:
    assert cut_everywhere(seed, lazily=lazily) > 100


@pytest.mark.deep
@pytest.mark.timeout(3000)
def test_a_cut_at_every_event_of_many_days() -> None:
    for seed in range(2, 30):
        cut_everywhere(seed, lazily=bool(seed % 2))


def test_a_name_before_the_unmapping_is_durable_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deliberate mistake: the device may come back with its name and with what its base had."""
    monkeypatch.setattr(pull_base, "settle", lambda pool: None)
    with pytest.raises(Wrong):
        for seed in range(6):
            cut_everywhere(seed, lazily=False)

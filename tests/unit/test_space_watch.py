"""Watching how full a pool is: marks, events, growth by itself, rates; and what deleting snapshots gives back."""

from __future__ import annotations

import contextlib
import errno
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nbd.client import Client
from nbd.server import Server
from nbd.uri import unix_uri
from tests.fakes.disk_history import Contents
from tests.fakes.simulated_disk import SimulatedDisk
from thinpool.event_command import start_event_command
from thinpool.exports import PoolExports
from thinpool.low_water import LowWaterMark
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.pool_settings import METADATA_BYTES_MAX
from thinpool.session import Session
from thinpool.space_watch import SpaceWatch
from thinpool.usage_history import Forecast, UsageHistory
from thinpool.wording import duration

BLOCK = 65536


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    create_pool(tmp_path / "pool", size_bytes=20 * BLOCK)
    opened = open_pool(PoolLocation.directory(tmp_path / "pool"))
    opened.create_device("vol", 4096 * BLOCK)
    yield opened
    opened.close()


def session_on(pool: Pool, name: str = "vol") -> Session:
    entry = pool.catalog.by_name(name)
    assert entry is not None
    return pool.open_session(entry)


def write(session: Session, first: int, count: int, content: bytes = b"x") -> None:
    for index in range(first, first + count):
        session.enter()
        try:
            session.write(index * BLOCK, memoryview(content * BLOCK)[:BLOCK])
        finally:
            session.leave()
            session.sent()


class Events:
    """A watch whose looks are ours, and a command that writes down what it is told."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool = pool
        self.file = folder / "events"
        script = folder / "hook"
        script.write_text(
            f"#!/bin/sh\necho $THINPOOL_EVENT $1 $2 $THINPOOL_USED_BYTES $THINPOOL_MODE >> {self.file}\n"
        )
        script.chmod(0o755)
        self.watch = SpaceWatch(pool)
        pool.change_settings({"event-command": str(script)})

    def look(self) -> None:
        self.pool.commit()
        self.pool.engine.reclaim()
        self.watch.look()

    def told(self, count: int) -> list[str]:
        """The events, once there are that many (and no more a moment later)."""
        deadline = time.monotonic() + 10
        while True:
            lines = self.file.read_text().splitlines() if self.file.exists() else []
            if len(lines) >= count:
                time.sleep(0.1)
                return self.file.read_text().splitlines() if self.file.exists() else []
            assert time.monotonic() < deadline, lines
            time.sleep(0.01)


def test_an_event_a_crossing(pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = Events(pool, tmp_path)
    session = session_on(pool)
    where = str(pool.location)
    with caplog.at_level(logging.WARNING):
        for first in (0, 10, 15, 16, 17):
            write(session, first, 10 if not first else 1)
            events.look()
            events.look()
        assert events.told(0) == []
        write(session, 18, 4)
        events.look()
        events.look()
        assert events.told(1) == [f"data-low data-low {where} {18 * BLOCK} rw"]
        assert [record.message for record in caplog.records if "90.0 % full" in record.message]
        session.trim(0, 3 * BLOCK)
        events.look()
        write(session, 30, 5)
        events.look()
    assert sorted(events.told(3)[1:]) == [
        f"data-full data-full {where} {20 * BLOCK} out_of_data_space",
        f"data-low data-low {where} {20 * BLOCK} out_of_data_space",
    ]
    session.close()


def test_data_are_full_when_the_rest_is_set_aside(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Others are refused then: the event comes, the log says for whom the rest is, and both again after space came."""
    pool.change_settings({"when-full": "error", "data-low-water": "off"})
    pool.create_device("kept", 5 * BLOCK, reservation_bytes=5 * BLOCK)
    events = Events(pool, tmp_path)
    session = session_on(pool)
    where = str(pool.location)
    write(session, 0, 14)
    events.look()
    assert events.told(0) == []
    write(session, 14, 1)
    events.look()
    events.look()
    full = f"data-full data-full {where} {15 * BLOCK} rw"
    assert events.told(1) == [full]
    assert "320 KiB are set aside" in caplog.text
    with pytest.raises(OSError) as refused:
        write(session, 15, 1)
    assert refused.value.errno == errno.ENOSPC
    kept = session_on(pool, "kept")
    write(kept, 0, 5)  # what it has counts towards its reservation, so the level is the same
    kept.close()
    events.look()
    assert events.told(1) == [full]
    session.trim(0, 3 * BLOCK)
    events.look()
    write(session, 0, 3)
    events.look()
    assert events.told(2)[1].startswith("data-full")
    session.close()


def test_a_pool_grows_before_others_are_refused_for_a_reservation(pool: Pool) -> None:
    pool.change_settings({"autogrow-limit": str(40 * BLOCK), "data-low-water": "off"})
    pool.create_device("kept", 5 * BLOCK, reservation_bytes=5 * BLOCK)
    session = session_on(pool)
    write(session, 0, 15)
    pool.commit()
    SpaceWatch(pool).look()
    assert pool.status().data_bytes > 20 * BLOCK
    session.close()


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(0, 99))
def test_marks_follow_their_definition(levels: list[int], percent: int) -> None:
    mark, armed = LowWaterMark(), True
    for level in levels:
        expected = bool(percent) and level >= percent and armed
        assert mark.crossed(level, 100, percent) == expected
        if percent and level >= percent:
            armed = False
        elif not level or level < percent - 1:
            armed = True


def test_events_tell_of_metadata_too(pool: Pool, tmp_path: Path) -> None:
    pool.change_settings({"metadata-autogrow-limit": "off", "metadata-low-water": "off"})
    events = Events(pool, tmp_path)
    events.look()
    assert events.told(0) == []
    pool.grow(metadata_bytes=pool.status().metadata_bytes + 4096)
    pool.engine._room_blocks = 0  # as after mappings of many kinds; docs/full-pools.md
    events.watch.look()
    assert events.told(1) == [
        f"metadata-full metadata-full {pool.location} {pool.status().metadata_bytes} out_of_metadata_space"
    ]


def test_a_command_that_hangs_or_fails_is_ended_and_logged(tmp_path: Path) -> None:
    said: list[str] = []
    start_event_command("/bin/sh -c 'echo before; sleep 100'", ("e",), {}, 0.2, said.append).join(10)
    assert said[0] == "event command: before"
    assert "was ended after 0.2 s" in said[1]
    said.clear()
    start_event_command("/bin/sh -c 'exit 3'", ("e",), {}, 5, said.append).join(10)
    assert said == ["the event command '/bin/sh' ended with status 3"]
    said.clear()
    start_event_command(str(tmp_path / "none"), ("e",), {}, 5, said.append).join(10)
    assert "could not be run" in said[0]


@pytest.mark.parametrize("when_full", ["queue", "error"])
def test_a_pool_grows_by_itself_before_any_write_is_refused(when_full: str) -> None:
    with tempfile.TemporaryDirectory(prefix="grow-") as folder:
        create_pool(Path(folder, "pool"), size_bytes=8 * BLOCK)
        pool = open_pool(PoolLocation.directory(Path(folder, "pool")))
        pool.change_settings(
            {
                "autogrow-limit": str(50 * BLOCK),
                "autogrow-step": "128K",
                "when-full": when_full,
                "queue-timeout": "1",
            }
        )
        pool.create_device("vol", 100 * BLOCK)
        server = Server(PoolExports(pool))
        server.listen_unix(Path(folder, "s"))
        server.start()
        client = Client.connect(unix_uri(Path(folder, "s"), "vol"))
        client.write(0, b"1" * (45 * BLOCK))
        assert 45 * BLOCK <= pool.status().data_bytes <= 47 * BLOCK
        with pytest.raises(Exception, match="ENOSPC"):
            client.write(45 * BLOCK, b"2" * (6 * BLOCK))
        assert pool.status().data_bytes == 50 * BLOCK
        assert client.read(0, 45 * BLOCK) == b"1" * (45 * BLOCK)
        client.close()
        server.shutdown(1)
        pool.close()


def test_a_watched_pool_grows_at_its_low_water_mark(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    pool.change_settings({"autogrow-limit": str(1000 * BLOCK), "autogrow-step": "10%"})
    session = session_on(pool)
    watch = SpaceWatch(pool)
    watch.start()
    write(session, 0, 15)
    pool.commit()
    time.sleep(0.1)
    assert pool.status().data_bytes == 20 * BLOCK
    write(session, 15, 2)
    pool.commit()
    deadline = time.monotonic() + 5
    while pool.status().data_bytes == 20 * BLOCK:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert pool.status().data_bytes == 22 * BLOCK
    assert not [record for record in caplog.records if "% full" in record.message]
    assert pool.status().watched
    watch.close()
    assert not pool.status().watched
    session.close()


def test_metadata_grow_by_themselves_unless_told_not_to(pool: Pool) -> None:
    status = pool.status()
    assert status.metadata_autogrow_limit_bytes == METADATA_BYTES_MAX
    assert pool.growth.by_itself(data=False, metadata=True)
    assert pool.status().metadata_bytes == status.metadata_bytes * 6 // 5 // BLOCK * BLOCK
    pool.change_settings({"metadata-autogrow-limit": "off"})
    assert not pool.growth.by_itself(data=True, metadata=True)


class TestRates:
    def test_nothing_is_known_before_enough_was_seen(self) -> None:
        history = UsageHistory()
        assert history.forecast(5.0, 0, 100) == Forecast()
        history.add(0.0, 0)
        history.add(4.0, 40)
        assert history.forecast(9.0, 40, 100) == Forecast()

    def test_a_steady_rate_is_found(self) -> None:
        history = UsageHistory()
        for second in range(3000):
            history.add(float(second), 1000 * second)
        found = history.forecast(3000.0, 3_000_000, 6_000_000)
        assert found.rate == pytest.approx(1000, rel=0.01)
        assert found.full_in == pytest.approx(3000, rel=0.01)
        assert len(history._samples) < 700

    def test_old_growth_is_forgotten(self) -> None:
        history = UsageHistory()
        history.add(0.0, 0)
        history.add(100.0, 1000)
        assert history.forecast(200.0, 1000, 5000).rate == 5
        assert history.forecast(5000.0, 1000, 5000).rate is not None
        history.add(5000.0, 1000)
        history.add(5700.0, 1000)
        assert history.forecast(5700.0, 1000, 5000) == Forecast(0.0, None)

    def test_shrinking_is_never_full(self) -> None:
        history = UsageHistory()
        history.add(0.0, 1000)
        history.add(100.0, 500)
        assert history.forecast(100.0, 500, 5000) == Forecast(-5.0, None)

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0 s"),
            (59.4, "59 s"),
            (3600, "1 h"),
            (12000, "3 h 20 min"),
            (90061, "1 d 1 h"),
            (1e11, "3170 years"),
        ],
    )
    def test_words(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text


def test_what_deleting_gives_back_is_what_status_said(pool: Pool) -> None:
    """The operator's example: ten chunks, a snapshot, one rewritten, a snapshot, another rewritten."""
    session = session_on(pool)
    write(session, 0, 10)
    pool.create_snapshot("vol", "s1", read_only=True)
    write(session, 0, 1)
    pool.create_snapshot("vol", "s2", read_only=True)
    write(session, 1, 1)
    found = [(info.name, info.alone_bytes // BLOCK, info.together_bytes // BLOCK) for info in pool.freeing()]
    assert found == [("s1", 1, 1), ("s2", 0, 2)]
    assert [info.exclusive_bytes // BLOCK for info in pool.devices()] == [1, 0, 1]
    session.close()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "snapshot", "trim"]),
        st.integers(0, 5),
        st.integers(0, 14),
        st.integers(1, 4),
    ),
    max_size=12,
)


@given(STEPS)
@settings(max_examples=10, deadline=None)
def test_deletions_free_what_was_foretold(steps: list[tuple[str, int, int, int]]) -> None:
    disk = SimulatedDisk(Contents(), metadata_blocks=256)
    disk.format(data_blocks=200)
    with contextlib.closing(disk), contextlib.closing(disk.open()) as pool:
        pool.create_device("d0", 20 * BLOCK)
        names = ["d0"]
        for kind, which, first, count in steps:
            name = names[which % len(names)] if kind == "snapshot" else "d0"
            if kind == "snapshot" and len(names) < 6:
                names.append(f"d{len(names)}")
                pool.create_snapshot(name, names[-1], read_only=True)
                continue
            session = session_on(pool, name)
            if kind == "trim":
                session.trim(first * BLOCK, count * BLOCK)
            else:
                write(session, first, count)
            session.close()
        for info in pool.freeing():
            foretold = {other.name: other.together_bytes for other in pool.freeing()}
            freed, before = foretold.pop(info.name), pool.status().data_used_bytes
            assert pool.freeing()[0].alone_bytes == freed
            pool.delete(info.name)
            assert before - pool.status().data_used_bytes == freed
            assert {other.name: other.together_bytes + freed for other in pool.freeing()} == foretold

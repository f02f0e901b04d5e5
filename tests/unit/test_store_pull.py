"""Pulling into a pool, whole and lazily: content, allocation, order on disk, a store that goes away."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.pulled_pools import (
    MIB,
    complete,
    content,
    entry_of,
    is_equal,
    mapped_blocks,
    opening_one,
    pushed,
)
from thinpool import hydration
from thinpool.errors import (
    DeviceExists,
    DeviceIncomplete,
    DeviceReceiving,
    NoSuchStoredSnapshot,
    StoreDamaged,
)
from thinpool.hydration import StoppedError, hydrate
from thinpool.lazy_devices import PullRequest
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.push_source import push_source
from thinpool.remote_blocks import TAG
from thinpool.store.collecting import collect
from thinpool.store.keys import CHUNK_BYTES
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.pushing import Push
from thinpool.store.store import Store

pytest.importorskip("obstore", reason="needs the package obstore")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


@pytest.fixture
def open_one(tmp_path: Path) -> Iterator[Callable[..., Pool]]:
    with opening_one(tmp_path / "pool") as open_one:
        yield open_one


@pytest.mark.parametrize("block_bytes", [CHUNK_BYTES, 3 * CHUNK_BYTES, MIB])
def test_a_pull_restores_content_and_allocation(
    url: str, open_one: Callable[..., Pool], block_bytes: int
) -> None:
    snapshot = pushed(url)
    pool = open_one(block_bytes)
    pool.begin_pull(PullRequest(url, "image", "copy", read_only=True))
    with pytest.raises(DeviceReceiving):
        pool.open_session(entry_of(pool, "copy"))
    complete(pool, "copy")
    assert is_equal(pool.open_session(entry_of(pool, "copy")), snapshot)
    expected = {chunk * CHUNK_BYTES // block_bytes for chunk in snapshot.mapped_chunks()}
    assert mapped_blocks(pool, "copy") == expected
    assert entry_of(pool, "copy").content_id == snapshot.identity
    assert not list((pool.location.root or Path()).joinpath("remote").iterdir())
    assert not list(Store.open(url).held())


def test_a_pulled_snapshot_is_a_base_for_pushing_back(
    url: str, open_one: Callable[..., Pool], tmp_path: Path
) -> None:
    pushed(url)
    pool = open_one()
    pool.begin_pull(PullRequest(url, "image", "copy", read_only=True))
    complete(pool, "copy")
    pool.create_snapshot("copy", "work")
    session = pool.open_session(entry_of(pool, "work"))
    session.enter()
    session.write(64 * MIB, memoryview(b"x" * CHUNK_BYTES))
    session.leave()
    session.close()
    pool.create_snapshot("work", "tuesday", read_only=True)
    pool.close()
    known = KnownChunks(tmp_path / "cache")
    store = Store.open(url)
    with push_source(PoolLocation.directory(tmp_path / "pool"), "copy") as source:
        assert Push(store, source, "image", known).run().up_to_date
    known.remember_push(source.identity, "image")
    with push_source(PoolLocation.directory(tmp_path / "pool"), "tuesday") as source:
        report = Push(store, source, "tuesday", known).run()
    assert (report.base, report.read_bytes) == ("image", CHUNK_BYTES)


def test_a_lazy_device_reads_writes_and_discards_like_a_whole_one(
    url: str, open_one: Callable[..., Pool]
) -> None:
    snapshot = pushed(url)
    pool = open_one(4 * CHUNK_BYTES)
    pool.begin_pull(PullRequest(url, "image", "copy", lazy=True))
    session = pool.open_session(entry_of(pool, "copy"))
    model = bytearray(snapshot.content(0, snapshot.size_bytes))
    # Part of a block that is remote, a whole one, a discard, zeroes that begin and end inside of blocks.
    session.enter()
    session.write(5000, memoryview(b"y" * 100))
    session.write(2 * MIB, memoryview(b"z" * MIB))
    session.leave()
    model[5000:5100], model[2 * MIB : 3 * MIB] = b"y" * 100, b"z" * MIB
    session.trim(125 * MIB, MIB)
    model[125 * MIB : 126 * MIB] = bytes(MIB)
    session.zero(126 * MIB + 100, MIB, keep_allocated=False, fast_only=False)
    model[126 * MIB + 100 : 127 * MIB + 100] = bytes(MIB)
    session.zero(MIB + 7, 4 * CHUNK_BYTES, keep_allocated=True, fast_only=False)
    model[MIB + 7 : MIB + 7 + 4 * CHUNK_BYTES] = bytes(4 * CHUNK_BYTES)
    assert content(session, 0, len(model)) == bytes(model)
    assert session.held_up()  # connections that share a thread must not wait for a store in it
    complete(pool, "copy")
    assert not session.held_up()
    assert content(session, 0, len(model)) == bytes(model)


def test_what_was_discarded_does_not_come_back_after_a_restart(
    url: str, open_one: Callable[..., Pool]
) -> None:
    snapshot = pushed(url)
    pool = open_one()
    pool.begin_pull(PullRequest(url, "image", "copy", lazy=True))
    session = pool.open_session(entry_of(pool, "copy"))
    session.trim(0, 10 * CHUNK_BYTES)
    assert content(session, 20 * CHUNK_BYTES, 100) == snapshot.content(20 * CHUNK_BYTES, 100)
    session.enter()
    session.write(21 * CHUNK_BYTES, memoryview(b"new!"))
    session.leave()
    session.close()
    pool.close()
    pool = open_one()
    session = pool.open_session(entry_of(pool, "copy"))
    complete(pool, "copy")
    assert content(session, 0, 10 * CHUNK_BYTES) == bytes(10 * CHUNK_BYTES)
    assert content(session, 21 * CHUNK_BYTES, 4) == b"new!"
    at = 11 * CHUNK_BYTES
    assert content(session, at, CHUNK_BYTES) == snapshot.content(at, CHUNK_BYTES)


def test_snapshots_of_a_lazy_device_are_what_it_was(url: str, open_one: Callable[..., Pool]) -> None:
    snapshot = pushed(url)
    pool = open_one()
    pool.begin_pull(PullRequest(url, "image", "copy", lazy=True))
    session = pool.open_session(entry_of(pool, "copy"))
    content(session, 0, 3 * CHUNK_BYTES)
    pool.create_snapshot("copy", "before")
    session.trim(0, 20 * CHUNK_BYTES)
    pool.create_snapshot("copy", "after", read_only=True)
    for name in ("copy", "after"):
        with pytest.raises(DeviceIncomplete):
            pool.diff("before", name)
    pool.delete("after")
    session.close()
    pool.delete("copy")
    # The snapshot still holds on to the store: the collector leaves what it needs, though the image is forgotten.
    store = Store.open(url)
    store.forget("image")
    collect(store, grace_seconds=0)
    collect(store, grace_seconds=0)
    before = pool.open_session(entry_of(pool, "before"))
    assert is_equal(before, snapshot)
    complete(pool, "before")
    collect(store, grace_seconds=0)
    assert not store.packs()


@pytest.mark.parametrize("ending", ["delete", "complete", "abort"])
def test_nobody_waits_for_a_store_that_is_asked_to_let_go(
    url: str, open_one: Callable[..., Pool], ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(url)
    pool = open_one()
    pool.begin_pull(PullRequest(url, "image", "copy", lazy=True))
    asked = []

    def slow(_: object) -> None:
        others = threading.Thread(target=pool.commit)  # as a FLUSH of any client does
        others.start()
        others.join(10)
        asked.append(others.is_alive())

    monkeypatch.setattr(pool.lazy, "_release", slow)
    if ending == "complete":
        complete(pool, "copy")
    else:
        {"delete": pool.delete, "abort": pool.abort_pull}[ending]("copy")
    assert asked == [False]


def test_whoever_read_the_row_of_a_device_before_it_was_completed_finds_a_whole_one(
    url: str, open_one: Callable[..., Pool]
) -> None:
    pushed(url)
    pool = open_one()
    pool.begin_pull(PullRequest(url, "image", "copy", lazy=True))
    before = entry_of(pool, "copy")
    complete(pool, "copy")
    assert pool.lazy.of(before) is None
    assert pool.lazy.remote_bytes(before) == 0


def test_an_absent_store_costs_only_what_is_not_here(
    url: str, open_one: Callable[..., Pool], tmp_path: Path
) -> None:
    snapshot = pushed(url)
    pool = open_one()
    pool.begin_pull(PullRequest(url, "image", "copy", lazy=True))
    session = pool.open_session(entry_of(pool, "copy"))
    content(session, 0, CHUNK_BYTES)
    (tmp_path / "store").rename(tmp_path / "away")
    assert content(session, 0, CHUNK_BYTES) == snapshot.content(0, CHUNK_BYTES)
    with pytest.raises(OSError, match="missing") as failure:
        content(session, 124 * MIB + 8 * MIB // 2, CHUNK_BYTES)
    assert failure.value.errno == errno.EIO
    assert sum(length for length, _ in session.extents(0, snapshot.size_bytes)) == snapshot.size_bytes
    session.enter()
    session.write(125 * MIB, memoryview(b"w" * CHUNK_BYTES))  # a whole block needs no store
    session.leave()
    assert content(session, 125 * MIB, 10) == b"w" * 10
    (tmp_path / "away").rename(tmp_path / "store")
    assert content(session, 1024 * CHUNK_BYTES, CHUNK_BYTES) == snapshot.content(
        1024 * CHUNK_BYTES, CHUNK_BYTES
    )


def test_an_interrupted_pull_goes_on(url: str, open_one: Callable[..., Pool]) -> None:
    snapshot = pushed(url)
    pool = open_one()
    request = PullRequest(url, "image", "copy")
    pool.begin_pull(request)
    lazy = pool.lazy.of(entry_of(pool, "copy"))
    assert lazy is not None
    lazy.fetch(range(30), lazy.reader())
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        hydrate(lazy, stop)
    pool.close()
    pool = open_one()
    pool.begin_pull(request)
    lazy = pool.lazy.of(entry_of(pool, "copy"))
    assert lazy is not None
    assert not lazy.remote.bits[:30].any()
    complete(pool, "copy")
    assert is_equal(pool.open_session(entry_of(pool, "copy")), snapshot)
    assert pool.begin_pull(request)["complete"]
    with pytest.raises(DeviceExists):
        pool.begin_pull(PullRequest(url, "other", "copy"))
    pool.create_device("plain", MIB)
    with pytest.raises(DeviceExists):
        pool.begin_pull(PullRequest(url, "image", "plain"))


def test_a_pull_that_was_done_is_done_until_somebody_writes(url: str, open_one: Callable[..., Pool]) -> None:
    pushed(url)
    pushed(url, "other")
    request = PullRequest(url, "image", "copy")
    pool = open_one()
    pool.begin_pull(request)
    complete(pool, "copy")
    pool.close()
    pool = open_one()
    assert pool.begin_pull(request)["complete"]
    with pytest.raises(DeviceExists):
        pool.begin_pull(PullRequest(url, "other", "copy"))
    pool.open_session(entry_of(pool, "copy")).close()
    with pytest.raises(DeviceExists):
        pool.begin_pull(request)


def test_a_pull_that_is_given_up_leaves_nothing(url: str, open_one: Callable[..., Pool]) -> None:
    pushed(url)
    pool = open_one()
    with pytest.raises(NoSuchStoredSnapshot):
        pool.begin_pull(PullRequest(url, "other", "copy"))
    pool.begin_pull(PullRequest(url, "image", "copy"))
    pool.abort_pull("copy")
    assert pool.catalog.by_name("copy") is None
    assert not list(Store.open(url).held())
    assert pool.status().data_used_bytes == 0


def test_a_hold_stays_while_a_device_is_there_whose_list_cannot_be_read(
    url: str, open_one: Callable[..., Pool], tmp_path: Path
) -> None:
    """A snapshot shares the hold of its origin; it may be readable again tomorrow."""
    snapshot = pushed(url)
    pool = open_one()
    pool.begin_pull(PullRequest(url, "image", "copy", lazy=True))
    pool.create_snapshot("copy", "before", read_only=True)
    (path,) = (pool.lazy._path(entry_of(pool, "before").tags[TAG]),)
    pool.close()
    path.rename(tmp_path / "away")
    pool = open_one()
    complete(pool, "copy")
    store = Store.open(url)
    assert len(list(store.held())) == 1
    pool.close()
    (tmp_path / "away").rename(path)
    store.forget("image")
    for _ in range(2):
        collect(store, grace_seconds=0)
    pool = open_one()
    complete(pool, "before")
    assert is_equal(pool.open_session(entry_of(pool, "before")), snapshot)
    assert not list(store.held())


def test_a_pull_that_is_killed_once_its_device_is_there_keeps_its_hold(
    url: str, open_one: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = pushed(url)
    pool = open_one()
    request = PullRequest(url, "image", "copy")
    with monkeypatch.context() as patch:
        patch.setattr(pool.lazy, "_opened", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pool.begin_pull(request)
    pool.begin_pull(request)
    complete(pool, "copy")
    assert is_equal(pool.open_session(entry_of(pool, "copy")), snapshot)
    assert not list(Store.open(url).held())


def test_who_pulls_again_is_not_told_of_what_failed_before(
    url: str, open_one: Callable[..., Pool], tmp_path: Path
) -> None:
    """The pool was grown, the pack is back: the same command goes on and waits."""
    pushed(url)
    (pack,) = sorted((tmp_path / "store" / "packs").rglob("*-00000000"))
    pool = open_one()
    pool.lazy.start_background()
    pack.rename(tmp_path / "pack")
    request = PullRequest(url, "image", "copy")
    try:
        pool.begin_pull(request)
        until = time.monotonic() + 20
        while pool.pull_state("copy")["failure"] is None and time.monotonic() < until:
            time.sleep(0.01)
        assert "missing" in pool.pull_state("copy")["failure"]
        (tmp_path / "pack").rename(pack)
        assert pool.begin_pull(request)["failure"] is None
    finally:
        pool.lazy.stop_background()


def test_a_fetch_that_fails_as_nobody_foresaw_is_told_and_tried_again(
    url: str, open_one: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`thinpool pull` on a served pool waits for one or the other; silence would keep it waiting for ever."""
    pushed(url)
    pool = open_one()
    pool.lazy.start_background()
    try:
        with monkeypatch.context() as broken:
            broken.setattr(hydration, "hydrate", lambda *_, **__: {}["unforeseen"])
            pool.begin_pull(PullRequest(url, "image", "copy"))
            until = time.monotonic() + 20
            while pool.pull_state("copy")["failure"] is None and time.monotonic() < until:
                time.sleep(0.01)
            assert "unforeseen" in pool.pull_state("copy")["failure"]
        pool.begin_pull(PullRequest(url, "image", "copy"))
        while not pool.pull_state("copy")["complete"] and time.monotonic() < until:
            time.sleep(0.01)
        assert pool.pull_state("copy")["complete"]
    finally:
        pool.lazy.stop_background()


def test_damage_is_named_and_not_restored(url: str, open_one: Callable[..., Pool], tmp_path: Path) -> None:
    pushed(url)
    packs = sorted((tmp_path / "store" / "packs").rglob("*-00000000"))
    data = bytearray(packs[0].read_bytes())
    data[40] ^= 1
    packs[0].write_bytes(data)
    pool = open_one()
    pool.begin_pull(PullRequest(url, "image", "copy"))
    with pytest.raises(StoreDamaged, match=packs[0].name):
        complete(pool, "copy")
    with pytest.raises(DeviceReceiving):
        pool.open_session(entry_of(pool, "copy"))

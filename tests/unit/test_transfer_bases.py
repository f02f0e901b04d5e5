"""What an increment may be compared with, and what of a device it then has to look at."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

import pytest

from tests.fakes.store_source import FakeDevice, restored
from tests.fakes.transfer_pools import (
    BLOCK,
    allocation,
    content,
    new_pool,
    stream_of,
    take_in,
    two_days,
    write,
)
from tests.fakes.travel_hosts import watched_source
from thinpool.errors import DeviceIncomplete
from thinpool.hydration import hydrate
from thinpool.lazy_devices import PullRequest
from thinpool.pool import Pool
from thinpool.store.fetching import SnapshotReader
from thinpool.store.keys import CHUNK_BYTES
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.pushing import Push, PushReport
from thinpool.store.store import Store

pytest.importorskip("obstore", reason="needs the package obstore")

MIB = 1 << 20


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{secrets.token_hex(8)}", create=True)


def push(store: Store, pool: Pool, name: str, known: KnownChunks) -> PushReport:
    with watched_source(pool, name) as source:
        return Push(store, source, name, known).run()


def chunks(store: Store, name: str) -> set[int]:
    return set(restored(SnapshotReader(store, store.snapshot(name))))


def test_what_comes_inside_when_a_device_grows_is_in_the_increment(store: Store) -> None:
    """The last block was mapped all along; its chunks behind the old end are only now part of the device."""
    device, known = FakeDevice(MIB + 1000, 4 * CHUNK_BYTES), KnownChunks(None)
    device.write(4, b"the last block")
    Push(store, device.snapshot(), "short", known).run()
    assert chunks(store, "short") == {16}
    device.blocks[4] = device.blocks[4][:1000] + bytes(4 * CHUNK_BYTES - 1000)
    device.snapshots[-1].blocks[4] = device.blocks[
        4
    ]  # as in a pool: what lies behind the end is zeros already
    device.size_bytes = 2 * MIB
    report = Push(store, device.snapshot(), "long", known).run()
    assert report.base == "short"
    assert chunks(store, "long") == {16, 17, 18, 19}


def test_a_chunk_that_changed_and_holds_the_end_is_read_once(store: Store) -> None:
    device, known = FakeDevice(3 * CHUNK_BYTES + 5), KnownChunks(None)
    device.write(3, b"one")
    Push(store, device.snapshot(), "one", known).run()
    device.write(3, b"two")
    device.size_bytes += 5
    snapshot = device.snapshot()
    report = Push(store, snapshot, "two", known).run()
    assert (report.base, report.read_bytes, snapshot.bytes_read) == ("one", CHUNK_BYTES, 10)


def test_a_copy_with_other_holes_is_not_what_a_snapshot_is_compared_with(
    store: Store, tmp_path: Path
) -> None:
    """A snapshot that was in a pool with larger blocks comes back with zeros where it had holes, and with its name."""
    known = KnownChunks(None)
    with new_pool(tmp_path / "fine") as fine, new_pool(tmp_path / "coarse", block_bytes=4 * BLOCK) as coarse:
        fine.create_device("disk", MIB)
        write(fine, "disk", 5 * BLOCK, b"monday")
        fine.create_snapshot("disk", "monday", read_only=True)
        write(fine, "disk", 9 * BLOCK, b"tuesday")
        fine.create_snapshot("disk", "tuesday", read_only=True)
        take_in(coarse, stream_of(fine, "monday"), "monday")
        take_in(fine, stream_of(coarse, "monday"), "copy")
        assert fine.info("copy").content_id == fine.info("monday").content_id
        assert allocation(fine, "copy") == {4, 5, 6, 7}
        push(store, fine, "copy", known)
        report = push(store, fine, "tuesday", known)
        assert chunks(store, "tuesday") == {5, 9}
        assert report.new_chunks == 1
        # And where the copy is what an increment is made of, it is compared with the copy.
        fine.create_snapshot("copy", "work")
        write(fine, "work", 0, b"wednesday")
        fine.create_snapshot("work", "wednesday", read_only=True)
        report = push(store, fine, "wednesday", known)
        assert (report.base, report.read_bytes) == ("copy", CHUNK_BYTES)
        assert chunks(store, "wednesday") == {0, 4, 5, 6, 7}


def test_a_whole_base_is_taken_where_there_is_one_beside_a_lazy_one(store: Store, tmp_path: Path) -> None:
    with new_pool(tmp_path / "a") as ours, new_pool(tmp_path / "b") as theirs:
        ours.create_device("disk", MIB)
        write(ours, "disk", 0, b"monday")
        ours.create_snapshot("disk", "monday", read_only=True)
        write(ours, "disk", BLOCK, b"tuesday")
        ours.create_snapshot("disk", "tuesday", read_only=True)
        push(store, ours, "monday", KnownChunks(None))
        tuesday = stream_of(ours, "tuesday", "monday")
        theirs.begin_pull(PullRequest(store.url, "monday", "lazy", lazy=True, read_only=True))
        with pytest.raises(DeviceIncomplete):
            take_in(theirs, tuesday, "tuesday")
        assert [info.name for info in theirs.devices()] == ["lazy"]
        take_in(theirs, stream_of(ours, "monday"), "monday")
        theirs.begin_pull(PullRequest(store.url, "monday", "later", lazy=True, read_only=True))
        take_in(theirs, tuesday, "tuesday")
        assert allocation(theirs, "tuesday") == {0, 1}


def test_what_needs_a_whole_device_is_refused_until_it_is_whole(store: Store, tmp_path: Path) -> None:
    """Sending, being a base, being replaced, comparing, rolling back, a new size: by name, with nothing changed."""
    with new_pool(tmp_path / "a") as ours, new_pool(tmp_path / "b") as theirs:
        two_days(ours)
        for name in ("mon", "tue"):
            push(store, ours, name, KnownChunks(None))
        take_in(theirs, stream_of(ours, "tue"), "whole")
        increment = stream_of(ours, "tue", "mon")
        theirs.begin_pull(PullRequest(store.url, "mon", "lazy", lazy=True, read_only=True))
        theirs.create_snapshot("lazy", "clone")
        attempts = {
            "send": lambda: stream_of(theirs, "lazy"),
            "send its clone": lambda: stream_of(theirs, "clone"),
            "send on top of it": lambda: stream_of(theirs, "whole", "lazy"),
            "receive on top of it": lambda: take_in(theirs, increment, "new"),
            "receive in its place": lambda: take_in(theirs, increment, "lazy"),
            "receive under its name": lambda: take_in(theirs, stream_of(ours, "mon"), "lazy"),
            "push": lambda: push(store, theirs, "lazy", KnownChunks(None)),
            "diff": lambda: theirs.diff("lazy", "whole"),
            "roll back": lambda: theirs.rollback("clone", "whole"),
            "roll back to it": lambda: theirs.rollback("whole", "lazy"),
            "resize": lambda: theirs.resize("clone", MIB, shrink=True),
        }
        before = names(theirs)
        for what, attempt in attempts.items():
            with pytest.raises(DeviceIncomplete) as error:
                attempt()
            assert error.value.name in ("lazy", "clone"), what
            assert names(theirs) == before, what
        for name in ("lazy", "clone"):
            lazy = theirs.lazy.of(theirs.catalog.by_name(name))
            hydrate(lazy, threading.Event())
            theirs.lazy.complete(theirs.catalog.by_name(name))
        assert content(theirs, "clone") == content(theirs, "lazy") == content(ours, "mon")
        take_in(theirs, increment, "lazy")
        assert content(theirs, "lazy") == content(ours, "tue")
        theirs.delete("lazy")
        assert content(theirs, "clone") == content(ours, "mon")
        theirs.rollback("clone", "whole", keep=False)
        assert content(theirs, "clone") == content(ours, "tue")


def names(pool: Pool) -> list[tuple[str, int]]:
    return [(info.name, info.size_bytes) for info in pool.devices()]

"""Random histories of devices through an object store: whatever was pushed comes back, and only what is needed stays."""

from __future__ import annotations

import secrets

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.fakes.store_source import FakeDevice, FakeSnapshot, restored
from thinpool.store.collecting import collect
from thinpool.store.fetching import SnapshotReader
from thinpool.store.keys import CHUNK_BYTES
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.pushing import Push
from thinpool.store.store import Store
from thinpool.store.verifying import Verification

pytest.importorskip("obstore", reason="needs the package obstore")

MIB = 1 << 20
SIZES = [MIB, 64 * MIB, 64 * MIB + 12345, 130 * MIB, 200 * MIB + 512]
FILLERS = [b"\0", b"a", b"bc", b"some text that repeats "]

step = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 3200), st.integers(0, 5)),
    st.tuples(st.just("run"), st.integers(0, 3200), st.integers(1, 40)),
    st.tuples(st.just("discard"), st.integers(0, 3200), st.integers(1, 2000)),
    st.tuples(st.just("resize"), st.sampled_from(SIZES), st.just(0)),
    st.tuples(st.just("push"), st.just(0), st.just(0)),
    st.tuples(st.just("push"), st.just(0), st.just(0)),
    st.tuples(st.just("delete"), st.integers(0, 20), st.just(0)),
    st.tuples(st.just("forget"), st.integers(0, 20), st.just(0)),
    st.tuples(st.just("lose cache"), st.just(0), st.just(0)),
    st.tuples(st.just("collect"), st.just(0), st.just(0)),
)


def _equal(store: Store, name: str, snapshot: FakeSnapshot) -> None:
    reader = SnapshotReader(store, store.snapshot(name))
    found = restored(reader)
    assert reader.size_bytes == snapshot.size_bytes
    assert set(found) == snapshot.mapped_chunks()
    for chunk, content in found.items():
        begin = chunk * CHUNK_BYTES
        length = min(CHUNK_BYTES, snapshot.size_bytes - begin)
        assert content == snapshot.content(begin, length) + bytes(CHUNK_BYTES - length), chunk


@settings(max_examples=25)
@given(
    history=st.lists(step, min_size=3, max_size=30),
    block_bytes=st.sampled_from([CHUNK_BYTES, CHUNK_BYTES, 3 * CHUNK_BYTES, MIB]),
    secret=st.sampled_from([None, None, None, b"a secret"]),
)
def test_what_was_pushed_comes_back(
    history: list[tuple[str, int, int]], block_bytes: int, secret: bytes | None
) -> None:
    store = Store.open(f"memory://{secrets.token_hex(8)}", secret, create=True)
    device = FakeDevice(130 * MIB, block_bytes)
    known = KnownChunks(None)
    stored: dict[str, FakeSnapshot] = {}
    for number, (what, first, count) in enumerate([*history, ("push", 0, 0), ("collect", 0, 0)]):
        last = -(-device.size_bytes // block_bytes)
        match what:
            case "write" if first < last:
                filler = FILLERS[count] if count < len(FILLERS) else secrets.token_bytes(64)
                device.write(first, filler)
            case "run":
                for block in range(first, min(first + count, last)):
                    device.write(block, secrets.token_bytes(8))
            case "discard":
                for block in range(first, first + count):
                    device.discard(block)
            case "resize":
                device.resize(first)
            case "push":
                name = f"s{number}"
                stored[name] = device.snapshot()
                report = Push(store, stored[name], name, known).run()
                assert report.read_bytes >= 0
            case "delete" if device.snapshots:
                del device.snapshots[first % len(device.snapshots)]
            case "forget" if stored:
                name = list(stored)[first % len(stored)]
                store.forget(name)
                del stored[name]
            case "lose cache":
                known = KnownChunks(None)
            case "collect":
                collect(store, grace_seconds=0)
    for name, snapshot in stored.items():
        _equal(store, name, snapshot)
    report = Verification(store, read_data=True).run()
    assert not report.faults
    assert report.snapshots == len(stored)
    # Nothing but what the snapshots use is left, and no push or mark.
    used = {pack for _, manifest in store.manifests() for pack in manifest.packs}
    assert set(store.packs()) == used
    assert not store.condemned()
    assert not store.objects.list("pending/")


def test_an_unchanged_block_is_neither_read_nor_sent() -> None:
    store = Store.open(f"memory://{secrets.token_hex(8)}", create=True)
    device = FakeDevice(256 * MIB)
    known = KnownChunks(None)
    for block in range(0, 4096, 4):
        device.write(block, secrets.token_bytes(16))
    first = Push(store, device.snapshot(), "monday", known).run()
    assert first.new_chunks == 1024
    device.write(8, b"new")
    device.discard(12)
    tuesday = device.snapshot()
    second = Push(store, tuesday, "tuesday", known).run()
    assert (second.base, second.new_chunks, tuesday.bytes_read) == ("monday", 1, CHUNK_BYTES)
    assert second.segments_written == 1
    assert second.sent_bytes < 32 << 10
    _equal(store, "tuesday", tuesday)
    again = Push(store, tuesday, "tuesday", known).run()
    assert again.up_to_date
    assert tuesday.bytes_read == CHUNK_BYTES


def test_equal_blocks_of_other_hosts_are_not_sent_again() -> None:
    store = Store.open(f"memory://{secrets.token_hex(8)}", create=True)
    left, right = FakeDevice(64 * MIB), FakeDevice(128 * MIB, 256 << 10)
    contents = [secrets.token_bytes(16) for _ in range(64)]
    for number, content in enumerate(contents):
        left.write(number, content)
        right.blocks[number] = left.blocks[number] * 4
    Push(store, left.snapshot(), "left", KnownChunks(None)).run()
    report = Push(store, right.snapshot(), "right", KnownChunks(None)).run()
    assert report.new_chunks == 0


def test_a_store_stays_bounded_under_endless_increments() -> None:
    """Keep seven of sixty daily pushes, each of which changes 5 % at random."""
    store = Store.open(f"memory://{secrets.token_hex(8)}", create=True)
    device = FakeDevice(16 * MIB)
    known = KnownChunks(None)
    for block in range(256):
        device.write(block, secrets.token_bytes(32))
    for day in range(60):
        for block in range(13):
            device.blocks[(day * 37 + block * 19) % 256] = secrets.token_bytes(CHUNK_BYTES)
        snapshot = device.snapshot()
        Push(store, snapshot, f"day{day}", known).run()
        if day >= 7:
            store.forget(f"day{day - 7}")
            device.snapshots.pop(0)
            collect(store, grace_seconds=0)
    size = sum(listed.size_bytes for listed in store.packs().values())
    assert size < 4 * (16 * MIB + 7 * 13 * CHUNK_BYTES)
    _equal(store, "day59", snapshot)

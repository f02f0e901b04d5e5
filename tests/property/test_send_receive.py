"""Snapshots that travel: random histories arrive byte-equal and with equal holes; damaged streams never become devices.

The model of a device is its bytes; what is sent is compared with what arrives, content and allocation, in a pool of the
same block size, and content in a pool of another.
"""

from __future__ import annotations

import io
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.transfer_pools import (
    BLOCK,
    WORK,
    allocation,
    boundaries,
    content,
    discard,
    new_pool,
    picture,
    records,
    stream_of,
    take_in,
    token_of,
    two_days,
    write,
    zero,
)
from thinpool.catalog import Put
from thinpool.errors import (
    BaseMissing,
    BaseNotFrozen,
    ContentGone,
    DeviceExists,
    DeviceHeld,
    DeviceInUse,
    DeviceReceiving,
    NoSpace,
    NotReceiving,
    StreamDamaged,
    TargetDiverged,
    ThinPoolError,
)
from thinpool.pool import Pool
from thinpool.receiving import ReceiveOptions, receive
from thinpool.source_access import SourceRequest, hold, release
from thinpool.stream_format import HEADER_BYTES, RecordHeader, RecordKind

MIB = 1 << 20
BLOCKS = 24


EXTENT = st.tuples(
    st.integers(0, BLOCKS * BLOCK - 1), st.sampled_from([1, 700, BLOCK, 3 * BLOCK, 9 * BLOCK + 17])
)
ALIGNED = st.tuples(
    st.integers(0, BLOCKS - 1).map(lambda n: n * BLOCK), st.sampled_from([BLOCK, 2 * BLOCK, 8 * BLOCK])
)
STEP = st.one_of(
    st.tuples(st.just("write"), EXTENT, st.integers(1, 255)),
    st.tuples(st.just("zero"), ALIGNED, st.booleans()),
    st.tuples(st.just("zero"), EXTENT, st.booleans()),
    st.tuples(st.just("discard"), ALIGNED),
    st.tuples(st.just("resize"), st.integers(1, BLOCKS * BLOCK)),
    st.tuples(st.just("resize"), st.integers(1, BLOCKS).map(lambda n: n * BLOCK)),
    st.tuples(st.just("snapshot")),
    st.tuples(st.just("snapshot")),
)


def play(pool: Pool, step: tuple, taken: list[str]) -> None:
    size = pool.info("disk").size_bytes
    kind = step[0]
    if kind == "resize":
        pool.resize("disk", step[1], shrink=True)
    elif kind == "snapshot":
        taken.append(f"s{len(taken)}")
        pool.create_snapshot("disk", taken[-1], read_only=True)
    else:
        offset, length = step[1]
        length = min(length, size - offset)
        if length <= 0:
            return
        if kind == "write":
            # Odd bytes are followed by noise, so that some records pack well and some do not at all.
            noise = random.Random(step[2]).randbytes(length)
            write(pool, "disk", offset, noise if step[2] % 2 else bytes([step[2]]) * length)
        elif kind == "zero":
            zero(pool, "disk", offset, length, keep=step[2])
        else:
            discard(pool, "disk", offset, length)


@settings(max_examples=30)
@given(st.lists(STEP, min_size=4, max_size=24), st.randoms(use_true_random=False))
def test_histories_arrive_as_they_were(steps: list[tuple], chance: random.Random):
    place = Path(tempfile.mkdtemp(prefix="thinpool-travel-", dir=WORK))
    try:
        with (
            new_pool(place / "a") as ours,
            new_pool(place / "b") as same,
            new_pool(place / "c", block_bytes=4 * BLOCK) as coarse,
        ):
            ours.create_device("disk", BLOCKS * BLOCK - 1000)
            taken: list[str] = []
            for step in [*steps, ("snapshot",)]:
                play(ours, step, taken)
            truth = {name: (content(ours, name), allocation(ours, name)) for name in taken}
            sent: list[str] = []
            for name in taken:
                # Bases go away at the source as they would in a rotation; then another one is as good, or none.
                base = chance.choice([None, *[known for known in sent if ours.catalog.by_name(known)]])
                stream = stream_of(ours, name, base, level=chance.choice([0, 1, 3]))
                for pool in (same, coarse):
                    take_in(pool, stream, name)
                    assert pool.info(name).content_id == ours.info(name).content_id
                    assert content(pool, name) == truth[name][0]
                assert allocation(same, name) == truth[name][1]
                sent.append(name)
                if chance.random() < 0.3:
                    ours.delete(chance.choice([known for known in sent if ours.catalog.by_name(known)]))
            for name in sent:
                assert content(same, name) == content(coarse, name) == truth[name][0], (
                    "later increments changed it"
                )
            # And back, from the copy: what was received can be sent like anything else.
            with new_pool(place / "d") as back:
                take_in(back, stream_of(same, sent[0]), sent[0])
                if len(sent) > 1:
                    take_in(back, stream_of(same, sent[-1], sent[0]), sent[-1])
                assert content(back, sent[-1]) == truth[sent[-1]][0]
                assert allocation(back, sent[-1]) == truth[sent[-1]][1]
    finally:
        shutil.rmtree(place)


def test_the_base_is_checked_before_anything_is_written(source: Pool, target: Pool):
    two_days(source)
    write(source, "disk", 0, b"wednesday")
    source.create_snapshot("disk", "wed", read_only=True)
    full, tuesday, wednesday = (
        stream_of(source, "mon"),
        stream_of(source, "tue", "mon"),
        stream_of(source, "wed", "tue"),
    )
    with pytest.raises(BaseMissing, match="none of that name"):
        take_in(target, tuesday, "tue")
    assert target.devices() == []
    take_in(target, full, "mon")
    before = picture(target)
    with pytest.raises(BaseMissing, match="tue"):
        take_in(target, wednesday, "wed")
    with pytest.raises(DeviceExists):
        take_in(target, full, "mon")
    with pytest.raises(BaseMissing):
        take_in(target, stream_of(source, "wed", "tue"), "wed")
    with pytest.raises(BaseNotFrozen):
        stream_of(source, "wed", "disk")
    assert picture(target) == before


def test_a_replica_is_brought_forward_or_refused(source: Pool, target: Pool):
    two_days(source)
    take_in(target, stream_of(source, "mon"), "copy")
    tuesday = stream_of(source, "tue", "mon")
    identity = target.info("copy").uuid
    busy = target.open_session(target.catalog.by_name("copy"))
    with pytest.raises(DeviceInUse):
        take_in(target, tuesday, "copy")
    busy.close()
    take_in(target, tuesday, "copy")
    assert content(target, "copy") == content(source, "tue")
    assert target.info("copy").uuid == identity
    with pytest.raises(TargetDiverged, match="holds content"):
        take_in(target, tuesday, "copy")
    # The same, where somebody wrote to the replica: the base is still in the pool, under another name.
    full = stream_of(source, "mon")
    receive(target, io.BytesIO(full).readinto, ReceiveOptions("open", read_only=False))
    take_in(target, full, "base")
    write(target, "open", 0, b"mine")
    with pytest.raises(TargetDiverged, match="written to"):
        take_in(target, tuesday, "open")
    assert content(target, "open")[:4] == b"mine"


def test_a_half_received_device_is_nowhere_to_be_used(source: Pool, target: Pool):
    from thinpool.exports import PoolExports

    two_days(source)
    stream = stream_of(source, "mon")
    with pytest.raises(StreamDamaged):
        take_in(target, stream[: boundaries(stream)[2]], "mon", resumable=True)
    hidden = "mon/receiving"
    assert [info.receiving for info in target.devices()] == [True]
    exports = PoolExports(target)
    assert list(exports.listing()) == []
    assert exports.find(hidden) is None
    assert exports.find("") is None
    entry = target.catalog.by_name(hidden)
    assert entry is not None
    attempts = [
        lambda: target.create_snapshot(hidden, "x"),
        lambda: target.rename(hidden, "x"),
        lambda: target.delete(hidden),
        lambda: target.resize(hidden, 1 << 30),
        lambda: target.open_session(entry),
        lambda: target.rollback(hidden, hidden),
        lambda: target.diff(hidden, hidden),
    ]
    for attempt in attempts:
        with pytest.raises(DeviceReceiving):
            attempt()
    with pytest.raises(ThinPoolError):
        stream_of(target, hidden)
    with pytest.raises(NotReceiving):
        take_in(target, stream_of(source, token=token_of(target)), "other")
    target.transfers.abort("mon")
    assert target.devices() == []
    assert target.status().data_used_bytes == 0
    with pytest.raises(NotReceiving):
        target.transfers.abort("mon")


def test_one_stream_at_a_time_runs_into_a_device(source: Pool, target: Pool):
    two_days(source)
    stream = stream_of(source, "mon")
    with pytest.raises(StreamDamaged):
        take_in(target, stream[: boundaries(stream)[2]], "mon", resumable=True)
    rest = stream_of(source, token=token_of(target))
    entry, _ = target.transfers.partial("mon")
    target.transfers.claim(entry)
    with pytest.raises(DeviceInUse):
        take_in(target, rest, "mon")
    with pytest.raises(DeviceInUse):
        target.transfers.abort("mon")
    target.transfers.unclaim(entry)
    take_in(target, rest, "mon")
    assert content(target, "mon") == content(source, "mon")


def test_tokens_of_what_is_gone(source: Pool, target: Pool):
    two_days(source)
    take_in(target, stream_of(source, "mon"), "mon")
    stream = stream_of(source, "tue", "mon")
    with pytest.raises(StreamDamaged):
        take_in(target, stream[: boundaries(stream)[2]], "tue", resumable=True)
    token = token_of(target)
    source.delete("mon")
    with pytest.raises(ContentGone, match="base"):
        stream_of(source, token=token)
    source.delete("tue")
    with pytest.raises(ContentGone, match="device"):
        stream_of(source, token=token)


def test_a_full_pool_refuses_and_is_as_before(source: Pool, place: Path):
    two_days(source)
    with new_pool(place / "small", size_bytes=MIB) as small:
        with pytest.raises(NoSpace):
            take_in(small, stream_of(source, "mon"), "mon")
        assert small.devices() == []
        assert small.status().data_used_bytes == 0
        with pytest.raises(NoSpace):
            take_in(small, stream_of(source, "mon"), "mon", resumable=True)
        small.grow(8 * MIB)
        take_in(small, stream_of(source, token=token_of(small)), "mon")
        assert content(small, "mon") == content(source, "mon")


def test_only_growing_sends_no_data_and_huge_holes_are_one_record(source: Pool, target: Pool):
    source.create_device("big", 1 << 50)
    write(source, "big", 5 << 40, b"far out")
    zero(source, "big", 0, 5 * BLOCK, keep=True)
    source.create_snapshot("big", "one", read_only=True)
    source.resize("big", 1 << 51)
    source.create_snapshot("big", "two", read_only=True)
    discard(source, "big", 0, 6 << 40)
    source.create_snapshot("big", "three", read_only=True)
    take_in(target, stream_of(source, "one"), "one")
    grown = stream_of(source, "two", "one")
    kinds = [RecordHeader.decode(record[:HEADER_BYTES]).kind for record in records(grown)]
    assert kinds == [RecordKind.BEGIN, RecordKind.BASES, RecordKind.END]
    take_in(target, grown, "two")
    take_in(target, stream_of(source, "three", "two"), "three")
    assert [target.info(name).size_bytes for name in ("one", "two", "three")] == [1 << 50, 1 << 51, 1 << 51]
    assert [allocation(target, name) for name in ("one", "two", "three")] == [
        allocation(source, name) for name in ("one", "two", "three")
    ]
    assert target.info("two").exclusive_bytes == 0


def test_a_device_in_use_is_frozen_and_held_while_it_is_read(source: Pool, target: Pool):
    two_days(source)
    write(source, "disk", 0, b"before")
    held = hold(source, SourceRequest("disk", "mon"))
    assert len(held.copies) == 1
    write(source, "disk", 0, b"after!")
    with pytest.raises(DeviceHeld):
        source.delete(held.copies[0])
    with pytest.raises(DeviceHeld):
        source.delete("mon")
    release(source, held)
    assert {info.name for info in source.devices()} == {"disk", "mon", "tue"}
    take_in(target, stream_of(source, "mon"), "mon")
    take_in(target, stream_of(source, "disk", "mon"), "disk")
    assert content(target, "disk")[:6] == b"after!"


def test_snapshots_of_sends_that_died_go_when_the_pool_is_opened(place: Path):
    from thinpool.opening import open_pool
    from thinpool.pool_location import PoolLocation

    with new_pool(place / "p") as pool:
        pool.create_device("disk", MIB)
        hold(pool, SourceRequest("disk"))
        assert len(pool.devices()) == 2
    again = open_pool(PoolLocation.directory(place / "p"))
    assert [info.name for info in again.devices()] == ["disk"]
    again.close()


def test_what_a_kill_left_of_a_receive_without_s_is_no_hindrance(source: Pool, target: Pool):
    two_days(source)
    stream = stream_of(source, "mon")
    with pytest.raises(StreamDamaged):
        take_in(target, stream[: boundaries(stream)[2]], "mon", resumable=True)
    entry, state = target.transfers.partial("mon")
    target.catalog.apply([Put(replace(entry, receiving=replace(state, resumable=False).to_text()))])
    take_in(target, stream, "mon")
    assert content(target, "mon") == content(source, "mon")
    assert len(target.devices()) == 1

"""Times that let a write go into a shared block are found, whatever the trees are like, and can be set right."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from metadata import Fault, MemoryStore, PoolMetadata, Severity, recount
from metadata.layout import TIME_LIMIT
from metadata.mend import mend
from tests.fakes.metadata_pools import contents, new_pool, packed, span

MAPPED = 40_000  # three levels


def snapshotted(pool: PoolMetadata, device: int, time: int) -> None:
    """Put a snapshot time into a record, and commit."""
    pool.state.devices.set(replace(pool.device(device), snapshotted_time=time))
    pool.commit()


def judged_by_all_mappings(pool: PoolMetadata) -> dict[int, tuple[int, int]]:
    """Device: first and last of its mappings that are another's as well and not older than its snapshot time.

    The rule of the kernel applied to every single mapping, without a look at a node or a count.
    """
    entries = {device.device_id: contents(pool, device.device_id) for device in pool.devices()}
    uses = Counter(value >> 24 for mapped in entries.values() for value in mapped.values())
    found = {}
    for device, mapped in entries.items():
        since = pool.device(device).snapshotted_time
        wrong = [
            key for key, value in mapped.items() if uses[value >> 24] > 1 and value % TIME_LIMIT >= since
        ]
        if wrong:
            found[device] = (min(wrong), max(wrong))
    return found


def found_by_check(store: MemoryStore) -> dict[int, tuple[int, int]]:
    problems = [problem for problem in recount(store) if problem.fault is Fault.SHARED_AS_OWN]
    assert all(problem.severity is Severity.ERROR for problem in problems)
    return {problem.affects[0].device: (problem.place.begin, problem.place.end - 1) for problem in problems}


def shared_pool() -> tuple[MemoryStore, PoolMetadata]:
    """Device 1, its snapshot 2 with a few blocks of its own, and a snapshot 3 of that."""
    store, pool = new_pool(metadata_blocks=3000, data_blocks=100_000)
    pool.create_device(1)
    pool.insert(1, span(0, MAPPED), packed(span(0, MAPPED)))
    pool.create_snapshot(2, 1)
    pool.insert(2, span(700, 20), packed(span(50_000, 20), pool.time))
    pool.create_snapshot(3, 2)
    pool.insert(2, span(30_000, 20), packed(span(50_020, 20), pool.time))
    pool.commit()
    assert recount(store) == []
    return store, pool


def test_a_time_that_is_too_low_is_found_on_either_side_and_set_right():
    for device, wrong in ((1, (0, MAPPED - 1)), (2, (0, MAPPED - 1)), (3, (0, MAPPED - 1))):
        store, pool = shared_pool()
        snapshotted(pool, device, 0)
        begin, last = found_by_check(store)[device]
        assert (begin, last) == wrong
        assert mend(store) == []
        mended = PoolMetadata.open(store, writable=False)
        assert not judged_by_all_mappings(mended)
        assert contents(mended, device) == contents(pool, device)


def test_only_what_the_last_snapshot_shares_is_found_where_an_older_time_stands():
    store, pool = shared_pool()
    snapshotted(pool, 2, 1)  # as after the first snapshot: what was written between the two counts as its own
    assert found_by_check(store) == {2: (700, 719)} == judged_by_all_mappings(pool)


def test_the_clock_follows_where_the_youngest_shared_mapping_was_made_at_this_moment():
    store, pool = shared_pool()
    pool.insert(1, span(90_000, 1), packed(span(60_000, 1), pool.time))
    pool.insert(3, span(90_000, 1), packed(span(60_000, 1), pool.time))
    pool.commit()
    assert found_by_check(store) == {1: (90_000, 90_000), 3: (90_000, 90_000)}
    before = pool.time
    assert mend(store) == []
    assert PoolMetadata.open(store, writable=False).time == before + 1


def test_neither_a_deleted_snapshot_nor_the_metadata_snapshot_shares_data():
    store, pool = new_pool(metadata_blocks=3000, data_blocks=100_000)
    pool.create_device(1)
    pool.insert(1, span(0, MAPPED), packed(span(0, MAPPED)))
    pool.create_snapshot(2, 1)
    pool.commit()
    pool.delete_device(2)
    pool.reserve_metadata_snapshot()
    pool.commit()
    pool.insert(1, span(5, 1), packed(span(60_000, 1), pool.time))
    snapshotted(pool, 1, 0)
    assert pool.held_root
    assert found_by_check(store) == {} == judged_by_all_mappings(pool)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["map", "unmap", "snapshot", "delete", "time"]),
        st.integers(1, 4),
        st.integers(0, 2000),
        st.sampled_from([1, 40, 300]),
        st.integers(0, 4),
    ),
    min_size=3,
    max_size=14,
)


@settings(max_examples=60)
@given(CHANGES)
def test_agrees_with_looking_at_every_mapping(changes: list[tuple[str, int, int, int, int]]):
    store, pool = new_pool(metadata_blocks=3000, data_blocks=100_000)
    pool.create_device(1)
    pool.insert(1, span(0, 1500), packed(span(0, 1500)))
    fresh, number = 1500, 1
    for kind, which, first, count, time in changes:
        devices = [device.device_id for device in pool.devices()]
        device = devices[which % len(devices)]
        if kind == "map":
            pool.insert(device, span(first, count), packed(span(fresh, count), pool.time))
            fresh += count
        elif kind == "unmap":
            pool.remove(device, first, first + count)
        elif kind == "snapshot":
            number += 1
            pool.create_snapshot(number, device)
        elif kind == "delete" and len(devices) > 1:
            pool.delete_device(device)
        elif kind == "time":
            pool.state.devices.set(replace(pool.device(device), snapshotted_time=min(time, pool.time)))
        pool.commit()
    assert found_by_check(store) == judged_by_all_mappings(pool)

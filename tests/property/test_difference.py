"""Comparing two mapping trees: equal to comparing dictionaries, cheap where they share, and what thin_delta says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadata import ABSENT, BlockDamaged, PoolMetadata
from tests.fakes.metadata_pools import contents, new_pool, packed, span, u64
from tests.fakes.thin_tools import run_tool
from thinpool import device_diff
from thinpool.catalog_rows import CatalogEntry
from thinpool.delta import Change, changed_ranges, dirty_extents
from thinpool.device_diff import all_pages, compare

FIRST, SECOND = 1, 2
KEYS = 60_000  # three levels, when all are mapped


def differing(
    pool: PoolMetadata, old: int | None, new: int, begin: int, end: int
) -> dict[int, tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    reached = begin
    for batch in pool.differences(old, new, begin, end):
        assert batch.end > reached or batch.end == end
        for key, before, after in zip(
            batch.keys.tolist(), batch.old.tolist(), batch.new.tolist(), strict=True
        ):
            assert reached <= key < batch.end
            assert key not in found
            found[key] = (before, after)
        reached = batch.end
    assert reached == end
    return found


def expected(
    pool: PoolMetadata, old: int | None, new: int, begin: int, end: int
) -> dict[int, tuple[int, int]]:
    sides = [
        {key: value >> 24 for key, value in contents(pool, device).items() if begin <= key < end}
        if device is not None
        else {}
        for device in (old, new)
    ]
    return {
        key: (sides[0].get(key, ABSENT), sides[1].get(key, ABSENT))
        for key in sorted(sides[0].keys() | sides[1].keys())
        if sides[0].get(key) != sides[1].get(key)
    }


CHANGE = st.tuples(
    st.sampled_from(["map", "unmap", "snapshot"]),
    st.integers(0, KEYS - 1),
    st.sampled_from([1, 3, 126, 252, 5000, 20000]),
    st.sampled_from([FIRST, SECOND]),
)


@settings(max_examples=40)
@given(
    st.integers(0, KEYS),
    st.lists(CHANGE, max_size=8),
    st.tuples(st.integers(0, KEYS), st.integers(0, KEYS + 10)),
)
def test_the_walk_finds_what_dictionaries_find(mapped: int, changes: list, limits: tuple[int, int]):
    _, pool = new_pool(metadata_blocks=6000, data_blocks=1 << 20)
    pool.create_device(FIRST)
    pool.insert(FIRST, span(0, mapped), packed(span(0, mapped)))
    pool.create_snapshot(SECOND, FIRST)
    fresh, number = mapped, SECOND
    for kind, first, count, device in changes:
        if kind == "map":
            pool.insert(device, span(first, count), packed(span(fresh, count), pool.time))
            fresh += count
        elif kind == "unmap":
            pool.remove(device, first, first + count)
        else:
            number += 1
            pool.create_snapshot(number, device)
            pool.commit()
    begin, end = min(limits), max(limits)
    for old, new in ((FIRST, SECOND), (SECOND, FIRST), (None, FIRST), (number, SECOND), (FIRST, FIRST)):
        assert differing(pool, old, new, begin, end) == expected(pool, old, new, begin, end)
        assert differing(pool, old, new, 0, 2**64) == expected(pool, old, new, 0, 2**64)


def test_shared_subtrees_are_not_read():
    store, pool = new_pool(metadata_blocks=8000, data_blocks=1 << 20)
    pool.create_device(FIRST)
    pool.insert(FIRST, span(0, 500_000), packed(span(0, 500_000)))
    pool.create_snapshot(SECOND, FIRST)
    pool.insert(SECOND, u64(123_456), packed(u64(900_000), pool.time))
    pool.commit()
    reads: list[int] = []

    class Counting:
        def __getattr__(self, name: str):
            return getattr(store, name)

        def read(self, first: int, count: int) -> bytes:
            reads.extend(range(first, first + count))
            return store.read(first, count)

    looked = PoolMetadata.open(Counting(), writable=False)
    reads.clear()
    assert list(differing(looked, FIRST, SECOND, 0, 2**64)) == [123_456]
    heights = [pool.state.mapping.height(device) for device in (FIRST, SECOND)]
    assert len(reads) <= sum(heights) + pool.state.mapping.top_height() + 2, (
        "one path of each tree, and one leaf"
    )
    reads.clear()
    assert differing(looked, FIRST, FIRST, 0, 2**64) == {}
    assert len(reads) <= 2


def test_a_key_bound_lower_than_the_leaf_does_not_lose_entries():
    """Removing a leaf's first entries leaves its parent's bound behind; ranges then end between bound and entry."""
    _, pool = new_pool(metadata_blocks=4000)
    pool.create_device(FIRST)
    pool.insert(FIRST, span(0, 5000), packed(span(0, 5000)))
    pool.create_snapshot(SECOND, FIRST)
    for first in range(0, 5000, 250):
        pool.remove(SECOND, first, first + 130)
    for end in range(0, 5001, 61):
        assert differing(pool, FIRST, SECOND, end // 2, end) == expected(pool, FIRST, SECOND, end // 2, end)


def test_ranges_have_three_states_and_end_with_the_device():
    _, pool = new_pool()
    pool.create_device(FIRST)
    pool.insert(FIRST, span(0, 10), packed(span(0, 10)))
    pool.create_snapshot(SECOND, FIRST)
    pool.remove(SECOND, 2, 4)
    pool.insert(SECOND, u64(4, 9), packed(u64(100, 101), 1))
    block = 1 << 16
    ranges = [
        (found.offset_bytes, found.length_bytes, found.change)
        for found in changed_ranges(pool, FIRST, SECOND, block, 9 * block + 100)
    ]
    assert ranges == [
        (2 * block, 2 * block, Change.HOLE),
        (4 * block, block, Change.DATA),
        (9 * block, 100, Change.DATA),
    ]
    assert dirty_extents(pool, (FIRST, SECOND), block, 100, 8 * block) == [
        (2 * block - 100, 0),
        (3 * block, 1),
        (3 * block + 100, 0),
    ]


def test_damage_among_leaves_read_together_is_named():
    store, pool = new_pool(metadata_blocks=4000)
    pool.create_device(FIRST)
    pool.insert(FIRST, span(0, 5000), packed(span(0, 5000)))
    pool.commit()
    root = pool.state.transaction.node(pool.device_root(FIRST))
    assert len(root.values) == 20, "its leaves are read in one go"
    damaged, internal = int(root.values[7]), int(root.values[13])
    intact = store.read(damaged, 1)
    store.write(damaged, intact[:2000] + bytes([intact[2000] ^ 1]) + intact[2001:])
    with pytest.raises(BlockDamaged, match=f"{damaged}"):
        differing(PoolMetadata.open(store, writable=False), None, FIRST, 0, 2**64)
    store.write(damaged, intact)
    # A sound block of another kind where a leaf should be.
    store.write(internal, root.encode(internal))
    with pytest.raises(BlockDamaged, match=f"{internal}.*internal"):
        differing(PoolMetadata.open(store, writable=False), None, FIRST, 0, 2**64)


@pytest.mark.parametrize("ranges_per_page", [1, 2, 7, 1000])
def test_pages_joined_are_the_whole(ranges_per_page: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_diff, "RANGES_PER_PAGE", ranges_per_page)
    _, pool = new_pool(metadata_blocks=4000)
    pool.create_device(FIRST)
    pool.insert(FIRST, span(0, 3000), packed(span(0, 3000)))
    pool.create_snapshot(SECOND, FIRST)
    for number in range(14):
        pool.insert(SECOND, span(200 * number, 3), packed(span(10_000 + 3 * number, 3), 1))
        pool.remove(SECOND, 200 * number + 3, 200 * number + 5)
    block, size = 1 << 16, 3000 << 16
    sides = [CatalogEntry(number, f"d{number}", size, True, None, 0.0) for number in (FIRST, SECOND)]
    pages = list(all_pages(lambda begin: compare(pool, *sides, block, begin).to_json()))
    assert len(pages) == -(-28 // ranges_per_page)
    assert [each for page in pages for each in page["ranges"]] == [
        (found.offset_bytes, found.length_bytes, int(found.change))
        for found in changed_ranges(pool, FIRST, SECOND, block, size)
    ]


def delta_of(xml: str) -> Iterator[tuple[str, int, int]]:
    for kind, begin, length in re.findall(r'<(\w+) begin="(\d+)" length="(\d+)"/>', xml):
        if kind != "same":
            yield kind, int(begin), int(length)


@pytest.mark.peer
def test_agrees_with_thin_delta(tmp_path: Path, require_tool):
    require_tool("thin_delta")
    random = np.random.default_rng(7)
    store, pool = new_pool(metadata_blocks=4000, data_blocks=1 << 18)
    pool.create_device(FIRST)
    pool.insert(FIRST, span(0, 30_000), packed(span(0, 30_000)))
    pool.create_snapshot(SECOND, FIRST)
    fresh = 30_000
    for _ in range(40):
        first, count = int(random.integers(0, 40_000)), int(random.integers(1, 700))
        if random.integers(0, 2):
            pool.insert(SECOND, span(first, count), packed(span(fresh, count), pool.time))
            fresh += count
        else:
            pool.remove(SECOND, first, first + count)
    pool.commit()
    image = tmp_path / "metadata"
    image.write_bytes(bytes(store.image))
    code, said = run_tool("thin_delta", "--thin1", str(FIRST), "--thin2", str(SECOND), image)
    assert code == 0, said
    theirs = {key: kind for kind, begin, length in delta_of(said) for key in range(begin, begin + length)}
    ours = {
        key: "left_only" if after == ABSENT else "right_only" if before == ABSENT else "different"
        for key, (before, after) in differing(pool, FIRST, SECOND, 0, 2**64).items()
    }
    assert ours == theirs

"""The block map: lazy filling by chunks, unmapping what is loaded, sharing by time."""

import numpy as np

from thinpool.block_map import CHUNK_BLOCKS, MAPPED, UNMAPPED, BlockMap, entry_of


def make(tree: dict[int, int], blocks: int = 3 * CHUNK_BLOCKS):
    asked: list[tuple[int, int]] = []

    def load(begin: int, end: int):
        asked.append((begin, end))
        keys = sorted(key for key in tree if begin <= key < end)
        if keys:
            yield np.array(keys, np.uint64), np.array([tree[key] for key in keys], np.uint64)

    return BlockMap(blocks, load), asked


def test_block_zero_at_time_zero_is_a_mapping():
    block_map, _ = make({0: 0})
    assert block_map.entries[0] == 0  # not loaded
    block_map.ensure(0, 1)
    assert block_map.entries[0] == MAPPED == entry_of(0, 0)
    assert block_map.entries[1] == UNMAPPED


def test_chunks_are_loaded_once_and_only_where_asked():
    block_map, asked = make({CHUNK_BLOCKS + 1: 7 << 24 | 3})
    block_map.ensure(CHUNK_BLOCKS - 1, CHUNK_BLOCKS + 1)
    block_map.ensure(0, CHUNK_BLOCKS)
    assert asked == [(0, CHUNK_BLOCKS), (CHUNK_BLOCKS, 2 * CHUNK_BLOCKS)]
    assert block_map.entries[CHUNK_BLOCKS + 1] == entry_of(7, 3)
    assert block_map.entries[2 * CHUNK_BLOCKS] == 0


def test_unmapping_touches_loaded_chunks_only():
    tree = {key: key << 24 for key in range(0, 3 * CHUNK_BLOCKS, 5)}
    block_map, asked = make(tree)
    block_map.ensure(0, 0)
    block_map.ensure(2 * CHUNK_BLOCKS, 2 * CHUNK_BLOCKS)
    block_map.unmap(5, 2 * CHUNK_BLOCKS + 1)
    assert block_map.entries[0] == entry_of(0, 0)
    assert block_map.entries[5] == UNMAPPED
    assert block_map.entries[CHUNK_BLOCKS] == 0
    keys, _ = block_map.mapped(np.arange(2 * CHUNK_BLOCKS, 3 * CHUNK_BLOCKS, dtype=np.uint64))
    assert keys.tolist() == [key for key in tree if key > 2 * CHUNK_BLOCKS]
    assert len(asked) == 2


def test_times_tell_what_may_be_shared_and_restamping_ends_it():
    block_map, _ = make({1: 10 << 24 | 1, 2: 11 << 24 | 5, 3: 12 << 24})
    block_map.ensure(0, 0)
    assert block_map.older_than(0, 5).tolist() == [1, 3]
    block_map.restamp(np.array([3], np.uint64), 6)
    assert block_map.older_than(0, 5).tolist() == [1]
    assert block_map.entries[3] == entry_of(12, 6)


def test_a_petabyte_costs_nothing_until_touched():
    blocks = (1 << 50) // 65536
    block_map, _ = make({blocks - 1: 5 << 24}, blocks)
    block_map.ensure(blocks - 1, blocks - 1)
    assert block_map.entries[blocks - 1] == entry_of(5, 0)
    block_map.unmap(0, blocks)
    assert block_map.entries[blocks - 1] == UNMAPPED

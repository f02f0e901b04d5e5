"""The free map: first fit with a roving cursor, scrub before first use, growth."""

import numpy as np
import pytest
from bitarray import bitarray

from thinpool.free_map import REGION_BLOCKS, FreeMap, zeroed_bits


def make(blocks: int, taken: list[int] | None = None):
    scrubbed: list[tuple[int, int]] = []
    unavailable = bitarray(blocks)
    for block in taken or []:
        unavailable[block] = 1
    return FreeMap(unavailable, lambda first, count: scrubbed.append((first, count))), scrubbed


def test_hands_out_runs_and_wraps_once():
    free, _ = make(10, [0, 3])
    assert [free.allocate() for _ in range(8)] == [1, 2, 4, 5, 6, 7, 8, 9]
    assert free.allocate() == -1
    assert free.free_blocks == 0
    free.release(np.array([2, 9], dtype=np.uint64))
    assert [free.allocate() for _ in range(3)] == [2, 9, -1]


def test_released_blocks_come_after_the_cursor_first():
    free, _ = make(6)
    assert [free.allocate() for _ in range(3)] == [0, 1, 2]
    free.release(np.array([0], dtype=np.uint64))
    assert [free.allocate() for _ in range(4)] == [3, 4, 5, 0]


def test_every_free_run_of_a_region_is_scrubbed_before_its_first_block_goes_out():
    free, scrubbed = make(REGION_BLOCKS + 8, [1, 2])
    free.allocate()
    assert scrubbed == [(0, 1), (3, REGION_BLOCKS - 3)]
    for _ in range(REGION_BLOCKS - 3):
        free.allocate()
    assert len(scrubbed) == 2
    assert free.allocate() == REGION_BLOCKS
    assert scrubbed[2:] == [(REGION_BLOCKS, 8)]


def test_a_scrub_that_fails_takes_nothing():
    def fail(first: int, count: int) -> None:
        raise OSError(5, "no")

    free = FreeMap(bitarray(4), fail)
    with pytest.raises(OSError, match="no"):
        free.allocate()
    assert free.free_blocks == 4
    assert len(free.take_fresh()) == 0


def test_fresh_blocks_are_reported_once_in_order():
    free, _ = make(4, [1])
    for _ in range(3):
        free.allocate()
    assert free.take_fresh().tolist() == [0, 2, 3]
    assert free.take_fresh().tolist() == []


def test_growth_adds_free_blocks_and_keeps_what_is_taken():
    free, scrubbed = make(3)
    for _ in range(3):
        free.allocate()
    assert free.allocate() == -1
    free.grow(5)
    assert free.free_blocks == 2
    assert [free.allocate(), free.allocate(), free.allocate()] == [3, 4, -1]
    assert scrubbed[-1] == (3, 2)
    assert free.take_fresh().tolist() == [0, 1, 2, 3, 4]


def test_no_search_runs_past_the_end():
    bits = zeroed_bits(9)
    bits[:9] = 1
    assert bits.find(0) == -1

"""Freed blocks wait for every reader that may still be sending from them, and come back as holes."""

import os

import numpy as np
import pytest
from bitarray import bitarray

from thinpool.data_file import DataFile
from thinpool.errors import DataFileMissing, DataFileTooShort
from thinpool.free_map import FreeMap
from thinpool.reclaim import UNPINNED, Reclaimer, runs_of

BLOCK = 65536


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"x" * (8 * BLOCK))
    file = DataFile(path, block_bytes=BLOCK, blocks=8, writable=True)
    yield file
    file.close()


def make(data):
    unavailable = bitarray(8)
    unavailable.setall(1)
    free = FreeMap(unavailable, lambda first, count: None)
    messages: list[str] = []
    return Reclaimer(data, free, messages.append), free, messages


def test_runs():
    assert list(runs_of(np.array([], np.uint64))) == []
    assert list(runs_of(np.array([1, 2, 3, 7, 9, 10], np.uint64))) == [(1, 3), (7, 1), (9, 2)]


def test_blocks_come_back_punched(data):
    reclaimer, free, _ = make(data)
    reclaimer.add(np.array([2, 3, 5], np.uint64))
    assert reclaimer.waiting_blocks == 3
    assert reclaimer.run(lambda: UNPINNED) == 3
    assert free.free_blocks == 3
    assert bytes(data.read(2 * BLOCK, 2 * BLOCK)) == bytes(2 * BLOCK)
    assert bytes(data.read(4 * BLOCK, BLOCK)) == b"x" * BLOCK


def test_a_pin_at_the_epoch_of_the_commit_holds_them_back(data):
    reclaimer, free, _ = make(data)
    pin = reclaimer.epoch
    reclaimer.add(np.array([2], np.uint64))
    later_pin = reclaimer.epoch
    assert reclaimer.run(lambda: pin) == 0
    assert free.free_blocks == 0
    assert bytes(data.read(2 * BLOCK, BLOCK)) == b"x" * BLOCK
    assert reclaimer.run(lambda: later_pin) == 1


def test_a_block_that_cannot_be_punched_is_not_handed_out(data, monkeypatch):
    reclaimer, free, messages = make(data)

    def fail(offset: int, length: int) -> bool:
        raise OSError(5, "broken")

    monkeypatch.setattr(data, "punch", fail)
    reclaimer.add(np.array([1], np.uint64))
    assert reclaimer.run(lambda: UNPINNED) == 0
    assert free.free_blocks == 0
    assert len(messages) == 1


def test_data_file_that_is_missing_or_short(tmp_path):
    with pytest.raises(DataFileMissing):
        DataFile(tmp_path / "none", block_bytes=BLOCK, blocks=1, writable=False)
    (tmp_path / "short").write_bytes(b"x" * 100)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DataFileTooShort):
        DataFile(tmp_path / "short", block_bytes=BLOCK, blocks=1, writable=False)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_copy_zero_and_holes(data):
    data.write(0, b"abc")
    data.copy(0, BLOCK, BLOCK)
    assert bytes(data.read(BLOCK, 4)) == b"abcx"
    data.zero(BLOCK + 1, 1)
    assert bytes(data.read(BLOCK, 4)) == b"a\0cx"
    assert data.punch(BLOCK, BLOCK)
    assert not data.has_data(BLOCK, BLOCK)
    assert data.has_data(0, 2 * BLOCK)

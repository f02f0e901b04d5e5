"""A pool whose superblock or lists are gone comes back as of its last commit, not of the one before that storage also holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from metadata import (
    Known,
    MemoryStore,
    Outcome,
    PoolMetadata,
    RepairReport,
    Superblock,
    format_pool,
    recount,
    repair,
)
from metadata.commit_clues import CommitClues
from metadata.last_commit import find_last_commit
from metadata.transaction import Transaction
from tests.fakes.dump_texts import our_dump
from tests.fakes.metadata_edits import Image

BLOCKS = 300
DATA_BLOCKS = 20_000
COMMITS = 100
Change = Callable[["History"], None]


class History:
    """A pool in the making; data blocks are handed out upwards, as the engine and the kernel do."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        self.store = MemoryStore(blocks)
        format_pool(self.store, data_block_sectors=128, data_blocks=DATA_BLOCKS)
        self.pool = PoolMetadata.open(self.store)
        self._next = 0
        self.images: list[bytes] = []

    def write(self, device: int, begin: int, end: int, step: int = 1) -> None:
        keys = np.arange(begin, end, step, dtype=np.uint64)
        blocks = np.arange(self._next, self._next + len(keys), dtype=np.uint64)
        self._next += len(keys)
        self.pool.insert(device, keys, blocks << np.uint64(24) | np.uint64(self.pool.time))

    def commit(self) -> None:
        self.pool.set_transaction_id(self.pool.transaction_id + 1)
        self.pool.commit()
        self.images.append(bytes(self.store.image))


def history(*, snapshot: bool, last: Change) -> History:
    """Some commits, `last` the change of the last one."""
    made = History()
    for device, count in ((1, 2000), (2, 900), (3, 300)):
        made.pool.create_device(device)
        made.write(device, 0, count * 2, 2)
        made.commit()
    if snapshot:
        made.pool.create_snapshot(11, 1)
        made.commit()
    made.write(2, 2000, 2300)
    made.commit()
    made.write(3, 1, 200, 2)
    made.commit()
    last(made)
    made.commit()
    return made


def lost(image: bytes, *blocks: int) -> Image:
    damaged = Image(image)
    for location in blocks:
        damaged.put(location, bytes(4096))
    return damaged


def repaired(damaged: MemoryStore) -> tuple[RepairReport, str]:
    target = MemoryStore(BLOCKS)
    before = bytes(damaged.image)
    report = repair(damaged, target, Known(128, DATA_BLOCKS))
    assert bytes(damaged.image) == before
    assert recount(target) == []
    return report, our_dump(target)


def mappings(text: str) -> list[str]:
    """The dump but for the pool's and the devices' own fields, of which a lost record takes some with it."""
    lines = [line for line in text.splitlines() if "<superblock" not in line]
    return [line.split(" mapped_blocks")[0] for line in lines]


LAST: dict[str, Change] = {
    "writes": lambda made: made.write(1, 5000, 5200),
    "writes over what was there": lambda made: made.write(1, 0, 300),
    "discards": lambda made: made.pool.remove(1, 1000, 2500),
    "a device made": lambda made: made.pool.create_device(7),
    "a device deleted": lambda made: made.pool.delete_device(2),
    "a snapshot": lambda made: made.pool.create_snapshot(12, 3) and None,
}


@pytest.mark.parametrize("snapshot", [False, True], ids=["no snapshot", "snapshot"])
@pytest.mark.parametrize("last", LAST.values(), ids=LAST.keys())
def test_the_last_commit_is_told_from_the_one_before(last: Change, snapshot: bool):
    made = history(snapshot=snapshot, last=last)
    report, text = repaired(lost(made.images[-1], 0))
    assert mappings(text) == mappings(our_dump(MemoryStore(made.images[-1])))
    assert {each.outcome for each in report.devices} == {Outcome.GUESSED}
    _, text = repaired(lost(made.images[-2], 0))
    assert mappings(text) == mappings(our_dump(MemoryStore(made.images[-2])))


def test_a_clock_that_went_on_proves_which_commit_is_the_later():
    made = history(snapshot=True, last=LAST["discards"])
    found = find_last_commit(lost(made.images[-1], 0))
    assert len(found.whole) == 1
    assert found.proven
    report, _ = repaired(lost(made.images[-1], 0))
    assert any("the format itself says" in remark for remark in report.remarks)


def test_where_the_clock_stands_still_nothing_is_said_to_be_proven():
    made = history(snapshot=False, last=LAST["discards"])
    found = find_last_commit(lost(made.images[-1], 0))
    assert len(found.whole) == 1
    assert not found.proven
    report, _ = repaired(lost(made.images[-1], 0))
    assert any("looks newest" in remark for remark in report.remarks)


@pytest.mark.parametrize("which", ["mapping_root", "details_root"])
def test_superblock_and_a_list_lost(which: str):
    made = history(snapshot=True, last=LAST["discards"])
    superblock = Superblock.unpack(made.images[-1][:4096])
    _, text = repaired(lost(made.images[-1], 0, getattr(superblock, which)))
    assert mappings(text) == mappings(our_dump(MemoryStore(made.images[-1])))


@pytest.mark.parametrize("superblock_too", [False, True])
def test_a_list_that_lost_an_entry_is_not_of_an_earlier_commit(superblock_too: bool):
    made = history(snapshot=True, last=LAST["discards"])
    damaged = Image(made.images[-1])
    place = damaged.superblock.mapping_root
    node = damaged.node(place)
    damaged.set_node(place, node.keys[1:], node.values[1:])
    if superblock_too:
        damaged.put(0, bytes(4096))
    report, text = repaired(damaged)
    assert mappings(text) == mappings(our_dump(MemoryStore(made.images[-1])))
    assert {each.device: each.outcome for each in report.devices}[2] is (
        Outcome.GUESSED if superblock_too else Outcome.WHOLE
    )


def test_superblock_and_space_map_lost():
    made = history(snapshot=True, last=LAST["discards"])
    superblock = Superblock.unpack(made.images[-1][:4096])
    _, text = repaired(lost(made.images[-1], 0, superblock.metadata_space.bitmap_root))
    assert mappings(text) == mappings(our_dump(MemoryStore(made.images[-1])))


@pytest.mark.parametrize("age", [0, 1, 3])
def test_both_lists_lost_or_as_they_were_earlier(age: int):
    """Age 0: zeroed. Otherwise the writes never arrived, and the blocks hold what they held so many commits ago."""
    made = history(snapshot=True, last=LAST["discards"])
    superblock = Superblock.unpack(made.images[-1][:4096])
    damaged = Image(made.images[-1])
    for location in (superblock.mapping_root, superblock.details_root):
        before = made.images[-1 - age][location * 4096 :][:4096]
        damaged.put(location, before if age else bytes(4096))
    report, text = repaired(damaged)
    assert mappings(text) == mappings(our_dump(MemoryStore(made.images[-1])))
    assert not report.lossless


def test_blocks_that_were_swapped_are_read_where_they_are():
    made = history(snapshot=False, last=LAST["writes"])
    superblock = Superblock.unpack(made.images[-1][:4096])
    damaged = Image(made.images[-1])
    places = (0, superblock.mapping_root, superblock.details_root)
    blocks = [damaged.block(place) for place in places]
    for place, block in zip(places, blocks[1:] + blocks[:1], strict=True):
        damaged.put(place, block)
    _, text = repaired(damaged)
    assert text == our_dump(MemoryStore(made.images[-1]))


def test_a_superblock_that_was_never_written_again_is_not_believed():
    made = history(snapshot=True, last=LAST["discards"])
    damaged = Image(made.images[-1])
    damaged.put(0, made.images[-3][:4096])
    report, text = repaired(damaged)
    assert mappings(text) == mappings(our_dump(MemoryStore(made.images[-1])))
    assert any("the superblock is older" in remark for remark in report.remarks)


def test_of_a_file_that_was_cut_off_the_whole_devices_come_back():
    """A list of roots without records, space map and superblock; some roots are beyond the end."""
    made = History()
    for device in (1, 2):
        made.pool.create_device(device)
        made.write(device, 0, 2000)
        made.commit()
    superblock = Superblock.unpack(made.images[-1][:4096])
    image = Image(made.images[-1])
    assert superblock.mapping_root < image.root_of(2)
    cut = MemoryStore(bytes(image.image[: image.root_of(2) * 4096]))
    cut.write(0, bytes(4096))
    report, _ = repaired(cut)
    complete = {each.device: each.mapped_blocks for each in report.devices if not each.lost}
    assert complete == {1: 2000}


def test_of_a_hundred_commits_the_last_is_found(monkeypatch: pytest.MonkeyPatch):
    """As newer kernels do it: metadata is taken onwards from the last block, so hundreds of commits stay whole."""
    listed = Transaction._list_free
    taken = [-1]

    def onwards(self: Transaction, chunk: int) -> list[int]:
        free = listed(self, chunk)
        return [location for location in free if location > taken[0]] or free

    def allocate(self: Transaction) -> int:
        taken[0] = self._next_free()
        self.counts.change(taken[0], 1)
        self._fresh.add(taken[0])
        self._cache.forget(taken[0])
        self.taken += 1
        return taken[0]

    monkeypatch.setattr(Transaction, "_list_free", onwards)
    monkeypatch.setattr(Transaction, "allocate", allocate)
    made = History(blocks=1800)
    made.pool.create_device(1)
    for begin in range(0, 30 * COMMITS, 30):
        made.write(1, begin, begin + 20)
        made.pool.remove(1, begin // 2, begin // 2 + 5)
        made.pool.commit()
    damaged = lost(bytes(made.store.image), 0)
    assert len(CommitClues(damaged).indexes) > COMMITS - 5
    target = MemoryStore(1800)
    repair(damaged, target, Known(128, DATA_BLOCKS))
    assert mappings(our_dump(target)) == mappings(our_dump(made.store))

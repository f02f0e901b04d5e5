"""Metadata written by the Linux kernel: we read it, find nothing wrong with it, change it, and it stays right.

The images come from the kernel's own use in the test suites of thin-provisioning-tools; two were damaged on purpose.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from metadata import Fault, FileStore, MemoryStore, MetadataError, PoolMetadata, Severity, recount
from metadata.dump import dump
from tests.fakes.thin_tools import assert_clean

INTACT = (
    "tmeta",
    "tmeta_device_id_reuse",
    "tmeta_with_deleted_snapshot",
    "tmeta_with_empty_roots",
    "tmeta_with_metadata_snap",
    "tmeta_with_shared_internal_root",
    "tmeta_with_shared_internals_and_leaves",
)
DAMAGED = ("tmeta_with_corrupted_metadata_snap", "tmeta_device_id_reuse_with_corrupted_thins")
WRITES = 1000
# The images come from devices of 4 MiB and more; this leaves room for whatever the test does.
ROOM_BLOCKS = 4096


def our_dump(source, *, held: bool = False) -> str:
    written: list[str] = []
    dump(source, written.append, held=held)
    return "".join(written)


def contents(pool: PoolMetadata) -> dict[int, tuple[object, dict[int, int]]]:
    """Record and mappings of every device."""
    found = {}
    for record in pool.devices():
        mappings: dict[int, int] = {}
        for keys, values in pool.mappings(record.device_id):
            mappings.update(zip(keys.tolist(), values.tolist(), strict=True))
        found[record.device_id] = (record, mappings)
    return found


def test_every_image_is_known(kernel_images: Mapping[str, bytes]):
    assert set(kernel_images) == {*INTACT, *DAMAGED}


@pytest.mark.parametrize("name", INTACT)
def test_nothing_is_wrong_with_it(kernel_images: Mapping[str, bytes], name: str):
    assert recount(MemoryStore(kernel_images[name])) == []


@pytest.mark.parametrize("name", INTACT)
def test_reading_finds_what_the_records_promise(kernel_images: Mapping[str, bytes], name: str):
    pool = PoolMetadata.open(MemoryStore(kernel_images[name]), writable=False)
    for record, mappings in contents(pool).values():
        assert len(mappings) == record.mapped_blocks
        assert pool.usage(record.device_id).exclusive_blocks <= record.mapped_blocks


@pytest.mark.peer
@pytest.mark.parametrize("name", INTACT)
def test_dump_is_that_of_thin_dump(kernel_images, require_tool, tmp_path: Path, name: str):
    require_tool("thin_dump")
    path = tmp_path / "metadata"
    path.write_bytes(kernel_images[name])
    store = MemoryStore(kernel_images[name])
    assert our_dump(store) == assert_clean(path)
    if PoolMetadata.open(store).held_root:
        assert our_dump(store, held=True) == assert_clean(path, held=True)


def test_opening_and_committing_nothing_writes_nothing(kernel_images: Mapping[str, bytes]):
    for name in INTACT:
        store = MemoryStore(kernel_images[name])
        report = PoolMetadata.open(store).commit()
        assert report.metadata_blocks_written == 0
        assert bytes(store.image) == kernel_images[name]


class Change:
    """The standard treatment: a snapshot, writes to the origin and to the snapshot, discards, a deletion."""

    def __init__(self, pool: PoolMetadata, seed: int) -> None:
        self.pool = pool
        self.random = np.random.default_rng(seed)
        self.touched: set[int] = set()

    def run(self) -> None:
        pool = self.pool
        if not pool.devices():
            pool.create_device(5)
        origin = max(pool.devices(), key=lambda record: record.mapped_blocks).device_id
        others = [record.device_id for record in pool.devices() if record.device_id != origin]
        snapshot = 1 + max(record.device_id for record in pool.devices())
        pool.grow_metadata()
        pool.grow_data(pool.data_blocks + 2 * WRITES)
        pool.create_snapshot(snapshot, origin)
        self.touched |= {origin, snapshot}
        for device in (origin, snapshot):
            self.write(device)
            self.commit()
            for _ in range(20):
                begin = int(self.random.integers(0, 20_000))
                pool.remove(device, begin, begin + int(self.random.integers(1, 200)))
        self.commit()
        if others:
            self.touched.add(others[0])
            pool.delete_device(others[0])
        pool.create_snapshot(snapshot + 1, snapshot)
        pool.delete_device(snapshot)
        self.touched.add(snapshot + 1)
        self.commit()

    def write(self, device: int) -> None:
        """A thousand mappings, some over old ones, some new, each to a block free before and now."""
        keys = np.unique(self.random.integers(0, 20_000, 2 * WRITES))[:WRITES].astype(np.uint64)
        free = np.flatnonzero(~np.array(self.pool.unavailable_data().tolist(), np.bool_))
        values = free[: len(keys)].astype(np.uint64) << np.uint64(24) | np.uint64(self.pool.time)
        self.pool.insert(device, keys, values)
        for key, value in zip(keys.tolist()[::97], values.tolist()[::97], strict=True):
            assert self.pool.lookup(device, key) == value

    def commit(self) -> None:
        self.pool.commit()
        problems = recount(self.pool)
        assert not problems, "\n".join(map(str, problems))


@pytest.mark.parametrize("name", INTACT)
def test_changed_by_us_it_stays_right(kernel_images, tmp_path: Path, name: str):
    path, before, pool, change = _changed(kernel_images[name], tmp_path)
    after = contents(pool)
    for device in before.keys() - change.touched:
        assert after[device] == before[device]
    assert {device for device in after if device not in before} <= change.touched
    pool.close()
    again = PoolMetadata.open(FileStore(path, writable=False), writable=False)
    assert contents(again) == after
    again.close()


@pytest.mark.peer
@pytest.mark.parametrize("name", INTACT)
def test_changed_by_us_foreign_tools_agree(kernel_images, require_tool, tmp_path: Path, name: str):
    require_tool("thin_check")
    path, _, pool, _ = _changed(kernel_images[name], tmp_path)
    assert our_dump(pool) == assert_clean(path)
    if pool.held_root:
        # What the kernel held is held still: the snapshot of the metadata does not see our changes.
        assert our_dump(pool, held=True) == assert_clean(path, held=True)
        assert our_dump(pool, held=True) == our_dump(MemoryStore(kernel_images[name]), held=True)
        pool.release_metadata_snapshot()
        pool.commit()
        assert recount(pool) == []
        assert our_dump(pool) == assert_clean(path)
    pool.close()


def _changed(image: bytes, directory: Path):
    path = directory / "metadata"
    path.write_bytes(image)
    os.truncate(path, max(len(image), ROOM_BLOCKS * 4096))
    pool = PoolMetadata.open(FileStore(path, writable=True))
    before = contents(pool)
    change = Change(pool, seed=len(image))
    change.run()
    return path, before, pool, change


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_reported_and_nothing_raised(kernel_images: Mapping[str, bytes], name: str):
    problems = recount(MemoryStore(kernel_images[name]))
    assert any(problem.severity is Severity.ERROR for problem in problems)
    assert {problem.fault for problem in problems} <= {Fault.HELD, Fault.UNREADABLE, Fault.UNVERIFIED}
    # In both, only what the metadata snapshot reaches is damaged: the live pool can be dumped.
    assert our_dump(MemoryStore(kernel_images[name])).endswith("</superblock>\n")
    with pytest.raises(MetadataError):
        our_dump(MemoryStore(kernel_images[name]), held=True)

"""A pool's metadata against dictionaries: any sequence of operations, checked in full after every commit.

The model is a dictionary of mappings for each device, for the live pool, the committed pool and the metadata
snapshot. After each commit the pool on the file equals the model, a recount of everything finds nothing, and (with
the tools at hand) thin_check is content and thin_dump writes the same bytes as our dump. Trees reach three levels
because single rules insert thousands of mappings with strides that spread them over the whole range of keys.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from metadata import (
    DeviceExists,
    DeviceRecord,
    Fault,
    FileStore,
    MetadataFull,
    MetadataSnapshotExists,
    NoMetadataSnapshot,
    NoSuchDevice,
    PoolMetadata,
    format_pool,
    recount,
)
from metadata.dump import dump
from tests.fakes.thin_tools import Verdict, find_tool

TIME_BITS = 24
DATA_BLOCKS_MAX = 200_000
METADATA_BLOCKS_MAX = 18_000
MAPPINGS_MAX = 80_000
WORK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass(frozen=True)
class Device:
    """One device; `mappings` (thin block to packed value) is never changed in place, snapshots share it."""

    record: DeviceRecord
    mappings: dict[int, int]


@dataclass(frozen=True)
class World:
    """Everything a pool's metadata says; changing it makes a new one."""

    data_blocks: int
    devices: dict[int, Device] = field(default_factory=dict)
    time: int = 0
    transaction_id: int = 0
    needs_check: bool = False
    held: World | None = None

    def with_device(self, device: int, changed: Device | None) -> World:
        devices = {**self.devices, device: changed}
        if changed is None:
            del devices[device]
        return replace(self, devices=devices)

    def owned_wrongly(self) -> dict[int, tuple[int, int]]:
        """Device: first and last of its mappings that name a block named elsewhere too, and are not older than its
        last snapshot: the kernel would write into them without a copy.
        """
        values = {number: packed_array(device.mappings) for number, device in self.devices.items()}
        blocks = [each >> TIME_BITS for each in values.values()]
        uses = np.bincount(np.concatenate([np.empty(0, np.int64), *blocks]).astype(np.int64))
        found = {}
        for number, device in self.devices.items():
            own = values[number] & ((1 << TIME_BITS) - 1) >= device.record.snapshotted_time
            keys = packed_keys(device.mappings)[own & (uses[values[number] >> TIME_BITS] > 1)]
            if len(keys):
                found[number] = int(keys.min()), int(keys.max())
        return found

    def used(self, *, without: int | None = None) -> np.ndarray:
        """Which data blocks any mapping names, that of the metadata snapshot included; shape (data_blocks,)."""
        used = np.zeros(self.data_blocks, np.bool_)
        seen = set()
        held = self.held.devices.values() if self.held else ()
        live = (device for number, device in self.devices.items() if number != without)
        for device in (*live, *held):
            if id(device.mappings) not in seen:
                seen.add(id(device.mappings))
                used[packed_array(device.mappings) >> TIME_BITS] = True
        return used


def packed_array(mappings: dict[int, int]) -> np.ndarray:
    return np.fromiter(mappings.values(), np.int64, len(mappings))


def packed_keys(mappings: dict[int, int]) -> np.ndarray:
    return np.fromiter(mappings, np.uint64, len(mappings))


DEVICES = (0, 1, 2, 3, 4, 5, 6, 7, 2**24 - 1)
SEEDS = st.integers(0, 2**32 - 1)
STRIDES = st.sampled_from([1, 1, 2, 3, 97, 2**20, 2**45])
COUNTS = st.sampled_from([1, 2, 30, 84, 252, 253, 700, 2500, 6000])


class MetadataMachine(RuleBasedStateMachine):
    """The rules; `judge` adds what only foreign tools can say.

    There are few rules with many kinds each: hypothesis leaves out whole rules in most of its examples, and one
    without commits or without insertions would show nothing.
    """

    @initialize(
        metadata_blocks=st.sampled_from([3000, 90, 400]),
        data_blocks=st.sampled_from([150_000, 0, 500, 30_000]),
        load=st.sampled_from([300, 50_000, 5000, 50_000, 0]),
        stride=STRIDES,
        snapshots=st.integers(0, 2),
    )
    def start(self, metadata_blocks: int, data_blocks: int, load: int, stride: int, snapshots: int) -> None:
        self.steps = 0
        self.root = Path(tempfile.mkdtemp(prefix="thinpool-machine-", dir=WORK))
        self.path = self.root / "metadata"
        self.path.write_bytes(b"")
        os.truncate(self.path, metadata_blocks * 4096)
        self.metadata_blocks = metadata_blocks
        store = FileStore(self.path, writable=True)
        format_pool(store, data_block_sectors=128, data_blocks=data_blocks)
        store.close()
        self.world = self.committed = World(data_blocks)
        self.open()
        self.check()
        self.create(0)
        half = np.arange(0, load, 2, dtype=np.uint64) * np.uint64(stride)
        self.insert(0, half, scattered=False)
        # Between those before: leaves fill up, then all of them split, which takes a large tree to three levels.
        self.insert(0, half + np.uint64(max(stride // 2, 1)), scattered=True)
        self.insert(0, half[::9] + np.uint64(max(stride // 3, 1)), scattered=True)
        for number in range(snapshots if 0 in self.world.devices else 0):
            self.snapshot(number + 1, 0)
        self.commit()

    def open(self) -> None:
        self.pool = PoolMetadata.open(FileStore(self.path, writable=True))

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close()
            shutil.rmtree(self.root)

    # What the rules need

    def random(self, seed: int) -> np.random.Generator:
        """Hypothesis likes to repeat numbers; the step makes of each something new."""
        self.steps += 1
        return np.random.default_rng([seed, self.steps])

    def free_blocks(self) -> np.ndarray:
        """Data blocks a caller may use: named neither by the committed pool nor by this transaction."""
        used = self.world.used()
        before = self.committed.used()
        used[: len(before)] |= before
        return np.flatnonzero(~used)

    def attempt(self, operation) -> bool:
        """Do something that may lack room; after a commit it gets a second chance. Whether it was done."""
        try:
            operation()
        except MetadataFull:
            self.commit()
            try:
                operation()
            except MetadataFull:
                return False
        return True

    def insert(self, device: int, keys: np.ndarray, *, scattered: bool) -> None:
        """Map `keys` (ascending) to new data blocks, as many as there are."""
        if device not in self.world.devices:
            return
        room = MAPPINGS_MAX - len(self.world.devices[device].mappings)
        free = self.free_blocks()
        keys = keys[: min(len(free), max(room, 0))]
        if not len(keys):
            return
        if scattered:
            free = np.random.default_rng(len(free)).permutation(free)
        self.put(device, keys, free[: len(keys)] << TIME_BITS | self.world.time)

    def put(self, device: int, keys: np.ndarray, values: np.ndarray) -> None:
        def operation() -> None:
            self.pool.insert(device, keys.astype(np.uint64), values.astype(np.uint64))

        if self.attempt(operation):
            mine = self.world.devices[device]
            added = dict(zip(keys.tolist(), values.tolist(), strict=True))
            self.set_mappings(device, mine.mappings | added)

    def set_mappings(self, device: int, mappings: dict[int, int]) -> None:
        record = replace(self.world.devices[device].record, mapped_blocks=len(mappings))
        self.world = self.world.with_device(device, Device(record, mappings))

    def keys_of(self, device: int) -> np.ndarray:
        mappings = self.world.devices[device].mappings
        return np.sort(np.fromiter(mappings, np.uint64, len(mappings)))

    def pick(self, random: np.random.Generator) -> int:
        """One of the devices there are, a new one if there is none (it may have been refused)."""
        if not self.world.devices:
            self.create(0)
        devices = sorted(self.world.devices)
        return int(random.choice(devices)) if devices else 0

    # Devices

    @rule(seed=SEEDS, kind=st.sampled_from(["snapshot", "snapshot", "create", "delete", "miss"]))
    def change_devices(self, seed: int, kind: str) -> None:
        random = self.random(seed)
        device = int(random.choice(DEVICES))
        if kind == "create":
            self.create(device)
        elif kind == "miss":
            self.miss(device)
        elif (other := self.pick(random)) in self.world.devices:
            if kind == "snapshot":
                self.snapshot(device, other)
            elif self.attempt(lambda: self.pool.delete_device(other)):
                self.world = self.world.with_device(other, None)

    def create(self, device: int) -> None:
        if device in self.world.devices:
            with pytest.raises(DeviceExists):
                self.pool.create_device(device)
        elif self.attempt(lambda: self.pool.create_device(device)):
            world = self.world
            record = DeviceRecord(device, 0, world.transaction_id, world.time, world.time)
            self.world = world.with_device(device, Device(record, {}))

    def snapshot(self, device: int, origin: int) -> None:
        if device in self.world.devices:
            with pytest.raises(DeviceExists):
                self.pool.create_snapshot(device, origin)
        elif self.attempt(lambda: self.pool.create_snapshot(device, origin)):
            world = replace(self.world, time=self.world.time + 1)
            old = world.devices[origin]
            stamped = replace(old.record, snapshotted_time=world.time)
            world = world.with_device(origin, replace(old, record=stamped))
            record = DeviceRecord(device, len(old.mappings), world.transaction_id, world.time, world.time)
            self.world = world.with_device(device, Device(record, old.mappings))

    def miss(self, device: int) -> None:
        if device not in self.world.devices:
            with pytest.raises(NoSuchDevice):
                self.pool.lookup(device, 0)
            with pytest.raises(NoSuchDevice):
                self.pool.delete_device(device)

    # Mappings

    @rule(seed=SEEDS, first=st.integers(0, 5000), count=COUNTS, stride=STRIDES, scattered=st.booleans())
    def insert_regular(self, seed: int, first: int, count: int, stride: int, scattered: bool) -> None:
        keys = np.uint64(first) + np.arange(count, dtype=np.uint64) * np.uint64(stride)
        self.insert(self.pick(self.random(seed)), keys, scattered=scattered)

    @rule(seed=SEEDS, count=COUNTS, span=st.sampled_from([100, 20_000, 2**40, 2**63]))
    def insert_random(self, seed: int, count: int, span: int) -> None:
        random = self.random(seed)
        keys = random.integers(0, span, count, dtype=np.uint64)
        if seed % 3 == 0:
            extremes = np.array([0, 2**32, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)
            keys = np.append(keys, random.choice(extremes, 2))
        self.insert(self.pick(random), np.unique(keys), scattered=True)

    @rule(seed=SEEDS, count=COUNTS, kind=st.sampled_from(["blocks", "times"]))
    def overwrite(self, seed: int, count: int, kind: str) -> None:
        random = self.random(seed)
        device = self.pick(random)
        if device not in self.world.devices or not self.world.devices[device].mappings:
            return
        keys = self.keys_of(device)
        chosen = np.unique(random.choice(keys, min(count, len(keys))))
        if kind == "blocks":
            self.insert(device, chosen, scattered=bool(seed % 2))
        else:
            mappings = self.world.devices[device].mappings
            values = np.array([mappings[key] for key in chosen.tolist()], np.int64)
            self.put(device, chosen, values >> TIME_BITS << TIME_BITS | self.world.time)

    @rule(
        seed=SEEDS,
        kind=st.sampled_from(["range", "range", "points", "holes", "all"]),
        share=st.sampled_from([0.01, 0.1, 0.5, 0.9]),
    )
    def remove(self, seed: int, kind: str, share: float) -> None:
        """Unmap a range that holds a share of the mappings, single blocks, small ranges, or everything."""
        random = self.random(seed)
        device = self.pick(random)
        if device not in self.world.devices or not self.world.devices[device].mappings:
            return
        keys = self.keys_of(device)
        if kind == "all":
            self.remove_span(device, 0, 2**64)
        elif kind == "range":
            first = int(random.integers(len(keys)))
            last = min(first + int(share * len(keys)), len(keys) - 1)
            odd = random.integers(-2, 3, 2).tolist()
            self.remove_span(device, int(keys[first]) + odd[0], int(keys[last]) + odd[1])
        else:
            length = 1 if kind == "points" else 150
            for start in random.choice(keys, int(80 * share) + 1).tolist():
                self.remove_span(device, start, start + length)

    def remove_span(self, device: int, begin: int, end: int) -> None:
        removed: list[int] = []
        if self.attempt(lambda: removed.append(self.pool.remove(device, begin, end))):
            old = self.world.devices[device].mappings
            left = {key: value for key, value in old.items() if not begin <= key < end}
            assert removed == [len(old) - len(left)]
            if len(left) < len(old):
                self.set_mappings(device, left)

    # The pool

    @rule(
        kind=st.sampled_from(["hold", "hold", "release", "data", "metadata", "transaction id", "flag"]),
        more=st.sampled_from([1, 300, 16_320, 50_000]),
    )
    def change_pool(self, kind: str, more: int) -> None:
        if kind == "hold":
            self.reserve_metadata_snapshot()
        elif kind == "release":
            self.release_metadata_snapshot()
        elif kind == "data":
            blocks = min(self.world.data_blocks + more, DATA_BLOCKS_MAX)
            if self.attempt(lambda: self.pool.grow_data(blocks)):
                self.world = replace(self.world, data_blocks=blocks)
        elif kind == "metadata":
            self.metadata_blocks = min(self.metadata_blocks + more, METADATA_BLOCKS_MAX)
            os.truncate(self.path, self.metadata_blocks * 4096)
            self.pool.grow_metadata()
            assert self.pool.metadata_blocks == self.metadata_blocks
        elif kind == "flag":
            self.pool.set_needs_check(more == 1)
            self.world = replace(self.world, needs_check=more == 1)
        else:
            value = 2**64 - 1 if more == 1 else more
            self.pool.set_transaction_id(value)
            self.world = replace(self.world, transaction_id=value)

    def reserve_metadata_snapshot(self) -> None:
        if self.world.held is not None:
            with pytest.raises(MetadataSnapshotExists):
                self.pool.reserve_metadata_snapshot()
        elif self.attempt(self.pool.reserve_metadata_snapshot):
            self.world = replace(self.world, held=self.world)

    def release_metadata_snapshot(self) -> None:
        if self.world.held is None:
            with pytest.raises(NoMetadataSnapshot):
                self.pool.release_metadata_snapshot()
        else:
            self.pool.release_metadata_snapshot()
            self.world = replace(self.world, held=None)

    # Commits and their opposite

    @rule(kind=st.sampled_from(["commit", "commit", "commit", "abort", "reopen"]))
    def end_transaction(self, kind: str) -> None:
        if kind == "commit":
            self.commit()
            return
        if kind == "abort":
            self.pool.abort()
        else:
            self.pool.close()
            self.open()
        self.world = self.committed
        self.check_contents()

    def commit(self) -> None:
        before = self.committed.used()
        report = self.pool.commit()
        after = self.world.used()
        assert report.freed_data.tolist() == np.flatnonzero(before & ~after[: len(before)]).tolist()
        self.committed = self.world
        self.check()

    # Checks

    def check(self) -> None:
        """The committed pool, on its file, in every respect."""
        verdicts = self.judge()
        self.check_contents()
        problems = recount(self.pool)
        # Rules that map blocks of other devices do what no engine does; the check has to say so, and nothing else.
        owned = [problem for problem in problems if problem.fault is Fault.SHARED_AS_OWN]
        assert len(owned) == len(problems), "\n".join(map(str, problems))
        found = {each.affects[0].device: (each.place.begin, each.place.end - 1) for each in owned}
        assert found == self.committed.owned_wrongly()
        for held, verdict in verdicts.items():
            written: list[str] = []
            dump(self.pool, written.append, held=held)
            assert "".join(written) == verdict.dump()

    def check_contents(self) -> None:
        world, pool = self.world, self.pool
        assert pool.devices() == [world.devices[number].record for number in sorted(world.devices)]
        assert (pool.time, pool.transaction_id, pool.needs_check) == (
            world.time,
            world.transaction_id,
            world.needs_check,
        )
        assert (pool.held_root != 0) == (world.held is not None)
        assert pool.data_blocks == world.data_blocks
        used = world.used()
        assert pool.data_blocks_allocated == np.count_nonzero(used)
        assert np.array_equal(np.array(pool.unavailable_data().tolist(), np.bool_), used)
        for number, device in world.devices.items():
            self.check_device(number, device)

    def check_device(self, number: int, device: Device) -> None:
        found: dict[int, int] = {}
        for keys, values in self.pool.mappings(number):
            found.update(zip(keys.tolist(), values.tolist(), strict=True))
        assert found == device.mappings
        assert list(found) == sorted(found)
        assert self.pool.highest_mapped(number) == max(found, default=None)
        others = self.world.used(without=number)
        blocks = packed_array(device.mappings) >> TIME_BITS
        alone = {key for key, used in zip(device.mappings, others[blocks].tolist(), strict=True) if not used}
        assert self.pool.usage(number).exclusive_blocks == len(alone)
        keys = self.keys_of(number)[:500]
        assert self.pool.exclusive(number, keys).tolist() == [key in alone for key in keys.tolist()]

    def judge(self) -> dict[bool, Verdict]:
        """Set foreign tools to work on the file: on the live pool (False) and the metadata snapshot (True)."""
        return {}


class JudgedMetadataMachine(MetadataMachine):
    def judge(self) -> dict[bool, Verdict]:
        kinds = (False, True) if self.world.held is not None else (False,)
        return {held: Verdict(self.path, held=held) for held in kinds}


def _settings(examples: int) -> settings:
    if os.environ.get("HYPOTHESIS_PROFILE") == "deep":
        return settings()
    return settings(max_examples=examples, stateful_step_count=30)


TestMetadataMachine = MetadataMachine.TestCase
TestMetadataMachine.settings = _settings(80)

TestJudgedMetadataMachine = pytest.mark.peer(
    pytest.mark.skipif(
        not (find_tool("thin_check") and find_tool("thin_dump")), reason="thin_check or thin_dump is missing"
    )(JudgedMetadataMachine.TestCase)
)
TestJudgedMetadataMachine.settings = _settings(40)

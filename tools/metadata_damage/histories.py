"""Pools of random histories without their superblock: is the last commit taken, or the one before it?

In: making histories, the same every time, and judging what repair gives back after each commit. Out: damage of other
blocks (damages), tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from metadata import Known, MemoryStore, PoolMetadata, format_pool, repair
from metadata.last_commit import find_last_commit

from .judgement import contents
from .specimen import BLOCK_BYTES, DATA_BLOCK_SECTORS, DATA_BLOCKS, METADATA_BLOCKS

COMMITS = 10
# Before the third commit there is nothing that an earlier commit could be mistaken for.
FIRST_JUDGED = 2
DEVICES_MAX = 5
CHANGES = ("create", "write", "write", "write", "discard", "snapshot", "delete", "overwrite")


@dataclass(frozen=True)
class Choice:
    """One commit whose superblock was zeroed. `returned` of `devices` came back as they were at that commit.

    `proven`: repair said that the format itself tells the last commit; `alone`: no other whole state was found.
    """

    seed: int
    commit: int
    snapshots: bool
    upwards: bool
    devices: int
    returned: int
    proven: bool
    alone: bool


class History:
    """A pool that changes at random. `upwards`: data is handed out from the lowest block on, otherwise anywhere."""

    def __init__(self, seed: int, *, snapshots: bool, upwards: bool) -> None:
        self._random = np.random.default_rng(seed)
        self._snapshots = snapshots
        order = np.arange(DATA_BLOCKS) if upwards else self._random.permutation(DATA_BLOCKS)
        self._free = iter(order.tolist())
        self._devices: list[int] = []
        self._next_device = 1
        self.store = MemoryStore(METADATA_BLOCKS)
        format_pool(self.store, data_block_sectors=DATA_BLOCK_SECTORS, data_blocks=DATA_BLOCKS)
        self._pool = PoolMetadata.open(self.store)

    def images(self) -> Iterator[bytes]:
        """The metadata after each commit."""
        for _ in range(COMMITS):
            self._change(str(self._random.choice(CHANGES)))
            self._pool.commit()
            yield bytes(self.store.image)

    def _change(self, change: str) -> None:
        pool, random = self._pool, self._random
        if not self._devices or (change == "create" and len(self._devices) < DEVICES_MAX):
            pool.create_device(self._numbered())
            self._write(random.choice(20_000, int(random.integers(50, 3_000)), replace=False))
        elif change == "snapshot" and self._snapshots and len(self._devices) < DEVICES_MAX:
            origin = self._any()
            pool.create_snapshot(self._numbered(), origin)
        elif change == "delete" and len(self._devices) > 2:
            device = self._any()
            self._devices.remove(device)
            pool.delete_device(device)
            pool.set_transaction_id(pool.transaction_id + 1)
        elif change == "discard":
            begin = int(random.integers(0, 18_000))
            pool.remove(self._any(), begin, begin + int(random.integers(10, 3_000)))
        elif change == "overwrite":
            device = self._any()
            keys = [keys for keys, _ in pool.mappings(device)]
            self._write(np.concatenate(keys)[:200] if keys else np.arange(3), device)
        else:
            begin = int(random.integers(0, 18_000))
            self._write(random.integers(begin, begin + 2_000, int(random.integers(1, 300))), self._any())

    def _numbered(self) -> int:
        device = self._next_device
        self._next_device += 1
        self._devices.append(device)
        self._pool.set_transaction_id(self._pool.transaction_id + 1)
        return device

    def _any(self) -> int:
        return int(self._random.choice(self._devices))

    def _write(self, keys: np.ndarray, device: int | None = None) -> None:
        keys = np.unique(keys).astype(np.uint64)
        values = np.array([next(self._free) << 24 | self._pool.time for _ in keys], np.uint64)
        self._pool.insert(self._devices[-1] if device is None else device, keys, values)


def choices(seed: int) -> list[Choice]:
    """What repair makes of each commit of one history; the seed tells of which kind it is."""
    snapshots, upwards = bool(seed & 1), not seed & 2
    history = History(seed, snapshots=snapshots, upwards=upwards)
    found = []
    for number, image in enumerate(history.images()):
        if number < FIRST_JUDGED:
            continue
        before = contents(MemoryStore(image))
        source, target = MemoryStore(bytes(BLOCK_BYTES) + image[BLOCK_BYTES:]), MemoryStore(METADATA_BLOCKS)
        repair(source, target, Known(DATA_BLOCK_SECTORS, DATA_BLOCKS))
        after = contents(target)
        last = find_last_commit(source)
        returned = sum(after.get(device) == mappings for device, mappings in before.items())
        counts = len(before), returned, last.proven and bool(last.whole), not last.whole
        found.append(Choice(seed, number, snapshots, upwards, *counts))
    return found

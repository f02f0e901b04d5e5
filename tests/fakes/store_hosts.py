"""A host of the rounds in `store_rounds.py`: a pool with one device that changes, and the commands it runs.

In: writing, snapshotting, what each snapshot holds, commands as processes with a cache and a clock of their own. Out:
which commands run beside each other, kills, judging (`store_rounds.py`).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.store.keys import CHUNK_BYTES

ROOT = Path(__file__).resolve().parents[2]
DEVICE_BYTES = 66 << 20  # two segments
# Few contents: what goes with a snapshot comes back with another one, on both hosts.
CONTENTS = [bytes(CHUNK_BYTES)] + [random.Random(number).randbytes(CHUNK_BYTES) for number in range(1, 160)]
POSITIONS = [*range(90), *range(980, 1056)]

# What a device holds: the number of a content by the number of a chunk; 0 are allocated zeros, an absent one is a hole.
Contents = dict[int, int]


class Host:
    """One host. `skew_seconds` is how wrong its clock is."""

    def __init__(self, work: Path, name: str, skew_seconds: float) -> None:
        self.name = name
        self._pool = work / name
        self._cache = work / f"{name}-cache"
        self._skew = skew_seconds
        self._holds: Contents = {}
        self._snapshots: list[str] = []
        create_pool(self._pool, size_bytes=128 << 20, metadata_bytes=4 << 20)

    @property
    def pool(self) -> Path:
        """The directory of its pool."""
        return self._pool

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        """Start a `thinpool` command here."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.skewed_host", str(self._skew), *map(str, words)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self._cache)},
        )

    def _opened(self) -> Pool:
        return open_pool(PoolLocation.directory(self._pool))

    def change(self, chance: random.Random, name: str) -> Contents:
        """Write, discard, snapshot as `name`; older snapshots go at times, bases of increments among them."""
        pool = self._opened()
        try:
            if not self._snapshots:
                pool.create_device("disk", DEVICE_BYTES)
            entry = pool.catalog.by_name("disk")
            assert entry is not None
            session = pool.open_session(entry)
            for position in chance.sample(POSITIONS, chance.randrange(4, 40)):
                content = chance.randrange(len(CONTENTS))
                session.enter()
                session.write(position * CHUNK_BYTES, memoryview(CONTENTS[content]))
                session.leave()
                session.sent()
                self._holds[position] = content
            if chance.random() < 0.3:
                first = chance.choice(POSITIONS)
                session.zero(first * CHUNK_BYTES, 20 * CHUNK_BYTES, keep_allocated=False, fast_only=False)
                for position in range(first, first + 20):
                    self._holds.pop(position, None)
            session.close()
            pool.create_snapshot("disk", name, read_only=True)
            self._snapshots.append(name)
            while len(self._snapshots) > (1 if chance.random() < 0.2 else 4):
                pool.delete(self._snapshots.pop(0))
        finally:
            pool.close()
        return dict(self._holds)

    def take(self, name: str) -> tuple[bytes, int]:
        """Content of a device that was pulled, and the bytes mapped in it; the device is deleted."""
        pool = self._opened()
        try:
            entry = pool.catalog.by_name(name)
            assert entry is not None, f"{name} was pulled and is not there"
            assert entry.receiving is None, f"{name} was pulled and is not complete"
            session = pool.open_session(entry)
            content = bytes(session.read_bytes(0, DEVICE_BYTES))
            session.close()
            mapped = pool.info(name).mapped_bytes
            pool.delete(name)
        finally:
            pool.close()
        return content, mapped


def bytes_of(contents: Contents) -> bytes:
    """The device."""
    device = bytearray(DEVICE_BYTES)
    for position, content in contents.items():
        device[position * CHUNK_BYTES : (position + 1) * CHUNK_BYTES] = CONTENTS[content]
    return bytes(device)

"""What it costs to find out what changed: few blocks among many mapped ones, beside thin_delta on the same metadata.

Metadata blocks read are counted at the block store for ours. thin_delta reads with O_DIRECT, so the kernel's count of
blocks it read from the disk is what it read; on a file system without direct reads that count is no use and left out.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metadata import FileStore, PoolMetadata
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

from .mappings import BLOCK_BYTES, map_blocks
from .report import table

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = 1, 2
ROUNDS = 3


class CountingStore(FileStore):
    """A block store that counts the blocks read through it."""

    blocks_read = 0

    def read(self, first: int, count: int) -> bytes:
        self.blocks_read += count
        return super().read(first, count)


@dataclass(frozen=True, slots=True)
class Figures:
    """One number of changed blocks: our walk alone, our command, thin_delta (None where it is missing)."""

    changed: int
    walk_seconds: float
    blocks_read: int
    command_seconds: float
    delta_seconds: float | None
    delta_blocks: int | None


def make(work: Path, mapped_blocks: int) -> Path:
    """A pool whose first device has that many mappings, and a snapshot of it."""
    pool = work / "pool"
    create_pool(
        pool,
        size_bytes=(2 * mapped_blocks + 1024) * BLOCK_BYTES,
        metadata_bytes=max(64 << 20, 160 * mapped_blocks),
    )
    opened = open_pool(PoolLocation.directory(pool))
    opened.create_device("big", mapped_blocks * BLOCK_BYTES)
    opened.close()
    map_blocks(pool, mapped_blocks)
    return pool


def change(metadata_path: Path, mapped_blocks: int, changed: int) -> None:
    """Snapshot the device and give blocks spread over the snapshot new places, in the metadata only."""
    metadata = PoolMetadata.open(FileStore(metadata_path, writable=True))
    metadata.create_snapshot(NEW, OLD)
    step = mapped_blocks // changed
    keys = (np.arange(changed, dtype=np.uint64) * np.uint64(step)) + np.uint64(step // 2)
    blocks = np.arange(mapped_blocks, mapped_blocks + changed, dtype=np.uint64)
    metadata.insert(NEW, keys, (blocks << np.uint64(24)) | np.uint64(metadata.time))
    metadata.commit()
    metadata.close()


def walk(metadata_path: Path) -> tuple[float, int, int]:
    """Seconds and blocks read of one comparison, pool opened before; and how many blocks it found."""
    store = CountingStore(metadata_path, writable=False)
    metadata = PoolMetadata.open(store, writable=False)
    before, begun = store.blocks_read, time.perf_counter()
    found = sum(len(batch.keys) for batch in metadata.differences(OLD, NEW))
    seconds = time.perf_counter() - begun
    blocks = store.blocks_read - before
    metadata.close()
    return seconds, blocks, found


def timed(*command: str) -> tuple[float, int]:
    """Seconds of a command, and how many blocks of 4096 bytes it read from the disk."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock
    begun = time.perf_counter()
    subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.perf_counter() - begun
    return seconds, (resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock - before) // 8


def measure(pool: Path, mapped_blocks: int, changed: int) -> Figures:
    """Medians of some rounds, ours and thin_delta's in turn."""
    path = pool.parent / f"metadata-{changed}"
    subprocess.run(["cp", "--sparse=always", str(pool / "metadata"), str(path)], check=True)
    change(path, mapped_blocks, changed)
    ours = [sys.executable, "-m", "thinpool", "diff", "--metadata", str(path), f"thin-{OLD}", f"thin-{NEW}"]
    tool = shutil.which("thin_delta")
    walks, commands, deltas = [], [], []
    for _ in range(ROUNDS):
        walks.append(walk(path))
        commands.append(timed(*ours)[0])
        if tool:
            deltas.append(timed(tool, "--thin1", str(OLD), "--thin2", str(NEW), str(path)))
    path.unlink()
    assert {found for _, _, found in walks} == {changed}
    return Figures(
        changed,
        statistics.median(seconds for seconds, _, _ in walks),
        walks[0][1],
        statistics.median(commands),
        statistics.median(seconds for seconds, _ in deltas) if deltas else None,
        int(statistics.median(blocks for _, blocks in deltas)) or None if deltas else None,
    )


def run(work: Path, *, mapped_blocks: int) -> list[str]:
    """Measure one, a thousand and a hundred thousand changed blocks; return the Markdown of the report."""
    pool = make(work, mapped_blocks)
    rows = []
    for changed in (1, 1000, 100_000):
        if changed > mapped_blocks:
            continue
        found = measure(pool, mapped_blocks, changed)
        rows.append(
            [
                f"{found.changed:,}",
                f"{found.walk_seconds * 1e3:.1f} ms",
                f"{found.blocks_read:,}",
                f"{found.command_seconds:.2f} s",
                "missing" if found.delta_seconds is None else f"{found.delta_seconds:.2f} s",
                "not known" if found.delta_blocks is None else f"{found.delta_blocks:,}",
            ]
        )
    head = ["changed", "our walk", "metadata blocks read", "thinpool diff", "thin_delta", "blocks it read"]
    return [
        f"A device with {mapped_blocks:,} mapped blocks ({mapped_blocks * BLOCK_BYTES / 2**30:,.0f} GiB) and a "
        "snapshot in which blocks spread evenly over the device were mapped anew. `our walk` is the comparison alone, "
        "in a pool that is open, with nothing of the trees in memory; `thinpool diff` is the whole command, with the "
        f"start of Python and the opening of the pool. Medians of {ROUNDS} rounds.",
        "",
        *table(head, rows),
    ]

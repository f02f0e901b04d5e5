"""What a snapshot costs: of a device with a million mapped blocks, and of the thousandth beside the first.

Snapshots are taken through the engine's own interface, in this process: the command line would add the start of an
interpreter to each, and the control API a round trip. Metadata blocks written are counted at the block store.
"""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from metadata import FileStore, PoolMetadata
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

from .mappings import BLOCK_BYTES, map_blocks

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class SnapshotFigures:
    """Seconds of each snapshot in order, and metadata blocks written by each."""

    mapped_blocks: int
    seconds: list[float]
    blocks_written: list[int]

    def lines(self) -> list[str]:
        """Return the Markdown of the report."""
        tenth = max(len(self.seconds) // 10, 1)
        first, last = statistics.median(self.seconds[:tenth]), statistics.median(self.seconds[-tenth:])
        early, late = (
            statistics.median(self.blocks_written[:tenth]),
            statistics.median(self.blocks_written[-tenth:]),
        )
        return [
            f"A device with {self.mapped_blocks:,} mapped blocks ({self.mapped_blocks * BLOCK_BYTES / 2**30:.0f} GiB), "
            f"{len(self.seconds):,} snapshots of it, each durable before the next begins:",
            "",
            "| | time | metadata blocks written |",
            "|---|---:|---:|",
            f"| first snapshot | {self.seconds[0] * 1e3:.1f} ms | {self.blocks_written[0]} |",
            f"| last snapshot | {self.seconds[-1] * 1e3:.1f} ms | {self.blocks_written[-1]} |",
            f"| median of the first {tenth} | {first * 1e3:.1f} ms | {early:g} |",
            f"| median of the last {tenth} | {last * 1e3:.1f} ms | {late:g} |",
            f"| last over first (medians) | {last / first:.2f} | |",
        ]


class CountingStore(FileStore):
    """A block store that counts the blocks written through it."""

    written = 0

    def write(self, first: int, data: bytes | bytearray | memoryview) -> None:
        self.written += memoryview(data).nbytes // 4096
        super().write(first, data)


def measure_metadata(pool: Path, count: int) -> tuple[list[float], list[int]]:
    """Take snapshots at the metadata layer alone; each is committed. Returns seconds and blocks written."""
    store = CountingStore(pool / "metadata", writable=True)
    metadata = PoolMetadata.open(store)
    seconds, blocks = [], []
    origin = metadata.devices()[0].device_id
    for number in range(count):
        before, begun = store.written, time.perf_counter()
        metadata.create_snapshot(100_000 + number, origin)
        metadata.commit()
        seconds.append(time.perf_counter() - begun)
        blocks.append(store.written - before)
    metadata.close()
    return seconds, blocks


def measure_engine(pool: Path, count: int) -> list[float]:
    """Take named snapshots of an open pool, as the server does. Returns seconds."""
    opened = open_pool(PoolLocation.directory(pool))
    try:
        seconds = []
        for number in range(count):
            begun = time.perf_counter()
            opened.create_snapshot("big", f"snap-{number}", read_only=True)
            seconds.append(time.perf_counter() - begun)
    finally:
        opened.close()
    return seconds


def run(work: Path, *, mapped_blocks: int, count: int) -> list[str]:
    """Make the pool, measure both layers, return the Markdown of the report."""
    pool = work / "pool"
    create_pool(pool, size_bytes=(mapped_blocks + 1024) * BLOCK_BYTES, metadata_bytes=512 * MIB)
    opened = open_pool(PoolLocation.directory(pool))
    opened.create_device("big", mapped_blocks * BLOCK_BYTES)
    opened.close()
    mapping_seconds = map_blocks(pool, mapped_blocks)
    copy = work / "copy"
    copy.mkdir()
    shutil.copyfile(pool / "metadata", copy / "metadata")
    seconds, blocks = measure_metadata(copy, count)
    lines = ["## Metadata alone (create, commit, two flushes)", ""]
    lines += SnapshotFigures(mapped_blocks, seconds, blocks).lines()
    engine = measure_engine(pool, count)
    tenth = max(count // 10, 1)
    first, last = statistics.median(engine[:tenth]), statistics.median(engine[-tenth:])
    lines += ["", "## Named, through the engine (catalogue and metadata, both durable)", ""]
    lines += [
        f"- first {engine[0] * 1e3:.1f} ms, last {engine[-1] * 1e3:.1f} ms",
        f"- median of the first {tenth}: {first * 1e3:.1f} ms, of the last {tenth}: {last * 1e3:.1f} ms; "
        f"last over first {last / first:.2f}",
        "",
        f"Mapping the {mapped_blocks:,} blocks (bulk insert and commit) took {mapping_seconds:.2f} s.",
        "",
    ]
    return lines

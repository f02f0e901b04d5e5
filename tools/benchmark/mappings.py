"""Pools with very many mappings: how they are made, how long one takes to open, and the memory it takes to serve."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from disk_client import DiskClient

from metadata import FileStore, PoolMetadata

from .own_server import OwnServer
from .report import table

BLOCK_BYTES = 64 << 10
BATCH = 1 << 20
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class OpenFigures:
    """One pool: how long until it answers, the first read, and anonymous memory before and after touching it all."""

    mapped_blocks: int
    ready_seconds: float
    first_read_seconds: float
    walk_seconds: float
    idle_bytes: int
    touched_bytes: int


def map_blocks(pool: Path, count: int) -> float:
    """Map ``count`` blocks of the pool's first device, in the metadata only; return the seconds it took.

    The data file stays sparse. Mappings are scattered over it, so that nothing can be merged into runs.
    """
    metadata = PoolMetadata.open(FileStore(pool / "metadata", writable=True))
    device = metadata.devices()[0].device_id
    begun = time.perf_counter()
    for first in range(0, count, BATCH):
        keys = np.arange(first, min(first + BATCH, count), dtype=np.uint64)
        # Neighbours swapped: block n lies at n ^ 1, so no two of them follow each other. An odd tail stays in place.
        blocks = np.where((keys ^ np.uint64(1)) < np.uint64(count), keys ^ np.uint64(1), keys)
        metadata.insert(device, keys, blocks << np.uint64(24))
    metadata.commit()
    seconds = time.perf_counter() - begun
    metadata.close()
    return seconds


def measure_open(work: Path, mapped_blocks: int) -> OpenFigures:
    """Serve a pool with that many mappings and look at it from outside."""
    server = OwnServer(work, mapped_blocks * BLOCK_BYTES)
    try:
        size = (mapped_blocks + 1024) * BLOCK_BYTES
        server.thinpool("init", str(server.pool), "--size", str(size), "--metadata-size", "2G")
        server.create("big")
        map_blocks(server.pool, mapped_blocks)
        begun = time.perf_counter()
        server.serve()
        ready = time.perf_counter() - begun
        idle = server.usage().anonymous_bytes
        with DiskClient(server.socket, "big") as disk:
            begun = time.perf_counter()
            disk.read(mapped_blocks // 2 * BLOCK_BYTES, 4096)
            first_read = time.perf_counter() - begun
            begun = time.perf_counter()
            # One request in each leaf of the tree touches every mapping. CACHE and not READ: a read of a hole through
            # a memory map makes the kernel fill its page cache with zeros as far as it reads ahead.
            for block in range(0, mapped_blocks, 64):
                disk.cache(block * BLOCK_BYTES, 512)
            walk = time.perf_counter() - begun
        return OpenFigures(mapped_blocks, ready, first_read, walk, idle, server.usage().anonymous_bytes)
    finally:
        server.close()


def lines(figures: list[OpenFigures]) -> list[str]:
    """Return the Markdown of the report."""
    rows = [
        [
            f"{found.mapped_blocks:,}",
            f"{found.ready_seconds:.2f} s",
            f"{found.first_read_seconds * 1e3:.1f} ms",
            f"{found.walk_seconds:.2f} s",
            f"{found.idle_bytes / MIB:.1f} MiB",
            f"{found.touched_bytes / MIB:.1f} MiB",
            f"{(found.touched_bytes - found.idle_bytes) / found.mapped_blocks:.1f}",
        ]
        for found in figures
    ]
    head = [
        "mapped blocks",
        "start to answering",
        "first read",
        "all leaves touched",
        "memory before",
        "after",
        "bytes a mapping",
    ]
    return table(head, rows)


def run(work: Path, counts: list[int]) -> list[str]:
    """Measure pools of all given sizes; failures are reported in place."""
    found, failed = [], []
    for count in counts:
        try:
            found.append(measure_open(work / f"open-{count}", count))
        except (OSError, subprocess.SubprocessError) as error:
            failed.append(f"- {count:,} mappings: {error}")
    return ["## Opening large pools", "", *lines(found), "", *failed]

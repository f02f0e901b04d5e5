"""Speed of check, dump and restore beside Debian's thin_check, thin_dump and thin_restore, on the same metadata.

In: metadata with many mappings shared among many devices, the six programs alternated as processes. Out: the report's
frame (`__main__.py`). What is restored is what was dumped; the restored metadata must dump to the same text.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metadata import FileStore, PoolMetadata, format_pool

from .report import table

DEVICES = 20
ORIGINS = 5
RUN_BLOCKS = 4
CHANGED_SHARE = 50
BATCH = 1 << 18
METADATA_BYTES = 1 << 30


def make(path: Path, mappings: int) -> int:
    """Make metadata: five origins with three snapshots each, changed in a fiftieth; how many mappings there are.

    Mappings come in runs of four blocks, the runs are scattered over the data.
    """
    with path.open("wb") as file:
        file.truncate(METADATA_BYTES)
    store = FileStore(path, writable=True)
    each = mappings // DEVICES // RUN_BLOCKS * RUN_BLOCKS
    changed = each // CHANGED_SHARE // RUN_BLOCKS * RUN_BLOCKS
    data_blocks = ORIGINS * each + DEVICES * changed
    format_pool(store, data_block_sectors=128, data_blocks=data_blocks)
    pool = PoolMetadata.open(store)
    random = np.random.default_rng(1)
    runs = random.permutation(data_blocks // RUN_BLOCKS).astype(np.uint64) * np.uint64(RUN_BLOCKS)
    taken = 0

    def write(device: int, first: int, count: int) -> None:
        nonlocal taken
        for begin in range(first, first + count, BATCH):
            keys = np.arange(begin, min(begin + BATCH, first + count), dtype=np.uint64)
            starts = runs[taken : taken + len(keys) // RUN_BLOCKS]
            taken += len(starts)
            blocks = np.repeat(starts, RUN_BLOCKS) + keys % np.uint64(RUN_BLOCKS)
            pool.insert(device, keys, blocks << np.uint64(24) | np.uint64(pool.time))
            pool.commit()

    for origin in range(ORIGINS):
        pool.create_device(origin)
        write(origin, 0, each)
    for number in range(ORIGINS, DEVICES):
        origin = number % ORIGINS
        pool.create_snapshot(number, origin)
        start = int(random.integers(0, (each - changed) // RUN_BLOCKS)) * RUN_BLOCKS
        write(number, start, changed)
    total = sum(record.mapped_blocks for record in pool.devices())
    pool.close()
    return total


@dataclass(frozen=True, slots=True)
class Spent:
    """What one run of a program took: from start to end, and of processors."""

    wall_seconds: float
    processor_seconds: float


def timed(command: list[str]) -> Spent:
    """Run a program to its end. Raises CalledProcessError."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True
    )
    wall = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Spent(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def run(
    work: Path, *, mappings: int, rounds: int, chosen: Sequence[str], say: Callable[[str], None] = print
) -> list[str]:
    """Measure the `chosen` of check, dump and restore; the lines of the report."""
    image, text, target = work / "metadata", work / "dump.xml", work / "restored"
    total = make(image, mappings)
    own = [sys.executable, "-m", "thinpool"]
    subprocess.run(["thin_dump", str(image), "-o", str(text)], check=True)

    def fresh() -> None:
        with target.open("wb") as file:
            file.truncate(METADATA_BYTES)

    ours, theirs = work / "ours.xml", work / "theirs.xml"
    jobs = {
        "check": ([*own, "check", str(image)], ["thin_check", str(image)]),
        "dump": ([*own, "dump", str(image), "-o", str(ours)], ["thin_dump", str(image), "-o", str(theirs)]),
        "restore": (
            [*own, "restore", "-q", "-i", str(text), "-o", str(target)],
            ["thin_restore", "-i", str(text), "-o", str(target)],
        ),
    }
    rows = []
    for name, commands in [(name, jobs[name]) for name in chosen or jobs]:
        spent: tuple[list[Spent], list[Spent]] = ([], [])
        for _ in range(rounds):
            for mine, command in zip(spent, commands, strict=True):
                fresh()
                mine.append(timed(command))
                program = "thinpool" if command[0] == sys.executable else command[0]
                say(
                    f"{name}, {program}: {mine[-1].wall_seconds:.2f} s, {mine[-1].processor_seconds:.2f} s of CPU"
                )
        rows.append(_row(name, *spent))
    same = _agree(ours, theirs, target, text)
    shutil.rmtree(work, ignore_errors=True)
    head = ["", "thinpool", "range", "CPU", "Debian's tool", "range", "CPU", "times as fast", "by CPU"]
    return [
        f"{total:,} mappings in {DEVICES} devices ({ORIGINS} origins, snapshots that share all but a fiftieth), in",
        f"runs of {RUN_BLOCKS} blocks; whole processes, start included, alternated in {rounds} rounds, medians.",
        "thin_restore writes every device out in full, thinpool shares leaves again.",
        "",
        *table(head, rows),
        "",
        *same,
    ]


def _row(name: str, ours: Sequence[Spent], theirs: Sequence[Spent]) -> list[str]:
    cells, medians = [], []
    for spent in (ours, theirs):
        walls = [each.wall_seconds for each in spent]
        median = statistics.median(walls), statistics.median(each.processor_seconds for each in spent)
        medians.append(median)
        cells += [f"{median[0]:.2f} s", f"{min(walls):.2f}-{max(walls):.2f}", f"{median[1]:.2f} s"]
    ratios = [f"{other / mine:.2f}" for mine, other in zip(*medians, strict=True)]
    return [name, *cells, *ratios]


def _agree(ours: Path, theirs: Path, restored: Path, text: Path) -> list[str]:
    """What was compared beside the time."""
    lines = []
    if ours.exists():
        same = ours.read_bytes() == theirs.read_bytes()
        lines.append(f"The two dumps are {'byte for byte the same' if same else 'DIFFERENT'}.")
    if restored.exists() and restored.stat().st_blocks:
        done = subprocess.run(["thin_dump", str(restored)], stdout=subprocess.PIPE, check=True)
        same = done.stdout == text.read_bytes()
        lines.append(f"What was restored last dumps to {'the same text' if same else 'ANOTHER text'}.")
    return lines

"""The same work done by the kernel's dm-thin and by us, with what each wrote, read and flushed for it.

In: the phases, counting below both: QEMU's figures of the two disks, and ours at the system calls. Out: which figures
are fine (the test). Counted and not timed: the guest's processor is emulated.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from metadata import FileStore
from tests.guest.exchange_model import (
    Create,
    Discard,
    Model,
    Snapshot,
    Step,
    Write,
    do_ourselves,
    kernel_lines,
)
from tests.guest.kernel_pool import KernelPool
from tests.guest.machine import Machine
from tests.guest.own_pool import OwnPool, make_pool, opened
from thinpool import opening
from thinpool.data_file import Buffer, DataFile

BLOCK_BYTES = 65536
DEVICE_BYTES = 16 << 20
POOL_BYTES = 48 << 20
METADATA_BLOCK_BYTES = 4096
FILLED_BLOCKS = 128
WRITES = 64
DISCARDS = 32
SNAPSHOTS = 100


@dataclass(slots=True)
class Work:
    """What one side did in one phase."""

    metadata_blocks_written: int = 0
    metadata_flushes: int = 0
    data_bytes_written: int = 0
    data_bytes_read: int = 0
    data_flushes: int = 0

    def since(self, before: Work) -> Work:
        return Work(*(getattr(self, name) - getattr(before, name) for name in self.__slots__))


def phases() -> dict[str, list[Step]]:
    """The work, by name. Each phase ends with a flush."""
    blocks = random.Random(8).sample(range(FILLED_BLOCKS), WRITES + DISCARDS)
    written, discarded = blocks[:WRITES], blocks[WRITES:]
    return {
        "sequential fill, 128 blocks": [
            Write(1, n * BLOCK_BYTES, 0, BLOCK_BYTES) for n in range(FILLED_BLOCKS)
        ],
        "64 random 4 KiB writes after a snapshot": [
            Snapshot(2, 1),
            *(Write(1, n * BLOCK_BYTES + 4096, n * 4096, 4096) for n in written),
        ],
        "32 discards of a block": [Discard(1, n * BLOCK_BYTES, BLOCK_BYTES) for n in discarded],
        "100 snapshots": [Snapshot(number, 1) for number in range(3, 3 + SNAPSHOTS)],
    }


def model() -> Model:
    return Model(DEVICE_BYTES, BLOCK_BYTES, random.Random(9).randbytes(1 << 20))


def work_of_the_kernel(guest: Machine, directory: Path) -> dict[str, Work]:
    """Do it with dm-thin, on disks whose use QEMU counts."""
    location = make_pool(directory, size_bytes=POOL_BYTES)
    kernel, counted = KernelPool(guest, location.metadata_path, location.data_path), model()
    (guest.share / "payload").write_bytes(counted.payload)
    kernel.activate()
    kernel.run(*kernel_lines(kernel, [Create(1)], counted), "sync /dev/mapper/thin-1")
    found = {}
    for name, steps in phases().items():
        before = _disks(guest)
        lines = [line for step in steps for line in _lines(kernel, step, counted)]
        kernel.run(*lines, "sync /dev/mapper/thin-1", seconds=400)
        found[name] = _disks(guest).since(before)
    kernel.deactivate()
    return found


def _lines(kernel: KernelPool, step: Step, counted: Model) -> list[str]:
    """One request for one step, as with us; and no nodes for the snapshots, since nobody looks into them."""
    if isinstance(step, Snapshot):
        return [kernel.snapshot(step.device_id, step.origin_id)]
    if isinstance(step, Write):
        assert step.source % step.length == step.offset % step.length == 0
        return [
            f"busybox dd if=/run/guest/payload of=/dev/mapper/thin-{step.device_id} bs={step.length} count=1 "
            f"skip={step.source // step.length} seek={step.offset // step.length} oflag=direct conv=notrunc 2>/dev/null"
        ]
    return kernel_lines(kernel, [step], counted)


def _disks(guest: Machine) -> Work:
    metadata, data = guest.work_of("metadata"), guest.work_of("data")
    return Work(
        metadata.written_bytes // METADATA_BLOCK_BYTES,
        metadata.flushes,
        data.written_bytes,
        data.read_bytes,
        data.flushes,
    )


def work_of_ours(directory: Path) -> dict[str, Work]:
    """Do it with our engine, counting at the system calls."""
    location, counted, found = make_pool(directory, size_bytes=POOL_BYTES), model(), {}
    with _counting() as so_far, opened(location) as pool:
        # The kernel also commits by itself, every second of its slow clock; that is no part of the comparison.
        pool.pool.engine.committer.start = lambda: None  # type: ignore[method-assign]
        do_ourselves(pool, [Create(1)], counted)
        for name, steps in phases().items():
            before = replace(so_far)
            do_ourselves(pool, _numbered(pool, steps), counted)
            pool.pool.commit()
            found[name] = so_far.since(before)
    return found


def _numbered(pool: OwnPool, steps: Sequence[Step]) -> Sequence[Step]:
    """Our ids are given in order; the phases count on that."""
    first = next((step.device_id for step in steps if isinstance(step, Snapshot)), None)
    assert first is None or first == max(pool.ids()) + 1
    return steps


@contextmanager
def _counting() -> Iterator[Work]:
    work = Work()

    class Store(FileStore):
        def write(self, first: int, data: bytes) -> None:
            work.metadata_blocks_written += len(data) // METADATA_BLOCK_BYTES
            super().write(first, data)

        def flush(self) -> None:
            work.metadata_flushes += 1
            super().flush()

    class Data(DataFile):
        def __init__(self, path: Path, *, block_bytes: int, blocks: int, writable: bool) -> None:
            super().__init__(path, block_bytes=block_bytes, blocks=blocks, writable=writable)
            write, self._copies = self.pwrite, False  # a copy is counted as what it reads and writes

            def counted(data: Buffer, offset: int) -> int:
                work.data_bytes_written += len(data)
                return write(data, offset)

            self.pwrite = counted

        def read(self, offset: int, length_bytes: int) -> bytearray:
            work.data_bytes_read += length_bytes
            return super().read(offset, length_bytes)

        def flush(self) -> None:
            work.data_flushes += 1
            super().flush()

    with mock.patch.multiple(opening, FileStore=Store, DataFile=Data):
        yield work


def table(kernel: dict[str, Work], ours: dict[str, Work]) -> str:
    """Both side by side, for the documentation."""
    lines = [
        "| phase | | metadata blocks written | metadata flushes | data written | data read | data flushes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, theirs in kernel.items():
        for who, work in (("kernel", theirs), ("thinpool", ours[name])):
            written, read = (f"{n // 1024} KiB" for n in (work.data_bytes_written, work.data_bytes_read))
            figures = (work.metadata_blocks_written, work.metadata_flushes, written, read, work.data_flushes)
            lines.append(f"| {name} | {who} | {' | '.join(str(figure) for figure in figures)} |")
    return "\n".join(lines)

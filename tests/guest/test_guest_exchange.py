"""One pool, worked on in turn by the kernel's dm-thin and by us, compared after each turn with a dictionary of bytes.

After every turn of ours the kernel activates the pool and every device is copied out in full; after every turn of the
kernel's the pool is opened by us, every device read in full. In between the metadata is judged by a recount of both
space maps and by thin_check.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from metadata import FileStore, PoolMetadata
from tests.guest.exchange_model import (
    PAYLOAD_BYTES,
    Create,
    Delete,
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
from tests.guest.own_pool import OwnPool, judge, make_pool, opened

MIB = 1 << 20


class Exchange:
    """The pool, the model, and whose turn it is."""

    def __init__(self, guest: Machine, directory: Path, block_bytes: int, device_bytes: int) -> None:
        self.location = make_pool(directory, size_bytes=64 * MIB, block_bytes=block_bytes)
        self.kernel = KernelPool(
            guest, self.location.metadata_path, self.location.data_path, block_bytes=block_bytes
        )
        payload = random.Random(block_bytes).randbytes(PAYLOAD_BYTES)
        (guest.share / "payload").write_bytes(payload)
        self.model = Model(device_bytes, block_bytes, payload)

    def ours(self, steps: list[Step]) -> None:
        """Our turn; steps are in the model already."""
        with opened(self.location) as pool:
            for device_id in pool.ids():
                pool.resize(device_id, self.model.device_bytes)
            do_ourselves(pool, steps, self.model)
            self._compare_ours(pool)
        with opened(self.location, read_only=True) as pool:
            self._compare_ours(pool)
        judge(self.location)

    def _compare_ours(self, pool: OwnPool) -> None:
        differences = self.model.differences({device_id: pool.read(device_id) for device_id in pool.ids()})
        assert not differences

    def kernels(self, before: list[int], steps: list[Step]) -> None:
        """The kernel's turn: `before` are the devices it finds; steps are in the model already."""
        self.kernel.activate(dict.fromkeys(before, self.model.device_bytes))
        if steps:
            self.kernel.run(*kernel_lines(self.kernel, steps, self.model))
        found = self.kernel.contents(sorted(self.model.contents))
        self.kernel.deactivate(detach=False)
        differences = self.model.differences(found)
        assert not differences
        judge(self.location)


def _prepared(model: Model, steps: list[Step]) -> list[Step]:
    for step in steps:
        model.apply(step)
    return steps


@pytest.mark.parametrize(
    ("block_bytes", "device_bytes"),
    [
        (192 << 10, 12 * MIB),
        pytest.param(64 << 10, 4 * MIB, marks=pytest.mark.deep),  # as in the rounds below
        pytest.param(1 << 20, 8 * MIB, marks=pytest.mark.deep),
    ],
)
def test_the_kernel_reads_what_we_wrote_goes_on_and_gives_it_back(
    guest: Machine, tmp_path: Path, block_bytes: int, device_bytes: int
):
    exchange = Exchange(guest, tmp_path / "pool", block_bytes, device_bytes)
    block, half = block_bytes, block_bytes // 2
    ours = _prepared(
        exchange.model,
        [
            Create(1),
            *(Write(1, index * block, index * 4096, 2 * half) for index in range(6)),
            Create(2),  # stays empty
            Snapshot(3, 1),
            Snapshot(4, 1),
            Snapshot(5, 3),  # blocks counted four times
            Write(1, 4096, 40960, 4096),  # sharing broken by a part of a block
            Write(3, block - 4096, 0, 8192),  # over a border
            Discard(4, half, 3 * block),  # two whole blocks of it
            Write(5, device_bytes - 4096, 8192, 4096),  # the end of the device
            Delete(3),
            Snapshot(6, 5),
        ],
    )
    exchange.ours(ours)
    before = sorted(exchange.model.contents)
    kernels = _prepared(
        exchange.model,
        [
            Write(1, 8192, 0, 4096),
            Write(2, 3 * block + 4096, 4096, block),
            Snapshot(7, 2),
            Write(2, 3 * block + 8192, 65536, 4096),
            Discard(5, 0, 2 * block),
            Delete(4),
            Create(8),
            Write(8, 0, 12288, 4096),
        ],
    )
    exchange.kernels(before, kernels)
    exchange.ours(_prepared(exchange.model, [Write(8, 4096, 0, 4096), Delete(7), Snapshot(9, 8)]))


@pytest.mark.parametrize("rounds", [2, pytest.param(10, marks=pytest.mark.deep)])
def test_rounds_of_random_work_on_both_sides(guest: Machine, tmp_path: Path, rounds: int):
    exchange = Exchange(guest, tmp_path / "pool", 64 << 10, 4 * MIB)
    rng = random.Random(5)
    for _ in range(rounds):
        exchange.ours(exchange.model.random_steps(rng, 30))
        before = sorted(exchange.model.contents)
        exchange.kernels(before, exchange.model.random_steps(rng, 20))
    exchange.ours([])


@pytest.mark.deep  # 16,500 devices, looked at by an emulated machine
def test_more_devices_than_one_bitmap_counts_blocks(guest: Machine, tmp_path: Path):
    """One mapping in each of many devices: more metadata blocks, and data blocks, than one bitmap has entries."""
    devices = 16500
    first, last = b"of the first".ljust(4096), b"of the last".ljust(4096)
    location = make_pool(tmp_path / "pool", size_bytes=(devices + 1000) * 65536, metadata_bytes=128 << 20)
    metadata = PoolMetadata.open(FileStore(location.metadata_path, writable=True))
    for number in range(1, devices + 1):
        metadata.create_device(number)
        keys, values = (np.array([value], dtype=np.uint64) for value in (number % 64, number << 24))
        metadata.insert(number, keys, values)
        if number % 500 == 0:
            metadata.commit()
    assert metadata.metadata_blocks_allocated > 16320
    metadata.close()
    with location.data_path.open("r+b") as file:
        os.pwrite(file.fileno(), first, 1 * 65536)
        os.pwrite(file.fileno(), last, devices * 65536)
    kernel = KernelPool(guest, location.metadata_path, location.data_path)
    kernel.activate({1: 4 * MIB, devices: 4 * MIB})
    at = devices % 64 * 65536
    found = kernel.run(
        "dd if=/dev/mapper/thin-1 bs=64k skip=1 count=1 status=none | head -c 12; echo",
        f"dd if=/dev/mapper/thin-{devices} bs=64k skip={devices % 64} count=1 status=none | head -c 11; echo",
        kernel.snapshot(20000, devices),
        f"echo changed | dd of=/dev/mapper/thin-{devices} bs=4096 seek={at // 4096} conv=sync,notrunc status=none",
        *(kernel.message(f"delete {number}") for number in range(100, 110)),
    )
    assert found.split("\n")[:2] == ["of the first", "of the last"]
    kernel.deactivate()
    judge(location)
    with opened(location) as pool:
        assert len(pool.ids()) == devices + 1 - 10
        assert pool.read(devices)[at:].startswith(b"changed\n")
        assert pool.read(20000)[at:].startswith(last)
        pool.delete(devices)
    judge(location)

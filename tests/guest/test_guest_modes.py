"""Pools that are not in the best of health, on both sides: full, to be checked, with a metadata snapshot, cut off.

Each opens with us in the right mode and with a sentence that says why, and those that we made open with the kernel.
"""

from __future__ import annotations

import errno
import json
import random
import sys
import time
from pathlib import Path

import pytest

from metadata import FileStore, PoolMetadata
from tests.conformance.running_pool import run
from tests.fakes.thin_tools import assert_clean
from tests.guest.kernel_pool import KernelPool
from tests.guest.machine import Machine
from tests.guest.own_pool import judge, make_pool, opened
from thinpool.errors import PoolReadOnly
from thinpool.pool_location import PoolLocation

MIB = 1 << 20
CHECKOUT = Path(__file__).resolve().parents[2]
BLOCK = 65536
DATA_BYTES = 4 * MIB
DEVICE_BYTES = 8 * MIB


class BarePool:
    """Two files for the kernel to make a pool of, and our command on them."""

    def __init__(self, directory: Path, guest: Machine) -> None:
        self.metadata, self.data = directory / "tmeta", directory / "tdata"
        for path, size_bytes in ((self.metadata, 4 * MIB), (self.data, DATA_BYTES)):
            with path.open("wb") as file:
                file.truncate(size_bytes)
        self.location = PoolLocation.bare(self.metadata, self.data)
        self.kernel = KernelPool(guest, self.metadata, self.data)

    def thinpool(self, *words: str) -> tuple[int, str, str]:
        """Status, output and error of a command."""
        options = ("--metadata", str(self.metadata), "--data", str(self.data))
        done = run(sys.executable, "-m", "thinpool", *words, *options, check=False)
        return done.returncode, done.stdout, done.stderr

    def status(self) -> dict[str, object]:
        status, out, err = self.thinpool("status", "--json")
        assert status == 0, err
        return dict(json.loads(out))

    def make(self, *lines: str) -> None:
        """Activate an empty pool with one device, then run lines."""
        self.kernel.activate()
        self.kernel.run(self.kernel.message("create_thin 1"), self.kernel.thin(1, DEVICE_BYTES), *lines)


def mode_of(status_line: str) -> str:
    """The mode field of the kernel's status line of a pool."""
    return status_line.split()[-5]


def test_the_kernel_ran_out_of_data_space(guest: Machine, tmp_path: Path):
    pool = BarePool(tmp_path, guest)
    pool.make(
        "! dd if=/dev/urandom of=/dev/mapper/thin-1 bs=64k count=70 oflag=direct status=none 2>/dev/null"
    )
    assert mode_of(pool.kernel.run("dmsetup status pool")) == "out_of_data_space"
    pool.kernel.deactivate()
    judge(pool.location)
    assert pool.status()["mode"] == "out_of_data_space"
    with opened(pool.location) as ours:
        ours.resize(1, DEVICE_BYTES)
        before = ours.read(1)
        ours.write(1, 5 * BLOCK, b"in place".ljust(512))
        with pytest.raises(OSError) as full:
            ours.write(1, 100 * BLOCK, b"new")
        assert full.value.errno == errno.ENOSPC
        ours.trim(1, 0, 8 * BLOCK)
        ours.pool.commit()
        ours.pool.engine.reclaim()
        ours.write(1, 100 * BLOCK, b"new")
        expected = bytes(8 * BLOCK) + before[8 * BLOCK : 100 * BLOCK] + b"new" + before[100 * BLOCK + 3 :]
        assert ours.read(1) == expected
    assert pool.status()["mode"] == "rw"
    assert mode_of(pool.kernel.activate({1: DEVICE_BYTES})) == "rw"
    assert pool.kernel.contents([1])[1] == expected
    pool.kernel.deactivate()


def test_the_kernel_wants_a_check(guest: Machine, tmp_path: Path):
    """Its metadata device fails all writes but those of the superblock: it gives the transaction up and says so."""
    pool = BarePool(tmp_path, guest)
    pool.kernel.activate()
    pool.kernel.run("dmsetup remove pool")
    sectors = pool.metadata.stat().st_size // 512
    metadata, data = (disk.path for disk in pool.kernel.disks)
    pool.kernel.run(
        f"dmsetup create failing --table '0 {sectors} linear {metadata} 0'",
        f"dmsetup create pool --table '0 {DATA_BYTES // 512} thin-pool /dev/mapper/failing {data} 128 0'",
        pool.kernel.message("create_thin 1"),
        pool.kernel.thin(1, DEVICE_BYTES),
        "dd if=/dev/urandom of=/dev/mapper/thin-1 bs=64k count=4 oflag=direct conv=fsync status=none",
        "modprobe dm-flakey",
        f"printf '0 8 linear {metadata} 0\\n8 {sectors - 8} flakey {metadata} 8 0 60 1 error_writes\\n' "
        "| dmsetup load failing",
        "dmsetup suspend --noflush failing; dmsetup resume failing",
        "! dd if=/dev/urandom of=/dev/mapper/thin-1 bs=64k seek=8 count=4 oflag=direct conv=fsync status=none 2>/dev/null",
    )
    status = pool.kernel.run("dmsetup status pool")
    assert mode_of(status) == "ro"
    assert "needs_check" in status
    pool.kernel.run("dmsetup remove thin-1 pool failing")
    pool.kernel.release()
    assert_needs_check(pool)


def assert_needs_check(pool: BarePool) -> None:
    """We open it for looking only, and say why."""
    status = pool.status()
    assert (status["mode"], status["needs_check"]) == ("read_only", True)
    code, _, err = pool.thinpool("create", "another", "--size", "1M")
    assert code != 0
    assert "check" in err
    with opened(pool.location) as ours:
        assert len(ours.read(1)) >= 4 * BLOCK
        with pytest.raises(PoolReadOnly):
            ours.create(MIB)


def test_a_pool_of_ours_that_wants_a_check_is_read_only_there(guest: Machine, tmp_path: Path):
    location = make_pool(tmp_path / "pool", size_bytes=DATA_BYTES)
    with opened(location) as ours:
        assert ours.create(DEVICE_BYTES) == 1
        ours.write(1, 0, b"kept")
    metadata = PoolMetadata.open(FileStore(location.metadata_path, writable=True))
    metadata.set_needs_check(True)
    metadata.commit()
    metadata.close()
    kernel = KernelPool(guest, location.metadata_path, location.data_path)
    status = kernel.activate({1: DEVICE_BYTES})
    assert mode_of(status) == "ro"
    assert "needs_check" in status
    assert kernel.contents([1])[1].startswith(b"kept")
    kernel.deactivate()


def test_a_full_pool_of_ours_is_full_there(guest: Machine, tmp_path: Path):
    location = make_pool(tmp_path / "pool", size_bytes=DATA_BYTES)
    content = random.Random(1).randbytes(DATA_BYTES)
    with opened(location) as ours:
        assert ours.create(DEVICE_BYTES) == 1
        ours.write(1, 0, content)
        assert ours.pool.status().mode == "out_of_data_space"
    kernel = KernelPool(guest, location.metadata_path, location.data_path)
    assert f" {DATA_BYTES // BLOCK}/{DATA_BYTES // BLOCK} " in kernel.activate({1: DEVICE_BYTES})
    status = kernel.run(
        "! dd if=/dev/zero of=/dev/mapper/thin-1 bs=64k seek=100 count=1 oflag=direct status=none 2>/dev/null",
        "dmsetup status pool",
        "blkdiscard -l 65536 /dev/mapper/thin-1",
    )
    assert mode_of(status) == "out_of_data_space"
    assert kernel.contents([1])[1] == bytes(BLOCK) + content[BLOCK:] + bytes(DEVICE_BYTES - DATA_BYTES)
    kernel.deactivate()
    judge(location)
    with opened(location) as ours:
        assert ours.pool.status().mode == "rw"


def test_metadata_snapshots_go_both_ways(guest: Machine, tmp_path: Path):
    pool = BarePool(tmp_path, guest)
    pool.make(
        "dd if=/dev/urandom of=/dev/mapper/thin-1 bs=64k count=4 oflag=direct conv=fsync status=none",
        pool.kernel.message("reserve_metadata_snap"),
    )
    held = int(pool.kernel.run("dmsetup status pool").split()[6])
    pool.kernel.deactivate()
    assert (pool.status()["mode"], pool.status()["held_root"]) == ("rw", held)
    with opened(pool.location) as ours:
        ours.resize(1, DEVICE_BYTES)
        ours.write(1, 20 * BLOCK, b"after it")
        ours.snapshot(1)
    judge(pool.location)
    assert pool.kernel.activate().split()[6] == str(held)
    pool.kernel.run(pool.kernel.message("release_metadata_snap"))
    pool.kernel.deactivate()
    judge(pool.location)
    with opened(pool.location) as ours:
        assert ours.pool.status().held_root == 0
        engine = ours.pool.engine
        with engine.transaction:
            mine = engine.metadata.reserve_metadata_snapshot()
            engine.commit()
        ours.resize(1, DEVICE_BYTES)
        ours.write(1, 30 * BLOCK, b"after ours")
    assert pool.kernel.activate().split()[6] == str(mine)
    dump = pool.kernel.run(f"thin_dump -m {pool.kernel.disks[0].path}")
    assert 'mapped_blocks="5"' in dump  # without what was written after it
    pool.kernel.run(pool.kernel.message("release_metadata_snap"))
    pool.kernel.deactivate()
    judge(pool.location)


def test_a_machine_that_lost_power_in_the_middle_of_writing(guest: Machine, tmp_path: Path):
    pool = BarePool(tmp_path, guest)
    pool.make("dd if=/dev/zero of=/dev/mapper/thin-1 bs=64k count=8 oflag=direct conv=fsync status=none")
    writer = guest.start(
        """cd /dev/mapper
        number=0
        while true; do
            number=$((number + 1))
            printf %-512d $number | dd of=thin-1 bs=512 seek=$((number * 37 % 60 * 128)) oflag=direct conv=fsync,notrunc status=none
            echo $number
            if [ $((number % 5)) = 0 ]; then
                dmsetup suspend thin-1
                dmsetup message pool 0 "create_snap $((number + 10)) 1"
                dmsetup resume thin-1
            fi
        done"""
    )
    while writer.output().count("\n") < 12:
        assert writer.is_running(), writer.wait()
        time.sleep(0.01)
    guest.power_cut()
    promised = [int(line) for line in writer.output().splitlines()]
    assert_clean(pool.metadata)
    assert pool.status()["mode"] == "rw"
    with opened(pool.location) as ours:
        ours.resize(1, DEVICE_BYTES)
        content = ours.read(1)
        for number in promised:
            at = number * 37 % 60 * BLOCK
            later = {f"{other:<512d}".encode() for other in promised if other * 37 % 60 * BLOCK == at}
            assert content[at : at + 512] in later | {f"{promised[-1] + 1:<512d}".encode()}
        ours.write(1, 0, b"going on")
    judge(pool.location)
    guest.boot()


def test_a_server_of_ours_that_died_in_the_middle_of_writing(guest: Machine, tmp_path: Path):
    """The kernel gets the last commit; what was answered after it is for us only, and void once the kernel wrote."""
    location = make_pool(tmp_path / "pool", size_bytes=DATA_BYTES)
    with opened(location) as ours:
        assert ours.create(DEVICE_BYTES) == 1
        ours.write(1, 0, b"committed")
    script = (
        "import os, sys; from pathlib import Path; from tests.guest.own_pool import opened\n"
        "from thinpool.pool_location import PoolLocation\n"
        "with opened(PoolLocation.directory(Path(sys.argv[1]))) as ours:\n"
        "    ours.pool.engine.committer.start = lambda: None\n"
        "    ours.write(1, 5 * 65536, b'answered')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    died = run(sys.executable, "-c", script, str(tmp_path / "pool"), check=False)
    assert died.returncode == -9, died.stderr
    kernel = KernelPool(guest, location.metadata_path, location.data_path)
    assert mode_of(kernel.activate({1: DEVICE_BYTES})) == "rw"
    content = kernel.contents([1])[1]
    assert content.startswith(b"committed")
    assert not any(content[5 * BLOCK : 6 * BLOCK])
    kernel.run("printf kernel | dd of=/dev/mapper/thin-1 bs=64k seek=6 conv=fsync,notrunc status=none")
    kernel.deactivate()
    with opened(location) as ours:
        content = ours.read(1)
        assert content[6 * BLOCK :].startswith(b"kernel")
        assert not any(content[5 * BLOCK : 6 * BLOCK])
    judge(location)


def test_our_status_lines_are_those_of_dmsetup(guest: Machine, tmp_path: Path):
    pool = BarePool(tmp_path, guest)
    pool.kernel = KernelPool(guest, pool.metadata, pool.data, features=())  # queues, as bare pools of ours do
    pool.make(
        "dd if=/dev/urandom of=/dev/mapper/thin-1 bs=64k seek=3 count=5 oflag=direct conv=fsync status=none",
        pool.kernel.message("create_thin 2"),
        pool.kernel.thin(2, DEVICE_BYTES),
        pool.kernel.snapshot(3, 1),
        pool.kernel.thin(3, DEVICE_BYTES),
        "dd if=/dev/urandom of=/dev/mapper/thin-1 bs=64k seek=20 count=1 oflag=direct conv=fsync status=none",
        pool.kernel.message("set_transaction_id 0 17"),
        pool.kernel.message("reserve_metadata_snap"),
    )
    lines = pool.kernel.run("dmsetup status").splitlines()
    pool.kernel.deactivate()
    names = tmp_path / "names"
    names.write_text("".join(f"{number} thin-{number} {DEVICE_BYTES}\n" for number in (1, 2, 3)))
    status, out, err = pool.thinpool("status", "--dm", "--names", str(names))
    assert status == 0, err
    assert sorted(out.splitlines()) == sorted(line.rstrip() for line in lines)  # the kernel ends with a space


# Without the rest of the program: Python starts slowly in the guest.
LOCK = """import sys, time
from pathlib import Path
from thinpool.pool_location import PoolLocation
from thinpool.pool_lock import PoolLock
lock = PoolLock.acquire(PoolLocation.bare(Path(sys.argv[1]), Path(sys.argv[2])))
print("locked", flush=True)
time.sleep(600)
"""


def test_whoever_has_a_pool_on_block_devices_keeps_the_other_out(guest: Machine, tmp_path: Path):
    pool = BarePool(tmp_path, guest)
    pool.make()
    metadata, data = (disk.path for disk in pool.kernel.disks)
    lock = f"PYTHONPATH={CHECKOUT} {sys.executable} -c '{LOCK}' $(readlink {metadata}) $(readlink {data})"
    refused = guest.run(lock, check=False)
    assert refused.status == 1
    assert "PoolBusy" in refused.err
    guest.run("dmsetup remove thin-1 pool")
    ours = guest.start(lock)
    while "locked" not in ours.output():
        assert ours.is_running(), ours.wait()
        time.sleep(0.05)
    table = f"0 {DATA_BYTES // 512} thin-pool {metadata} {data} 128 0"
    refused = guest.run(f"dmsetup create pool --table '{table}'", check=False)
    assert refused.status != 0
    assert "busy" in refused.err.lower()
    ours.kill()
    ours.wait(check=False)
    assert mode_of(pool.kernel.activate()) == "rw"
    pool.kernel.deactivate()

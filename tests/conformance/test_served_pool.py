"""Served devices under the clients people use, while snapshots come and go every 100 ms.

Each test says what would be seen if it broke: a difference in content, an error from the client, or a snapshot whose
content moves. The default run is short; the deep one (marker) runs long enough to meet rare interleavings.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conformance.running_pool import RunningPool, SnapshotTurnover, fio, require, run, running_pool
from tools.disk_client import DiskClient

pytestmark = [pytest.mark.peer, pytest.mark.timeout(280)]

MIB = 1 << 20
BLOCK = 64 << 10


@pytest.fixture
def pool() -> Iterator[RunningPool]:
    with running_pool("4G") as made:
        yield made


def finish(pool: RunningPool) -> None:
    pool.stop()
    pool.check_metadata()


def write_sample(path: Path, length: int, seed: int = 1) -> None:
    """Write a file with data, holes, and a tail that is no whole block."""
    numbers = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(length)
        for offset in range(0, length, 4 * MIB):
            file.seek(offset)
            file.write(numbers.randbytes(min(MIB + 512, length - offset)))


def content_hash(pool: RunningPool, device: str) -> str:
    """Return the SHA-256 of a whole device."""
    digest = hashlib.sha256()
    with DiskClient(pool.socket, device) as disk:
        for offset in range(0, disk.size_bytes, MIB):
            digest.update(disk.read(offset, min(MIB, disk.size_bytes - offset)))
    return digest.hexdigest()


def test_nbdinfo(pool: RunningPool) -> None:
    require("nbdinfo")
    pool.operate("create", name="a", size_bytes=100 * MIB + 512)
    pool.operate("snapshot", origin="a", name="a-ro", read_only=True)
    info = json.loads(run("nbdinfo", "--json", "--no-content", pool.uri("a")).stdout)
    export = info["exports"][0]
    assert export["export-size"] == 100 * MIB + 512
    assert "base:allocation" in export["contexts"]
    assert export["is_read_only"] is False
    assert export["can_multi_conn"] is True
    assert run("nbdinfo", "--is", "read-only", pool.uri("a-ro"), check=False).returncode == 0
    listing = json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={pool.socket}").stdout)
    assert {entry["export-name"] for entry in listing["exports"]} >= {"a", "a-ro"}
    finish(pool)


def test_nbdinfo_map(pool: RunningPool) -> None:
    require("nbdinfo")
    pool.operate("create", name="a", size_bytes=16 * BLOCK)
    with DiskClient(pool.socket, "a") as disk:
        disk.write(2 * BLOCK, os.urandom(BLOCK))
        disk.write(3 * BLOCK, os.urandom(100))
        disk.write(8 * BLOCK, os.urandom(2 * BLOCK))
        disk.trim(9 * BLOCK, BLOCK)
    extents = json.loads(run("nbdinfo", "--map", "--json", pool.uri("a")).stdout)
    data = [
        (extent["offset"] // BLOCK, extent["length"] // BLOCK) for extent in extents if extent["type"] == 0
    ]
    assert data == [(2, 2), (8, 1)]
    assert sum(extent["length"] for extent in extents) == 16 * BLOCK
    finish(pool)


def test_nbdcopy_both_ways_and_compare(pool: RunningPool) -> None:
    require("nbdcopy", "qemu-img", "cmp")
    length = 150 * MIB + 512
    source, back = pool.work / "source.img", pool.work / "back.img"
    write_sample(source, length)
    pool.operate("create", name="a", size_bytes=length)
    with SnapshotTurnover(pool, "a") as turnover:
        run("nbdcopy", source, pool.uri("a"))
        run("nbdcopy", pool.uri("a"), back)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, pool.uri("a"))
        time.sleep(0.3)
    assert turnover.taken >= 2
    run("cmp", source, back)
    mapped = pool.list()["a"]["mapped_bytes"]
    assert mapped < length, "holes were written as data"
    finish(pool)


def test_qemu_io_patterns(pool: RunningPool) -> None:
    require("qemu-io")
    pool.operate("create", name="a", size_bytes=64 * MIB)
    steps = [
        "write -P 0xa5 0 1M",
        "read -P 0xa5 0 1M",
        "write -P 0x5a 65024 1024",
        "read -P 0xa5 0 65024",
        "read -P 0x5a 65024 1024",
        "write -z 2M 1M",
        "read -P 0 2M 1M",
        "write -P 0x11 5M 1M",
        "write -z -u 5M 512k",
        "read -P 0 5M 512k",
        "read -P 0x11 5632k 512k",
        "write -P 0x22 8M 4M",
        "discard 8M 4M",
        "read -P 0 8M 4M",
        "aio_write -P 0x33 16M 8M",
        "aio_flush",
        "read -P 0x33 16M 8M",
        "write -P 0x44 67108352 512",
        "read -P 0x44 67108352 512",
        "flush",
    ]
    commands = [word for step in steps for word in ("-c", step)]
    with SnapshotTurnover(pool, "a"):
        for _ in range(10):
            done = run("qemu-io", "-f", "raw", *commands, pool.uri("a"))
            assert "verification failed" not in done.stdout + done.stderr
    finish(pool)


RANGES = "--numjobs=4 --offset_increment=128m --randrepeat=0 --group_reporting"
VERIFY = "--verify=crc32c --do_verify=1 --verify_fatal=1"
VERIFIED = (
    f"--name=verified {RANGES} {VERIFY} --size=96m --rw=randwrite --bsrange=4k-128k --iodepth=16 --fsync=64"
)
TRIMS = f"--name=trims {RANGES} --size=96m --rw=randtrimwrite --bs=64k --iodepth=8"
# fio 3.33 asserts on --trim_percentage in a write job, so what was trimmed is written and verified again instead.
VERIFIED_AGAIN = f"--name=verified-again {RANGES} {VERIFY} --size=32m --rw=randwrite --bs=4k --iodepth=32"


def verified_load(pool: RunningPool, seconds: int) -> None:
    """Four jobs, each on its own range: random writes of mixed sizes with trims among them, read back and checked."""
    pool.operate("create", name="a", size_bytes=512 * MIB)
    with SnapshotTurnover(pool, "a") as turnover:
        timed = ["--verify_backlog=256", f"--runtime={seconds}", "--time_based"]
        fio(pool, "a", *VERIFIED.split(), *timed, timeout=seconds + 200)
        timed = [f"--runtime={max(seconds // 2, 2)}", "--time_based"]
        fio(pool, "a", *TRIMS.split(), *timed, timeout=seconds + 200)
        fio(pool, "a", *VERIFIED_AGAIN.split(), timeout=seconds + 200)
    assert turnover.taken >= seconds
    finish(pool)


def test_fio_verify_with_snapshots_every_100_ms(pool: RunningPool) -> None:
    require("fio")
    verified_load(pool, 5)


@pytest.mark.deep
@pytest.mark.timeout(1200)
def test_fio_verify_with_snapshots_every_100_ms_for_long(pool: RunningPool) -> None:
    require("fio")
    verified_load(pool, 120)


def acknowledged_writer(
    pool: RunningPool, device: str, stop: threading.Event, record: dict[int, int]
) -> None:
    """Stamp blocks with a rising number; what is in ``record`` was acknowledged."""
    numbers = random.Random(5)
    with DiskClient(pool.socket, device) as disk:
        stamp = 0
        while not stop.is_set():
            stamp += 1
            block = numbers.randrange(256)
            disk.write(block * BLOCK, stamp.to_bytes(8, "big") * 64)
            record[block] = stamp


def test_acknowledged_writes_are_in_the_snapshot(pool: RunningPool) -> None:
    """Whatever was acknowledged before the snapshot was asked for must be in it, at least as new as it was then."""
    pool.operate("create", name="a", size_bytes=256 * BLOCK)
    stop = threading.Event()
    record: dict[int, int] = {}
    writer = threading.Thread(target=acknowledged_writer, args=(pool, "a", stop, record))
    writer.start()
    try:
        for turn in range(20):
            time.sleep(0.05)
            known = dict(record)
            pool.operate("snapshot", origin="a", name=f"s{turn}", read_only=True)
            with DiskClient(pool.socket, f"s{turn}") as disk:
                for block, stamp in known.items():
                    content = bytes(disk.read(block * BLOCK, 512))
                    assert content[:8] * 64 == content, "a write is torn across a snapshot"
                    assert int.from_bytes(content[:8], "big") >= stamp
    finally:
        stop.set()
        writer.join()
    finish(pool)


def snapshot_stays(pool: RunningPool, seconds: float) -> None:
    pool.operate("create", name="a", size_bytes=128 * MIB)
    with DiskClient(pool.socket, "a") as disk:
        disk.write_many((offset, os.urandom(BLOCK)) for offset in range(0, 128 * MIB, BLOCK))
    timing = (f"--runtime={int(seconds) + 4}", "--time_based", "--randrepeat=0")
    mixed = (
        "--name=load",
        "--numjobs=2",
        "--size=128m",
        "--rw=randrw",
        "--rwmixread=20",
        "--bs=4k",
        "--iodepth=8",
    )
    trimming = ("--name=trims", "--size=128m", "--rw=randtrim", "--bs=64k", "--rate_iops=200")
    with ThreadPoolExecutor(2) as threads:
        loads = [
            threads.submit(fio, pool, "a", *options, *timing, timeout=seconds + 120)
            for options in (mixed, trimming)
        ]
        time.sleep(1)
        pool.operate("snapshot", origin="a", name="kept", read_only=True)
        first = content_hash(pool, "kept")
        time.sleep(seconds)
        assert content_hash(pool, "kept") == first
        assert content_hash(pool, "a") != first, "the load did nothing"
        for load in loads:
            load.result()
    assert content_hash(pool, "kept") == first
    finish(pool)


def test_snapshot_under_load_never_changes(pool: RunningPool) -> None:
    require("fio")
    snapshot_stays(pool, 5)


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_snapshot_under_load_never_changes_in_a_minute(pool: RunningPool) -> None:
    require("fio")
    snapshot_stays(pool, 60)

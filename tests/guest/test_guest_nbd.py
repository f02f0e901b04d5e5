"""The kernel's own NBD client on a served device: file systems, snapshots under them, restarts, block sizes, partitions.

The guest's kernel connects over TCP to `thinpool serve` on the host. What it writes is compared with what it reads back
later, from the device and from snapshots; its own checkers judge the file systems.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.fakes.nbd_server import make_certificates
from tests.guest.machine import HOST, Machine
from tests.guest.served_pool import LOAD_NBD, ServedPool, served_pool

CHECKOUT = Path(__file__).resolve().parents[2]
TREE = CHECKOUT / "metadata"  # a small source tree, seen by the guest under its own path
MAKE = {"ext4": "mkfs.ext4 -q", "xfs": "mkfs.xfs -q"}
CHECK = {"ext4": "e2fsck -fn", "xfs": "xfs_repair -n"}
# Replaying a journal needs a writable device; xfs also refuses a second file system with the same id.
MOUNT_COPY = {"ext4": "mount", "xfs": "mount -o nouuid"}
MIB = 1 << 20


@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=pytest.mark.deep)])
def test_a_file_system_lives_through_snapshots_and_rollback(guest: Machine, kind: str):
    with served_pool() as pool:
        pool.operate("create", name="disk", size_bytes=320 * MIB)
        guest.run(
            f"""{pool.connect("disk")}
            {MAKE[kind]} /dev/nbd0
            mkdir -p /mnt/disk /mnt/copy
            mount /dev/nbd0 /mnt/disk
            cp -r {TREE} /mnt/disk/tree
            dd if=/dev/urandom of=/mnt/disk/large bs=1M count=12 status=none
            sync"""
        )
        _trimmed_space_comes_back(guest, pool)
        # Caught as by a power cut, and a moment later frozen, which flushes everything.
        pool.operate("snapshot", origin="disk", name="crash")
        guest.run("echo later > /mnt/disk/tree/later; fsfreeze -f /mnt/disk")
        pool.operate("snapshot", origin="disk", name="frozen")
        guest.run("fsfreeze -u /mnt/disk; rm /mnt/disk/tree/errors.py; echo lost > /mnt/disk/tree/layout.py")
        for snapshot, later in (("crash", False), ("frozen", True)):
            pool.operate("snapshot", origin=snapshot, name="look")
            found = guest.run(
                f"""{pool.connect("look", "/dev/nbd1")}
                {MOUNT_COPY[kind]} /dev/nbd1 /mnt/copy
                diff -r -x later {TREE} /mnt/copy/tree
                ls /mnt/copy/tree/later 2>/dev/null || true
                umount /mnt/copy
                {CHECK[kind]} /dev/nbd1
                nbd-client -d /dev/nbd1"""
            )
            assert ("/mnt/copy/tree/later" in found.out) == later
            _delete_when_idle(pool, "look")
        guest.run("umount /mnt/disk; nbd-client -d /dev/nbd0")
        _when_idle(pool, "disk")
        pool.operate("rollback", name="disk", snapshot="frozen", keep=False)
        guest.run(
            f"""{pool.connect("disk")}
            mount /dev/nbd0 /mnt/disk
            diff -r -x later {TREE} /mnt/disk/tree
            umount /mnt/disk
            {CHECK[kind]} /dev/nbd0
            nbd-client -d /dev/nbd0"""
        )
        pool.stop()
        pool.check_metadata()


def _trimmed_space_comes_back(guest: Machine, pool: ServedPool) -> None:
    before = pool.status()["data_used_bytes"]
    guest.run("rm /mnt/disk/large; sync; fstrim /mnt/disk; sync")
    deadline = time.monotonic() + 10
    while pool.status()["data_used_bytes"] > before - 11 * MIB:
        assert time.monotonic() < deadline, (before, pool.status())
        time.sleep(0.1)


def _when_idle(pool: ServedPool, device: str) -> None:
    deadline = time.monotonic() + 10
    while pool.list()[device]["open_count"]:
        assert time.monotonic() < deadline, f"{device} is still open"
        time.sleep(0.05)


def _delete_when_idle(pool: ServedPool, device: str) -> None:
    _when_idle(pool, device)
    pool.operate("delete", name=device)


@pytest.mark.deep
def test_four_connections_see_one_device(guest: Machine):
    """Requests of one file go out on all connections; a flush on one covers what was written on the others."""
    with served_pool() as pool:
        pool.operate("create", name="disk", size_bytes=64 * MIB)
        done = guest.run(
            f"""{pool.connect("disk", options="-C 4 -b 512")}
            cat /sys/block/nbd0/size
            fio --name=a --filename=/dev/nbd0 --direct=1 --ioengine=psync --thread --numjobs=4 --size=3M \\
                --offset_increment=8M --rw=randwrite --bs=4k --fsync=64 --verify=crc32c --do_verify=1 \\
                --verify_fatal=1 --output=/dev/null
            sha256sum < /dev/nbd0"""
        )
        assert pool.list()["disk"]["open_count"] == 4
        size, digest = done.out.splitlines()[-2:]
        assert int(size) == 64 * MIB // 512
        pool.kill()  # what was flushed must be there although nothing was closed
        pool.start()
        again = guest.run(
            f"""nbd-client -d /dev/nbd0 || true
            {pool.connect("disk", "/dev/nbd1")}
            sha256sum < /dev/nbd1"""
        )
        assert again.out.splitlines()[-1] == digest


def _netlink(verb: str, pool: ServedPool) -> str:
    script = CHECKOUT / "tests" / "guest" / "reconnecting.py"
    return f"PYTHONPATH={CHECKOUT} {sys.executable} {script} {verb} 0 nbd://{HOST}:{pool.port}/disk\n"


@pytest.mark.deep
def test_writes_go_on_when_the_server_was_killed_and_came_back(guest: Machine):
    """The driver waits for a new socket and sends again what was not answered: the file system notices nothing.

    `nbd-client -persist` cannot be used for this: version 3.24 with kernel 6.1 ends when the server goes, because
    NBD_DO_IT returns 0 then, and it sets no time for which the driver would wait.
    """
    go = guest.share / "go"
    with served_pool() as pool:
        pool.operate("create", name="disk", size_bytes=64 * MIB)
        guest.run(
            f"""{LOAD_NBD}{_netlink("connect", pool)}
            mkfs.ext4 -q /dev/nbd0
            mkdir -p /mnt/disk
            mount -o errors=panic /dev/nbd0 /mnt/disk"""
        )
        writer = guest.start(
            f"""for turn in 1 2 3 4 5; do
                cp -r {TREE} /mnt/disk/tree$turn
                sync -f /mnt/disk
                echo turn $turn
                while [ $turn = 2 ] && [ ! -e /run/guest/{go.name} ]; do sleep 0.1; done
            done"""
        )
        while "turn 2\n" not in writer.output():
            assert writer.is_running(), writer.wait()
            time.sleep(0.05)
        pool.kill()
        go.touch()
        time.sleep(1)  # requests go into the void
        pool.start()
        assert writer.is_running()
        guest.run(_netlink("reconnect", pool))
        assert "turn 5\n" in writer.wait().out
        go.unlink()
        guest.run(
            f"""umount /mnt/disk
            e2fsck -fn /dev/nbd0
            mount /dev/nbd0 /mnt/disk
            for turn in 1 2 3 4 5; do diff -r {TREE} /mnt/disk/tree$turn; done
            umount /mnt/disk
            nbd-client -d /dev/nbd0"""
        )


def test_answered_writes_survive_a_killed_server(guest: Machine):
    """A client that reconnects has no reason to write again what was answered, flushed or not."""
    with served_pool() as pool:
        pool.operate("create", name="disk", size_bytes=16 * MIB)
        guest.run(f"{LOAD_NBD}{_netlink('connect', pool)}")
        writer = guest.start(
            """dd if=/dev/urandom of=/run/payload bs=64k count=64 status=none
            for block in $(seq 0 63); do
                dd if=/run/payload of=/dev/nbd0 bs=64k count=1 skip=$block seek=$block oflag=direct conv=notrunc status=none
                echo block $block
            done"""
        )
        while "block 20\n" not in writer.output():
            assert writer.is_running(), writer.wait()
            time.sleep(0.01)
        pool.kill()
        pool.start()
        guest.run(_netlink("reconnect", pool))
        writer.wait()
        same = guest.run("cmp -n $((64 * 65536)) /run/payload /dev/nbd0", check=False)
        guest.run("nbd-client -d /dev/nbd0")
        assert same.status == 0, same.out


def test_logical_blocks_of_4096_and_512_bytes(guest: Machine):
    with served_pool() as pool:
        pool.operate("create", name="disk", size_bytes=32 * MIB)
        for node, block_bytes in (("/dev/nbd0", 4096), ("/dev/nbd1", 512)):
            done = guest.run(
                f"""{pool.connect("disk", node, f"-C 1 -b {block_bytes}")}
                blockdev --getss {node}
                mkdir -p /mnt/disk
                mkfs.ext4 -q {node}
                mount {node} /mnt/disk
                cp -r {TREE} /mnt/disk/tree
                umount /mnt/disk
                mount {node} /mnt/disk
                diff -r {TREE} /mnt/disk/tree
                umount /mnt/disk
                e2fsck -fn {node}
                nbd-client -d {node}"""
            )
            assert f"\n{block_bytes}\n" in done.out


@pytest.mark.deep
def test_partitions(guest: Machine):
    with served_pool() as pool:
        pool.operate("create", name="disk", size_bytes=64 * MIB)
        guest.run(
            f"""{pool.connect("disk")}
            printf 'label: gpt\\nsize=16MiB\\nsize=16MiB\\n' | sfdisk -q /dev/nbd0
            blockdev --rereadpt /dev/nbd0
            nbd-client -d /dev/nbd0
            {pool.connect("disk")}
            mkdir -p /mnt/one /mnt/two
            for _ in $(seq 100); do [ -b /dev/nbd0p2 ] && break; sleep 0.05; done
            mkfs.ext4 -q /dev/nbd0p1
            mkfs.ext4 -q /dev/nbd0p2
            mount /dev/nbd0p1 /mnt/one
            mount /dev/nbd0p2 /mnt/two
            cp -r {TREE} /mnt/one/tree
            echo two > /mnt/two/file
            umount /mnt/one /mnt/two
            mount /dev/nbd0p1 /mnt/one
            diff -r {TREE} /mnt/one/tree
            umount /mnt/one
            e2fsck -fn /dev/nbd0p1
            e2fsck -fn /dev/nbd0p2
            sfdisk --verify /dev/nbd0
            nbd-client -d /dev/nbd0"""
        )


def test_tls(guest: Machine, tmp_path: Path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    certificates = make_certificates(tmp_path)
    with served_pool(options=("--tls-certificates", str(certificates), "--tls-verify-peer")) as pool:
        pool.operate("create", name="disk", size_bytes=32 * MIB)
        refused = guest.run(pool.connect("disk", options="-C 1 -b 512"), check=False)
        assert refused.status != 0
        done = guest.run(
            f"""{LOAD_NBD}
            nbd-client {HOST} {pool.port} /dev/nbd0 -N disk -b 512 -x -certfile {certificates}/client-cert.pem \\
                -keyfile {certificates}/client-key.pem -cacertfile {certificates}/ca-cert.pem -tlshostname localhost
            mkfs.ext4 -q /dev/nbd0
            mkdir -p /mnt/disk
            mount /dev/nbd0 /mnt/disk
            cp -r {TREE} /mnt/disk/tree
            umount /mnt/disk
            mount /dev/nbd0 /mnt/disk
            diff -r {TREE} /mnt/disk/tree
            fstrim -v /mnt/disk
            umount /mnt/disk
            e2fsck -fn /dev/nbd0
            nbd-client -d /dev/nbd0"""
        )
        assert "trimmed" in done.out

"""Thin pools that LVM made, with the kernel's dm-thin under it: found, named, read, changed and handed back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nbd.client import Client
from tests.conformance.running_pool import run
from tests.guest.machine import Machine
from tests.guest.own_pool import judge, opened
from tests.guest.served_pool import serving
from tests.guest.volume_group import VolumeGroup
from thinpool.pool_location import PoolLocation

MIB = 1 << 20
CHECKOUT = Path(__file__).resolve().parents[2]
TREE = CHECKOUT / "nbd"
SIZES = {"root": 24 * MIB, "home": 32 * MIB, "root-monday": 24 * MIB}
# The pool out of two volumes, as people do who want its metadata elsewhere; a snapshot, and a change after it.
CREATE = f"""
lvm lvcreate -L 64M -n pool vg
lvm lvcreate -L 4M -n meta vg
lvm lvconvert -y --type thin-pool --poolmetadata vg/meta vg/pool
lvm lvcreate -V 24M --thin -n root vg/pool
lvm lvcreate -V 32M --thin -n home vg/pool
mkfs.ext4 -q /dev/vg/root
mkdir -p /mnt/root
mount /dev/vg/root /mnt/root
cp -r {TREE} /mnt/root/tree
sync
lvm lvcreate -s -kn -n root-monday vg/root
rm -r /mnt/root/tree
fstrim /mnt/root
dd if=/dev/urandom of=/mnt/root/random bs=64k count=40 status=none
umount /mnt/root
dd if=/dev/urandom of=/dev/vg/home bs=64k seek=100 count=3 status=none
lvm lvchange -pr vg/root-monday
"""


def _copy_out(group: VolumeGroup, guest: Machine) -> dict[str, bytes]:
    out = guest.share / "out"
    out.mkdir(exist_ok=True)
    group.run("\n".join(f"dd if=/dev/vg/{name} of=/run/guest/out/{name} bs=1M status=none" for name in SIZES))
    return {name: (out / name).read_bytes() for name in SIZES}


class RescuedPool:
    """The pool's two volumes as files, the backup text beside them."""

    def __init__(self, directory: Path) -> None:
        self.metadata, self.data, self.names = (directory / name for name in ("tmeta", "tdata", "vg.txt"))
        self.location = PoolLocation.bare(self.metadata, self.data, self.names)
        self.options = [
            *("--metadata", str(self.metadata), "--data", str(self.data), "--names", str(self.names)),
        ]

    def cut(self, group: VolumeGroup) -> str:
        backup = group.release()
        self.names.write_text(backup)
        group.cut(backup, "pool_tmeta", self.metadata)
        group.cut(backup, "pool_tdata", self.data)
        return backup

    def thinpool(self, *words: str) -> str:
        return run(sys.executable, "-m", "thinpool", *words, *self.options).stdout


def test_a_pool_of_lvm_is_read_changed_and_handed_back(guest: Machine, tmp_path: Path):
    group = VolumeGroup(guest, tmp_path / "disk", 128 * MIB)
    group.create()
    group.run(CREATE)
    contents = _copy_out(group, guest)
    pool = RescuedPool(tmp_path)
    backup = pool.cut(group)
    judge(pool.location)

    listed = {device["name"]: device for device in json.loads(pool.thinpool("list", "--json"))["devices"]}
    assert {name: device["size_bytes"] for name, device in listed.items()} == SIZES
    assert listed["root-monday"]["origin"] == "root"
    assert listed["root-monday"]["read_only"]
    assert not listed["root"]["read_only"]
    transaction = json.loads(pool.thinpool("status", "--json"))["transaction_id"]
    metadata_alone = ("--metadata", str(pool.metadata), "--names", str(pool.names))
    run(sys.executable, "-m", "thinpool", "check", "--quiet", *metadata_alone)
    found = run(sys.executable, "-m", "thinpool", "diff", "root-monday", "root", "--json", *metadata_alone)
    _changes_are_where_the_bytes_differ(json.loads(found.stdout), contents)
    judge(pool.location)  # looking has changed nothing

    with serving(pool.options, tmp_path, "--read-only") as uri:
        for name, content in contents.items():
            with Client.connect(uri(name), contexts=["base:allocation"]) as client:
                assert client.read(0, SIZES[name]) == content
        _the_snapshot_differs_where_the_bytes_do(uri("root"), contents)
    with serving(pool.options, tmp_path) as uri, Client.connect(uri("home")) as client:
        client.write(5 * MIB + 4096, b"rescued".ljust(4096, b"."))
        client.trim(100 * 65536, 65536)
        client.flush()
    changed = bytearray(contents["home"])
    changed[5 * MIB + 4096 : 5 * MIB + 8192] = b"rescued".ljust(4096, b".")
    changed[100 * 65536 : 101 * 65536] = bytes(65536)
    judge(pool.location)
    assert json.loads(pool.thinpool("status", "--json"))["transaction_id"] == transaction

    group.put_back(backup, "pool_tmeta", pool.metadata)
    group.put_back(backup, "pool_tdata", pool.data)
    group.attach()
    group.run("lvm vgchange -ay vg")
    assert _copy_out(group, guest) == {**contents, "home": bytes(changed)}
    group.run(  # and LVM goes on with it
        f"""e2fsck -fn /dev/vg/root
        mkdir -p /mnt/monday
        mount -o ro,noload /dev/vg/root-monday /mnt/monday
        diff -r {TREE} /mnt/monday/tree
        umount /mnt/monday
        lvm lvcreate -s -n home-copy vg/home
        lvm lvremove -y vg/root-monday vg/home
        lvm lvcreate -V 8M --thin -n new vg/pool"""
    )
    pool.cut(group)
    judge(pool.location)
    with opened(pool.location, read_only=True) as opened_pool:
        names = sorted(entry.name for entry in opened_pool.pool.catalog.entries())
        assert names == ["home-copy", "new", "root"]


def _the_snapshot_differs_where_the_bytes_do(uri: str, contents: dict[str, bytes]) -> None:
    """What changed since the snapshot covers every byte that did, and no more than half of the device."""
    name = "qemu:dirty-bitmap:root-monday"
    with Client.connect(uri, contexts=[name]) as client:
        changed = client.block_status(0, SIZES["root"])[name]
    at = dirty_bytes = 0
    for length, dirty in changed:
        if not dirty:
            assert contents["root"][at : at + length] == contents["root-monday"][at : at + length]
        dirty_bytes += length if dirty else 0
        at += length
    assert at == SIZES["root"]
    assert 0 < dirty_bytes < SIZES["root"] / 2


def _changes_are_where_the_bytes_differ(found: dict[str, Any], contents: dict[str, bytes]) -> None:
    """Outside the ranges of `thinpool diff` the device reads as its snapshot, and where there is a hole as zeros."""
    was, now = bytearray(contents["root-monday"]), contents["root"]
    assert found["data_bytes"] > 0
    assert found["hole_bytes"] > 0
    for each in found["ranges"]:
        at, end = each["offset_bytes"], each["offset_bytes"] + each["length_bytes"]
        was[at:end] = now[at:end] if each["state"] == "data" else bytes(end - at)
    assert was == now


@pytest.mark.deep  # Python starts in an emulated machine
def test_component_volumes_are_opened_where_they_are(guest: Machine, tmp_path: Path):
    """On a machine with LVM nothing need be copied: it activates _tmeta and _tdata read-only for such a look."""
    group = VolumeGroup(guest, tmp_path / "disk", 128 * MIB)
    group.create()
    group.run(CREATE)
    listed = group.run(
        f"""lvm vgcfgbackup -f /run/vg.txt vg
        lvm vgchange -an vg
        lvm lvchange -ay -y vg/pool_tmeta
        lvm lvchange -ay -y vg/pool_tdata
        cd {CHECKOUT}
        pool="--metadata /dev/vg/pool_tmeta --data /dev/vg/pool_tdata --names /run/vg.txt"
        {sys.executable} -m thinpool list $pool -H -b
        lvm vgchange -an vg"""
    )
    rows = [line.split("\t") for line in listed.splitlines()]
    assert {row[0]: int(row[1]) for row in rows} == SIZES
    group.release()


@pytest.mark.parametrize("wanted", [pytest.param("one", marks=pytest.mark.deep), "two"])
def test_two_pools_with_the_same_ids_are_told_apart(guest: Machine, tmp_path: Path, wanted: str):
    group = VolumeGroup(guest, tmp_path / "disk", 64 * MIB)
    group.create()
    for name in ("one", "two"):
        group.run(
            f"lvm lvcreate -L 8M --thinpool {name} vg; lvm lvcreate -V 4M --thin -n of-{name} vg/{name}"
        )
    backup = group.release()
    (tmp_path / "vg.txt").write_text(backup)
    group.cut(backup, f"{wanted}_tmeta", tmp_path / "tmeta")
    group.cut(backup, f"{wanted}_tdata", tmp_path / "tdata")
    options = ["--metadata", str(tmp_path / "tmeta"), "--data", str(tmp_path / "tdata"), "--names"]
    thinpool = (sys.executable, "-m", "thinpool", "list", "-H", *options)
    unclear = run(*thinpool, str(tmp_path / "vg.txt"), check=False)
    assert unclear.returncode == 2
    assert "FILE:POOL" in unclear.stderr
    assert run(*thinpool, f"{tmp_path}/vg.txt:{wanted}").stdout.split("\t")[0] == f"of-{wanted}"

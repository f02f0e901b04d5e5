"""The rescue of docs/metadata-tools.md, "An LVM pool that does not come up", done step by step with the real LVM."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from metadata import FileStore, PoolMetadata, recount
from tests.guest.machine import Machine
from tests.guest.volume_group import VolumeGroup

MIB = 1 << 20
CHECKOUT = Path(__file__).resolve().parents[2]
CREATE = """
lvm lvcreate -L 48M --poolmetadatasize 4M --thinpool pool vg
lvm lvcreate -V 24M --thin -n root vg/pool
lvm lvcreate -V 24M --thin -n home vg/pool
mkfs.ext4 -q /dev/vg/root
dd if=/dev/urandom of=/dev/vg/home bs=64k count=40 status=none
lvm lvcreate -s -kn -n root-monday vg/root
dd if=/dev/urandom of=/dev/vg/root bs=64k seek=20 count=30 status=none
sha256sum /dev/vg/root /dev/vg/root-monday
"""


def documented_steps() -> Iterator[str]:
    """The commands of the page, with the size of this test's metadata, and the answers its reader is asked for."""
    page = (CHECKOUT / "docs/metadata-tools.md").read_text()
    recipe = page.split("### An LVM pool that does not come up\n")[1].split("\n\nThese")[0]
    for line in recipe.strip().splitlines():
        step = line.split("#")[0].strip().replace("-L 256M", "-L 4M")
        if step.startswith("thinpool"):
            yield f"PYTHONPATH={CHECKOUT} {sys.executable} -m {step}"
        else:
            yield re.sub(r"^(lv|vg)", r"lvm \1", step) + (" -y" if step.startswith("lvconvert") else "")


def damage_the_tree_of_home(group: VolumeGroup, directory: Path) -> None:
    backup = group.release()
    tmeta = directory / "tmeta"
    group.cut(backup, "pool_tmeta", tmeta)
    store = FileStore(tmeta, writable=False)
    metadata = PoolMetadata.open(store, writable=False)
    root = next(
        metadata.device_root(each.device_id) for each in metadata.devices() if each.mapped_blocks == 40
    )
    store.close()
    with tmeta.open("r+b") as file:
        file.seek(root * 4096)
        file.write(bytes(4096))
    group.put_back(backup, "pool_tmeta", tmeta)
    group.attach()


@pytest.mark.deep  # three starts of Python in an emulated machine
def test_the_rescue_of_the_page_brings_the_pool_up_again(guest: Machine, tmp_path: Path):
    group = VolumeGroup(guest, tmp_path / "disk", 128 * MIB)
    group.create()
    before = group.run(CREATE).splitlines()
    damage_the_tree_of_home(group, tmp_path)
    refused = group.run("lvm lvchange -ay vg/root && echo up || true")
    assert "up" not in refused.split(), (
        "LVM's own check must have found the damage, or this test shows nothing"
    )

    said = {}
    for step in documented_steps():
        # What is found damaged and repaired with a loss ends with 6, and the operator reads on.
        expected = 6 if " check /dev/vg/rescue" in step or " repair " in step else 0
        said[step] = group.run(
            f"cd /run\nstatus=0\n{step} || status=$?\n[ $status = {expected} ] || exit 100\n"
        )
    repaired = next(text for step, text in said.items() if " repair " in step)
    assert "'root' (device 1) is complete" in repaired, repaired
    assert "2 of 3 devices complete" in repaired, repaired
    after = group.run(
        """lvm lvchange -ay vg/root vg/root-monday
        sha256sum /dev/vg/root /dev/vg/root-monday
        e2fsck -fn /dev/vg/root-monday >&2
        lvm lvcreate -s -n root-again vg/root
        lvm lvremove -y vg/home"""
    )
    assert after.splitlines()[:2] == before
    backup = group.release()
    group.cut(backup, "pool_tmeta", tmp_path / "tmeta")
    store = FileStore(tmp_path / "tmeta", writable=False)
    assert recount(store) == []
    store.close()

"""LVM in the guest, on one disk that is a file of the host; and where in the file the parts of a thin pool lie.

In: running lvm without udev, the backup text of the volume group, cutting `_tmeta` and `_tdata` out of the disk and
putting them back. Out: what is tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.guest.machine import Disk, Machine
from thinpool.lvm_config import parse_config

SECTOR_BYTES = 512
# No udev in the guest: LVM scans and makes nodes itself. Its monitor is not running either.
PRELUDE = """
export LVM_SUPPRESS_FD_WARNINGS=1
configuration='devices {
    use_devicesfile=0 obtain_device_list_from_udev=0 external_device_info_source="none" filter=["a|^/dev/sd|","r|.*|"]
}
activation { udev_sync=0 udev_rules=0 monitoring=0 }
global { event_activation=0 }'
lvm() { command lvm "$@" -qq --config "$configuration" 2>/run/lvm.err || { cat /run/lvm.err >&2; return 1; }; }
modprobe dm-thin-pool
"""
BACKUP = "vg.txt"


class VolumeGroup:
    """A volume group called vg on a file. `run` has the shell function `lvm`."""

    def __init__(self, guest: Machine, image: Path, size_bytes: int) -> None:
        self._guest = guest
        self.image = image
        with image.open("wb") as file:
            file.truncate(size_bytes)
        self._disk: Disk | None = None

    def attach(self) -> None:
        self._disk = self._guest.attach("pv", self.image)

    def run(self, script: str) -> str:
        """Run a script in the guest; what it printed."""
        return self._guest.run(PRELUDE + script).out

    def create(self) -> None:
        """Make the physical volume and the group."""
        self.attach()
        self.run("lvm vgcreate vg $(readlink /dev/disks/pv)")

    def release(self) -> str:
        """Deactivate everything and give the file back; the backup text of the group."""
        self.run(f"lvm vgcfgbackup -f /run/guest/{BACKUP} vg; lvm vgchange -an vg")
        assert self._disk is not None
        self._guest.detach(self._disk)
        self._disk = None
        return (self._guest.share / BACKUP).read_text()

    def cut(self, backup: str, volume: str, target: Path) -> None:
        """Copy a linear volume out of the disk."""
        with target.open("wb") as file, self.image.open("rb") as disk:
            for offset, length in _ranges(backup, volume):
                disk.seek(offset)
                file.write(disk.read(length))

    def put_back(self, backup: str, volume: str, source: Path) -> None:
        """Copy a file back to where the volume lies on the disk."""
        with source.open("rb") as file, self.image.open("r+b") as disk:
            for offset, length in _ranges(backup, volume):
                disk.seek(offset)
                disk.write(file.read(length))


def _ranges(backup: str, volume: str) -> list[tuple[int, int]]:
    """(offset, length) of the pieces of a volume, in bytes of the disk."""
    group: Mapping[str, Any] = parse_config(backup)["vg"]
    extent_bytes = group["extent_size"] * SECTOR_BYTES
    start_bytes = group["physical_volumes"]["pv0"]["pe_start"] * SECTOR_BYTES
    described = group["logical_volumes"][volume]
    segments = [described[f"segment{number + 1}"] for number in range(described["segment_count"])]
    return [
        (start_bytes + segment["stripes"][1] * extent_bytes, segment["extent_count"] * extent_bytes)
        for segment in segments
    ]

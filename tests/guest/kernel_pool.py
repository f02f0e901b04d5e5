"""The kernel's dm-thin on two files of the host: activate, message, write, copy out, deactivate.

In: the tables and messages (Documentation/admin-guide/device-mapper/thin-provisioning.rst), thin devices as
/dev/mapper/thin-ID. Out: what is written and compared. Scripts are collected and run at once: each run costs a third of
a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.guest.machine import Disk, Machine

SECTOR_BYTES = 512
NODE = "/dev/mapper/pool"


def _thin_table(device_id: int, size_bytes: int) -> str:
    return f"0 {size_bytes // SECTOR_BYTES} thin {NODE} {device_id}"


class KernelPool:
    """A pool of the guest's kernel. `activate` before, `deactivate` after, the files are ours to use."""

    def __init__(
        self,
        guest: Machine,
        metadata: Path,
        data: Path,
        *,
        block_bytes: int = 65536,
        features: Sequence[str] = ("error_if_no_space",),
    ) -> None:
        self._guest = guest
        self._files = {"metadata": metadata, "data": data}
        self.disks: list[Disk] = []
        self._block_sectors = block_bytes // SECTOR_BYTES
        self._data_sectors = data.stat().st_size // SECTOR_BYTES
        self._features = tuple(features)
        self._out = guest.share / "out"
        self._out.mkdir(exist_ok=True)

    def activate(self, devices: Mapping[int, int] | None = None) -> str:
        """Create the pool and thin devices (id -> size in bytes); returns the pool's status line."""
        if not self.disks:
            self.disks = [self._guest.attach(name, path) for name, path in self._files.items()]
        metadata, data = (disk.path for disk in self.disks)
        features = " ".join((str(len(self._features)), *self._features))
        tables = [
            f"pool,,,rw,0 {self._data_sectors} thin-pool {metadata} {data} {self._block_sectors} 0 {features}"
        ]
        tables += [
            f"thin-{device_id},,,rw,{_thin_table(device_id, size_bytes)}"
            for device_id, size_bytes in (devices or {}).items()
        ]
        return self.run(
            "modprobe dm-thin-pool",
            f"blockdev --flushbufs {metadata} {data}",
            f"dmsetup create --concise '{';'.join(tables)}'",
            "dmsetup status pool",
        )

    def run(self, *lines: str, seconds: float = 60.0) -> str:
        """Run lines of a script in the guest; what they printed."""
        return self._guest.run("\n".join(lines), seconds=seconds).out

    def deactivate(self, *, detach: bool = True) -> None:
        """Remove all devices, which commits and writes everything back; the files are ours to use then."""
        self.run("cd /dev/mapper", "shopt -s nullglob", "dmsetup remove thin-* pool")
        if detach:
            self.release()

    def release(self) -> None:
        """Take the files away from the guest; nothing is active on them."""
        for disk in self.disks:
            self._guest.detach(disk)
        self.disks = []

    @staticmethod
    def message(text: str) -> str:
        """A line that sends a message to the pool."""
        return f"dmsetup message pool 0 '{text}'"

    @staticmethod
    def thin(device_id: int, size_bytes: int) -> str:
        """A line that makes the node of a thin device."""
        return f"dmsetup create thin-{device_id} --table '{_thin_table(device_id, size_bytes)}'"

    def snapshot(self, device_id: int, origin_id: int) -> str:
        """Lines that snapshot an active device: it stands still meanwhile, as the kernel's documentation wants."""
        return "\n".join(
            (
                f"dmsetup suspend thin-{origin_id}",
                self.message(f"create_snap {device_id} {origin_id}"),
                f"dmsetup resume thin-{origin_id}",
            )
        )

    def contents(self, device_ids: Sequence[int]) -> dict[int, bytes]:
        """What active devices read, in full."""
        self.run(
            *(
                f"dd if=/dev/mapper/thin-{device_id} of=/run/guest/out/{device_id} bs=1M conv=sparse status=none"
                for device_id in device_ids
            )
        )
        found = {}
        for device_id in device_ids:
            path = self._out / str(device_id)
            found[device_id] = path.read_bytes()
            path.unlink()
        return found

"""The lines that `dmsetup status` prints for dm-thin, about a pool of ours.

In: the `thin-pool` and `thin` status lines (drivers/md/dm-thin.c, pool_status and thin_status), for scripts and
monitoring that know them. Out: figures for people (`status.py`). Fields that a table decides in the kernel say what we
do: freed space is passed down to the data file, and the policy at full is the one that holds now (after the time-out of
queueing, as in the kernel, that is errors).
"""

from __future__ import annotations

from dataclasses import dataclass

from metadata import PoolMetadata

SECTOR_BYTES = 512
# The kernel keeps a tenth of the metadata, at most 16 MiB, for commits and deletions, and reports it as used.
RESERVE_DIVISOR = 10
RESERVE_BLOCKS_MAX = 4096
# Below this many free metadata blocks it sends an event: 4 MiB or a quarter of the metadata.
LOW_WATER_BLOCKS_MAX = 1024
PASSED_DOWN = "discard_passdown"
WHEN_FULL = {True: "error_if_no_space", False: "queue_if_no_space"}
MODES = {"rw": "rw", "out_of_data_space": "out_of_data_space"}


@dataclass(frozen=True, slots=True)
class DmDevice:
    """What a thin device's line needs beside the metadata."""

    name: str
    device_id: int
    size_bytes: int


def pool_line(metadata: PoolMetadata, mode: str, *, refuses: bool) -> str:
    """The status of the pool, `mode` being one of `PoolStatus.mode`; all the kernel's read-only modes are "ro".

    `refuses`: a write that finds no space fails at once.
    """
    if mode == "fail":
        return f"0 {metadata.data_blocks * metadata.data_block_sectors} thin-pool Fail"
    total = metadata.metadata_blocks
    reserve = min(total // RESERVE_DIVISOR, RESERVE_BLOCKS_MAX)
    used = min(metadata.metadata_blocks_allocated + reserve, total)
    fields = (
        f"0 {metadata.data_blocks * metadata.data_block_sectors} thin-pool",
        str(metadata.transaction_id),
        f"{used}/{total}",
        f"{metadata.data_blocks_allocated}/{metadata.data_blocks}",
        str(metadata.held_root or "-"),
        MODES.get(mode, "ro"),
        PASSED_DOWN,
        WHEN_FULL[refuses],
        "needs_check" if metadata.needs_check else "-",
        str(min(LOW_WATER_BLOCKS_MAX, total // 4)),
    )
    return " ".join(fields)


def device_line(metadata: PoolMetadata, device: DmDevice) -> str:
    """The status of one thin device: sectors mapped, and the highest of them."""
    sectors = metadata.data_block_sectors
    highest = metadata.highest_mapped(device.device_id)
    fields = (
        f"0 {device.size_bytes // SECTOR_BYTES} thin",
        str(metadata.device(device.device_id).mapped_blocks * sectors),
        "-" if highest is None else str((highest + 1) * sectors - 1),
    )
    return " ".join(fields)

"""Repairing metadata into another file: source and target kept apart, what a pool directory can tell added.

In: opening both, sizes that the data file and the catalogue know. Out: the repair itself (`metadata.repair`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from metadata import BlockStore, Known, MetadataFull, OutOfRange, RepairReport, SuperblockLost, repair

from .errors import BadSize, PoolDamaged, TargetInUse
from .findings import KEY_LIMIT
from .metadata_target import MetadataTarget, open_target, too_small
from .metadata_view import device_names, view_metadata
from .operations import METADATA_BLOCK_BYTES
from .pool_location import PoolLocation

SECTOR_BYTES = 512
Watch = Callable[[BlockStore, int], AbstractContextManager[BlockStore]]


@dataclass(frozen=True, slots=True)
class Repaired:
    """The report of a repair, with the names of devices and the size of a data block (0: not known)."""

    report: RepairReport
    names: Mapping[int, str]
    block_bytes: int

    def to_json(self) -> dict[str, Any]:
        """For programs; ends of ranges are exclusive, null means without end."""
        return {
            "lossless": self.report.lossless,
            "remarks": list(self.report.remarks),
            "mapped_blocks": self.report.built.mapped_blocks,
            "metadata_used_bytes": self.report.built.metadata_blocks_used * METADATA_BLOCK_BYTES,
            "devices": [
                {
                    "device_id": each.device,
                    "name": self.names.get(each.device),
                    "outcome": each.outcome.name.lower(),
                    "mapped_blocks": each.mapped_blocks,
                    "recorded_blocks": each.recorded_blocks,
                    "lost": [
                        {"begin_block": begin, "end_block": None if end == KEY_LIMIT else end}
                        for begin, end in each.lost
                    ],
                }
                for each in self.report.devices
            ],
        }


def repair_into(
    source: PoolLocation,
    target: MetadataTarget,
    *,
    data_block_bytes: int | None = None,
    data_blocks: int | None = None,
    transaction_id: int | None = None,
    watch: Watch,
) -> Repaired:
    """Repair `source` into `target`, which are not the same.

    Raises PoolDamaged where the superblock is lost and too little is known, MetadataSpace where the target is too
    small, TargetInUse, BadSize, and what opening either raises.
    """
    if target.path.exists() and source.metadata_path.exists() and target.path.samefile(source.metadata_path):
        raise TargetInUse(str(target.path), "is what is to be repaired; a repair goes into another file")
    with view_metadata(source, damaged=True) as view:
        known = Known(
            None if data_block_bytes is None else data_block_bytes // SECTOR_BYTES,
            _blocks(source, view.block_bytes, data_block_bytes) if data_blocks is None else data_blocks,
            transaction_id,
        )
        size_bytes = view.store.size_blocks() * METADATA_BLOCK_BYTES
        with open_target(target, size_bytes) as made, watch(view.shown, view.metadata_blocks) as store:
            try:
                report = repair(store, made, known)
            except SuperblockLost as error:
                raise PoolDamaged(str(source), f"{error} (--data-block-size)") from error
            except OutOfRange as error:
                raise BadSize(str(data_block_bytes or view.block_bytes), str(error)) from error
            except MetadataFull as error:
                raise too_small(made) from error
        names = view.names or device_names(source, {device.device for device in report.devices})
        return Repaired(report, names, view.block_bytes or data_block_bytes or 0)


def _blocks(source: PoolLocation, found_block_bytes: int, given_block_bytes: int | None) -> int | None:
    """Data blocks by the length of a pool's data file, where the superblock does not tell and the file is there."""
    if found_block_bytes or not given_block_bytes or source.root is None or not source.data_path.is_file():
        return None
    return source.data_path.stat().st_size // given_block_bytes

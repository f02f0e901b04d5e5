"""Repairing metadata into another file: source and target kept apart, what a pool directory can tell added.

In: opening both, sizes that the data file and the catalogue know, the plan of a repair. Out: the repair itself
(`metadata.repair`), finding what is wrong (`metadata.recount`).

A plan is the repair itself with a target that forgets what is written to it, so it says what the repair will say;
beside it stands what is wrong with each structure, and what becomes of that one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from metadata import (
    BlockStore,
    Known,
    MetadataFull,
    OutOfRange,
    RepairReport,
    Severity,
    ShortRead,
    SuperblockLost,
    recount,
    repair,
)

from .errors import BadSize, MetadataSpace, PoolDamaged, TargetInUse
from .findings import KEY_LIMIT
from .metadata_target import MetadataTarget, open_target, too_small
from .metadata_view import MetadataView, device_names, view_metadata
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


@dataclass(frozen=True, slots=True)
class Given:
    """What the operator says about a pool whose superblock is lost."""

    data_block_bytes: int | None = None
    data_blocks: int | None = None
    transaction_id: int | None = None


# By structure, as problems name it: what a repair makes of one that has faults.
REMEDIES = {
    "superblock": "made anew from what is given and found",
    "mapping tree": "roots of devices are matched with their records, lost ones are looked for",
    "device records": "copied where they can be read, lost ones made anew",
    "mappings": "copied where they can be read; the ranges that are lost are below",
    "data space map": "counted anew",
    "data space map index": "counted anew",
    "data space map counts": "counted anew",
    "metadata space map": "counted anew",
    "metadata space map index": "counted anew",
    "metadata space map counts": "counted anew",
    "metadata snapshot": "left out",
}


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """Faults of one structure, and what a repair does about them."""

    structure: str
    errors: int
    leaks: int
    hints: int
    remedy: str


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair would change, and what would come of it. `changes`: structures with faults, as they are met."""

    changes: list[PlannedChange]
    repaired: Repaired

    def to_json(self) -> dict[str, Any]:
        """For programs: the changes, and the report of the repair."""
        return {"changes": [asdict(change) for change in self.changes], **self.repaired.to_json()}


class _Forgetful:
    """A target of a given size that keeps nothing; `metadata.BlockStore`."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks

    def read(self, first: int, count: int) -> bytes:
        """Nobody reads what a repair makes while it is made."""
        raise ShortRead(first, count, 0)

    def write(self, first: int, data: bytes | bytearray | memoryview) -> None:
        """Accept and drop."""

    def flush(self) -> None:
        """Nothing is kept, so nothing can be lost."""

    def size_blocks(self) -> int:
        """As large as asked for."""
        return self._blocks

    def close(self) -> None:
        """Nothing to give up."""


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
    given = Given(data_block_bytes, data_blocks, transaction_id)
    with view_metadata(source, damaged=True) as view:
        size_bytes = view.store.size_blocks() * METADATA_BLOCK_BYTES
        with open_target(target, size_bytes) as made, watch(view.shown, view.metadata_blocks) as store:
            try:
                return _repaired(source, view, store, made, given)
            except MetadataFull as error:
                raise too_small(made) from error


def plan_repair(
    source: PoolLocation, given: Given, *, size_bytes: int | None = None, watch: Watch
) -> RepairPlan:
    """What `repair_into` would do for a target of `size_bytes`, by default as large as the source. Writes nothing.

    Raises as `repair_into`.
    """
    with view_metadata(source, damaged=True) as view:
        blocks = view.store.size_blocks() if size_bytes is None else size_bytes // METADATA_BLOCK_BYTES
        with watch(view.shown, 2 * view.metadata_blocks) as store:
            problems = recount(store)
            try:
                repaired = _repaired(source, view, store, _Forgetful(blocks), given)
            except MetadataFull as error:
                have_bytes = blocks * METADATA_BLOCK_BYTES
                raise MetadataSpace(have_bytes + METADATA_BLOCK_BYTES, have_bytes) from error
    counted = Counter((problem.place.structure, problem.severity) for problem in problems)
    changes = [
        PlannedChange(
            structure,
            errors=counted[structure, Severity.ERROR],
            leaks=counted[structure, Severity.LEAK],
            hints=counted[structure, Severity.HINT],
            remedy=REMEDIES.get(structure, "copied where it can be read"),
        )
        for structure in dict.fromkeys(problem.place.structure for problem in problems)
    ]
    return RepairPlan(changes, repaired)


def _repaired(
    source: PoolLocation, view: MetadataView, store: BlockStore, target: BlockStore, given: Given
) -> Repaired:
    known = Known(
        None if given.data_block_bytes is None else given.data_block_bytes // SECTOR_BYTES,
        _blocks(source, view.block_bytes, given.data_block_bytes)
        if given.data_blocks is None
        else given.data_blocks,
        given.transaction_id,
    )
    try:
        report = repair(store, target, known)
    except SuperblockLost as error:
        raise PoolDamaged(str(source), f"{error} (--data-block-size)") from error
    except OutOfRange as error:
        raise BadSize(str(given.data_block_bytes or view.block_bytes), str(error)) from error
    names = view.names or device_names(source, {device.device for device in report.devices})
    return Repaired(report, names, view.block_bytes or given.data_block_bytes or 0)


def _blocks(source: PoolLocation, found_block_bytes: int, given_block_bytes: int | None) -> int | None:
    """Data blocks by the length of a pool's data file, where the superblock does not tell and the file is there."""
    if found_block_bytes or not given_block_bytes or source.root is None or not source.data_path.is_file():
        return None
    return source.data_path.stat().st_size // given_block_bytes

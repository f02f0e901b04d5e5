# ruff: noqa: EM101, TRY003 -- what is passed to an error is a field, the sentence is made when it is printed
"""Making a sound pool of everything that can be read of a damaged one, and saying what could not.

In: which trees there are, what devices they belong to, writing them into another store. Out: reading one tree
(tree_salvage), looking for lost nodes and roots (lost_nodes), the format of new pools (pool_build).

The source is only read. A device whose nodes are all intact comes out complete, whatever happened to others, to the
space maps, to the trees that list devices, or to the superblock. Nothing is made up: what a damaged node held is taken
from nodes that the space map still counts as used and that nothing else accounts for, or it is reported as lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from .errors import MetadataError, SuperblockLost
from .last_commit import LastCommit, doubt_superblock, find_last_commit, superblock_of
from .layout import (
    DATA_BLOCK_LIMIT,
    DEVICE_ID_LIMIT,
    KEY_LIMIT,
    TIME_BITS,
    TIME_LIMIT,
    U64Array,
)
from .lost_nodes import LostNodes
from .mend import set_times_right
from .pool_build import BuildReport, PoolBuilder, PoolFields
from .problems import Fault
from .recount import recount
from .store import BlockStore
from .superblock import Superblock, read_superblock
from .tree_salvage import Substitutes, TreeSalvage
from .walk import listed_roots, salvage

_TIME_MASK = np.uint64(TIME_LIMIT - 1)


@dataclass(frozen=True, slots=True)
class Known:
    """What the operator knows of a pool whose superblock is lost; overrules what is found."""

    data_block_sectors: int | None = None
    data_blocks: int | None = None
    transaction_id: int | None = None


class Outcome(Enum):
    """How a device came out; the value completes "device 3 ..."."""

    WHOLE = "is complete"
    FOUND = "is complete; its tree was found by scanning"
    GUESSED = "was found by scanning; which device it is, or of which moment, is a guess"
    SUSPECT = (
        "can be read, but its record or the space map contradicts it: part of it may be older than the rest"
    )
    DAMAGED = "has lost blocks"
    GONE = "is lost"


@dataclass(frozen=True, slots=True)
class DeviceOutcome:
    """One device. `recorded_blocks`: what its record says, None where that is lost. `lost`: half-open, at most."""

    device: int
    outcome: Outcome
    mapped_blocks: int
    recorded_blocks: int | None
    lost: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What came of it. `remarks`: what else was lost or had to be assumed."""

    devices: tuple[DeviceOutcome, ...]
    remarks: tuple[str, ...]
    built: BuildReport

    @property
    def lossless(self) -> bool:
        """Whether every device is complete and certain."""
        return all(each.outcome in (Outcome.WHOLE, Outcome.FOUND) for each in self.devices)


def repair(source: BlockStore, target: BlockStore, known: Known | None = None) -> RepairReport:
    """Write everything that can be saved of `source` over the whole of `target`.

    Raises:
        SuperblockLost: it is, and `known` does not tell the size of data blocks.
        OutOfRange: the size of data blocks is impossible.
        MetadataFull: the target is too small.
        OSError: the target cannot be written. What cannot be read of the source is lost, not an error.
    """
    report = _Repair(source, known or Known()).run(target)
    corrected = set_times_right(target)
    remarks = [
        f"device {device}: its record was older than its mappings; its time of the last snapshot is set anew"
        for device in corrected
    ]
    return replace(report, remarks=(*report.remarks, *remarks))


@dataclass(slots=True)
class _Device:
    root: int | None
    record: tuple[int, int, int, int] | None
    outcome: Outcome = Outcome.WHOLE
    substitutes: Substitutes = field(default_factory=dict)


class _Repair:
    def __init__(self, source: BlockStore, known: Known) -> None:
        self._source = source
        self._known = known
        self._remarks: list[str] = []
        self._devices: dict[int, _Device] = {}
        self._found: LastCommit | None = None
        self._confirmed = True
        self._doubtful: U64Array = np.empty(0, np.uint64)

    def run(self, target: BlockStore) -> RepairReport:
        superblock = self._superblock()
        self._list_devices(superblock)
        self._look_for_the_lost(superblock)
        self._doubt()
        data_blocks = superblock.data_space.blocks
        if not data_blocks:
            data_blocks = self._highest_block() + 1
            self._remarks.append(
                f"the size of the data is not known; {data_blocks} blocks are in use at least"
            )
        fields = PoolFields(
            superblock.data_block_sectors,
            data_blocks,
            superblock.time,
            superblock.transaction_id,
            uuid=superblock.uuid,
        )
        builder = PoolBuilder(target, fields)
        outcomes = [self._copy(builder, number, fields) for number in sorted(self._devices)]
        return RepairReport(tuple(outcomes), tuple(self._remarks), builder.finish())

    def _highest_block(self) -> int:
        """The highest data block that any device names, 0 where none does."""
        highest = 0
        for device in self._devices.values():
            if device.root is not None:
                for _, values in TreeSalvage(self._source, device.root, device.substitutes).mappings():
                    highest = max(highest, int(values.max(initial=0)) >> TIME_BITS)
        return highest

    # Superblock

    def _superblock(self) -> Superblock:
        known = self._known
        try:
            found = read_superblock(self._source)
        except (MetadataError, OSError) as error:
            self._remarks.append(f"the superblock is lost: {error}")
            found = self._found_superblock()
        else:
            found = self._doubted(found)
        blocks = found.data_space.blocks if known.data_blocks is None else known.data_blocks
        return replace(
            found,
            data_block_sectors=known.data_block_sectors or found.data_block_sectors,
            data_space=replace(found.data_space, blocks=min(blocks, DATA_BLOCK_LIMIT)),
            transaction_id=found.transaction_id if known.transaction_id is None else known.transaction_id,
            time=min(found.time, TIME_LIMIT - 1),
        )

    def _found_superblock(self) -> Superblock:
        """A superblock around the last state that a scan finds."""
        found = find_last_commit(self._source)
        if found.base is None and self._known.data_block_sectors is None:
            raise SuperblockLost("the size of its data blocks")
        self._go_by(found)
        return superblock_of(found, self._known.data_block_sectors or 0)

    def _doubted(self, superblock: Superblock) -> Superblock:
        """The superblock as it is, unless neither of its lists will do."""
        found = doubt_superblock(self._source, superblock)
        if found is None or found.state is None:
            return superblock
        if found.state.superblock == superblock:
            self._remarks.append(
                "both lists of devices are damaged; other commits tell which roots are whose"
            )
        else:
            self._remarks.append("the superblock is older than what a later commit wrote; that one is used")
        self._go_by(found)
        made = superblock_of(found, superblock.data_block_sectors)
        return made if made.data_space.blocks else replace(made, data_space=superblock.data_space)

    def _go_by(self, found: LastCommit) -> None:
        self._source, self._found = found.store, found
        if found.whole:
            self._remarks.append(
                f"{len(found.whole) + 1} whole states of the pool were found; "
                + (
                    "the format itself says which is the latest"
                    if found.proven
                    else "the one that looks newest is used"
                )
            )

    # Devices

    def _list_devices(self, superblock: Superblock) -> None:
        if self._found is not None:
            self._list_found(self._found)
        else:
            self._list_by(superblock)
        for device in [device for device in self._devices if device >= DEVICE_ID_LIMIT]:
            self._remarks.append(f"device {device} has an impossible number and is left out")
            del self._devices[device]

    def _list_by(self, superblock: Superblock) -> None:
        ids, roots, all_roots = listed_roots(self._source, superblock.mapping_root)
        record_ids, records, all_records = salvage(self._source, 24, superblock.details_root)
        if not all_roots:
            self._remarks.append("the tree that lists the devices' mappings is damaged")
        if not all_records:
            self._remarks.append(
                "the tree of device records is damaged; where one is lost its times are set anew"
            )
        for device, root in zip(ids.tolist(), roots.tolist(), strict=True):
            self._devices[device] = _Device(root, None)
        for device, record in zip(record_ids.tolist(), records.tolist(), strict=True):
            self._devices.setdefault(device, _Device(None, None)).record = record

    def _list_found(self, found: LastCommit) -> None:
        """The devices of a state that was put together: each of them a guess, for another state may be the last."""
        state = found.state
        if state is None:
            return
        for device, root in state.devices().items():
            self._devices[device] = _Device(root, state.record(device), Outcome.GUESSED)
        for device in [] if state.records is None else state.records.keys.tolist():
            self._devices.setdefault(device, _Device(None, state.record(device), Outcome.GUESSED))

    def _look_for_the_lost(self, superblock: Superblock) -> None:
        """Roots of devices without one, and what damaged nodes led to."""
        trees = {number: device.root for number, device in self._devices.items() if device.root is not None}
        lost = LostNodes(self._source, superblock, trees)
        wanted = {
            number: device.record[0]
            for number, device in self._devices.items()
            if device.root is None and device.record is not None
        }
        complete = listed_roots(self._source, superblock.mapping_root)[2] and not self._roots_were_named
        # Records that cannot all be read do not tell of an entry that the list has lost.
        complete = complete and (
            salvage(self._source, 24, superblock.details_root)[2] or self._found is not None
        )
        if wanted or not complete:
            self._adopt_roots(lost, wanted)
        self._replace_stale_roots(lost)
        substitutes = lost.substitutes()
        for device in self._devices.values():
            device.substitutes = substitutes

    @property
    def _roots_were_named(self) -> bool:
        return self._found is not None and self._found.state is not None and self._found.state.named

    def _adopt_roots(self, lost: LostNodes, wanted: Mapping[int, int]) -> None:
        found = lost.roots_for(wanted)
        for number, root in found.certain.items():
            self._devices[number].root = root
            self._devices[number].outcome = Outcome.FOUND
        nameless = list(found.nameless)
        for number, root in found.guessed.items():
            if self._found is not None and self._root_of(number) is not None:
                nameless.append(root)
                continue
            device = self._devices.setdefault(number, _Device(None, None))
            if device.root is not None:
                device.record = None  # of an earlier state, as the root was that is replaced here
            device.root, device.outcome = root, Outcome.GUESSED
        earlier = {number: device.root for number, device in self._devices.items() if device.root is not None}
        for root in nameless:
            nearest = lost.nearest(root, earlier) if self._found is None else None
            if nearest is not None and self._devices[nearest].outcome is Outcome.GUESSED:
                self._devices[nearest] = _Device(root, None, Outcome.GUESSED)
                continue
            self._devices[max(self._devices, default=-1) + 1] = _Device(root, None, Outcome.GUESSED)
        for number in wanted.keys() - found.certain.keys() - found.guessed.keys():
            self._devices[number].outcome = Outcome.GONE if wanted[number] else Outcome.FOUND

    def _root_of(self, number: int) -> int | None:
        return self._devices[number].root if number in self._devices else None

    def _replace_stale_roots(self, lost: LostNodes) -> None:
        """A list of roots may be older than the records: where a root of the recorded size is around, it is the one."""
        stale = {
            number: device.record[0]
            for number, device in self._devices.items()
            if device.record is not None and lost.mapped.get(number, device.record[0]) != device.record[0]
        }
        if stale:
            for number, root in lost.roots_for(stale).certain.items():
                self._devices[number].root = root
                self._devices[number].outcome = Outcome.FOUND

    def _doubt(self) -> None:
        """Whether mappings and the data space map agree; where not, a node may be older than the pool.

        Blocks that are named oftener than counted cast doubt on who names them, any disagreement on devices that no
        record confirms: also one of the metadata's map, for a node that lost a child others share leaves the data's
        counts as they are.
        """
        problems = recount(self._source)
        wrong = [problem for problem in problems if problem.place.structure.startswith("data space map")]
        self._confirmed = not any("space map" in problem.place.structure for problem in problems)
        low = [
            np.arange(problem.first, problem.first + problem.count, dtype=np.uint64)
            for problem in wrong
            if problem.fault is Fault.COUNT_LOW
        ]
        self._doubtful = np.concatenate([self._doubtful, *low])

    # Copying

    def _copy(self, builder: PoolBuilder, number: int, fields: PoolFields) -> DeviceOutcome:
        device = self._devices[number]
        time = fields.time
        recorded = None if device.record is None else device.record[0]
        # Without a record: as if snapshotted just now, so that every older mapping counts as shared.
        _, transaction_id, created, snapshotted = device.record or (0, fields.transaction_id, 0, time)
        if not created <= snapshotted <= time:
            created, snapshotted = min(created, time), time
        builder.begin_device(number, transaction_id, created, snapshotted)
        doubtful = device.record is None and not self._confirmed
        mapped, lost = 0, [(0, KEY_LIMIT)] if device.root is None and recorded else []
        if device.root is not None:
            tree = TreeSalvage(self._source, device.root, device.substitutes)
            for keys, values in tree.mappings():
                kept = self._usable(keys, values, fields, tree)
                builder.add(
                    keys[kept], values[kept] & ~np.where(_late(values[kept], time), _TIME_MASK, np.uint64(0))
                )
                mapped += int(np.count_nonzero(kept))
                doubtful = doubtful or bool(np.isin(values >> np.uint64(TIME_BITS), self._doubtful).any())
            lost = tree.lost
            if recorded is not None and mapped < recorded and not lost:
                lost = [(node.begin, node.last + 1) for node in tree.damaged]
        builder.end_device()
        outcome = _outcome(device, mapped, recorded, lost)
        if doubtful and outcome in (Outcome.WHOLE, Outcome.FOUND):
            outcome = Outcome.SUSPECT
        return DeviceOutcome(number, outcome, mapped, recorded, tuple(lost))

    def _usable(self, keys: U64Array, values: U64Array, fields: PoolFields, tree: TreeSalvage) -> np.ndarray:
        inside: np.ndarray = (values >> np.uint64(TIME_BITS)) < np.uint64(fields.data_blocks)
        for key in keys[~inside].tolist():
            tree.lose(key, key)
        return inside


def _late(values: U64Array, time: int) -> np.ndarray:
    late: np.ndarray = (values & _TIME_MASK) > np.uint64(time)
    return late


def _outcome(device: _Device, mapped: int, recorded: int | None, lost: list[tuple[int, int]]) -> Outcome:
    if device.outcome is Outcome.GONE:
        return Outcome.GONE
    if lost:
        return Outcome.DAMAGED
    if device.outcome is Outcome.GUESSED:
        return Outcome.GUESSED
    if recorded is not None and recorded != mapped:
        return Outcome.SUSPECT
    return device.outcome

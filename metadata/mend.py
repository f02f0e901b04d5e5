"""Setting right in place what a check can work out again by itself: counts, figures beside them, device records.

In: deciding whether that is possible, writing both space maps anew, correcting records. Out: finding what is wrong
(recount), pools of which something cannot be read (they are copied, never changed).

Everything new goes to blocks that nothing refers to, by what was found and not by what the old map says. A flush, the
superblock, a flush: a power cut leaves the pool as it was before or as it is afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .errors import MetadataFull
from .layout import (
    BLOCK_BYTES,
    COUNT_OVERFLOW,
    NEEDS_CHECK_FLAG,
    SUPERBLOCK_LOCATION,
    TIME_LIMIT,
    U32Array,
    bitmaps_for,
)
from .pool_metadata import PoolMetadata
from .problems import Fault, Problem, Severity
from .recount import Recount, recount
from .space_map_build import SpaceMapBuilder
from .store import BlockStore
from .superblock import Superblock, check_acceptable, read_superblock
from .survey import Owner
from .tree_build import BlockSink

_MAP_OWNERS = (Owner.INDEX, Owner.BITMAP, Owner.DATA_INDEX, Owner.DATA_OVERFLOW, Owner.METADATA_OVERFLOW)
_MAP_STRUCTURES = ("data space map", "metadata space map")
# What a space map can be damaged by that counting anew does away with; a block that two structures use is not of it.
_MAP_FAULTS = frozenset(
    {
        Fault.UNREADABLE,
        Fault.TOO_DEEP,
        Fault.UNDERFULL,
        Fault.BELOW_RANGE,
        Fault.ABOVE_RANGE,
        Fault.UNEVEN,
        Fault.NO_BITMAP,
        Fault.COUNT_LOW,
        Fault.NO_OVERFLOW,
        Fault.MORE,
    }
)
_RECORD_FAULTS = (Fault.MAPPED_BLOCKS, Fault.RECORD_TIME, Fault.SHARED_AS_OWN)


def mendable(problems: Sequence[Problem]) -> bool:
    """Whether `mend` can set all of this right: trees of devices and records are whole."""
    return all(
        problem.severity < Severity.ERROR
        or problem.fault in _RECORD_FAULTS
        or (problem.fault in _MAP_FAULTS and problem.place.structure.startswith(_MAP_STRUCTURES))
        for problem in problems
    )


def mend(store: BlockStore) -> list[Problem]:
    """Count anew and correct records; what is wrong afterwards, nothing as a rule.

    Nothing else may read or write the store meanwhile. Where something is not mendable nothing is written.

    Raises:
        NotPoolMetadata, BlockDamaged, UnsupportedPool: the superblock is not usable.
        MetadataFull: not enough neighbouring free blocks for new space maps; nothing was changed.
        OSError: as the store raises it; the pool is as it was.
    """
    superblock = read_superblock(store)
    check_acceptable(superblock, writable=True)
    audit = Recount(store)
    problems = audit.run()
    if not problems or not mendable(problems):
        return problems
    if any(problem.fault not in _RECORD_FAULTS for problem in problems):
        _write_space_maps(store, superblock, audit)
    if any(problem.fault in _RECORD_FAULTS for problem in problems):
        _correct_records(store, problems)
    return recount(store)


def set_times_right(store: BlockStore) -> list[int]:
    """Raise snapshot times by which the kernel would write into shared blocks; of these devices, ascending.

    What else is wrong stays. Raises as `mend`.
    """
    wrong = [problem for problem in recount(store) if problem.fault is Fault.SHARED_AS_OWN]
    if wrong:
        _correct_records(store, wrong)
    return sorted(problem.affects[0].device for problem in wrong)


def clear_needs_check(store: BlockStore) -> None:
    """Clear the flag that keeps a pool from being activated. Raises as `mend`."""
    superblock = read_superblock(store)
    check_acceptable(superblock, writable=True)
    store.write(SUPERBLOCK_LOCATION, replace(superblock, flags=superblock.flags & ~NEEDS_CHECK_FLAG).pack())
    store.flush()


def _write_space_maps(store: BlockStore, superblock: Superblock, audit: Recount) -> None:
    blocks = superblock.metadata_space.blocks
    used = audit.metadata_references()
    kept = used.copy()
    kept[np.isin(audit.metadata_owners(), _MAP_OWNERS)] = 0
    sink = BlockSink(store, _longest_free_run(used, _blocks_needed(superblock, kept, audit)))
    maps = SpaceMapBuilder(sink)
    data_space = maps.data_space(superblock.data_space.blocks, audit.data_references)
    metadata_space = maps.metadata_space(blocks, kept)
    sink.flush()
    store.flush()
    written = replace(superblock, data_space=data_space, metadata_space=metadata_space).pack()
    assert len(written) == BLOCK_BYTES
    store.write(SUPERBLOCK_LOCATION, written)
    store.flush()


def _blocks_needed(superblock: Superblock, kept: U32Array, audit: Recount) -> int:
    """An upper bound of the blocks of both maps."""
    data, metadata = bitmaps_for(superblock.data_space.blocks), bitmaps_for(superblock.metadata_space.blocks)
    exact = int(np.count_nonzero(kept >= COUNT_OVERFLOW))
    for number in range(data):
        chunk = audit.data_references(number)
        exact += 0 if chunk is None else int(np.count_nonzero(chunk >= COUNT_OVERFLOW))
    # Leaves of 336 counts or 168 records are at least a third full.
    return data + metadata + exact // 112 + data // 56 + 16


def _longest_free_run(used: U32Array, needed: int) -> int:
    """Where the longest run of unused blocks begins. Raises MetadataFull."""
    edges = np.flatnonzero(np.diff(np.concatenate([[1], (used != 0).astype(np.int8), [1]])))
    begins, ends = edges[0::2], edges[1::2]
    lengths = ends - begins
    longest = int(lengths.max()) if len(lengths) else 0
    if longest < needed:
        raise MetadataFull(needed, longest, 0)
    return int(begins[int(lengths.argmax())])


def _correct_records(store: BlockStore, problems: Sequence[Problem]) -> None:
    pool = PoolMetadata.open(store)
    for problem in problems:
        if problem.fault not in _RECORD_FAULTS or problem.place.held:
            continue
        device = problem.affects[0].device
        record = pool.device(device)
        if problem.fault is Fault.MAPPED_BLOCKS:
            assert problem.expected is not None
            record = replace(record, mapped_blocks=problem.expected)
        elif problem.fault is Fault.SHARED_AS_OWN:
            assert problem.expected is not None
            # As after a snapshot: the pool's clock is never behind a record.
            time = min(problem.expected, TIME_LIMIT - 1)
            record = replace(record, snapshotted_time=max(record.snapshotted_time, time))
            pool.state.superblock = replace(pool.superblock, time=max(pool.time, time))
        else:
            # The pool's time is safe: a mapping older than this counts as shared, which costs a copy at most.
            time = min(pool.time, TIME_LIMIT - 1)
            record = replace(record, snapshotted_time=time, creation_time=min(record.creation_time, time))
        pool.state.devices.set(record)
    pool.commit()

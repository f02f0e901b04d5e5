"""Whether the times in a pool say of every shared block that it is shared.

In: the rule, and finding the mappings that break it, from what a survey learnt and what is noted while it reads leaves.
Out: reading trees (survey), counting (recount), correcting records (mend).

The kernel looks at no count when it decides whether a write needs a copy: a mapping is taken for shared if it is older
than the last snapshot of its device (dm-thin-metadata.c, `__snapshotted_since`), and for the device's own if not. So a
record whose snapshot time is too low lets a write go into a block that a snapshot has too, and no figure disagrees with
any other. What must hold: a mapping that is reached through a node with several references, or names a data block with
several, is older than the snapshot time of every device that has it.

Mappings of the metadata snapshot do not count here: it keeps metadata from changing, not data.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .errors import MetadataError
from .layout import ENTRIES_PER_BITMAP, TIME_BITS, TIME_LIMIT, U8Array, U32Array, U64Array
from .node import Node, decode_node
from .node_batch import Leaves
from .store import BlockStore
from .survey import PlaceOf, Survey

_TIME_BITS = np.uint64(TIME_BITS)
_TIME_MASK = np.uint64(TIME_LIMIT - 1)
# Linux MAP_NORESERVE: a flag a data block of a huge, mostly unused data space must not weigh on overcommit limits.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclass(frozen=True, slots=True)
class OwnedWrongly:
    """Mappings of a device that are shared and not older than its snapshot time.

    Attributes:
        device: whose they are.
        begin, end: the first of them and the place behind the last; others lie between.
        time: of the youngest.
        since: the device's snapshot time.
        path: metadata blocks from the root to the first.
    """

    device: int
    begin: int
    end: int
    time: int
    since: int
    path: tuple[int, ...]


class SharingTimes:
    """What is noted while leaves are read, and the judgement afterwards.

    `snapshot_times` are those of the records, by device; a device without record is left out.
    """

    def __init__(self, data_blocks: int, snapshot_times: Mapping[int, int]) -> None:
        memory = mmap.mmap(-1, max(data_blocks, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        # 1 for a data block of which some device thinks that it is its own.
        self._own: U8Array = np.frombuffer(memory, np.uint8, data_blocks)
        self._times = snapshot_times

    def note(self, leaves: Leaves, place_of: PlaceOf) -> None:
        """Take down leaves read for the first time, all of one device, or each a device's root."""
        positions = leaves.positions.tolist()
        devices = [place_of(position).device for position in (positions[0], positions[-1])]
        if devices[0] == devices[1]:
            self._note(leaves.values, devices[0])
            return
        begin = 0
        for position, end in zip(positions, leaves.ends.tolist(), strict=True):
            self._note(leaves.values[begin:end], place_of(position).device)
            begin = end

    def _note(self, values: U64Array, device: int | None) -> None:
        since = None if device is None else self._times.get(device)
        if since is None:
            return
        blocks = values >> _TIME_BITS
        own = (values & _TIME_MASK) >= np.uint64(since)
        own &= blocks < np.uint64(len(self._own))
        self._own[(blocks if own.all() else blocks[own]).astype(np.int64)] = 1

    def judge(
        self,
        survey: Survey,
        roots: Mapping[int, int],
        references: Callable[[int], U32Array | None],
        bitmaps: int,
    ) -> Iterator[OwnedWrongly]:
        """Yield what breaks the rule, at most one range a device. Every mapping was noted before.

        Args:
            survey: what was learnt of the nodes of the live trees, and of nothing else.
            roots: of the devices' trees.
            references: to the data blocks of a bitmap, shape (16320,), None for none; of the live trees too.
            bitmaps: how many there are.
        """
        shared = self._shared_and_own(references, bitmaps)
        for device, root in roots.items():
            since = self._times.get(device)
            if since is not None:
                found = list(_Judgement(survey, device, since, shared).run(root))
                if found:
                    yield _joined(found)

    def _shared_and_own(self, references: Callable[[int], U32Array | None], bitmaps: int) -> U64Array:
        """Data blocks with several references that some device takes for its own, ascending."""
        found = [np.empty(0, np.uint64)]
        for number in range(bitmaps):
            counts = references(number)
            if counts is None:
                continue
            first = number * ENTRIES_PER_BITMAP
            own = self._own[first : first + ENTRIES_PER_BITMAP]
            places = np.flatnonzero((counts[: len(own)] > 1) & (own != 0))
            found.append(places.astype(np.uint64) + np.uint64(first))
        return np.concatenate(found)


class _Judgement:
    """One device: down all paths on which something is not older than its snapshot time."""

    def __init__(self, survey: Survey, device: int, since: int, shared: U64Array) -> None:
        self._survey = survey
        self._store: BlockStore = survey.store
        self._device = device
        self._since = since
        self._shared = shared

    def run(self, root: int) -> Iterator[OwnedWrongly]:
        stack: list[tuple[int, tuple[int, ...], bool]] = [(root, (), False)]
        seen: set[int] = set()  # a damaged tree may meet itself
        while stack:
            location, above, shared = stack.pop()
            if location in seen:
                continue
            seen.add(location)
            latest = self._survey.latest(location)
            if latest is None or latest < self._since:
                continue
            path = (*above, location)
            shared = shared or int(self._survey.references[location]) > 1
            if self._survey.is_leaf(location) and not shared and not len(self._shared):
                continue
            try:
                node = self._read(location)
            except (MetadataError, OSError):
                continue  # it was readable a moment ago; what it is like now is for the next check
            if node.leaf:
                yield from self._leaf(node, path, shared=shared)
            else:
                stack += [(child, path, shared) for child in reversed(node.values.tolist())]

    def _read(self, location: int) -> Node:
        return decode_node(self._store.read(location, 1), location)

    def _leaf(self, node: Node, path: tuple[int, ...], *, shared: bool) -> Iterator[OwnedWrongly]:
        times = node.values & _TIME_MASK
        wrong = times >= np.uint64(self._since)
        if not shared:
            wrong &= np.isin(node.values >> _TIME_BITS, self._shared)
        if wrong.any():
            keys = node.keys[wrong]
            yield OwnedWrongly(
                self._device, int(keys[0]), int(keys[-1]) + 1, int(times[wrong].max()), self._since, path
            )


def _joined(found: list[OwnedWrongly]) -> OwnedWrongly:
    first = found[0]
    return OwnedWrongly(
        first.device, first.begin, found[-1].end, max(each.time for each in found), first.since, first.path
    )

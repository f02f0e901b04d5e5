"""Comparing a space map with the references that were found: every bitmap, every exact count, every figure.

In: one space map against an array of references. Out: finding the references (survey, recount).

The figures beside the counts (free blocks of a bitmap, where its first free block may be, blocks in use altogether)
are redundant; a wrong one is a hint. The number of free blocks of the last, partial bitmap counts the whole bitmap in
kernel-made pools and only existing blocks in those of thin_restore 0.9; both are accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .bitmap import decode_bitmap
from .errors import BlockDamaged
from .layout import COUNT_OVERFLOW, ENTRIES_PER_BITMAP, U32Array, U64Array, ValueArray, bitmaps_for
from .node_batch import ReadFault, fault_text, read_blocks
from .problems import Fault, Place, Problem, Severity
from .superblock import SpaceMapRoot
from .survey import Owner, Survey

_BITMAPS_AT_ONCE = 256
# Records of one kind for one space; a garbled map must not produce millions.
_RECORDS_MAX = 1000
_EMPTY_BITMAP = bytes(ENTRIES_PER_BITMAP // 4)

# References to the blocks of a chunk of 16320 blocks, shape (16320,), None when there are none.
References = Callable[[int], U32Array | None]


@dataclass(frozen=True, slots=True)
class SpaceMap:
    """One space map as read: `numbers` and `records` from its index, `blocks` and `counts` from the overflow tree.

    `complete` says whether both could be read entirely, `trusted` whether all references are known.
    """

    place: Place
    root: SpaceMapRoot
    numbers: U64Array
    records: ValueArray
    blocks: U64Array
    counts: U32Array
    complete: bool


@dataclass(slots=True)
class SpaceAudit:
    """Audits one space map. First `claim` its bitmaps, then (when all is claimed) `compare`."""

    survey: Survey
    space: SpaceMap
    _owned: NDArray[np.bool_] = field(init=False)
    _reports: dict[Fault, int] = field(init=False, default_factory=dict)
    _unverified: int = field(init=False, default=0)

    def claim(self) -> None:
        """Check that the index names exactly the bitmaps there should be, and count references to them."""
        space = self.space
        wanted = bitmaps_for(space.root.blocks)
        inside = space.numbers < wanted
        extra = int(np.count_nonzero(~inside))
        if extra:
            self._report(Severity.HINT, Fault.EXTRA_BITMAP, f"{extra} of them")
        missing = wanted - int(np.count_nonzero(inside))
        if missing and space.complete:
            self._report(Severity.ERROR, Fault.NO_BITMAP, f"{missing} of {wanted}")
        self._owned = self.survey.claim(Owner.BITMAP, space.records["location"], self._place)
        self._owned &= inside

    def _place(self, position: int) -> Place:
        number = int(self.space.numbers[position])
        begin = number * ENTRIES_PER_BITMAP
        location = int(self.space.records["location"][position])
        return self.space.place.child(location, begin, begin + ENTRIES_PER_BITMAP)

    def compare(self, references: References, *, trusted: bool) -> None:
        """Compare all bitmaps with the references found. `trusted`: references cannot have been overlooked."""
        used = 0
        all_read = self.space.complete and bool(self._owned.all())
        for position, raw in self._bitmaps():
            if isinstance(raw, bytes):
                used += self._compare_bitmap(position, raw, references, trusted)
            else:
                all_read = False
                self.survey.error(Fault.UNREADABLE, self._place(position), fault_text(raw))
        if all_read and used != self.space.root.allocated:
            self._figure(Fault.ALLOCATED, self.space.place, used, self.space.root.allocated)
        if self._unverified:
            detail = (
                f"{self._unverified} blocks count for more than was found, but not everything could be read"
            )
            self._report(Severity.LEAK, Fault.UNVERIFIED, detail)

    def _bitmaps(self) -> Iterator[tuple[int, bytes | ReadFault]]:
        positions = np.flatnonzero(self._owned)
        for start in range(0, len(positions), _BITMAPS_AT_ONCE):
            part = positions[start : start + _BITMAPS_AT_ONCE]
            raw, faults = read_blocks(self.survey.store, self.space.records["location"][part])
            size = len(raw) // len(part)
            for number, position in enumerate(part.tolist()):
                yield position, faults.get(number) or raw[number * size : (number + 1) * size]

    def _compare_bitmap(self, position: int, raw: bytes, references: References, trusted: bool) -> int:
        """Compare one bitmap; returns how many of its blocks are in use."""
        space = self.space
        place = self._place(position)
        try:
            bitmap = decode_bitmap(raw, place.path[-1])
        except BlockDamaged as damage:
            self.survey.error(Fault.UNREADABLE, place, fault_text(damage))
            return 0
        found = references(place.begin // ENTRIES_PER_BITMAP)
        low, high = space.blocks.searchsorted(np.array([place.begin, place.end], np.uint64)).tolist()
        record = space.records[position]
        width = min(ENTRIES_PER_BITMAP, space.root.blocks - place.begin)
        if found is None and low == high and raw[16:] == _EMPTY_BITMAP:
            self._check_figures(place, record, 0, 0, width)
            return 0
        stored = bitmap.counts.copy()
        unknown = self._put_overflow(place, stored, slice(low, high))
        in_use = stored != 0
        self._check_figures(
            place,
            record,
            int(np.count_nonzero(in_use)),
            int(np.argmin(in_use[:width])),
            width,
            full=bool(in_use[:width].all()),
        )
        if in_use[width:].any():
            self._report(Severity.LEAK, Fault.TAIL, f"{np.count_nonzero(in_use[width:])} of them", place)
        wanted = np.zeros(ENTRIES_PER_BITMAP, np.uint32) if found is None else found
        wrong = (stored != wanted) & ~unknown
        wrong[width:] = False
        if wrong.any():
            self._compare_counts(place, np.flatnonzero(wrong), stored, wanted, trusted)
        return int(np.count_nonzero(in_use[:width]))

    def _put_overflow(self, place: Place, stored: U32Array, span: slice) -> NDArray[np.bool_]:
        """Fill exact counts into `stored`; which blocks lack theirs."""
        space = self.space
        needed = stored == COUNT_OVERFLOW
        at = (space.blocks[span] - np.uint64(place.begin)).astype(np.int64)
        for block in at[~needed[at]].tolist():
            self._report(Severity.HINT, Fault.EXTRA_OVERFLOW, "", place, first=place.begin + block)
        unknown: NDArray[np.bool_] = needed.copy()
        unknown[at] = False
        if space.complete:
            for block in np.flatnonzero(unknown).tolist():
                self._report(Severity.ERROR, Fault.NO_OVERFLOW, "", place, first=place.begin + block)
        exact = at[needed[at]]
        stored[exact] = space.counts[span][needed[at]]
        return unknown

    def _check_figures(
        self, place: Place, record: np.void, used: int, first_free: int, width: int, *, full: bool = False
    ) -> None:
        free = int(record["free"])
        expected = ENTRIES_PER_BITMAP - used
        if free not in (expected, width - used):
            self._figure(Fault.FREE_BLOCKS, place, expected, free)
        if not full and int(record["none_free_before"]) > first_free:
            self._figure(Fault.FIRST_FREE, place, first_free, int(record["none_free_before"]))

    def _compare_counts(
        self, place: Place, wrong: NDArray[np.int64], stored: U32Array, wanted: U32Array, trusted: bool
    ) -> None:
        """Report blocks whose count is wrong, neighbours with the same figures as one."""
        have, want = stored[wrong], wanted[wrong]
        broken = (np.diff(wrong) != 1) | (np.diff(have) != 0) | (np.diff(want) != 0)
        starts = [0, *(np.flatnonzero(broken) + 1).tolist(), len(wrong)]
        for start, stop in pairwise(starts):
            count, uses = int(have[start]), int(want[start])
            first = place.begin + int(wrong[start])
            if count < uses:
                fault, severity = Fault.COUNT_LOW, Severity.ERROR
            elif trusted:
                fault = Fault.COUNT_HIGH if uses else Fault.COUNT_LEAK
                severity = Severity.LEAK
            else:
                self._unverified += stop - start
                continue
            self._report(
                severity, fault, "", place, first=first, count=stop - start, expected=uses, found=count
            )

    def _figure(self, fault: Fault, place: Place, expected: int, found: int) -> None:
        self._report(Severity.HINT, fault, "", place, count=0, expected=expected, found=found)

    def _report(
        self,
        severity: Severity,
        fault: Fault,
        detail: str,
        place: Place | None = None,
        *,
        first: int | None = None,
        count: int = 1,
        expected: int | None = None,
        found: int | None = None,
    ) -> None:
        done = self._reports[fault] = self._reports.get(fault, 0) + 1
        place = place or self.space.place
        if done > _RECORDS_MAX:
            if done == _RECORDS_MAX + 1:
                self.survey.report(Problem(severity, Fault.MORE, self.space.place, fault.value))
            return
        count = 0 if first is None else count
        self.survey.report(
            Problem(severity, fault, place, detail, first or 0, count, expected=expected, found=found)
        )

"""Which of two states of a pool is the later one, by what the format allows to happen between two commits.

In: comparing states. Out: finding them (commit_candidate).

Theory of operation. A superblock says which commit was the last; without it two states can both be whole, and each
may have what the other has not: what the later one added, what the later one removed. Four things tell which is which:

1. A block that one state refers to and that now holds what the other refers to was overwritten by the other. Only the
   later of two states can have done so.
2. A mapping carries the time of the pool's clock when it was made, and the clock only goes forward. A mapping that one
   state has and the other has not, made before the other's clock, was removed later: the other is the later state.
3. So does a device's record: a device made before the other's clock and missing there was deleted later, and the
   times of a device that both have only grow.
4. Where nothing of this tells, clocks, and the order in which free blocks are handed out: from the lowest on, or
   onwards from the last. Blocks that both states leave free below those that one of them took had been free for the
   other as well, and would have been taken first.

The first three are consequences of the format. The last is a habit of the known implementations.
"""

from __future__ import annotations

import numpy as np

from .commit_candidate import CommitCandidate
from .commit_clues import CommitClues
from .layout import TIME_LIMIT, U64Array
from .tree_summary import DeviceTrees

_TIME_MASK = np.uint64(TIME_LIMIT - 1)


class CommitOrder:
    """Compares states of one store."""

    def __init__(self, clues: CommitClues, trees: DeviceTrees) -> None:
        self._clues = clues
        self._trees = trees

    def newest_first(self, states: list[CommitCandidate]) -> list[CommitCandidate]:
        """States by the number of others they are later than, then by what is left of them."""
        later = {id(state): 0 for state in states}
        for number, one in enumerate(states):
            for other in states[:number]:
                verdict = self.compare(one, other)
                if verdict:
                    later[id(one if verdict > 0 else other)] += 1
        return sorted(
            states,
            key=lambda state: (state.roots is not None, later[id(state)], state.right, *state.place),
            reverse=True,
        )

    def compare(self, one: CommitCandidate, other: CommitCandidate) -> int:
        """Above 0 where `one` is the later state, below where `other` is, 0 where nothing tells."""
        for evidence in (self._overwritten, self._removed, self._outlived, self._clock, self._passed_over):
            difference = evidence(one, other) - evidence(other, one)
            if difference:
                return difference
        return 0

    def proven(self, one: CommitCandidate, other: CommitCandidate) -> bool:
        """Whether the format itself says that `one` is the later state."""
        for evidence in (self._overwritten, self._removed, self._outlived):
            difference = evidence(one, other) - evidence(other, one)
            if difference:
                return difference > 0
        return False

    def overwrote(self, later: CommitCandidate, earlier: CommitCandidate) -> bool:
        """Whether blocks that `earlier` needs hold what is part of `later`."""
        return self._overwritten(later, earlier) > 0

    def _overwritten(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """How many blocks of `earlier` hold what belongs to `later`."""
        return sum(
            bool(later.blocks[block]) for block in earlier.broken - later.broken if block < len(later.blocks)
        )

    def _removed(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """How many mappings of `earlier` were made before the clock of `later`, and are not there any more."""
        found = 0
        after = later.devices()
        for device, root in earlier.devices().items():
            if device in after and after[device] != root and _same_device(earlier, later, device):
                found += self._gone(root, after[device], later.time)
        return found

    def _gone(self, before: int, after: int, time: int) -> int:
        """Mappings below one root, older than `time`, that are not below the other."""
        one, other = self._trees.of(before), self._trees.of(after)
        gone: set[tuple[int, int]] = set()
        for keys, values in self._clues.leaf_entries(one.reached - other.reached):
            old = ((values & _TIME_MASK) < time) & ~_within(keys, other.lost)
            gone.update(zip(keys[old].tolist(), values[old].tolist(), strict=True))
        for keys, values in self._clues.leaf_entries(other.reached - one.reached):
            gone.difference_update(zip(keys.tolist(), values.tolist(), strict=True))
        return len(gone)

    def _outlived(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """How many devices of `earlier` were deleted or got later times in `later`."""
        if later.records is None or earlier.records is None:
            return 0
        after = dict(zip(later.records.keys.tolist(), later.records.values, strict=True))
        found = 0
        for device, record in zip(earlier.records.keys.tolist(), earlier.records.values, strict=True):
            same = after.get(device)
            if same is None:
                found += int(record["creation_time"]) < later.time
            else:
                found += int(record["snapshotted_time"]) < int(same["snapshotted_time"])
        return found

    def _clock(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """Whether `later` has the later time, or, by copies of superblocks, the later transaction."""
        if later.time != earlier.time or later.superblock is None or earlier.superblock is None:
            return int(later.time > earlier.time)
        return int(later.superblock.transaction_id > earlier.superblock.transaction_id)

    def _passed_over(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """How many blocks that both leave free lie among those that `earlier` took: free when `later` was made?

        Many of them say that `earlier` did not choose among the blocks that `later` left free.
        """
        if later.counts is None or earlier.counts is None:
            return 0
        taken = np.flatnonzero(earlier.blocks & ~later.blocks)
        if not len(taken):
            return 0
        free = ~(earlier.blocks | later.blocks)
        return int(np.count_nonzero(free[: int(taken[-1])]))


def _same_device(earlier: CommitCandidate, later: CommitCandidate, device: int) -> bool:
    """Whether a number means the same device in both states, and not one that was made anew in between."""
    one, other = earlier.record(device), later.record(device)
    return one is None or other is None or (one[1], one[2]) == (other[1], other[2])


def _within(keys: U64Array, ranges: tuple[tuple[int, int], ...]) -> np.ndarray:
    inside = np.zeros(len(keys), np.bool_)
    for begin, end in ranges:
        inside |= (keys >= np.uint64(begin)) & (keys <= np.uint64(end - 1))
    return inside

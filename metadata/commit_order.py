"""Which of two states of a pool is the later one, by what the format allows to happen between two commits.

In: comparing states. Out: finding them (commit_candidate).

Theory of operation. A superblock says which commit was the last; without it two states can both be whole, and each
may have what the other has not: what the later one added, what the later one removed. The format gives three proofs:

1. A block that one state refers to and that now holds what the other refers to was overwritten by the other. Only the
   later of two states can have done so.
2. A mapping carries the time of the pool's clock when it was made, and the clock only goes forward. A mapping that one
   state has and the same device of the other has not, made before the other's clock, was removed later.
3. So does a device's record: a device made before the other's clock, or in an earlier transaction than the newest of
   the other's, and missing there, was deleted later; and the times of a device that both have only grow.

Where a pool never had a snapshot and lost no device, its clock stands still and nothing is proven: adding mappings in
one direction looks like removing them in the other. The ways of the known allocators tell then, strongest first:

4. Metadata is taken from the lowest free block on. Blocks that both states leave free, below blocks that one of them
   took, were free for that one only because the other came after it and let go of them.
5. Data is taken onwards from where it was taken last. Mappings of one state that lie above all data of the other were
   added later; those of one state alone that lie below the end of the other, which has none of its own, were removed.
6. A commit takes no block that the one before it used. Blocks that were in use two commits ago belong to the last.
7. Pools grow: the state with more mappings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from .commit_candidate import CommitCandidate
from .commit_clues import CommitClues
from .layout import TIME_BITS, TIME_LIMIT, U64Array
from .tree_summary import DeviceTrees

_TIME_MASK = np.uint64(TIME_LIMIT - 1)
_TIME_BITS = np.uint64(TIME_BITS)
_NOTHING = np.empty(0, np.uint64)
_EACH_WITH_EACH_MAX = 12
# How much speaks for the first of two states being the later one.
Evidence = Callable[[CommitCandidate, CommitCandidate], int]


class CommitOrder:
    """Compares states of one store."""

    def __init__(self, clues: CommitClues, trees: DeviceTrees) -> None:
        self._clues = clues
        self._trees = trees
        self._known: dict[tuple[tuple[int, int, int], tuple[int, int, int]], U64Array] = {}

    def newest_first(self, states: list[CommitCandidate]) -> list[CommitCandidate]:
        """States by the number of others they are later than, then by what is left of them.

        Of very many only the first is found out: by comparing each with the latest so far.
        """
        later = {id(state): 0 for state in states}
        if len(states) > _EACH_WITH_EACH_MAX:
            latest = states[0]
            for state in states[1:]:
                latest = state if self.compare(state, latest) > 0 else latest
            later[id(latest)] = 1
        else:
            for one, other in combinations(states, 2):
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
        return _first_difference((*self._proofs, *self._habits), one, other)

    def proven(self, one: CommitCandidate, other: CommitCandidate) -> bool:
        """Whether the format itself says that `one` is the later state."""
        return _first_difference(self._proofs, one, other) > 0

    @property
    def _proofs(self) -> tuple[Evidence, ...]:
        return self._overwritten, self._removed, self._outlived

    @property
    def _habits(self) -> tuple[Evidence, ...]:
        return (
            self._clock,
            self._passed_over,
            self._appended,
            self._withdrawn,
            self._reused,
            self._grown,
            self._reach,
        )

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
        values = self._only(earlier, later)
        return int(np.count_nonzero((values & _TIME_MASK) < later.time))

    def _only(self, one: CommitCandidate, other: CommitCandidate) -> U64Array:
        """Values of mappings that devices of `one` have and the same devices of `other` have not."""
        if (one.place, other.place) not in self._known:
            roots = other.devices()
            parts = [
                self._only_below(root, roots[device])
                for device, root in one.devices().items()
                if device in roots and roots[device] != root and _same_device(one, other, device)
            ]
            self._known[one.place, other.place] = np.concatenate([np.empty(0, np.uint64), *parts])
        return self._known[one.place, other.place]

    def _only_below(self, root: int, another: int) -> U64Array:
        here, there = self._trees.of(root), self._trees.of(another)
        keys, values = self._entries(here.reached - there.reached)
        other_keys, other_values = self._entries(there.reached - here.reached)
        # A key that both trees have in leaves of their own, with the same value, is no difference.
        places = np.searchsorted(other_keys, keys)
        known = places < len(other_keys)
        known[known] &= other_keys[places[known]] == keys[known]
        known[known] &= other_values[places[known]] == values[known]
        only: U64Array = values[~known & ~_within(keys, there.lost)]
        return only

    def _entries(self, blocks: frozenset[int]) -> tuple[U64Array, U64Array]:
        """Keys, ascending, and values of the leaves among blocks of one tree."""
        parts = [(_NOTHING, _NOTHING), *self._clues.leaf_entries(blocks)]
        keys = np.concatenate([keys for keys, _ in parts])
        order = np.argsort(keys, kind="stable")
        return keys[order], np.concatenate([values for _, values in parts])[order]

    def _outlived(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """How many devices of `earlier` were deleted or got later times in `later`."""
        if later.records is None or earlier.records is None:
            return 0
        after = dict(zip(later.records.keys.tolist(), later.records.values, strict=True))
        newest = int(later.records.values["transaction_id"].max(initial=0))
        found = 0
        for device, record in zip(earlier.records.keys.tolist(), earlier.records.values, strict=True):
            same = after.get(device)
            if same is None:
                found += int(record["creation_time"]) < later.time or int(record["transaction_id"]) < newest
            else:
                found += int(record["snapshotted_time"]) < int(same["snapshotted_time"])
        return found

    def _clock(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """Whether `later` has the later time, or, by copies of superblocks, the later transaction."""
        if later.time != earlier.time or later.superblock is None or earlier.superblock is None:
            return int(later.time > earlier.time)
        return int(later.superblock.transaction_id > earlier.superblock.transaction_id)

    def _passed_over(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """How many blocks that both leave free lie below blocks that `earlier` took."""
        if later.counts is None or earlier.counts is None:
            return 0
        taken = np.flatnonzero(earlier.blocks & ~later.blocks)
        free = ~(earlier.blocks | later.blocks)
        passed = int(np.count_nonzero(free[: int(taken[-1])])) if len(taken) else 0
        return passed if passed > 1 else 0  # a single one may have been taken and let go of within one commit

    def _appended(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """Whether all mappings that only `later` has lead beyond all data of `earlier`."""
        added = self._only(later, earlier) >> _TIME_BITS
        return int(len(added) > 0 and int(added.min()) > self._end(earlier))

    def _withdrawn(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """How many mappings only `earlier` has, within the data of `later`, where `later` has none of its own."""
        if len(self._only(later, earlier)):
            return 0
        return int(np.count_nonzero(self._only(earlier, later) >> _TIME_BITS <= self._end(later)))

    def _end(self, state: CommitCandidate) -> int:
        return max((self._trees.of(root).highest for root in state.devices().values()), default=0)

    def _reused(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """How many blocks that only `later` has were in use in the third state nearest to both."""
        before = [
            found.counts > 0 for found in self._clues.maps if found.root not in (later.space, earlier.space)
        ]
        if not before:
            return 0
        nearest = max(before, key=lambda used: int(np.count_nonzero(used & later.blocks & earlier.blocks)))
        return int(np.count_nonzero(nearest & later.blocks & ~earlier.blocks))

    def _grown(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """Whether `later` has more mappings."""
        sizes = [
            sum(self._trees.of(root).entries for root in state.devices().values())
            for state in (later, earlier)
        ]
        return int(sizes[0] > sizes[1])

    def _reach(self, later: CommitCandidate, earlier: CommitCandidate) -> int:
        """Whether `later` took the highest of the blocks that only one of them has."""
        taken = np.flatnonzero(later.blocks != earlier.blocks)
        return int(len(taken) > 0 and bool(later.blocks[taken[-1]]))


def _first_difference(evidence: Sequence[Evidence], one: CommitCandidate, other: CommitCandidate) -> int:
    for tells in evidence:
        difference = tells(one, other) - tells(other, one)
        if difference:
            return difference
    return 0


def _same_device(earlier: CommitCandidate, later: CommitCandidate, device: int) -> bool:
    """Whether a number means the same device in both states, and not one that was made anew in between."""
    one, other = earlier.record(device), later.record(device)
    return one is None or other is None or (one[1], one[2]) == (other[1], other[2])


def _within(keys: U64Array, ranges: tuple[tuple[int, int], ...]) -> np.ndarray:
    inside = np.zeros(len(keys), np.bool_)
    for begin, end in ranges:
        inside |= (keys >= np.uint64(begin)) & (keys <= np.uint64(end - 1))
    return inside

"""One state of a pool that storage may hold: which lists and which space map are of one commit, and what is left of it.

In: putting clues together, reading the trees a list names. Out: finding the clues (commit_clues), naming roots without
a list (root_names), which of several states is the last (commit_order).

Theory of operation. Lists of one commit are counted by its space map, so are the roots in them, and every device has
as many mappings as its record says. Where the space map is lost, the last is all there is; where a list is lost, the
space map still says which blocks were part of the state, and other commits say what they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from .commit_clues import CommitClues, FoundMap, FoundTree
from .layout import DEVICE_ID_LIMIT, SUPERBLOCK_LOCATION, BoolArray, U32Array
from .root_names import RootNames, roots_counted
from .superblock import SpaceMapRoot, Superblock
from .tree_summary import DeviceTrees

_NOWHERE = -1


@dataclass(slots=True)
class CommitCandidate:
    """A state.

    Attributes:
        roots, records: its lists, None where they are lost.
        space: its metadata space map, None where that is not known.
        superblock: a copy of its superblock, if there is one.
        counts: references to each block by its space map, shape (size_blocks,), None where that is lost.
        blocks: which blocks are part of it, shape (size_blocks,).
        doubted: a list that names roots which the space map does not count.
        named: the roots were named by other commits, and by what is right of the doubted list.
        time: the latest time in it.
        right: devices that are whole, and as large as their records say.
        broken: blocks that should be part of its trees and hold something else.
    """

    roots: FoundTree | None
    records: FoundTree | None
    space: SpaceMapRoot | None
    superblock: Superblock | None
    counts: U32Array | None
    blocks: BoolArray
    doubted: FoundTree | None = None
    named: bool = False
    time: int = 0
    right: int = 0
    broken: frozenset[int] = frozenset()

    @property
    def transaction_id(self) -> int:
        """At least what the pool's was."""
        if self.superblock is not None:
            return self.superblock.transaction_id
        if self.records is None:
            return 0
        return int(self.records.values["transaction_id"].max(initial=0)) + 1

    @property
    def whole(self) -> bool:
        """Whether nothing of its devices is missing or contradicts their records."""
        return (
            self.roots is not None
            and self.records is not None
            and not self.named
            and np.array_equal(self.roots.keys, self.records.keys)
            and self.right == len(self.roots.keys)
        )

    @property
    def place(self) -> tuple[int, int, int]:
        """Where its lists and its space map are, -1 where they are lost."""
        return (
            _NOWHERE if self.roots is None else self.roots.root,
            _NOWHERE if self.records is None else self.records.root,
            _NOWHERE if self.space is None else self.space.bitmap_root,
        )

    def devices(self) -> dict[int, int]:
        """Device -> root."""
        if self.roots is None:
            return {}
        return dict(zip(self.roots.keys.tolist(), self.roots.values.tolist(), strict=True))

    def record(self, device: int) -> tuple[int, int, int, int] | None:
        """The record of a device: mapped blocks, transaction, creation and snapshot time."""
        if self.records is None:
            return None
        (places,) = np.nonzero(self.records.keys == device)
        return None if not len(places) else self.records.values[places[0]].item()


class Candidates:
    """All states that clues allow.

    `states`: those to choose from, `every`: also those of which too little is left.
    """

    def __init__(self, clues: CommitClues) -> None:
        self.clues = clues
        self.trees = DeviceTrees(clues.store)
        self.states: list[CommitCandidate] = []
        for state in (*self._by_superblock(), *self._by_map()):
            if all(each.place != state.place for each in self.states):
                self._drop_foreign_lists(state)
                self._add(state)
        for state in self._by_lists():
            self._add(state)
        for state in self.states:
            if state.roots is None:
                self._name_roots(state)
            self._read(state)
        self.every = list(self.states)
        self._leave_out_the_doubtful()

    def _add(self, state: CommitCandidate) -> None:
        """Unless another state has the same lists and more beside them."""
        roots, records, space = state.place
        for each in self.states:
            known = each.place
            if known[0] == roots and records in (_NOWHERE, known[1]) and space in (_NOWHERE, known[2]):
                return
        self.states.append(state)

    # Putting lists together

    def _by_superblock(self) -> Iterator[CommitCandidate]:
        lists, records = _by_root(self.clues.lists), _by_root(self.clues.records)
        for copy in self.clues.superblocks:
            space = copy.metadata_space
            if (
                space.bitmap_root
            ):  # a metadata snapshot's copy has none, and is of an earlier time by its nature
                found = [each for each in self.clues.maps if each.root.bitmap_root == space.bitmap_root]
                yield self._state(
                    lists.get(copy.mapping_root),
                    records.get(copy.details_root),
                    found[0] if found else None,
                    copy,
                )

    def _by_map(self) -> Iterator[CommitCandidate]:
        for found in self.clues.maps:
            held = self.clues.held_lists(found.counts)
            counted: list[list[FoundTree | None]] = [
                [each for each in trees if found.counts[each.root] and each.root not in held]
                for trees in (self.clues.lists, self.clues.records)
            ]
            for roots, details in product(counted[0] or [None], counted[1] or [None]):
                yield self._state(roots, details, found)

    def _by_lists(self) -> Iterator[CommitCandidate]:
        """Lists with records of the same devices and the same sizes, and lists alone."""
        for roots in self.clues.lists:
            if not len(roots.keys) or int(roots.keys[-1]) >= DEVICE_ID_LIMIT:
                continue
            for records in self.clues.records:
                state = self._state(roots, records)
                if np.array_equal(roots.keys, records.keys) and self._sizes_agree(state):
                    yield state
            yield self._state(roots, None)

    def _state(
        self,
        roots: FoundTree | None,
        records: FoundTree | None,
        found: FoundMap | None = None,
        superblock: Superblock | None = None,
    ) -> CommitCandidate:
        space = superblock.metadata_space if superblock is not None else None if found is None else found.root
        counts = None if found is None else found.counts
        blocks = np.zeros(self.clues.store.size_blocks(), np.bool_) if counts is None else counts > 0
        return CommitCandidate(roots, records, space, superblock, counts, blocks)

    def _drop_foreign_lists(self, state: CommitCandidate) -> None:
        """What a space map does not confirm is of another commit, though it is in the right place."""
        if state.roots is not None and state.counts is not None:
            tops = roots_counted(self.clues, state.counts)
            for root, devices in Counter(state.roots.values.tolist()).items():
                counted = root < len(state.counts) and state.counts[root] > 0
                if not counted or (root in self.clues.nodes and tops[root] < devices):
                    state.roots, state.doubted = None, state.roots
                    break
        if not self._sizes_agree(state):
            state.records = None
        numbers = set() if state.records is None else set(state.records.keys.tolist())
        if state.roots is not None and state.counts is not None and numbers - state.devices().keys():
            state.roots, state.doubted = None, state.roots  # an entry is missing, which other lists may have

    def _sizes_agree(self, state: CommitCandidate) -> bool:
        """Whether every tree that is whole has the size that its record says."""
        for device, root in state.devices().items():
            record, tree = state.record(device), self.trees.of(root)
            if record is not None and not tree.lost and tree.entries != record[0]:
                return False
        return True

    # Reading

    def _name_roots(self, state: CommitCandidate) -> None:
        if state.counts is None:
            return
        others = [other for other in self.states if other.roots is not None and not other.named]
        others.sort(key=lambda other: (self._whole_trees(other), other.records is not None), reverse=True)
        hints = [state.doubted] if state.doubted is not None else []
        hints += [other.roots for other in others if other.roots is not None]
        named = RootNames(self.clues, self.trees, hints).named(state.counts, state.records)
        if named:
            keys = np.array(sorted(named), np.uint64)
            values = np.array([named[key] for key in sorted(named)], np.uint64)
            state.roots, state.named = FoundTree(_NOWHERE, (), keys, values), True
            if not self._sizes_agree(state):
                state.records = None

    def _leave_out_the_doubtful(self) -> None:
        """A whole state's list of roots is not another's as well; a list alone counts where there is nothing better."""
        whole = [state for state in self.states if state.whole]
        own = {state.place[0] for state in whole}
        kept = [
            state
            for state in self.states
            if state.whole or state.superblock is not None or state.place[0] not in own
        ]
        confirmed = [
            state
            for state in kept
            if state.roots is not None and (state.records is not None or state.counts is not None)
        ]
        self.states = confirmed or kept

    def _whole_trees(self, state: CommitCandidate) -> int:
        return sum(not self.trees.of(root).lost for root in state.devices().values())

    def _read(self, state: CommitCandidate) -> None:
        """Read the trees of a state and take down what they tell."""
        for tree in (state.roots, state.records):
            if tree is not None:
                state.blocks[list(tree.blocks)] = True
        if state.records is not None:
            state.time = int(state.records.values["snapshotted_time"].max(initial=0))
        broken = self._not_what_the_superblock_says(state)
        for device, root in state.devices().items():
            summary, record = self.trees.of(root), state.record(device)
            state.blocks[list(summary.reached)] = True
            state.time = max(state.time, summary.time)
            broken |= summary.broken
            state.right += not summary.lost and (record is None or record[0] == summary.entries)
        state.broken = frozenset(broken | self._strays(state))

    def _strays(self, state: CommitCandidate) -> set[int]:
        """Blocks that the space map counts and that hold what can be no part of this state: overwritten since."""
        counts, clues = state.counts, self.clues
        if counts is None:
            return set()
        held, counted = clues.held_lists(counts), set(np.flatnonzero(counts).tolist())
        trees = [tree for tree in (*clues.lists, *clues.records) if tree.root not in held]
        found = {tree.root for tree in trees} | set(clues.indexes)
        found = found & counted - {*state.place, SUPERBLOCK_LOCATION}
        if len(counted - clues.intact) > state.place.count(_NOWHERE):
            return found  # nodes that no tree leads to may have been led to by what cannot be read
        roots = [*state.devices().values(), *self._left_out(state)]
        roots += [root for tree in clues.lists if tree.root in held for root in tree.values.tolist()]
        listed = clues.list_blocks
        reached = {block for root in roots for block in self.trees.of(root).reached}
        return found | {
            block for block in clues.nodes & counted if block not in listed and block not in reached
        }

    def _left_out(self, state: CommitCandidate) -> list[int]:
        """Roots that its list should name and does not: other lists do, or a record without a root fits them."""
        assert state.counts is not None
        known = state.devices()
        named = {root for tree in self.clues.lists for root in tree.values.tolist()}
        missing = [] if state.records is None else set(state.records.keys.tolist()) - known.keys()
        sizes = {record[0] for device in missing if (record := state.record(device)) is not None}
        tops = roots_counted(self.clues, state.counts).keys() - set(known.values())
        return [root for root in tops if root in named or self.trees.of(root).entries in sizes]

    def _not_what_the_superblock_says(self, state: CommitCandidate) -> set[int]:
        """Roots that a superblock names and that hold something else."""
        superblock = state.superblock
        if superblock is None:
            return set()
        found = set()
        if state.records is None:
            found.add(superblock.details_root)
        if state.roots is None or state.named:
            found.add(superblock.mapping_root)
        if superblock.metadata_space.bitmap_root not in self.clues.indexes:
            found.add(superblock.metadata_space.bitmap_root)
        return found


def _by_root(trees: list[FoundTree]) -> dict[int, FoundTree]:
    return {tree.root: tree for tree in trees}

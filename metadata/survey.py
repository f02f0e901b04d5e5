"""Visiting every block of a pool that something refers to, once each, whatever state the pool is in.

In: counting who refers to which metadata block, checking each node and its relation to its parent, collecting
problems with the place they were found at. Out: what the values of trees mean (recount), comparing counts
(space_audit).

Theory of operation. A snapshot shares nodes, so one node has many contexts: parents with different key ranges, roots
and inner places. Its content is read and checked once; what a context must know of it (first and last key below it,
entries below it, height, whether it is too empty for anything but a root) is kept in arrays indexed by block, and
each context is checked against those, for all children of a node at once. A node remembers the problems below it, so
that every further device that reaches it is noted as affected. A block is claimed by the first structure that
reaches it; a second structure reaching it is a fault. Nothing is raised for what blocks contain.

This module shares the codecs with the code that writes pools and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from .layout import KEY_LIMIT, TIME_LIMIT, TREE_DEPTH_MAX, U8Array, U32Array, U64Array
from .node import CAPACITY, Node
from .node_batch import Leaves, ReadFault, fault_text, read_nodes
from .problems import Affected, Fault, Place, Problem, Severity
from .store import BlockStore


class Owner(IntEnum):
    """The structure a block belongs to."""

    NOBODY = 0
    SUPERBLOCK = 1
    INDEX = 2
    BITMAP = 3
    DEVICE_ROOTS = 4
    MAPPINGS = 5
    RECORDS = 6
    DATA_INDEX = 7
    DATA_OVERFLOW = 8
    METADATA_OVERFLOW = 9


VALUE_BYTES = {
    Owner.DEVICE_ROOTS: 8,
    Owner.MAPPINGS: 8,
    Owner.RECORDS: 24,
    Owner.DATA_INDEX: 16,
    Owner.DATA_OVERFLOW: 4,
    Owner.METADATA_OVERFLOW: 4,
}


_TIME_MASK = np.uint64(TIME_LIMIT - 1)


class _State(IntEnum):
    UNKNOWN = 0
    OPEN = 1
    SOUND = 2
    DAMAGED = 3


PlaceOf = Callable[[int], Place]
# Called once for every set of sibling leaves not visited before, with a way to name the place of each position.
OnLeaves = Callable[[Leaves, PlaceOf], None]


@dataclass(frozen=True, slots=True)
class _Siblings:
    """Children of one node, or roots, and the inclusive ranges of keys they answer for; shapes (n,)."""

    owner: Owner
    locations: U64Array
    begins: U64Array
    lasts: U64Array
    place_of: PlaceOf
    on_leaves: OnLeaves
    depth: int

    def part(self, chosen: NDArray[np.int64]) -> _Siblings:
        """Only some of them, in the order of `chosen`."""
        numbers = chosen.tolist()
        return replace(
            self,
            locations=self.locations[chosen],
            begins=self.begins[chosen],
            lasts=self.lasts[chosen],
            place_of=lambda position: self.place_of(numbers[position]),
        )


class Survey:
    """Everything learnt about the blocks of one store; arrays are indexed by block."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        size = store.size_blocks()
        self.size_blocks = size
        self.references: U32Array = np.zeros(size, np.uint32)
        self._owner = np.zeros(size, np.uint8)
        self._state = np.zeros(size, np.uint8)
        self._first = np.zeros(size, np.uint64)
        self._last = np.zeros(size, np.uint64)
        self._entries = np.zeros(size, np.uint64)
        self._height = np.zeros(size, np.uint8)
        self._latest: U32Array = np.zeros(size, np.uint32)
        self._underfull = np.zeros(size, np.bool_)
        self._problems: list[Problem] = []
        self._affected: dict[int, list[Affected]] = {}
        self._below: dict[int, set[int]] = {}
        # Nodes below which something could not be read.
        self._holes: set[int] = set()
        self._complaints: dict[tuple[Fault, int], int] = {}
        self.unread: set[Owner] = set()

    @property
    def owners(self) -> U8Array:
        """The structure (`Owner`) of each block, shape (size_blocks,)."""
        return self._owner

    # Problems

    @property
    def problems(self) -> list[Problem]:
        """All problems so far, in the order they were found, with every device they were met from."""
        return [
            replace(problem, affects=(*problem.affects, *self._affected.get(number, ())))
            for number, problem in enumerate(self._problems)
        ]

    def report(self, problem: Problem, nodes: Sequence[int] = ()) -> None:
        """Take down a problem. `nodes` are the blocks any other way to which meets the same problem."""
        place = problem.place
        if place.device is not None and not problem.affects:
            affected = Affected(place.device, place.begin, place.end, place.held)
            problem = replace(problem, affects=(affected,))
        for location in nodes:
            self._below.setdefault(location, set()).add(len(self._problems))
        self._problems.append(problem)

    def error(self, fault: Fault, place: Place, detail: str = "") -> None:
        """Report that the last block of a path cannot be used as what it should be, whoever gets there."""
        self._holes.update(place.path)
        location = place.path[-1] if place.path else 0
        count = 1 if place.path else 0
        self.report(Problem(Severity.ERROR, fault, place, detail, location, count), place.path)

    def entries_below(self, location: int) -> int | None:
        """Entries of the tree below a node, None where it could not be read completely."""
        if location >= self.size_blocks or self._state[location] != _State.SOUND or location in self._holes:
            return None
        return int(self._entries[location])

    def latest(self, location: int) -> int | None:
        """The youngest time of the mappings below a node, None where there are none or the node was not sound."""
        if location >= self.size_blocks or self._state[location] != _State.SOUND:
            return None
        return int(self._latest[location]) if self._entries[location] else None

    def is_leaf(self, location: int) -> bool:
        """Whether a sound node is a leaf."""
        return bool(self._height[location] == 1)

    # Single blocks

    def refer(self, locations: U64Array) -> None:
        """Count one reference to each block; those outside are reported where they are visited."""
        inside = locations[locations < self.size_blocks]
        np.add.at(self.references, inside.astype(np.int64), 1)

    def claim(self, owner: Owner, locations: U64Array, place_of: PlaceOf) -> NDArray[np.bool_]:
        """Make blocks (not nodes) belong to a structure, one reference each; which of them it got, shape (n,)."""
        self.refer(locations)
        granted = np.zeros(len(locations), np.bool_)
        for position, location in enumerate(locations.tolist()):
            if location >= self.size_blocks:
                self.unread.add(owner)
                self.error(Fault.OUTSIDE, place_of(position), f"there are {self.size_blocks} blocks")
            elif self._owner[location] != Owner.NOBODY:
                self._cross_linked(owner, location, place_of(position))
            else:
                self._owner[location] = owner
                granted[position] = True
        return granted

    def _cross_linked(self, owner: Owner, location: int, place: Place) -> None:
        self.unread.add(owner)
        other = Owner(int(self._owner[location])).name.lower().replace("_", " ")
        self.error(Fault.CROSS_LINKED, place, f"the other one: {other}")

    # Trees

    def tree(self, owner: Owner, root: int, place: Place, on_leaves: OnLeaves) -> None:
        """Visit a tree with one reference from outside; `place` names it."""
        self.refer(np.array([root], np.uint64))
        self.trees(owner, np.array([root], np.uint64), [place], on_leaves)

    def trees(self, owner: Owner, roots: U64Array, places: Sequence[Place], on_leaves: OnLeaves) -> None:
        """Visit trees whose roots' references were counted already."""
        ends = np.full(len(roots), KEY_LIMIT - 1, np.uint64)

        def place_of(position: int) -> Place:
            return places[position].child(int(roots[position]), 0, KEY_LIMIT)

        self._visit(_Siblings(owner, roots, np.zeros(len(roots), np.uint64), ends, place_of, on_leaves, 0))

    def _visit(self, siblings: _Siblings) -> None:
        known = self._usable(siblings)
        siblings = siblings.part(known)
        places = siblings.locations.astype(np.int64)
        fresh = self._owner[places] == Owner.NOBODY
        self._meet_again(siblings, np.flatnonzero(~fresh))
        new = np.flatnonzero(fresh)
        first_uses = np.sort(np.unique(places[new], return_index=True)[1])
        if len(first_uses):
            self._read(siblings.part(new[first_uses]))
            self._meet_again(siblings, np.delete(new, first_uses))
        self._check_context(siblings)

    def _usable(self, siblings: _Siblings) -> NDArray[np.int64]:
        """Positions of the blocks that exist and are free or this structure's own; the others are reported."""
        inside = siblings.locations < self.size_blocks
        for position in np.flatnonzero(~inside).tolist():
            self.unread.add(siblings.owner)
            self.error(Fault.OUTSIDE, siblings.place_of(position), f"there are {self.size_blocks} blocks")
        positions = np.flatnonzero(inside)
        owners = self._owner[siblings.locations[positions].astype(np.int64)]
        foreign = (owners != Owner.NOBODY) & (owners != siblings.owner)
        for position in positions[foreign].tolist():
            self._cross_linked(siblings.owner, int(siblings.locations[position]), siblings.place_of(position))
        usable: NDArray[np.int64] = positions[~foreign]
        return usable

    def _meet_again(self, siblings: _Siblings, positions: NDArray[np.int64]) -> None:
        """Nodes visited before: note whom their problems affect, and catch loops."""
        states = self._state[siblings.locations[positions].astype(np.int64)]
        for position in positions[states == _State.OPEN].tolist():
            self.error(Fault.LOOP, siblings.place_of(position))
        for position in positions[states == _State.UNKNOWN].tolist():
            # Claimed by a node above whose children are being visited: the same block on two levels.
            self.error(Fault.UNEVEN, siblings.place_of(position), "the node is on two levels")
        if not self._below:
            return
        for position in positions.tolist():
            found = self._below.get(int(siblings.locations[position]))
            if found:
                self._spread(siblings.place_of(position), sorted(found))

    def _spread(self, place: Place, numbers: Sequence[int]) -> None:
        if place.path[-1] in self._holes:
            self._holes.update(place.path)
        for location in place.path[:-1]:
            self._below.setdefault(location, set()).update(numbers)
        if place.device is None:
            return
        for number in numbers:
            at = self._problems[number].place
            begin, end = max(at.begin, place.begin), min(at.end, place.end)
            if begin < end and at.device is not None:
                affected = Affected(place.device, begin, end, place.held)
                self._affected.setdefault(number, []).append(affected)

    def _read(self, siblings: _Siblings) -> None:
        places = siblings.locations.astype(np.int64)
        self._owner[places] = siblings.owner
        batch = read_nodes(self.store, siblings.locations, VALUE_BYTES[siblings.owner])
        for position, fault in batch.damaged:
            self._state[places[position]] = _State.DAMAGED
            self._unreadable(siblings, position, fault)
        self._take_leaves(siblings, batch.leaves, CAPACITY[VALUE_BYTES[siblings.owner]] // 3)
        for position, node in batch.others:
            if node.leaf:
                self._take_leaves(siblings, Leaves.of(position, node), node.minimum)
            else:
                self._take_internal(siblings, position, node)

    def _unreadable(self, siblings: _Siblings, position: int, fault: ReadFault) -> None:
        self.unread.add(siblings.owner)
        self.error(Fault.UNREADABLE, siblings.place_of(position), fault_text(fault))

    def _take_leaves(self, siblings: _Siblings, leaves: Leaves, minimum: int) -> None:
        if not len(leaves.positions):
            return
        places = siblings.locations[leaves.positions].astype(np.int64)
        filled = np.flatnonzero(leaves.counts)
        ends = leaves.ends
        self._first[places[filled]] = leaves.keys[(ends - leaves.counts)[filled]]
        self._last[places[filled]] = leaves.keys[ends[filled] - 1]
        self._entries[places] = leaves.counts
        if siblings.owner == Owner.MAPPINGS and len(filled):
            begins = (ends - leaves.counts)[filled]
            self._latest[places[filled]] = np.maximum.reduceat(leaves.values & _TIME_MASK, begins)
        self._underfull[places] = leaves.counts < minimum
        self._height[places] = 1
        self._state[places] = _State.SOUND
        siblings.on_leaves(leaves, siblings.place_of)

    def _take_internal(self, siblings: _Siblings, position: int, node: Node) -> None:
        location = int(siblings.locations[position])
        place = siblings.place_of(position)
        if siblings.depth >= TREE_DEPTH_MAX:
            self._state[location] = _State.DAMAGED
            self.unread.add(siblings.owner)
            self.error(Fault.TOO_DEEP, place)
            return
        self._state[location] = _State.OPEN
        self.refer(node.values)
        lasts = np.append(node.keys[1:] - np.uint64(1), siblings.lasts[position])

        def place_of(child: int) -> Place:
            begin, last = int(node.keys[child]), int(lasts[child])
            return place.child(int(node.values[child]), begin, max(last + 1, begin))

        below = _Siblings(
            siblings.owner, node.values, node.keys, lasts, place_of, siblings.on_leaves, siblings.depth + 1
        )
        self._visit(below)
        self._summarise(location, node)

    def _summarise(self, location: int, node: Node) -> None:
        children = node.values[node.values < self.size_blocks].astype(np.int64)
        children = children[self._state[children] == _State.SOUND]
        self._first[location] = node.keys[0]
        self._last[location] = node.keys[-1]
        if len(children):
            self._entries[location] = self._entries[children].sum()
            self._latest[location] = self._latest[children].max()
            self._last[location] = max(int(node.keys[-1]), int(self._last[children].max()))
            height = int(self._height[children].max())
            self._height[location] = height + 1 if height else 0
        self._underfull[location] = len(node.keys) < node.minimum
        self._state[location] = _State.SOUND

    def _check_context(self, siblings: _Siblings) -> None:
        """Each child against its parent: range, fill, and that all are of one height."""
        places = siblings.locations.astype(np.int64)
        sound = self._state[places] == _State.SOUND
        filled = sound & (self._entries[places] > 0)
        self._complain(siblings, filled & (self._first[places] < siblings.begins), Fault.BELOW_RANGE)
        self._complain(siblings, filled & (self._last[places] > siblings.lasts), Fault.ABOVE_RANGE)
        if siblings.depth == 0:
            return
        self._complain(siblings, sound & self._underfull[places], Fault.UNDERFULL)
        heights = self._height[places]
        measured = sound & (heights > 0)
        if measured.any():
            usual = int(np.bincount(heights[measured]).argmax())
            self._complain(siblings, measured & (heights != usual), Fault.UNEVEN)

    def _complain(self, siblings: _Siblings, wrong: NDArray[np.bool_], fault: Fault) -> None:
        if not wrong.any():
            return
        for position in np.flatnonzero(wrong).tolist():
            place = siblings.place_of(position)
            location = int(siblings.locations[position])
            number = self._complaints.setdefault((fault, location), len(self._problems))
            if number < len(self._problems):
                self._spread(place, [number])
                continue
            keys = f"its keys are {self._first[location]}..{self._last[location]}"
            detail = f"{self._entries[location]} entries" if fault is Fault.UNDERFULL else keys
            problem = Problem(Severity.ERROR, fault, place, detail, first=location, count=1)
            # The fault lies in how this parent names the node, so only other ways to the parent meet it.
            self.report(problem, place.path[:-1])

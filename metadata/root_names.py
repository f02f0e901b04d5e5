"""Which device each root belongs to, where the list of roots that said so is lost.

In: the roots that a space map counts, and lists of other commits. Out: finding those (commit_clues), roots that belong
to nobody (lost_nodes).

Theory of operation. Between two commits most devices stay as they were: a root that another commit's list names, and
that is still counted, is that device's. A device that changed has a new root, but few of the nodes below it are new: a
root belongs to the device with whose other root it has most nodes in common. What is left is told by the number of
mappings in the records, or by being the only one that is left.
"""

from __future__ import annotations

from collections import Counter

from .commit_clues import CommitClues, FoundTree
from .layout import U32Array
from .tree_summary import DeviceTrees


class RootNames:
    """Names roots by what `hints`, lists of other commits, the most trusted first, say of them."""

    def __init__(self, clues: CommitClues, trees: DeviceTrees, hints: list[FoundTree]) -> None:
        self._clues = clues
        self._trees = trees
        self._hints = hints

    def named(self, counts: U32Array, records: FoundTree | None) -> dict[int, int]:
        """Device -> root, as far as that can be told. `counts`: by the space map of the commit."""
        free = roots_counted(self._clues, counts)
        for _, root in (pair for hint in self._hints for pair in _pairs(hint)):
            if root not in self._clues.nodes and root < len(counts) and counts[root]:
                free[root] = int(counts[root])  # it cannot be read, but it is in use
        # The list that has most roots of this commit is the nearest to it.
        self._hints.sort(key=lambda hint: -sum(free[root] > 0 for root in hint.values.tolist()))
        found: dict[int, int] = {}
        sizes = _sizes(records)
        for numbers in (self._numbers(records), self._numbers(None)):
            self._by_other_lists(numbers - found.keys(), free, found, sizes)
            self._by_size(numbers - found.keys(), free, found, sizes)
        return found

    def _by_other_lists(
        self, open_ones: set[int], free: Counter[int], found: dict[int, int], sizes: dict[int, int]
    ) -> None:
        """The same root as in another list, or the one with most nodes in common.

        A root that more devices had than have it now is kept by those whose size it has, and then by the youngest:
        what is written to after a snapshot is the origin as a rule.
        """
        same = [(device, root) for hint in self._hints for device, root in reversed(_pairs(hint))]
        fitting = [
            (device, root) for device, root in same if sizes.get(device) == self._trees.of(root).entries
        ]

        def take(pairs: list[tuple[int, int]]) -> None:
            for device, root in pairs:
                if device in open_ones and device not in found and free[root] > 0:
                    free[root] -= 1
                    found[device] = root

        take(fitting)
        take(same)
        # Each with each: of thousands of devices only the few that changed since.
        take(self._by_common_nodes(open_ones - found.keys(), [root for root in free if free[root] > 0]))

    def _by_size(
        self, open_ones: set[int], free: Counter[int], found: dict[int, int], sizes: dict[int, int]
    ) -> None:
        """By the size in the record, or because it is the only one that is left."""
        for device in sorted(open_ones):
            left = [root for root in free if free[root] > 0]
            fitting = [root for root in left if self._trees.of(root).entries == sizes.get(device)]
            if len(fitting) == 1:
                free[fitting[0]] -= 1
                found[device] = fitting[0]
        left = [root for root in free if free[root] > 0 and root in self._clues.nodes]
        waiting = [device for device in open_ones if device not in found]
        if len(left) == len(waiting) == 1 and sizes.get(waiting[0]) in (
            None,
            self._trees.of(left[0]).entries,
        ):
            free[left[0]] -= 1
            found[waiting[0]] = left[0]

    def _numbers(self, records: FoundTree | None) -> set[int]:
        """The devices there are: as the records have them, otherwise as the most trusted list has them."""
        if records is not None:
            return set(records.keys.tolist())
        return set(self._hints[0].keys.tolist()) if self._hints else set()

    def _by_common_nodes(self, devices: set[int], free: list[int]) -> list[tuple[int, int]]:
        """Devices and roots, those with most nodes in common first."""
        found: list[tuple[int, int, int]] = []
        for hint in self._hints:
            for device, other in _pairs(hint):
                if device not in devices:
                    continue
                nodes = self._trees.of(other).reached
                for root in free:
                    common = len(nodes & self._trees.of(root).reached)
                    if common:
                        found.append((common, device, root))
        return [(device, root) for _, device, root in sorted(found, reverse=True)]


def roots_counted(clues: CommitClues, counts: U32Array) -> Counter[int]:
    """Topmost nodes of mappings, by a space map, and how many devices each is the root of."""
    scan = clues.mappings
    listed = clues.list_blocks
    named: Counter[int] = Counter()
    for location, node in scan.inner.items():
        if counts[location] and location not in listed:
            named.update(set(node.values.tolist()))
    held = clues.held_lists(counts)
    for tree in clues.lists:
        if tree.root in held:
            named.update(tree.values.tolist())
    found: Counter[int] = Counter()
    for location in clues.nodes - listed:
        if int(counts[location]) > named[location]:
            found[location] = int(counts[location]) - named[location]
    return found


def _pairs(tree: FoundTree) -> list[tuple[int, int]]:
    return list(zip(tree.keys.tolist(), tree.values.tolist(), strict=True))


def _sizes(records: FoundTree | None) -> dict[int, int]:
    if records is None:
        return {}
    return dict(zip(records.keys.tolist(), records.values["mapped_blocks"].tolist(), strict=True))

"""Finding nodes that nothing readable names any more: lost roots of devices, children of damaged nodes.

In: a scan of the store against the metadata space map. Out: reading trees (tree_salvage), what becomes of a find
(repair).

Theory of operation. Freed blocks hold intact nodes of the past, so a checksum proves little. The space map does: it
says how many places refer to each block. A node that is counted more often than readable places name it is named by
something that cannot be read, and where only one damaged node can be that something, it is a child of it. Where
several could be, nothing is assumed. A lost root is matched to a device by the number of mappings in the device's
record, and, where several devices have the same number, by freed copies of the leaf that named it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from .layout import U32Array
from .node import Node
from .node_scan import NodeScan, scan_nodes, stored_counts
from .store import BlockStore
from .superblock import Superblock
from .tree_salvage import DamagedNode, TreeSalvage
from .walk import salvage

_NOBODY = -1


@dataclass(slots=True)
class FoundRoots:
    """Roots by device: those that fit no other device, and those that might be another's; and roots of nobody.

    What freed leaves say of a device is as old as they are, so it is a guess unless the space map confirms it.
    """

    certain: dict[int, int] = field(default_factory=dict)
    guessed: dict[int, int] = field(default_factory=dict)
    nameless: list[int] = field(default_factory=list)


class LostNodes:
    """What the trees at `trees` (device -> root) do not account for. Scans the store only when it is asked."""

    def __init__(self, store: BlockStore, superblock: Superblock, trees: Mapping[int, int]) -> None:
        self._store = store
        self._superblock = superblock
        self._scan: NodeScan | None = None
        self._stored: U32Array | None = None
        # Block -> places that name it: a block, or a device's place in the leaf of roots.
        self._parents: dict[int, set[object]] = {}
        self._damaged: dict[int, DamagedNode] = {}
        self._entries: dict[int, int] = {}
        # Mappings of each device whose tree can be read completely.
        self.mapped: dict[int, int] = {}
        for device, root in trees.items():
            tree, entries = self._walk((superblock.mapping_root, device), root)
            if not tree.lost:
                self.mapped[device] = entries

    def _walk(self, place: object, root: int) -> tuple[TreeSalvage, int]:
        tree = TreeSalvage(self._store, root)
        entries = sum(len(keys) for keys, _ in tree.mappings())
        for location, parents in tree.reached.items():
            known = self._parents.setdefault(location, set())
            known.update(parents - {0})
            if 0 in parents:
                known.add(place)
        for node in tree.damaged:
            self._damaged[node.location] = node
        return tree, entries

    def _entries_below(self, root: int) -> int:
        if root not in self._entries:
            tree = TreeSalvage(self._store, root)
            self._entries[root] = sum(len(keys) for keys, _ in tree.mappings())
        return self._entries[root]

    # What is counted and not accounted for

    def _unaccounted(self) -> dict[int, int]:
        """Topmost nodes that are counted more often than they are named, and by how much."""
        if self._scan is None:
            self._scan = scan_nodes(self._store, 8)
            self._stored = stored_counts(self._store, self._superblock.metadata_space)
            self._name_the_rest(self._scan)
        if self._stored is None:
            return {}
        found = {}
        for location in (*self._scan.leaves, *self._scan.inner):
            missing = int(self._stored[location]) - len(self._parents.get(location, ()))
            if missing > 0:
                found[location] = missing
        return found

    def _name_the_rest(self, scan: NodeScan) -> None:
        """Count references by trees other than those of devices, by the metadata snapshot, by orphans among nodes."""
        superblock = self._superblock
        held = self._held()
        live = (superblock.mapping_root, superblock.details_root)
        maps = [superblock.data_space.bitmap_root, superblock.data_space.overflow_root]
        for root in (*live, *maps, superblock.metadata_space.overflow_root):
            self._name_tree(root, "superblock")
        if held is not None:
            for root in (held.mapping_root, held.details_root):
                self._name_tree(root, "metadata snapshot")
            ids, roots, _ = salvage(self._store, 8, held.mapping_root)
            for device, root in zip(ids.tolist(), roots.tolist(), strict=True):
                self._walk((held.mapping_root, device), root)
        stored = self._stored
        if stored is not None:
            for location, node in scan.inner.items():
                if stored[location] and location not in self._parents:
                    for child in node.values.tolist():
                        self._parents.setdefault(child, set()).add(location)

    def _held(self) -> Superblock | None:
        location = self._superblock.held_root
        if not location:
            return None
        try:
            return Superblock.unpack(self._store.read(location, 1), location)
        except Exception:
            return None

    def _name_tree(self, root: int, by: str) -> None:
        """The nodes of a small tree, as far as a scan knows them."""
        assert self._scan is not None
        self._parents.setdefault(root, set()).add(by)
        waiting, seen = [root], {root}
        while waiting:
            location = waiting.pop()
            node = self._scan.inner.get(location)
            for child in [] if node is None else node.values.tolist():
                self._parents.setdefault(child, set()).add(location)
                if child not in seen:
                    seen.add(child)
                    waiting.append(child)

    # Children of damaged nodes

    def substitutes(self) -> dict[int, list[tuple[int, int]]]:
        """For damaged nodes, the children they must have had, where that is certain."""
        nodes = [node for node in self._damaged.values() if not node.is_leaf]
        if not nodes:
            return {}
        unaccounted = self._unaccounted()
        claims: dict[int, set[int]] = {}
        for node in nodes:
            for location in self._within(node, unaccounted):
                claims.setdefault(location, set()).add(node.location)
        found: dict[int, list[tuple[int, int]]] = {}
        for node in nodes:
            mine = [
                location
                for location in self._within(node, unaccounted)
                if claims[location] == {node.location}
            ]
            ordered = sorted((self._span(location), location) for location in mine)
            apart = all(left[0][1] < right[0][0] for left, right in pairwise(ordered))
            if ordered and apart and len({location in self._inner for location in mine}) == 1:
                found[node.location] = [(span[0], location) for span, location in ordered]
        return found

    @property
    def _inner(self) -> dict[int, Node]:
        assert self._scan is not None
        return self._scan.inner

    def _span(self, location: int) -> tuple[int, int]:
        assert self._scan is not None
        if location in self._scan.leaves:
            return self._scan.leaves[location][:2]
        node = self._scan.inner[location]
        return int(node.keys[0]), int(node.keys[-1])

    def _within(self, node: DamagedNode, locations: Iterable[int]) -> list[int]:
        spans = [(location, *self._span(location)) for location in locations]
        return [location for location, first, last in spans if node.begin <= first and last <= node.last]

    # Roots

    def roots_for(self, wanted: Mapping[int, int]) -> FoundRoots:
        """Roots for devices, given how many mappings each should have (device -> number)."""
        found = FoundRoots()
        unaccounted = self._unaccounted()
        open_ones = {device: count for device, count in wanted.items() if count}
        fitting: dict[int, list[int]] = {}
        for location in unaccounted:
            fitting.setdefault(self._entries_below(location), []).append(location)
        for count in set(open_ones.values()):
            devices = [device for device, wants in open_ones.items() if wants == count]
            roots = fitting.get(count, [])
            if len(roots) == 1:
                found.certain.update(dict.fromkeys(devices, roots[0]))
            elif roots:
                self._tell_apart(devices, roots, found)
        taken = {*found.certain.values(), *found.guessed.values()}
        left = [location for location in unaccounted if location not in taken]
        missing = [device for device in open_ones if device not in found.certain | found.guessed]
        if len(left) == len(missing) == 1:
            found.guessed[missing[0]] = left[0]
            missing = []
        for device in missing:
            self._ask_freed_leaves(device, wanted[device], found)
        if not missing and not any(node.is_leaf is not True for node in self._damaged.values()):
            # What a damaged node may have led to is no root.
            self._name(sorted(left), wanted, found)
        for location in {*found.certain.values(), *found.guessed.values(), *found.nameless}:
            self._walk((_NOBODY, location), location)
        return found

    def _ask_freed_leaves(self, device: int, count: int, found: FoundRoots) -> None:
        """A root that an earlier list of roots names for a device, if it has as many mappings as the record says."""
        taken = {*found.certain.values(), *found.guessed.values()}
        known = self._known_nodes()
        named = [root for root in self._named_before(device) if root not in taken and root in known]
        fitting = [root for root in named if self._entries_below(root) == count]
        if not fitting:
            below = {int(child) for node in self._inner.values() for child in node.values.tolist()}
            tops = known - below - taken - self._parents.keys()
            fitting = [root for root in tops if self._entries_below(root) == count]
        if len(fitting) == 1:
            found.guessed[device] = fitting[0]

    def _known_nodes(self) -> set[int]:
        assert self._scan is not None
        return {*self._scan.leaves, *self._scan.inner}

    def _named_before(self, device: int) -> set[int]:
        """Roots that freed lists of roots name for a device."""
        assert self._scan is not None
        return {
            int(node.values[np.flatnonzero(node.keys == device)[0]])
            for node in self._scan.small.values()
            if (node.keys == device).any()
        }

    def nearest(self, root: int, earlier: Mapping[int, int]) -> int | None:
        """Of the roots devices had at an earlier commit, the device whose tree has most nodes in common with `root`."""
        if self._scan is None or root not in self._scan.inner:
            return None
        children = set(self._scan.inner[root].values.tolist())
        common = {
            device: len(children & set(self._scan.inner[before].values.tolist()))
            for device, before in earlier.items()
            if before in self._scan.inner
        }
        best = max(common.values(), default=0)
        nearest = [device for device, count in common.items() if count == best]
        return nearest[0] if best and len(nearest) == 1 else None

    def _name(self, roots: list[int], wanted: Mapping[int, int], found: FoundRoots) -> None:
        """Roots of devices that no record tells of: numbers as freed lists of roots give them."""
        assert self._scan is not None
        for root in roots:
            owners = {
                int(key)
                for node in self._scan.small.values()
                for key in node.keys[node.values == root].tolist()
                if key not in wanted and key not in found.guessed
            }
            if len(owners) == 1:
                found.guessed[owners.pop()] = root
            else:
                found.nameless.append(root)

    def _tell_apart(self, devices: list[int], roots: list[int], found: FoundRoots) -> None:
        """Devices with equally many mappings: a root is its device's where a freed leaf of roots says so."""
        free = list(roots)
        for device in devices:
            before = self._named_before(device)
            same = [root for root in free if root in before]
            if len(same) == 1:
                found.certain[device] = same[0]
                free.remove(same[0])
        rest = [device for device in devices if device not in found.certain]
        if len(rest) == len(free) == 1:
            found.certain[rest[0]] = free[0]
            return
        for device, root in zip(rest, free, strict=False):
            found.guessed[device] = root

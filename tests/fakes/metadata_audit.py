"""An independent full audit of a metadata image: structure of every tree, and a recount of both space maps.

Deliberately naive: plain recursion, dictionaries, codecs only. It shares no counting or tree code with the
package it checks. Raises AssertionError with the first contradiction.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from metadata.bitmap import decode_bitmap
from metadata.index import decode_index
from metadata.layout import ENTRIES_PER_BITMAP, bitmaps_for
from metadata.node import decode_node
from metadata.superblock import Superblock

BLOCK = 4096


@dataclass
class Audit:
    """What was found: mappings by device, counts by block."""

    image: bytes
    devices: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    mappings: dict[int, dict[int, int]] = field(default_factory=dict)
    metadata_counts: Counter[int] = field(default_factory=Counter)
    data_counts: Counter[int] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)
    heights: dict[int, int] = field(default_factory=dict)
    fills: dict[int, list[int]] = field(default_factory=dict)

    def raw(self, block):
        assert 0 <= block < len(self.image) // BLOCK, f"block {block} outside"
        return bytes(self.image[block * BLOCK : (block + 1) * BLOCK])

    def visit(self, block):
        """Count one place pointing at `block`; True when its content has not been visited yet."""
        self.metadata_counts[block] += 1
        first = block not in self.seen
        self.seen.add(block)
        return first

    def tree(self, root, value_bytes, on_leaf):
        """Walk a tree in order, counting places; returns its entries. Checks fill, depth and order."""
        depths: set[int] = set()
        fills: list[int] = []

        def walk(block, depth, low, high, is_root):
            first = self.visit(block)
            node = decode_node(self.raw(block), block)
            keys = node.keys.tolist()
            if not is_root:
                assert len(keys) >= node.capacity // 3, f"node {block} holds only {len(keys)}"
            elif not node.leaf:
                assert len(keys) >= 2, f"internal root {block} has one child"
            if keys:
                assert keys[0] >= low, f"node {block} below its bound"
                assert keys[-1] < high, f"node {block} beyond its bound"
            if node.leaf:
                depths.add(depth)
                fills.append(len(keys))
                assert node.values.dtype.itemsize == value_bytes
                entries = list(zip(keys, node.values.tolist(), strict=True))
                if first:
                    on_leaf(entries)
                return entries
            children = node.values.tolist()
            entries = []
            for i, child in enumerate(children):
                bound = keys[i + 1] if i + 1 < len(keys) else high
                if first:
                    entries += walk(child, depth + 1, keys[i], bound, False)
                else:
                    entries += self.reread(child)
            return entries

        entries = walk(root, 0, 0, 2**64, True)
        assert len(depths) <= 1, f"leaves at depths {depths}"
        self.heights[root] = next(iter(depths), -1) + 1
        self.fills[root] = fills
        assert all(a[0] < b[0] for a, b in pairwise(entries))
        return entries

    def reread(self, block):
        node = decode_node(self.raw(block), block)
        if node.leaf:
            return list(zip(node.keys.tolist(), node.values.tolist(), strict=True))
        return [entry for child in node.values.tolist() for entry in self.reread(child)]

    def mapping_trees(self, root):
        found = {}

        def count_data(entries):
            for _, value in entries:
                self.data_counts[value >> 24] += 1

        def on_top_leaf(entries):
            for device, bottom in entries:
                found[device] = dict(self.tree(bottom, 8, count_data))

        top = self.tree(root, 8, on_top_leaf)
        for device, bottom in top:
            if device not in found:
                found[device] = dict(self.reread(bottom))
        return found

    def run(self):
        ignore = lambda entries: None  # noqa: E731
        superblock = Superblock.unpack(self.raw(0))
        self.superblock = superblock
        self.metadata_counts[0] += 1
        self.mappings = self.mapping_trees(superblock.mapping_root)
        self.devices = dict(self.tree(superblock.details_root, 24, ignore))
        if superblock.held_root:
            self.visit(superblock.held_root)
            held = Superblock.unpack(self.raw(superblock.held_root), superblock.held_root)
            assert held.held_root == 0
            self.held_mappings = self.mapping_trees(held.mapping_root)
            self.held_devices = dict(self.tree(held.details_root, 24, ignore))
        data, meta = superblock.data_space, superblock.metadata_space
        data_index = dict(self.tree(data.bitmap_root, 16, ignore))
        data_overflow = dict(self.tree(data.overflow_root, 4, ignore))
        meta_overflow = dict(self.tree(meta.overflow_root, 4, ignore))
        self.visit(meta.bitmap_root)
        entries = decode_index(self.raw(meta.bitmap_root), meta.bitmap_root).entries
        meta_index = {i: entries[i].tolist() for i in range(bitmaps_for(meta.blocks))}
        assert sorted(data_index) == list(range(bitmaps_for(data.blocks)))
        for index in (data_index, meta_index):
            for location, _, _ in index.values():
                self.visit(location)
        self.compare("data", data, data_index, data_overflow, self.data_counts)
        self.compare("metadata", meta, meta_index, meta_overflow, self.metadata_counts)
        assert sorted(self.mappings) == sorted(self.devices)
        for device, (mapped, _, created, snapshotted) in self.devices.items():
            assert mapped == len(self.mappings[device]), (device, mapped, len(self.mappings[device]))
            assert created <= snapshotted <= superblock.time
        return self

    def compare(self, space, root, index, overflow, expected):
        stored = {}
        for chunk, (location, free, none_free_before) in index.items():
            counts = decode_bitmap(self.raw(location), location).counts.tolist()
            used = [i for i, count in enumerate(counts) if count]
            assert free == ENTRIES_PER_BITMAP - len(used), (space, chunk, free, len(used))
            first_free = next((i for i, count in enumerate(counts) if not count), ENTRIES_PER_BITMAP)
            assert none_free_before <= first_free, (space, chunk)
            for i in used:
                block = chunk * ENTRIES_PER_BITMAP + i
                assert block < root.blocks
                stored[block] = overflow[block] if counts[i] == 3 else counts[i]
                assert (counts[i] == 3) == (block in overflow), (space, block)
                assert counts[i] != 3 or overflow[block] >= 3
        assert set(overflow) <= set(stored)
        for block in set(stored) | set(expected):
            assert stored.get(block, 0) == expected.get(block, 0), (
                f"{space} block {block}: stored {stored.get(block, 0)}, found {expected.get(block, 0)}"
            )
        assert root.allocated == len(stored), (space, root.allocated, len(stored))


def audit(image) -> Audit:
    """Audit a whole image. Raises AssertionError or MetadataError."""
    return Audit(bytes(image)).run()

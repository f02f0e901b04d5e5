"""Editing an image of a pool's metadata block by block with every checksum right: damage that only meaning shows.

In: an `Image` with ways to find blocks and to rewrite nodes, bitmaps, the index, the superblock. Out: which edits make
sense (the tests).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from metadata import MemoryStore, Superblock
from metadata.bitmap import Bitmap, decode_bitmap
from metadata.index import Index, decode_index
from metadata.layout import BLOCK_BYTES, ENTRIES_PER_BITMAP
from metadata.node import Node, decode_node
from metadata.superblock import SpaceMapRoot


class Image(MemoryStore):
    """An image to edit; locations are metadata blocks."""

    def block(self, location: int) -> bytes:
        return self.read(location, 1)

    def put(self, location: int, block: bytes) -> None:
        assert len(block) == BLOCK_BYTES
        self.write(location, block)

    # The superblock

    @property
    def superblock(self) -> Superblock:
        return Superblock.unpack(self.block(0))

    def set_superblock(self, **fields: Any) -> None:
        self.put(0, replace(self.superblock, **fields).pack())

    def set_space(self, name: str, **fields: Any) -> None:
        """Change the root of the `data_space` or `metadata_space` map."""
        root: SpaceMapRoot = getattr(self.superblock, name)
        self.set_superblock(**{name: replace(root, **fields)})

    # Trees

    def node(self, location: int) -> Node:
        return decode_node(self.block(location), location)

    def set_node(self, location: int, keys: Any = None, values: Any = None, **fields: Any) -> None:
        node = self.node(location)
        keys = node.keys if keys is None else np.asarray(keys, np.uint64)
        values = node.values if values is None else np.asarray(values, node.values.dtype)
        self.put(location, replace(node, keys=keys, values=values, **fields).encode(location))

    def edit_values(self, location: int, change: Callable[[Any], None]) -> None:
        values = self.node(location).values.copy()
        change(values)
        self.set_node(location, values=values)

    def root_of(self, device: int) -> int:
        """Root of a device's tree; the top level must be a single leaf."""
        node = self.node(self.superblock.mapping_root)
        assert node.leaf
        return int(node.values[node.keys.tolist().index(device)])

    def leaves(self, root: int) -> list[int]:
        """Leaves of a tree, in order."""
        node = self.node(root)
        if node.leaf:
            return [root]
        return [leaf for child in node.values.tolist() for leaf in self.leaves(child)]

    # Space maps

    def _index(self, space: str, number: int) -> tuple[int, Any]:
        root: SpaceMapRoot = getattr(self.superblock, space)
        if space == "metadata_space":
            return root.bitmap_root, decode_index(self.block(root.bitmap_root), root.bitmap_root).entries[
                number
            ]
        location = root.bitmap_root
        node = self.node(location)
        assert node.leaf
        return location, node.values[number]

    def set_record(self, space: str, number: int, field: str, value: int) -> None:
        """Change one field of the index entry of a bitmap."""
        location, _ = self._index(space, number)
        if space == "metadata_space":
            entries = decode_index(self.block(location), location).entries.copy()
            entries[field][number] = value
            self.put(location, Index(entries).encode(location))
        else:
            values = self.node(location).values.copy()
            values[field][number] = value
            self.set_node(location, values=values)

    def record(self, space: str, number: int) -> Any:
        return self._index(space, number)[1]

    def bitmap_of(self, space: str, block: int) -> tuple[int, int]:
        """Location of the bitmap that counts a block, and the block's place in it."""
        number, entry = divmod(block, ENTRIES_PER_BITMAP)
        return int(self.record(space, number)["location"]), entry

    def count(self, space: str, block: int) -> int:
        """The count in the bitmap, 3 for three and more."""
        location, entry = self.bitmap_of(space, block)
        return int(decode_bitmap(self.block(location), location).counts[entry])

    def set_count(self, space: str, block: int, count: int) -> None:
        """Write a count of 0..3 to the bitmap, and nothing else."""
        location, entry = self.bitmap_of(space, block)
        counts = decode_bitmap(self.block(location), location).counts.copy()
        counts[entry] = count
        self.put(location, Bitmap(counts).encode(location))

    def free_block(self, space: str) -> int:
        """Some block that is not in use."""
        root: SpaceMapRoot = getattr(self.superblock, space)
        return next(block for block in range(root.blocks - 1, 0, -1) if self.count(space, block) == 0)

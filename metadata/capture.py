"""Reading a pool that another process is changing: what holds still, and copying what does not.

In: a store with some blocks replaced, the space maps of one commit in memory, a metadata snapshot dressed up as a pool.
Out: taking metadata snapshots (metadata_snapshot), what is read through all this (recount, dump).

Theory of operation. A metadata snapshot pins the trees of devices and records. The space maps are not pinned, but
nothing that the committed superblock reaches is overwritten while it is the committed one. So the space maps are
copied, which takes milliseconds, and the superblock is read again: if it still is the same, the copy is that commit's.
Together with the pinned trees of that very commit this is everything there is of the pool at one moment.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .errors import MetadataError, NoMetadataSnapshot
from .index import decode_index
from .layout import BLOCK_BYTES, SUPERBLOCK_LOCATION, bitmaps_for
from .node_batch import read_blocks
from .store import BlockStore, Data
from .superblock import SpaceMapRoot, Superblock, read_superblock
from .walk import salvage


class OverlayStore:
    """A store with some blocks replaced; it is never written to, what is written stays in the overlay."""

    def __init__(self, below: BlockStore) -> None:
        self._below = below
        self._blocks: dict[int, bytes] = {}

    def read(self, first: int, count: int) -> bytes:
        """See `BlockStore.read`."""
        here = [location for location in range(first, first + count) if location in self._blocks]
        if len(here) == count:
            return b"".join(self._blocks[location] for location in here)
        data = self._below.read(first, count)
        if not here:
            return data
        patched = bytearray(data)
        for location in here:
            offset = (location - first) * BLOCK_BYTES
            patched[offset : offset + BLOCK_BYTES] = self._blocks[location]
        return bytes(patched)

    def write(self, first: int, data: Data) -> None:
        """Replace blocks, in the overlay only."""
        view = memoryview(data)
        for number in range(len(view) // BLOCK_BYTES):
            self._blocks[first + number] = bytes(view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])

    def flush(self) -> None:
        """See `BlockStore.flush`; nothing to do."""

    def size_blocks(self) -> int:
        """See `BlockStore.size_blocks`."""
        return self._below.size_blocks()

    def close(self) -> None:
        """See `BlockStore.close`."""
        self._below.close()


class _Recorder(OverlayStore):
    """Keeps everything that is read."""

    def read(self, first: int, count: int) -> bytes:
        data = super().read(first, count)
        self.write(first, data)
        return data


def capture_space_maps(store: BlockStore) -> OverlayStore | None:
    """A store that shows the whole pool as it is now, as long as its metadata snapshot stays.

    None where the metadata snapshot is not of the last commit, or another commit came meanwhile. What is damaged is
    left for the reader of the result to find. Raises NotPoolMetadata, BlockDamaged, ShortRead, OSError.
    """
    captured = _Recorder(store)
    superblock = read_superblock(captured)
    if not superblock.held_root:
        return None
    held = Superblock.unpack(store.read(superblock.held_root, 1), superblock.held_root)
    if (held.mapping_root, held.details_root) != (superblock.mapping_root, superblock.details_root):
        return None
    _, records, _ = salvage(captured, 16, superblock.data_space.bitmap_root)
    read_blocks(captured, records["location"].astype(np.uint64))
    salvage(captured, 4, superblock.data_space.overflow_root)
    _read_metadata_map(captured, superblock.metadata_space)
    if store.read(SUPERBLOCK_LOCATION, 1) != captured.read(SUPERBLOCK_LOCATION, 1):
        return None
    still = OverlayStore(store)
    still._blocks = captured._blocks
    return still


def _read_metadata_map(store: BlockStore, root: SpaceMapRoot) -> None:
    salvage(store, 4, root.overflow_root)
    try:
        index = decode_index(store.read(root.bitmap_root, 1), root.bitmap_root)
    except MetadataError:
        return  # the reader will say what is wrong with it
    read_blocks(store, index.entries["location"][: bitmaps_for(root.blocks)].astype(np.uint64))


def snapshot_as_pool(store: BlockStore) -> OverlayStore:
    """A store in which the metadata snapshot is the pool: for a dump that keeps the size of the data.

    Raises NoMetadataSnapshot, NotPoolMetadata, BlockDamaged, ShortRead, OSError.
    """
    superblock = read_superblock(store)
    if not superblock.held_root:
        raise NoMetadataSnapshot
    held = Superblock.unpack(store.read(superblock.held_root, 1), superblock.held_root)
    shown = OverlayStore(store)
    live = replace(
        held,
        location=SUPERBLOCK_LOCATION,
        data_space=superblock.data_space,
        metadata_space=superblock.metadata_space,
    )
    shown.write(SUPERBLOCK_LOCATION, live.pack())
    return shown

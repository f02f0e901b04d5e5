"""The pool that is damaged: three devices and two snapshots, a history of commits, and who owns which block.

In: making it, the same every time, and reading any pool naively. Out: damaging it (damages), judging (judgement).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from metadata import MemoryStore, PoolMetadata, format_pool
from metadata.node import Node, decode_node
from metadata.superblock import Superblock

BLOCK_BYTES = 4096
METADATA_BLOCKS = 700
DATA_BLOCKS = 40_000
DATA_BLOCK_SECTORS = 128
Contents = dict[int, dict[int, int]]


@dataclass(frozen=True)
class Specimen:
    """The image, images of earlier commits, and what a naive reader finds in it.

    `nodes`: blocks of each device's tree. `used`: every block in use, by structure.
    """

    image: bytes
    history: tuple[bytes, ...]
    contents: Contents
    nodes: dict[int, frozenset[int]]
    used: dict[str, tuple[int, ...]]
    transaction_id: int


@cache
def specimen() -> Specimen:
    """Make it: scattered and sequential mappings, snapshots changed after they were taken, discards, freed blocks."""
    random = np.random.default_rng(77)
    store = MemoryStore(METADATA_BLOCKS)
    format_pool(store, data_block_sectors=DATA_BLOCK_SECTORS, data_blocks=DATA_BLOCKS)
    pool = PoolMetadata.open(store)
    free = iter(random.permutation(DATA_BLOCKS).tolist())
    history: list[bytes] = []

    def write(device: int, keys: np.ndarray) -> None:
        values = np.array([next(free) << 24 | pool.time for _ in keys], np.uint64)
        pool.insert(device, keys.astype(np.uint64), values)

    def commit() -> None:
        pool.set_transaction_id(pool.transaction_id + 1)
        pool.commit()
        history.append(bytes(store.image))

    for device, count in ((1, 4000), (2, 3000), (3, 1500)):
        pool.create_device(device)
        scattered = np.sort(random.choice(100_000, count, replace=False))
        write(device, scattered if device < 3 else np.arange(count))
        commit()
    for snapshot, origin in ((11, 1), (12, 2)):
        pool.create_snapshot(snapshot, origin)
        commit()
    for device in (1, 11, 2, 3):
        write(device, np.unique(random.integers(20_000, 30_000, 300)))
        commit()
    pool.remove(2, 30_000, 33_000)
    commit()
    image = history.pop()
    return Specimen(image, tuple(history), *_described(image), pool.transaction_id)


def _described(image: bytes) -> tuple[Contents, dict[int, frozenset[int]], dict[str, tuple[int, ...]]]:
    superblock = Superblock.unpack(image[:BLOCK_BYTES])
    found = dict(_entries(image, superblock.mapping_root))
    contents = {device: dict(_entries(image, root)) for device, root in found.items()}
    nodes = {device: frozenset(_blocks(image, root)) for device, root in found.items()}
    data, metadata = superblock.data_space, superblock.metadata_space
    bitmaps = [int(record[0]) for _, record in _entries(image, data.bitmap_root)]
    used = {
        "superblock": (0,),
        "list of roots": tuple(_blocks(image, superblock.mapping_root)),
        "records": tuple(_blocks(image, superblock.details_root)),
        "mappings": tuple(sorted(frozenset().union(*nodes.values()))),
        "space maps": (
            *bitmaps,
            *_blocks(image, data.bitmap_root),
            *_blocks(image, data.overflow_root),
            *_blocks(image, metadata.overflow_root),
            metadata.bitmap_root,
        ),
    }
    return contents, nodes, used


def _node(image: bytes, location: int) -> Node:
    return decode_node(image[location * BLOCK_BYTES : (location + 1) * BLOCK_BYTES], location)


def _entries(image: bytes, root: int) -> list[tuple[int, Any]]:
    node = _node(image, root)
    if node.leaf:
        return list(zip(node.keys.tolist(), node.values.tolist(), strict=True))
    return [entry for child in node.values.tolist() for entry in _entries(image, child)]


def _blocks(image: bytes, root: int) -> list[int]:
    node = _node(image, root)
    below = [] if node.leaf else [block for child in node.values.tolist() for block in _blocks(image, child)]
    return [root, *below]

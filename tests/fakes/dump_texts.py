"""Dumps in XML, written out by hand or in bulk, and a pool with a snapshot: what dump and restore are tried on."""

from __future__ import annotations

import numpy as np

from metadata import MemoryStore, PoolMetadata, dump, format_pool

SUPERBLOCK = (
    '<superblock uuid="" time="{time}" transaction="7" flags="0" version="2" data_block_size="128" '
    'nr_data_blocks="{blocks}">\n'
)


def our_dump(source, **options) -> str:
    written: list[str] = []
    dump(source, written.append, **options)
    return "".join(written)


def run(begin: int, data: int, length: int, time: int = 0) -> str:
    if length == 1:
        return f'    <single_mapping origin_block="{begin}" data_block="{data}" time="{time}"/>\n'
    return (
        f'    <range_mapping origin_begin="{begin}" data_begin="{data}" length="{length}" time="{time}"/>\n'
    )


def device(number: int, mapped: int, runs: list[str], *, snapshotted: int = 1) -> str:
    head = (
        f'  <device dev_id="{number}" mapped_blocks="{mapped}" transaction="{number % 3}" '
        f'creation_time="0" snap_time="{snapshotted}">\n'
    )
    return head + "".join(runs) + "  </device>\n"


def pool(devices: list[str], *, time: int = 1, blocks: int = 200_000) -> str:
    return SUPERBLOCK.format(time=time, blocks=blocks) + "".join(devices) + "</superblock>\n"


def random_singles(count: int) -> str:
    random = np.random.default_rng(5)
    keys = np.sort(random.choice(1_000_000, count, replace=False)).tolist()
    data = random.permutation(count).tolist()
    return device(0, count, [run(key, block, 1) for key, block in zip(keys, data, strict=True)])


# The table of images in the format specification: what thin_restore is made to build.
SMALL = [run(0, 0, 10), run(20, 100, 1), run(30, 50, 5)]
IMAGES: dict[str, str] = {
    "empty": pool([]),
    "small with holes": pool([device(0, 16, SMALL)]),
    "six devices naming the same blocks": pool(
        [device(n, 1900, [run(0, 0, 1000), run(5000, 2000 + 900 * n, 900, 1)]) for n in range(6)]
    ),
    "80000 random blocks": pool([random_singles(80_000)]),
    "300 devices": pool([device(n, 3, [run(n, 3 * n, 3)]) for n in range(300)]),
    "three empty devices": pool([device(n, 0, []) for n in (1, 5, 2**24 - 1)]),
    "mappings out of order": pool([device(0, 16, SMALL[::-1])]),
    "wrong number of mapped blocks": pool([device(0, 99, SMALL)]),
    "times from zero to the limit": pool(
        [device(1, 30, [run(0, 0, 10, 0), run(10, 10, 10, 1), run(20, 20, 10, 2**24 - 1)])], time=2**24 - 1
    ),
    "highest thin blocks": pool([device(1, 3, [run(2**32, 5, 1), run(2**48 - 2, 7, 2)])]),
}


def two_devices() -> bytes:
    """A device of 70,000 blocks that run through 300 leaves, and a snapshot with a few changed."""
    store = MemoryStore(2000)
    format_pool(store, data_block_sectors=128, data_blocks=100_000)
    metadata = PoolMetadata.open(store)
    metadata.create_device(1)
    keys = np.arange(70_000, dtype=np.uint64)
    metadata.insert(1, keys, keys << np.uint64(24))
    metadata.create_snapshot(2, 1)
    changed = np.array([500, 501, 40_000], np.uint64)
    blocks = np.array([80_500, 80_501, 90_000], np.uint64)
    metadata.insert(2, changed, blocks << np.uint64(24) | np.uint64(1))
    metadata.commit()
    return bytes(store.image)


TWO_DEVICES = two_devices()

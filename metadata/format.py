# ruff: noqa: EM101, EM102, TRY003 -- what is passed to an error is a field, the sentence is made when it is printed
"""Making an empty pool.

In: the first transaction of a pool's life. Out: sizing the metadata (the application's).

The low blocks are laid out as the kernel does: superblock, index of the metadata map, its overflow root, its
bitmaps, then the roots of the other trees; every other structure finds its place by the ordinary commit.
"""

from __future__ import annotations

from .block_cache import BlockCache
from .btree_edit import TreeEditor
from .commit import encode_commit, write_prepared
from .devices import DETAILS_KIND
from .errors import AlreadyFormatted, MetadataFull, OutOfRange
from .layout import (
    BLOCK_BYTES,
    BLOCK_SECTORS,
    DATA_BLOCK_LIMIT,
    DATA_BLOCK_SECTORS_MAX,
    DATA_BLOCK_SECTORS_MIN,
    METADATA_BLOCKS_MAX,
    SUPERBLOCK_LOCATION,
    SUPERBLOCK_MAGIC,
    SUPERBLOCK_VERSION,
    bitmaps_for,
)
from .pool_state import PoolState
from .space_map import INDEX_KIND, OVERFLOW_KIND
from .store import BlockStore
from .superblock import SpaceMapRoot, Superblock, describe
from .tree_kind import TreeKind

_EMPTY_ROOT = SpaceMapRoot(0, 0, 0, 0)


def format_pool(store: BlockStore, *, data_block_sectors: int, data_blocks: int, force: bool = False) -> None:
    """Write an empty pool using all of `store` (at most 4161600 blocks).

    Args:
        store: whole blocks of 4096 bytes, writable.
        data_block_sectors: 128..2097152 (64 KiB..1 GiB), a multiple of 128.
        data_blocks: size of the data space in data blocks.
        force: format even if block 0 is not all zeros.

    Raises:
        OutOfRange: a size the format does not allow.
        AlreadyFormatted: block 0 is in use.
        MetadataFull: the store is too small for an empty pool of this size.
        OSError: as the store reports it.
    """
    _check_sizes(data_block_sectors, data_blocks)
    blocks = min(store.size_blocks(), METADATA_BLOCKS_MAX)
    needed = 9 + bitmaps_for(blocks) + bitmaps_for(data_blocks) * 58 // 56
    if blocks < needed:
        raise MetadataFull(needed, blocks, 0)
    found = describe(store.read(SUPERBLOCK_LOCATION, 1))
    if found and not force:
        raise AlreadyFormatted(found)
    if found:
        # A crash while formatting must not leave the old superblock over overwritten blocks.
        store.write(SUPERBLOCK_LOCATION, bytes(BLOCK_BYTES))
        store.flush()
    state = _lay_out(store, blocks, data_block_sectors)
    if data_blocks:
        state.data_space.grow(data_blocks)
    superblock = state.settle()
    write_prepared(store, encode_commit(superblock, state.transaction.dirty()))


def _check_sizes(data_block_sectors: int, data_blocks: int) -> None:
    low, high = DATA_BLOCK_SECTORS_MIN, DATA_BLOCK_SECTORS_MAX
    if not low <= data_block_sectors <= high or data_block_sectors % low:
        raise OutOfRange(f"data block size in sectors (a multiple of {low})", data_block_sectors, low, high)
    if not 0 <= data_blocks <= DATA_BLOCK_LIMIT:
        raise OutOfRange("number of data blocks", data_blocks, 0, DATA_BLOCK_LIMIT)


def _lay_out(store: BlockStore, blocks: int, data_block_sectors: int) -> PoolState:
    """A state with every structure empty, as if loaded from a pool that has none yet."""
    superblock = Superblock(
        flags=0,
        location=SUPERBLOCK_LOCATION,
        uuid=bytes(16),
        magic=SUPERBLOCK_MAGIC,
        version=SUPERBLOCK_VERSION,
        time=0,
        transaction_id=0,
        held_root=0,
        data_space=_EMPTY_ROOT,
        metadata_space=_EMPTY_ROOT,
        mapping_root=0,
        details_root=0,
        data_block_sectors=data_block_sectors,
        metadata_block_sectors=BLOCK_SECTORS,
        metadata_blocks_at_format=blocks,
        compat_flags=0,
        compat_ro_flags=0,
        incompat_flags=0,
    )
    bootstrap = PoolState(store, BlockCache(store), superblock)
    transaction, metadata_space = bootstrap.transaction, bootstrap.metadata_space
    metadata_space.grow(blocks)
    assert transaction.allocate() == SUPERBLOCK_LOCATION
    index = transaction.allocate()
    metadata_space.adopt_layout(index, TreeEditor(transaction, OVERFLOW_KIND).create())

    def root_of(kind: TreeKind) -> int:
        return TreeEditor(transaction, kind).create()

    bootstrap.data_space.adopt_layout(root_of(INDEX_KIND), root_of(OVERFLOW_KIND))
    bootstrap.mapping.root = root_of(TreeKind("devices' mapping trees", 8))
    bootstrap.devices.root = root_of(DETAILS_KIND)
    return bootstrap

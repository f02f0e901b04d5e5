"""Opening: what is accepted, and how not-a-pool, damaged and unsupported are told apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from metadata import (
    AlreadyFormatted,
    BlockDamaged,
    BlockKind,
    Damage,
    MemoryStore,
    MetadataFull,
    MetadataTooShort,
    NotPoolMetadata,
    OutOfRange,
    PoolMetadata,
    Superblock,
    UnsupportedPool,
    format_pool,
)
from metadata.checksum import seal
from tests.fakes.metadata_audit import audit
from tests.fakes.metadata_pools import kernel_image, new_pool, span


def change(store, **fields):
    store.write(0, replace(Superblock.unpack(store.read(0, 1)), **fields).pack())


@pytest.mark.parametrize("blocks", [0, 1, 100])
def test_zeroed_or_empty_storage_is_no_pool(blocks):
    with pytest.raises(NotPoolMetadata):
        PoolMetadata.open(MemoryStore(blocks))


def test_foreign_content_is_no_pool():
    with pytest.raises(NotPoolMetadata, match="something else"):
        PoolMetadata.open(MemoryStore(b"text" * 4096))
    cache = seal(bytearray(4096), BlockKind.CACHE_SUPERBLOCK, 0)
    with pytest.raises(NotPoolMetadata, match="dm-cache superblock"):
        PoolMetadata.open(MemoryStore(cache))


def test_wrong_magic_is_no_pool():
    store, _ = new_pool()
    change(store, magic=1)
    with pytest.raises(NotPoolMetadata, match="magic"):
        PoolMetadata.open(store)


def test_damaged_superblock_is_damage():
    store, _ = new_pool()
    store.image[50] ^= 1
    with pytest.raises(BlockDamaged) as caught:
        PoolMetadata.open(store)
    assert caught.value.damage is Damage.CHECKSUM


def test_superblock_with_wrong_location():
    store, _ = new_pool()
    block = bytearray(store.read(0, 1))
    store.write(0, seal(block, BlockKind.SUPERBLOCK, 9))
    with pytest.raises(BlockDamaged) as caught:
        PoolMetadata.open(store)
    assert caught.value.damage is Damage.LOCATION


def test_unknown_features():
    store, _ = new_pool()
    change(store, incompat_flags=1)
    for writable in (False, True):
        with pytest.raises(UnsupportedPool):
            PoolMetadata.open(store, writable=writable)
    change(store, incompat_flags=0, compat_ro_flags=4)
    PoolMetadata.open(store, writable=False)
    with pytest.raises(UnsupportedPool):
        PoolMetadata.open(store)
    change(store, compat_ro_flags=0, compat_flags=8)
    PoolMetadata.open(store)


def test_other_versions_are_only_read():
    store, _ = new_pool()
    change(store, version=3)
    PoolMetadata.open(store, writable=False)
    with pytest.raises(UnsupportedPool):
        PoolMetadata.open(store)


def test_truncated_storage():
    store, _ = new_pool(metadata_blocks=200)
    store.resize(199)
    with pytest.raises(MetadataTooShort) as caught:
        PoolMetadata.open(store)
    assert (caught.value.recorded_blocks, caught.value.actual_blocks) == (200, 199)


def test_longer_storage_is_ignored_until_grown():
    store, _ = new_pool(metadata_blocks=200)
    store.resize(300)
    assert PoolMetadata.open(store).metadata_blocks == 200


def test_unknown_bytes_survive_a_commit():
    store, _ = new_pool()
    change(store, uuid=b"0123456789abcdef", flags=6, compat_flags=8, tail=b"z" * 3732)
    pool = PoolMetadata.open(store)
    pool.create_device(1)
    pool.commit()
    after = Superblock.unpack(store.read(0, 1))
    assert (after.uuid, after.flags, after.compat_flags) == (b"0123456789abcdef", 6, 8)
    assert after.tail == b"z" * 3732
    assert pool.uuid == b"0123456789abcdef"


def test_space_map_root_tails_are_rewritten_as_zeros():
    store = MemoryStore(kernel_image("tmeta"))
    pool = PoolMetadata.open(store)
    assert not pool.dirty
    pool.set_transaction_id(pool.transaction_id + 1)
    pool.commit()
    after = Superblock.unpack(store.read(0, 1))
    assert after.data_space.tail == after.metadata_space.tail == bytes(96)


def test_format_refuses_what_is_in_use():
    store, pool = new_pool()
    with pytest.raises(AlreadyFormatted):
        format_pool(store, data_block_sectors=128, data_blocks=10)
    pool.create_device(3)
    pool.commit()
    format_pool(store, data_block_sectors=256, data_blocks=10, force=True)
    pool = PoolMetadata.open(store)
    assert pool.devices() == []
    assert (pool.data_block_sectors, pool.data_blocks) == (256, 10)
    audit(store.image)


@pytest.mark.parametrize("sectors", [0, 64, 129, 2097152 + 128])
def test_format_checks_the_block_size(sectors):
    with pytest.raises(OutOfRange):
        format_pool(MemoryStore(100), data_block_sectors=sectors, data_blocks=1)


def test_format_needs_room():
    with pytest.raises(MetadataFull):
        format_pool(MemoryStore(9), data_block_sectors=128, data_blocks=1)
    with pytest.raises(OutOfRange):
        format_pool(MemoryStore(100), data_block_sectors=128, data_blocks=2**40 + 1)


@pytest.mark.parametrize(
    ("metadata_blocks", "data_blocks"), [(16, 0), (1024, 20000), (16321, 1), (40000, 500_000)]
)
def test_fresh_pools_are_consistent(metadata_blocks, data_blocks):
    store, pool = new_pool(metadata_blocks, data_blocks)
    found = audit(store.image)
    assert not found.devices
    assert pool.metadata_blocks == metadata_blocks
    assert pool.data_blocks == data_blocks
    assert not pool.dirty
    assert pool.metadata_blocks_free == metadata_blocks - len(found.metadata_counts)
    assert Superblock.unpack(store.read(0, 1)).metadata_space.bitmap_root == 1


def test_reads_verify_nodes():
    store, pool = new_pool()
    pool.create_device(1)
    pool.insert(1, span(0, 10), span(0, 10) << 24)
    pool.commit()
    root = Superblock.unpack(store.read(0, 1)).mapping_root
    store.image[root * 4096 + 40] ^= 1
    with pytest.raises(BlockDamaged) as caught:
        PoolMetadata.open(store).lookup(1, 5)
    assert caught.value.location == root

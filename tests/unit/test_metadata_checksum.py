"""Checksums of metadata blocks against known values, and both CRC implementations against each other."""

from __future__ import annotations

import random

import crc32c
import pytest

from metadata import BlockDamaged, BlockKind, Damage
from metadata.checksum import portable_crc32c, raw_sum, seal, sniff, verify

# All-zero 4096-byte blocks, from the format specification.
ZERO_BLOCK_SUMS = {
    BlockKind.SUPERBLOCK: 0x58CFD397,
    BlockKind.NODE: 0x58CC7E82,
    BlockKind.BITMAP: 0x58CE0B1A,
    BlockKind.INDEX: 0x58CFD54F,
}


@pytest.mark.parametrize(("kind", "expected"), ZERO_BLOCK_SUMS.items())
def test_zero_block(kind, expected):
    assert raw_sum(bytes(4096)) ^ kind == expected


def test_standard_check_value():
    assert portable_crc32c()(b"123456789") == 0xE3069283
    assert crc32c.crc32c(b"123456789") == 0xE3069283


def test_fast_and_portable_agree():
    generator = random.Random(7)
    portable = portable_crc32c()
    for length in (0, 1, 7, 8, 63, 4092, 5000):
        data = generator.randbytes(length)
        assert portable(data) == crc32c.crc32c(data)


@pytest.mark.parametrize("kind", list(BlockKind))
def test_sealed_blocks_are_recognised(kind):
    block = seal(bytearray(random.Random(kind).randbytes(4096)), kind, 77)
    assert sniff(block) is kind
    verify(block, kind, 77)


def damage_of(block, kind=BlockKind.NODE, location=5):
    with pytest.raises(BlockDamaged) as caught:
        verify(block, kind, location)
    assert caught.value.location == location
    return caught.value.damage


def test_first_damage_is_reported_in_order():
    good = seal(bytearray(4096), BlockKind.NODE, 5)
    assert damage_of(good[:4095]) is Damage.SHORT
    assert damage_of(bytes(4096)) is Damage.ZEROED
    assert damage_of(good, BlockKind.BITMAP) is Damage.OTHER_KIND
    assert damage_of(good[:100] + b"x" + good[101:]) is Damage.CHECKSUM
    assert damage_of(good, location=6) is Damage.LOCATION
    # Both wrong: the kind comes before the location.
    assert damage_of(good, BlockKind.BITMAP, 6) is Damage.OTHER_KIND


def test_other_kind_is_named():
    block = seal(bytearray(4096), BlockKind.CACHE_SUPERBLOCK, 0)
    with pytest.raises(BlockDamaged, match="dm-cache superblock"):
        verify(block, BlockKind.SUPERBLOCK, 0)

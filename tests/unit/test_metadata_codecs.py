"""Block codecs: real kernel-made blocks survive them byte for byte, damaged ones are refused in a fixed order."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from metadata import BlockDamaged, BlockKind, Damage
from metadata.bitmap import Bitmap, decode_bitmap, summary, used_bits
from metadata.checksum import seal, sniff
from metadata.index import decode_index
from metadata.layout import ENTRIES_PER_BITMAP, VALUE_TYPES, bitmaps_for, max_entries
from metadata.node import decode_node, make_internal, make_leaf
from metadata.superblock import Superblock
from tests.fakes.metadata_pools import INTACT_IMAGES, kernel_image, span


def without_slack(raw: bytes) -> bytes:
    """A node with the slots past its entries zeroed, sealed again: what an encoder that writes no stale bytes gives."""
    _, _, location, count, capacity, size, _ = struct.unpack_from("<IIQIIII", raw)
    block = bytearray(raw)
    block[32 + 8 * count : 32 + 8 * capacity] = bytes(8 * (capacity - count))
    values_end = 32 + 8 * capacity + size * count
    block[values_end:] = bytes(4096 - values_end)
    return seal(block, BlockKind.NODE, location)


@pytest.mark.parametrize("name", INTACT_IMAGES)
def test_kernel_blocks_round_trip(name):
    image = kernel_image(name)
    seen = set()
    for location in range(len(image) // 4096):
        raw = image[location * 4096 : (location + 1) * 4096]
        kind = sniff(raw)
        if raw == bytes(4096) or kind is None:
            continue
        seen.add(kind)
        if struct.unpack_from("<Q", raw, 8)[0] != location:
            continue
        if kind is BlockKind.SUPERBLOCK:
            assert Superblock.unpack(raw, location).pack() == raw
        elif kind is BlockKind.BITMAP:
            assert decode_bitmap(raw, location).encode(location) == raw
        elif kind is BlockKind.INDEX:
            assert decode_index(raw, location).encode(location) == raw
        elif kind is BlockKind.NODE:
            assert decode_node(raw, location).encode(location) == without_slack(raw)
    assert seen == {BlockKind.SUPERBLOCK, BlockKind.BITMAP, BlockKind.INDEX, BlockKind.NODE}


@pytest.mark.parametrize(("size", "capacity"), [(4, 336), (8, 252), (16, 168), (24, 126)])
def test_node_capacity_and_round_trip(size, capacity):
    assert max_entries(size) == capacity
    for count in (0, 1, capacity):
        values = np.zeros(count, VALUE_TYPES[size])
        values.view(np.uint8)[:] = np.arange(count * size) % 251
        node = make_leaf(span(9, count), values)
        again = decode_node(node.encode(3), 3)
        assert again.leaf
        assert again.capacity == capacity
        assert again.keys.tolist() == node.keys.tolist()
        assert again.values.tobytes() == values.tobytes()


def raw_node(flags=2, count=2, capacity=252, size=8, keys=(1, 2), location=4):
    block = bytearray(4096)
    struct.pack_into("<IIQIIII", block, 0, 0, flags, location, count, capacity, size, 0)
    struct.pack_into(f"<{len(keys)}Q", block, 32, *keys)
    return seal(block, BlockKind.NODE, location)


@pytest.mark.parametrize(
    ("fields", "damage"),
    [
        ({"flags": 0}, Damage.NODE_FLAGS),
        ({"flags": 3, "size": 7}, Damage.NODE_FLAGS),
        ({"size": 7, "capacity": 1}, Damage.VALUE_SIZE),
        ({"flags": 1, "size": 4}, Damage.VALUE_SIZE),
        ({"capacity": 253, "count": 400}, Damage.MAX_ENTRIES),
        ({"capacity": 250}, Damage.MAX_ENTRIES),
        ({"capacity": 0}, Damage.MAX_ENTRIES),
        ({"capacity": 249, "count": 250, "keys": (2, 1)}, Damage.ENTRY_COUNT),
        ({"flags": 1, "count": 0}, Damage.EMPTY_INTERNAL),
        ({"keys": (2, 2)}, Damage.KEY_ORDER),
        ({"keys": (3, 2)}, Damage.KEY_ORDER),
    ],
)
def test_node_damage_in_order(fields, damage):
    with pytest.raises(BlockDamaged) as caught:
        decode_node(raw_node(**fields), 4)
    assert caught.value.damage is damage


def test_node_with_smaller_capacity_is_read_by_its_own():
    node = decode_node(raw_node(capacity=249), 4)
    assert node.capacity == 249
    assert node.minimum == 83


def test_internal_node_holds_children():
    node = decode_node(make_internal(span(0, 3), span(7, 3)).encode(8), 8)
    assert not node.leaf
    assert node.values.tolist() == [7, 8, 9]


def test_bitmap_bit_order():
    """The high bit of a count comes first: 1 is stored as 0b10 and 2 as 0b01."""
    counts = np.zeros(ENTRIES_PER_BITMAP, np.uint32)
    counts[:6] = [0, 1, 2, 3, 1, 99]
    raw = Bitmap(counts).encode(6)
    assert raw[16] == 0b00 | 0b10 << 2 | 0b01 << 4 | 0b11 << 6
    assert raw[17] == 0b10 | 0b11 << 2
    assert decode_bitmap(raw, 6).counts[:6].tolist() == [0, 1, 2, 3, 1, 3]
    assert np.unpackbits(used_bits(raw, 6))[:7].tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_bitmap_summary():
    counts = np.ones(ENTRIES_PER_BITMAP, np.uint32)
    assert summary(counts) == (0, ENTRIES_PER_BITMAP)
    counts[[5, 9]] = 0
    assert summary(counts) == (2, 5)
    counts[:] = 0
    assert summary(counts) == (ENTRIES_PER_BITMAP, 0)


@pytest.mark.parametrize(("blocks", "bitmaps"), [(0, 0), (1, 1), (16320, 1), (16321, 2)])
def test_bitmaps_for(blocks, bitmaps):
    assert bitmaps_for(blocks) == bitmaps

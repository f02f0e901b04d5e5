"""Checksums of metadata blocks, and telling the kinds of blocks apart by them.

In: CRC-32C as dm uses it, sealing and verifying whole blocks. Out: what the blocks contain.

Every metadata block starts with a 32-bit checksum and has its own number at offset 8. The checksum is
CRC-32C over bytes 4..4095 with initial value all ones and *no* final inversion, XORed with a constant
of the block's kind (dm-block-manager.c, dm-btree-spine.c, dm-space-map-common.c). So computed XOR
stored names the kind of an intact block: "damaged" and "intact, but of another kind" can be told apart.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum

from .errors import BlockDamaged, Damage
from .layout import BLOCK_BYTES

_SUM = struct.Struct("<I")
_LOCATION = struct.Struct("<Q")
_LOCATION_OFFSET = 8
_ALL_ONES = 0xFFFFFFFF
_ZEROS = bytes(BLOCK_BYTES)


class BlockKind(IntEnum):
    """Checksum constants; the last three belong to dm targets other than thin."""

    SUPERBLOCK = 160774
    NODE = 121107
    BITMAP = 240779
    INDEX = 160478
    CACHE_SUPERBLOCK = 9031977
    ERA_SUPERBLOCK = 146538381
    ARRAY = 595846735

    @property
    def label(self) -> str:
        """Name for people."""
        return _LABELS[self]


_LABELS = {
    BlockKind.SUPERBLOCK: "thin pool superblock",
    BlockKind.NODE: "B-tree node",
    BlockKind.BITMAP: "space map bitmap",
    BlockKind.INDEX: "space map index",
    BlockKind.CACHE_SUPERBLOCK: "dm-cache superblock",
    BlockKind.ERA_SUPERBLOCK: "dm-era superblock",
    BlockKind.ARRAY: "dm array block",
}
_KINDS = {int(kind): kind for kind in BlockKind}


def portable_crc32c() -> Callable[..., int]:
    """The pure fallback implementation (standard CRC-32C, with final inversion)."""
    import crcmod.predefined

    function: Callable[..., int] = crcmod.predefined.mkPredefinedCrcFun("crc-32c")
    return function


def _choose() -> Callable[..., int]:
    try:
        import crc32c as fast
    except ImportError:  # pragma: no cover - depends on the platform's wheels
        return portable_crc32c()
    function: Callable[..., int] = fast.crc32c
    return function


_crc = _choose()


def crc32c(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """The standard CRC-32C of `data`; `before` is that of the bytes in front of it."""
    return _crc(data, before)


def raw_sum(block: bytes | bytearray | memoryview) -> int:
    """CRC-32C of bytes 4.. of `block` without the final inversion and without a kind constant."""
    return _crc(memoryview(block)[4:]) ^ _ALL_ONES


def seal(block: bytearray, kind: BlockKind, location: int) -> bytes:
    """Fill in location and checksum of a 4096-byte block and return it as bytes."""
    _LOCATION.pack_into(block, _LOCATION_OFFSET, location)
    _SUM.pack_into(block, 0, raw_sum(block) ^ kind)
    return bytes(block)


def sniff(block: bytes) -> BlockKind | None:
    """The kind of an intact block, None when the checksum fits no kind."""
    return _KINDS.get(raw_sum(block) ^ _SUM.unpack_from(block)[0])


def recorded_location(block: bytes) -> int:
    """The number that a block of any kind has noted as its own."""
    location: int = _LOCATION.unpack_from(block, _LOCATION_OFFSET)[0]
    return location


def verify(block: bytes, kind: BlockKind, location: int) -> None:
    """Check length, checksum, kind and recorded location, in this order.

    Raises:
        BlockDamaged: naming the first thing that is wrong and what was found instead.
    """
    if len(block) != BLOCK_BYTES:
        raise BlockDamaged(location, kind.label, Damage.SHORT, f"{len(block)} bytes")
    constant = raw_sum(block) ^ _SUM.unpack_from(block)[0]
    if constant != kind:
        if block == _ZEROS:
            raise BlockDamaged(location, kind.label, Damage.ZEROED)
        other = _KINDS.get(constant)
        if other is not None:
            raise BlockDamaged(location, kind.label, Damage.OTHER_KIND, f"found a {other.label}")
        raise BlockDamaged(location, kind.label, Damage.CHECKSUM)
    recorded = recorded_location(block)
    if recorded != location:
        raise BlockDamaged(location, kind.label, Damage.LOCATION, f"block {recorded}")

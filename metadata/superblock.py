# ruff: noqa: EM101, EM102, TRY003 -- what is passed to an error is a field, the sentence is made when it is printed
"""The superblock: block 0, the only block ever overwritten in place, and its held copies.

In: codec of the 4096 bytes and of the space map roots in it; acceptance rules on opening.
Out: when it is written (commit), what the roots point at.
Field order and meaning: struct thin_disk_superblock in drivers/md/dm-thin-metadata.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .checksum import BlockKind, seal, sniff, verify
from .errors import BlockDamaged, Damage, NotPoolMetadata, UnsupportedPool
from .layout import (
    BLOCK_BYTES,
    BLOCK_SECTORS,
    METADATA_BLOCKS_MAX,
    NEEDS_CHECK_FLAG,
    SUPERBLOCK_LOCATION,
    SUPERBLOCK_MAGIC,
    SUPERBLOCK_VERSION,
)
from .store import BlockStore

SPACE_MAP_ROOT_BYTES = 128


@dataclass(frozen=True, slots=True)
class SpaceMapRoot:
    """Head of one space map: 32 bytes at the start of a 128-byte field (struct disk_sm_root).

    The other 96 bytes are uninitialised memory in kernel-made pools; they are kept in `tail` when read.
    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QQQQ")

    blocks: int
    allocated: int
    bitmap_root: int
    overflow_root: int
    tail: bytes = field(default=bytes(SPACE_MAP_ROOT_BYTES - 32), repr=False)

    @classmethod
    def unpack(cls, raw: bytes) -> SpaceMapRoot:
        """From the 128 bytes of the field."""
        blocks, allocated, bitmap_root, overflow_root = cls.LAYOUT.unpack_from(raw)
        return cls(blocks, allocated, bitmap_root, overflow_root, raw[cls.LAYOUT.size :])

    def pack(self) -> bytes:
        """The 128 bytes of the field."""
        return self.LAYOUT.pack(self.blocks, self.allocated, self.bitmap_root, self.overflow_root) + self.tail


assert SpaceMapRoot.LAYOUT.size == 32


@dataclass(frozen=True, slots=True)
class Superblock:
    """All fields of the superblock; `tail` holds the bytes past the last known field."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIQ16sQIIQQ128s128sQQIIQIII")

    flags: int
    location: int
    uuid: bytes
    magic: int
    version: int
    time: int
    transaction_id: int
    held_root: int
    data_space: SpaceMapRoot
    metadata_space: SpaceMapRoot
    mapping_root: int
    details_root: int
    data_block_sectors: int
    metadata_block_sectors: int
    metadata_blocks_at_format: int
    compat_flags: int
    compat_ro_flags: int
    incompat_flags: int
    tail: bytes = field(default=bytes(BLOCK_BYTES - 364), repr=False)

    @property
    def needs_check(self) -> bool:
        """Whether the flag that blocks read-write activation is set."""
        return bool(self.flags & NEEDS_CHECK_FLAG)

    @classmethod
    def unpack(cls, raw: bytes, location: int = SUPERBLOCK_LOCATION) -> Superblock:
        """Decode and verify.

        Raises:
            BlockDamaged: checksum, kind or recorded location is wrong.
        """
        verify(raw, BlockKind.SUPERBLOCK, location)
        fields: list[Any] = list(cls.LAYOUT.unpack_from(raw))[1:]
        fields[8:10] = [SpaceMapRoot.unpack(fields[8]), SpaceMapRoot.unpack(fields[9])]
        fields.append(raw[cls.LAYOUT.size :])
        return cls(*fields)

    def pack(self) -> bytes:
        """The 4096 bytes, checksum included."""
        block = bytearray(BLOCK_BYTES)
        self.LAYOUT.pack_into(
            block,
            0,
            0,
            self.flags,
            self.location,
            self.uuid,
            self.magic,
            self.version,
            self.time,
            self.transaction_id,
            self.held_root,
            self.data_space.pack(),
            self.metadata_space.pack(),
            self.mapping_root,
            self.details_root,
            self.data_block_sectors,
            self.metadata_block_sectors,
            self.metadata_blocks_at_format,
            self.compat_flags,
            self.compat_ro_flags,
            self.incompat_flags,
        )
        block[self.LAYOUT.size :] = self.tail
        return seal(block, BlockKind.SUPERBLOCK, self.location)

    def encode(self, location: int) -> bytes:
        """As `pack`, for a copy kept among other changed blocks."""
        assert location == self.location, location
        return self.pack()


assert Superblock.LAYOUT.size == 364

_MAGIC = struct.Struct("<Q")
_MAGIC_OFFSET = 32


def describe(raw: bytes) -> str:
    """What block 0 holds, as the end of the sentence "block 0 ...". Empty when it is all zeros."""
    if raw == bytes(len(raw)):
        return ""
    kind = sniff(raw) if len(raw) == BLOCK_BYTES else None
    if kind is not None:
        return f"is a {kind.label}"
    if _has_magic(raw):
        return "has the magic of a thin pool superblock, but is damaged"
    return "holds something else"


def _has_magic(raw: bytes) -> bool:
    return (
        len(raw) >= _MAGIC_OFFSET + _MAGIC.size
        and _MAGIC.unpack_from(raw, _MAGIC_OFFSET)[0] == SUPERBLOCK_MAGIC
    )


def read_superblock(store: BlockStore) -> Superblock:
    """Read and verify block 0.

    Raises:
        NotPoolMetadata: zeros, too short, another target's superblock, or no trace of a thin superblock.
        BlockDamaged: it was a thin superblock but is damaged.
    """
    if store.size_blocks() == 0:
        raise NotPoolMetadata("does not exist: the storage is shorter than one block")
    raw = store.read(SUPERBLOCK_LOCATION, 1)
    kind = sniff(raw)
    if kind is not BlockKind.SUPERBLOCK and not _has_magic(raw):
        raise NotPoolMetadata(describe(raw) or "is all zeros (not formatted yet)")
    superblock = Superblock.unpack(raw)
    if superblock.magic != SUPERBLOCK_MAGIC:
        raise NotPoolMetadata(f"has the wrong magic number {superblock.magic}")
    return superblock


def check_acceptable(superblock: Superblock, *, writable: bool) -> None:
    """Apply the acceptance rules of the kernel, and refuse to write versions it would not write.

    Raises:
        UnsupportedPool: unknown incompatible features, or (when writing) unknown version or read-only features.
        BlockDamaged: sizes no pool can have.
    """
    if superblock.incompat_flags:
        raise UnsupportedPool("unknown incompatible features", superblock.incompat_flags, writable)
    if writable and superblock.compat_ro_flags:
        raise UnsupportedPool("features that forbid writing", superblock.compat_ro_flags, writable)
    if writable and superblock.version != SUPERBLOCK_VERSION:
        raise UnsupportedPool("version", superblock.version, writable)
    label = BlockKind.SUPERBLOCK.label
    if superblock.metadata_block_sectors != BLOCK_SECTORS:
        raise BlockDamaged(
            0, label, Damage.RANGE, f"metadata block size of {superblock.metadata_block_sectors} sectors"
        )
    if superblock.metadata_space.blocks > METADATA_BLOCKS_MAX:
        raise BlockDamaged(0, label, Damage.RANGE, f"{superblock.metadata_space.blocks} metadata blocks")

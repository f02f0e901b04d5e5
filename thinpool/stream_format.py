"""The bytes of a stream: what `thinpool send` writes and `thinpool receive` reads.

docs/stream-format.md has the tables.

In: the preamble, records with their checksums, the fields of the first and the last record. Out: where the data comes
from (`sending.py`) and goes to (`receiving.py`).

A stream is a preamble and records; each record has a header of 40 bytes and a payload. Everything is big-endian, as on
other wires. Three things guard it: the checksum of a record covers its header and its payload, the number of a record
says which one it is, so none can go missing, come twice or change places, and the last record holds a SHA-256 of all
bytes before it. Only a stream that ends with it is whole.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar

from metadata.checksum import crc32c

from .errors import StreamDamaged, StreamUnsupported

# As in PNG: a bit above seven, a name, both kinds of line end, the end of file of DOS and a zero tell a stream that
# went through something that takes it for text.
MAGIC = b"\x89TPSTRM\r\n\x1a\n\0"
VERSION = 1
RECORD_BYTES_MAX = 1 << 20  # of a device, in one data record
PAYLOAD_BYTES_MAX = (1 << 20) + (1 << 16)
NO_IDENTITY = bytes(16)
NAME_BYTES_MAX = 255
Buffer = bytes | bytearray | memoryview

_PREAMBLE = struct.Struct(">12sHHI")
assert len(MAGIC) == 12
assert _PREAMBLE.size == 20


class RecordKind(IntEnum):
    """What a record says. A reader skips unknown kinds from `OPTIONAL` on, and refuses other unknown ones."""

    BEGIN = 1
    DATA = 2
    HOLE = 3
    END = 4
    BASES = 0x8001


OPTIONAL = 0x8000


class RecordFlag(IntFlag):
    """How a payload is packed."""

    ZSTD = 1


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """One record: `length_bytes` of the device from `offset_bytes` on, and the payload that follows."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(">HHQQQIII")
    FIXED: ClassVar[struct.Struct] = struct.Struct(">HHQQQII")
    CHECKSUM: ClassVar[struct.Struct] = struct.Struct(">I")

    kind: int
    flags: int
    number: int
    offset_bytes: int
    length_bytes: int
    payload_bytes: int
    checksum: int = 0

    def encode(self, payload: Buffer) -> bytes:
        """The header of a record with this payload."""
        fixed = self.FIXED.pack(
            self.kind, self.flags, self.number, self.offset_bytes, self.length_bytes, len(payload), 0
        )
        return fixed + self.CHECKSUM.pack(crc32c(payload, crc32c(fixed)))

    @classmethod
    def decode(cls, raw: Buffer) -> RecordHeader:
        """The fields, nothing checked."""
        kind, flags, number, offset, length, payload, _, checksum = cls.LAYOUT.unpack(raw)
        return cls(kind, flags, number, offset, length, payload, checksum)


HEADER_BYTES = RecordHeader.LAYOUT.size
assert HEADER_BYTES == 40
assert RecordHeader.FIXED.size + RecordHeader.CHECKSUM.size == HEADER_BYTES


def checked_record(raw: Buffer, payload: Buffer, header: RecordHeader) -> bool:
    """Whether header and payload are what was written."""
    return crc32c(payload, crc32c(raw[: RecordHeader.FIXED.size])) == header.checksum


def preamble() -> bytes:
    """The first bytes of a stream."""
    fields = _PREAMBLE.pack(MAGIC, VERSION, 0, 0)[:-4]
    return fields + RecordHeader.CHECKSUM.pack(crc32c(fields))


PREAMBLE_BYTES = _PREAMBLE.size


def check_preamble(raw: Buffer) -> None:
    """Raise StreamDamaged or StreamUnsupported unless a stream of our version begins so."""
    magic, version, _, checksum = _PREAMBLE.unpack(raw)
    if magic != MAGIC:
        raise StreamDamaged(reason="it does not begin as a thinpool stream does", position_bytes=0)
    if checksum != crc32c(raw[:-4]):
        raise StreamDamaged(reason="its first bytes were changed", position_bytes=0)
    if version != VERSION:
        raise StreamUnsupported(reason=f"it is of version {version}, known is {VERSION}")


class BeginFlag(IntFlag):
    """What kind of stream begins."""

    INCREMENT = 1
    READ_ONLY = 2
    RESUMED = 4


@dataclass(frozen=True, slots=True)
class Begin:
    """The first record: what is coming.

    `base_content_id` is None for a full stream. `start_bytes` is where the records begin; not 0 in a resumed stream.
    `data_bytes` is how much data is coming before packing: an estimate for progress, nothing relies on it.
    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(">QQQQIIq16s16s16s16sHH")

    name: str
    size_bytes: int
    block_bytes: int
    device_uuid: str
    content_id: str
    created_seconds: int
    read_only: bool = True
    base_name: str = ""
    base_uuid: str | None = None
    base_content_id: str | None = None
    base_size_bytes: int = 0
    start_bytes: int = 0
    data_bytes: int = 0

    def encode(self) -> bytes:
        """The payload of the first record."""
        flags = BeginFlag.INCREMENT if self.base_content_id is not None else BeginFlag(0)
        flags |= BeginFlag.READ_ONLY if self.read_only else BeginFlag(0)
        flags |= BeginFlag.RESUMED if self.start_bytes else BeginFlag(0)
        name, base_name = self.name.encode(), self.base_name.encode()
        fixed = self.LAYOUT.pack(
            self.size_bytes,
            self.base_size_bytes,
            self.start_bytes,
            self.data_bytes,
            self.block_bytes,
            int(flags),
            self.created_seconds,
            _identity(self.device_uuid),
            _identity(self.content_id),
            _identity(self.base_uuid),
            _identity(self.base_content_id),
            len(name),
            len(base_name),
        )
        return fixed + name + base_name

    @classmethod
    def decode(cls, payload: Buffer) -> Begin:
        """Read the first record. Raises ValueError for fields that make no sense."""
        if len(payload) < cls.LAYOUT.size:
            raise ValueError(payload)
        fields = cls.LAYOUT.unpack(payload[: cls.LAYOUT.size])
        size, base_size, start, data, block, flags, created, device, content, base_device, base, *lengths = (
            fields
        )
        names = bytes(payload[cls.LAYOUT.size :])
        increment = bool(flags & BeginFlag.INCREMENT)
        sensible = (
            len(names) >= sum(lengths)
            and max(lengths) <= NAME_BYTES_MAX
            and 0 < size < 1 << 63
            and start <= size
            and block > 0
            and content != NO_IDENTITY
            and increment == (base != NO_IDENTITY)
        )
        if not sensible:
            raise ValueError(payload)
        return cls(
            name=names[: lengths[0]].decode(),
            size_bytes=size,
            block_bytes=block,
            device_uuid=str(uuid.UUID(bytes=device)),
            content_id=str(uuid.UUID(bytes=content)),
            created_seconds=created,
            read_only=bool(flags & BeginFlag.READ_ONLY),
            base_name=names[lengths[0] : sum(lengths)].decode(),
            base_uuid=str(uuid.UUID(bytes=base_device)) if increment else None,
            base_content_id=str(uuid.UUID(bytes=base)) if increment else None,
            base_size_bytes=base_size,
            start_bytes=start,
            data_bytes=data,
        )


assert Begin.LAYOUT.size == 116


@dataclass(frozen=True, slots=True)
class End:
    """The last record: how many records came before it, how much data they held, the SHA-256 of all bytes so far."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(">QQ32s")

    records: int
    data_bytes: int
    digest: bytes

    def encode(self) -> bytes:
        """The payload of the last record."""
        return self.LAYOUT.pack(self.records, self.data_bytes, self.digest)

    @classmethod
    def decode(cls, payload: Buffer) -> End:
        """Read the last record. Raises ValueError."""
        if len(payload) != cls.LAYOUT.size:
            raise ValueError(payload)
        return cls(*cls.LAYOUT.unpack(payload))


def _identity(text: str | None) -> bytes:
    return NO_IDENTITY if text is None else uuid.UUID(text).bytes

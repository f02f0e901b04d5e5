"""Layouts of every message of the protocol: one precompiled `struct.Struct` each, sizes checked at import.

In: layouts and the few encoders and decoders that are more than one pack call. Out: rules about when a
message is legal. All integers on the wire are big-endian and unsigned.
"""

import struct
from typing import NamedTuple

from .constants import (
    CHUNK_DONE,
    EXTENDED_REPLY_MAGIC,
    OPTION_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRING_BYTES_MAX,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Errno,
)

GREETING = struct.Struct(">QQH")  # init magic, option magic, handshake flags
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")  # option magic, option, length
OPTION_REPLY = struct.Struct(">QIII")  # reply magic, option, reply type, length
EXPORT_NAME_REPLY = struct.Struct(">QH")  # size, transmission flags
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")
INFO_EXPORT = struct.Struct(">HQH")  # info type, size, transmission flags
INFO_BLOCK_SIZE = struct.Struct(">HIII")  # info type, minimum, preferred, maximum payload

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
STRUCTURED_CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, request offset, length

HOLE = struct.Struct(">QI")  # offset, size
ERROR = struct.Struct(">IH")  # error, message length
STATUS_32 = struct.Struct(">II")  # extent length, status
STATUS_64 = struct.Struct(">QQ")
STATUS_HEAD_64 = struct.Struct(">II")  # context id, number of extents

assert GREETING.size == 18
assert OPTION.size == 16
assert OPTION_REPLY.size == 20
assert EXPORT_NAME_REPLY.size == 10
assert INFO_EXPORT.size == 12
assert INFO_BLOCK_SIZE.size == 14
assert REQUEST.size == 28
assert EXTENDED_REQUEST.size == 32
assert SIMPLE_REPLY.size == 16
assert STRUCTURED_CHUNK.size == 20
assert EXTENDED_CHUNK.size == 32
assert HOLE.size == 12
assert ERROR.size == 6

# The same layouts with their leading constants joined into one number, for the hot loop: the first eight
# bytes of a request are magic, flags and command, so a plain READ or WRITE is recognised by a single
# comparison.
HOT_REQUEST = struct.Struct(">QQQI")
HOT_EXTENDED_REQUEST = struct.Struct(">QQQQ")
HOT_SIMPLE_OK = struct.Struct(">QQ")  # (magic, no error), cookie
HOT_STRUCTURED_DATA = struct.Struct(">QQIQ")  # (magic, flags, type), cookie, length, data offset
HOT_STRUCTURED_HOLE = struct.Struct(">QQIQI")  # ..., hole size
HOT_STRUCTURED_NONE = struct.Struct(">QQI")  # (magic, flags, type), cookie, no length
HOT_EXTENDED_DATA = struct.Struct(
    ">QQQQQ"
)  # (magic, flags, type), cookie, request offset, length, data offset
HOT_EXTENDED_HOLE = struct.Struct(">QQQQQI")
HOT_EXTENDED_NONE = struct.Struct(">QQQQ")

assert HOT_REQUEST.size == REQUEST.size
assert HOT_EXTENDED_REQUEST.size == EXTENDED_REQUEST.size
assert HOT_SIMPLE_OK.size == SIMPLE_REPLY.size
assert HOT_STRUCTURED_DATA.size == STRUCTURED_CHUNK.size + U64.size
assert HOT_EXTENDED_DATA.size == EXTENDED_CHUNK.size + U64.size


class Request(NamedTuple):
    """The fields of a request's header, the magic left out."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


def hot_kind(magic: int, flags: int, kind: int) -> int:
    """Return the first eight bytes of a request or chunk as one number."""
    return magic << 32 | flags << 16 | kind


HOT_SIMPLE_OK_KIND = SIMPLE_REPLY_MAGIC << 32


def limited_text(text: str) -> bytes:
    """Encode a text for the peer's user: UTF-8, at most 4096 bytes, never cut inside a character."""
    encoded = text.encode("utf-8", errors="replace")
    return encoded[:STRING_BYTES_MAX].decode("utf-8", errors="ignore").encode()


def option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """Encode one reply to a handshake option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def counted_string(value: bytes) -> bytes:
    """Encode a string behind its 32-bit length."""
    return U32.pack(len(value)) + value


def simple_reply(cookie: int, error: Errno = Errno.OK) -> bytes:
    """Encode the header of a simple reply."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def structured_chunk(cookie: int, kind: ChunkType, length: int, *, done: bool) -> bytes:
    """Encode the header of a structured reply chunk whose payload has `length` bytes."""
    return STRUCTURED_CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE if done else 0, kind, cookie, length)


def extended_chunk(cookie: int, offset: int, kind: ChunkType, length: int, *, done: bool) -> bytes:
    """Encode the header of an extended reply chunk; `offset` repeats the request's."""
    return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, CHUNK_DONE if done else 0, kind, cookie, offset, length)


def error_payload(error: Errno, message: str) -> bytes:
    """Encode the payload of an ERROR chunk."""
    text = limited_text(message)
    return ERROR.pack(error, len(text)) + text


def status_payload(context_id: int, extents: list[tuple[int, int]], *, wide: bool) -> bytes:
    """Encode the payload of a block-status chunk; `extents` are (length in bytes, status) pairs."""
    flat = [number for extent in extents for number in extent]
    if wide:
        return STATUS_HEAD_64.pack(context_id, len(extents)) + struct.pack(f">{len(flat)}Q", *flat)
    return U32.pack(context_id) + struct.pack(f">{len(flat)}I", *flat)

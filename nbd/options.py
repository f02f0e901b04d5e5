"""Payloads of handshake options: strict decoders for the server's side, encoders for the client's.

In: bytes to fields and back, with every inner length checked against the payload. Out: what an option means.
A decoder raises `OptionInvalid`; the caller answers ERR_INVALID and the connection stays usable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .constants import STRING_BYTES_MAX
from .errors import OptionInvalid
from .wire import U16, U32, counted_string


@dataclass(frozen=True, slots=True)
class ExportQuery:
    """Payload of INFO and GO."""

    name: str
    info_types: frozenset[int]


@dataclass(frozen=True, slots=True)
class ContextQuery:
    """Payload of LIST_META_CONTEXT and SET_META_CONTEXT."""

    export_name: str
    queries: tuple[str, ...]


def decode_string(raw: bytes | memoryview, what: str) -> str:
    """Return a name or query as text; strings over 4096 bytes, with NUL or not UTF-8 are refused."""
    if len(raw) > STRING_BYTES_MAX:
        raise OptionInvalid(why=f"the {what} has {len(raw)} bytes, the protocol allows {STRING_BYTES_MAX}")
    try:
        text = bytes(raw).decode("utf-8", errors="strict")
    except UnicodeDecodeError:
        raise OptionInvalid(why=f"the {what} is not UTF-8") from None
    if "\0" in text:
        raise OptionInvalid(why=f"the {what} contains a NUL byte")
    return text


def decode_export_query(data: bytes) -> ExportQuery:
    """Decode the payload of INFO or GO; the total must match both inner counts exactly."""
    if len(data) < 6:
        raise OptionInvalid(why="shorter than an empty request")
    (name_bytes,) = U32.unpack_from(data)
    if name_bytes > len(data) - 6:
        raise OptionInvalid(why="the name is longer than the option")
    name = decode_string(data[4 : 4 + name_bytes], "export name")
    (count,) = U16.unpack_from(data, 4 + name_bytes)
    types = data[6 + name_bytes :]
    if len(types) != 2 * count:
        raise OptionInvalid(why=f"{count} information requests announced, {len(types)} bytes follow")
    return ExportQuery(name, frozenset(number for (number,) in U16.iter_unpack(types)))


def decode_context_query(data: bytes, queries_max: int) -> ContextQuery | None:
    """Decode the payload of LIST_META_CONTEXT or SET_META_CONTEXT; None where it has too many queries."""
    if len(data) < 8:
        raise OptionInvalid(why="shorter than an empty request")
    (name_bytes,) = U32.unpack_from(data)
    if name_bytes > len(data) - 8:
        raise OptionInvalid(why="the name is longer than the option")
    name = decode_string(data[4 : 4 + name_bytes], "export name")
    (count,) = U32.unpack_from(data, 4 + name_bytes)
    position = 8 + name_bytes
    if count * 4 > len(data) - position:
        raise OptionInvalid(why="more queries announced than the option can hold")
    if count > queries_max:
        return None
    queries = []
    for _ in range(count):
        if len(data) - position < 4:
            raise OptionInvalid(why="a query is cut off")
        (query_bytes,) = U32.unpack_from(data, position)
        position += 4
        if query_bytes > len(data) - position:
            raise OptionInvalid(why="a query is longer than the option")
        queries.append(decode_string(data[position : position + query_bytes], "query"))
        position += query_bytes
    if position != len(data):
        raise OptionInvalid(why="bytes follow the last query")
    return ContextQuery(name, tuple(queries))


def encode_export_query(name: str, info_types: Sequence[int]) -> bytes:
    """Encode the payload of INFO or GO."""
    types = b"".join(U16.pack(number) for number in info_types)
    return counted_string(name.encode()) + U16.pack(len(info_types)) + types


def encode_context_query(export_name: str, queries: Sequence[str]) -> bytes:
    """Encode the payload of LIST_META_CONTEXT or SET_META_CONTEXT."""
    encoded = b"".join(counted_string(query.encode()) for query in queries)
    return counted_string(export_name.encode()) + U32.pack(len(queries)) + encoded

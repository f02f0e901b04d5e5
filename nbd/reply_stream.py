"""The client's side of the transmission phase, without I/O: replies and their chunks to results.

In: decoding of simple replies, structured and extended chunks against the requests that are waiting, with the
checks a strict client makes. Out: sockets (`client`). Anything a server may not send raises
`RemoteProtocolError`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from .constants import (
    CHUNK_DONE,
    CHUNK_ERROR_BIT,
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
)
from .device import Extents
from .errors import RemoteProtocolError
from .wire import (
    ERROR,
    EXTENDED_CHUNK,
    HOLE,
    SIMPLE_REPLY,
    STATUS_32,
    STATUS_64,
    STATUS_HEAD_64,
    STRUCTURED_CHUNK,
    U32,
    U64,
)

_CHUNK_BYTES_MAX = 64 * 1024 * 1024 + 64


@dataclass(slots=True)
class Reply:
    """Everything a server answered to one request."""

    cookie: int
    command: int
    offset: int
    length: int
    error: int = 0
    text: str = ""
    error_offset: int | None = None
    data: bytearray = field(default_factory=bytearray)
    holes: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    statuses: dict[int, Extents] = field(default_factory=dict)
    covered: int = 0
    done: bool = False


class ReplyStream:
    """Decodes the replies of one connection. `feed` takes any number of bytes and yields finished replies."""

    def __init__(self, *, structured: bool, extended: bool) -> None:
        self._structured = structured
        self._extended = extended
        self._buffer = bytearray()
        self._waiting: dict[int, Reply] = {}

    @property
    def waiting(self) -> int:
        """Number of requests without a complete reply."""
        return len(self._waiting)

    @property
    def unread(self) -> int:
        """Number of bytes received that belong to no finished reply."""
        return len(self._buffer)

    def expect(self, cookie: int, command: int, offset: int, length: int) -> None:
        """Announce a request that is being sent."""
        self._waiting[cookie] = Reply(cookie, command, offset, length)

    def feed(self, data: bytes | memoryview) -> Iterator[Reply]:
        """Take in bytes, yield every reply that has become complete."""
        self._buffer += data
        while (step := self._step()) is not None:
            if step.done:
                del self._waiting[step.cookie]
                yield step

    def _step(self) -> Reply | None:
        if len(self._buffer) < U32.size:
            return None
        (magic,) = U32.unpack_from(self._buffer)
        if magic == SIMPLE_REPLY_MAGIC and not self._extended:
            return self._simple()
        if magic == STRUCTURED_REPLY_MAGIC and self._structured and not self._extended:
            return self._chunk()
        if magic == EXTENDED_REPLY_MAGIC and self._extended:
            return self._chunk()
        raise RemoteProtocolError(what=f"a reply with magic {magic:#010x}")

    def _reply(self, cookie: int) -> Reply:
        if cookie not in self._waiting:
            raise RemoteProtocolError(what=f"a reply to an unknown request {cookie:#x}")
        return self._waiting[cookie]

    def _simple(self) -> Reply | None:
        if len(self._buffer) < SIMPLE_REPLY.size:
            return None
        _, error, cookie = SIMPLE_REPLY.unpack_from(self._buffer)
        reply = self._reply(cookie)
        if reply.command == Command.READ and self._structured:
            raise RemoteProtocolError(
                what="a simple reply to a READ although structured replies were agreed on"
            )
        size = reply.length if reply.command == Command.READ and not error else 0
        if len(self._buffer) < SIMPLE_REPLY.size + size:
            return None
        reply.data[:] = self._buffer[SIMPLE_REPLY.size : SIMPLE_REPLY.size + size]
        del self._buffer[: SIMPLE_REPLY.size + size]
        reply.error, reply.done = error, True
        return reply

    def _chunk(self) -> Reply | None:
        layout = EXTENDED_CHUNK if self._extended else STRUCTURED_CHUNK
        if len(self._buffer) < layout.size:
            return None
        _, flags, kind, cookie, *rest = layout.unpack_from(self._buffer)
        length = rest[-1]
        if length > _CHUNK_BYTES_MAX:
            raise RemoteProtocolError(what=f"a chunk of {length} bytes")
        reply = self._reply(cookie)
        if self._extended and rest[0] != reply.offset:
            raise RemoteProtocolError(what="an extended chunk that does not repeat the request's offset")
        if len(self._buffer) < layout.size + length:
            return None
        payload = bytes(self._buffer[layout.size : layout.size + length])
        del self._buffer[: layout.size + length]
        if flags & ~CHUNK_DONE:
            raise RemoteProtocolError(what=f"chunk flags {flags:#x}")
        reply.chunks.append(kind)
        self._payload(reply, kind, payload)
        reply.done = bool(flags & CHUNK_DONE)
        if reply.done:
            self._check_complete(reply)
        return reply

    def _payload(self, reply: Reply, kind: int, payload: bytes) -> None:
        read, status = reply.command == Command.READ, reply.command == Command.BLOCK_STATUS
        if kind & CHUNK_ERROR_BIT:
            _error(reply, kind, payload)
        elif kind == ChunkType.NONE and not payload:
            pass
        elif kind == ChunkType.OFFSET_DATA and read and len(payload) > U64.size:
            (offset,) = U64.unpack_from(payload)
            _place(reply, offset, payload[U64.size :])
        elif kind == ChunkType.OFFSET_HOLE and read and len(payload) == HOLE.size:
            offset, size = HOLE.unpack(payload)
            if size > reply.length:
                raise RemoteProtocolError(what="a hole that is larger than the request")
            _place(reply, offset, bytes(size))
            reply.holes.append((offset, size))
        elif kind == ChunkType.BLOCK_STATUS and status and not self._extended:
            _status(reply, payload, wide=False)
        elif kind == ChunkType.BLOCK_STATUS_EXT and status and self._extended:
            _status(reply, payload, wide=True)
        else:
            raise RemoteProtocolError(what=f"a chunk of type {kind:#x} and {len(payload)} bytes here")

    def _check_complete(self, reply: Reply) -> None:
        if reply.command == Command.READ and not reply.error and reply.covered != reply.length:
            raise RemoteProtocolError(what=f"{reply.covered} of {reply.length} bytes in a finished READ")


def _error(reply: Reply, kind: int, payload: bytes) -> None:
    if len(payload) < ERROR.size:
        raise RemoteProtocolError(what="an error chunk that is cut off")
    error, text_bytes = ERROR.unpack_from(payload)
    tail = len(payload) - ERROR.size - text_bytes
    if error == 0 or tail != (U64.size if kind == ChunkType.ERROR_OFFSET else 0):
        raise RemoteProtocolError(what="a malformed error chunk")
    reply.error = error
    reply.text = payload[ERROR.size : ERROR.size + text_bytes].decode(errors="replace")
    if kind == ChunkType.ERROR_OFFSET:
        (reply.error_offset,) = U64.unpack_from(payload, ERROR.size + text_bytes)


def _place(reply: Reply, offset: int, content: bytes) -> None:
    start = offset - reply.offset
    if not content or start < 0 or start + len(content) > reply.length:
        raise RemoteProtocolError(what="read content outside the request")
    if not reply.data:
        reply.data = bytearray(reply.length)  # not before a server sends some of it
    reply.data[start : start + len(content)] = content
    reply.covered += len(content)


def _status(reply: Reply, payload: bytes, *, wide: bool) -> None:
    head, layout = (STATUS_HEAD_64, STATUS_64) if wide else (U32, STATUS_32)
    if len(payload) < head.size + layout.size or (len(payload) - head.size) % layout.size:
        raise RemoteProtocolError(what="a block-status chunk of odd length")
    context_id, *count = head.unpack_from(payload)
    extents = [(length, status) for length, status in layout.iter_unpack(payload[head.size :])]
    if count and count[0] != len(extents):
        raise RemoteProtocolError(what="a block-status chunk that miscounts its extents")
    if context_id in reply.statuses or any(length == 0 for length, _ in extents):
        raise RemoteProtocolError(what="a block-status chunk with an empty extent, or one too many")
    reply.statuses[context_id] = extents

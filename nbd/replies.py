"""Replies in the form a connection has agreed on: simple, structured or extended.

In: whole replies as lists of buffers, for everything outside the hot loop. Out: the hot loop's own plain READ
and WRITE replies, which it packs itself. Structured connections get chunks for reads and errors (an error
chunk carries a text for the user) and short simple replies for other successes; extended connections get
extended chunks only.
"""

from .constants import ChunkType, Errno
from .device import Buffer, Extents
from .errors import RequestError
from .terms import Terms
from .wire import HOLE, U64, error_payload, extended_chunk, simple_reply, status_payload, structured_chunk


class Replies:
    """Builds the replies of one connection."""

    def __init__(self, terms: Terms) -> None:
        self._extended = terms.extended
        self._chunked = terms.chunked

    @property
    def chunked(self) -> bool:
        """Whether reads are answered in chunks."""
        return self._chunked

    def chunk_head(self, cookie: int, offset: int, kind: ChunkType, length: int, *, done: bool) -> bytes:
        """Return the header of one chunk; `offset` is the request's."""
        assert self._chunked
        if self._extended:
            return extended_chunk(cookie, offset, kind, length, done=done)
        return structured_chunk(cookie, kind, length, done=done)

    def success(self, cookie: int, offset: int, *, read: bool = False) -> list[Buffer]:
        """Return the reply to a request that has nothing to say (`read`: an empty READ)."""
        if self._extended or (read and self._chunked):
            return [self.chunk_head(cookie, offset, ChunkType.NONE, 0, done=True)]
        return [simple_reply(cookie)]

    def error(self, cookie: int, offset: int, problem: RequestError) -> list[Buffer]:
        """Return an error reply; with chunks the reason travels along."""
        if not self._chunked:
            return [simple_reply(cookie, problem.error)]
        payload = error_payload(problem.error, problem.reason)
        return [self.chunk_head(cookie, offset, ChunkType.ERROR, len(payload), done=True), payload]

    def error_at(self, cookie: int, offset: int, error: Errno, where: int, reason: str) -> list[Buffer]:
        """Return the error chunk that ends a READ which failed at the absolute offset `where`."""
        payload = error_payload(error, reason) + U64.pack(where)
        return [self.chunk_head(cookie, offset, ChunkType.ERROR_OFFSET, len(payload), done=True), payload]

    def data_head(self, cookie: int, offset: int, where: int, length: int, *, done: bool) -> bytes:
        """Return what precedes `length` bytes of read data that start at `where`."""
        if not self._chunked:
            return simple_reply(cookie)
        head = self.chunk_head(cookie, offset, ChunkType.OFFSET_DATA, U64.size + length, done=done)
        return head + U64.pack(where)

    def hole(self, cookie: int, offset: int, where: int, length: int, *, done: bool) -> bytes:
        """Return a chunk saying that `length` bytes at `where` read as zeros."""
        head = self.chunk_head(cookie, offset, ChunkType.OFFSET_HOLE, HOLE.size, done=done)
        return head + HOLE.pack(where, length)

    def status(
        self, cookie: int, offset: int, context_id: int, extents: Extents, *, done: bool
    ) -> list[Buffer]:
        """Return one block-status chunk: 64-bit with extended headers, 32-bit otherwise."""
        kind = ChunkType.BLOCK_STATUS_EXT if self._extended else ChunkType.BLOCK_STATUS
        payload = status_payload(context_id, extents, wide=self._extended)
        return [self.chunk_head(cookie, offset, kind, len(payload), done=done), payload]

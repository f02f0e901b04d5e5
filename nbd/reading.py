"""READs that are not plain: with flags, empty, partly holes, large under TLS, or repeated after a fault."""

from collections.abc import Callable

from .constants import CommandFlag, Errno
from .device import EXTENT_HOLE, Buffer
from .errors import DataLost, wire_errno
from .limits import KIB
from .replies import Replies
from .terms import Terms

_PIECE_BYTES = 256 * KIB
_HOLE_BYTES_MIN = 4 * KIB  # smaller holes travel as zeros inside the data around them
_ZEROS = memoryview(bytes(_PIECE_BYTES))


class Reading:
    """Builds read replies of one connection; `copies` where user space has to see the data (TLS)."""

    def __init__(
        self, terms: Terms, replies: Replies, send: Callable[[list[Buffer]], None], *, copies: bool
    ) -> None:
        self._session = terms.session
        self._replies = replies
        self._send = send
        self._copies = copies
        self._read = self.copy_into if copies else terms.session.read

    def copy_into(self, offset: int, length: int, parts: list[Buffer]) -> int:
        """Stand in for `Session.read` where buffers will be looked at by Python: append copies, report whole holes."""
        unseen: list[Buffer] = []
        if length <= _PIECE_BYTES and self._session.read(offset, length, unseen) == length:
            parts.append(_ZEROS[:length])
            return length
        parts.append(memoryview(self._session.read_copy(offset, length)))
        return 0

    def reply(self, flags: int, cookie: int, offset: int, length: int) -> list[Buffer] | None:
        """Answer a valid READ. Returns the reply, or None where it has been sent already."""
        if length == 0:
            return self._replies.success(cookie, offset, read=True)
        if self._copies and length > _PIECE_BYTES:
            self._in_pieces(cookie, offset, length, whole=bool(flags & CommandFlag.DF))
            return None
        if not self._replies.chunked or flags & CommandFlag.DF:
            return self._one_chunk(cookie, offset, length)
        return self._segments(cookie, offset, length)

    def _locked(self, offset: int, length: int, parts: list[Buffer]) -> int:
        self._session.enter()
        try:
            return self._read(offset, length, parts)
        finally:
            self._session.leave()

    def _one_chunk(self, cookie: int, offset: int, length: int) -> list[Buffer]:
        parts: list[Buffer] = [self._replies.data_head(cookie, offset, offset, length, done=True)]
        holes = self._locked(offset, length, parts)
        if holes == length and self._replies.chunked:
            return [self._replies.hole(cookie, offset, offset, length, done=True)]
        return parts

    def _segments(self, cookie: int, offset: int, length: int) -> list[Buffer]:
        """Answer with one chunk per stretch of data or hole. The boundaries are those of this moment.

        A block may be written between the look at the extents and the read: that write has not been answered
        when this READ came in, so both the old and the new content are right.
        """
        parts: list[Buffer] = []
        stretches = self._stretches(offset, length)
        for index, (where, count, hole) in enumerate(stretches):
            done = index == len(stretches) - 1
            if hole:
                parts.append(self._replies.hole(cookie, offset, where, count, done=done))
            else:
                parts.append(self._replies.data_head(cookie, offset, where, count, done=done))
                self._locked(where, count, parts)
        return parts

    def _stretches(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """Return (offset, length, is a hole) for the whole range, holes and data merged."""
        out: list[tuple[int, int, bool]] = []
        end = offset + length
        where = offset
        for count, kind in self._session.extents(offset, length):
            taken = min(count, end - where)
            hole = kind == EXTENT_HOLE and taken >= _HOLE_BYTES_MIN
            if out and out[-1][2] == hole:
                out[-1] = (out[-1][0], out[-1][1] + taken, hole)
            elif taken:
                out.append((where, taken, hole))
            where += taken
        if where < end:  # the device told about a prefix only: the rest is sent as data
            if out and not out[-1][2]:
                out[-1] = (out[-1][0], end - out[-1][0], False)
            else:
                out.append((where, end - where, False))
        return out

    def copied(self, cookie: int, offset: int, length: int) -> list[Buffer]:
        """Return a whole reply from private memory; OSError where the data cannot be read."""
        self._session.enter()
        try:
            data = self._session.read_copy(offset, length)
        finally:
            self._session.leave()
        return [self._replies.data_head(cookie, offset, offset, length, done=True), memoryview(data)]

    def _in_pieces(self, cookie: int, offset: int, length: int, *, whole: bool) -> None:
        """Send a large read piece by piece, so that memory does not follow the length that was asked for.

        With chunks, each piece is one and the end is a chunk of its own, which an error can replace. A simple
        reply or a single chunk (`whole`) has promised all data with its header; a failure behind that ends
        the connection.
        """
        replies = self._replies
        single = whole or not replies.chunked
        where, end = offset, offset + length
        while where < end:
            count = min(_PIECE_BYTES, end - where)
            parts: list[Buffer] = []
            try:
                holes = self._locked(where, count, parts)
            except OSError as error:
                if where == offset:
                    raise
                if single:
                    raise DataLost from error
                problem = wire_errno(error, 0)
                self._send(
                    replies.error_at(cookie, offset, problem, where, error.strerror or Errno(problem).name)
                )
                return
            if single and where == offset:
                parts.insert(0, replies.data_head(cookie, offset, offset, length, done=True))
            elif not single and holes == count:
                parts = [replies.hole(cookie, offset, where, count, done=False)]
            elif not single:
                parts.insert(0, replies.data_head(cookie, offset, where, count, done=False))
            self._send(parts)
            where += count
        if not single:
            self._send(replies.success(cookie, offset, read=True))

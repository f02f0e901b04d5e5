"""Requests off the hot path: everything that may wait, fail, or come with flags.

In: one request at a time from the receive buffer, its payload however it arrives, its execution, its reply.
Out: plain READs and WRITEs (`transmission`), which request is legal (`validation`), how replies look
(`replies`). A request is validated completely before its payload is applied, and a payload is always consumed
before an error goes out, so the stream stays in step.

While requests wait for space (`queued`), the connection stays here: one request at a time, until none waits.
"""

import errno
import mmap
from time import monotonic

from .activity import Activity
from .block_status import FILTER_BYTES_MAX, BlockStatus, decode_filter
from .constants import EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, Command, CommandFlag, Errno
from .device import Buffer
from .errors import (
    ConnectionEnded,
    DataLost,
    EndOfRequests,
    RemoteProtocolError,
    RequestError,
    SendFault,
    wire_errno,
)
from .limits import KIB, Limits
from .link import Link
from .payload_memory import PayloadMemory
from .queued import QueuedMemory, QueuedRequest, SpaceQueue
from .reading import Reading
from .replies import Replies
from .terms import Terms
from .validation import check, check_range, framing_fault, payload_bytes
from .wire import EXTENDED_REQUEST, REQUEST, Request
from .writing import PayloadStream, Writing

_LEAVING = RequestError(Errno.ESHUTDOWN, "the server is shutting down")


class Executor:
    """Executes requests of one connection. Owns the receive buffer, which it shares with the hot loop."""

    def __init__(
        self,
        link: Link,
        terms: Terms,
        activity: Activity,
        memory: PayloadMemory,
        limits: Limits,
        *,
        pending: bytes = b"",
        queued: QueuedMemory | None = None,
    ) -> None:
        self.terms = terms
        self.replies = Replies(terms)
        self._link = link
        self._activity = activity
        self._session = terms.session
        self._head = EXTENDED_REQUEST if terms.extended else REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if terms.extended else REQUEST_MAGIC
        # Anonymous memory: pages that no client ever fills cost nothing.
        room = max(limits.receive_buffer_bytes, FILTER_BYTES_MAX, len(pending)) + 4 * KIB
        self.buffer = mmap.mmap(-1, room)
        self.view = memoryview(self.buffer)
        self.view[: len(pending)] = pending
        self.have = len(pending)
        self._status = BlockStatus(terms, self.replies)
        self._reading = Reading(terms, self.replies, self.send, copies=link.copies)
        self._queue = SpaceQueue(
            link, terms.session, activity, queued or QueuedMemory(limits.queued_bytes_max)
        )
        self._writing = Writing(terms, memory, limits, self._queue, activity)
        self.read = self._reading.copy_into if link.copies else terms.session.read

    def send(self, parts: list[Buffer]) -> None:
        """Send buffers completely; data that came from the session is pinned until then."""
        try:
            self._link.finish(parts, 0, self._session.sent)
        except OSError as error:  # the stream's, not the device's
            raise ConnectionEnded from error

    def handle(self, pos: int, have: int, failure: OSError | None) -> tuple[int, int]:
        """Deal with the request at `pos` of the receive buffer; return the new bounds of what is in the buffer.

        `failure` is set where the hot loop found the request in order and the device refused it. Where the request has
        to wait for space, those behind it are dealt with as well, until none waits any more.
        """
        pos, have = self._handle(pos, have, failure)
        return self._while_waiting(pos, have) if self._queue.requests else (pos, have)

    def close(self) -> None:
        """The connection has ended: nothing that waits can be answered any more."""
        self._queue.close()

    def _handle(self, pos: int, have: int, failure: OSError | None) -> tuple[int, int]:
        magic, *fields = self._head.unpack_from(self.buffer, pos)
        request = Request(*fields)
        flags, command, cookie, offset, length = request
        if magic != self._magic:
            raise RemoteProtocolError(what=f"bad request magic {magic:#010x}")
        if command == Command.DISC:
            raise EndOfRequests
        fault = framing_fault(self.terms, flags, command, length)
        if fault:
            raise RemoteProtocolError(what=fault)
        size = payload_bytes(self.terms, flags, command, length)
        payload = PayloadStream(self.view, pos + self._head.size, have, size, self._link.receive)
        parts: list[Buffer] | None
        try:
            # A write without a block to go to is tried again where the device may look for one.
            if failure is not None and not (command == Command.WRITE and failure.errno == errno.ENOSPC):
                raise RequestError(wire_errno(failure, command), failure.strerror or str(failure))
            if self._activity.stopping:
                raise _LEAVING
            refusal = check(self.terms, flags, command, offset, length)
            if refusal is not None:
                raise refusal
            parts = self._execute(request, payload)
        except RequestError as problem:
            payload.discard()
            parts = self.replies.error(cookie, offset, problem)
        if parts:
            try:
                self.send(parts)
            except SendFault as problem:
                if problem.sent or command != Command.READ:
                    raise DataLost from problem
                self.answer_again(cookie, offset, length)
        self._session.sent()
        return payload.bounds()

    def answer_again(self, cookie: int, offset: int, length: int) -> None:
        """Answer a READ from private copies after its mapping could not be read."""
        try:
            parts = self._reading.copied(cookie, offset, length)
        except OSError as error:
            problem = RequestError(wire_errno(error, Command.READ), error.strerror or str(error))
            parts = self.replies.error(cookie, offset, problem)
        self.send(parts)

    def _execute(self, request: Request, payload: PayloadStream) -> list[Buffer] | None:
        """Run a valid request; return its reply, or None where it has been sent. RequestError where it failed."""
        flags, command, cookie, offset, length = request
        fast_only = bool(flags & CommandFlag.FAST_ZERO)
        try:
            if command == Command.READ:
                return self._reading.reply(flags, cookie, offset, length)
            if command == Command.BLOCK_STATUS:
                return self._block_status(request, payload)
            done = self._modify(request, payload)
        except OSError as error:
            if command == Command.WRITE_ZEROES and not fast_only and self._may_wait(error):
                done = not self._queue.put(request)  # no payload, so there is always room
            else:
                raise RequestError(
                    wire_errno(error, command, fast_only=fast_only), error.strerror or str(error)
                ) from None
        return self.replies.success(cookie, offset) if done else None

    def _may_wait(self, error: OSError) -> bool:
        return error.errno == errno.ENOSPC and self._session.may_wait(error, monotonic())

    def _modify(self, request: Request, payload: PayloadStream) -> bool:
        """Carry out what changes something; False where it was put aside to wait for space."""
        flags, command, _, offset, length = request
        session = self._session
        match command:
            case Command.WRITE:
                if not self._writing.apply(request, payload):
                    return False
            case Command.TRIM if length:
                session.trim(offset, length)
            case Command.WRITE_ZEROES if length:
                session.zero(
                    offset,
                    length,
                    keep_allocated=bool(flags & CommandFlag.NO_HOLE),
                    fast_only=bool(flags & CommandFlag.FAST_ZERO),
                )
            case Command.CACHE if length:
                session.cache(offset, length)
            case Command.FLUSH:
                session.flush()
                return True
            case _:
                pass
        if flags & CommandFlag.FUA and command != Command.CACHE:
            session.flush()
        return True

    # --- while requests wait for space

    def _while_waiting(self, pos: int, have: int) -> tuple[int, int]:
        """Serve the connection one request at a time until nothing waits; return the bounds of the buffer."""
        try:
            while self._queue.requests:
                if self._activity.stopping:
                    self._answer_all(_LEAVING)
                elif have - pos >= self._head.size:
                    pos, have = self._handle(pos, have, None)
                elif self._queue.news(receive=True):
                    pos, have = self._receive(pos, have)
                else:
                    self._queue.try_again(self._attempt)
        except (EndOfRequests, RemoteProtocolError):
            # Every request is answered before the connection ends (doc/proto.md, NBD_CMD_DISC).
            self._answer_all(RequestError(Errno.ENOSPC, "the client left before there was space"))
            raise
        finally:
            self._session.space_no_longer_wanted()
        return pos, have

    def _receive(self, pos: int, have: int) -> tuple[int, int]:
        """Take in more, at the front of the buffer if the head of a request would not fit behind."""
        if pos + self._head.size > len(self.buffer):
            self.view[: have - pos] = self.view[pos:have]
            pos, have = 0, have - pos
        try:
            count = self._link.receive(self.view[have : pos + self._head.size])
        except OSError as error:
            raise ConnectionEnded from error
        if not count:
            raise ConnectionEnded
        return pos, have + count

    def _attempt(self, queued: QueuedRequest) -> bool:
        """Try a request again; whether it has been answered."""
        flags, command, cookie, offset, length = queued.request
        try:
            if command == Command.WRITE:
                self._writing.apply_now(offset, queued.payload)
            else:
                self._session.zero(
                    offset, length, keep_allocated=bool(flags & CommandFlag.NO_HOLE), fast_only=False
                )
            if flags & CommandFlag.FUA:
                self._session.flush()
            parts = self.replies.success(cookie, offset)
        except OSError as error:
            if error.errno == errno.ENOSPC and self._session.may_wait(error, queued.since):
                return False
            problem = RequestError(wire_errno(error, command), error.strerror or str(error))
            parts = self.replies.error(cookie, offset, problem)
        finally:
            self._session.sent()
        self.send(parts)
        return True

    def _answer_all(self, problem: RequestError) -> None:
        def refuse(queued: QueuedRequest) -> bool:
            self.send(self.replies.error(queued.request.cookie, queued.request.offset, problem))
            return True

        self._queue.try_again(refuse)

    def _block_status(self, request: Request, payload: PayloadStream) -> list[Buffer]:
        flags, _, cookie, offset, length = request
        contexts = self.terms.contexts
        if flags & CommandFlag.PAYLOAD_LEN:
            if payload.size > FILTER_BYTES_MAX:
                raise RequestError(Errno.EINVAL, f"a status filter of {payload.size} bytes")
            length, contexts = decode_filter(self.terms, payload.take())
            problem = check_range(self.terms, Command.BLOCK_STATUS, offset, length)
            if problem is not None:
                raise problem
        return self._status.reply(cookie, flags, offset, length, contexts)

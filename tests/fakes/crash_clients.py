"""Clients of a scenario: changes on their way to a session, directly or through the real NBD transmission code.

`NbdClient` drives `nbd.transmission` over an in-memory stream, in the scenario's own thread. A change counts as
acknowledged from the very moment the server hands the reply to the stream, so a cut may fall between two replies of
one batch.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from nbd.activity import Activity
from nbd.constants import Command, CommandFlag
from nbd.device import Buffer
from nbd.execution import Executor
from nbd.limits import Limits
from nbd.payload_memory import PayloadMemory
from nbd.reply_stream import ReplyStream
from nbd.terms import Terms
from nbd.transmission import transmit
from tests.fakes.crash_oracle import Begin, Change, End, FlushBegin, FlushEnd, Stage
from tests.fakes.nbd_streams import ALL_FLAGS, Request, ScriptedLink
from thinpool.pool import Pool
from thinpool.session import Session

if TYPE_CHECKING:
    from tests.fakes.crash_scenario import Scenario

SECTOR_BYTES = 512
LIMITS = Limits(spin_seconds=0.0)


def read_by_kernel(session: Session, offset: int, length: int) -> bytes:
    """Read through the zero-copy path, letting the kernel copy the slices as a socket would."""
    parts: list = []
    target = os.memfd_create("parts")
    try:
        session.enter()
        try:
            session.read(offset, length, parts)
        finally:
            session.leave()
        while parts:
            os.writev(target, parts[:1000])
            del parts[:1000]
        session.sent()
        return os.pread(target, length, 0)
    finally:
        os.close(target)


class Client:
    """One connection to one device. Every call leaves its marks in the history."""

    def __init__(self, scenario: Scenario, session: Session, pool: Pool, name: str) -> None:
        self.scenario = scenario
        self.session = session

    def write(self, change: Change, *, durable: bool) -> None:
        """A WRITE, with FUA when `durable`."""
        raise NotImplementedError

    def pipeline(self, changes: list[Change]) -> None:
        """Several writes that are in flight together."""
        for change in changes:
            self.write(change, durable=False)

    def trim(self, change: Change, first: int, count: int) -> None:
        """A TRIM of these sectors, which has the effect of `change`."""
        raise NotImplementedError

    def zero(self, change: Change, *, keep_allocated: bool) -> None:
        """A WRITE_ZEROES."""
        raise NotImplementedError

    def flush(self) -> None:
        """A FLUSH; the caller leaves the marks."""
        raise NotImplementedError

    def close(self) -> None:
        self.session.close()

    def _bytes(self, change: Change) -> bytes:
        return self.scenario.disk.contents.bytes_of(change.contents)


class DirectClient(Client):
    """Calls the session as the transmission loop does."""

    def write(self, change: Change, *, durable: bool) -> None:
        data = memoryview(self._bytes(change))
        with self.scenario.changing(change, durable=durable):
            try:
                self._apply(change, data)
            except OSError as error:
                if error.errno != errno.ENOSPC or not self.session.wait_for_space():
                    raise
                self._apply(change, data)
            if durable:
                self.session.flush()

    def _apply(self, change: Change, data: memoryview) -> None:
        self.session.enter()
        try:
            self.session.write(change.first * SECTOR_BYTES, data)
        finally:
            self.session.leave()
            self.session.sent()

    def trim(self, change: Change, first: int, count: int) -> None:
        with self.scenario.changing(change):
            self.session.trim(first * SECTOR_BYTES, count * SECTOR_BYTES)

    def zero(self, change: Change, *, keep_allocated: bool) -> None:
        first, count = change.first, len(change.contents)
        with self.scenario.changing(change):
            self.session.zero(
                first * SECTOR_BYTES, count * SECTOR_BYTES, keep_allocated=keep_allocated, fast_only=False
            )

    def flush(self) -> None:
        self.session.flush()


class _Stream(ScriptedLink):
    """Delivers requests whole; every finished reply is told at once."""

    def __init__(self, data: bytes, replies: ReplyStream, tell) -> None:
        super().__init__(data)
        self._replies = replies
        self._tell = tell

    def _send_some(self, parts: list[Buffer]) -> int:
        # Part by part: a cut may fall between two replies that one system call carries.
        taken = 0
        for part in parts:
            data = bytes(part)
            taken += len(data)
            for reply in self._replies.feed(data):
                self._tell(reply.cookie, reply.error)
        return taken


class NbdClient(Client):
    """Speaks NBD to the real transmission loop."""

    def __init__(self, scenario: Scenario, session: Session, pool: Pool, name: str) -> None:
        super().__init__(scenario, session, pool, name)
        style = scenario.random.choice(("simple", "structured", "extended"))
        flags = ALL_FLAGS
        if style == "simple":
            flags &= ~flags.SEND_DF
        self._terms = Terms(
            export=_Facts(name, session.device.size_bytes),
            session=session,
            size_bytes=session.device.size_bytes,
            flags=flags,
            structured=style == "structured",
            extended=style == "extended",
        )
        self._cookie = 0

    def _converse(self, requests: list[tuple[Request, object, object]]) -> None:
        """Send requests together. Each is (request, mark when sent, marks by success); raises the first error."""
        terms = self._terms
        replies = ReplyStream(structured=terms.structured, extended=terms.extended)
        ends, commands, data, errors = {}, {}, b"", []
        for request, begin, end in requests:
            self._cookie += 1
            request.cookie = self._cookie
            replies.expect(request.cookie, request.command, request.offset, request.length)
            ends[request.cookie] = end
            commands[request.cookie] = request.command
            data += request.encode(extended=terms.extended)
            if begin is not None:
                self.scenario.mark(begin)

        def tell(cookie: int, error: int) -> None:
            end = ends.pop(cookie)
            if error and (error != errno.ENOSPC or commands[cookie] == Command.FLUSH):
                errors.append(error)  # a lack of space is an answer to a change, and to nothing else
            if isinstance(end, End):
                self.scenario.mark(End(end.change, Stage.FAILED) if error else end)
            elif end is not None and not error:
                self.scenario.mark(end)

        activity = Activity()
        memory = PayloadMemory(
            buffer_bytes=LIMITS.whole_payload_bytes, total_bytes=LIMITS.payload_memory_bytes
        )
        link = _Stream(data, replies, tell)
        try:
            executor = Executor(link, terms, activity, memory, LIMITS)
            transmit(link, terms, executor, activity, LIMITS)
        finally:
            activity.close()
        assert not ends, "a request was not answered"
        for error in errors:
            raise OSError(error, os.strerror(error))

    def _request(self, command: int, first: int, count: int, flags: int = 0, payload: bytes = b"") -> Request:
        if self._terms.extended and command == Command.WRITE:
            flags |= CommandFlag.PAYLOAD_LEN
        return Request(command, first * SECTOR_BYTES, count * SECTOR_BYTES, flags, payload)

    def _change(
        self, change: Change, request: Request, *, durable: bool = False
    ) -> tuple[Request, Begin, End]:
        return request, Begin(change), End(change, Stage.ACKNOWLEDGED, durable)

    def _write(self, change: Change, *, durable: bool) -> tuple[Request, Begin, End]:
        flags = CommandFlag.FUA if durable else 0
        count = len(change.contents)
        request = self._request(Command.WRITE, change.first, count, flags, self._bytes(change))
        return self._change(change, request, durable=durable)

    def write(self, change: Change, *, durable: bool) -> None:
        self._converse([self._write(change, durable=durable)])

    def pipeline(self, changes: list[Change]) -> None:
        requests: list = [self._write(change, durable=False) for change in changes]
        random = self.scenario.random
        if random.random() < 0.5:
            number = self.scenario.number()
            flush = Request(Command.FLUSH)
            requests.insert(random.randrange(len(requests)), (flush, FlushBegin(number), FlushEnd(number)))
        self._converse(requests)

    def trim(self, change: Change, first: int, count: int) -> None:
        self._converse([self._change(change, self._request(Command.TRIM, first, count))])

    def zero(self, change: Change, *, keep_allocated: bool) -> None:
        flags = CommandFlag.NO_HOLE if keep_allocated else 0
        request = self._request(Command.WRITE_ZEROES, change.first, len(change.contents), flags)
        self._converse([self._change(change, request)])

    def flush(self) -> None:
        self._converse([(Request(Command.FLUSH), None, None)])


class _Facts:
    """As much of `nbd.device.Export` as the transmission looks at."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self.name, self.size_bytes = name, size_bytes
        self.description, self.read_only, self.preferred_block_bytes = "", False, 65536

    def dirty_contexts(self) -> list[str]:
        return []

    def open(self) -> Session:
        raise NotImplementedError

"""The part of the control API that moves devices: holds that last as long as a connection, and streams as a body.

    POST /v1/hold                 keep a device as it is; the answer is one line of JSON, and the hold ends with the
                                  connection: {"name", ["base"]} or {"token"}
    POST /v1/receive?name=&...    take in the stream that is the body; see `receiving.py`

In: the two routes, what outlives a request. Out: the other routes (`control.py`), both sides' work (`source_access.py`,
`receiving.py`).

The server ends all holds before it lets go of the pool. A client notices by the end of its connection, and what it read
before it looked is right.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from .errors import BadRequest, ServerStopping, StreamDamaged
from .operations import as_leaf
from .receive_plan import examine
from .receiving import ReceiveOptions, receive
from .source_access import HeldDevices, SourceRequest, hold, release

if TYPE_CHECKING:
    from .pool import Pool

BUFFERED_BYTES_MAX = 8 << 20

log = logging.getLogger("thinpool")


class Holds:
    """What outlives a request in one server: holds, and streams on their way in. `end_all` ends all of it.

    It returns when everything that was made for holds is gone; a stream that is cut by it ends as any cut stream does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Pool, HeldDevices]] = {}
        self._pipes: set[BodyPipe] = set()
        self.over = False
        self._next = 0
        self._ending: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, pool: Pool, held: HeldDevices) -> int:
        """Remember a hold."""
        with self._lock:
            self._next += 1
            self._held[self._next] = (pool, held)
            return self._next

    def end(self, number: int) -> None:
        """End one; once is enough."""
        with self._lock:
            found = self._held.pop(number, None)
        if found is None:
            return
        try:
            release(*found)
        except (
            Exception
        ) as error:  # the pool may have given up; a snapshot that stays goes at the next opening
            log.warning("a snapshot made for sending stays: %s", as_leaf(error, str(found[0].location)))

    def add_pipe(self, pipe: BodyPipe) -> None:
        """Remember a stream that arrives."""
        with self._lock:
            self._pipes.add(pipe)
            if self.over:
                pipe.end()

    def drop_pipe(self, pipe: BodyPipe) -> None:
        """Forget a stream that has ended."""
        with self._lock:
            self._pipes.discard(pipe)

    async def until_ending(self) -> None:
        """Wait until all holds are to end."""
        if self._ending is None:
            self._ending, self._loop = asyncio.Event(), asyncio.get_running_loop()
        await self._ending.wait()

    def end_all(self) -> None:
        """Let every connection go and release everything. From any thread but the event loop's."""
        if self._loop is not None and self._ending is not None:
            with suppress(RuntimeError):  # a loop that has ended holds nothing open
                self._loop.call_soon_threadsafe(self._ending.set)
        with self._lock:
            self.over = True
            numbers, pipes = list(self._held), list(self._pipes)
        for pipe in pipes:
            pipe.end()
        for number in numbers:
            self.end(number)


class HoldResponse:
    """An answer that says what is held, and then lasts until either side has had enough."""

    def __init__(self, holds: Holds, number: int, held: HeldDevices) -> None:
        self._holds = holds
        self._number = number
        self._line = json.dumps({"version": 1, "held": held.to_json()}).encode("ascii") + b"\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as ASGI application."""
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": self._line, "more_body": True})
            gone = asyncio.ensure_future(_disconnected(receive))
            ending = asyncio.ensure_future(self._holds.until_ending())
            await asyncio.wait({gone, ending}, return_when=asyncio.FIRST_COMPLETED)
            for task in (gone, ending):
                task.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            # In a thread: it commits. Not waited for: a request that is cancelled cannot wait.
            threading.Thread(target=self._holds.end, args=(self._number,), name="release").start()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def hold_route(pool: Pool, holds: Holds, parameters: dict[str, Any]) -> HoldResponse:
    """Answer POST /v1/hold."""
    known = {"name": str, "base": str, "token": str}
    for key, value in parameters.items():
        if key not in known or not isinstance(value, known[key]):
            raise BadRequest(reason=f"hold takes name, base and token as text, not {key!r} so")
    if ("name" in parameters) == ("token" in parameters):
        raise BadRequest(reason="hold needs a name or a token")
    held = await run_in_threadpool(hold, pool, SourceRequest(**parameters))
    return HoldResponse(holds, holds.add(pool, held), held)


class BodyPipe:
    """A request's body on its way from the event loop to the thread that reads it, a few pieces at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._room = asyncio.Event()
        self._room.set()
        self._changed = threading.Condition()
        self._pieces: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._ended = False
        self._abandoned = False

    async def feed(self, request: Request) -> None:
        """Pass the body on to its end, or to the end of the client."""
        try:
            async for piece in request.stream():
                if piece and not self._abandoned:
                    await self._room.wait()
                    self._put(piece)
        except ClientDisconnect:
            pass  # the reader finds a stream that is cut
        finally:
            self.end()

    def _put(self, piece: bytes) -> None:
        with self._changed:
            self._pieces.append(memoryview(piece))
            self._waiting_bytes += len(piece)
            if self._waiting_bytes > BUFFERED_BYTES_MAX:
                self._room.clear()
            self._changed.notify()

    def end(self) -> None:
        """No more pieces, from now on. Any thread."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def abandon(self) -> None:
        """The reader has had enough. In the event loop's thread."""
        self._abandoned = True
        self._room.set()

    def read_into(self, buffer: memoryview) -> int:
        """Fill a part of the buffer; 0 at the end. In the reader's thread."""
        with self._changed:
            while not self._pieces and not self._ended:
                self._changed.wait()
            if not self._pieces:
                return 0
            piece = self._pieces.popleft()
            count = min(len(piece), len(buffer))
            buffer[:count] = piece[:count]
            if count < len(piece):
                self._pieces.appendleft(piece[count:])
            self._waiting_bytes -= count
            if not self._room.is_set() and self._waiting_bytes < BUFFERED_BYTES_MAX // 2:
                self._loop.call_soon_threadsafe(self._room.set)
        return count


async def receive_route(pool: Pool, holds: Holds, request: Request) -> dict[str, Any]:
    """Answer POST /v1/receive: read the body as a stream while it arrives."""
    given = request.query_params
    options = ReceiveOptions(
        name=given.get("name"),
        resumable=given.get("resumable") == "1",
        read_only=given.get("writable") != "1",
        dry_run=given.get("dry_run") == "1",
    )
    pipe = BodyPipe(asyncio.get_running_loop())
    holds.add_pipe(pipe)
    feeding = asyncio.ensure_future(pipe.feed(request))
    try:
        return await run_in_threadpool(_taken, pool, pipe, options)
    except StreamDamaged as error:
        if holds.over:
            raise ServerStopping(str(pool.location)) from error
        raise
    finally:
        holds.drop_pipe(pipe)
        pipe.abandon()
        feeding.cancel()
        pipe.end()


def _taken(pool: Pool, pipe: BodyPipe, options: ReceiveOptions) -> dict[str, Any]:
    work = examine if options.dry_run else receive
    return work(pool, pipe.read_into, options).to_json()

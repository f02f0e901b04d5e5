"""The control API of a served pool: HTTP and JSON over the Unix socket `control` in the pool directory.

In: the routes, the thread they run in, and how a stop is taken. Out: the operations themselves (`operations.py`), the
client (`control_client.py`). The socket has mode 0600: whoever may open it may change the pool, as with its files.
docs/control-api.md describes the API for programs in other languages.

    GET  /v1/server               who serves: pid, NBD URIs, connections
    POST /v1/operations/<name>    run one operation; the body is a JSON object of its parameters
    POST /v1/metadata-snapshot    hold the metadata still until the client closes its connection
    POST /v1/disconnect           drop the NBD connections of one device: {"name": ...}
    POST /v1/hold, /v1/receive    move devices (`control_transfers.py`)
    POST /v1/stop                 begin to shut down: {"grace_seconds": ...}

Operations run in worker threads; the pool itself puts them in order. Once a stop has begun, operations are refused
with 503 and `ServerStopping`: nothing was done, so a client may wait for the end and open the pool itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .control_transfers import Holds, hold_route, receive_route
from .errors import BadRequest, ExitCode, RemoteFailure, ServerStartFailed, ServerStopping, ThinPoolError
from .operations import OperatedPool, as_leaf, execute
from .service_errors import lacking_resources
from .unix_sockets import listen

if TYPE_CHECKING:
    from .pool import Pool

API_VERSION = 1
BODY_BYTES_MAX = 1 << 20
START_SECONDS = 10.0
GRACE_SECONDS_MAX = 3600.0
HOLD_POLL_SECONDS = 0.2
TROUBLE_SECONDS = 60.0
STATUS_OF_EXIT_CODE = {
    ExitCode.USAGE: 400,
    ExitCode.NOT_FOUND: 404,
    ExitCode.CONFLICT: 409,
    ExitCode.NO_SPACE: 507,
    ExitCode.SERVER: 503,
}

log = logging.getLogger("thinpool")


class Host(Protocol):
    """The service the API speaks for."""

    pool_path: str
    stopping: bool

    @property
    def pool(self) -> OperatedPool:
        """The pool that is served."""

    def describe(self) -> dict[str, Any]:
        """Who serves what: a JSON object."""

    def disconnect(self, name: str) -> int:
        """Drop the NBD connections of a device; how many there were."""

    def request_stop(self, grace_seconds: float | None) -> None:
        """Begin to shut down; returns at once."""


class JsonResponse(Response):
    """JSON in ASCII: names that are no UTF-8 cross as escaped surrogates."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return json.dumps(content).encode("ascii") + b"\n"


class _UntilDisconnect(JsonResponse):
    """Answers at once with one line and does not end before the client hangs up or the service stops.

    The connection is what tells that the reader lives: however it ends, what it held is released.
    """

    def __init__(self, host: Host, content: Any) -> None:
        super().__init__(content)
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer and wait; see ASGI's HTTP events http.response.* and http.disconnect."""
        try:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            gone = asyncio.ensure_future(self._hung_up(receive))
            while not gone.done() and not self._host.stopping:
                await asyncio.wait([gone], timeout=HOLD_POLL_SECONDS)
            gone.cancel()
        finally:
            # In this thread: once the service stops there may be no other that still would do it.
            self._host.pool.metadata_readers.leave()

    async def _hung_up(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


Handler = Callable[[Request], Awaitable[Response]]


def application(host: Host, holds: Holds) -> Starlette:
    """Return the ASGI application for a service."""

    async def server(_: Request) -> Response:
        described = await run_in_threadpool(host.describe)
        return JsonResponse({"version": API_VERSION, "server": described})

    async def operation(request: Request) -> Response:
        parameters = await _body(request)
        name = request.path_params["name"]
        result = await run_in_threadpool(_execute, host, name, parameters)
        return JsonResponse({"version": API_VERSION, "result": result})

    async def metadata_snapshot(_: Request) -> Response:
        if host.stopping:
            raise ServerStopping(host.pool_path)
        reading = await run_in_threadpool(host.pool.metadata_readers.enter)
        return _UntilDisconnect(host, {"version": API_VERSION, "result": reading})

    async def held(request: Request) -> Any:
        parameters = await _body(request)
        _require_running(host)
        return await hold_route(cast("Pool", host.pool), holds, parameters)

    async def received(request: Request) -> Response:
        _require_running(host)
        result = await receive_route(cast("Pool", host.pool), holds, request)
        return JsonResponse({"version": API_VERSION, "result": result})

    async def disconnect(request: Request) -> Response:
        name = (await _body(request)).get("name")
        if not isinstance(name, str):
            raise BadRequest(reason="disconnect needs the parameter 'name'")
        dropped = await run_in_threadpool(host.disconnect, name)
        return JsonResponse({"version": API_VERSION, "result": {"disconnected": dropped}})

    async def stop(request: Request) -> Response:
        grace = (await _body(request)).get("grace_seconds")
        sensible = isinstance(grace, int | float) and 0 <= grace <= GRACE_SECONDS_MAX
        if grace is not None and not sensible:
            raise BadRequest(reason=f"grace_seconds is a number from 0 to {GRACE_SECONDS_MAX:.0f}")
        host.request_stop(None if grace is None else float(grace))
        return JsonResponse({"version": API_VERSION, "result": {"pid": os.getpid()}}, status_code=202)

    routes = [
        Route("/v1/server", _answering(host, server), methods=["GET"]),
        Route("/v1/operations/{name}", _answering(host, operation), methods=["POST"]),
        Route("/v1/metadata-snapshot", _answering(host, metadata_snapshot), methods=["POST"]),
        Route("/v1/hold", _answering(host, held), methods=["POST"]),
        Route("/v1/receive", _answering(host, received), methods=["POST"]),
        Route("/v1/disconnect", _answering(host, disconnect), methods=["POST"]),
        Route("/v1/stop", _answering(host, stop), methods=["POST"]),
        Route("/{rest:path}", _answering(host, _unknown), methods=["GET", "POST", "PUT", "DELETE", "PATCH"]),
    ]
    return Starlette(routes=routes)


async def _unknown(request: Request) -> Response:
    raise BadRequest(reason=f"there is no {request.method} {request.url.path} here")


def _require_running(host: Host) -> None:
    if host.stopping:
        raise ServerStopping(host.pool_path)


def _execute(host: Host, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    _require_running(host)
    return execute(host.pool, host.pool_path, name, parameters)


async def _body(request: Request) -> dict[str, Any]:
    received = bytearray()
    async for piece in request.stream():
        received += piece
        if len(received) > BODY_BYTES_MAX:
            raise BadRequest(reason=f"a request body has at most {BODY_BYTES_MAX} bytes")
    try:
        parsed = json.loads(received or b"{}")
    except (ValueError, RecursionError) as error:
        raise BadRequest(reason=f"the body is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BadRequest(reason="the body is no JSON object")
    return parsed


def _answering(host: Host, handler: Handler) -> Handler:
    """Every failure becomes a JSON answer; those that are mistakes of ours are logged with their traceback."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            leaf = as_leaf(error, host.pool_path)
            if not isinstance(leaf, ThinPoolError):
                log.exception("%s %s failed", request.method, request.url.path)
                leaf = RemoteFailure(type(error).__name__, str(error))
            status = STATUS_OF_EXIT_CODE.get(leaf.exit_code, 500)
            return JsonResponse({"version": API_VERSION, **leaf.to_json()}, status_code=status)

    return answer


def _loop_trouble() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """What the event loop does with its own errors: one line about connections it cannot accept, now and then.

    asyncio tries again after a second, as often as there are places in its queue, and would log a traceback each time.
    """
    told = -TROUBLE_SECONDS

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal told
        error = context.get("exception")
        if not isinstance(error, OSError) or lacking_resources(error, "") is None:
            loop.default_exception_handler(context)
        elif time.monotonic() - told >= TROUBLE_SECONDS:
            told = time.monotonic()
            log.warning("the control API cannot take requests: %s", error.strerror)

    return handle


class _QuietServer(uvicorn.Server):
    """uvicorn without its ten wake-ups a second: the server of an idle pool uses no CPU."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leave = asyncio.Event()

    async def main_loop(self) -> None:
        """Wait for `leave`."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_loop_trouble())
        await self.on_tick(0)
        while not self.should_exit:
            await self._leave.wait()

    def leave(self) -> None:
        """End the main loop, from any thread."""
        self.should_exit = True
        if self._loop is not None:
            # A loop that has ended meanwhile needs no telling.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._leave.set)


class ControlServer:
    """Runs the API in a thread of its own until `close`."""

    def __init__(self, host: Host, path: Path) -> None:
        self._path = path
        self._holds = Holds()
        self._failure: OSError | None = None
        self._listener: socket.socket = listen(path, 0o600)
        configuration = uvicorn.Config(
            application(host, self._holds),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            date_header=False,  # uvicorn makes the date on its ticks, of which there are none
            timeout_keep_alive=1,
            timeout_graceful_shutdown=5,
        )
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        self._server = _QuietServer(configuration)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except OSError as error:
            self._failure = error

    def start(self) -> None:
        """Answer from now on. Raises ServerStartFailed, OSError."""
        self._thread.start()
        # The listener queues connections already; a thread that ends at once is what must not go unnoticed.
        waited = threading.Event()
        for _ in range(int(START_SECONDS / 0.01)):
            if self._server.started:
                return
            if not self._thread.is_alive():
                break
            waited.wait(0.01)
        if self._failure is not None:
            raise self._failure
        raise ServerStartFailed(reason=f"the control API on {self._path} did not come up")

    def close(self) -> None:
        """Finish the requests that are being answered, then remove the socket. Idempotent."""
        self._holds.end_all()
        self._server.leave()
        if self._thread.is_alive():
            self._thread.join()
        self._holds.end_all()  # one may have been asked for in between
        self._listener.close()
        with suppress(
            OSError
        ):  # as sockets of NBD: on a file system that is read-only by now it stays, and hurts nobody
            self._path.unlink(missing_ok=True)

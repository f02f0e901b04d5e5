"""Sending and receiving wherever the pool is: through its server where there is one, otherwise by opening it here.

In: the choice and the races around it, as in `pool_access.py`. Out: both sides' work (`source_access.py`,
`receiving.py`), the routes (`control_transfers.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from .control_client import AnswerLostError, ControlClient, HeldConnection, NotServedError
from .errors import HoldLost, PoolBusy, ServerStopping, ServerUnreachable
from .operations import as_leaf
from .pool_access import BUSY_SECONDS, RETRY_SECONDS, STOPPING_SECONDS, open_here
from .pool_location import PoolLocation
from .receive_plan import examine
from .receiving import Progress, ReceiveOptions, receive
from .snapshot_source import SnapshotSource
from .source_access import HeldDevices, SourceRequest, held_here

if TYPE_CHECKING:
    from .pool import Pool

PIECE_BYTES = 1 << 20
ReadPiece = Callable[[int], bytes]
Result = TypeVar("Result")


@contextmanager
def open_source(location: PoolLocation, request: SourceRequest) -> Iterator[tuple[SnapshotSource, int]]:
    """The device to send, held, and where its stream begins. Raises ThinPoolError."""
    location.require()
    held = _settled(lambda: _hold(location, request))
    if isinstance(held, HeldConnection):
        try:
            with _served_source(location, held) as source:
                yield source
        finally:
            held.close()
        return
    try:
        with held_here(held, request) as source:
            yield source
    finally:
        held.close()


def _hold(location: PoolLocation, request: SourceRequest) -> HeldConnection | Pool:
    if location.control_path is not None:
        wanted = {key: value for key, value in asdict(request).items() if value}
        try:
            return ControlClient(location.control_path).hold(wanted)
        except NotServedError:
            pass
        except AnswerLostError as error:
            raise ServerStopping(str(location)) from error  # it holds nothing for a connection that has ended
    return open_here(location, read_only=True)


@contextmanager
def _served_source(
    location: PoolLocation, connection: HeldConnection
) -> Iterator[tuple[SnapshotSource, int]]:
    held = HeldDevices.from_json(connection.held)

    def still_held() -> None:
        if not connection.is_open():
            raise HoldLost(str(location))

    source = SnapshotSource(
        (location.metadata_path, location.data_path),
        held.block_bytes,
        (held.device, held.base),
        still_held,
        held.bases,
    )
    try:
        yield source, held.start_bytes
    finally:
        source.close()


def receive_into(
    location: PoolLocation, read: ReadPiece, options: ReceiveOptions, progress: Progress | None = None
) -> dict[str, Any]:
    """Take in the stream that `read` gives, at most so many bytes at a time. Raises ThinPoolError.

    With `dry_run` nothing is changed, and the pool is opened for reading only.
    """
    location.require()
    # Nothing is read before the pool is found: what was read once cannot be read again.
    pool = _settled(lambda: _open_or_server(location, read_only=options.dry_run))
    if isinstance(pool, ControlClient):
        return _through_server(location, pool, read, options)
    try:
        work = examine if options.dry_run else receive
        return work(pool, _into(read), options, progress).to_json()
    except Exception as error:
        translated = as_leaf(error, str(location))
        if translated is error:
            raise
        raise translated from error
    finally:
        pool.close()


def _open_or_server(location: PoolLocation, *, read_only: bool) -> Pool | ControlClient:
    if location.control_path is not None:
        client = ControlClient(location.control_path)
        try:
            client.server()
        except NotServedError:
            pass
        except AnswerLostError as error:
            raise ServerStopping(str(location)) from error
        else:
            return client
    return open_here(location, read_only=read_only)


def _through_server(
    location: PoolLocation, client: ControlClient, read: ReadPiece, options: ReceiveOptions
) -> dict[str, Any]:
    given = {"resumable": "1" if options.resumable else "0", "writable": "0" if options.read_only else "1"}
    if options.dry_run:
        given["dry_run"] = "1"
    if options.name is not None:
        given["name"] = options.name
    try:
        return client.receive(given, lambda: read(PIECE_BYTES))
    except (NotServedError, AnswerLostError) as error:
        reason = "the connection ended before the answer; look how far receiving got"
        raise ServerUnreachable(str(location), reason) from error


def _into(read: ReadPiece) -> Callable[[memoryview], int]:
    def into(buffer: memoryview) -> int:
        piece = read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    return into


def _settled(attempt: Callable[[], Result]) -> Result:
    """Try again while the pool is busy for a moment, as servers and commands that begin or end are."""
    started = time.monotonic()
    while True:
        try:
            return attempt()
        except PoolBusy:
            if time.monotonic() - started > BUSY_SECONDS:
                raise
        except ServerStopping:
            if time.monotonic() - started > STOPPING_SECONDS:
                raise
        time.sleep(RETRY_SECONDS)

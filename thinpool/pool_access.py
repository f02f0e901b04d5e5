"""How a command reaches a pool: through its server where there is one, otherwise by opening it.

In: the choice, the races around it, waiting for a server to be gone. Out: what is asked (`operations.py`).

The order is fixed: the control socket first, then the pool itself. A pool that is busy although nobody answers on the
socket is open in another command, or in a server that is starting or stopping: all of these end soon, so both ways are
tried again until a deadline. An operation that was sent to a server and not answered is never sent again, unless it
only looks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .control_client import AnswerLostError, ControlClient, NotServedError
from .errors import PoolBusy, PoolNotServed, ServerStopping, ServerUnreachable, StopFailed
from .operations import OPERATIONS, as_leaf, check_request, execute
from .pool_location import PoolLocation
from .pool_lock import current_holder

if TYPE_CHECKING:
    from .pool import Pool

BUSY_SECONDS = 3.0
STOPPING_SECONDS = 120.0
RETRY_SECONDS = 0.05


def open_here(location: PoolLocation, *, read_only: bool = False) -> Pool:
    """Open a pool in this process. Raises ThinPoolError, whatever layer it came from."""
    # Loads numpy and the engine: only where there is no server to do the work.
    from .opening import open_pool

    location.require()
    try:
        return open_pool(location, read_only=read_only)
    except Exception as error:
        translated = as_leaf(error, str(location))
        if translated is error:
            raise
        raise translated from error


class PoolAccess:
    """One pool, as a command sees it."""

    def __init__(self, location: PoolLocation, *, busy_seconds: float = BUSY_SECONDS) -> None:
        self.location = location
        self._busy_seconds = busy_seconds
        control = location.control_path
        self._client = None if control is None else ControlClient(control)

    def operate(self, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Run an operation, wherever the pool is. Raises ThinPoolError."""
        check_request(name, parameters)
        self.location.require()
        started = time.monotonic()
        while True:
            try:
                return self._operate_once(name, parameters)
            except PoolBusy:
                if time.monotonic() - started > self._busy_seconds:
                    raise
            except ServerStopping:
                if time.monotonic() - started > STOPPING_SECONDS:
                    raise
            time.sleep(RETRY_SECONDS)

    def _operate_once(self, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        if self._client is not None:
            try:
                return self._client.operate(name, parameters)
            except NotServedError:
                pass
            except AnswerLostError as error:
                if not OPERATIONS[name].looks_only:
                    reason = "the connection ended before the answer; look whether it was done"
                    raise ServerUnreachable(str(self.location), reason) from error
        return self._operate_here(name, parameters)

    def _operate_here(self, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        looks_only = OPERATIONS[name].looks_only
        pool = open_here(self.location, read_only=looks_only)
        pool.only_looking = looks_only
        try:
            return execute(pool, str(self.location), name, parameters)
        finally:
            pool.close()

    # --- the server itself ---

    def server(self) -> dict[str, Any]:
        """Describe the server. Raises PoolNotServed."""
        self.location.require()
        return self.client().server()

    def client(self) -> ServedPool:
        """The server, for requests that need one."""
        if self._client is None:
            raise PoolNotServed(str(self.location))
        return ServedPool(self.location, self._client)


class ServedPool:
    """Requests that make sense to a server only. Raises PoolNotServed where there is none."""

    def __init__(self, location: PoolLocation, client: ControlClient) -> None:
        self._location = location
        self._client = client

    def server(self) -> dict[str, Any]:
        """Describe the server: pid, URIs, connections."""
        try:
            return self._client.server()
        except (NotServedError, AnswerLostError) as error:
            raise PoolNotServed(str(self._location)) from error

    def disconnect(self, name: str) -> int:
        """Drop the NBD connections of a device; return how many there were."""
        try:
            return self._client.disconnect(name)
        except (NotServedError, AnswerLostError) as error:
            raise PoolNotServed(str(self._location)) from error

    def stop(self, grace_seconds: float | None, *, timeout_seconds: float = STOPPING_SECONDS) -> int:
        """Stop the server, wait until it has let go of the pool, return its process id. Raises StopFailed."""
        try:
            pid = self._client.stop(grace_seconds)
        except (NotServedError, AnswerLostError) as error:
            raise PoolNotServed(str(self._location)) from error
        deadline = time.monotonic() + timeout_seconds
        # Another process than the one that was asked may have the pool by now: that is not the one to wait for.
        while (holder := current_holder(self._location)) is not None and holder.pid in (0, pid):
            if time.monotonic() > deadline:
                raise StopFailed(str(self._location), pid)
            time.sleep(RETRY_SECONDS)
        return pid

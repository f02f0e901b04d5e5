"""The client side of the control API, with nothing but the standard library: commands must start quickly.

In: one request, one answer, errors as the classes they were in the server. Out: what to do where there is no server
(`pool_access.py`).
"""

from __future__ import annotations

import http.client
import json
import select
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .errors import ServerUnreachable, from_json
from .unix_sockets import connect

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 600.0  # deleting or listing a huge pool takes its time


class NotServedError(Exception):
    """Nobody listens on the control socket; nothing was sent."""


class AnswerLostError(Exception):
    """The request was sent and the connection ended without an answer: done or not, nobody knows."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """Connect to the socket; called by http.client."""
        self.sock: socket.socket = connect(self._path, CONNECT_SECONDS)
        self.sock.settimeout(ANSWER_SECONDS)


class MetadataHold:
    """The server keeps its metadata snapshot while this is open.

    `held_root` is the snapshot's block, 0 where the pool does not change at all. `fresh`: taken just now.
    """

    def __init__(self, connection: _UnixConnection, held_root: int, *, fresh: bool) -> None:
        self._connection = connection
        self.held_root = held_root
        self.fresh = fresh

    @property
    def lasts(self) -> bool:
        """Whether the server is still there and holding."""
        poll = select.poll()
        poll.register(self._connection.sock, select.POLLIN | select.POLLHUP)
        return not poll.poll(0)

    def close(self) -> None:
        """Let go."""
        self._connection.close()


class ControlClient:
    """Requests to the server of one pool, a connection each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def server(self) -> dict[str, Any]:
        """Return who serves: pid, URIs, connections."""
        answer: dict[str, Any] = self._request("GET", "/v1/server", None)["server"]
        return answer

    def operate(self, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Run an operation in the server. Raises its error."""
        answer: dict[str, Any] = self._request("POST", f"/v1/operations/{quote(name, safe='')}", parameters)[
            "result"
        ]
        return answer

    def disconnect(self, name: str) -> int:
        """Drop the NBD connections of a device; return how many there were."""
        return int(self._request("POST", "/v1/disconnect", {"name": name})["result"]["disconnected"])

    def hold_metadata(self) -> MetadataHold:
        """Have the server keep the metadata still until the result is closed. Raises what the server raises."""
        connection = _UnixConnection(self._path)
        try:
            self._connect(connection)
            try:
                connection.request("POST", "/v1/metadata-snapshot", headers={"Content-Length": "0"})
                response = connection.getresponse()
                received = response.readline() if response.status < 300 else response.read()
                document = json.loads(received)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise AnswerLostError from error
            if response.status >= 300:
                raise from_json(document)
            result = document["result"]
            return MetadataHold(connection, int(result["held_root"]), fresh=bool(result["fresh"]))
        except BaseException:
            connection.close()
            raise

    def stop(self, grace_seconds: float | None) -> int:
        """Ask the server to stop; return its process id. It is still stopping when this returns."""
        return int(self._request("POST", "/v1/stop", {"grace_seconds": grace_seconds})["result"]["pid"])

    def _request(self, method: str, target: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        connection = _UnixConnection(self._path)
        try:
            self._connect(connection)
            return self._exchange(connection, method, target, body)
        finally:
            connection.close()

    def _connect(self, connection: _UnixConnection) -> None:
        try:
            connection.connect()
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
            raise NotServedError from error
        except OSError as error:
            raise ServerUnreachable(str(self._path), error.strerror or str(error)) from error

    def _exchange(
        self, connection: _UnixConnection, method: str, target: str, body: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        try:
            connection.request(method, target, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            received = response.read()
        except TimeoutError as error:
            raise ServerUnreachable(str(self._path), f"no answer in {ANSWER_SECONDS:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise AnswerLostError from error
        try:
            document = json.loads(received)
        except ValueError as error:
            raise ServerUnreachable(str(self._path), "it does not speak the control protocol") from error
        if response.status >= 300:
            raise from_json(document)
        if not isinstance(document, dict):
            raise ServerUnreachable(str(self._path), "it does not speak the control protocol")
        return document

"""The client side of the control API, with nothing but the standard library: commands must start quickly.

In: one request, one answer, errors as the classes they were in the server. Out: what to do where there is no server
(`pool_access.py`).
"""

from __future__ import annotations

import http.client
import json
import select
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

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

    def hold(self, parameters: Mapping[str, Any]) -> HeldConnection:
        """Hold a device for as long as what is returned stays open."""
        connection = _UnixConnection(self._path)
        try:
            self._connect(connection)
            sock = connection.sock  # the connection forgets it when the answer begins
            response = self._asked(connection, "POST", "/v1/hold", parameters)
            if response.status >= 300:
                raise from_json(self._document(response.read()))
            line = response.readline()
            return HeldConnection(sock, response, self._document(line)["held"])
        except BaseException:
            connection.close()
            raise

    def receive(self, options: Mapping[str, str], read: Callable[[], bytes]) -> dict[str, Any]:
        """Send a stream as it comes from `read` (empty at its end); return what the server made of it."""
        connection = _UnixConnection(self._path)
        try:
            self._connect(connection)
            connection.putrequest("POST", "/v1/receive?" + urlencode(options))
            connection.putheader("Transfer-Encoding", "chunked")
            connection.putheader("Connection", "close")
            connection.endheaders()
            self._pour(connection, read)
            response = self._answer_of(connection)
            document = self._document(self._body_of(response))
            if response.status >= 300:
                raise from_json(document)
            result: dict[str, Any] = document["result"]
            return result
        finally:
            connection.close()

    def _pour(self, connection: _UnixConnection, read: Callable[[], bytes]) -> None:
        """Send the body in chunks (RFC 9112 7.1), until it ends or the server has answered already."""
        sock = connection.sock
        try:
            while piece := read():
                if select.select([sock], [], [], 0)[0]:
                    return  # refused: the answer says why
                sock.sendall(b"%x\r\n" % len(piece))
                sock.sendall(piece)
                sock.sendall(b"\r\n")
            sock.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            return  # the same, noticed later

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
        response = self._asked(connection, method, target, body)
        document = self._document(self._body_of(response))
        if response.status >= 300:
            raise from_json(document)
        return document

    def _asked(
        self, connection: _UnixConnection, method: str, target: str, body: Mapping[str, Any] | None
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        try:
            connection.request(method, target, None if body is None else json.dumps(body), headers)
        except (OSError, http.client.HTTPException) as error:
            raise AnswerLostError from error
        return self._answer_of(connection)

    def _answer_of(self, connection: _UnixConnection) -> http.client.HTTPResponse:
        try:
            return connection.getresponse()
        except TimeoutError as error:
            raise ServerUnreachable(str(self._path), f"no answer in {ANSWER_SECONDS:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise AnswerLostError from error

    def _body_of(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read()
        except TimeoutError as error:
            raise ServerUnreachable(str(self._path), f"no answer in {ANSWER_SECONDS:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise AnswerLostError from error

    def _document(self, received: bytes) -> dict[str, Any]:
        try:
            document = json.loads(received)
        except ValueError as error:
            raise ServerUnreachable(str(self._path), "it does not speak the control protocol") from error
        if not isinstance(document, dict):
            raise ServerUnreachable(str(self._path), "it does not speak the control protocol")
        return document


class HeldConnection:
    """A connection that holds a device: as long as nothing comes, the device is as `held` describes it."""

    def __init__(self, sock: socket.socket, response: http.client.HTTPResponse, held: dict[str, Any]) -> None:
        self._socket = sock
        self._response = response
        self.held = held

    def is_open(self) -> bool:
        """Whether the server still holds it; all that could come is the end."""
        return not select.select([self._socket], [], [], 0)[0]

    def close(self) -> None:
        """End the hold."""
        self._response.close()
        self._socket.close()

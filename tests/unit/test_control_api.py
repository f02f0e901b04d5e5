"""The control API as documented: every operation and its parameters, and what it refuses, on a real pool."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from thinpool.control import ControlServer
from thinpool.opening import create_pool, open_pool
from thinpool.operations import OPERATIONS
from thinpool.pool_location import PoolLocation

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "control-api.md"


class Host:
    """A pool with a control API and nothing else."""

    stopping = False

    def __init__(self, directory: Path) -> None:
        self.pool_path = str(directory)
        self.pool = open_pool(PoolLocation.directory(directory))
        self.stops: list[float | None] = []

    def describe(self) -> dict[str, Any]:
        return {"pid": 1}

    def disconnect(self, name: str) -> int:
        return 0

    def request_stop(self, grace_seconds: float | None) -> None:
        self.stops.append(grace_seconds)


class Caller(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("pool", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(self._path))


@pytest.fixture
def host(tmp_path: Path):
    create_pool(tmp_path / "p", size_bytes=1 << 26)
    host = Host(tmp_path / "p")
    server = ControlServer(host, tmp_path / "p" / "control")
    server.start()
    yield host
    server.close()
    host.pool.close()


def call(host: Host, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    caller = Caller(Path(host.pool_path) / "control")
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body)
    caller.request(method, path, raw)
    answer = caller.getresponse()
    document = json.loads(answer.read())
    caller.close()
    assert document["version"] == 1
    return answer.status, document


def operate(host: Host, name: str, /, **parameters: Any) -> tuple[int, dict[str, Any]]:
    return call(host, "POST", f"/v1/operations/{name}", parameters)


def test_the_document_lists_every_operation_with_its_parameters():
    rows = re.findall(
        r"^\| `([a-z-]+)` \|(.*)\|$", DOCUMENT.read_text().partition("## Operations")[2], re.MULTILINE
    )
    documented = {
        name: set(re.findall(r"(?<!\[)`(\w+)`(?!\])", text.partition(":")[0])) for name, text in rows
    }
    optional = {name: set(re.findall(r"\[`(\w+)`\]", text)) for name, text in rows}
    assert documented.keys() == OPERATIONS.keys()
    for name, operation in OPERATIONS.items():
        needed = {key for key, parameter in operation.parameters.items() if parameter.required}
        assert documented[name] == needed, name
        assert optional[name] == operation.parameters.keys() - needed, name


def test_operations_and_their_errors(host: Host):
    assert operate(host, "create", name="disk", size_bytes=1 << 20)[0] == 200
    status, document = operate(host, "create", name="disk", size_bytes=1 << 20)
    assert status >= 400
    assert document["error"] == "DeviceExists"
    assert document["fields"] == {"name": "disk"}
    assert document["exit_code"] == 4
    assert operate(host, "snapshot", origin="disk", name="s", read_only=True)[0] == 200
    names = [device["name"] for device in operate(host, "list")[1]["result"]["devices"]]
    assert names == ["disk", "s"]
    assert call(host, "GET", "/v1/server")[1]["server"] == {"pid": 1}
    assert call(host, "POST", "/v1/stop", {"grace_seconds": 2})[0] == 202
    assert host.stops == [2.0]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/operations/none", {}),
        ("/v1/operations/create", {"name": "x"}),
        ("/v1/operations/create", {"name": "x", "size_bytes": "1"}),
        ("/v1/operations/create", {"name": "x", "size_bytes": True}),
        ("/v1/operations/create", {"name": "x", "size_bytes": 1, "more": 1}),
        ("/v1/operations/create", b"{"),
        ("/v1/operations/create", b"[1]"),
        ("/v1/operations/create", b"[" * 100_000),
        ("/v1/disconnect", {}),
        ("/v1/stop", {"grace_seconds": -1}),
        ("/v1/nothing", {}),
    ],
)
def test_requests_that_make_no_sense_change_nothing(host: Host, path: str, body: Any):
    status, document = call(host, "POST", path, body)
    assert 400 <= status < 500
    assert document["exit_code"] == 2 or document["error"] == "BadRequest"
    assert host.stops == []
    assert host.pool.devices() == []


def test_a_hundred_at_once_make_one_device_of_each_name(host: Host):
    started = threading.Barrier(10)

    def make(number: int) -> int:
        if number < 10:
            started.wait()
        return operate(host, "create", name=f"d{number % 10}", size_bytes=1 << 20)[0]

    with ThreadPoolExecutor(10) as workers:
        answers = list(workers.map(make, range(100)))
    assert answers.count(200) == 10
    assert len(host.pool.devices()) == 10

"""QEMU's machine protocol: commands with answers, events between them (docs/interop/qmp-spec.txt of QEMU)."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

ANSWER_SECONDS_MAX = 30.0


class QmpError(Exception):
    """QEMU refused a command, or is gone."""


class Qmp:
    """A connection to a running QEMU."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._socket.settimeout(ANSWER_SECONDS_MAX)
        self._file = self._socket.makefile("rb")
        self._events: list[dict[str, Any]] = []
        self._receive()  # the greeting
        self.execute("qmp_capabilities")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command; its `return` value. Raises QmpError."""
        message = {"execute": command, "arguments": arguments}
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise QmpError(f"{command}: {error}") from error
        while True:
            answer = self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error'].get('desc')}")
            self._events.append(answer)

    def wait_for(self, event: str, **data: Any) -> None:
        """Wait until an event with these data has come. Raises QmpError."""
        deadline = time.monotonic() + ANSWER_SECONDS_MAX
        while True:
            for found in self._events:
                if found.get("event") == event and data.items() <= found.get("data", {}).items():
                    self._events.remove(found)
                    return
            if time.monotonic() > deadline:
                raise QmpError(f"no {event} came")
            self._events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._file.readline()
        except OSError as error:
            raise QmpError(f"no answer: {error}") from error
        if not line:
            raise QmpError("QEMU has ended")
        message: dict[str, Any] = json.loads(line)
        return message

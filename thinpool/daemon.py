"""Running a server in the background, such that the command that started it knows whether it came up.

In: leaving the terminal, the session and the working directory; the report from the server to the waiting command.
Out: what the server does (`service.py`).

The command makes a pipe and forks before anything is opened and before any thread exists. The child forks once more,
so that it can never get a terminal again, detaches, starts the server and writes one line of JSON: what it announced
or the error that kept it from starting. A server that dies before it wrote anything closes the pipe, and the command
says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .errors import RemoteFailure, ServerStartFailed, ThinPoolError, from_json

DESCRIPTORS_KEPT = 3
Announce = Callable[[dict[str, Any]], None]


def ensure_standard_descriptors() -> None:
    """Open /dev/null in place of missing standard streams: a pool file must never get their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < DESCRIPTORS_KEPT:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def run_detached(serve: Callable[[Announce], None], log_path: Path | None) -> dict[str, Any]:
    """Run `serve` in a process of its own and return what it announced, once it did. Raises its error.

    `serve` calls its argument with a JSON object when it is ready, and returns when the server has ended. Its
    standard error goes to `log_path`. Paths it uses must be absolute.
    """
    sys.stdout.flush() if sys.stdout else None
    sys.stderr.flush() if sys.stderr else None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(serve, writing, log_path)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        received = pipe.read()
    if not received:
        where = f"; see {log_path}" if log_path is not None else ""
        raise ServerStartFailed(reason=f"it ended before it was ready{where}")
    report: dict[str, Any] = json.loads(received)
    if "error" in report:
        raise from_json(report)
    return report


def _child(serve: Callable[[Announce], None], writing: int, log_path: Path | None) -> NoReturn:
    """First child: new session, fork again, end. Never returns into the caller's code."""
    try:
        os.setsid()
        if os.fork() == 0:
            _server(serve, writing, log_path)
    finally:
        os._exit(0)


def _server(serve: Callable[[Announce], None], writing: int, log_path: Path | None) -> NoReturn:
    reporting = [writing]

    def report(document: dict[str, Any]) -> None:
        if reporting:
            with contextlib.suppress(OSError):  # the command was interrupted; the server runs all the same
                os.write(reporting[0], json.dumps(document).encode("ascii"))
            os.close(reporting.pop())

    status = 1
    try:
        reporting[0] = _leave_everything(writing, log_path)
        serve(report)
        status = 0
    except ThinPoolError as error:
        status = int(error.exit_code)
        report(error.to_json())
        print(f"thinpool: {error}", file=sys.stderr, flush=True)
    except BaseException as error:
        report(RemoteFailure(type(error).__name__, str(error)).to_json())
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _leave_everything(writing: int, log_path: Path | None) -> int:
    """Drop the terminal, the directory and every inherited descriptor; return the pipe's new number."""
    os.chdir("/")
    os.umask(0o077)
    os.dup2(writing, DESCRIPTORS_KEPT, inheritable=False)
    os.closerange(DESCRIPTORS_KEPT + 1, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDWR)
    output = null
    if log_path is not None:
        try:
            output = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ServerStartFailed(reason=f"cannot write the log {log_path}: {error.strerror}") from error
    for number, source in enumerate((null, null, output)):
        os.dup2(source, number)
    os.closerange(DESCRIPTORS_KEPT + 1, DESCRIPTORS_KEPT + 8)
    sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 -- for the life of the process
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
    return DESCRIPTORS_KEPT

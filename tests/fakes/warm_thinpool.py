"""`thinpool` commands as processes of their own that need not load Python and numpy first.

Most tests of the command line wait for the interpreter and its imports far longer than for what they test. Here one
process loads everything once and forks for every command. What the command does is the same to the exit code: own
process, own environment, real descriptors. Two things are not, so tests of those start a process in the usual way:
what a command imports, and how it starts (signals, limits, the directory it is started in).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
SELF = "tests.fakes.warm_thinpool"
REQUEST_BYTES = 1 << 20


def warm_thinpool(
    *arguments: str | bytes, environment: dict[str, str], stdin: bytes = b"", timeout: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end. Raises subprocess.TimeoutExpired after killing it."""
    words = ["thinpool", *map(os.fsdecode, arguments)]
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as said,
        tempfile.TemporaryFile() as told,
    ):
        given.write(stdin)
        given.seek(0)
        files = [given.fileno(), said.fileno(), told.fileno()]
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(_warm_process())
            request = json.dumps(
                {"words": words, "environment": environment, "directory": os.getcwd()}
            ).encode()
            socket.send_fds(asking, [len(request).to_bytes(4, "big")], files)
            asking.sendall(request)
            status = _answer(asking, words, timeout)
        said.seek(0)
        told.seek(0)
        return subprocess.CompletedProcess(words, status, said.read(), told.read())


def _answer(asking: socket.socket, words: list[str], timeout: float) -> int:
    with asking.makefile("r") as answers:
        pid = int(answers.readline())
        asking.settimeout(timeout)
        try:
            return int(answers.readline())
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(words, timeout) from None


@cache
def _warm_process() -> str:
    """The address of the process that forks; it ends with this one."""
    address = f"thinpool-tests-{os.getpid()}-{secrets.token_hex(4)}"
    command = [sys.executable, "-P", "-m", SELF, address]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    atexit.register(process.kill)
    for _ in range(3000):
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(f"\0{address}") == 0:
                return f"\0{address}"
        assert process.poll() is None, "the process that forks commands did not start"
        time.sleep(0.01)
    raise AssertionError("the process that forks commands is not ready")


# --- inside the process that forks ---


def _serve(address: str) -> None:
    """Fork for every request; returns in the process of a command only, which then runs it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{address}")
        listener.listen(64)
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                os._exit(0)  # whoever asked is gone
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                break
            connection.close()
    _start(connection)


def _start(connection: socket.socket) -> None:
    """Take in a request, fork once more, tell the number and in the end the status of that process."""
    size, files, _, _ = socket.recv_fds(connection, 4, 3)
    if not size:
        os._exit(0)  # the probe
    request = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
    pid = os.fork()
    if pid:
        connection.sendall(b"%d\n" % pid)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    connection.close()
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, number)
        os.close(descriptor)
    _become(request)


def _become(request: dict[str, Any]) -> None:
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.argv = request["words"]


def _load() -> None:
    """Import all that commands import, which is what takes the time."""
    for package in ("thinpool", "metadata", "nbd"):
        for module in pkgutil.walk_packages([str(CHECKOUT / package)], f"{package}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    gc.freeze()


if __name__ == "__main__":
    _load()
    _serve(sys.argv[1])
    from thinpool.cli import main

    main()

"""A pool served over TCP, where the guest's kernel can reach it, and scripts for the guest's side of the connection.

In: start, kill and restart on one port; nbd-client's words. Out: what is tested. The rest of serving a pool in tests is
`tests/conformance/running_pool.py`.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.running_pool import ENVIRONMENT, START_SECONDS_MAX, RunningPool
from tests.guest.machine import HOST

LOAD_NBD = "modprobe nbd nbds_max=4 max_part=8\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServedPool(RunningPool):
    """A running pool with a TCP port of its own, which it keeps over restarts."""

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.port = _free_port()
        self.options: tuple[str, ...] = ()

    def start(self) -> None:
        """Start `thinpool serve` and wait until both addresses are there."""
        command = [sys.executable, "-m", "thinpool", "serve", str(self.path), "--socket", str(self.socket)]
        command += ["--listen", f"127.0.0.1:{self.port}", *self.options]
        with (self.work / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self._listens():
            if self.server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{self.log()}")
            time.sleep(0.02)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(5)
            try:
                probe.connect(("127.0.0.1", self.port))
                return probe.recv(8) == b"NBDMAGIC"
            except OSError:
                return False

    def kill(self) -> None:
        """Kill the server in an instant, as a crash would."""
        assert self.server is not None
        self.server.send_signal(signal.SIGKILL)
        self.server.wait()
        self.server = None

    def status(self) -> dict[str, int]:
        """The pool's figures."""
        return dict(self.operate("status")["status"])

    def connect(self, device: str, node: str = "/dev/nbd0", options: str = "-C 4 -b 512") -> str:
        """A script that connects a device of the pool to a block device of the guest."""
        return f"{LOAD_NBD}nbd-client {HOST} {self.port} {node} -N {device} {options}\n"


@contextlib.contextmanager
def served_pool(size: str = "2G", *, options: tuple[str, ...] = ()) -> Iterator[ServedPool]:
    """Make and serve a pool for the time of a with block; `options` go to `serve`."""
    pool = ServedPool(Path(tempfile.mkdtemp(prefix="tp-")))
    pool.options = options
    try:
        pool.thinpool("init", str(pool.path), "--size", size)
        pool.start()
        yield pool
    finally:
        pool.clean_up()
        shutil.rmtree(pool.work, ignore_errors=True)


def _accepts(path: Path) -> bool:
    """Whether somebody listens; the socket is there a moment before."""
    with socket.socket(socket.AF_UNIX) as one, contextlib.suppress(OSError):
        one.connect(str(path))
        return True
    return False


@contextlib.contextmanager
def serving(pool: list[str], directory: Path, *options: str) -> Iterator[Callable[[str], str]]:
    """Serve a bare pool, given by the options that name it, on a Unix socket; gives the URI of a device."""
    sock = Path(tempfile.mkdtemp(prefix="tp-")) / "s"
    command = [sys.executable, "-m", "thinpool", "serve", *pool, "--socket", str(sock), *options]
    with (directory / "server.log").open("ab") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not _accepts(sock):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{(directory / 'server.log').read_text()}")
            time.sleep(0.02)
        yield lambda device: f"nbd+unix:///{device}?socket={sock}"
    finally:
        server.terminate()
        status = server.wait(30)
        shutil.rmtree(sock.parent, ignore_errors=True)
    assert status == 0, (directory / "server.log").read_text()

"""A pool served by the real command, for tests that drive it with foreign tools.

In: a pool directory with a short path, the server process, commands, fast operations through the control API, and a
clean-up that leaves no mount, loop device or process behind whatever happened. Out: what is tested.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.warm_thinpool import warm_thinpool
from thinpool.pool_access import PoolAccess
from thinpool.pool_location import PoolLocation

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
    "LC_ALL": "C.UTF-8",
}
START_SECONDS_MAX = 30.0


def require(*programs: str) -> None:
    """Skip the test where a program is missing."""
    for program in programs:
        if shutil.which(program, path=ENVIRONMENT["PATH"]) is None:
            pytest.skip(f"{program} is not installed")


def require_loop_mounts() -> None:
    """Skip the test where this process cannot mount through FUSE and a loop device."""
    if os.geteuid() != 0:
        pytest.skip("needs root for mounts and loop devices")
    for node in ("/dev/fuse", "/dev/loop-control"):
        if not Path(node).exists():
            pytest.skip(f"machine: no {node}")


def run(*command: str | Path, check: bool = True, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a program without input; a failure shows its words."""
    words = [str(word) for word in command]
    if words[:3] == [sys.executable, "-m", "thinpool"] and words[3] != "serve":
        done = _warm(words[3:], timeout)
    else:
        done = _started(words, timeout)
    if check and done.returncode != 0:
        pytest.fail(f"{' '.join(words)}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def _warm(words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    done = warm_thinpool(*words, environment=ENVIRONMENT, timeout=timeout)
    said, told = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, said, told)


def _started(words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    # Another directory and PYTHONSAFEPATH: libnbd's Python module has the same name as our package.
    return subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=ENVIRONMENT,
        timeout=timeout,
        check=False,
    )


class RunningPool:
    """A pool directory and its server. Use through `running_pool`."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.path = work / "pool"
        self.socket = work / "s"
        self.access = PoolAccess(PoolLocation.directory(self.path))
        self.server: subprocess.Popen[bytes] | None = None

    def thinpool(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line tool on any arguments."""
        return run(sys.executable, "-m", "thinpool", *arguments, check=check)

    def command(self, verb: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command on this pool: `command("create", "a", "--size", "1G")`."""
        return self.thinpool(verb, str(self.path), *arguments, check=check)

    def operate(self, operation: str, /, **parameters: Any) -> Mapping[str, Any]:
        """Run an operation through the control API, without the start of an interpreter."""
        return self.access.operate(operation, parameters)

    def uri(self, device: str) -> str:
        return f"nbd+unix:///{device}?socket={self.socket}"

    def start(self, *options: str) -> None:
        """Start `thinpool serve` and wait until it greets."""
        log = (self.work / "server.log").open("ab")
        command = [sys.executable, "-m", "thinpool", "serve", str(self.path), "--socket", str(self.socket)]
        command += options
        with log:
            self.server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self.greets():
            if self.server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{self.log()}")
            time.sleep(0.02)

    def log(self) -> str:
        """What the server has written so far."""
        return (self.work / "server.log").read_text(errors="replace")

    def greets(self) -> bool:
        """Whether somebody accepts NBD connections."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
                probe.settimeout(5)
                return probe.recv(8) == b"NBDMAGIC"
            except OSError:
                return False

    def stop(self) -> None:
        """Stop the server as a user would and expect it to end well."""
        assert self.server is not None
        self.command("stop")
        assert self.server.wait(60) == 0, self.log()
        self.server = None

    def list(self) -> dict[str, dict[str, Any]]:
        """All devices by name."""
        return {device["name"]: dict(device) for device in self.operate("list")["devices"]}

    def check_metadata(self) -> None:
        """Let the reference checker look at the metadata; the server must be stopped."""
        if shutil.which("thin_check", path=ENVIRONMENT["PATH"]):
            run("thin_check", self.path / "metadata")

    def clean_up(self) -> None:
        """Undo everything under the work directory: mounts, loop devices, FUSE processes, the server."""
        release_mounts(self.work)
        if self.server is not None and self.server.poll() is None:
            self.server.terminate()
            try:
                self.server.wait(20)
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.server.wait()
        shutil.rmtree(self.work, ignore_errors=True)


def _mounts_under(path: Path) -> list[tuple[str, str]]:
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, target, *_ = line.split()
        if target == str(path) or target.startswith(f"{path}/"):
            found.append((source, target))
    return found


def _processes_on(path: Path) -> Iterator[int]:
    """Processes whose command line names something under a path: nbdfuse of an attachment."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"nbdfuse") and any(str(path).encode() in word for word in words):
                yield int(entry.name)


def release_mounts(path: Path) -> None:
    """Unmount, detach and end all that belongs to a directory; the last thing mounted goes first."""
    loops = subprocess.run(
        ["losetup", "-l", "-n", "-O", "NAME,BACK-FILE"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    ).stdout
    mounts = _mounts_under(path)
    for source, target in reversed(mounts):
        if not source.startswith("nbdfuse") and "fuse" not in source:
            subprocess.run(["umount", target], capture_output=True, env=ENVIRONMENT, check=False)
    for line in loops.splitlines():
        name, _, backing = line.partition(" ")
        if backing.strip().startswith(f"{path}/"):
            subprocess.run(["losetup", "-d", name], capture_output=True, env=ENVIRONMENT, check=False)
    for _, target in reversed(_mounts_under(path)):
        subprocess.run(["umount", "-l", target], capture_output=True, env=ENVIRONMENT, check=False)
    for pid in _processes_on(path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@contextlib.contextmanager
def running_pool(size: str = "4G", *, options: tuple[str, ...] = ()) -> Iterator[RunningPool]:
    """Make and serve a pool for the time of a with block."""
    # Not pytest's tmp_path: the address of a Unix socket ends at 107 bytes.
    pool = RunningPool(Path(tempfile.mkdtemp(prefix="tp-")))
    try:
        pool.thinpool("init", str(pool.path), "--size", size, *options)
        pool.start()
        yield pool
    finally:
        pool.clean_up()


class SnapshotTurnover:
    """Takes a snapshot of a device every 100 ms and deletes the one before last, until the with block ends."""

    def __init__(self, pool: RunningPool, device: str, *, seconds: float = 0.1) -> None:
        self.pool = pool
        self.device = device
        self.seconds = seconds
        self.taken = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self.seconds):
                self.pool.operate("snapshot", origin=self.device, name=f"{self.device}-turn-{self.taken}")
                if self.taken >= 2:
                    self.pool.operate("delete", name=f"{self.device}-turn-{self.taken - 2}")
                self.taken += 1
        except BaseException as error:  # carried to the test, which raises it
            self.failure = error

    def __enter__(self) -> SnapshotTurnover:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.failure is not None and kind is None:
            raise self.failure


def fio(pool: RunningPool, device: str, *options: str, timeout: float = 280) -> dict[str, Any]:
    """Run fio's nbd engine against a device, in the pool's directory; return its first group's figures."""
    done = subprocess.run(
        ["fio", "--thread", "--ioengine=nbd", f"--uri={pool.uri(device)}", "--output-format=json", *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=pool.work,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr}\n{pool.log()}"
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    for job in found["jobs"]:
        assert job["error"] == 0, job
    return found

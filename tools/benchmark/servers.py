"""The peers: every server that is measured beside ours, each able to put its export into the states of the matrix.

A server keeps the files of the states it has been in, so that coming back to one costs a restart and no filling.
"""

from __future__ import annotations

import abc
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from . import machine
from .certificates import Certificates
from .clients import fill
from .workloads import NBD_SERVER, NBDKIT, NBDKIT_COW, PUMP, QCOW2, QEMU_RAW, State

GIB = 1 << 30
TENTH_BYTES = 100 * GIB
CLUSTER_BYTES = 64 << 10
WRITES_PER_LAYER = 16
START_SECONDS_MAX = 120.0
PUMP_SPIN_MICROSECONDS = "50"  # as long as ours polls before it sleeps


class ServerFailedError(Exception):
    """A server did not start, or ended; the text is what it said."""


def layer_is_written(layer: int, depth: int) -> bool:
    """Tell whether something is written between two snapshots: at most about a hundred layers of a chain are."""
    return layer % max(1, depth // 100) == 0


def layer_writes(layer: int, size_bytes: int) -> list[tuple[int, bytes]]:
    """Return what is written on top of a layer: the same for every server."""
    numbers = random.Random(layer)
    offsets = numbers.sample(range(size_bytes // CLUSTER_BYTES), WRITES_PER_LAYER)
    return [(offset * CLUSTER_BYTES, numbers.randbytes(CLUSTER_BYTES)) for offset in offsets]


def drop_page_cache() -> None:
    """Write everything back and forget it; PermissionError without root."""
    subprocess.run(["sync"], check=True, stdin=subprocess.DEVNULL)
    Path("/proc/sys/vm/drop_caches").write_text("3")


class Server(abc.ABC):
    """One server under test; ``work`` is its own directory, ``size_bytes`` the length of its export."""

    name: str
    program: str

    def __init__(self, work: Path, size_bytes: int, certificates: Certificates | None = None) -> None:
        self.work = work
        self.plain_size_bytes = size_bytes
        self.state: State | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.socket = work / "s"
        self.certificates = certificates  # needed in the TLS state only
        work.mkdir(parents=True)

    @property
    def available(self) -> bool:
        return shutil.which(self.program) is not None

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def size_bytes(self) -> int:
        """Length of the export in its present state."""
        return TENTH_BYTES if self.state is State.TENTH else self.plain_size_bytes

    @property
    def scheme(self) -> str:
        """How URIs of the export begin in its present state."""
        return "nbds+unix" if self.state is State.TLS else "nbd+unix"

    @property
    def credentials(self) -> Path:
        """Directory with the certificates."""
        assert self.certificates is not None
        return self.certificates.directory()

    @property
    def uri(self) -> str:
        return f"{self.scheme}:///?socket={self.socket}"

    def enter(self, state: State) -> None:
        """Bring the export into a state, with the server running."""
        if self.state is state and self.runs and not state.used_up:
            return
        self.stop()
        self.state = state
        self.open(state)
        if state is State.COLD:
            drop_page_cache()

    @abc.abstractmethod
    def open(self, state: State) -> None:
        """Make what the state needs, if it is not there yet, and start."""

    def start(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        """Start the server process and wait until it takes connections."""
        self.socket.unlink(missing_ok=True)
        log = (self.work / "log").open("wb")
        with log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=self.work
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                message = (
                    f"{self.name} did not start: {(self.work / 'log').read_text(errors='replace')[-600:]}"
                )
                self.stop()
                raise ServerFailedError(message)
            time.sleep(0.01)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
                probe.settimeout(5)
                return probe.recv(8) == b"NBDMAGIC"
            except OSError:
                return False

    def usage(self) -> machine.Usage:
        """Return what the server has used so far."""
        return machine.usage(self.pid)

    @property
    def pid(self) -> int:
        """Root of the server's process tree."""
        assert self.process is not None
        return self.process.pid

    def stop(self) -> None:
        """End the server process; the files stay."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
        self.state = None

    def close(self) -> None:
        """Stop and remove all files."""
        self.stop()
        shutil.rmtree(self.work, ignore_errors=True)


class RawServer(Server):
    """A server on a raw, sparse file."""

    def command(self, path: Path) -> list[str]:
        raise NotImplementedError

    def open(self, state: State) -> None:
        large = state is State.FILLED_LARGE
        if state is State.TLS and not (self.work / "filled.raw").exists():
            self.state = State.FILLED
            self.open(State.FILLED)
            self.stop()
            self.state = State.TLS
        path = self.work / {State.FRESH: "fresh.raw", State.FILLED_LARGE: "large.raw"}.get(
            state, "filled.raw"
        )
        fresh = state is State.FRESH or not path.exists()
        if fresh:
            with path.open("wb") as file:
                file.truncate(self.plain_size_bytes)
        self.start(self.command(path))
        if fresh and state is not State.FRESH:
            fill(self.uri, self.plain_size_bytes, "1m" if large else "64k")


class NbdkitFile(RawServer):
    name, program = NBDKIT, "nbdkit"

    def command(self, path: Path) -> list[str]:
        tls = [f"--tls-certificates={self.credentials}", "--tls=require"] if self.state is State.TLS else []
        return ["nbdkit", "-f", *tls, "-U", str(self.socket), "file", str(path)]


class QemuRaw(RawServer):
    name, program = QEMU_RAW, "qemu-nbd"

    def command(self, path: Path) -> list[str]:
        return [
            "qemu-nbd",
            "-t",
            "-e",
            "16",
            "-k",
            str(self.socket),
            "-f",
            "raw",
            "--discard=unmap",
            *self._tls(),
            str(path),
        ]

    def _tls(self) -> list[str]:
        if self.state is not State.TLS:
            return []
        return [
            "--object",
            f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir={self.credentials}",
            "--tls-creds=tls0",
        ]


class NbdServer(RawServer):
    """nbd-server forks twice: into the background, and once a connection. Only its pid file leads to it."""

    name, program = NBD_SERVER, "nbd-server"

    @property
    def pid(self) -> int:
        return int((self.work / "pid").read_text())

    @property
    def runs(self) -> bool:
        return (self.work / "pid").exists() and Path(f"/proc/{self.pid}").exists()

    def start(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.socket.unlink(missing_ok=True)
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
        )
        deadline = time.monotonic() + 10
        while not (self.runs and self._answers()):
            if time.monotonic() > deadline:
                message = f"{self.name} did not start: {(done.stderr or done.stdout).strip()[-600:]}"
                raise ServerFailedError(message)
            time.sleep(0.02)

    def stop(self) -> None:
        if self.runs:
            pid = self.pid
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
        (self.work / "pid").unlink(missing_ok=True)
        self.state = None

    def command(self, path: Path) -> list[str]:
        configuration = self.work / "nbd-server.conf"
        # It opens a TCP port whatever happens; port 0 would be refused, so it gets one from the ephemeral range.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        configuration.write_text(
            f"[generic]\nunixsock = {self.socket}\nlistenaddr = 127.0.0.1\nport = {port}\n"
            f"[disk]\nexportname = {path}\nflush = true\nfua = true\ntrim = true\n"
        )
        return ["nbd-server", "-C", str(configuration), "-p", str(self.work / "pid")]

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.socket}"


class NbdkitCow(RawServer):
    """A raw file under nbdkit's cow filter: its snapshot is a layer that lasts as long as the process."""

    name, program = NBDKIT_COW, "nbdkit"

    def command(self, path: Path) -> list[str]:
        return ["nbdkit", "-f", "-U", str(self.socket), "--filter=cow", "file", str(path)]

    def open(self, state: State) -> None:
        if state in (State.SNAPSHOT, State.FILLED) and not (self.work / "filled.raw").exists():
            base = NbdkitFile(self.work / "base", self.plain_size_bytes)
            base.enter(State.FILLED)
            base.stop()
            (base.work / "filled.raw").rename(self.work / "filled.raw")
        super().open(state)


class QemuQcow2(Server):
    """qcow2 behind qemu-nbd; a snapshot is an overlay with the filled file as its backing file."""

    name, program = QCOW2, "qemu-nbd"

    def _start(self, path: Path) -> None:
        self.start(
            [
                "qemu-nbd",
                "-t",
                "-e",
                "16",
                "-k",
                str(self.socket),
                "-f",
                "qcow2",
                "--discard=unmap",
                str(path),
            ]
        )

    def _create(self, path: Path, backing: Path | None = None, size_bytes: int | None = None) -> None:
        # -u: the backing file is not opened, which would make a chain of n files cost n * n openings.
        layer = ["-u", "-b", str(backing), "-F", "qcow2"] if backing else []
        command = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            *layer,
            str(path),
            str(size_bytes or self.plain_size_bytes),
        ]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def _filled(self, name: str, request: str = "64k") -> Path:
        path = self.work / name
        if not path.exists():
            self._create(path)
            self._start(path)
            fill(self.uri, self.plain_size_bytes, request)
            state = self.state
            self.stop()
            self.state = state
        return path

    def _chain(self, depth: int) -> Path:
        top = self.work / f"chain-{depth}.{depth}.qcow2"
        if not top.exists():
            below = self._filled("filled.qcow2")
            for layer in range(1, depth + 1):
                path = self.work / f"chain-{depth}.{layer}.qcow2"
                self._create(path, below)
                if layer_is_written(layer, depth):
                    self._write(path, layer)
                below = path
        return top

    def _write(self, path: Path, layer: int) -> None:
        commands: list[str] = []
        for offset, _ in layer_writes(layer, self.plain_size_bytes):
            commands += ["-c", f"write -q -P {layer % 255 + 1} {offset} {CLUSTER_BYTES}"]
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(path)], check=True, stdin=subprocess.DEVNULL)

    def _tenth(self) -> Path:
        path = self.work / "tenth.qcow2"
        if not path.exists():
            self._create(path, size_bytes=TENTH_BYTES)
            self._start(path)
            fill(self.uri, TENTH_BYTES // 10)
            self.stop()
            self.state = State.TENTH
        return path

    def open(self, state: State) -> None:
        if state is State.FRESH:
            path = self.work / "fresh.qcow2"
            path.unlink(missing_ok=True)
            self._create(path)
        elif state is State.SNAPSHOT:
            path = self.work / "overlay.qcow2"
            path.unlink(missing_ok=True)
            self._create(path, self._filled("filled.qcow2"))
        elif state.depth:
            path = self._chain(state.depth)
        elif state is State.TENTH:
            path = self._tenth()
        elif state is State.FILLED_LARGE:
            path = self._filled("large.qcow2", "1m")
        else:
            path = self._filled("filled.qcow2")
        self._start(path)


class BarePump(Server):
    """The bound: pump.c, compiled when it is first needed. It has nothing behind it, so states mean nothing to it."""

    name, program = PUMP, "cc"

    def open(self, state: State) -> None:
        del state
        program = self.work / "pump"
        if not program.exists():
            source = Path(__file__).with_name("pump.c")
            subprocess.run(
                ["cc", "-O2", "-o", str(program), str(source), "-lpthread"],
                check=True,
                stdin=subprocess.DEVNULL,
            )
        self.start([str(program), str(self.socket), str(self.plain_size_bytes), PUMP_SPIN_MICROSECONDS])


PEERS: dict[str, type[Server]] = {
    server.name: server for server in (NbdkitFile, NbdkitCow, QemuRaw, QemuQcow2, NbdServer, BarePump)
}

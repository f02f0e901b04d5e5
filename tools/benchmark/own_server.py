"""Our side of the matrix: a pool served by ``thinpool serve``, driven through the public command only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from disk_client import DiskClient

from .certificates import Certificates
from .clients import fill
from .servers import TENTH_BYTES, Server, drop_page_cache, layer_is_written, layer_writes
from .workloads import OURS, State

ROOT = Path(__file__).resolve().parents[2]


class OwnServer(Server):
    """A pool with one device a state. The program is this checkout's, run by this interpreter."""

    name, program = OURS, sys.executable

    def __init__(self, work: Path, size_bytes: int, certificates: Certificates | None = None) -> None:
        super().__init__(work, size_bytes, certificates)
        self.pool = work / "pool"
        self.device = "filled"
        self.devices: set[str] = set()

    @property
    def uri(self) -> str:
        return f"{self.scheme}:///{self.device}?socket={self.socket}"

    def thinpool(self, *arguments: str) -> str:
        """Run the command line tool; raise CalledProcessError with its words when it fails."""
        command = [sys.executable, "-m", "thinpool", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def serve(self) -> None:
        """Start the server on the pool, which is made first where it is not there yet."""
        if not self.pool.exists():
            self.thinpool("init", str(self.pool), "--size", str(TENTH_BYTES))
        tls = ["--tls-certificates", str(self.credentials)] if self.state is State.TLS else []
        command = [
            sys.executable,
            "-m",
            "thinpool",
            "serve",
            str(self.pool),
            "--socket",
            str(self.socket),
            *tls,
        ]
        self.start(command, {**os.environ, "PYTHONPATH": str(ROOT)})

    def create(self, name: str, size_bytes: int | None = None) -> None:
        self.thinpool("create", str(self.pool), name, "--size", str(size_bytes or self.plain_size_bytes))
        self.devices.add(name)

    def delete(self, name: str) -> None:
        if name in self.devices:
            self.thinpool("delete", str(self.pool), name)
            self.devices.remove(name)

    def snapshot(self, origin: str, name: str) -> None:
        self.thinpool("snapshot", str(self.pool), origin, name)
        self.devices.add(name)

    def enter(self, state: State) -> None:
        # Unlike its peers our server changes state while it runs, which is what it is for.
        if self.state is state and self.runs and not state.used_up:
            return
        if state is State.COLD or State.TLS in (state, self.state):
            self.stop()
        if state is State.TLS and "filled" not in self.devices:
            self.serve()
            self._filled("filled")
            self.stop()
        self.state = state
        if not self.runs:
            self.serve()
        self.open(state)
        if state is State.COLD:
            drop_page_cache()

    def _filled(
        self, name: str, request: str = "64k", size_bytes: int | None = None, written: int | None = None
    ) -> None:
        self.device = name
        if name not in self.devices:
            self.create(name, size_bytes)
            fill(self.uri, written or self.plain_size_bytes, request)

    def _chain(self, depth: int) -> None:
        top = f"chain-{depth}"
        if top not in self.devices:
            self._filled("filled")
            self.snapshot("filled", top)
            with DiskClient(self.socket, top) as disk:
                for layer in range(1, depth + 1):
                    self.snapshot(top, f"{top}.{layer}")
                    if layer_is_written(layer, depth):
                        disk.write_many(layer_writes(layer, self.plain_size_bytes))
                disk.flush()
        self.device = top

    def open(self, state: State) -> None:
        if state is State.FRESH:
            self.delete("fresh")
            self.create("fresh")
            self.device = "fresh"
        elif state is State.SNAPSHOT:
            self._filled("filled")
            self.delete("work")
            self.snapshot("filled", "work")
            self.device = "work"
        elif state.depth:
            self._chain(state.depth)
        elif state is State.TENTH:
            self._filled("tenth", size_bytes=TENTH_BYTES, written=TENTH_BYTES // 10)
        elif state is State.FILLED_LARGE:
            self._filled("large", "1m")
        else:
            self._filled("filled")

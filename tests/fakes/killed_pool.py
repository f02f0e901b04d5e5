"""A served pool whose server is killed again and again, and what must be true each time after that.

In: one run (serve, load, SIGKILL at a random instant, sometimes again while it starts up, judge), its judgement.
Out: what clients do (`stamped_load`), how many runs (`tools/kill-runs` and the tests).

SIGKILL takes the process and leaves what the kernel was told; power cuts, which take that too, are simulated
elsewhere (`crash_search`). What is real here is everything between a client's request and the system call.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metadata import FileStore, PoolMetadata, recount
from tests.fakes.crash_check import THIN_CHECK, compare_names, describe_strangers
from tests.fakes.crash_oracle import DeviceModel, Violation, World
from tests.fakes.crash_scenario import BLOCK_SECTORS, SECTOR_BYTES
from tests.fakes.disk_history import Contents
from tests.fakes.stamped_load import Load
from thinpool.errors import DeviceInUse, ExitCode
from thinpool.opening import create_pool, open_pool
from thinpool.pool_access import PoolAccess
from thinpool.pool_location import PoolLocation

ROOT = Path(__file__).resolve().parents[2]
POOL_BYTES = 40 << 20
SIZES_BLOCKS = {"shared": 20, "own": 24, "idle": 12}
START_SECONDS_MAX = 30.0
LOAD_SECONDS_MAX = 1.2


@dataclass(slots=True)
class Totals:
    """What all runs came to."""

    runs: int = 0
    kills: int = 0
    kills_at_start: int = 0
    acknowledged: int = 0
    flushed: int = 0
    administered: int = 0
    in_flight_steps: int = 0


class KilledPool:
    """One pool under `work`, a short path. `cli`: some changes of names go through the command line."""

    def __init__(self, work: Path, seed: int, *, cli: bool = True) -> None:
        self.random = random.Random(seed)
        self.totals = Totals()
        self._work = work
        self._cli = cli
        self._socket = work / "s"
        self._location = PoolLocation.directory(work / "pool")
        self._access = PoolAccess(self._location)
        self._world: World = {}
        self._contents = Contents()
        self._counter = 0
        self._pool_bytes = POOL_BYTES
        self.before_judging: Callable[[], object] = lambda: None
        create_pool(work / "pool", size_bytes=POOL_BYTES, metadata_bytes=4 << 20)
        pool = open_pool(self._location)
        for number, (name, blocks) in enumerate(SIZES_BLOCKS.items(), 1):
            pool.create_device(name, blocks * BLOCK_SECTORS * SECTOR_BYTES)
            self._world[name] = DeviceModel(number, np.zeros(blocks * BLOCK_SECTORS, np.int32))
            self._counter = number
        pool.close()

    def run(self, *, load_seconds: float | None = None) -> None:
        """Serve, load (for a random time unless told), kill, judge. Raises Violation."""
        if load_seconds is None:
            load_seconds = self.random.random() ** 2 * LOAD_SECONDS_MAX
        server = self._serve()
        try:
            self._greeted(server)
            load = Load(
                self._world,
                self._contents,
                self.random.getrandbits(40),
                first_number=self._counter,
                pool_bytes=self._pool_bytes,
            )
            load.start(self._socket, self._operate)
            time.sleep(load_seconds)
            load.killed.set()
        finally:
            _kill(server)
        load.join()
        self._counter = load.last_number
        totals = self.totals
        totals.runs += 1
        totals.kills += 1
        totals.acknowledged += load.acknowledged
        totals.flushed += load.flushed
        totals.administered += load.administered
        worlds = list(load.oracle.worlds())
        totals.in_flight_steps += len(worlds) - 1
        if load.failures:
            raise Violation(f"a client failed: {load.failures[0]!r}") from load.failures[0]
        while self.random.random() < 0.25:
            self._kill_at_start()
        self.before_judging()
        self._check_metadata()
        self._world = self._look(worlds)
        # Numbers of contents seen long ago are of no use any more.
        self._forget()

    def _operate(self, name: str, given: Mapping[str, Any]) -> object:
        if self._cli and name != "grow" and self.random.random() < 0.15:
            return self._command(name, given)
        return self._access.operate(name, given)

    def _command(self, name: str, given: Mapping[str, Any]) -> None:
        """The same through the command line."""
        path = str(self._location.root)
        words: dict[str, list[str]] = {
            "snapshot": [str(given.get("origin")), str(given.get("name"))]
            + ["--read-only"] * bool(given.get("read_only")),
            "delete": [str(given.get("name"))],
            "rename": [str(given.get("old")), str(given.get("new"))],
            "rollback": [str(given.get("name")), str(given.get("snapshot"))]
            + (["--keep", str(given["keep"])] if given.get("keep") else ["--no-keep"]),
        }
        done = subprocess.run(
            [sys.executable, "-m", "thinpool", name, path, *words[name]],
            capture_output=True,
            text=True,
            env=_environment(),
            check=False,
        )
        if done.returncode == ExitCode.CONFLICT:
            raise DeviceInUse(str(given.get("name")), 1)
        if done.returncode:
            # Asking tells a pool that is gone from one that refuses; either way the step is known only by looking.
            raise ConnectionError(f"{name}: status {done.returncode}: {done.stderr.strip()}")

    def _serve(self) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "thinpool",
            "serve",
            str(self._location.root),
            "--socket",
            str(self._socket),
        ]
        with (self._work / "server.log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )

    def _greeted(self, server: subprocess.Popen[bytes]) -> None:
        """Wait until the server answers on its control socket."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            with contextlib.suppress(Exception):
                if self._access.server()["pid"] == server.pid:
                    return
            if server.poll() is not None or time.monotonic() > deadline:
                log = (self._work / "server.log").read_text(errors="replace")
                raise Violation(f"the pool is not served again after a kill: {log[-2000:]}")
            time.sleep(0.01)

    def _kill_at_start(self) -> None:
        """A server that is killed while it opens the pool, or a moment later."""
        server = self._serve()
        time.sleep(self.random.random() * 0.8)
        _kill(server)
        self.totals.kills += 1
        self.totals.kills_at_start += 1

    def _check_metadata(self) -> None:
        """What thin_check and a recount say of the file as the kill left it, before anybody opens the pool."""
        path = self._location.metadata_path
        if THIN_CHECK is not None:
            done = subprocess.run([THIN_CHECK, str(path)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise Violation(f"thin_check: {done.stdout.strip()} {done.stderr.strip()}")
        store = FileStore(path, writable=False)
        try:
            if PoolMetadata.open(store, writable=False).needs_check:
                raise Violation("the pool is marked as needing a check")
            wrong = recount(store)
        finally:
            store.close()
        if wrong:
            raise Violation(f"the recount finds {len(wrong)} problems, first: {wrong[0]}")

    def _look(self, worlds: list[World]) -> World:
        """Open the pool, compare all of it with what was promised; return what it holds. Raises Violation."""
        pool = open_pool(self._location)
        try:
            if not pool.writable:
                raise Violation("the pool opens read-only")
            self._pool_bytes = pool.status().data_bytes
            entries, problems = pool.catalog.entries(), []
            shown = {}
            for entry in entries:
                session = pool.open_session(entry)
                shown[entry.name] = self._contents.intern(bytes(session.read_bytes(0, entry.size_bytes)))
                session.close()
            for world in worlds:
                for model in world.values():
                    # A kill is no power cut: what was answered is there, flushed or not.
                    model.fold({layer.change.number for layer in model.layers})
                wrong = compare_names(world, entries)
                for name, actual in shown.items():
                    wrong = wrong or describe_strangers(name, world[name], actual, self._contents)
                if wrong is None:
                    return {
                        name: DeviceModel(
                            world[name].number, actual, world[name].read_only, world[name].origin
                        )
                        for name, actual in shown.items()
                    }
                problems.append(wrong)
            raise Violation("; or: ".join(problems))
        finally:
            pool.close()

    def _forget(self) -> None:
        fresh = Contents()
        for model in self._world.values():
            model.base = fresh.intern(self._contents.bytes_of(model.base))
        self._contents = fresh


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}


def _kill(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.pid, signal.SIGKILL)
    server.wait()

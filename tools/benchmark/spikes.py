"""Shapes of a server compared on one small program: a thread a connection, an event loop, several processes."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from . import clients
from .report import table
from .servers import NbdkitFile, Server
from .workloads import State

SHAPES = ("threads", "epoll", "processes")
LOADS = (
    ("4 KiB random read, depth 1, 1 connection", ("--rw=randread", "--iodepth=1", "--numjobs=1")),
    ("4 KiB random read, depth 32, 1 connection", ("--rw=randread", "--iodepth=32", "--numjobs=1")),
    ("4 KiB random read, depth 32, 4 connections", ("--rw=randread", "--iodepth=32", "--numjobs=4")),
    ("4 KiB random read, depth 1, 16 connections", ("--rw=randread", "--iodepth=1", "--numjobs=16")),
    ("4 KiB random write, depth 32, 4 connections", ("--rw=randwrite", "--iodepth=32", "--numjobs=4")),
)


class SpikeServer(Server):
    """One shape of spike_server.py on a file that was filled before."""

    program = sys.executable

    def __init__(self, work: Path, size_bytes: int, shape: str, file: Path) -> None:
        super().__init__(work, size_bytes)
        self.name = self.shape = shape
        self._file = file

    def open(self, state: State) -> None:
        del state
        script = Path(__file__).with_name("spike_server.py")
        self.start(
            [sys.executable, str(script), self.shape, str(self.socket), str(self._file), str(self.size_bytes)]
        )

    def stop(self) -> None:
        if self.process is not None:  # forked processes are not told by the end of their parent
            done = subprocess.run(
                ["ps", "--ppid", str(self.pid), "-o", "pid="], capture_output=True, text=True, check=False
            )
            for pid in done.stdout.split():
                os.kill(int(pid), signal.SIGTERM)
        super().stop()


def run(work: Path, *, size_bytes: int, rounds: int, seconds: float) -> list[str]:
    """Alternate the shapes under every load; return the Markdown."""
    base = NbdkitFile(work / "base", size_bytes)
    base.enter(State.FILLED)
    base.stop()
    shapes = [SpikeServer(work / shape, size_bytes, shape, base.work / "filled.raw") for shape in SHAPES]
    rows = []
    try:
        for title, options in LOADS:
            values: dict[str, list[float]] = {shape: [] for shape in SHAPES}
            cpu: dict[str, list[float]] = {shape: [] for shape in SHAPES}
            for number in range(rounds):
                for server in shapes[number % 3 :] + shapes[: number % 3]:
                    server.enter(State.FILLED)
                    before = server.usage()
                    figures = clients.fio(
                        server.uri, (*options, "--bs=4k", "--norandommap"), size_bytes, seconds
                    )
                    spent = server.usage().cpu_seconds - before.cpu_seconds
                    values[server.shape].append(figures.requests_per_second)
                    cpu[server.shape].append(spent / figures.requests * 1e6)
            rows.append(
                [
                    title,
                    *(
                        f"{statistics.median(values[shape]):,.0f}/s, {statistics.median(cpu[shape]):.1f} µs"
                        for shape in SHAPES
                    ),
                ]
            )
    finally:
        for server in shapes:
            server.close()
        base.close()
    note = f"Medians of {rounds} alternated rounds of {seconds:g} s; requests a second, µs of server CPU a request."
    return [note, "", *table(["load", *SHAPES], rows)]

"""System calls a request of the server, counted by the kernel's tracepoints (perf stat), or by strace without perf.

strace stops the server at every call, so that more requests wait when it comes to look and batches grow; its counts
say which calls there are, those of perf how many there are at full speed.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from . import clients
from .matrix import Matrix
from .report import table
from .workloads import NBDKIT, OURS, PUMP, WORKLOADS

CELLS = ("read-4k-1", "read-4k-32", "write-4k-1", "write-4k-32", "mixed-4k-4")
CALLS = ("recvfrom", "read", "sendmsg", "sendto", "pread64", "pwrite64", "poll", "ioctl", "futex")
LEAST_SHOWN = 0.005
SETTLE_SECONDS = 0.5


def perf_works() -> bool:
    """Whether tracepoints can be counted here."""
    if shutil.which("perf") is None:
        return False
    command = ["perf", "stat", "-e", "syscalls:sys_enter_read", "true"]
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode == 0


class Counter:
    """Counts the calls of a process, all its threads, from `start` to `stop`."""

    def __init__(self, pid: int, output: Path, *, perf: bool) -> None:
        self._perf = perf
        self._output = output
        if perf:
            events = [word for call in CALLS for word in ("-e", f"syscalls:sys_enter_{call}")]
            command = ["perf", "stat", "-x", ",", "-o", str(output), *events, "-p", str(pid)]
        else:
            command = ["strace", "-f", "-c", "-o", str(output), "-p", str(pid)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(SETTLE_SECONDS)

    def stop(self) -> dict[str, int]:
        """Return calls by name."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)
        text = self._output.read_text()
        if self._perf:
            found = re.findall(r"^(\d+),[^,]*,syscalls:sys_enter_(\w+)", text, re.MULTILINE)
            return {name: int(count) for count, name in found}
        lines = [line.split() for line in text.splitlines()]
        return {line[-1]: int(line[3]) for line in lines if len(line) >= 5 and line[3].isdigit()}


def run(work: Path, *, size_bytes: int, seconds: float, servers: Sequence[str] | None = None) -> list[str]:
    """Count in every cell for every server; return the Markdown of the report."""
    names = list(servers or (OURS, NBDKIT, PUMP))
    perf = perf_works()
    matrix = Matrix(work, size_bytes=size_bytes, seconds=seconds, rounds=1)
    rows = []
    try:
        for workload in (workload for workload in WORKLOADS if workload.name in CELLS):
            for name in names:
                server = matrix.server(name)
                server.enter(workload.state)
                counter = Counter(server.pid, work / "calls", perf=perf)
                figures = clients.fio(server.uri, workload.fio, size_bytes, seconds)
                counts = {call: count / figures.requests for call, count in counter.stop().items()}
                shown = [
                    f"{call} {count:.2f}"
                    for call, count in sorted(counts.items(), key=lambda item: -item[1])
                    if count >= LEAST_SHOWN and call != "total"
                ]
                total = sum(count for call, count in counts.items() if call != "total")
                rows.append([workload.title, name, f"{total:.2f}", ", ".join(shown)])
                matrix.note(f"  {workload.title}, {name}: {total:.2f}")
    finally:
        for server in matrix.servers.values():
            server.close()
    how = "perf stat, at full speed" if perf else "strace -c, which slows the server down"
    return [f"Counted by {how}.", "", *table(["workload", "server", "calls a request", "of these"], rows)]

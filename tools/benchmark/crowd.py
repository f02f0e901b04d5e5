"""Many clients and bad ones: verified data over 200 connections, handshakes that never end, readers that stop reading.

What is asked of the server: nobody's data are wrong, memory stays bounded, and who behaves keeps nine tenths of the
speed while others do not and snapshots are taken.
"""

from __future__ import annotations

import resource
import socket
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from disk_client import DiskClient

from nbd.client import Client
from nbd.constants import Command
from nbd.uri import unix_uri
from thinpool.control_client import ControlClient

from . import clients
from .own_server import OwnServer
from .report import table
from .workloads import State

MIB = 1 << 20
SIZE_BYTES = 1024 * MIB
CONNECTIONS = 200
HANDSHAKES = 1000
STUCK_READERS = 4
STUCK_READ_BYTES = 32 * MIB
STUCK_READS = 8
SNAPSHOT_SECONDS = 0.25
TEN_DEVICES = 10


def verified(server: OwnServer) -> list[str]:
    """200 connections, each writing and reading back its own megabyte; fio ends with an error for one wrong byte."""
    options = (
        *("--rw=randwrite", "--bs=4k", "--iodepth=4", f"--numjobs={CONNECTIONS}", "--offset_increment=1m"),
        *("--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"),
    )
    before = server.usage().anonymous_bytes
    figures = clients.fio(server.uri, options, MIB, None)
    after = server.usage().anonymous_bytes
    return [
        f"{CONNECTIONS} connections, each 1 MiB of 4 KiB writes, then read back (fio, verify=crc32c): no difference, "
        f"{figures.requests:,} requests in {figures.seconds:.1f} s; anonymous memory of the server "
        f"{before / MIB:.1f} MiB before, {after / MIB:.1f} MiB after."
    ]


@contextmanager
def unfinished(server: OwnServer) -> Iterator[None]:
    """Hold 1,000 connections on which nothing is ever said."""
    with ExitStack() as stack:
        for _ in range(HANDSHAKES):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(30)
            sock.connect(str(server.socket))
        yield


@contextmanager
def stuck(server: OwnServer) -> Iterator[None]:
    """Hold clients that asked for several replies of 32 MiB and stopped reading within the first."""
    with ExitStack() as stack:
        for _ in range(STUCK_READERS):
            client = Client.connect(unix_uri(server.socket, server.device), structured=False)
            stack.callback(client.close)
            for number in range(STUCK_READS):
                client.send_request(Command.READ, number * STUCK_READ_BYTES, STUCK_READ_BYTES)
            client.socket.recv(MIB)
        yield


class Snapshots:
    """Takes a snapshot of the device four times a second, and deletes it again."""

    def __init__(self, server: OwnServer) -> None:
        self._control = ControlClient(server.pool / "control")
        self._origin = server.device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.taken = 0
        self.failure: Exception | None = None

    def _run(self) -> None:
        try:
            while not self._stop.wait(SNAPSHOT_SECONDS):
                self._control.operate(
                    "snapshot", {"origin": self._origin, "name": "passing", "read_only": True}
                )
                self._control.operate("delete", {"name": "passing"})
                self.taken += 1
        except Exception as error:
            self.failure = error

    def __enter__(self) -> Snapshots:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure


def _nobody(_: OwnServer) -> ExitStack:
    return ExitStack()


def speeds(
    server: OwnServer, beside: Callable[[OwnServer], object], rounds: int, seconds: float, workload: str
) -> tuple[float, float, int, int]:
    """Alternate rounds without and with `beside`; return both medians, the most memory seen, and snapshots taken."""
    options = (f"--rw={workload}", "--bs=4k", "--iodepth=8", "--norandommap")
    kept: dict[bool, list[float]] = {False: [], True: []}
    most = taken = 0
    with Snapshots(server) as snapshots:
        for number in range(2 * rounds):
            with_them = bool(number % 2)
            others = beside(server) if with_them else _nobody(server)
            with others:  # type: ignore[attr-defined]
                figures = clients.fio(server.uri, options, server.size_bytes, seconds)
                most = max(most, server.usage().anonymous_bytes)
            kept[with_them].append(figures.requests_per_second)
        taken = snapshots.taken
    return statistics.median(kept[False]), statistics.median(kept[True]), most, taken


def ten_devices(server: OwnServer) -> str:
    """Open ten devices at once, read and write on each, and tell what the server's memory is."""
    for number in range(TEN_DEVICES):
        server.create(f"ten-{number}")
    with ExitStack() as stack:
        disks = [
            stack.enter_context(DiskClient(server.socket, f"ten-{number}")) for number in range(TEN_DEVICES)
        ]
        for at in range(0, 64 * MIB, MIB):
            for disk in disks:
                disk.write(at, bytes(65536))
                disk.read(at, 65536)
        used = server.usage().anonymous_bytes
    return f"Ten devices open, 64 blocks written and read on each: {used / MIB:.1f} MiB of anonymous memory."


def run(work: Path, *, rounds: int, seconds: float) -> list[str]:
    """Run everything and return the Markdown of the report."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard) if hard > 0 else 8192, hard))
    server = OwnServer(work / "crowd", SIZE_BYTES)
    rows = []
    try:
        server.enter(State.FILLED)
        ten = ten_devices(server)
        first = verified(server)
        for title, beside, workload in (
            (f"{HANDSHAKES:,} handshakes that never finish, reads", unfinished, "randread"),
            (f"{STUCK_READERS} readers stuck in a 32 MiB reply, reads", stuck, "randread"),
            (f"{STUCK_READERS} readers stuck in a 32 MiB reply, writes", stuck, "randwrite"),
        ):
            without, with_them, most, taken = speeds(server, beside, rounds, seconds, workload)
            rows.append(
                [
                    title,
                    f"{without:,.0f}/s",
                    f"{with_them:,.0f}/s",
                    f"{with_them / without:.2f}",
                    f"{most / MIB:.1f} MiB",
                    f"{taken}",
                ]
            )
    finally:
        server.close()
    head = [
        "beside",
        "4 KiB, depth 8, alone",
        "beside them",
        "kept",
        "most memory",
        "snapshots taken meanwhile",
    ]
    return ["## Many clients", "", *first, "", ten, "", "## Clients that misbehave", "", *table(head, rows)]

"""Runs the matrix: for every workload, all servers in turn, round after round, never one server's rounds in a row."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import clients
from .certificates import Certificates
from .own_server import OwnServer
from .servers import PEERS, Server, ServerFailedError
from .workloads import OURS, Client, State, Workload

FAILURES = (clients.ClientFailedError, ServerFailedError, subprocess.SubprocessError, OSError)


@dataclass(slots=True)
class Cell:
    """All rounds of one server under one workload."""

    server: str
    values: list[float] = field(default_factory=list)  # requests a second, or MB/s
    cpu_us: list[float] = field(default_factory=list)  # server processor time a request
    mean_us: list[float] = field(default_factory=list)
    p99_us: list[float] = field(default_factory=list)
    anonymous_bytes: int = 0
    failure: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values) if self.values else float("nan")

    @property
    def spread(self) -> float:
        """Half the distance between the worst and the best round, as a part of the median."""
        return (max(self.values) - min(self.values)) / 2 / self.median if self.values and self.median else 0.0

    @property
    def cpu_median_us(self) -> float | None:
        return statistics.median(self.cpu_us) if self.cpu_us else None


@dataclass(slots=True)
class Row:
    """One workload with the cells of all servers that took part."""

    workload: Workload
    cells: dict[str, Cell]

    def ratio(self, peer: str) -> float | None:
        """Return our median over the peer's; None where one of them has no figure."""
        ours, theirs = self.cells.get(OURS), self.cells.get(peer)
        if ours is None or theirs is None or not ours.values or not theirs.values:
            return None
        return ours.median / theirs.median

    def round_ratios(self, peer: str) -> list[float]:
        """Return the ratio of each round taken alone: both sides within seconds of each other."""
        ours, theirs = self.cells.get(OURS), self.cells.get(peer)
        if ours is None or theirs is None:
            return []
        return [one / other for one, other in zip(ours.values, theirs.values, strict=False) if other]

    def to_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload.name,
            "cells": {name: asdict(cell) for name, cell in self.cells.items()},
        }


class Matrix:
    """The servers, started when first needed, and the loop over workloads and rounds."""

    def __init__(
        self, work: Path, *, size_bytes: int, seconds: float, rounds: int, quiet: bool = False
    ) -> None:
        self.work = work
        self.size_bytes = size_bytes
        self.seconds = seconds
        self.rounds = rounds
        self.quiet = quiet
        self.servers: dict[str, Server] = {}
        self.source = work / "source.raw"
        self.certificates = Certificates(work / "home")

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def server(self, name: str) -> Server:
        if name not in self.servers:
            kind = OwnServer if name == OURS else PEERS[name]
            # Short directories: the address of a Unix socket ends at 107 bytes.
            work = self.work / f"s{len(self.servers)}"
            self.servers[name] = kind(work, self.size_bytes, self.certificates)
        return self.servers[name]

    def make_source(self) -> None:
        """Make the file that nbdcopy copies in: no zeros in it, so that nothing can be skipped."""
        if not self.source.exists():
            with self.source.open("wb") as file, Path("/dev/urandom").open("rb") as noise:
                for _ in range(0, self.size_bytes, 1 << 20):
                    file.write(noise.read(1 << 20))

    def run_once(self, workload: Workload, cell: Cell) -> None:
        """One server, one round."""
        server = self.server(cell.server)
        server.enter(workload.state)
        before = server.usage()
        figures = clients.run(
            workload,
            server.uri,
            size_bytes=server.size_bytes,
            seconds=self.seconds,
            source=self.source,
            home=self.certificates.home if workload.state is State.TLS else None,
        )
        after = server.usage()
        cell.values.append(figures.megabytes_per_second if workload.in_bytes else figures.requests_per_second)
        cell.cpu_us.append((after.cpu_seconds - before.cpu_seconds) / max(figures.requests, 1) * 1e6)
        if figures.mean_us is not None and figures.p99_us is not None:
            cell.mean_us.append(figures.mean_us)
            cell.p99_us.append(figures.p99_us)
        cell.anonymous_bytes = max(cell.anonymous_bytes, after.anonymous_bytes)

    def run_row(self, workload: Workload, chosen: Sequence[str] | None = None) -> Row:
        """All rounds of one workload. A server that fails is left out of it from there on, and the row says why."""
        names = [name for name in (OURS, *workload.peers) if chosen is None or name in chosen]
        row = Row(workload, {name: Cell(name) for name in names})
        if workload.client is Client.NBDCOPY_IN:
            self.make_source()
        for number in range(self.rounds):
            turned = names[number % len(names) :] + names[: number % len(names)]
            for name in turned:
                cell = row.cells[name]
                if cell.failure is not None:
                    continue
                try:
                    if not self.server(name).available:
                        cell.failure = f"{self.server(name).program} is not installed"
                        continue
                    self.run_once(workload, cell)
                except FAILURES as error:
                    detail = getattr(error, "stderr", None)
                    cell.failure = f"{error}{': ' + str(detail).strip() if detail else ''}"
        for name, cell in row.cells.items():
            unit = "MB/s" if workload.in_bytes else "/s"
            ratio = row.ratio(name)
            beside = f"  ours is {ratio:.2f} times that" if ratio is not None and name != OURS else ""
            self.note(f"  {name:18} {cell.failure or f'{cell.median:12,.0f} {unit}'}{beside}")
        return row

    def run(self, workloads: Sequence[Workload], chosen: Sequence[str] | None = None) -> list[Row]:
        """All workloads; servers and their files are removed afterwards."""
        rows = []
        try:
            for workload in workloads:
                self.note(workload.title)
                rows.append(self.run_row(workload, chosen))
        finally:
            for server in self.servers.values():
                server.close()
            self.source.unlink(missing_ok=True)
        return rows

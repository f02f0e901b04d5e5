"""How fast snapshots travel: send, receive, full and incremental, beside nbdcopy, qemu-img convert and zstd alone.

Everything is measured as users run it, from the start of a command to its end, on the same data: a tar of this
machine's own programs and documents, which packs as such things do. Rounds alternate the cells.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

from .filling import write
from .machine import version_of
from .report import table

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
BLOCK_BYTES = 64 << 10
SAMPLES = ("/usr/lib", "/usr/share", "/usr/bin")
THINPOOL = (sys.executable, "-m", "thinpool")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


class Trip:
    """A pool with `mon` (full of data) and `tue` (one block in a hundred written anew), and places to go."""

    def __init__(self, work: Path, size_bytes: int) -> None:
        self.work = work
        self.size_bytes = size_bytes
        self.pool = work / "source"
        self.image = work / "image"
        self._make_image()
        self._make_pool()
        self.streams = {}
        for level in (0, 1):
            self.streams[level] = work / f"full-{level}"
            self.run("send", self.pool, "mon", "--compress", level, output=self.streams[level])
        self.streams[2] = work / "increment"
        self.run("send", self.pool, "tue", "-i", "mon", output=self.streams[2])
        self.targets = 0

    def _make_image(self) -> None:
        tar = subprocess.Popen(
            ["tar", "-cf", "-", *SAMPLES], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert tar.stdout is not None
        with self.image.open("wb") as image:
            left = self.size_bytes
            while left and (piece := tar.stdout.read(min(left, MIB))):
                image.write(piece)
                left -= len(piece)
            while left:
                # The machine holds less than asked for: what does not pack at all makes up the rest.
                piece = os.urandom(min(left, MIB))
                image.write(piece)
                left -= len(piece)
        tar.kill()
        tar.wait()
        tar.stdout.close()

    def _make_pool(self) -> None:
        create_pool(self.pool, size_bytes=2 * self.size_bytes)
        opened = open_pool(PoolLocation.directory(self.pool))
        opened.create_device("disk", self.size_bytes)
        entry = opened.catalog.by_name("disk")
        assert entry is not None
        session = opened.open_session(entry)

        with self.image.open("rb") as image:
            for offset in range(0, self.size_bytes, MIB):
                write(session, offset, image.read(MIB))
        opened.create_snapshot("disk", "mon", read_only=True)
        for offset in range(0, self.size_bytes, 100 * BLOCK_BYTES):
            write(session, offset, os.urandom(BLOCK_BYTES))
        session.close()
        opened.create_snapshot("disk", "tue", read_only=True)
        opened.close()

    def run(self, *arguments: object, output: Path | None = None, source: Path | None = None) -> float:
        """Run a thinpool command; seconds."""
        return self.timed([*THINPOOL, *map(str, arguments)], output, source)

    def timed(self, command: list[str], output: Path | None = None, source: Path | None = None) -> float:
        """Run any command; seconds."""
        with (
            (source or Path(os.devnull)).open("rb") as stdin,
            (output or Path(os.devnull)).open("wb") as stdout,
        ):
            begun = time.perf_counter()
            subprocess.run(command, stdin=stdin, stdout=stdout, env=ENVIRONMENT, check=True)
            return time.perf_counter() - begun

    def received(self, level: int, *, served: bool = False) -> float:
        """Receive a full stream into a fresh pool, idle or served; seconds, without starting the server."""
        target = self._fresh()
        if served:
            self.run("serve", target, "--detach")
        try:
            return self.run("receive", target, "mon", source=self.streams[level])
        finally:
            if served:
                self.run("stop", target)
            shutil.rmtree(target)

    def sent_while_served(self) -> float:
        """Send without compression from the pool while it is served; seconds, without starting the server."""
        self.run("serve", self.pool, "--detach")
        try:
            return self.run("send", self.pool, "mon", "--compress", 0)
        finally:
            self.run("stop", self.pool)

    def brought_forward(self) -> float:
        """Receive the increment into a pool that has its base; seconds."""
        target = self._fresh()
        self.run("receive", target, "mon", source=self.streams[1])
        seconds = self.run("receive", target, "tue", source=self.streams[2])
        shutil.rmtree(target)
        return seconds

    def _fresh(self) -> Path:
        self.targets += 1
        target = self.work / f"target-{self.targets}"
        create_pool(target, size_bytes=2 * self.size_bytes)
        return target

    def copied(self, command: list[str]) -> float:
        """Run a command on the NBD export of `mon`; seconds. The server is started before."""
        self.run("serve", self.pool, "--detach")
        try:
            uri = f"nbd+unix:///mon?socket={self.pool}/nbd.sock"
            return self.timed([word.replace("URI", uri) for word in command])
        finally:
            self.run("stop", self.pool)


def cells(trip: Trip) -> dict[str, Callable[[], float]]:
    """What is measured, by name."""
    file = str(trip.work / "copy")
    return {
        "`send`, `--compress 0`, to /dev/null": lambda: trip.run("send", trip.pool, "mon", "--compress", 0),
        "`send` (zstd, level 1), to /dev/null": lambda: trip.run("send", trip.pool, "mon"),
        "`receive`, not compressed": lambda: trip.received(0),
        "`receive` (zstd)": lambda: trip.received(1),
        "`send`, `--compress 0`, from a served pool": trip.sent_while_served,
        "`receive`, not compressed, into a served pool": lambda: trip.received(0, served=True),
        "`receive` (zstd) into a served pool": lambda: trip.received(1, served=True),
        "`send -i`, 1 % changed, to /dev/null": lambda: trip.run("send", trip.pool, "tue", "-i", "mon"),
        "`receive` of that increment": trip.brought_forward,
        "nbdcopy from our server to null": lambda: trip.copied(["nbdcopy", "URI", "null:"]),
        "nbdcopy from our server to a file": lambda: trip.copied(["nbdcopy", "URI", file]),
        "qemu-img convert from our server to a raw file": lambda: trip.copied(
            ["qemu-img", "convert", "-f", "raw", "-O", "raw", "URI", file]
        ),
        "zstd -1 of the image, to /dev/null": lambda: trip.timed(["zstd", "-1", "-q", "-c", str(trip.image)]),
        "zstd -1 -T0 of the image, to /dev/null": lambda: trip.timed(
            ["zstd", "-1", "-T0", "-q", "-c", str(trip.image)]
        ),
        "sha256sum of the image": lambda: trip.timed(["sha256sum", str(trip.image)]),
    }


def run(work: Path, *, size_bytes: int, rounds: int) -> list[str]:
    """Measure all cells; return the Markdown of the report."""
    trip = Trip(work, size_bytes)
    measured: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, measure in cells(trip).items():
            measured.setdefault(name, []).append(measure())
    rows = [
        [
            name,
            f"{statistics.median(times):.2f} s",
            f"{min(times):.2f}-{max(times):.2f}",
            f"{size_bytes / MIB / statistics.median(times):,.0f}",
        ]
        for name, times in measured.items()
    ]
    sizes = {
        name: trip.streams[key].stat().st_size for name, key in (("none", 0), ("zstd", 1), ("increment", 2))
    }
    changed = -(-size_bytes // (100 * BLOCK_BYTES)) * BLOCK_BYTES
    return [
        f"A device with {size_bytes // MIB:,} MiB of data, page cache warm, {rounds} rounds. MiB/s are of the device's "
        "data also where less is moved: the rows of the increment say how fast a device is brought up to date.",
        "",
        *table(["", "median", "range", "MiB/s of the device"], rows),
        "",
        f"- full stream: {sizes['none']:,} bytes without compression, {sizes['zstd']:,} with",
        f"- increment: {sizes['increment']:,} bytes for {changed:,} bytes changed (random, so they do not pack)",
        "- " + "; ".join(version_of(program, "--version") for program in ("nbdcopy", "qemu-img", "zstd")),
    ]

"""A real file system on a served device, the power cut under the pool, and what the file system is afterwards.

In: the load on the mounted file system and what it was promised, the cuts, mounting what they leave. Out: the
simulated disk and its images (`simulated_disk`, `disk_history`), which file systems and how many cuts (the tests).

The pool lives on a simulated disk, is opened by the real engine, served by the real server and reached through
nbdfuse and a loop device, so every write and flush that the pool makes for the kernel's file system is in the
history. One history is cut at many points. Of each image the real engine opens the pool, the kernel mounts the file
system, which replays its journal, and every file that was fsynced is read; then its own checker has to find it clean.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbd.server import Server
from tests.fakes.crash_oracle import Violation
from tests.fakes.disk_history import SECTOR_BYTES, Contents, Image, Kind, Replay
from tests.fakes.simulated_disk import SimulatedDisk
from thinpool.exports import PoolExports
from thinpool.pool import Pool

DEVICE_BYTES = 320 << 20  # the least that mkfs.xfs takes is 300 MB
POOL_BLOCKS = 8192
METADATA_BLOCKS = 1024
COMMIT_SECONDS = 0.2
ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True, slots=True)
class FileSystem:
    """How a file system is made, and checked without being changed. `beside`: mount options for a copy."""

    name: str
    make: tuple[str, ...]
    check: tuple[str, ...]
    beside: str = "rw"


EXT4 = FileSystem("ext4", ("mkfs.ext4", "-q", "-F"), ("e2fsck", "-fn"))
XFS = FileSystem("xfs", ("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n"), "rw,nouuid")


@dataclass(slots=True)
class Promised:
    """What a file may hold: any of `versions`, sector by sector; None: it may be gone.

    `seed` and `length` make the bytes, so that a promise costs nothing to keep.
    """

    versions: tuple[tuple[int, int] | None, ...]


Files = dict[str, Promised]


@dataclass(slots=True)
class Told:
    """Mark: from here on this is promised about one file."""

    name: str
    promised: Promised


@dataclass(slots=True)
class Snapshotted:
    """Mark: a snapshot of the device was reported as made; `files` were promised before it was asked for."""

    name: str
    files: Files


def content(version: tuple[int, int]) -> bytes:
    """The bytes of a version (seed, length)."""
    return random.Random(version[0]).randbytes(version[1])


def run(*command: str | Path) -> str:
    """Run a program; its words where it fails are the violation's."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=ENVIRONMENT,
        check=False,
    )
    if done.returncode:
        raise Violation(
            f"{' '.join(words)}: status {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        )
    return done.stdout


@contextlib.contextmanager
def served(pool: Pool, work: Path) -> Iterator[Path]:
    """The pool behind the real server; yields its socket."""
    server = Server(PoolExports(pool))
    socket = work / "s"
    server.listen_unix(socket)
    server.start()
    try:
        yield socket
    finally:
        server.shutdown(1)
        socket.unlink(missing_ok=True)


@contextlib.contextmanager
def attached(socket: Path, export: str, work: Path) -> Iterator[str]:
    """A block device of an export, by nbdfuse and a loop device as `thinpool attach` does it."""
    file = work / f"{export}.disk"
    file.touch()
    fuse = subprocess.Popen(
        ["nbdfuse", str(file), f"nbd+unix:///{export}?socket={socket}"],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while not file.stat().st_size:
            if fuse.poll() is not None or time.monotonic() > deadline:
                raise Violation("nbdfuse did not start")
            time.sleep(0.01)
        device = run("losetup", "--find", "--show", "--direct-io=on", file).strip()
        try:
            yield device
        finally:
            run("losetup", "--detach", device)
    finally:
        subprocess.run(["fusermount3", "-u", str(file)], capture_output=True, env=ENVIRONMENT, check=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            fuse.wait(20)
        if fuse.poll() is None:
            fuse.send_signal(signal.SIGKILL)
        subprocess.run(["umount", "-l", str(file)], capture_output=True, env=ENVIRONMENT, check=False)


@contextlib.contextmanager
def mounted(system: FileSystem, device: str, work: Path, options: str = "rw") -> Iterator[Path]:
    """The file system on a block device, mounted; whoever goes leaves it clean."""
    place = Path(tempfile.mkdtemp(prefix="m-", dir=work))
    run("mount", "-t", system.name, "-o", options, device, place)
    try:
        yield place
    finally:
        run("umount", place)


class Recording:
    """A pool on a simulated disk with a file system that is being worked on, and its history."""

    def __init__(self, system: FileSystem, seed: int) -> None:
        self.system = system
        self.random = random.Random(seed)
        self.disk = SimulatedDisk(Contents(), metadata_blocks=METADATA_BLOCKS)
        self.disk.format(data_blocks=POOL_BLOCKS)
        self.begun = 0
        self._files: Files = {}
        self._serial = 0

    def record(self, steps: int) -> None:
        """Make the file system and work on it for so many steps; one snapshot is taken half-way."""
        work = Path(tempfile.mkdtemp(prefix="tp-"))
        pool = self.disk.open()
        stop = threading.Event()
        commits = threading.Thread(target=_commits, args=(pool, stop))
        try:
            pool.create_device("disk", DEVICE_BYTES)
            commits.start()
            with served(pool, work) as socket, attached(socket, "disk", work) as device:
                run(*self.system.make, device)
                with mounted(self.system, device, work) as place:
                    run("sync", "-f", place)
                    self.begun = len(self.disk.events)
                    noise = threading.Thread(target=self._noise, args=(place, stop))
                    noise.start()
                    try:
                        self._work(place, pool, steps)
                    finally:
                        stop.set()
                        noise.join()
        finally:
            stop.set()
            if commits.ident is not None:
                commits.join()
            pool.engine.data.close()
            shutil.rmtree(work, ignore_errors=True)

    def _work(self, place: Path, pool: Pool, steps: int) -> None:
        for number in range(steps):
            self._step(place)
            if number == steps // 2:
                files = dict(self._files)
                pool.create_snapshot("disk", "half-way", read_only=True)
                self.disk.mark(Snapshotted("half-way", files))

    def _noise(self, place: Path, stop: threading.Event) -> None:
        """Files that nobody asks for, so that much is in flight while the others are told that theirs is durable."""
        folder = place / "noise"
        folder.mkdir()
        own, number = random.Random(1), 0
        while not stop.is_set():
            number += 1
            path = folder / str(number % 7)
            path.unlink(missing_ok=True)
            with path.open("wb") as file:
                for _ in range(own.randrange(1, 9)):
                    file.write(own.randbytes(own.randrange(1, 100_000)))
                os.fdatasync(file.fileno())
            if number % 5 == 0:
                run("fstrim", place)

    def _tell(self, name: str, *versions: tuple[int, int] | None) -> None:
        self._files[name] = Promised(versions)
        self.disk.mark(Told(name, self._files[name]))

    def _version(self) -> tuple[int, int]:
        self._serial += 1
        length = self.random.choice((100, 4000, 20_000, 60_000, 200_000, 700_000))
        return self.random.getrandbits(60), self.random.randrange(1, length)

    def _step(self, place: Path) -> None:
        settled = [name for name, promised in self._files.items() if promised.versions[-1] is not None]
        choice = self.random.random()
        if choice < 0.4 or not settled:
            self._new_file(place)
        elif choice < 0.6:
            self._replace(place, self.random.choice(settled))
        elif choice < 0.75:
            self._overwrite(place, self.random.choice(settled))
        elif choice < 0.9:
            self._remove(place, self.random.choice(settled))
        else:
            (place / f"noise-{self._serial}").write_bytes(content(self._version()))  # nobody asks for it

    def _new_file(self, place: Path) -> None:
        version = self._version()
        folder = place / f"d{self._serial % 5}"
        folder.mkdir(exist_ok=True)
        path = folder / f"f{self._serial}"
        _write_through(path, content(version))
        _sync_folder(folder)
        _sync_folder(place)
        self._tell(str(path.relative_to(place)), version)

    def _replace(self, place: Path, name: str) -> None:
        """Write beside, fsync, rename: the old or the new content, whole."""
        (old,), new = self._files[name].versions, self._version()
        path = place / name
        beside = path.with_suffix(".new")
        _write_through(beside, content(new))
        self._tell(name, old, new)
        beside.replace(path)
        _sync_folder(path.parent)
        self._tell(name, new)

    def _overwrite(self, place: Path, name: str) -> None:
        """Change a file in place: each sector the old or the new one until fsync returns."""
        (old,) = self._files[name].versions
        assert old is not None
        new = (self.random.getrandbits(60), old[1])
        self._tell(name, old, new)
        with (place / name).open("r+b") as file:
            file.write(content(new))
            file.flush()
            os.fsync(file.fileno())
        self._tell(name, new)

    def _remove(self, place: Path, name: str) -> None:
        (old,) = self._files[name].versions
        self._tell(name, old, None)
        (place / name).unlink()
        _sync_folder((place / name).parent)
        self._tell(name, None)

    # --- cutting ---

    def cuts(self, count: int) -> Iterator[Cut]:
        """So many images of power cuts at random instants after the file system was made."""
        events = self.disk.events
        instants = sorted(
            self.random.sample(range(self.begun, len(events)), min(count, len(events) - self.begun))
        )
        chance = np.random.Generator(np.random.PCG64(self.random.getrandbits(60)))
        replay, files, snapshots, done = Replay(self.disk.start.copy()), dict[str, Promised](), [], 0
        for instant in instants:
            for event in events[done : instant + 1]:
                replay.apply(event)
                if event.kind is Kind.MARK and isinstance(event.payload, Told):
                    files[event.payload.name] = event.payload.promised
                elif event.kind is Kind.MARK and isinstance(event.payload, Snapshotted):
                    snapshots.append(event.payload)
            done = instant + 1
            share = self.random.choice((0.02, 0.5, 0.5, 0.9))
            image = replay.cut(chance, share, torn=self.random.random() < 0.8)
            yield Cut(self, instant, image, dict(files), list(snapshots), replay.waiting_sectors)

    def close(self) -> None:
        self.disk.close()


@dataclass(slots=True)
class Cut:
    """One image. `waiting_sectors`: how many no flush had covered yet."""

    recording: Recording
    instant: int
    image: Image
    files: Files
    snapshots: list[Snapshotted]
    waiting_sectors: int

    def judge(self, *, with_snapshots: bool) -> int:
        """Open, mount, read, check; return how many promised files were read. Raises Violation."""
        disk = SimulatedDisk(self.recording.disk.contents, self.image)
        work = Path(tempfile.mkdtemp(prefix="tp-"))
        try:
            pool = disk.open()
            try:
                if not pool.writable:
                    raise Violation("the pool opens read-only")
                return self._look(pool, work, with_snapshots=with_snapshots)
            finally:
                pool.engine.data.close()
        except Violation as error:
            raise Violation(f"cut after event {self.instant}: {error}") from error
        finally:
            disk.close()
            shutil.rmtree(work, ignore_errors=True)

    def _look(self, pool: Pool, work: Path, *, with_snapshots: bool) -> int:
        system = self.recording.system
        seen = 0
        if with_snapshots:
            for snapshot in self.snapshots:
                pool.create_snapshot(snapshot.name, "view")  # writable: its journal wants replaying
                seen += self._device(pool, work, "view", snapshot.files, system.beside)
        return seen + self._device(pool, work, "disk", self.files, "rw")

    def _device(self, pool: Pool, work: Path, name: str, files: Files, options: str) -> int:
        system = self.recording.system
        with served(pool, work) as socket, attached(socket, name, work) as device:
            with mounted(system, device, work, options) as place:
                for path, promised in files.items():
                    compare(place, path, promised)
                (place / "still-writable").write_bytes(b"yes")
            run(*system.check, device)
        return len(files)


def compare(place: Path, name: str, promised: Promised) -> None:
    """Raise Violation where a file is not what was promised."""
    try:
        found = (place / name).read_bytes()
    except FileNotFoundError:
        if None not in promised.versions:
            raise Violation(f"{name} is gone") from None
        return
    allowed = [content(version) for version in promised.versions if version is not None]
    if not allowed:
        raise Violation(f"{name} is back")
    if any(found == version for version in allowed):
        return
    fitting = [version for version in allowed if len(version) == len(found)]
    for at in range(0, len(found), SECTOR_BYTES):
        piece = found[at : at + SECTOR_BYTES]
        if all(version[at : at + SECTOR_BYTES] != piece for version in fitting):
            raise Violation(f"{name} ({len(found)} bytes) holds something else at {at}")


def _commits(pool: Pool, stop: threading.Event) -> None:
    """The periodic commit, which a simulated disk does not start by itself."""
    while not stop.wait(COMMIT_SECONDS):
        pool.engine.commit_if_dirty()
        pool.engine.reclaim()


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

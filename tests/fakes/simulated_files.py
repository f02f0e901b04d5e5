"""Small files of the pool directory on the simulated disk, one for each device that is not all here yet.

In: the calls of `os` that `thinpool.remote_blocks` makes, recorded in the disk's history before they return. Out: what
a cut leaves of them (`file_history`).

`SimulatedOs` stands in for the module `os` in that one module. Paths below `ROOT` belong to the disk whose number they
carry; all others are real.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.fakes.disk_history import Event, Kind
from tests.fakes.file_history import Call, FileHistory, Image

if TYPE_CHECKING:
    from tests.fakes.simulated_disk import SimulatedDisk

ROOT = "/simulated"
_NUMBERS = itertools.count(1)


class SimulatedFiles:
    """The files of one disk, by paths below `root`."""

    def __init__(self, disk: SimulatedDisk, image: Image) -> None:
        self.number = next(_NUMBERS)
        self.root = Path(ROOT, str(self.number))
        self._disk = disk
        self.history = FileHistory.of({str(self.root) + path: content for path, content in image.items()})

    def tell(self, operation: str, call: Call) -> None:
        """Carry out a call, if the hook of the disk lets it pass, and record it."""
        self._disk.ask(f"remote {operation}", len(call.data))
        # The image of a history has no root: the same files belong to whichever disk it is restored on.
        inner = Call(
            call.name,
            self.without_root(call.path),
            self.without_root(call.other) if call.other else "",
            call.data,
            call.offset,
            call.creates,
        )
        self.history.apply(call)
        self._disk.events.append(Event(Kind.FILES, payload=inner))

    def without_root(self, path: str) -> str:
        return path.removeprefix(str(self.root))


class SimulatedOs:
    """As much of `os` as `thinpool.remote_blocks` uses."""

    O_RDONLY, O_WRONLY, O_CREAT, O_TRUNC = os.O_RDONLY, os.O_WRONLY, os.O_CREAT, os.O_TRUNC
    O_CLOEXEC, O_DIRECTORY = os.O_CLOEXEC, os.O_DIRECTORY

    def __init__(self) -> None:
        self._disks: dict[str, SimulatedFiles] = {}
        self._open: dict[int, tuple[SimulatedFiles, str, int]] = {}
        self._next = -2

    def add(self, files: SimulatedFiles) -> None:
        self._disks[str(files.number)] = files

    def remove(self, files: SimulatedFiles) -> None:
        self._disks.pop(str(files.number), None)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"os.{name} is not simulated")

    def _of(self, path: object) -> SimulatedFiles | None:
        parts = Path(str(path)).parts
        return self._disks[parts[2]] if parts[:2] == ("/", ROOT[1:]) else None

    def open(self, path: object, flags: int, mode: int = 0o777) -> int:
        files = self._of(path)
        if files is None:
            return os.open(str(path), flags, mode)
        name = str(path)
        if flags & os.O_CREAT:
            if files.history.has(name):
                files.tell("truncate", Call("size", name))
            else:
                files.tell("create", Call("open", name, creates=True))
        elif not files.history.has(name) and name != str(files.root):
            raise FileNotFoundError(name)
        self._next -= 1
        self._open[self._next] = files, name, 0
        return self._next

    def close(self, descriptor: int) -> None:
        if self._open.pop(descriptor, None) is None:
            os.close(descriptor)

    def read(self, descriptor: int, count: int) -> bytes:
        if descriptor not in self._open:
            return os.read(descriptor, count)
        files, name, at = self._open[descriptor]
        data = files.history.read(name)[at : at + count]
        self._open[descriptor] = files, name, at + len(data)
        return data

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        if descriptor not in self._open:
            return os.pwrite(descriptor, data, offset)
        files, name, _ = self._open[descriptor]
        files.tell("write", Call("write", name, data=bytes(data), offset=offset))
        return len(data)

    def fsync(self, descriptor: int) -> None:
        if descriptor not in self._open:
            os.fsync(descriptor)
            return
        files, name, _ = self._open[descriptor]
        files.tell("flush", Call("flush", name))

    fdatasync = fsync

    def mkdir(self, path: object, mode: int = 0o777) -> None:
        files = self._of(path)
        if files is None:
            os.mkdir(str(path), mode)
        elif files.history.has(str(path)):
            raise FileExistsError(str(path))
        else:
            files.tell("create", Call("mkdir", str(path)))

    def rename(self, old: object, new: object) -> None:
        files = self._of(old)
        if files is None:
            os.rename(str(old), str(new))
        else:
            files.tell("rename", Call("rename", str(old), other=str(new)))

    def unlink(self, path: object) -> None:
        files = self._of(path)
        if files is None:
            os.unlink(str(path))
        elif not files.history.has(str(path)):
            raise FileNotFoundError(str(path))
        else:
            files.tell("remove", Call("unlink", str(path)))

    def listdir(self, path: object) -> list[str]:
        files = self._of(path)
        if files is None:
            return os.listdir(str(path))
        found = files.history.names_in(str(path))
        if found is None:
            raise FileNotFoundError(str(path))
        return found


IN_PLACE_OF_OS = SimulatedOs()

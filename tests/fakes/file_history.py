"""Files and their names, as calls of the system change them, and what a power cut at any of these may leave.

In: the calls, what is durable, what is pending, images of cuts. Out: where the calls come from: a process under strace
(`traced_files`), or the simulation (`simulated_files`).

This takes nothing for granted about new files and about renaming: a sector is durable once its own file was flushed, a
name once its directory was. Pending sectors arrive in any subset; pending changes of names arrive in their order, as
journals of file systems keep it, any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Protocol

SECTOR_BYTES = 512
ZEROS = bytes(SECTOR_BYTES)


@dataclass(frozen=True, slots=True)
class Call:
    """One system call that succeeded: its name, the path it is about, numbers and bytes."""

    name: str
    path: str
    other: str = ""
    data: bytes = b""
    offset: int = 0
    creates: bool = False


@dataclass(slots=True)
class Content:
    """Sectors by number, absent ones zero, and a length in bytes."""

    sectors: dict[int, bytes] = field(default_factory=dict)
    length: int = 0

    def copy(self) -> Content:
        return Content(dict(self.sectors), self.length)

    def to_bytes(self) -> bytes:
        whole = bytearray(-(-self.length // SECTOR_BYTES) * SECTOR_BYTES)
        for number, sector in self.sectors.items():
            whole[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES] = sector
        return bytes(whole[: self.length])

    def put(self, number: int, sector: bytes) -> None:
        if sector == ZEROS:
            self.sectors.pop(number, None)
        else:
            self.sectors[number] = sector


# By path; None is a directory.
Image = dict[str, Content | None]


class Chance(Protocol):
    """`random.Random` and numpy's generator."""

    def random(self) -> float: ...


@dataclass(slots=True)
class _File:
    """An inode: `latest` is what the process sees; pending are (sector, content) and (None, length)."""

    latest: Content = field(default_factory=Content)
    durable: Content = field(default_factory=Content)
    pending: list[tuple[int | None, bytes | int]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        for number in range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
            begin = number * SECTOR_BYTES
            old = bytearray(self.latest.sectors.get(number, ZEROS))
            low, high = max(offset - begin, 0), min(end - begin, SECTOR_BYTES)
            old[low:high] = data[begin + low - offset : begin + high - offset]
            self.latest.put(number, bytes(old))
            self.pending.append((number, bytes(old)))
        if end > self.latest.length:
            self.resize(end)

    def resize(self, length: int) -> None:
        for number in [at for at in self.latest.sectors if at * SECTOR_BYTES >= length]:
            self.latest.put(number, ZEROS)
            self.pending.append((number, ZEROS))
        self.latest.length = length
        self.pending.append((None, length))

    def flush(self) -> None:
        self.durable = self.latest.copy()
        self.pending.clear()

    def cut(self, random: Chance, share: float) -> Content:
        content = self.durable.copy()
        for number, value in self.pending:
            if random.random() < share:
                if number is None:
                    assert isinstance(value, int)
                    content.length = value
                else:
                    assert isinstance(value, bytes)
                    content.put(number, value)
        return content


class FileHistory:
    """The files below a place, as calls tell of them one after the other. None in `names` is a directory."""

    def __init__(self) -> None:
        self._names: dict[str, _File | None] = {}
        self._durable: dict[str, _File | None] = {}
        self._pending: list[tuple[str, str, _File | None]] = []

    @classmethod
    def of(cls, image: Image) -> FileHistory:
        """Files that are there already, durable."""
        history = cls()
        for path, content in image.items():
            file = None if content is None else _File(content.copy(), content.copy())
            history._names[path] = history._durable[path] = file
        return history

    def adopt(self, path: Path) -> None:
        """A file that is there already, durable."""
        file = _File()
        file.write(0, path.read_bytes())
        file.flush()
        self._names[str(path)] = self._durable[str(path)] = file

    def apply(self, call: Call) -> None:
        """Go on by one call."""
        file = self._names.get(call.path)
        if call.name == "open":
            if call.creates and call.path not in self._names:
                self._rename("", call.path, _File())
        elif call.name == "mkdir":
            self._rename("", call.path, None)
        elif call.name == "unlink":
            self._rename(call.path, "", None)
        elif call.name == "rename":
            self._rename(call.path, call.other, None)
        elif call.name == "flush" and file is None:
            self._flush_names(call.path)
        elif file is not None:
            if call.name == "flush":
                file.flush()
            elif call.name == "size":
                file.resize(call.offset)
            else:
                length = file.latest.length
                file.write(call.offset, call.data)
                if call.name == "zero" and file.latest.length != length:
                    file.resize(length)

    def _rename(self, old: str, new: str, file: _File | None) -> None:
        self._pending.append((old, new, file))
        _change(self._names, old, new, file)

    def _flush_names(self, directory: str) -> None:
        """Names in this directory are durable, and with them whatever was changed before."""
        about = [
            at for at, (old, new, _) in enumerate(self._pending) if directory in (_parent(old), _parent(new))
        ]
        done = about[-1] + 1 if about else 0
        for old, new, file in self._pending[:done]:
            _change(self._durable, old, new, file)
        del self._pending[:done]

    # --- as the process sees them ---

    def names_in(self, directory: str) -> list[str] | None:
        """Names in a directory; None where there is none."""
        if directory not in self._names:
            return None
        return [path.rpartition("/")[2] for path in self._names if _parent(path) == directory]

    def has(self, path: str) -> bool:
        return path in self._names

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises KeyError."""
        file = self._names[path]
        assert file is not None
        return file.latest.to_bytes()

    # --- after a cut ---

    @property
    def waiting(self) -> int:
        """Changes that no flush covers yet."""
        files = {id(file): file for file in (*self._names.values(), *self._durable.values()) if file}
        return len(self._pending) + sum(len(file.pending) for file in files.values())

    def latest(self) -> Image:
        """Everything arrived."""
        return self.image(_SURE, len(self._pending), 1.0)

    def durable(self) -> Image:
        """Only what was flushed arrived."""
        return self.image(_SURE, 0, 0.0)

    def cut(self, random: Chance, renames: int, share: float) -> Image:
        """So many of the pending changes of names arrived at most, and each pending sector by chance."""
        return self.image(random, min(renames, len(self._pending)), share)

    def cuts(self, random: Random, count: int) -> Iterator[Image]:
        """What a power cut now may leave: everything that was asked for, nothing of it, and so many others."""
        yield self.latest()
        yield self.durable()
        for _ in range(count):
            share = random.choice((0.05, 0.5, 0.95))
            yield self.image(random, random.randint(0, len(self._pending)), share)

    def image(self, random: Chance, renames: int, share: float) -> Image:
        names = dict(self._durable)
        for old, new, file in self._pending[:renames]:
            _change(names, old, new, file)
        return {path: None if file is None else file.cut(random, share) for path, file in names.items()}


class _Sure:
    """For shares of 0 and 1, where nothing is left to chance."""

    def random(self) -> float:
        return 0.5


_SURE = _Sure()


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _change(names: dict[str, _File | None], old: str, new: str, file: _File | None) -> None:
    if not old:
        names[new] = file
        return
    for path in [path for path in names if path == old or path.startswith(f"{old}/")]:
        moved = names.pop(path)
        if new:
            names[new + path[len(old) :]] = moved

"""What a real process did to files, by its system calls, and what a power cut at any of them may leave.

In: running a program under strace, its changes of files and directories below one place, images of cuts, laying an
image out as real files. Out: what the program does, what an image must hold (the tests).

Unlike the simulated disk this takes nothing for granted about SQLite, about new files and about renaming: a sector
is durable once its own file was flushed, a name once its directory was. Pending sectors arrive in any subset; pending
changes of names arrive in their order, as journals of file systems keep it, any number of them.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

SECTOR_BYTES = 512
ZEROS = bytes(SECTOR_BYTES)
MARK = "/mark:"
CALLS = (
    "openat,pwrite64,write,pwritev,pwritev2,copy_file_range,ftruncate,truncate,fallocate,fsync,fdatasync,sync_file_range,"
    "unlink,unlinkat,rename,renameat,renameat2,link,linkat,mkdir,mkdirat,rmdir,access"
)
LINE = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)(?:<([^>]*)>)?")
RESUMED = re.compile(r"^\d+ +<\.\.\. \w+ resumed>(.*)")
TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")
HEX = re.compile(r"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Call:
    """One system call that succeeded: its name, the path it is about, numbers and bytes."""

    name: str
    path: str
    other: str = ""
    data: bytes = b""
    offset: int = 0
    creates: bool = False


def _unescape(text: str) -> str:
    return HEX.sub(lambda found: chr(int(found[1], 16)), text)


def trace(command: list[str], place: Path, scratch: Path, environment: dict[str, str]) -> list[Call]:
    """Run a program under strace; return what it did below `place`, and its marks, in order."""
    output = scratch / "trace"
    options = ("-f", "--seccomp-bpf", "-y", "-xx", "-s", str(1 << 24), "-e", "signal=none", "-o", str(output))
    subprocess.run(
        ["strace", *options, "-e", f"trace={CALLS}", *command],
        check=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    calls = []
    with output.open() as lines:
        for line in _whole(lines):
            found = LINE.match(line)
            if found and (int(found[3]) >= 0 or found[1] == "access"):
                call = _call(found[1], found[2])
                if call is not None and call.path.startswith((str(place), MARK)):
                    calls.append(call)
    return calls


def _whole(lines: Iterable[str]) -> Iterator[str]:
    """Lines with the halves of calls put together, where another thread's came between."""
    begun: dict[str, str] = {}
    for line in lines:
        process = line.partition(" ")[0]
        if line.endswith("<unfinished ...>\n"):
            begun[process] = line.removesuffix("<unfinished ...>\n").rstrip()
        elif resumed := RESUMED.match(line):
            yield begun.pop(process) + resumed[1]
        else:
            yield line


def _call(name: str, arguments: str) -> Call | None:
    texts = [bytes.fromhex(text.replace("\\x", "")) for text in TEXT.findall(arguments)]
    on = DESCRIPTOR.match(arguments)
    path = _unescape(on[1]) if on and not arguments.startswith("AT_FDCWD") else ""
    numbers = [int(word) for word in re.findall(r", (\d+)(?=,|$)", arguments)]
    match name:
        case "access":
            return (
                Call("mark", os.fsdecode(texts[0])) if texts and texts[0].startswith(MARK.encode()) else None
            )
        case "openat":
            return Call("open", os.fsdecode(texts[0]), creates="O_CREAT" in arguments)
        case "pwrite64":
            return Call("write", path, data=texts[0], offset=numbers[-1])
        case "ftruncate":
            return Call("size", path, offset=numbers[-1])
        case "fallocate":
            return Call("zero", path, data=bytes(numbers[-1]), offset=numbers[-2])
        case "fsync" | "fdatasync":
            return Call("flush", path)
        case "unlink" | "mkdir":
            return Call(name, os.fsdecode(texts[0]))
        case "rename":
            return Call(name, os.fsdecode(texts[0]), other=os.fsdecode(texts[1]))
    assert not path or path.startswith(("/dev/", "pipe:", "socket:")) or name == "write", (
        f"{name} is not understood"
    )
    return None


@dataclass(slots=True)
class Content:
    """Sectors by number, absent ones zero, and a length in bytes."""

    sectors: dict[int, bytes] = field(default_factory=dict)
    length: int = 0

    def copy(self) -> Content:
        return Content(dict(self.sectors), self.length)

    def put(self, number: int, sector: bytes) -> None:
        if sector == ZEROS:
            self.sectors.pop(number, None)
        else:
            self.sectors[number] = sector


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

    def cut(self, random: Random, share: float) -> Content:
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


class TracedFiles:
    """The files below a place, as calls tell of them one after the other. None in `names` is a directory."""

    def __init__(self) -> None:
        self._names: dict[str, _File | None] = {}
        self._durable: dict[str, _File | None] = {}
        self._pending: list[tuple[str, str, _File | None]] = []

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

    def cuts(self, random: Random, count: int) -> Iterator[dict[str, Content | None]]:
        """What a power cut now may leave: everything that was asked for, nothing of it, and so many others."""
        yield self._image(random, len(self._pending), 1.0)
        yield self._image(random, 0, 0.0)
        for _ in range(count):
            share = random.choice((0.05, 0.5, 0.95))
            yield self._image(random, random.randint(0, len(self._pending)), share)

    def _image(self, random: Random, renames: int, share: float) -> dict[str, Content | None]:
        names = dict(self._durable)
        for old, new, file in self._pending[:renames]:
            _change(names, old, new, file)
        return {path: None if file is None else file.cut(random, share) for path, file in names.items()}


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


def lay_out(image: dict[str, Content | None], place: Path, target: Path) -> None:
    """Make the files of an image, those below `place` below `target` instead."""
    for path, content in sorted(image.items()):
        here = target / Path(path).relative_to(place)
        if content is None:
            here.mkdir(parents=True, exist_ok=True)
            continue
        if not here.parent.is_dir():
            continue
        with here.open("wb") as file:
            for number, sector in content.sectors.items():
                if number * SECTOR_BYTES < content.length:
                    file.seek(number * SECTOR_BYTES)
                    file.write(sector)
            file.truncate(content.length)

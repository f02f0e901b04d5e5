"""What a real process did to files, by its system calls.

In: running a program under strace, its changes of files and directories below one place, laying an image out as real
files. Out: what a cut leaves of it (`file_history`), what the program does, what an image must hold (the tests).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.fakes.file_history import SECTOR_BYTES, Call, Content

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
        case "fallocate" if "FALLOC_FL" not in arguments:
            # Space set aside for metadata, which changes no byte, or for the journal, whose length is of no interest:
            # it is not believed after a cut.
            return None
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

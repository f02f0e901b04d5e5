"""What the kernel tells about this machine and about the processes under test."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process tree has used: processor seconds so far, anonymous memory now."""

    cpu_seconds: float
    anonymous_bytes: int


def _stat_fields(pid: int) -> list[str]:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()


def process_tree(root: int) -> list[int]:
    """Return the process and all its descendants that live now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                children.setdefault(int(_stat_fields(int(entry.name))[1]), []).append(int(entry.name))
            except (OSError, ValueError):
                continue  # it ended while we looked
    tree, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        tree.append(pid)
        waiting += children.get(pid, [])
    return tree


def usage(root: int) -> Usage:
    """Return the usage of a process tree; children that ended and were waited for are counted in."""
    ticks, anonymous = 0, 0
    for pid in process_tree(root):
        try:
            fields = _stat_fields(pid)
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        ticks += sum(int(field) for field in fields[11:15])
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                anonymous += int(line.split()[1]) * 1024
    return Usage(ticks / TICKS_PER_SECOND, anonymous)


def processor_name() -> str:
    """Return the processor's model as the kernel names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def file_system_of(path: Path) -> str:
    """Return the type of the file system a path is on."""
    done = subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def version_of(*command: str) -> str:
    """Return the first line a program prints about its version, or say that it is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except OSError:
        return "missing"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0].strip() if lines else "unknown"


def description(work: Path) -> list[str]:
    """Return the lines every report opens with."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return [
        f"{os.cpu_count()} processors ({processor_name()}), {memory:.0f} GiB of memory, Linux {platform.release()}",
        f"Python {platform.python_version()}; files on {file_system_of(work)}",
        f"{version_of('fio', '--version')}; {version_of('nbdkit', '--version')}; {version_of('qemu-nbd', '--version')}",
    ]

"""The first file system of the guest: a static busybox, a few modules, and the script that mounts the host's root.

In: the archive, written here in cpio's "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst). Out:
what the guest does afterwards (`agent.sh`).
"""

from __future__ import annotations

import lzma
import stat
from collections.abc import Sequence
from pathlib import Path

DIRECTORIES = ("bin", "dev", "lower", "modules", "new", "proc", "rw", "sys")
INIT = Path(__file__).with_name("init.sh")
HEADER_MAGIC = "070701"
ALIGNMENT_BYTES = 4


class Archive:
    """A cpio archive being written. Members are owned by root and dated 1970, so equal inputs give equal bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._members = 0

    def add(self, name: str, mode: int, content: bytes = b"") -> None:
        """Add a file, directory or symbolic link; `mode` includes its type."""
        self._members += 1
        self._append(name, mode, self._members, content)

    def finish(self) -> bytes:
        """The whole archive, its trailer included."""
        self._append("TRAILER!!!", 0, 0, b"")
        return b"".join(self._parts)

    def _append(self, name: str, mode: int, inode: int, content: bytes) -> None:
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device and node numbers (4), length of the name, checksum
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = HEADER_MAGIC + "".join(f"{field:08x}" for field in fields)
        self._parts += [_padded(header.encode() + encoded), _padded(content)]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT_BYTES)


def build_initramfs(busybox: Path, modules: Sequence[Path]) -> bytes:
    """The archive for a kernel; modules are loaded in the order given."""
    archive = Archive()
    for name in DIRECTORIES:
        archive.add(name, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    for number, path in enumerate(modules):
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        archive.add(f"modules/{number:03}-{path.name.partition('.')[0]}.ko", stat.S_IFREG | 0o644, content)
    archive.add("init", stat.S_IFREG | 0o755, INIT.read_bytes())
    return archive.finish()

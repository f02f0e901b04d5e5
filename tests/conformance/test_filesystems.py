"""Real file systems on a thin device: written, snapshotted while mounted, changed, compared, rolled back, checked.

The device is reached as a user reaches it: ``thinpool serve``, ``thinpool attach --mount`` (nbdfuse and a loop device
where the kernel has no nbd driver). THINPOOL_TREE_MB sets how much is written; the deep mode writes 200 MB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conformance.running_pool import RunningPool, require, require_loop_mounts, run, running_pool

pytestmark = [pytest.mark.peer, pytest.mark.root, pytest.mark.timeout(280)]

MB = 1_000_000
DEFAULT_TREE_MB = 40
DEEP_TREE_MB = 200


@dataclass(frozen=True, slots=True)
class FileSystem:
    """How one file system is made, mounted beside its origin, and checked without being changed."""

    name: str
    make: tuple[str, ...]
    beside: str  # mount options for a second copy with the same UUID
    check: tuple[str, ...]

    @property
    def programs(self) -> tuple[str, str]:
        return self.make[0], self.check[0]


FILE_SYSTEMS = [
    FileSystem("ext4", ("mkfs.ext4", "-q", "-F"), "ro", ("e2fsck", "-fn")),
    FileSystem("xfs", ("mkfs.xfs", "-q", "-f"), "ro,nouuid", ("xfs_repair", "-n")),
    FileSystem("btrfs", ("mkfs.btrfs", "-q", "-f"), "ro", ("btrfs", "check", "--readonly")),
]


def copy_sources(target: Path, limit_bytes: int) -> int:
    """Copy Python's own library, as often as it takes, until the limit is reached; return the bytes copied."""
    copied, turn = 0, 0
    while copied < limit_bytes:
        for folder, _, names in os.walk(sysconfig.get_paths()["stdlib"]):
            for name in names:
                source = Path(folder) / name
                if source.is_symlink() or not source.is_file():
                    continue
                place = target / str(turn) / source.relative_to("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, place)
                copied += source.stat().st_size
                if copied >= limit_bytes:
                    return copied
        turn += 1
    return copied


def change_tree(root: Path) -> None:
    """Delete a third of all files, overwrite another third in place, add new ones."""
    for number, path in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        if number % 3 == 0:
            path.unlink()
        elif number % 3 == 1:
            length = path.stat().st_size
            with path.open("r+b") as file:
                file.write(os.urandom(min(length, 200_000)))
    (root / "after").mkdir()
    for number in range(50):
        (root / "after" / str(number)).write_bytes(os.urandom(30_000))


def attach(pool: RunningPool, device: str, *options: str) -> str:
    """Attach and return what the command printed last: a block device, or where it was mounted."""
    return pool.command("attach", device, *options).stdout.split()[-1]


def mount_beside(pool: RunningPool, device: str, options: str, place: Path) -> None:
    """Mount another device with the same UUID; a writable one, since journals are replayed at the mount."""
    block_device = attach(pool, device)
    place.mkdir()
    run("mount", "-o", options, block_device, place)


def assert_same_trees(one: Path, other: Path) -> None:
    done = run("diff", "-r", "--no-dereference", one, other, check=False)
    assert done.returncode == 0, done.stdout[:2000]


@pytest.fixture
def pool() -> Iterator[RunningPool]:
    require_loop_mounts()
    with running_pool("4G") as made:
        yield made


def life_of_a_file_system(pool: RunningPool, system: FileSystem, limit_bytes: int) -> None:
    pool.command("create", "disk", "--size", "1G")
    run(*system.make, attach(pool, "disk"))
    pool.command("detach", "disk")

    live, copy = pool.work / "live", pool.work / "copy"
    live.mkdir()
    attach(pool, "disk", "--mount", str(live))
    assert os.path.ismount(live)
    assert copy_sources(live, limit_bytes) >= limit_bytes
    run("sync", "-f", live)
    shutil.copytree(live, copy, symlinks=True)

    pool.command("snapshot", "disk", "before", "--read-only")
    change_tree(live)
    run("sync", "-f", live)

    # The read-only snapshot is looked at through a writable one of its own: a mounted file system is snapshotted with
    # a journal that wants replaying. The origin stays mounted beside it.
    pool.command("snapshot", "before", "view")
    view = pool.work / "view"
    mount_beside(pool, "view", system.beside, view)
    assert_same_trees(copy, view)
    run("umount", view)
    pool.command("detach", "view")
    pool.command("delete", "view")

    pool.command("detach", "disk")
    assert not os.path.ismount(live)
    pool.command("rollback", "disk", "before")
    attach(pool, "disk", "--mount", str(live))
    assert_same_trees(copy, live)
    (live / "still-writable").write_text("yes")
    pool.command("detach", "disk")

    run(*system.check, attach(pool, "disk"))
    pool.command("detach", "disk")
    pool.stop()
    pool.check_metadata()


@pytest.mark.parametrize("system", FILE_SYSTEMS, ids=lambda system: system.name)
def test_snapshot_and_rollback(pool: RunningPool, system: FileSystem) -> None:
    require(*system.programs, "nbdfuse", "losetup", "fusermount3")
    megabytes = int(os.environ.get("THINPOOL_TREE_MB", DEFAULT_TREE_MB))
    life_of_a_file_system(pool, system, megabytes * MB)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("system", FILE_SYSTEMS, ids=lambda system: system.name)
def test_snapshot_and_rollback_of_much(pool: RunningPool, system: FileSystem) -> None:
    require(*system.programs, "nbdfuse", "losetup", "fusermount3")
    life_of_a_file_system(pool, system, DEEP_TREE_MB * MB)


def test_nothing_is_left_behind(pool: RunningPool) -> None:
    """Detach undoes what attach did: no loop device, no FUSE mount, no process."""
    require("nbdfuse", "losetup", "fusermount3", "mkfs.ext4")
    pool.command("create", "disk", "--size", "64M")
    run("mkfs.ext4", "-q", "-F", attach(pool, "disk"))
    pool.command("detach", "disk")
    place = pool.work / "m"
    place.mkdir()
    attach(pool, "disk", "--mount", str(place))
    (place / "file").write_text("content")
    pool.command("detach", "disk")
    loops = subprocess.run(["losetup", "-l", "-n"], capture_output=True, text=True, check=True).stdout
    assert str(pool.work) not in loops
    assert str(pool.work) not in Path("/proc/self/mounts").read_text()
    pool.stop()

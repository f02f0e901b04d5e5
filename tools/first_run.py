"""The tour behind tools/quickstart: the product's main job on a small default, told step by step.

In: the story, its checks, its figures. Out: installation (tools/setup-venv, tools/debian-packages). Everything goes
through the ``thinpool`` command and NBD, as it would for a user; each command is printed before it runs. What the
machine lacks is replaced by something plainer and named at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from disk_client import DiskClient

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
IMAGE_BYTES = 256 * MIB
PIECE_BYTES = 64 << 10
THINPOOL = [sys.executable, "-m", "thinpool"]


class StepFailedError(Exception):
    """A step of the tour did not do what it promises; the text says which."""


def human(count: int) -> str:
    """Return a byte count for reading."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_pieces(before: Path, after: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, content) of every 64 KiB piece in which two files of equal length differ."""
    with before.open("rb") as old, after.open("rb") as new:
        offset = 0
        while piece := new.read(PIECE_BYTES):
            if old.read(PIECE_BYTES) != piece:
                yield offset, piece
            offset += len(piece)


class Tour:
    """One run: where its files are, what it left out, how much the pool held after each step."""

    def __init__(self, work: Path, pool: Path) -> None:
        self.work = work
        self.pool = pool
        # Unix socket addresses end at 107 bytes, so the socket lives in the short temporary directory.
        self.socket = work / "nbd.sock"
        self.left_out: list[str] = []
        self.used_bytes = 0
        self.step_number = 0
        self.begun = time.monotonic()

    # -- telling --------------------------------------------------------------------------------------------------

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def step(self, title: str) -> None:
        self.step_number += 1
        self.say(f"\n{self.step_number}. {title}")

    def account(self) -> None:
        """Print what the last step cost in the pool."""
        status = self.status()
        used = int(status["data_used_bytes"])
        delta = used - self.used_bytes
        self.used_bytes = used
        sign = "+" if delta >= 0 else "-"
        held = sum(
            path.stat().st_blocks * 512
            for path in (self.pool / "data", self.pool / "metadata")
            if path.exists()
        )
        self.say(
            f"   pool: {human(used)} of data in use ({sign}{human(abs(delta))}); {human(held)} on disk in all"
        )

    # -- doing ----------------------------------------------------------------------------------------------------

    def run(self, *command: str, shown: bool = True) -> str:
        """Run a command, print it, return what it wrote; raise StepFailedError with its words when it fails."""
        if shown:
            words = (
                ["thinpool", *command[len(THINPOOL) :]]
                if list(command[: len(THINPOOL)]) == THINPOOL
                else command
            )
            self.say(f"   $ {shlex.join(words)}")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode != 0:
            message = (
                f"{shlex.join(command)} ended with status {done.returncode}:\n{done.stderr or done.stdout}"
            )
            raise StepFailedError(message)
        return done.stdout

    def thinpool(self, *arguments: str, shown: bool = True) -> str:
        return self.run(*THINPOOL, *arguments, shown=shown)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.thinpool("status", str(self.pool), "--json", shown=False))
        return found

    def uri(self, device: str) -> str:
        return f"nbd+unix:///{device}?socket={self.socket}"

    def write_image(self, image: Path, device: str) -> None:
        """Copy a whole image to a device: nbdcopy where it is installed, else our own client."""
        if shutil.which("nbdcopy"):
            self.run("nbdcopy", "--flush", str(image), self.uri(device))
            return
        self.left_out.append("nbdcopy (Debian: libnbd-bin): images were copied by thinpool's own NBD client")
        blank = bytes(PIECE_BYTES)
        with DiskClient(self.socket, device) as disk, image.open("rb") as file:
            offset = 0
            while piece := file.read(PIECE_BYTES):
                if piece != blank:
                    disk.write(offset, piece)
                offset += len(piece)
            disk.flush()

    def device_hash(self, device: str) -> str:
        """Return the SHA-256 of a device's first IMAGE_BYTES, read over NBD."""
        digest = hashlib.sha256()
        with DiskClient(self.socket, device) as disk:
            for offset in range(0, IMAGE_BYTES, MIB):
                digest.update(disk.read(offset, MIB))
        return digest.hexdigest()

    def check_same(self, device: str, expected: str, what: str) -> None:
        found = self.device_hash(device)
        if found != expected:
            message = f"{device} is not {what}: sha256 {found[:16]}, expected {expected[:16]}"
            raise StepFailedError(message)
        self.say(f"   checked: {device} is, byte for byte, {what} (sha256 {found[:16]}...)")

    # -- the images ----------------------------------------------------------------------------------------------

    def make_image(self, image: Path) -> None:
        """Make an ext4 image of this checkout's sources, or a pattern where mkfs.ext4 is missing."""
        if shutil.which("mkfs.ext4"):
            tree = self.work / "tree"
            for name in ("metadata", "nbd", "thinpool", "docs", "tools"):
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            (tree / "large.bin").write_bytes(random.Random(1).randbytes(24 * MIB))
            self.run("mkfs.ext4", "-q", "-F", "-d", str(tree), str(image), f"{IMAGE_BYTES // MIB}M")
            return
        self.left_out.append("mkfs.ext4 (Debian: e2fsprogs): a random pattern stood in for a file system")
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
            for megabyte in range(0, IMAGE_BYTES // MIB, 8):
                file.seek(megabyte * MIB)
                file.write(random.Random(megabyte).randbytes(MIB))

    def change_image(self, image: Path) -> None:
        """Delete files and add others inside the image, as a user of the device would."""
        if shutil.which("debugfs") and shutil.which("mkfs.ext4"):
            notes = self.work / "notes.txt"
            notes.write_bytes(b"written after the snapshot\n" * 40000)
            script = self.work / "debugfs.txt"
            script.write_text(f"rm large.bin\nrm tools/quickstart\nwrite {notes} notes.txt\n")
            self.run("debugfs", "-w", "-f", str(script), str(image))
            return
        with image.open("r+b") as file:
            for megabyte in range(0, IMAGE_BYTES // MIB, 16):
                file.seek(megabyte * MIB + 4096)
                file.write(random.Random(-megabyte).randbytes(PIECE_BYTES))

    # -- the story ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        self.step("A pool of 4 GiB and a device of 1 GiB. Neither takes space before it is written.")
        self.thinpool("init", str(self.pool), "--size", "4G")
        self.thinpool("create", str(self.pool), "disk", "--size", "1G")
        self.account()
        self.step("The pool is served over NBD: every device is an export under its name.")
        self.thinpool("serve", str(self.pool), "--socket", str(self.socket), "--detach")

    def fill(self, image: Path) -> str:
        self.step("A file system image is made and written to the device through NBD.")
        self.make_image(image)
        self.write_image(image, "disk")
        digest = file_hash(image)
        self.check_same("disk", digest, "the image")
        self.account()
        return digest

    def snapshot_and_change(self, image: Path, original: str) -> str:
        self.step("A snapshot, while the device is being served. It shares every block with its origin.")
        self.thinpool("snapshot", str(self.pool), "disk", "disk-monday", "--read-only")
        self.account()
        self.step("The device changes: files are deleted and written. Only what changed takes new space.")
        before = self.work / "before.img"
        shutil.copyfile(image, before)
        self.change_image(image)
        written = 0
        with DiskClient(self.socket, "disk") as disk:
            for offset, piece in changed_pieces(before, image):
                disk.write(offset, piece)
                written += len(piece)
            disk.flush()
        before.unlink()
        self.say(f"   {human(written)} were written in pieces of 64 KiB")
        changed = file_hash(image)
        self.check_same("disk", changed, "the changed image")
        self.check_same("disk-monday", original, "still the image as it was")
        self.account()
        return changed

    def roll_back(self, original: str, changed: str) -> None:
        self.step(
            "Rollback: the device becomes what the snapshot holds; its latest state is kept as a snapshot."
        )
        known = {str(entry["name"]) for entry in self.devices()}
        self.thinpool("rollback", str(self.pool), "disk", "disk-monday")
        self.check_same("disk", original, "the image as it was")
        for kept in sorted({str(entry["name"]) for entry in self.devices()} - known):
            self.check_same(kept, changed, "the state before the rollback")
        self.account()
        if shutil.which("e2fsck") and shutil.which("mkfs.ext4"):
            copy = self.work / "copy.img"
            with DiskClient(self.socket, "disk") as disk, copy.open("wb") as file:
                for offset in range(0, IMAGE_BYTES, MIB):
                    file.write(disk.read(offset, MIB))
            self.run("e2fsck", "-fn", str(copy))
            self.say("   e2fsck finds nothing to complain about")
            copy.unlink()

    def devices(self) -> list[dict[str, object]]:
        found = json.loads(self.thinpool("list", str(self.pool), "--json", shown=False))
        devices: list[dict[str, object]] = found["devices"] if isinstance(found, dict) else found
        return devices

    def finish(self) -> None:
        self.step("What the pool holds now.")
        self.say(self.thinpool("list", str(self.pool)).rstrip())
        self.thinpool("stop", str(self.pool))
        if shutil.which("thin_check"):
            self.run("thin_check", str(self.pool / "metadata"))
            self.say("   thin_check, the reference checker of the format, accepts the metadata")
        seconds = time.monotonic() - self.begun
        self.say(f"\nAll steps done and checked in {seconds:.1f} s.")
        for item in dict.fromkeys(self.left_out):
            self.say(f"Left out: {item}.")

    def tell(self) -> None:
        """Run the whole story."""
        image = self.work / "image.img"
        self.prepare()
        original = self.fill(image)
        changed = self.snapshot_and_change(image, original)
        self.roll_back(original, changed)
        self.finish()

    def clean_up(self) -> None:
        """Stop the server if it still runs; errors do not matter, the tour has told its story or failed."""
        if self.pool.exists():
            subprocess.run(
                [*THINPOOL, "stop", str(self.pool)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=False,
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/quickstart", description="Show thinpool at work.")
    parser.add_argument(
        "directory", nargs="?", type=Path, help="keep the pool here (a new or empty directory)"
    )
    named: Path | None = parser.parse_args().directory
    work = Path(tempfile.mkdtemp(prefix="thinpool-"))
    pool = (named or work / "pool").absolute()
    tour = Tour(work, pool)
    try:
        tour.tell()
    except StepFailedError as failure:
        print(f"\nquickstart: {failure}", file=sys.stderr)
        return 1
    finally:
        tour.clean_up()
        shutil.rmtree(work, ignore_errors=True)
    if named:
        print(f"The pool is in {pool}. Go on with: .venv/bin/thinpool list {shlex.quote(str(pool))}")
    else:
        print("The temporary pool was removed. Name a directory to keep one: tools/quickstart DIRECTORY")
    return 0


if __name__ == "__main__":
    sys.exit(main())

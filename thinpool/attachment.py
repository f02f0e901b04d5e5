"""A served device as a block device or a mounted file system on this machine, and the way back.

In: kernel nbd where it is there (`nbd-client`), otherwise nbdfuse and a loop device; mounting; a record of every
step in the pool directory, written as soon as the step is done, so that `detach` undoes exactly these, also after a
crash of the server or of `attach` itself. Out: serving (`service.py`). Nothing here ever formats anything: a device
that carries no file system is not mounted, whatever the reason it was not recognised.

Undoing goes backwards: unmount, loop device, FUSE mount (of the directory, not the file in it), process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.parse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import AlreadyAttached, AttachFailed, DetachFailed, NoSuchDevice, NotAttached
from .pool_access import PoolAccess
from .pool_location import PoolLocation

APPEAR_SECONDS = 20.0
LEAVE_SECONDS = 20.0
POLL_SECONDS = 0.02

# Options for a file system that may be mounted a second time under one UUID, and for one that cannot be written to,
# where a journal left by a snapshot of a mounted file system must not be replayed.
SHARED_UUID_OPTIONS = {"xfs": ("nouuid",)}
READ_ONLY_OPTIONS = {
    "ext3": ("ro", "noload"),
    "ext4": ("ro", "noload"),
    "xfs": ("ro", "norecovery"),
    "btrfs": ("ro", "rescue=nologreplay"),
}


@dataclass
class Attachment:
    """What was done for one device: `steps` are (kind, argument), in the order they were done.

    Kinds: process (pid), fuse (directory), loop (device), nbd (device), mount (directory).
    """

    name: str
    device: str = ""
    mount: str = ""
    steps: list[list[str]] = field(default_factory=list)

    @property
    def where(self) -> str:
        """What the user asked for: the mount where there is one, otherwise the device."""
        return self.mount or self.device

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {"name": self.name, "device": self.device, "mount": self.mount, "steps": self.steps}


class Attachments:
    """The attachments of one pool on this machine. Raises AttachFailed, DetachFailed and the leaves named below."""

    def __init__(self, location: PoolLocation) -> None:
        self._location = location.absolute()

    def _paths(self, name: str) -> tuple[Path, Path]:
        directory = self._location.attachments_path
        if directory is None:
            raise AttachFailed(name, "looking for the pool's directory", "a pool of two bare paths has none")
        stem = urllib.parse.quote(name, safe=" @+,")
        return directory / f"{stem}.json", directory / f"{stem}.d"

    def _load(self, name: str) -> Attachment | None:
        record, _ = self._paths(name)
        try:
            document = json.loads(record.read_bytes())
            return Attachment(document["name"], document["device"], document["mount"], document["steps"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DetachFailed(name, f"reading {record}", str(error)) from error

    def _save(self, attachment: Attachment) -> None:
        record, _ = self._paths(attachment.name)
        building = record.with_suffix(".new")
        building.write_text(json.dumps(attachment.to_json()))
        building.replace(record)

    def attach(self, name: str, *, mount: Path | None, read_only: bool) -> Attachment:
        """Attach a device of the served pool, and mount it at `mount` if given.

        Raises PoolNotServed, NoSuchDevice, AlreadyAttached. What was done before a failure is undone.
        """
        uri, device_is_read_only = self._export(name)
        if (present := self._load(name)) is not None:
            raise AlreadyAttached(name, present.where)
        _, directory = self._paths(name)
        directory.mkdir(parents=True, exist_ok=True)
        attachment = Attachment(name)
        self._save(attachment)
        try:
            self._connect(attachment, uri, directory, read_only=read_only or device_is_read_only)
            if mount is not None:
                self._mount(attachment, mount, read_only=read_only or device_is_read_only)
        except BaseException:
            with suppress(DetachFailed):
                self._undo(attachment)
            raise
        return attachment

    def detach(self, name: str) -> Attachment:
        """Undo everything `attach` did for a device. Raises NotAttached, DetachFailed."""
        attachment = self._load(name)
        if attachment is None:
            raise NotAttached(name)
        before = Attachment(name, attachment.device, attachment.mount, list(attachment.steps))
        self._undo(attachment)
        return before

    def _export(self, name: str) -> tuple[str, bool]:
        access = PoolAccess(self._location)
        uris = access.server()["uris"].get(name)
        if not uris:
            raise NoSuchDevice(name, str(self._location))
        devices = access.operate("list", {})["devices"]
        return uris[0], any(device["name"] == name and device["read_only"] for device in devices)

    # --- doing ---

    def _done(self, attachment: Attachment, kind: str, argument: str) -> None:
        attachment.steps.append([kind, argument])
        self._save(attachment)

    def _connect(self, attachment: Attachment, uri: str, directory: Path, *, read_only: bool) -> None:
        if Path("/sys/module/nbd").exists() and shutil.which("nbd-client") and os.geteuid() == 0:
            self._connect_kernel(attachment, uri, read_only=read_only)
            return
        file = directory / "disk"
        command = ["nbdfuse", *(["-r"] if read_only else []), str(file), uri]
        log = directory.with_suffix(".log")
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    cwd="/",
                )
        except FileNotFoundError:
            reason = "neither kernel nbd with nbd-client nor nbdfuse is on this machine; install nbdfuse"
            raise AttachFailed(attachment.name, "choosing a way", reason) from None
        self._done(attachment, "process", str(process.pid))
        self._done(attachment, "fuse", str(directory))
        deadline = time.monotonic() + APPEAR_SECONDS
        while not file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip() or "it did not show the device in time"
                raise AttachFailed(attachment.name, "nbdfuse", said)
            time.sleep(POLL_SECONDS)
        attachment.device = str(file)
        if os.geteuid() == 0 and shutil.which("losetup"):
            flags = ["--read-only"] if read_only else []
            made = self._run(attachment, "losetup", "--find", "--show", "--direct-io=on", *flags, str(file))
            attachment.device = made.strip()
            self._done(attachment, "loop", attachment.device)

    def _connect_kernel(self, attachment: Attachment, uri: str, *, read_only: bool) -> None:
        parts = urllib.parse.urlsplit(uri)
        socket = urllib.parse.parse_qs(parts.query).get("socket")
        target = ["-unix", socket[0]] if socket else [parts.hostname or "localhost", str(parts.port or 10809)]
        free = [
            entry.name
            for entry in sorted(Path("/sys/block").glob("nbd*"), key=lambda entry: int(entry.name[3:]))
            if not (entry / "pid").exists()
        ]
        if not free:
            raise AttachFailed(attachment.name, "choosing a /dev/nbd device", "all are in use")
        device = f"/dev/{free[0]}"
        flags = ["-readonly"] if read_only else []
        export = urllib.parse.unquote(parts.path[1:])
        self._run(attachment, "nbd-client", *target, device, "-N", export, "-b", "512", *flags)
        attachment.device = device
        self._done(attachment, "nbd", device)

    def _mount(self, attachment: Attachment, place: Path, *, read_only: bool) -> None:
        if not place.is_dir():
            raise AttachFailed(attachment.name, "mounting", f"{place} is not a directory")
        kind = self._run(attachment, "blkid", "-p", "-o", "value", "-s", "TYPE", attachment.device).strip()
        options = [*SHARED_UUID_OPTIONS.get(kind, ())]
        if read_only:
            options += READ_ONLY_OPTIONS.get(kind, ("ro",))
        flags = ["-o", ",".join(options)] if options else []
        self._run(attachment, "mount", "-t", kind, *flags, attachment.device, str(place.absolute()))
        attachment.mount = str(place.absolute())
        self._done(attachment, "mount", attachment.mount)

    def _run(self, attachment: Attachment, *command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except FileNotFoundError:
            raise AttachFailed(attachment.name, command[0], "it is not installed on this machine") from None
        if done.returncode:
            said = done.stderr.strip() or f"it ended with status {done.returncode}"
            if command[0] == "blkid" and not done.stderr.strip():
                said = f"no file system is recognised on it; {attachment.device} must be formatted first"
            raise AttachFailed(attachment.name, command[0], said)
        return done.stdout

    # --- undoing ---

    def _undo(self, attachment: Attachment) -> None:
        """Undo the steps, last first; each is taken off the record when it is undone."""
        while attachment.steps:
            kind, argument = attachment.steps[-1]
            getattr(self, f"_undo_{kind}")(attachment.name, argument)
            attachment.steps.pop()
            self._save(attachment)
        record, directory = self._paths(attachment.name)
        with suppress(FileNotFoundError):
            directory.with_suffix(".log").unlink()
        with suppress(FileNotFoundError):
            directory.rmdir()
        record.unlink()

    def _undo_mount(self, name: str, place: str) -> None:
        if os.path.ismount(place):
            _undo_by(name, ["umount", place])

    def _undo_loop(self, name: str, device: str) -> None:
        if Path(f"/sys/block/{Path(device).name}/loop/backing_file").exists():
            _undo_by(name, ["losetup", "--detach", device])

    def _undo_nbd(self, name: str, device: str) -> None:
        if Path(f"/sys/block/{Path(device).name}/pid").exists():
            _undo_by(name, ["nbd-client", "-d", device])

    def _undo_fuse(self, name: str, directory: str) -> None:
        deadline = time.monotonic() + LEAVE_SECONDS
        # Losing the loop device lets go of the file a moment after losetup returns.
        while _is_mounted(directory):
            done = subprocess.run(
                ["fusermount3", "-u", directory], capture_output=True, text=True, check=False
            )
            if done.returncode and time.monotonic() > deadline:
                raise DetachFailed(name, f"fusermount3 -u {directory}", done.stderr.strip())
            time.sleep(POLL_SECONDS)

    def _undo_process(self, name: str, pid: str) -> None:
        deadline = time.monotonic() + LEAVE_SECONDS
        while _runs(int(pid), "nbdfuse"):
            if time.monotonic() > deadline:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)
                raise DetachFailed(name, "waiting for nbdfuse", f"process {pid} does not end")
            time.sleep(POLL_SECONDS)


def _undo_by(name: str, command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise DetachFailed(name, " ".join(command), done.stderr.strip() or f"status {done.returncode}")


def _is_mounted(directory: str) -> bool:
    """Whether the mount table names a directory; asking the file system could hang on a dead FUSE server."""
    escaped = (
        directory.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    )
    lines = Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines()
    return any(line.split(" ")[1] == escaped for line in lines)


def _runs(pid: int, program: str) -> bool:
    """Whether a process is alive and is that program; a finished child of ours is collected on the way."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return f"({program}" in stat and stat.rpartition(")")[2].split()[0] != "Z"

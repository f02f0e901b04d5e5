"""Who has a pool open: one process that may write, or any number of readers.

In: the locks and the note that names the holder. Out: reaching the holder (`control_client.py`).

The lock that counts is a flock on the metadata file's inode: it meets every other opener, whatever path, bind
mount or mount namespace it came by, and it ends with its process, so nothing stale can be left. The file `lock` in a
pool directory is locked too: it shows at a glance that the pool is in use and holds the note. A metadata file that is
a block device is also opened with O_EXCL, which the kernel refuses while device mapper or a mount uses it (an active
LVM pool).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from .errors import NotAPool, PoolBusy, PoolNotFound
from .pool_location import PoolLocation

NOTE_BYTES_MAX = 4096


class PoolLock:
    """Locks held on a pool; let go by `close` or by the end of the process."""

    def __init__(self, descriptors: list[int], note: int | None) -> None:
        self._descriptors = descriptors
        self._note = note

    @classmethod
    def acquire(cls, location: PoolLocation, *, shared: bool = False) -> PoolLock:
        """Lock the pool for this process, or for reading beside other readers when `shared`.

        Never waits. Raises PoolBusy, PoolNotFound, NotAPool, OSError.
        """
        location.require()  # before a lock file is made in a directory that is no pool
        descriptors: list[int] = []
        note: int | None = None
        try:
            if location.lock_path is not None:
                note = _open_lock_file(location.lock_path, shared=shared)
                if note is not None:
                    descriptors.append(note)
                    _lock(note, location, note, shared=shared)
            descriptors.append(_open_metadata(location, shared=shared))
            _lock(descriptors[-1], location, note, shared=shared)
            if note is not None and not shared:
                _write_note(note)
        except BaseException:
            _close_all(descriptors)
            raise
        return cls(descriptors, None if shared else note)

    def close(self) -> None:
        """Let the pool go. Idempotent."""
        if self._note is not None:
            with suppress(OSError):  # the note is advice only; the lock itself goes with the descriptor
                os.pwrite(self._note, b" " * NOTE_BYTES_MAX, 0)
            self._note = None
        descriptors, self._descriptors = self._descriptors, []
        _close_all(descriptors)


def current_holder(location: PoolLocation) -> PoolBusy | None:
    """Return who has the pool open for writing now, as the error that would say so.

    Raises PoolNotFound, NotAPool, OSError.
    """
    try:
        PoolLock.acquire(location, shared=True).close()
    except PoolBusy as busy:
        return busy
    return None


def _open_lock_file(path: Path, *, shared: bool) -> int | None:
    """The lock file, made where it is missing. None where a reader may not make or read it: the inode decides."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except FileNotFoundError:
        raise PoolNotFound(str(path.parent)) from None
    except OSError:
        if not shared:
            raise
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None


def _open_metadata(location: PoolLocation, *, shared: bool) -> int:
    path = location.metadata_path
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if shared else os.O_RDWR)
    if not shared and stat.S_ISBLK(path.stat().st_mode):
        flags |= os.O_EXCL
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise PoolBusy(str(location), 0, "") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(descriptor)
        raise NotAPool(str(path), "it is neither a file nor a block device")
    return descriptor


def _lock(descriptor: int, location: PoolLocation, note: int | None, *, shared: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        pid, host = _holder(descriptor, note)
        raise PoolBusy(str(location), pid, host) from None


def _holder(descriptor: int, note: int | None) -> tuple[int, str]:
    """Process and host that hold the lock: as the kernel says, otherwise as the note says, otherwise (0, "")."""
    noted_pid, noted_host = _read_note(note) if note is not None else (0, "")
    pid = _locking_process(descriptor)
    if pid and pid != noted_pid:
        return pid, socket.gethostname()
    return noted_pid, noted_host


def _locking_process(descriptor: int) -> int:
    """The process that /proc/locks names for a flock on this inode, 0 where it names none we can see."""
    status = os.fstat(descriptor)
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        # 1: FLOCK  ADVISORY  WRITE 4242 fd:01:131080 0 EOF    (proc(5); waiting ones have "->" in second place)
        words = line.split()
        if len(words) >= 6 and words[1] == "FLOCK" and words[5] == inode and words[4].isdigit():
            return int(words[4])
    return 0


def _write_note(descriptor: int) -> None:
    """Say who holds the lock. Always as long, so that on a full disk the next one finds its block there."""
    note = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    try:
        os.pwrite(descriptor, note.encode().ljust(NOTE_BYTES_MAX), 0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # the note is advice, and advice does not keep anybody from making room


def _read_note(descriptor: int) -> tuple[int, str]:
    try:
        note = json.loads(os.pread(descriptor, NOTE_BYTES_MAX, 0))
        return int(note["pid"]), str(note["host"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0, ""


def _close_all(descriptors: list[int]) -> None:
    for descriptor in reversed(descriptors):
        os.close(descriptor)

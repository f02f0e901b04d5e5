"""Unix sockets in a pool directory: making them with the right mode, reaching them however long the path is.

In: binding, connecting, removing what a killed server left. Out: what is spoken over them.

A socket address holds 107 bytes of path, and pool directories may lie deeper. The directory is then opened and the
socket named through it: /proc/self/fd/N/control. That works in bind and in connect alike.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ServerStartFailed

ADDRESS_BYTES_MAX = 107
BACKLOG = 128


@contextmanager
def socket_address(path: Path) -> Iterator[bytes]:
    """An address for `path` that fits, valid inside the block. Raises OSError where its directory cannot be opened."""
    plain = os.fsencode(path)
    if len(plain) <= ADDRESS_BYTES_MAX:
        yield plain
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield b"/proc/self/fd/%d/%s" % (directory, os.fsencode(path.name))
    finally:
        os.close(directory)


def connect(path: Path, timeout_seconds: float | None) -> socket.socket:
    """Connect to a Unix socket. Raises OSError (FileNotFoundError, ConnectionRefusedError: nobody listens)."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_seconds)
        with socket_address(path) as address:
            connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def listen(path: Path, mode: int) -> socket.socket:
    """Listen on a Unix socket of that mode, in place of one that nobody listens on. Raises ServerStartFailed."""
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # On Linux the inode made by bind takes the mode of the descriptor (less the umask): never open to others.
        os.fchmod(listener.fileno(), mode)
        with socket_address(path) as address:
            listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ServerStartFailed(reason=f"cannot listen on {path}: {error.strerror or error}") from error
    return listener


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ServerStartFailed(reason=f"cannot listen on {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise ServerStartFailed(reason=f"cannot listen on {path}: a file that is no socket is in the way")
    if is_listening(path):
        raise ServerStartFailed(reason=f"cannot listen on {path}: another server listens there")
    path.unlink(missing_ok=True)


def on_read_only_file_system(directory: Path) -> bool:
    """Whether no socket can be made there, whoever asks (statvfs(3), ST_RDONLY)."""
    return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)


def is_listening(path: Path) -> bool:
    """Whether somebody accepts connections on this socket."""
    try:
        connect(path, timeout_seconds=1.0).close()
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except OSError as error:
        # EAGAIN: the backlog is full, so it is there. EPROTOTYPE, EACCES: something is.
        return error.errno != errno.ENOTSOCK
    return True

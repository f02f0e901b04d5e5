"""Listening sockets: Unix, TCP, and those inherited from a service manager.

In: making, naming and removing them. Out: accepting (`server`).
"""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .constants import DEFAULT_PORT
from .errors import CannotListen

_BACKLOG = 1024
_UNIX_PATH_BYTES_MAX = 107  # sun_path less its NUL
_ACTIVATED_FIRST = 3  # SD_LISTEN_FDS_START


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket and, for a Unix socket we made, the path to remove in the end."""

    socket: socket.socket
    path: Path | None = None

    def close(self) -> None:
        """Close, and remove the path if it is still ours."""
        if self.path is not None:
            # On a file system that is read-only by now it stays: nobody listens, and the next server replaces it.
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        self.socket.close()


def unix_listener(path: Path, *, mode: int = 0o600, uid: int = -1, gid: int = -1) -> Listener:
    """Listen on a Unix socket with these permissions; a socket nobody listens on any more is replaced."""
    if len(os.fsencode(path)) > _UNIX_PATH_BYTES_MAX:
        raise CannotListen(where=str(path), why=f"socket paths are limited to {_UNIX_PATH_BYTES_MAX} bytes")
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        # Nobody can connect before listen(), so the permissions are right from the first moment.
        os.chmod(path, mode)  # noqa: PTH101
        if uid != -1 or gid != -1:
            os.chown(path, uid, gid)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise CannotListen(where=str(path), why=error.strerror or str(error)) from error
    return Listener(sock, path)


def _remove_stale(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise CannotListen(where=str(path), why="something that is not a socket is in the way")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise CannotListen(where=str(path), why=error.strerror or str(error)) from error
    raise CannotListen(where=str(path), why="another server is listening there")


def tcp_listeners(host: str, port: int = DEFAULT_PORT) -> list[Listener]:
    """Listen on all addresses of a host name (an empty one: all interfaces). Port 0 picks one for all of them."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise CannotListen(where=f"{host}:{port}", why=error.strerror or str(error)) from error
    listeners: list[Listener] = []
    for family, kind, protocol, _, address in found:
        where = (address[0], port, *address[2:])
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError:
            continue  # a family this kernel does not have
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(where)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRNOTAVAIL and len(found) > 1:
                continue
            for listener in listeners:
                listener.close()
            raise CannotListen(where=f"{host}:{port}", why=error.strerror or str(error)) from error
        listeners.append(Listener(sock))
        port = port or sock.getsockname()[1]
    if not listeners:
        raise CannotListen(where=f"{host}:{port}", why="no address could be used")
    return listeners


def adopted_socket(descriptor: int) -> tuple[socket.socket, bool]:
    """Wrap an inherited descriptor; the second value says whether it listens (else it is a connection)."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise CannotListen(where=f"descriptor {descriptor}", why=error.strerror or str(error)) from error
    sock.set_inheritable(False)
    sock.setblocking(True)
    return sock, bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def activated_descriptors(environment: Mapping[str, str], process_id: int) -> range:
    """Return the descriptors passed by systemd (LISTEN_PID, LISTEN_FDS), empty where there are none for us."""
    try:
        for_us = int(environment.get("LISTEN_PID", "")) == process_id
        count = int(environment.get("LISTEN_FDS", ""))
    except ValueError:
        return range(0)
    return range(_ACTIVATED_FIRST, _ACTIVATED_FIRST + count) if for_us and count > 0 else range(0)

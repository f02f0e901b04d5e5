"""Living under a supervisor: a pid file, systemd's readiness messages, and ending together with the parent.

In: what the world around a server is told and what it tells. Out: serving (`service.py`), the background
(`daemon.py`).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import ServerStartFailed


@contextlib.contextmanager
def pid_file(path: Path) -> Iterator[None]:
    """Have our process id in a file inside the block. Raises ServerStartFailed."""
    try:
        path.write_text(f"{os.getpid()}\n", encoding="ascii")
    except OSError as error:
        raise ServerStartFailed(reason=f"cannot write {path}: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # gone, or on a file system that is
            if path.read_text(encoding="ascii").strip() == str(os.getpid()):
                path.unlink()


def has_terminal() -> bool:
    """Whether the process has a controlling terminal; it has none any more once that has hung up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def tell_supervisor(message: str) -> None:
    """Send a state such as READY=1 to the supervisor, where there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    target = "\0" + address[1:] if address.startswith("@") else address
    # A supervisor that does not listen any more is no reason to stop serving.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(message.encode("ascii"), target)


def when_parent_ends(act: Callable[[], None]) -> None:
    """Call `act` once when the process that started us has ended. Raises ServerStartFailed where it has already."""
    parent = os.getppid()
    try:
        descriptor = os.pidfd_open(parent)
    except OSError as error:
        raise ServerStartFailed(
            reason=f"cannot watch the parent process {parent}: {error.strerror}"
        ) from error
    if os.getppid() != parent:
        os.close(descriptor)
        raise ServerStartFailed(reason="the parent process has ended already")

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        os.close(descriptor)
        act()

    threading.Thread(target=watch, name="parent", daemon=True).start()

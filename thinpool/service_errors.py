# ruff: noqa: N818 -- the names say what happened, as `NoSpace`; an Error suffix adds nothing to them
"""Errors about servers, requests, attachments and the system. See `errors.py` for the rules of all leaves."""

from __future__ import annotations

import errno
import os

from .error_root import ExitCode, ThinPoolError, leaf
from .wording import escaped, quoted, shown_path


@leaf(ExitCode.SERVER)
class PoolNotServed(ThinPoolError):
    """The command needs a server and there is none."""

    path: str

    def __str__(self) -> str:
        return f"pool {shown_path(self.path)} is not being served; start `thinpool serve {shown_path(self.path)}`"


@leaf(ExitCode.CONFLICT)
class PoolServed(ThinPoolError):
    """A second server for a served pool."""

    path: str
    pid: int

    def __str__(self) -> str:
        return f"pool {shown_path(self.path)} is being served already, by process {self.pid}"


@leaf(ExitCode.SERVER)
class ServerUnreachable(ThinPoolError):
    """The server of the pool is there but cannot be talked to."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"the server of {shown_path(self.path)} does not answer: {escaped(self.reason)}"


@leaf(ExitCode.SERVER)
class ServerStartFailed(ThinPoolError):
    """The server could not listen, or died before it was ready."""

    reason: str

    def __str__(self) -> str:
        return f"the server did not start: {escaped(self.reason)}"


@leaf(ExitCode.SERVER)
class StopFailed(ThinPoolError):
    """The server accepted a stop and still holds the pool."""

    path: str
    pid: int

    def __str__(self) -> str:
        return f"the server of {shown_path(self.path)} (process {self.pid}) did not stop in time"


@leaf(ExitCode.USAGE)
class BadRequest(ThinPoolError):
    """An operation or parameter that does not exist or has the wrong type."""

    reason: str

    def __str__(self) -> str:
        return f"bad request: {escaped(self.reason)}"


@leaf(ExitCode.FAILURE)
class RemoteFailure(ThinPoolError):
    """The server failed in a way that has no class of its own."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"the server failed: {escaped(self.message)} ({escaped(self.kind)})"


@leaf(ExitCode.FAILURE)
class SystemFailure(ThinPoolError):
    """The operating system refused something that has no class of its own."""

    path: str
    number: int
    reason: str

    def __str__(self) -> str:
        where = f"{shown_path(self.path)}: " if self.path else ""
        return f"{where}{escaped(self.reason)}"


@leaf(ExitCode.RESOURCES)
class OutOfResources(ThinPoolError):
    """The process or the machine has no memory, file descriptors or threads left; nothing is wrong with the pool."""

    path: str
    number: int
    reason: str

    def __str__(self) -> str:
        where = f"{shown_path(self.path)}: " if self.path else ""
        return f"{where}{escaped(self.reason)}; {RESOURCE_ADVICE.get(self.number, 'try again later')}"


# By errno, as errno(3) has it: the limit of the process (setrlimit(2)) or of the system that was met.
RESOURCE_ADVICE = {
    errno.EMFILE: "raise the limit of the process (`ulimit -n`)",
    errno.ENFILE: "raise the limit of the system (fs.file-max)",
    errno.ENOMEM: "give the process more memory or address space (`ulimit -v`)",
}


def lacking_resources(error: Exception, path: str) -> OutOfResources | None:
    """The leaf for an error of the system or of Python that says that something has run out; None for others."""
    if isinstance(error, MemoryError):
        return OutOfResources(path, errno.ENOMEM, os.strerror(errno.ENOMEM))
    if not isinstance(error, OSError) or error.errno not in RESOURCE_ADVICE:
        return None
    where = path if error.filename is None else str(error.filename)
    return OutOfResources(where, error.errno, os.strerror(error.errno))


@leaf(ExitCode.SERVER)
class ServerStopping(ThinPoolError):
    """The server is shutting down and takes no more operations; nothing was done."""

    path: str

    def __str__(self) -> str:
        return f"the server of {shown_path(self.path)} is stopping"


@leaf(ExitCode.FAILURE)
class AttachFailed(ThinPoolError):
    """A step of attaching or detaching failed; what had been done before it was undone."""

    name: str
    step: str
    reason: str

    def __str__(self) -> str:
        return f"cannot attach {quoted(self.name)}: {escaped(self.step)} failed: {escaped(self.reason)}"


@leaf(ExitCode.FAILURE)
class DetachFailed(ThinPoolError):
    """A step of detaching failed; the attachment stays recorded, so it can be tried again."""

    name: str
    step: str
    reason: str

    def __str__(self) -> str:
        return f"cannot detach {quoted(self.name)}: {escaped(self.step)} failed: {escaped(self.reason)}"


@leaf(ExitCode.CONFLICT)
class AlreadyAttached(ThinPoolError):
    """The device is attached on this machine."""

    name: str
    where: str

    def __str__(self) -> str:
        return f"device {quoted(self.name)} is attached already, at {shown_path(self.where)}"


@leaf(ExitCode.NOT_FOUND)
class NotAttached(ThinPoolError):
    """Nothing to detach."""

    name: str

    def __str__(self) -> str:
        return f"device {quoted(self.name)} is not attached on this machine"


@leaf(ExitCode.SERVER)
class MetadataChanged(ThinPoolError):
    """The server that held the metadata still went away before it was read."""

    path: str

    def __str__(self) -> str:
        return (
            f"the server of {shown_path(self.path)} stopped while its metadata was being read; read it again"
        )

# ruff: noqa: N818 -- the names say what happened, as `NoSpace`; an Error suffix adds nothing to them
# mypy: disable-error-code="explicit-override"
"""Every way thinpool refuses or fails, as classes with fields.

In: one leaf a situation, its exit code and its sentence; the way back from the JSON form. Out: the root and the
registry (`error_root.py`), and which exit code a foreign exception gets (`cli/report.py`).

A leaf holds fields, never a prepared sentence: the sentence is made when it is printed, and names are escaped
there (`wording.py`), so no name can break or hide a message. Fields are strings, integers or None.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .error_root import LEAVES, ExitCode, ThinPoolError, leaf
from .wording import escaped, iec, quoted, shown_path


def leaves() -> Iterator[type[ThinPoolError]]:
    """Yield every leaf class, in order of declaration."""
    yield from LEAVES.values()


def from_json(document: Any) -> ThinPoolError:
    """Rebuild an error from `ThinPoolError.to_json`.

    What is not understood (a newer server, a foreign answer) becomes `RemoteFailure` with what there was to read.
    """
    if not isinstance(document, dict):
        return RemoteFailure("unknown", str(document))
    name = str(document.get("error", "unknown"))
    given = document.get("fields")
    found = LEAVES.get(name)
    if found is not None and isinstance(given, dict):
        try:
            return found(**given)
        except TypeError:
            pass  # other fields than ours: the sentence still says it
    return RemoteFailure(name, str(document.get("message", document)))


# --- devices -----------------------------------------------------------------------------------------------------


@leaf(ExitCode.NOT_FOUND)
class NoSuchDevice(ThinPoolError):
    """No device of that name in the pool."""

    name: str
    pool: str

    def __str__(self) -> str:
        return f"no device {quoted(self.name)} in pool {shown_path(self.pool)}"


@leaf(ExitCode.CONFLICT)
class DeviceExists(ThinPoolError):
    """The name is taken."""

    name: str

    def __str__(self) -> str:
        return f"a device {quoted(self.name)} exists already; choose another name or delete it first"


@leaf(ExitCode.CONFLICT)
class DeviceInUse(ThinPoolError):
    """Clients are connected to a device that must be idle for this."""

    name: str
    connections: int

    def __str__(self) -> str:
        clients = "1 client is" if self.connections == 1 else f"{self.connections} clients are"
        return f"device {quoted(self.name)} is in use: {clients} connected; detach it first"


@leaf(ExitCode.CONFLICT)
class DeviceReadOnly(ThinPoolError):
    """The device is a read-only snapshot."""

    name: str

    def __str__(self) -> str:
        return f"device {quoted(self.name)} is read-only"


@leaf(ExitCode.USAGE)
class BadName(ThinPoolError):
    """A name outside the rules of `names.py`; `reason` completes "a device name ..."."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{quoted(self.name)} cannot name a device: {self.reason}"


@leaf(ExitCode.USAGE)
class BadSize(ThinPoolError):
    """A size that is no size, or none that fits here."""

    text: str
    reason: str

    def __str__(self) -> str:
        return f"bad size {quoted(self.text)}: {self.reason}"


# --- pools -------------------------------------------------------------------------------------------------------


@leaf(ExitCode.CONFLICT)
class PoolBusy(ThinPoolError):
    """Another process holds the pool. `pid` and `host` are 0 and "" where the holder left no note."""

    path: str
    pid: int
    host: str

    def __str__(self) -> str:
        holder = f"process {self.pid} on {escaped(self.host)}" if self.pid else "another process"
        return f"pool {shown_path(self.path)} is busy: {holder} has it open"


@leaf(ExitCode.NOT_FOUND)
class PoolNotFound(ThinPoolError):
    """Nothing is there."""

    path: str

    def __str__(self) -> str:
        return f"no pool at {shown_path(self.path)}; `thinpool init` makes one"


@leaf(ExitCode.CONFLICT)
class PoolExists(ThinPoolError):
    """`init` would overwrite something."""

    path: str

    def __str__(self) -> str:
        return f"{shown_path(self.path)} exists and is not an empty directory; nothing was changed"


@leaf(ExitCode.DAMAGED)
class NotAPool(ThinPoolError):
    """Something is there, but no pool."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{shown_path(self.path)} is not a pool: {escaped(self.reason)}"


@leaf(ExitCode.DAMAGED)
class PoolDamaged(ThinPoolError):
    """A pool whose metadata does not hold together."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"the metadata of {shown_path(self.path)} is damaged: {escaped(self.reason)}"


@leaf(ExitCode.DAMAGED)
class CatalogDamaged(ThinPoolError):
    """The catalogue of names is not readable; the devices themselves are not touched by that."""

    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"the catalogue {shown_path(self.path)} is damaged: {escaped(self.reason)}; the devices are not affected: "
            "move the file away and they appear under the names thin-ID"
        )


@leaf(ExitCode.FAILURE)
class CatalogFailed(ThinPoolError):
    """The catalogue could not be read or written, and is not damaged by that."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"the catalogue {shown_path(self.path)} cannot be used: {escaped(self.reason)}"


@leaf(ExitCode.DAMAGED)
class DataFileMissing(ThinPoolError):
    """Metadata without its data."""

    path: str

    def __str__(self) -> str:
        return f"the data file {shown_path(self.path)} is missing; nothing was changed"


@leaf(ExitCode.DAMAGED)
class DataFileTooShort(ThinPoolError):
    """The data file ends before the last block the metadata counts on."""

    path: str
    has_bytes: int
    needs_bytes: int

    def __str__(self) -> str:
        return (
            f"the data file {shown_path(self.path)} is too short: it has {self.has_bytes} bytes and the metadata "
            f"describes {self.needs_bytes}; nothing was changed"
        )


@leaf(ExitCode.NO_SPACE)
class NoSpace(ThinPoolError):
    """`what` (data, metadata, a file system) has less room than the operation needs."""

    what: str
    needed_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        return (
            f"no space for {escaped(self.what)}: {iec(self.needed_bytes)} needed, {iec(self.free_bytes)} free; "
            "delete devices or grow the pool"
        )


@leaf(ExitCode.NO_SPACE)
class MetadataSpace(ThinPoolError):
    """The metadata file is full."""

    needed_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        return (
            f"the metadata is full: {iec(self.needed_bytes)} needed, {iec(self.free_bytes)} free; delete devices or "
            "enlarge it with `thinpool grow POOL --metadata-size SIZE`"
        )


@leaf(ExitCode.CONFLICT)
class PoolReadOnly(ThinPoolError):
    """The pool was opened for reading only, or its metadata is marked as needing a check."""

    reason: str

    def __str__(self) -> str:
        return f"the pool is read-only: {escaped(self.reason)}"


@leaf(ExitCode.FAILURE)
class PoolPoisoned(ThinPoolError):
    """A commit failed; nothing more is written by this process."""

    reason: str

    def __str__(self) -> str:
        return (
            f"the pool refuses further changes after a failed commit: {escaped(self.reason)}; what was committed "
            "before is intact, stop and open the pool again"
        )


# --- service and clients -----------------------------------------------------------------------------------------


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

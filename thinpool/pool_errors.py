# ruff: noqa: N818 -- the names say what happened, as `NoSpace`; an Error suffix adds nothing to them
"""Errors about pools, their devices and their files. See `errors.py` for the rules of all leaves."""

from __future__ import annotations

from .error_root import ExitCode, ThinPoolError, leaf
from .wording import escaped, iec, quoted, shown_path


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


@leaf(ExitCode.CONFLICT)
class DeviceReceiving(ThinPoolError):
    """The device is half received: it has a name only so that it can be finished or dropped."""

    name: str

    def __str__(self) -> str:
        return (
            f"device {quoted(self.name)} is being received and not whole yet; finish it with "
            "`thinpool send --resume TOKEN`, or drop it with `thinpool receive --abort`"
        )


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


@leaf(ExitCode.USAGE)
class BadSetting(ThinPoolError):
    """No such pool setting, or no such value of it; `reason` completes "NAME cannot be TEXT: "."""

    name: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"the setting {quoted(self.name)} cannot be {quoted(self.text)}: {escaped(self.reason)}"


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


@leaf(ExitCode.FAILURE)
class OpeningFailed(ThinPoolError):
    """The disk refused something while a pool was being opened."""

    location: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{shown_path(self.location)} cannot be opened: {escaped(self.reason)}; nothing is lost by that, open it "
            "again when its disk works"
        )


@leaf(ExitCode.FAILURE)
class RecoveryFailed(ThinPoolError):
    """What a killed server had answered and not committed could not be put into the metadata; it can be tried again."""

    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"what a killed server had answered cannot be recovered from {shown_path(self.path)}: "
            f"{escaped(self.reason)}; nothing is lost yet: open the pool again when its disk works, or move that file "
            "away to open it without the writes that were never flushed"
        )


@leaf(ExitCode.FAILURE)
class RecoveryLost(ThinPoolError):
    """The data a killed server had answered for could not be flushed: part of it may be gone."""

    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"the data file {shown_path(self.path)} could not be flushed while what a killed server had answered was "
            f"recovered: {escaped(self.reason)}; writes that no client had flushed are given up, and the next opening "
            "goes on with all that were"
        )


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
class TooLittleFree(ThinPoolError):
    """A new device would come into a pool with less free than its settings ask for. `what`: data or metadata."""

    what: str
    free_bytes: int
    size_bytes: int
    floor_percent: int

    def __str__(self) -> str:
        percent = 100 * self.free_bytes / self.size_bytes if self.size_bytes else 0.0
        option = "--metadata-size" if self.what == "metadata" else "--size"
        return (
            f"too little {self.what} is free for another device: {iec(self.free_bytes)} of {iec(self.size_bytes)} "
            f"({percent:.1f} %), and min-free-{self.what} asks for {self.floor_percent} %; delete devices, enlarge the "
            f"pool with `thinpool grow POOL {option} SIZE`, or do it all the same with --force"
        )


@leaf(ExitCode.NO_SPACE)
class OvercommitExceeded(ThinPoolError):
    """The devices would promise more than the pool's overcommit limit."""

    promised_bytes: int
    asked_bytes: int
    limit_bytes: int
    data_bytes: int
    ratio: str

    def __str__(self) -> str:
        return (
            f"the devices would exceed the overcommit limit: {iec(self.promised_bytes)} are promised, "
            f"{iec(self.asked_bytes)} more asked for, and overcommit {escaped(self.ratio)} allows "
            f"{iec(self.limit_bytes)} on {iec(self.data_bytes)} of data; delete devices, enlarge the pool, raise "
            "the limit with `thinpool set POOL --overcommit RATIO`, or do it all the same with --force"
        )


@leaf(ExitCode.NO_SPACE)
class ReservationNotCovered(ThinPoolError):
    """The pool has too little free to set blocks aside for a device. `sharing`: because of a snapshot of it."""

    needed_bytes: int
    free_bytes: int  # that is promised to no other device
    promised_bytes: int  # to others
    sharing: bool

    def __str__(self) -> str:
        if self.sharing:
            what = "a snapshot shares all blocks of the device, so that its whole reservation must be set aside anew"
        else:
            what = "the reservation cannot be set aside"
        others = f" besides {self.promised_bytes} bytes reserved for others" if self.promised_bytes else ""
        return (
            f"{what}: {self.needed_bytes} bytes are needed and {self.free_bytes} bytes are free{others}; delete "
            "devices or snapshots, enlarge the pool with `thinpool grow POOL --size SIZE`, or lower a reservation with "
            "`thinpool reserve POOL DEVICE SIZE`"
        )


@leaf(ExitCode.USAGE)
class BadReservation(ThinPoolError):
    """A device cannot have this reservation."""

    name: str
    reservation_bytes: int
    reason: str

    def __str__(self) -> str:
        return (
            f"{quoted(self.name)} cannot have a reservation of {self.reservation_bytes} bytes: "
            f"{escaped(self.reason)}"
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


@leaf(ExitCode.USAGE)
class NamesUnusable(ThinPoolError):
    """A file given with --names that names nothing here."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"cannot take names from {shown_path(self.path)}: {escaped(self.reason)}"


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


@leaf(ExitCode.CONFLICT)
class MetadataInUse(ThinPoolError):
    """The kernel has a metadata device: an active LVM pool changes under any reader."""

    path: str

    def __str__(self) -> str:
        return (
            f"{shown_path(self.path)} is in use by the kernel; deactivate its pool, or reserve a metadata snapshot "
            "(`dmsetup message POOL 0 reserve_metadata_snap`) and read that with --metadata-snap"
        )


@leaf(ExitCode.CONFLICT)
class TargetInUse(ThinPoolError):
    """Something that is there already would be overwritten; `reason` completes "PATH ..."."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{shown_path(self.path)} {escaped(self.reason)}; nothing was written"


@leaf(ExitCode.USAGE)
class DumpUnusable(ThinPoolError):
    """XML that cannot be restored."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"cannot restore {shown_path(self.path)}: {escaped(self.reason)}"


@leaf(ExitCode.NOT_FOUND)
class NoSnapshotHeld(ThinPoolError):
    """--metadata-snap where the pool holds no metadata snapshot."""

    path: str

    def __str__(self) -> str:
        return f"pool {shown_path(self.path)} holds no metadata snapshot"


@leaf(ExitCode.NOT_FOUND)
class DirectoryMissing(ThinPoolError):
    """A new file was to be made in a directory that is not there."""

    path: str

    def __str__(self) -> str:
        return f"there is no directory {shown_path(self.path)}"

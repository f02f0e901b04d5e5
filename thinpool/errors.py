"""Every way thinpool refuses or fails, as classes with fields.

In: the leaves, gathered from `*_errors.py`, and the way back from
their JSON form. Out: the root and the registry (`error_root.py`), and how an exit status comes of a foreign exception
(`cli/report.py`).

A leaf holds fields, never a prepared sentence: the sentence is made when it is printed, and names are escaped
there (`wording.py`), so no name can break or hide a message. Fields are strings, integers or None.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .error_root import LEAVES, ExitCode, ThinPoolError
from .pool_errors import (
    BadName,
    BadReservation,
    BadSetting,
    BadSize,
    CatalogDamaged,
    CatalogFailed,
    DataFileMissing,
    DataFileTooShort,
    DeviceExists,
    DeviceInUse,
    DeviceReadOnly,
    DeviceReceiving,
    DirectoryMissing,
    DumpUnusable,
    MetadataInUse,
    MetadataSpace,
    NamesUnusable,
    NoSnapshotHeld,
    NoSpace,
    NoSuchDevice,
    NotAPool,
    OpeningFailed,
    OvercommitExceeded,
    PoolBusy,
    PoolDamaged,
    PoolExists,
    PoolNotFound,
    PoolPoisoned,
    PoolReadOnly,
    RecoveryFailed,
    RecoveryLost,
    ReservationNotCovered,
    TargetInUse,
    TooLittleFree,
)
from .service_errors import (
    AlreadyAttached,
    AttachFailed,
    BadRequest,
    DetachFailed,
    MetadataChanged,
    NotAttached,
    OutOfResources,
    PoolNotServed,
    PoolServed,
    RemoteFailure,
    ServerStartFailed,
    ServerStopping,
    ServerUnreachable,
    StopFailed,
    SystemFailure,
)
from .store_errors import (
    BadStoreUrl,
    BaseNotStored,
    DeviceIncomplete,
    DeviceNotFrozen,
    NoSuchStoredSnapshot,
    NotAStore,
    NotBeingPulled,
    StoreDamaged,
    StoredSnapshotExists,
    StoreExtraMissing,
    StoreFull,
    StoreKeyNeeded,
    StoreRefused,
    StoreUnreachable,
    WrongStoreKey,
)
from .transfer_errors import (
    BaseGone,
    BaseMissing,
    BaseNotFrozen,
    ContentGone,
    DeviceHeld,
    HoldLost,
    ImageExists,
    ImageFailed,
    NothingInCommon,
    NotReceiving,
    PartlyReceived,
    ResumeMismatch,
    StreamDamaged,
    StreamUnsupported,
    TargetDiverged,
    TokenInvalid,
    ToolMissing,
)

__all__ = [
    "AlreadyAttached",
    "AttachFailed",
    "BadName",
    "BadRequest",
    "BadReservation",
    "BadSetting",
    "BadSize",
    "BadStoreUrl",
    "BaseGone",
    "BaseMissing",
    "BaseNotFrozen",
    "BaseNotStored",
    "CatalogDamaged",
    "CatalogFailed",
    "ContentGone",
    "DataFileMissing",
    "DataFileTooShort",
    "DetachFailed",
    "DeviceExists",
    "DeviceHeld",
    "DeviceInUse",
    "DeviceIncomplete",
    "DeviceNotFrozen",
    "DeviceReadOnly",
    "DeviceReceiving",
    "DirectoryMissing",
    "DumpUnusable",
    "ExitCode",
    "HoldLost",
    "ImageExists",
    "ImageFailed",
    "MetadataChanged",
    "MetadataInUse",
    "MetadataSpace",
    "NamesUnusable",
    "NoSnapshotHeld",
    "NoSpace",
    "NoSuchDevice",
    "NoSuchStoredSnapshot",
    "NotAPool",
    "NotAStore",
    "NotAttached",
    "NotBeingPulled",
    "NotReceiving",
    "NothingInCommon",
    "OpeningFailed",
    "OutOfResources",
    "OvercommitExceeded",
    "PartlyReceived",
    "PoolBusy",
    "PoolDamaged",
    "PoolExists",
    "PoolNotFound",
    "PoolNotServed",
    "PoolPoisoned",
    "PoolReadOnly",
    "PoolServed",
    "RecoveryFailed",
    "RecoveryLost",
    "RemoteFailure",
    "ReservationNotCovered",
    "ResumeMismatch",
    "ServerStartFailed",
    "ServerStopping",
    "ServerUnreachable",
    "StopFailed",
    "StoreDamaged",
    "StoreExtraMissing",
    "StoreFull",
    "StoreKeyNeeded",
    "StoreRefused",
    "StoreUnreachable",
    "StoredSnapshotExists",
    "StreamDamaged",
    "StreamUnsupported",
    "SystemFailure",
    "TargetDiverged",
    "TargetInUse",
    "ThinPoolError",
    "TokenInvalid",
    "TooLittleFree",
    "ToolMissing",
    "WrongStoreKey",
    "from_json",
    "leaves",
]


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

"""Everything a command can ask of a pool, in one table, for both ways of reaching it.

In: names, parameters and JSON-able results of operations, and the translation of what the engine raises into leaves
of `ThinPoolError`, which cross the control API. Out: how a pool is reached (`pool_access.py`), HTTP (`control.py`),
and what people see (`cli/`). An operation looks the same whether it runs in the server or in the command's own process.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .errors import (
    BadRequest,
    MetadataSpace,
    NoSpace,
    PoolDamaged,
    RemoteFailure,
    SystemFailure,
    ThinPoolError,
)
from .service_errors import lacking_resources

if TYPE_CHECKING:
    from .catalog import Catalog
    from .device_diff import DiffPage
    from .lazy_devices import PullRequest
    from .metadata_readers import MetadataReaders
    from .pool_settings import PoolSettings
    from .space_usage import SpaceUse
    from .status import DeviceInfo, PoolStatus, ReclaimInfo
    from .transfers import Transfers

METADATA_BLOCK_BYTES = 4096
Result = dict[str, Any]
Parameters = Mapping[str, Any]


class OperatedPool(Protocol):
    """What operations need of a pool (`pool.Pool`, or a fake in tests)."""

    catalog: Catalog
    metadata_readers: MetadataReaders

    def create_device(
        self, name: str, size_bytes: int, *, force: bool = False, reservation_bytes: int = 0
    ) -> DeviceInfo:
        """Create an empty device."""

    def create_snapshot(
        self,
        origin: str,
        name: str,
        *,
        read_only: bool = False,
        force: bool = False,
        size_bytes: int | None = None,
    ) -> DeviceInfo:
        """Snapshot a device."""

    def delete(self, name: str) -> None:
        """Delete a device or snapshot."""

    def rename(self, old: str, new: str, *, exchange: bool = False) -> DeviceInfo:
        """Rename a device, or exchange two names."""

    def resize(self, name: str, size_bytes: int, *, shrink: bool = False) -> DeviceInfo:
        """Change the size of a device."""

    def reserve(self, name: str, reservation_bytes: int) -> DeviceInfo:
        """Set data blocks aside for a device."""

    def rollback(self, name: str, snapshot: str, *, keep: str | bool | None = None) -> DeviceInfo:
        """Give a device the content of a snapshot."""

    def grow(self, size_bytes: int | None = None, metadata_bytes: int | None = None) -> PoolStatus:
        """Grow data or metadata or both."""

    @property
    def settings(self) -> PoolSettings:
        """What holds."""

    @property
    def overrides(self) -> Mapping[str, str]:
        """What the server was told to hold whatever is set."""

    def change_settings(self, changes: Mapping[str, object]) -> PoolSettings:
        """Set pool settings, or set them back to their defaults."""

    def commit(self) -> None:
        """Make everything durable."""

    def devices(self) -> list[DeviceInfo]:
        """Describe all devices, by name."""

    def freeing(self) -> list[ReclaimInfo]:
        """What deleting the snapshots would give back."""

    def space_use(self) -> SpaceUse:
        """What the used data is used for."""

    def status(self) -> PoolStatus:
        """Describe the pool."""

    def dm_status(self) -> list[str]:
        """Describe the pool as `dmsetup status` would."""

    def begin_pull(self, request: PullRequest) -> dict[str, Any]:
        """Begin to pull a snapshot from an object store, or go on."""

    def abort_pull(self, name: str) -> None:
        """Drop a device that was not pulled to its end."""

    def pull_state(self, name: str) -> dict[str, Any]:
        """How far a pull got."""

    @property
    def transfers(self) -> Transfers:
        """Half-received devices and holds."""

    def diff(self, old: str, new: str, begin_bytes: int) -> DiffPage:
        """Compare two devices from an offset on."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: the types JSON may give it, and whether it may be left out."""

    types: tuple[type, ...]
    required: bool = True


TEXT = Parameter((str,))
SIZE = Parameter((int,))
OPTIONAL_SIZE = Parameter((int, type(None)), required=False)
FLAG = Parameter((bool,), required=False)
OBJECT = Parameter((dict,))


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. `looks_only`: it changes nothing, so it may be repeated and needs the pool only for reading."""

    run: Callable[[OperatedPool, Parameters], Result]
    parameters: Mapping[str, Parameter]
    looks_only: bool = False


def _create(pool: OperatedPool, given: Parameters) -> Result:
    force, reserved = given.get("force", False), given.get("reservation_bytes", 0)
    made = pool.create_device(given["name"], given["size_bytes"], force=force, reservation_bytes=reserved)
    return {"device": made.to_json()}


def _snapshot(pool: OperatedPool, given: Parameters) -> Result:
    read_only, force = given.get("read_only", False), given.get("force", False)
    made = pool.create_snapshot(
        given["origin"], given["name"], read_only=read_only, force=force, size_bytes=given.get("size_bytes")
    )
    return {"device": made.to_json()}


def _delete(pool: OperatedPool, given: Parameters) -> Result:
    pool.delete(given["name"])
    return {"deleted": given["name"]}


def _rename(pool: OperatedPool, given: Parameters) -> Result:
    renamed = pool.rename(given["old"], given["new"], exchange=given.get("exchange", False))
    return {"device": renamed.to_json()}


def _resize(pool: OperatedPool, given: Parameters) -> Result:
    resized = pool.resize(given["name"], given["size_bytes"], shrink=given.get("shrink", False))
    return {"device": resized.to_json()}


def _reserve(pool: OperatedPool, given: Parameters) -> Result:
    return {"device": pool.reserve(given["name"], given["reservation_bytes"]).to_json()}


def _rollback(pool: OperatedPool, given: Parameters) -> Result:
    before = pool.catalog.by_name(given["name"])
    device = pool.rollback(given["name"], given["snapshot"], keep=given.get("keep"))
    kept = pool.catalog.by_id(before.device_id) if before is not None else None
    return {"device": device.to_json(), "kept": None if kept is None else kept.name}


def _grow(pool: OperatedPool, given: Parameters) -> Result:
    size_bytes, metadata_bytes = given.get("size_bytes"), given.get("metadata_bytes")
    if size_bytes is None and metadata_bytes is None:
        raise BadRequest(reason="grow needs size_bytes or metadata_bytes")
    return {"status": pool.grow(size_bytes, metadata_bytes).to_json()}


def _set(pool: OperatedPool, given: Parameters) -> Result:
    pool.change_settings(given["settings"])
    return _get(pool, {})


def _get(pool: OperatedPool, _: Parameters) -> Result:
    settings = pool.settings.to_json()
    return {
        "settings": settings,
        "set": sorted(pool.catalog.settings().keys() & settings.keys()),
        "overridden": sorted(pool.overrides),
    }


def _status(pool: OperatedPool, _: Parameters) -> Result:
    return {"status": pool.status().to_json()}


def _reclaim(pool: OperatedPool, _: Parameters) -> Result:
    return {"snapshots": [info.to_json() for info in pool.freeing()]}


def _explain(pool: OperatedPool, _: Parameters) -> Result:
    return {"use": pool.space_use().to_json()}


def _dm_status(pool: OperatedPool, _: Parameters) -> Result:
    return {"lines": pool.dm_status()}


def _list(pool: OperatedPool, _: Parameters) -> Result:
    return {"devices": [device.to_json() for device in pool.devices()]}


def _pull(pool: OperatedPool, given: Parameters) -> Result:
    from .lazy_devices import PullRequest

    return {"pull": pool.begin_pull(PullRequest(**given))}


def _pull_abort(pool: OperatedPool, given: Parameters) -> Result:
    pool.abort_pull(given["name"])
    return {"aborted": given["name"]}


def _pull_state(pool: OperatedPool, given: Parameters) -> Result:
    return {"pull": pool.pull_state(given["name"])}


def _diff(pool: OperatedPool, given: Parameters) -> Result:
    return pool.diff(given["old"], given["new"], given.get("begin_bytes", 0)).to_json()


def _receive_abort(pool: OperatedPool, given: Parameters) -> Result:
    pool.transfers.abort(given["name"])
    return {"dropped": given["name"]}


def _commit(pool: OperatedPool, _: Parameters) -> Result:
    pool.commit()
    return {}


OPERATIONS: Mapping[str, Operation] = {
    "create": Operation(
        _create,
        {
            "name": TEXT,
            "size_bytes": SIZE,
            "force": FLAG,
            "reservation_bytes": Parameter((int,), required=False),
        },
    ),
    "snapshot": Operation(
        _snapshot,
        {"origin": TEXT, "name": TEXT, "read_only": FLAG, "force": FLAG, "size_bytes": OPTIONAL_SIZE},
    ),
    "delete": Operation(_delete, {"name": TEXT}),
    "rename": Operation(_rename, {"old": TEXT, "new": TEXT, "exchange": FLAG}),
    "resize": Operation(_resize, {"name": TEXT, "size_bytes": SIZE, "shrink": FLAG}),
    "reserve": Operation(_reserve, {"name": TEXT, "reservation_bytes": SIZE}),
    "rollback": Operation(
        _rollback,
        {"name": TEXT, "snapshot": TEXT, "keep": Parameter((str, bool, type(None)), required=False)},
    ),
    "grow": Operation(_grow, {"size_bytes": OPTIONAL_SIZE, "metadata_bytes": OPTIONAL_SIZE}),
    "receive-abort": Operation(_receive_abort, {"name": TEXT}),
    "set": Operation(_set, {"settings": OBJECT}),
    "get": Operation(_get, {}, looks_only=True),
    "commit": Operation(_commit, {}),
    "status": Operation(_status, {}, looks_only=True),
    "reclaim": Operation(_reclaim, {}, looks_only=True),
    "explain": Operation(_explain, {}, looks_only=True),
    "dm-status": Operation(_dm_status, {}, looks_only=True),
    "list": Operation(_list, {}, looks_only=True),
    "pull": Operation(
        _pull,
        {
            **dict.fromkeys(("url", "snapshot", "name"), TEXT),
            **dict.fromkeys(("lazy", "read_only"), FLAG),
            **dict.fromkeys(("key_file", "base"), Parameter((str, type(None)), required=False)),
        },
    ),
    "pull-abort": Operation(_pull_abort, {"name": TEXT}),
    "pull-state": Operation(_pull_state, {"name": TEXT}, looks_only=True),
    "diff": Operation(
        _diff, {"old": TEXT, "new": TEXT, "begin_bytes": Parameter((int,), required=False)}, looks_only=True
    ),
}


def check_request(name: str, parameters: object) -> Operation:
    """Return the operation, once its parameters have the right names and types. Raises BadRequest."""
    operation = OPERATIONS.get(name)
    if operation is None:
        raise BadRequest(reason=f"there is no operation {name!r}; there are {', '.join(OPERATIONS)}")
    if not isinstance(parameters, Mapping):
        raise BadRequest(reason="parameters are a JSON object")
    for key in parameters:
        if key not in operation.parameters:
            raise BadRequest(reason=f"{name} has no parameter {key!r}")
    for key, parameter in operation.parameters.items():
        if key not in parameters:
            if parameter.required:
                raise BadRequest(reason=f"{name} needs the parameter {key!r}")
        elif type(parameters[key]) not in parameter.types:  # exact: True is no size
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in parameter.types)
            raise BadRequest(reason=f"{key!r} of {name} is {wanted}")
    return operation


@contextmanager
def translating(pool_path: str) -> Iterator[None]:
    """Inside, everything the engine and the system raise becomes a leaf of ThinPoolError (`as_leaf`)."""
    try:
        yield
    except Exception as error:
        translated = as_leaf(error, pool_path)
        if translated is error:
            raise
        raise translated from error


def execute(pool: OperatedPool, pool_path: str, name: str, parameters: Parameters) -> Result:
    """Run one operation. Raises leaves of ThinPoolError, also for what the engine and the system raise."""
    operation = check_request(name, parameters)
    with translating(pool_path):
        return operation.run(pool, parameters)


def as_leaf(error: Exception, pool_path: str) -> Exception:
    """Return `error` as a leaf of ThinPoolError. Mistakes of the program (TypeError and such) stay what they are."""
    if isinstance(error, ThinPoolError):
        return error
    lacking = lacking_resources(error, pool_path)
    if lacking is not None:
        return lacking
    if isinstance(error, OSError):
        return _os_leaf(error, pool_path)
    # Imported here: the client side of a served pool must not load the metadata package and numpy.
    from metadata import errors as metadata_errors

    if not isinstance(error, metadata_errors.MetadataError):
        return error
    if isinstance(error, metadata_errors.MetadataFull):
        available = max(error.free_blocks - error.reserved_blocks, 0)
        return MetadataSpace(error.needed_blocks * METADATA_BLOCK_BYTES, available * METADATA_BLOCK_BYTES)
    if isinstance(error, _damage_classes()):
        return PoolDamaged(pool_path, str(error))
    return RemoteFailure(type(error).__name__, str(error))


def _damage_classes() -> tuple[type[Exception], ...]:
    from metadata import errors as found

    return (
        found.BlockDamaged,
        found.CountDamaged,
        found.DeviceIncomplete,
        found.MetadataTooShort,
        found.NotPoolMetadata,
        found.ShortRead,
    )


def _os_leaf(error: OSError, pool_path: str) -> ThinPoolError:
    path = str(error.filename) if error.filename is not None else pool_path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(what=f"{path} on its file system", needed_bytes=METADATA_BLOCK_BYTES, free_bytes=0)
    return SystemFailure(path, error.errno or 0, error.strerror or str(error))

"""What a pool and its devices look like from outside, as plain data with a JSON form."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One thin device. `mapped = exclusive + shared`; deleting it frees `exclusive_bytes`.

    The three are None where they cannot be read: of a damaged device, and in what a change returns, which is done then
    all the same.
    `content_id` is None where the content may have changed since it had one (see `content_identity.py`).
    `remote_bytes` is what still has to be fetched from an object store, at most (`lazy_devices.py`).
    """

    name: str
    device_id: int
    size_bytes: int
    mapped_bytes: int | None
    exclusive_bytes: int | None
    shared_bytes: int | None
    origin: str | None
    created: str  # ISO 8601, UTC
    read_only: bool
    open_count: int
    uuid: str
    content_id: str | None
    receiving: bool
    resume_token: str | None = None
    remote_bytes: int = 0
    reservation_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object, sizes as integers."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ReclaimInfo:
    """What deleting one snapshot would free: alone, and together with all older ones (`together_bytes`)."""

    name: str
    created: str  # ISO 8601, UTC
    origin: str | None  # None where that is gone
    read_only: bool
    open_count: int
    alone_bytes: int
    together_bytes: int

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object, sizes as integers."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool. `*_free_bytes` can be allocated now or after the next commit.

    `mode` is one of rw, out_of_data_space, out_of_metadata_space, read_only, fail (dm-thin's modes).
    `file_bytes` is what the file system holds for the data file. `refusing` says that writes which need a new block
    fail at once when there is none, by the policy `when_full` or because they have waited `queue_timeout_seconds`.
    Rates are measured by a server (`watched`) and None until it has seen enough; `*_full_in_seconds` is None where the
    rate is unknown or nothing grows. `data_reserved_bytes` of what is free can be taken only by the devices that have a
    reservation (`reservations.py`).
    """

    location: str
    mode: str
    needs_check: bool
    block_bytes: int
    data_bytes: int
    data_used_bytes: int
    data_free_bytes: int
    data_reclaiming_bytes: int
    file_bytes: int
    metadata_bytes: int
    metadata_used_bytes: int
    metadata_free_bytes: int
    transaction_id: int
    time: int
    held_root: int
    devices: int
    virtual_bytes: int
    failure: str | None
    when_full: str
    queue_timeout_seconds: int
    refusing: bool
    waiting_connections: int
    watched: bool
    data_low_water_bytes: int | None
    metadata_low_water_bytes: int | None
    autogrow_limit_bytes: int
    metadata_autogrow_limit_bytes: int
    data_rate_bytes_per_second: float | None
    data_full_in_seconds: float | None
    metadata_rate_bytes_per_second: float | None
    metadata_full_in_seconds: float | None
    data_reserved_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object, sizes as integers."""
        return asdict(self)

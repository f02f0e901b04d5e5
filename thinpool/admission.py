"""Whether a pool takes on more devices: floors of free space, and a limit to what it promises.

In: the rules, over plain figures. Out: where the figures come from and who may overrule (`pool.py`).
Writes to devices that exist are not asked: they have the pool's own reserve and policy (`engine`, `full_pool`).
"""

from __future__ import annotations

from .errors import OvercommitExceeded, TooLittleFree
from .pool_settings import PoolSettings
from .status import PoolStatus


def require_space(settings: PoolSettings, status: PoolStatus) -> None:
    """Raise TooLittleFree where less of the data or the metadata is free than the settings ask for."""
    for what, floor in (("data", settings.min_free_data), ("metadata", settings.min_free_metadata)):
        size_bytes, free_bytes = (
            (status.data_bytes, status.data_free_bytes)
            if what == "data"
            else (status.metadata_bytes, status.metadata_free_bytes)
        )
        if floor and free_bytes * 100 < size_bytes * floor:
            raise TooLittleFree(what, free_bytes, size_bytes, floor)


def require_promise(settings: PoolSettings, status: PoolStatus, more_bytes: int) -> None:
    """Raise OvercommitExceeded where the devices, with `more_bytes` more, would be larger than the settings allow."""
    limit_bytes = round(status.data_bytes * settings.overcommit)
    if settings.overcommit and status.virtual_bytes + more_bytes > limit_bytes:
        raise OvercommitExceeded(
            status.virtual_bytes, more_bytes, limit_bytes, status.data_bytes, f"{settings.overcommit:g}"
        )

"""Sizes of devices: which a device may have, and what a row of the catalogue is with another one.

In: limits, the row. Out: dropping or clearing what lies past an end (`pool.py`).
"""

from __future__ import annotations

from dataclasses import replace

from .catalog_rows import CatalogEntry
from .content_identity import new_identity
from .errors import BadSize

# The block map of a device is address space; this is what every 64-bit Linux gives.
DEVICE_BYTES_MAX = 1 << 54


def resized(entry: CatalogEntry, size_bytes: int) -> CatalogEntry:
    """The row with another size; what goes with the content goes with it."""
    if size_bytes == entry.size_bytes:
        return entry
    reserved = min(entry.reservation_bytes, size_bytes)
    changed = replace(entry, size_bytes=size_bytes, reservation_bytes=reserved)
    return replace(changed, content_id=new_identity() if entry.read_only else None)


def check_device_size(size_bytes: int) -> None:
    """Raise BadSize for what no device can be."""
    if size_bytes <= 0:
        raise BadSize(str(size_bytes), "a device has at least one byte")
    if size_bytes > DEVICE_BYTES_MAX:
        raise BadSize(str(size_bytes), f"devices go up to {DEVICE_BYTES_MAX} bytes (16 PiB)")

"""Sizes of devices: growing, shrinking, and what must not come back when a shortened device grows again.

In: the limits, cutting off what lies beyond a new end in one step with the size, clearing the rest of a last block.
Out: sizes of the pool's own files (`pool.py`, `growth.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .admission import require_promise
from .catalog import CatalogEntry, Put
from .content_identity import new_identity
from .errors import BadSize, DeviceInUse

if TYPE_CHECKING:
    from .pool import Pool

# The block map of a device is address space; this is what every 64-bit Linux gives.
DEVICE_BYTES_MAX = 1 << 54


class DeviceSizes:
    """Changes sizes of the devices of one pool; its `transaction` is held."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def resize(self, entry: CatalogEntry, size_bytes: int, *, shrink: bool) -> None:
        """Change the size of a device that is nobody's but the user's. Raises BadSize, DeviceInUse."""
        check_device_size(size_bytes)
        self._pool.lazy.require_whole(entry)
        if size_bytes < entry.size_bytes:
            if not shrink:
                raise BadSize(
                    str(size_bytes),
                    f"is less than the present {entry.size_bytes} bytes; shrinking needs --shrink",
                )
            self._pool.require_idle(entry)
        else:
            require_promise(self._pool.settings, self._pool.status(), size_bytes - entry.size_bytes)
        self.set_size(entry, size_bytes)

    def prepare_longer_copy(self, source: CatalogEntry, size_bytes: int) -> None:
        """Before a device is snapshotted with a larger size than its own. Raises BadSize, DeviceIncomplete.

        What its last block holds past its end would be seen in the snapshot.
        """
        if size_bytes == source.size_bytes:
            return
        check_device_size(size_bytes)
        if size_bytes < source.size_bytes:
            reason = f"is less than the {source.size_bytes} bytes of {source.name!r}; snapshot it, then resize --shrink"
            raise BadSize(str(size_bytes), reason)
        self._pool.lazy.require_whole(source)
        self._clear_past_end(source)

    def set_size(self, entry: CatalogEntry, size_bytes: int) -> None:
        """Change a device's size, whoever it belongs to; one that gets shorter is idle."""
        if size_bytes < entry.size_bytes:
            self._cut(entry, size_bytes)
        else:
            self._lengthen(entry, size_bytes)
        device = self._pool.engine.devices.get(entry.device_id)
        if device is not None and not device.sessions:
            device.apply_pending()
            self._pool.engine.devices.pop(entry.device_id, None)

    def _cut(self, entry: CatalogEntry, size_bytes: int) -> None:
        # What the last block holds past the new end stays: zeroing it now would not be one step with the new size.
        # `_lengthen` clears it before anybody can see it again.
        end = -(-size_bytes // self._pool.block_bytes)
        shorter = _resized(entry, size_bytes)
        # In a transaction of its own there is always room for the removal.
        self._pool.engine.commit()
        with self._pool.changes.step([Put(shorter)]):
            last = max(end, -(-entry.size_bytes // self._pool.block_bytes))
            self._pool.device(entry).unmap(end, last, with_the_step=True)
        if entry.reservation_bytes:
            self._pool.reserved.cut(shorter)

    def _lengthen(self, entry: CatalogEntry, size_bytes: int) -> None:
        self._clear_past_end(entry)
        device = self._pool.engine.devices.get(entry.device_id)
        if device is not None and device.sessions and not device.extend(size_bytes):
            raise DeviceInUse(entry.name, len(device.sessions))
        try:
            self._pool.catalog.apply([Put(_resized(entry, size_bytes))])
        except BaseException:
            if device is not None and device.sessions:
                device.extend(entry.size_bytes)  # back to what the row says; the map may stay larger
            raise

    def _clear_past_end(self, entry: CatalogEntry) -> None:
        """Zeros, durably, between the end of a device and the end of its last block."""
        tail = -entry.size_bytes % self._pool.block_bytes
        if not tail:
            return
        session = self._pool.device(entry).open()
        try:
            if session.read_bytes(entry.size_bytes, tail).count(0) != tail:
                session.zero(entry.size_bytes, tail, keep_allocated=False, fast_only=False)
        finally:
            session.close()
        # Also when it read zeros: they may be so only in this transaction.
        self._pool.engine.commit()


def _resized(entry: CatalogEntry, size_bytes: int) -> CatalogEntry:
    if size_bytes == entry.size_bytes:
        return entry
    reserved = min(entry.reservation_bytes, size_bytes)
    changed = replace(entry, size_bytes=size_bytes, reservation_bytes=reserved)
    return replace(changed, content_id=new_identity() if entry.read_only else None)


def check_device_size(size_bytes: int) -> None:
    """Raise BadSize for a size that no device can have."""
    if size_bytes <= 0:
        raise BadSize(str(size_bytes), "a device has at least one byte")
    if size_bytes > DEVICE_BYTES_MAX:
        raise BadSize(str(size_bytes), f"devices go up to {DEVICE_BYTES_MAX} bytes (16 PiB)")

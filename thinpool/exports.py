"""Devices as NBD exports: every device under its name, snapshots read-only where they were made so."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .catalog import CatalogEntry
from .error_root import ThinPoolError
from .session import Session

if TYPE_CHECKING:
    from .pool import Pool

# What clients are told to prefer. Larger values make some guests choose odd topologies (docs/nbd.md).
PREFERRED_BLOCK_BYTES_MAX = 1 << 16


class DeviceExport:
    """One device as `nbd.device.Export`. Nothing of the device is opened before `open`."""

    def __init__(self, pool: Pool, entry: CatalogEntry) -> None:
        self._pool = pool
        self._entry = entry
        self.name = entry.name
        self.size_bytes = entry.size_bytes
        self.read_only = entry.read_only or not pool.writable
        self.preferred_block_bytes = min(pool.block_bytes & -pool.block_bytes, PREFERRED_BLOCK_BYTES_MAX)

    @property
    def description(self) -> str:
        """One line for listings."""
        if self._entry.origin is None:
            return "thin device"
        kind = "read-only snapshot" if self._entry.read_only else "snapshot"
        return f"{kind} of {self._entry.origin}"

    def dirty_contexts(self) -> Sequence[str]:
        """Snapshots this device can be compared with: its relatives, newest first."""
        return list(self._pool.relatives(self._entry))

    def open(self) -> Session:
        """A session on the device that has this name now. Raises OSError(ESHUTDOWN) where it changed meanwhile."""
        try:
            return self._pool.open_session(self._entry)
        except ThinPoolError as error:
            raise OSError(errno.ESHUTDOWN, f"{error} ({os.strerror(errno.ESHUTDOWN)})") from error


class PoolExports:
    """All devices of a pool as `nbd.device.ExportDirectory`.

    The empty name means `default`, or the only device where there is exactly one.
    """

    def __init__(self, pool: Pool, default: str | None = None) -> None:
        self._pool = pool
        self._default = default

    def listing(self) -> Iterator[tuple[str, str]]:
        """(name, description) of every device, by name."""
        whole = [entry for entry in self._pool.catalog.entries() if entry.receiving is None]
        for entry in sorted(whole, key=lambda entry: entry.name):
            yield entry.name, DeviceExport(self._pool, entry).description

    def find(self, name: str) -> DeviceExport | None:
        """The export of a name, None where there is no such device."""
        if not name:
            entries = [entry for entry in self._pool.catalog.entries() if entry.receiving is None]
            name = self._default or (entries[0].name if len(entries) == 1 else "")
        entry = self._pool.catalog.by_name(name) if name else None
        return None if entry is None or entry.receiving is not None else DeviceExport(self._pool, entry)

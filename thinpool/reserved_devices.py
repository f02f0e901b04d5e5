"""Reservations of named devices: which a device may have, and that the catalogue and the engine agree on them.

In: granting, changing and taking away a reservation, durably. Out: what it does and when it is covered
(`reservations.py`), changes of names and metadata in one step (`pool.py`).

The order makes it safe to be killed in between: what is promised more is set aside before the catalogue says so, what
is promised less is let go after. So the catalogue never tells of more than was kept free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from .catalog import CatalogEntry, Put
from .errors import BadReservation

if TYPE_CHECKING:
    from .pool import Pool


class ReservedDevices:
    """The reservations of one pool. `transaction` is held by all callers."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._engine = pool.engine
        for entry in pool.catalog.entries():
            if entry.reservation_bytes:
                self._engine.reservations.load(entry.device_id, self._blocks(entry))

    def _blocks(self, entry: CatalogEntry) -> int:
        return -(-entry.reservation_bytes // self._pool.block_bytes)

    def change(self, entry: CatalogEntry, reservation_bytes: int) -> None:
        """Set aside so many bytes for a device, 0 for none. Raises BadReservation, ReservationNotCovered."""
        changed = replace(entry, reservation_bytes=reservation_bytes)
        self._check(changed)
        reservations = self._engine.reservations
        if reservation_bytes <= entry.reservation_bytes:
            self._pool.catalog.apply([Put(changed)])
            reservations.reduce(entry.device_id, self._blocks(changed))
            return
        reservations.grant(entry.device_id, self._blocks(changed))
        try:
            self._pool.catalog.apply([Put(changed)])
        except BaseException:
            reservations.reduce(entry.device_id, self._blocks(entry))
            raise

    @contextmanager
    def of_new(self, entry: CatalogEntry) -> Iterator[None]:
        """Around creating a device: its reservation, taken back where that fails. Raises as `change`."""
        if not entry.reservation_bytes:
            yield
            return
        self._check(entry)
        self._engine.reservations.grant(entry.device_id, self._blocks(entry))
        try:
            yield
        except BaseException:
            self._engine.reservations.drop(entry.device_id)
            raise

    def moving(
        self, old: CatalogEntry, new: CatalogEntry, *, old_is_deleted: bool
    ) -> AbstractContextManager[None]:
        """Around a rollback, which makes a new device under the name. Raises ReservationNotCovered."""
        return self._engine.reservations.moving(
            old.device_id, new.device_id, self._blocks(new), checked=not old_is_deleted
        )

    def cut(self, entry: CatalogEntry) -> None:
        """After a device has become shorter: its reservation is not longer than it."""
        self._engine.reservations.reduce(entry.device_id, self._blocks(entry))

    def _check(self, entry: CatalogEntry) -> None:
        wanted = entry.reservation_bytes
        if not self._pool.location.has_catalog:
            raise BadReservation(entry.name, wanted, "a pool of two bare paths keeps no reservations")
        if wanted < 0:
            raise BadReservation(entry.name, wanted, "a reservation is a size in bytes, or none")
        if wanted > entry.size_bytes:
            raise BadReservation(
                entry.name, wanted, f"it is more than the size of the device, {entry.size_bytes} bytes"
            )
        if wanted and entry.read_only:
            raise BadReservation(entry.name, wanted, "nobody may write to the device, so it needs no blocks")

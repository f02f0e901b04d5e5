"""Changes of names and metadata in one step, though the two live in two files.

In: the order in which both are written, what a failure in between leaves, rows that follow from others. Out: what is
changed (`pool.py`, `rollback.py`, `transfers.py`), how rows are kept (`catalog.py`).

The intended rows are made durable first, stamped with the next transaction id of the pool; the metadata is committed
with that id; then the rows are promoted. See `pool.py` for why a kill between any two of these is harmless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from .catalog import Catalog, Drop, Put
from .catalog_rows import device_id_of
from .engine import Engine


class NamedChanges:
    """What changes a catalogue together with the metadata. `own_id`: the pool's transaction id is ours to move."""

    def __init__(self, engine: Engine, catalog: Catalog, *, own_id: bool) -> None:
        self._engine = engine
        self._catalog = catalog
        self._own_id = own_id

    @contextmanager
    def step(self, changes: Sequence[Put | Drop]) -> Iterator[None]:
        """One atomic change of catalogue and metadata; the body changes the metadata in memory."""
        with self._engine.transaction:
            self._engine.require_writable()
            own_id = self._own_id
            number = self._engine.metadata.transaction_id + (1 if own_id else 0)
            self._catalog.stage(number, changes)
            try:
                yield
                if own_id:
                    with self._engine.tree:
                        self._engine.metadata.set_transaction_id(number)
            except Exception:
                if self._engine.failure is None:
                    self._catalog.discard_staged()
                raise
            except BaseException:
                # Interrupted: closing the pool must not commit the metadata without the names.
                self._engine.abandon()
                raise
            try:
                self._engine.commit()
            except BaseException:
                if self._engine.failed_commit_counts:
                    self._follow(changes)
                raise
            try:
                self._catalog.promote(number)
            except Exception as error:
                # The step is done and durable: the next to open the pool promotes it.
                self._engine.give_up(error)
                self._follow(changes)
                raise

    def _follow(self, changes: Sequence[Put | Drop]) -> None:
        """Know the names that belong to the metadata, where the pool gave up before the catalogue could."""
        self._catalog.assume(changes)
        for change in changes:
            device = self._engine.devices.get(device_id_of(change))
            if device is not None and not device.sessions:
                self._engine.devices.pop(
                    device.device_id
                )  # all of it was in that commit; its size may be another

    def reparented(self, origin: str, new_origin: str | None) -> list[Put | Drop]:
        """Rows of the snapshots of `origin`, which is called `new_origin` from now on, or is gone."""
        entries = self._catalog.entries()
        return [Put(replace(entry, origin=new_origin)) for entry in entries if entry.origin == origin]

    def exchanged(self, one: str, other: str) -> list[Put | Drop]:
        """Rows in which two devices have each other's names, also where a row names one of them as its origin."""
        names: dict[str | None, str] = {one: other, other: one}
        return [
            Put(
                replace(
                    entry,
                    name=names.get(entry.name, entry.name),
                    origin=names.get(entry.origin, entry.origin),
                )
            )
            for entry in self._catalog.entries()
            if entry.name in names or entry.origin in names
        ]

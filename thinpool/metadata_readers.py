"""Readers of the metadata of a served pool: they hold a metadata snapshot, and it goes when the last of them does.

In: taking and releasing the snapshot on behalf of other processes. Out: how a reader is known to live (`control.py`: by
its connection), reading through it (`metadata_view.py`).

A metadata snapshot that was there before is left alone: readers read that one, and it stays. The catalogue notes that
one is about to be taken for readers, so that the next to open the pool after a crash releases it, and only such a one.
"""

from __future__ import annotations

import logging
from typing import Any

from metadata import MetadataError, MetadataFull

from .catalog import Catalog
from .engine import Engine
from .errors import ThinPoolError

NOTE = "metadata-snapshot-for-readers"

log = logging.getLogger("thinpool")


class MetadataReaders:
    """Counts the readers of one pool. Thread-safe, under the engine's transaction lock."""

    def __init__(self, engine: Engine, catalog: Catalog) -> None:
        self._engine = engine
        self._catalog = catalog
        self._readers = 0
        self._ours = False

    def enter(self) -> dict[str, Any]:
        """One reader more; how it should read.

        `held_root`: block of the metadata snapshot, 0 where nothing changes in this pool so that none is needed.
        `fresh`: it was taken for this reader, of the present state. Raises MetadataFull, PoolPoisoned and what a
        commit raises.
        """
        engine = self._engine
        with engine.transaction:
            held = engine.metadata.held_root
            fresh = not held and engine.writable and engine.failure is None
            if fresh:
                held = self._reserve()
                self._ours = True
            self._readers += 1
            return {"held_root": held, "fresh": fresh}

    def release_left_over(self) -> None:
        """After opening for writing: release what a server that was killed held for readers. Raises as `enter`."""
        if self._catalog.setting(NOTE) is None:
            return
        if self._engine.metadata.held_root:
            log.warning("a metadata snapshot that readers of a killed server needed is released")
            self._release()
        self._catalog.set_setting(NOTE, None)

    def _release(self) -> None:
        engine = self._engine
        with engine.transaction:
            with engine.changing_tree():
                engine.metadata.release_metadata_snapshot()
            engine.commit()

    def _reserve(self) -> int:
        self._catalog.set_setting(NOTE, "1")  # durable before the snapshot can be
        refusals: list[MetadataFull] = []

        def reserve() -> None:
            # After the mappings of this commit were collected, so that the snapshot is exactly the commit.
            try:
                self._engine.metadata.reserve_metadata_snapshot()
            except MetadataFull as refusal:  # no reason to give the pool up
                refusals.append(refusal)

        self._engine.commit(reserve)
        if refusals:
            raise refusals[0]
        return self._engine.metadata.held_root

    def leave(self) -> None:
        """One reader less; the last one's going releases what was taken for them. Never raises."""
        engine = self._engine
        with engine.transaction:
            self._readers -= 1
            if self._readers or not self._ours:
                return
            self._ours = False
            if engine.failure is not None:
                return  # nothing is written any more; the next to open the pool finds the snapshot there
            try:
                self._release()
                self._catalog.set_setting(NOTE, None)
            except (OSError, MetadataError, ThinPoolError) as error:
                log.error("the metadata snapshot of a reader could not be released: %s", error)  # noqa: TRY400

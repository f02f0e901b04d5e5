"""Putting what a killed process had answered for back into the metadata, before anything else happens to the pool.

In: entries of the journal, in order, and the metadata they belong to. Out: which entries count (`mapping_journal.py`).

Why this is safe. A data block that an entry maps was free in the committed state when it was handed out, and is so
still: nobody has committed since. Entries that do not fit the metadata are refused all together, before any is
applied. The data is flushed before the commit that names it, as before every commit, so a power cut during the
replay leaves the pool without the entries or with them. A second kill before that commit leaves the journal as it
was; one after it leaves entries whose base is no longer the superblock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from metadata import MetadataFull, PoolMetadata

from .mapping_journal import Dropped, Entry, Mapped


class EntriesUnfitError(Exception):
    """An entry contradicts the metadata. Nothing was changed."""

    def __init__(self, entry: Entry, reason: str) -> None:
        super().__init__(f"{entry}: {reason}")
        self.entry = entry


def replay(metadata: PoolMetadata, entries: Sequence[Entry], make_room: Callable[[], object]) -> None:
    """Apply entries to the metadata in memory; `make_room` commits, where one transaction is too small.

    Raises EntriesUnfitError, MetadataError, OSError.
    """
    fit = _fitting(metadata, entries)
    for (device_id, kind), run in groupby(fit, key=lambda entry: (entry.device_id, type(entry))):
        if kind is Mapped:
            _insert(
                metadata,
                device_id,
                {e.thin_block: e.data_block for e in run if isinstance(e, Mapped)},
                make_room,
            )
            continue
        for entry in run:
            if isinstance(entry, Dropped):
                begin, end = entry.begin, entry.end
                _twice(lambda: metadata.remove(device_id, begin, end), make_room)  # noqa: B023 -- called at once


def _insert(
    metadata: PoolMetadata, device_id: int, mapped: dict[int, int], make_room: Callable[[], object]
) -> None:
    keys = np.array(sorted(mapped), dtype=np.uint64)
    blocks = np.array([mapped[key] for key in sorted(mapped)], dtype=np.uint64)
    # The pool's time of now: a snapshot of the device after these writes would have been committed.
    values = blocks << np.uint64(24) | np.uint64(metadata.time)
    _twice(lambda: metadata.insert(device_id, keys, values), make_room)


def _twice(change: Callable[[], object], make_room: Callable[[], object]) -> None:
    try:
        change()
    except MetadataFull:
        make_room()
        change()


def _fitting(metadata: PoolMetadata, entries: Sequence[Entry]) -> list[Entry]:
    """The entries without those that are in the metadata already. Raises EntriesUnfitError."""
    devices = {record.device_id for record in metadata.devices()}
    fitting: list[Entry] = []
    taken: set[int] = set()
    for entry in entries:
        if entry.device_id not in devices:
            raise EntriesUnfitError(entry, "there is no such device")
        if isinstance(entry, Mapped):
            block = entry.data_block
            if block in taken or block >= metadata.data_blocks:
                raise EntriesUnfitError(entry, "the data block is named twice, or outside the pool")
            taken.add(block)
            if metadata.data_counts(block, 1)[0]:
                present = metadata.lookup(entry.device_id, entry.thin_block)
                if present is None or present >> 24 != block:
                    raise EntriesUnfitError(entry, "the data block is in use")
                continue
        fitting.append(entry)
    return fitting

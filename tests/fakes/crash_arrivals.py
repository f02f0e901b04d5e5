"""Devices that have not arrived whole, after a cut: what of them is here, what is still in the store, what they say.

In: the checks that only such devices need. Out: names, sizes and contents of all devices (`crash_check`).
"""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from bitarray import bitarray

from tests.fakes.crash_oracle import DeviceModel, Stage
from tests.fakes.disk_history import Contents, Image
from thinpool.catalog import CatalogEntry
from thinpool.errors import PoolDamaged
from thinpool.lazy_devices import DIRECTORY
from thinpool.pool import Pool
from thinpool.receiving_state import ReceivingState
from thinpool.remote_blocks import TAG, RemoteBlocks, is_lazy

if TYPE_CHECKING:
    from tests.fakes.simulated_disk import SimulatedDisk
    from tests.fakes.travelling_snapshots import TravellingSnapshots

BLOCK_SECTORS = 128


class Arrivals:
    """What the pool should know of snapshots that travelled here."""

    def __init__(self, travelling: TravellingSnapshots | None) -> None:
        self._travelling = travelling

    def lay_remote(self, entry: CatalogEntry, image: Image, actual: np.ndarray) -> str | None:
        """Put what is still in the store into `actual`, shape (blocks, sectors of a block); or what is wrong."""
        assert self._travelling is not None
        path = f"/{DIRECTORY}/{entry.tags[TAG]}"
        content = image.small.get(path)
        if content is None:
            return f"the list of the remote blocks of {entry.name} is gone"
        try:
            remote = RemoteBlocks.decode(Path(path), content.to_bytes())
        except PoolDamaged as error:
            return f"the list of the remote blocks of {entry.name} is damaged: {error}"
        if len(remote.bits) != len(actual):
            return f"the list of {entry.name} has {len(remote.bits)} blocks"
        if remote.origin.root not in image.store:
            return f"the store has let go of what {entry.name} needs, {remote.origin.root}"
        day = self._travelling.by_content_id[remote.origin.content_id]
        whole = np.zeros(actual.size, np.int32)
        whole[: len(day.contents)] = day.contents
        blocks = list(remote.bits.search(bitarray("1")))
        actual[blocks] = whole.reshape(actual.shape)[blocks]
        return None

    def identity_problem(self, entry: CatalogEntry, shown: np.ndarray) -> str | None:
        """A whole device that says what it holds must hold just that: increments are laid on top of it."""
        if self._travelling is None or entry.receiving is not None or entry.content_id is None:
            return None
        day = self._travelling.by_content_id.get(entry.content_id)
        if day is None or np.array_equal(day.contents, shown):
            return None
        return f"{entry.name} says that it holds {day.name}, and does not"

    def files_problem(self, entries: list[CatalogEntry], disk: SimulatedDisk) -> str | None:
        """After opening there is one list for each device that needs one, and nothing else."""
        found = set(disk.small.history.names_in(f"{disk.small.root}/{DIRECTORY}") or ())
        wanted = {entry.tags[TAG] for entry in entries if is_lazy(entry)}
        return (
            None if found == wanted else f"lists of remote blocks: {sorted(found)}, wanted {sorted(wanted)}"
        )


def half_problem(entry: CatalogEntry, model: DeviceModel) -> str | None:
    """What is wrong with how far a device says that it is."""
    if is_lazy(entry) != model.remote:
        return f"{entry.name} is {'lazy' if is_lazy(entry) else 'all here'}, promised the other"
    half = model.half
    if (entry.receiving is None) != (half is None):
        return f"{entry.name} is {'whole' if half else 'half'}, promised the other"
    if half is None:
        return None
    assert entry.receiving is not None
    if not half.streamed:
        told = json.loads(entry.receiving)
        return None if told["content_id"] == half.content_id else f"{entry.name} is receiving {told}"
    state = ReceivingState.from_text(entry.receiving)
    found = state.target, state.content_id, state.base_content_id, state.resumable, state.position_bytes
    promised = half.target, half.content_id, half.base_content_id, half.resumable, half.position_bytes
    return None if found == promised else f"{entry.name} is receiving {found}, promised {promised}"


def read_hidden(pool: Pool, entry: CatalogEntry) -> bytes:
    """The content of a device that is no export yet. What is missing of it is fetched."""
    session = pool.device(entry).open(pool.lazy.of(entry))
    try:
        return bytes(session.read_bytes(0, entry.size_bytes))
    finally:
        session.close()


def read_whole(pool: Pool, entry: CatalogEntry, contents: Contents) -> np.ndarray | None:
    """The sectors of a device as a reader sees them; None where there is no space to fetch what is missing."""
    try:
        if entry.receiving is not None:
            return contents.intern(read_hidden(pool, entry))
        session = pool.open_session(entry)
        try:
            return contents.intern(bytes(session.read_bytes(0, entry.size_bytes)))
        finally:
            session.close()
    except OSError as error:
        if error.errno == errno.EIO and is_lazy(entry) and not pool.engine._has_space():
            return None
        raise


def as_read(model: DeviceModel, actual: np.ndarray) -> DeviceModel:
    """The device after a cut, once it was read: what it shows is settled, unless a stream may still change it."""
    seen = replace(model, base=actual, layers=[])
    if model.half is None or not model.half.streamed:
        return seen
    layers = model.copy().layers
    return replace(seen, layers=layers)


def unread(model: DeviceModel) -> DeviceModel:
    """The device after a cut, where nothing is known but what was promised."""
    left = model.copy()
    for layer in left.layers:
        layer.stage = Stage.FAILED
    return left

"""A device whose content is partly still in an object store: fetching blocks, and never over newer content.

In: on-demand and background fetching of blocks, checkpoints. Out: the bitmap and its order on disk
(`remote_blocks.py`), what a connection sees (`lazy_session.py`), starting and ending (`lazy_devices.py`).

A fetched block enters the device under the device's lock, and only if it is not mapped and its bit is still set. A
client's write maps the block under the same lock, and a discard clears the bit under it, so a fetch that was on its way
meanwhile comes to nothing. No lock is held while the store is asked.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .block_map import MAPPED
from .errors import StoreDamaged, StoreUnreachable, ThinPoolError
from .store.backends import open_objects
from .store.documents import opened_document
from .store.fetching import SnapshotReader
from .store.keys import CHUNK_BYTES, open_store
from .store.segments import SEGMENT_CHUNKS, Place
from .store.store import Store

if TYPE_CHECKING:
    from .device import ThinDevice
    from .remote_blocks import RemoteBlocks

# What a read fetches beyond what it asked for, if that lies next to it: a request costs more than the bytes.
READAHEAD_BYTES = 1 << 20
DEMAND_ATTEMPTS = 2
AWAY_SECONDS = 1.0


class LazyDevice:
    """One such device, shared by its sessions and the background."""

    def __init__(self, device: ThinDevice, remote: RemoteBlocks, commit: Callable[[], None]) -> None:
        self.device = device
        self.remote = remote
        self.closed = False
        self.block_bytes = device.block_bytes
        self._commit = commit
        self._readers: dict[int | None, SnapshotReader] = {}
        self._opening = threading.Lock()
        self._flying: set[int] = set()
        self._landed = threading.Condition()
        self._learned: set[int] = set()
        self._checkpointing = threading.Lock()
        self._away_until = 0.0

    @property
    def remote_blocks(self) -> int:
        """Blocks still to be fetched; some of them may turn out to be holes."""
        return self.remote.bits.count()

    def reader(self, attempts: int | None = None) -> SnapshotReader:
        """The snapshot in the store. Raises the store's errors."""
        with self._opening:
            if None not in self._readers:
                self._readers[None] = self._open_reader()
            whole = self._readers[None]
            if attempts not in self._readers:
                hurried = Store(whole.store.objects.hurried(attempts or 1), whole.store.keys)
                self._readers[attempts] = SnapshotReader(hurried, whole.manifest)
            return self._readers[attempts]

    def _open_reader(self) -> SnapshotReader:
        """Open the store, in few attempts: somebody may be waiting for a block, and the background comes again."""
        origin = self.remote.origin
        secret = None
        if origin.key_file is not None:
            secret = Path(origin.key_file).read_bytes().removesuffix(b"\n")
        objects = open_objects(origin.url)
        hurried = objects.hurried(DEMAND_ATTEMPTS)
        keys = open_store(hurried, secret)
        content = opened_document(keys, origin.url, origin.root, hurried.get(origin.root))
        store = Store(objects, keys)
        return SnapshotReader(store, store.decoded(origin.root, content))

    # --- on demand ---

    def ensure_local(self, begin: int, end: int) -> None:
        """Have blocks [begin, end) here. Raises OSError(EIO) where that is not possible now."""
        end = min(end, len(self.remote.bits))
        if not any(self._missing(block) for block in range(begin, end)):
            return
        if time.monotonic() < self._away_until:
            raise OSError(errno.EIO, "the store is away")
        try:
            reader = self.reader(DEMAND_ATTEMPTS)
            try:
                self.fetch(self._ahead(begin, end), reader, begin, end)
            except StoreDamaged:
                self.fetch(range(begin, end), reader, begin, end)  # perhaps it was only what lies ahead
        except ThinPoolError as error:
            if isinstance(error, StoreUnreachable):
                # Others that read meanwhile need not all wait as long to learn the same.
                self._away_until = time.monotonic() + AWAY_SECONDS
            raise OSError(errno.EIO, str(error)) from error
        except OSError as error:
            raise OSError(errno.EIO, f"a block cannot be fetched: {error.strerror or error}") from error

    def _ahead(self, begin: int, end: int) -> list[int]:
        last = min(max(end, begin + READAHEAD_BYTES // self.block_bytes), len(self.remote.bits))
        return list(range(begin, last))

    def fetch(self, blocks: Iterable[int], reader: SnapshotReader, begin: int = 0, end: int = 0) -> None:
        """Fetch blocks that are not here and that nobody else is fetching; wait for [begin, end) in any case."""
        while True:
            wanted = [block for block in blocks if self._missing(block)]
            with self._landed:
                mine = [block for block in wanted if block not in self._flying]
                self._flying.update(mine)
            try:
                self._fetch(mine, reader)
            finally:
                with self._landed:
                    self._flying.difference_update(mine)
                    self._landed.notify_all()
            blocks = [block for block in wanted if begin <= block < end and self._missing(block)]
            if not blocks:
                return
            with self._landed:
                # Somebody else has it on its way; should that fail, the next turn asks itself.
                self._landed.wait_for(lambda: self._flying.isdisjoint(blocks), timeout=5.0)  # noqa: B023

    def _missing(self, block: int) -> bool:
        """Whether a block has to be fetched. One that is mapped need not be: its bit is cleared."""
        device = self.device
        if not self.remote.bits[block]:
            return False
        with device.lock:
            if self.closed:
                return False
            device.block_map.ensure(block, block)
            if device.block_map.entries[block] >= MAPPED:
                self.remote.bits[block] = 0
            return bool(self.remote.bits[block])

    def _fetch(self, blocks: list[int], reader: SnapshotReader) -> None:
        if not blocks:
            return
        chunks_each = self.block_bytes // CHUNK_BYTES
        placed: dict[int, dict[int, Place]] = {}
        for block in blocks:
            placed[block] = reader.places(block * chunks_each, (block + 1) * chunks_each)
        contents: dict[Place, bytes] = {}
        wanted = [place for places in placed.values() for place in places.values()]
        reader.fetch(wanted, contents.__setitem__)
        for block, places in placed.items():
            if not places:
                self._apply(block, None)
                continue
            data = (
                bytearray(self.block_bytes) if any(place.length_bytes for place in places.values()) else b""
            )
            for chunk, place in places.items():
                if place.length_bytes:
                    at = chunk * CHUNK_BYTES - block * self.block_bytes
                    data[at : at + CHUNK_BYTES] = contents[place]  # type: ignore[index]
            self._apply(block, memoryview(data))

    def _apply(self, block: int, data: memoryview | None) -> None:
        """Put a block in its place, unless it has newer content. None is a hole, no bytes are allocated zeros."""
        try:
            self._put(block, data)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self.device.engine.make_space(self.device.device_id):
                raise
            self._put(block, data)

    def _put(self, block: int, data: memoryview | None) -> None:
        device = self.device
        with device.lock:
            device.block_map.ensure(block, block)
            wanted = self.remote.bits[block] and device.block_map.entries[block] < MAPPED
            if wanted and not self.closed and data is not None:
                if len(data):
                    device.provision(block, 0, data)
                else:
                    device.claim_zeroed(block)
            self.remote.bits[block] = 0

    # --- holes ---

    def learn(self, begin: int, end: int, reader: SnapshotReader) -> None:
        """Clear the bits of blocks in [begin, end) that turn out to be holes. Raises the store's errors."""
        chunks_each = self.block_bytes // CHUNK_BYTES
        first = begin * chunks_each // SEGMENT_CHUNKS
        for number in range(first, -(-end * chunks_each // SEGMENT_CHUNKS)):
            if number in self._learned:
                continue
            low, high = number * SEGMENT_CHUNKS, (number + 1) * SEGMENT_CHUNKS
            # Blocks that reach into another segment are left to be found out by fetching.
            low_block, high_block = -(-low // chunks_each), min(high // chunks_each, len(self.remote.bits))
            if self.remote.remote_in(low_block, max(low_block, high_block)):
                taken = {chunk // chunks_each for chunk in reader.places(low, high)}
                with self.device.lock:
                    for block in range(low_block, high_block):
                        if block not in taken:
                            self.remote.bits[block] = 0
            self._learned.add(number)

    # --- durability ---

    def discard(self, begin: int, end: int) -> None:
        """Before blocks [begin, end) are unmapped: they must not come back."""
        with self.device.lock:
            self.remote.clear_durably(begin, end)

    def checkpoint(self) -> None:
        """Make durable what was fetched, then that it was. Raises as a commit does."""
        with self._checkpointing:
            with self.device.lock:
                bits = self.remote.bits.copy()
            self._commit()
            with self.device.lock:
                if not self.closed:
                    self.remote.checkpoint(bits)

    def close(self) -> None:
        """Nothing is fetched into the device any more."""
        with self.device.lock:
            self.closed = True

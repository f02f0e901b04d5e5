"""Indices: which chunks a push sent, so that other hosts do not send them again.

In: writing them, reading those that are new here. Out: the cache they end up in (`known_chunks.py`). An index is a help
and nothing more: no snapshot needs one to be restored, and one that is lost or wrong costs space.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Sequence

from thinpool.errors import StoreDamaged

from .keys import ID_BYTES
from .known_chunks import KnownChunks
from .segments import PACK_ID_BYTES, Place
from .store import INDEX, Store

ROW = struct.Struct(f"<{ID_BYTES}s{PACK_ID_BYTES}sII")
assert ROW.size == 56
ROWS_MAX = 1 << 14  # chunks of about 1 GiB


class IndexWriter:
    """Collects what one push sent. Thread-safe."""

    def __init__(self, store: Store, push: bytes) -> None:
        self._store = store
        self._push = push
        self._lock = threading.Lock()
        self._rows: list[Place] = []
        self._number = 0

    def add(self, places: Sequence[Place]) -> None:
        """Add chunks whose pack the store has."""
        with self._lock:
            self._rows += places
            full = len(self._rows) >= ROWS_MAX
        if full:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        with self._lock:
            rows, self._rows = self._rows, []
            number, self._number = self._number, self._number + 1
        if rows:
            content = b"".join(
                ROW.pack(place.name, place.pack, place.offset, place.length_bytes) for place in rows
            )
            self._store.write_document(f"{INDEX}{self._push.hex()}-{number:08x}", content)


def learn(store: Store, known: KnownChunks) -> None:
    """Read the indices that this host has not seen."""
    seen = known.seen()
    for listed in store.objects.list(INDEX):
        if listed.key in seen:
            continue
        try:
            content = store.read_document(listed.key)
        except StoreDamaged:
            continue  # it would only have saved space
        if content is not None and len(content) % ROW.size == 0:
            known.add(_places(content), seen=listed.key)


def _places(content: bytes) -> Iterable[Place]:
    for name, pack, offset, length in ROW.iter_unpack(content):
        yield Place(pack, offset, length, name)

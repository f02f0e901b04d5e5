"""Reading snapshots back: segments, then chunks, each proven to be what was stored.

In: from a manifest to content. Out: where the content goes (`hydration.py` above), requests (`packs.py`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from thinpool.errors import StoreDamaged

from .damage import DamagedError
from .keys import CHUNK_BYTES
from .manifests import Manifest, pack_key
from .packs import read_blobs
from .segments import SEGMENT_CHUNKS, Place, Segment
from .store import Store

SEGMENTS_KEPT = 64


def read_segments(store: Store, manifest: Manifest, numbers: Sequence[int]) -> dict[int, Segment]:
    """Segments of a manifest by number. Raises StoreDamaged, StoreUnreachable, StoreRefused."""
    wanted = {manifest.segments[number]: number for number in numbers}
    names: dict[Place, list[int]] = {}
    for number in numbers:
        names.setdefault(manifest.segments[number], []).append(number)
    result: dict[int, Segment] = {}

    def found(place: Place, content: bytes) -> None:
        try:
            segment = Segment.decode(content)
        except DamagedError as error:
            raise StoreDamaged(store.url, pack_key(place.pack), f"a segment: {error}") from error
        for number in names[place]:
            result[number] = segment

    for place, reason in read_blobs(store.objects, store.keys, list(wanted), found):
        raise StoreDamaged(store.url, pack_key(place.pack), f"a segment at byte {place.offset}: {reason}")
    return dict(sorted(result.items()))


class SnapshotReader:
    """One snapshot's content by chunk. Thread-safe; keeps the segments it used last."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self.size_bytes = manifest.about.size_bytes
        self._segments: OrderedDict[int, Segment] = OrderedDict()
        self._lock = threading.Lock()

    def segment(self, number: int) -> Segment:
        """A segment; an empty one where nothing was mapped."""
        if number not in self.manifest.segments:
            return Segment()
        with self._lock:
            if number in self._segments:
                self._segments.move_to_end(number)
                return self._segments[number]
        (segment,) = read_segments(self.store, self.manifest, [number]).values()
        with self._lock:
            self._segments[number] = segment
            while len(self._segments) > SEGMENTS_KEPT:
                self._segments.popitem(last=False)
        return segment

    def places(self, begin: int, end: int) -> dict[int, Place]:
        """Chunks [begin, end) that were mapped."""
        result: dict[int, Place] = {}
        for number in range(begin // SEGMENT_CHUNKS, -(-end // SEGMENT_CHUNKS)):
            first = number * SEGMENT_CHUNKS
            for position, place in self.segment(number).chunks.items():
                if begin <= first + position < end:
                    result[first + position] = place
        return result

    def fetch(self, places: Iterable[Place], found: Callable[[Place, bytes], None]) -> None:
        """Get the content of chunks. Raises StoreDamaged and names the object."""
        stored = [place for place in places if place.length_bytes]

        def checked(place: Place, content: bytes) -> None:
            if len(content) != CHUNK_BYTES:
                raise StoreDamaged(self.store.url, pack_key(place.pack), "a chunk has another size")
            found(place, content)

        for place, reason in read_blobs(self.store.objects, self.store.keys, stored, checked):
            raise StoreDamaged(
                self.store.url, pack_key(place.pack), f"the chunk at byte {place.offset}: {reason}"
            )

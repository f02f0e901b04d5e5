"""Packs: many blobs in one object, because a request costs more than the bytes of a small chunk.

In: filling packs and sending them, several at a time with bounded memory; reading blobs back in few requests. Out:
which blobs (`push.py`, `fetching.py`), their form (`blobs.py`).

A pack is "TPpk", a version byte, eleven zero bytes, then blobs one after the other. Its name is the push (12 random
bytes) and a number, so no two hosts ever write the same one and none is written twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from .blobs import opened
from .damage import DamagedError
from .keys import StoreKeys
from .manifests import pack_key
from .objects import Objects
from .segments import Place

PACK_HEAD = b"TPpk\1" + bytes(11)
PACK_BYTES = 8 << 20
UPLOADS = 4
# Blobs of one pack are fetched together where the gap between them is cheaper than a request.
GAP_BYTES_MAX = 256 << 10
RANGE_BYTES_MAX = 8 << 20

Sent = Callable[[bytes, Sequence[Place]], None]


class PackNames:
    """Names for the packs of one push. Thread-safe."""

    def __init__(self, push: bytes) -> None:
        self._push = push
        self._next = 0
        self._lock = threading.Lock()

    def take(self) -> bytes:
        """A name nobody has used."""
        with self._lock:
            self._next += 1
            return self._push + (self._next - 1).to_bytes(4, "big")


class Uploads:
    """Sends packs in a few threads; whoever fills packs faster than they leave has to wait."""

    def __init__(self, objects: Objects, sent: Sent) -> None:
        self._objects = objects
        self._sent = sent
        self._room = threading.BoundedSemaphore(UPLOADS + 2)
        self._threads = ThreadPoolExecutor(UPLOADS, thread_name_prefix="push")
        self._running: list[Future[None]] = []
        self.bytes_sent = 0

    def begin(self, pack: bytes, data: bytes, places: Sequence[Place]) -> None:
        """Start sending a pack. Raises what an earlier one failed with."""
        self._room.acquire()
        for future in [future for future in self._running if future.done()]:
            self._running.remove(future)
            if future.exception() is not None:
                self._room.release()
                future.result()
        self._running.append(self._threads.submit(self._send, pack, data, places))

    def _send(self, pack: bytes, data: bytes, places: Sequence[Place]) -> None:
        try:
            self._objects.put(pack_key(pack), data)
            self.bytes_sent += len(data)
            self._sent(pack, places)
        finally:
            self._room.release()

    def finish(self) -> None:
        """Wait for all. Raises the first failure."""
        running, self._running = self._running, []
        for future in running:
            future.result()

    def close(self) -> None:
        """Wait for what is on its way and end the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)


class PackWriter:
    """Collects blobs of one kind into packs. Not thread-safe."""

    def __init__(self, keys: StoreKeys, names: PackNames, uploads: Uploads) -> None:
        self._keys = keys
        self._names = names
        self._uploads = uploads
        self._begin()

    def _begin(self) -> None:
        self._data = bytearray(PACK_HEAD)
        self._places: list[Place] = []
        self._pack = b""

    def add(self, name: bytes, stored: bytes) -> Place:
        """Append a compressed blob; its place counts once the pack was sent."""
        if not self._pack:
            self._pack = self._names.take()
        offset = len(self._data)
        sealed = self._keys.seal(self._pack, offset, stored)
        self._data += sealed
        place = Place(self._pack, offset, len(sealed), name)
        self._places.append(place)
        if len(self._data) >= PACK_BYTES:
            self.flush()
        return place

    def flush(self) -> None:
        """Send what there is."""
        if self._places:
            self._uploads.begin(self._pack, bytes(self._data), self._places)
            self._begin()


def read_blobs(
    objects: Objects, keys: StoreKeys, places: Sequence[Place], found: Callable[[Place, bytes], None]
) -> list[tuple[Place, str]]:
    """Fetch blobs, neighbours together, and hand each proven content to `found`; return damaged ones and why.

    Raises StoreUnreachable, StoreRefused, and StoreDamaged where an object is missing or too short.
    """
    damaged: list[tuple[Place, str]] = []
    for run in runs(places):
        start = run[0].offset
        end = max(place.offset + place.length_bytes for place in run)
        data = memoryview(objects.get_range(pack_key(run[0].pack), start, end - start))
        for place in run:
            at = place.offset - start
            try:
                content = opened(
                    keys, place.pack, place.offset, bytes(data[at : at + place.length_bytes]), place.name
                )
            except DamagedError as error:
                damaged.append((place, str(error)))
            else:
                found(place, content)
    return damaged


def runs(places: Sequence[Place]) -> list[list[Place]]:
    """Split blobs into ranges that are worth one request each."""
    result: list[list[Place]] = []
    start = end = 0
    for place in sorted(set(places), key=lambda place: (place.pack, place.offset)):
        near = bool(result) and result[-1][0].pack == place.pack and place.offset - end <= GAP_BYTES_MAX
        place_end = place.offset + place.length_bytes
        if near and place_end - start <= RANGE_BYTES_MAX:
            result[-1].append(place)
            end = max(end, place_end)
        else:
            result.append([place])
            start, end = place.offset, place_end
    return result

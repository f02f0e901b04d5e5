"""Pushing a snapshot: what is new goes into packs, the manifest names everything, and only then it is known.

In: which chunks are read, the order of what is written, resuming. Out: the collector's side (`collecting.py`), packs
(`packs.py`), what a snapshot is (`source.py`).

An incremental push walks the difference of two mapping trees and loads the segments in which something changed; every
other segment of the base is taken over by name. A chunk that is in the store already, from whatever device or host, is
not sent again. Nothing names a snapshot that is not complete: its key is written last.

Packs do not grow sparse without bound: where a manifest would use less than a quarter of a pack, and such packs hold
much that nobody needs, the push stores the chunks it still needs of them anew. So the collector never rewrites a pack,
and a store is at most four times the size of what its snapshots use, plus an eighth.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from thinpool.errors import StoreDamaged, StoredSnapshotExists

from .blobs import compressed
from .fetching import read_segments
from .index import IndexWriter, learn
from .keys import CHUNK_BYTES
from .known_chunks import KnownChunks
from .manifests import SEGMENT_BYTES, Description, Manifest
from .packs import PackNames, PackWriter, Uploads
from .segment_work import SegmentWork, merged, segment_work, spans
from .segments import SEGMENT_CHUNKS, ZERO_PLACE, Place, Segment
from .source import BlockSource
from .store import PENDING, Store

READ_CHUNKS = 16  # read and compressed in one go by a thread
WORKERS = 2
SPARSE_PARTS = 4
DEAD_PARTS = 8
RENEW_SECONDS = 600.0
ZEROS = bytes(CHUNK_BYTES)
PUSH_BYTES = 12

Progress = Callable[[int, int], None]
# One chunk: its name ("" for zeros), its place where it is known, its compressed form otherwise.
Prepared = tuple[bytes, Place | None, bytes]


@dataclass(slots=True)
class PushReport:
    """What a push did."""

    name: str
    base: str | None
    read_bytes: int = 0
    new_chunks: int = 0
    sent_bytes: int = 0
    segments_written: int = 0
    up_to_date: bool = False


class Push:
    """One push. `run` does it."""

    def __init__(
        self,
        store: Store,
        source: BlockSource,
        name: str,
        known: KnownChunks,
        *,
        progress: Progress | None = None,
    ) -> None:
        self._store = store
        self._source = source
        self._known = known
        self._progress = progress or (lambda done, total: None)
        self._push = secrets.token_bytes(PUSH_BYTES)
        self._name = name
        self._report = PushReport(name, None)
        self._usable: dict[bytes, int] = {}
        self._own: dict[bytes, Place] = {}
        self._refused: set[bytes] = set()
        self._incomplete: Manifest | None = None
        self._shields: list[str] = []
        self._renewed = 0.0
        self._mapped_chunks = 0

    @property
    def _pending_key(self) -> str:
        return PENDING + self._push.hex()

    def run(self) -> PushReport:
        """Push. Running it again after any end resumes; a snapshot that lacks packs is replaced.

        Raises StoredSnapshotExists and the store's errors.
        """
        found = self._store.find_snapshot(self._name)
        if found is not None:
            if found.about.device != self._source.identity:
                raise StoredSnapshotExists(self._name, self._store.url)
            if not self._doubtful(found):
                self._known.remember_push(self._source.identity, self._name)  # a kill may have come before
                self._report.up_to_date = True
                return self._report
            # Published by a push that was given up, woke, and died before it could look again; or damaged since.
            self._incomplete = found
        # First of all: from here on the collector leaves alone what this push and its unfinished forerunners sent.
        self._shields = self._unfinished()
        self._renew()
        self._usable = self._store.usable_packs()
        learn(self._store, self._known)
        names = PackNames(self._push)
        index = IndexWriter(self._store, self._push)
        self._uploads = Uploads(self._store.objects, self._sent)
        self._index = index
        self._chunks = PackWriter(self._store.keys, names, self._uploads)
        self._segments = PackWriter(self._store.keys, names, self._uploads)
        try:
            with ThreadPoolExecutor(WORKERS, thread_name_prefix="compress") as self._workers:
                manifest = self._begun()
                while doubtful := self._settle(manifest) or self._publish(manifest):
                    manifest = self._mended(manifest, doubtful)
        finally:
            self._uploads.close()
        # Only our own: what looks unfinished may be another push of this host that is still at work.
        self._store.objects.delete([self._pending_key])
        self._known.end([self._push.hex()])
        self._known.remember_push(self._source.identity, self._name)
        return self._report

    def _unfinished(self) -> list[str]:
        """Pushes of this host that have not ended, and whose intent is still in the store: their packs are shielded."""
        before = set(self._known.begin(self._push.hex()))
        if not before:
            return []
        there = {listed.key.removeprefix(PENDING) for listed in self._store.objects.list(PENDING)}
        self._known.end(before - there)
        return sorted(before & there)

    def _renew(self) -> None:
        if time.monotonic() - self._renewed > RENEW_SECONDS or not self._renewed:
            self._store.write_pending(self._push.hex(), self._shields, None)
            self._renewed = time.monotonic()

    def _sent(self, pack: bytes, places: Iterable[Place]) -> None:
        """Called by an upload thread when the store has a pack: what a later run may count on."""
        listed = list(places)
        self._known.add(listed)
        self._index.add(listed)

    # --- what to do ---

    def _begun(self) -> Manifest:
        try:
            return self._build(*self._plan())
        except StoreDamaged:
            return self._from_nothing()  # what lies in the store is damaged, not what is pushed

    def _mended(self, manifest: Manifest, doubtful: set[bytes]) -> Manifest:
        """The manifest without some packs. Where its segments are among what is gone, it is made from nothing."""
        self._refused |= doubtful
        try:
            return self._build(manifest, self._stale_work(manifest, doubtful))
        except StoreDamaged:
            return self._from_nothing()

    def _from_nothing(self) -> Manifest:
        self._report.base = None
        self._mapped_chunks = 0
        return self._build(
            Manifest(self._description()), segment_work(self._source.mapped(0, self._source.size_bytes))
        )

    def _plan(self) -> tuple[Manifest, Iterator[SegmentWork]]:
        about = self._description()
        for identity in self._source.relatives():
            stored_as = self._known.pushed_as(identity)
            base = None if stored_as is None else self._store.find_snapshot(stored_as)
            if base is None or base.about.device != identity:
                continue
            changes = self._source.changes(identity, base.about.mapped_bytes)
            if changes is None:
                continue
            self._report.base = stored_as
            begun = replace(about, mapped_bytes=base.about.mapped_bytes)
            manifest = Manifest(begun, dict(base.segments), base.packs.copy())
            self._cut(manifest, base.about.size_bytes)
            ends = self._end_changes(base.about.size_bytes)
            stale = {pack for pack in manifest.packs if pack not in self._usable} | self._sparse(manifest)
            work = list(segment_work(sorted([*changes, *ends])))
            return manifest, iter(merged(work, self._stale_work(manifest, stale)))
        return Manifest(about), segment_work(self._source.mapped(0, self._source.size_bytes))

    def _description(self) -> Description:
        source = self._source
        return Description(
            name=self._name,
            device=source.identity,
            size_bytes=source.size_bytes,
            block_bytes=source.block_bytes,
            mapped_bytes=0,
            stored_bytes=0,
            created=source.created,
            pushed=time.time(),
            host=socket.gethostname(),
        )

    def _cut(self, manifest: Manifest, base_bytes: int) -> None:
        """Drop segments beyond the end of a device that became shorter."""
        if base_bytes > self._source.size_bytes:
            end = -(-self._source.size_bytes // SEGMENT_BYTES)
            for number in [number for number in manifest.segments if number >= end]:
                (segment,) = self._loaded(manifest, [number]).values()
                self._replace(manifest, number, segment, None)

    def _end_changes(self, base_bytes: int) -> list[tuple[int, int, bool]]:
        """A chunk that holds the end of the device is cut by it: another end, another chunk.

        The chunks that follow it in the same block come with it: the block was mapped before, and only now are they
        inside of the device.
        """
        size, block_bytes = self._source.size_bytes, self._source.block_bytes
        if size == base_bytes:
            return []
        end = min(size, base_bytes)
        begin = end // CHUNK_BYTES * CHUNK_BYTES
        block_end = -(-end // block_bytes) * block_bytes
        ranges = list(self._source.mapped(begin, min(size, block_end))) if begin < block_end else []
        if size < base_bytes:
            # Everything behind the new end, in the segment that has it.
            after = -(-size // CHUNK_BYTES) * CHUNK_BYTES
            segment_end = -(-size // SEGMENT_BYTES) * SEGMENT_BYTES
            if after < segment_end:
                ranges.append((after, segment_end - after, False))
        return ranges

    def _sparse(self, manifest: Manifest) -> set[bytes]:
        """Packs of which little is used, where they add up."""
        sparse = {
            pack for pack, used in manifest.packs.items() if used * SPARSE_PARTS < self._usable.get(pack, 0)
        }
        dead = sum(self._usable[pack] - manifest.packs[pack] for pack in sparse)
        return sparse if dead * DEAD_PARTS > sum(manifest.packs.values()) else set()

    def _stale_work(self, manifest: Manifest, stale: set[bytes]) -> list[SegmentWork]:
        """What has to be stored anew so that the manifest does without some packs."""
        if not stale:
            return []
        work = []
        for number, segment in self._each_loaded(manifest):
            positions = [
                position
                for position, place in segment.chunks.items()
                if place.length_bytes and place.pack in stale
            ]
            if positions or manifest.segments[number].pack in stale:
                work.append(SegmentWork(number, tuple(spans(sorted(positions))), ()))
        return work

    # --- doing it ---

    def _build(self, manifest: Manifest, work: Iterable[SegmentWork]) -> Manifest:
        """Store what has to be, and change the manifest to name it."""
        done = 0
        for piece in work:
            old: Segment | None = None
            if piece.number in manifest.segments:
                (old,) = self._loaded(manifest, [piece.number]).values()
            chunks = dict(old.chunks) if old is not None else {}
            for begin, end in piece.gone:
                for position in range(begin, end):
                    chunks.pop(position, None)
            for position, place in self._stored(piece.number, piece.fresh):
                chunks[position] = place
            self._replace(manifest, piece.number, old, Segment(chunks) if chunks else None)
            done += sum(end - begin for begin, end in piece.fresh) * CHUNK_BYTES
            self._progress(done, self._source.size_bytes)
            self._renew()
        return manifest

    def _replace(self, manifest: Manifest, number: int, old: Segment | None, new: Segment | None) -> None:
        """Put a segment in the place of another, and keep the count of what is used."""
        place = manifest.segments.pop(number, None)
        if old is not None and place is not None:
            used = old.used()
            used[place.pack] += place.length_bytes
            manifest.use(used, -1)
        if new is not None:
            content = new.encode()
            name = self._store.keys.content_id(content)
            place = self._segments.add(name, compressed(content))
            self._report.segments_written += 1
            used = new.used()
            used[place.pack] += place.length_bytes
            manifest.segments[number] = place
            manifest.use(used)
        mapped = (len(new.chunks) if new else 0) - (len(old.chunks) if old else 0)
        self._mapped_chunks += mapped

    def _stored(self, number: int, fresh: Iterable[tuple[int, int]]) -> Iterator[tuple[int, Place]]:
        """Read chunks, find or send each; yields (position, place) in order."""
        first = number * SEGMENT_CHUNKS
        end_chunk = -(-self._source.size_bytes // CHUNK_BYTES)
        jobs: list[tuple[int, Future[list[Prepared]]]] = []
        for begin, end in fresh:
            for start in range(begin, min(end, end_chunk - first), READ_CHUNKS):
                count = min(READ_CHUNKS, min(end, end_chunk - first) - start)
                jobs.append((start, self._workers.submit(self._prepare, first + start, count)))
        for start, job in jobs:
            for position, prepared in enumerate(job.result(), start):
                yield position, self._placed(*prepared)

    def _prepare(self, chunk: int, count: int) -> list[Prepared]:
        """Read chunks, name them, compress those that seem to be new. Runs in a worker."""
        begin = chunk * CHUNK_BYTES
        length = min(count * CHUNK_BYTES, self._source.size_bytes - begin)
        data = bytes(self._source.read(begin, length))
        data += bytes(-length % CHUNK_BYTES)
        prepared: list[Prepared] = []
        for at in range(0, len(data), CHUNK_BYTES):
            content = data[at : at + CHUNK_BYTES]
            if content == ZEROS:
                prepared.append((b"", ZERO_PLACE, b""))
                continue
            name = self._store.keys.content_id(content)
            known = self._find(name)
            prepared.append((name, known, b"" if known is not None else compressed(content)))
        return prepared

    def _find(self, name: bytes) -> Place | None:
        place = self._own.get(name) or self._known.find(name)
        if place is None or place.pack in self._refused:
            return None
        if place.pack not in self._usable and place.pack[:PUSH_BYTES] != self._push:
            return None
        return place

    def _placed(self, name: bytes, known: Place | None, stored: bytes) -> Place:
        if not name:
            self._report.read_bytes += CHUNK_BYTES
            return ZERO_PLACE
        self._report.read_bytes += CHUNK_BYTES
        place = known or self._find(name)  # the same content may have come in the meantime
        if place is None:
            place = self._chunks.add(name, stored)
            self._own[name] = place
            self._report.new_chunks += 1
        return place

    # --- making it known ---

    def _settle(self, manifest: Manifest) -> set[bytes]:
        """Send all there is, write the root, then look: packs this snapshot must not depend on, none at best."""
        self._chunks.flush()
        self._segments.flush()
        self._uploads.finish()
        self._index.flush()
        self._report.sent_bytes = self._uploads.bytes_sent
        mapped = manifest.about.mapped_bytes + self._mapped_chunks * CHUNK_BYTES
        self._mapped_chunks = 0
        manifest.about = replace(manifest.about, mapped_bytes=mapped, stored_bytes=self._report.sent_bytes)
        self._store.write_pending(self._push.hex(), self._shields, manifest)
        return self._doubtful(manifest)

    def _doubtful(self, manifest: Manifest) -> set[bytes]:
        self._usable = self._store.usable_packs()
        doubtful = {pack for pack in manifest.packs if pack not in self._usable}
        if doubtful:
            self._own = {name: place for name, place in self._own.items() if place.pack not in doubtful}
        return doubtful

    def _publish(self, manifest: Manifest) -> set[bytes]:
        """Make the snapshot known, and return what `_settle` does.

        While the intent is there, the collector saw a root all the time since `_settle` wrote it. Where it is gone,
        the collector gave this push up (a laptop was closed for a day): it looks once more, with the snapshot as its
        root. No clock of this host is asked; that of a paused virtual machine stands still.
        """
        if self._incomplete is not None:
            self._store.withdraw(self._incomplete)
            self._incomplete = None
        self._store.publish(manifest)
        if self._store.objects.find(self._pending_key) is not None:
            return set()
        doubtful = self._doubtful(manifest)
        if doubtful:
            self._store.forget(self._name)
        return doubtful

    def _loaded(self, manifest: Manifest, numbers: Iterable[int]) -> dict[int, Segment]:
        return read_segments(self._store, manifest, list(numbers))

    def _each_loaded(self, manifest: Manifest) -> Iterator[tuple[int, Segment]]:
        numbers = sorted(manifest.segments)
        for first in range(0, len(numbers), 256):
            yield from self._loaded(manifest, numbers[first : first + 256]).items()

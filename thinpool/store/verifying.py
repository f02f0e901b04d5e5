"""Verifying a store: is everything there that its snapshots need, and is it what was stored?

In: the quick look (manifests, segments, presence and length of packs) and the full one (every chunk read and proven).
Out: repairing, which is pushing again: a pack that is condemned is used by no later push.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from thinpool.errors import StoreDamaged

from .fetching import read_segments
from .keys import CHUNK_BYTES
from .manifests import Manifest, pack_key
from .packs import read_blobs
from .segments import Place, Segment
from .store import SNAPSHOTS, Store

SEGMENTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong: the object, what is wrong with it, and a snapshot that suffers."""

    snapshot: str
    key: str
    reason: str


@dataclass(slots=True)
class VerifyReport:
    """What was looked at and what is wrong."""

    snapshots: int = 0
    chunks: int = 0
    read_bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    damaged_packs: set[bytes] = field(default_factory=set)


class Verification:
    """One verification. A chunk that several snapshots share is read once."""

    def __init__(
        self, store: Store, *, read_data: bool, progress: Callable[[int], None] | None = None
    ) -> None:
        self._store = store
        self._read_data = read_data
        self._progress = progress or (lambda chunks: None)
        self._packs = self._listed_packs()
        self._proven: set[Place] = set()
        self._bad: dict[Place, tuple[bytes, str]] = {}
        self._told: set[Fault] = set()
        self.report = VerifyReport()

    def run(self, names: Iterable[str] = ()) -> VerifyReport:
        """Verify the named snapshots, or all. Raises StoreUnreachable, StoreRefused, NoSuchStoredSnapshot."""
        wanted = list(names)
        if wanted:
            for name in wanted:
                self._unless_forgotten(self._store.snapshot_key(name), self._store.snapshot(name))
            return self.report
        for listed in self._store.objects.list(SNAPSHOTS):
            try:
                content = self._store.read_document(listed.key)
                if content is None:
                    continue  # forgotten meanwhile
                manifest = self._store.decoded(listed.key, content)
            except StoreDamaged as error:
                self.report.faults.append(Fault("?", listed.key, error.reason))
                continue
            self._unless_forgotten(listed.key, manifest)
        return self.report

    def _listed_packs(self) -> dict[bytes, int]:
        return {pack: listed.size_bytes for pack, listed in self._store.packs().items()}

    def _unless_forgotten(self, key: str, manifest: Manifest) -> None:
        """Verify a snapshot; what is missing of one that is forgotten meanwhile is no fault."""
        before = replace(self.report, damaged_packs=set(self.report.damaged_packs))
        faults_before = len(self.report.faults)
        self._manifest(key, manifest)
        if len(self.report.faults) > faults_before and self._store.objects.find(key) is None:
            self._told.difference_update(self.report.faults[faults_before:])
            del self.report.faults[faults_before:]
            self.report = before

    def _manifest(self, key: str, manifest: Manifest) -> None:
        self.report.snapshots += 1
        name = manifest.about.name
        faults_before = len(self.report.faults)
        if any(pack not in self._packs for pack in manifest.packs):
            self._packs = self._listed_packs()  # it may have been pushed since they were listed
        for pack in manifest.packs:
            if pack not in self._packs:
                self._fault(name, pack, "it is missing")
        counted = 0
        for segment in self._segments(name, manifest):
            counted += len(segment.chunks)
            self._chunks(name, [place for place in segment.chunks.values() if place.length_bytes])
            self._progress(self.report.chunks)
        if len(self.report.faults) == faults_before and counted * CHUNK_BYTES != manifest.about.mapped_bytes:
            self.report.faults.append(
                Fault(name, key, "it tells of another number of chunks than its segments")
            )

    def _segments(self, name: str, manifest: Manifest) -> Iterator[Segment]:
        numbers = [number for number, place in sorted(manifest.segments.items()) if place.pack in self._packs]
        for first in range(0, len(numbers), SEGMENTS_AT_ONCE):
            piece = numbers[first : first + SEGMENTS_AT_ONCE]
            try:
                yield from read_segments(self._store, manifest, piece).values()
            except StoreDamaged:
                for number in piece:
                    try:
                        yield from read_segments(self._store, manifest, [number]).values()
                    except StoreDamaged as error:
                        self._fault(name, manifest.segments[number].pack, error.reason)

    def _chunks(self, name: str, places: list[Place]) -> None:
        for place in places:
            if place.pack in self._packs and place.offset + place.length_bytes > self._packs[place.pack]:
                self._fault(name, place.pack, f"it ends before byte {place.offset + place.length_bytes}")
            elif place in self._bad:
                self._fault(name, *self._bad[place])
        self.report.chunks += len(places)
        if not self._read_data:
            return
        fresh = [
            place
            for place in places
            if place not in self._proven
            and place not in self._bad
            and place.offset + place.length_bytes <= self._packs.get(place.pack, 0)
        ]
        # Read even if they fail: a fault is told once for each pack.
        try:
            damaged = read_blobs(self._store.objects, self._store.keys, fresh, self._prove)
        except StoreDamaged as error:
            self.report.faults.append(Fault(name, error.key, error.reason))
            return
        for place, reason in damaged:
            self._bad[place] = (place.pack, f"the chunk at byte {place.offset}: {reason}")
            self._fault(name, *self._bad[place])

    def _prove(self, place: Place, content: bytes) -> None:
        self._proven.add(place)
        self.report.read_bytes += len(content)

    def _fault(self, name: str, pack: bytes, reason: str) -> None:
        self.report.damaged_packs.add(pack)
        fault = Fault(name, pack_key(pack), reason)
        if fault not in self._told:
            self._told.add(fault)
            self.report.faults.append(fault)

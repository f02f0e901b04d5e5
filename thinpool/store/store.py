"""An open store: its objects, its keys, and the snapshots in it.

In: opening, finding and listing snapshots, forgetting them, what keeps packs alive. Out: pushing, pulling, collecting.

Objects below the URL:

    format                        what the store is (`keys.py`)
    snapshots/<name>              one manifest each, under a keyed digest of the snapshot's name
    pending/<push>                a push in flight: first its intent, at the end its manifest
    holds/<id>                    the manifest of a snapshot that somebody is pulling, lazily perhaps
    packs/<xx>/<push>-<number>    chunks and segments
    index/<push>-<number>         names of the chunks in some packs, for other hosts' benefit; may be lost
    condemned/<pack>              the collector means to delete this pack: nothing may come to depend on it

*Roots* are the manifests below `snapshots/`, `pending/` and `holds/`. The order in which the two sides write and read
is what makes a push and the collector safe beside each other without any clock:

    a push:        writes its root,        then looks for condemned and missing packs among those it needs
    the collector: condemns packs,         then looks for roots that need them

Whichever comes second sees the other. A pack is deleted only after it was condemned and no root read *after* that names
it, and it stays condemned until it is gone, so a root written later cannot come to depend on it. Names of packs are
never used again, so a deletion that arrives late hits nothing else.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from thinpool.errors import NoSuchStoredSnapshot, StoreDamaged, StoredSnapshotExists

from .backends import open_objects
from .damage import DamagedError
from .documents import opened_document, sealed_document
from .keys import StoreKeys, create_store, open_store
from .manifests import LENGTH, Description, Manifest, pack_of
from .objects import Listed, Objects
from .segments import PACK_ID_BYTES

SNAPSHOTS, PENDING, HOLDS, PACKS, INDEX, CONDEMNED = (
    "snapshots/",
    "pending/",
    "holds/",
    "packs/",
    "index/",
    "condemned/",
)


@dataclass(frozen=True, slots=True)
class Pending:
    """A push in flight: the pushes whose packs it shields, and its manifest once that is complete."""

    shields: tuple[str, ...]
    manifest: Manifest | None


class Store:
    """An open store. Raises the leaves of `store_errors.py`."""

    def __init__(self, objects: Objects, keys: StoreKeys) -> None:
        self.objects = objects
        self.keys = keys

    @classmethod
    def open(cls, url: str, secret: bytes | None = None, *, create: bool = False) -> Store:
        """Open the store at a URL, or make one there."""
        objects = open_objects(url)
        return cls(objects, (create_store if create else open_store)(objects, secret))

    @property
    def url(self) -> str:
        """Where it is."""
        return self.objects.url

    # --- documents ---

    def read_document(self, key: str) -> bytes | None:
        """The content of a document; None where there is none."""
        data = self.objects.find_content(key)
        return None if data is None else opened_document(self.keys, self.url, key, data)

    def write_document(self, key: str, content: bytes) -> None:
        """Write a document in place of an older one."""
        self.objects.put(key, sealed_document(self.keys, key, content))

    # --- snapshots ---

    def snapshot_key(self, name: str) -> str:
        """The key of a snapshot's manifest."""
        return SNAPSHOTS + self.keys.name_id(name)

    def find_snapshot(self, name: str) -> Manifest | None:
        """The manifest of a snapshot; None where there is none."""
        return self._manifest(self.snapshot_key(name))

    def snapshot(self, name: str) -> Manifest:
        """The manifest of a snapshot. Raises NoSuchStoredSnapshot."""
        found = self.find_snapshot(name)
        if found is None:
            raise NoSuchStoredSnapshot(name, self.url)
        return found

    def descriptions(self) -> list[Description]:
        """All snapshots, by name."""
        found = [manifest.about for _, manifest in self._manifests(SNAPSHOTS)]
        return sorted(found, key=lambda about: about.name)

    def publish(self, manifest: Manifest) -> None:
        """Make a snapshot known. Raises StoredSnapshotExists where the name is taken."""
        key = self.snapshot_key(manifest.about.name)
        if not self.objects.create(key, sealed_document(self.keys, key, manifest.encode())):
            raise StoredSnapshotExists(manifest.about.name, self.url)

    def forget(self, name: str) -> None:
        """Remove a snapshot; its packs go when the collector finds nobody else needs them."""
        key = self.snapshot_key(name)
        if self.objects.find(key) is None:
            raise NoSuchStoredSnapshot(name, self.url)
        self.objects.delete([key])

    def withdraw(self, manifest: Manifest) -> None:
        """Remove a snapshot if its manifest is still this one."""
        key = self.snapshot_key(manifest.about.name)
        present = self._manifest(key)
        if present is not None and present.encode() == manifest.encode():
            self.objects.delete([key])

    def _manifest(self, key: str) -> Manifest | None:
        content = self.read_document(key)
        return None if content is None else self.decoded(key, content)

    def decoded(self, key: str, content: bytes) -> Manifest:
        """A manifest from a document's content. Raises StoreDamaged."""
        try:
            return Manifest.decode(content)
        except DamagedError as error:
            raise StoreDamaged(self.url, key, str(error)) from error

    def _manifests(self, prefix: str) -> Iterator[tuple[str, Manifest]]:
        for listed in self.objects.list(prefix):
            manifest = self._manifest(listed.key)
            if manifest is not None:  # else it was removed meanwhile
                yield listed.key, manifest

    # --- what keeps packs ---

    def write_pending(self, push: str, shields: Iterable[str], manifest: Manifest | None) -> None:
        """Say that a push is in flight, and what it will need."""
        head = json.dumps({"shields": sorted(shields)}).encode()
        body = b"" if manifest is None else manifest.encode()
        self.write_document(PENDING + push, LENGTH.pack(len(head)) + head + body)

    def read_pending(self, key: str) -> Pending | None:
        """A push in flight; None when it has ended meanwhile. Raises StoreDamaged."""
        content = self.read_document(key)
        if content is None:
            return None
        try:
            (length,) = LENGTH.unpack_from(content)
            shields = tuple(map(str, json.loads(content[LENGTH.size : LENGTH.size + length])["shields"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreDamaged(self.url, key, "it describes no push") from error
        body = content[LENGTH.size + length :]
        return Pending(shields, self.decoded(key, body) if body else None)

    def hold(self, manifest: Manifest) -> str:
        """Keep a snapshot's packs until `release`; the caller looks for the snapshot afterwards. Returns its key."""
        key = HOLDS + secrets.token_hex(12)
        self.write_document(key, manifest.encode())
        return key

    def release(self, key: str) -> None:
        """End a hold."""
        self.objects.delete([key])

    def held(self) -> Iterator[tuple[str, Manifest]]:
        """Manifests that somebody is pulling."""
        return self._manifests(HOLDS)

    def manifests(self) -> Iterator[tuple[str, Manifest]]:
        """Manifests of all snapshots, with their keys."""
        return self._manifests(SNAPSHOTS)

    def packs(self) -> dict[bytes, Listed]:
        """All packs there are."""
        found = ((pack_of(listed.key), listed) for listed in self.objects.list(PACKS))
        return {pack: listed for pack, listed in found if pack is not None}

    def condemned(self) -> dict[bytes, Listed]:
        """Packs that are to be deleted. What is no mark of ours is left alone."""
        found = ((_marked(listed.key), listed) for listed in self.objects.list(CONDEMNED))
        return {pack: listed for pack, listed in found if pack is not None}

    def condemn(self, pack: bytes) -> None:
        """Say that nothing may come to depend on a pack any more."""
        self.objects.put(CONDEMNED + pack.hex(), b"condemned\n")

    def usable_packs(self) -> dict[bytes, int]:
        """Packs that a root may come to depend on, with their sizes. The order of the two looks matters.

        A pack that is deleted in between was condemned before; where its mark has gone too, so has the pack.
        """
        condemned = self.condemned()
        return {pack: listed.size_bytes for pack, listed in self.packs().items() if pack not in condemned}


def _marked(key: str) -> bytes | None:
    """The pack that a mark condemns, None for a foreign object."""
    try:
        pack = bytes.fromhex(key.removeprefix(CONDEMNED))
    except ValueError:
        return None
    return pack if len(pack) == PACK_ID_BYTES and CONDEMNED + pack.hex() == key else None

"""A store that is damaged: every object that is lost, cut, flipped, swapped or strange is named, and nothing looks whole.

Two snapshots of a real pool in a directory, encrypted and not; after each damage the store is verified, collected, and
pulled from into another real pool. What is repaired afterwards lets the same pull go on to its end.
"""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.transfer_pools import BLOCK, WORK, allocation, discard, new_pool, session_on, write
from thinpool.errors import DeviceReceiving, StoreDamaged, ThinPoolError
from thinpool.hydration import hydrate
from thinpool.lazy_devices import PullRequest
from thinpool.pool import Pool
from thinpool.push_source import OpenPoolSource
from thinpool.store import keys, packs
from thinpool.store.collecting import collect
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.pushing import Push
from thinpool.store.store import Store
from thinpool.store.verifying import Fault, Verification

pytest.importorskip("obstore", reason="needs the package obstore")

MIB = 1 << 20
NAMES = ("mon", "tue")
PACK_HEAD_BYTES = 16  # says nothing that is used


def blocks(pool: Pool, name: str) -> dict[int, bytes]:
    """Mapped blocks with their content."""
    with session_on(pool, name) as session:
        return {at: bytes(session.read_bytes(at * BLOCK, BLOCK)) for at in allocation(pool, name)}


class Damaged:
    """A store with two snapshots, their contents, and a pool to pull into."""

    def __init__(self, root: Path, pool: Pool, secret: bytes | None) -> None:
        self.root, self.pool = root, pool
        self._key = root.with_name("key")
        self._key.write_bytes(secret or b"")
        self._secret = secret
        self.url = root.as_uri()
        self.wanted: dict[str, dict[int, bytes]] = {}

    def store(self) -> Store:
        return Store.open(self.url, self._secret)

    def push(self, source: Pool) -> None:
        known, noise = KnownChunks(None), random.Random(8)
        store = Store.open(self.url, self._secret, create=True)
        source.create_device("disk", 65 * MIB)  # two segments
        for block in (0, 1, 2, 5, 6, 1024, 1039):
            write(source, "disk", block * BLOCK, noise.randbytes(BLOCK))
        source.create_snapshot("disk", "mon", read_only=True)
        write(source, "disk", 3 * BLOCK, noise.randbytes(2 * BLOCK))
        discard(source, "disk", 5 * BLOCK, BLOCK)
        source.create_snapshot("disk", "tue", read_only=True)
        for name in NAMES:
            Push(store, OpenPoolSource(source, name), name, known).run()
            self.wanted[name] = blocks(source, name)

    def files(self) -> list[Path]:
        """Packs and manifests."""
        found = [path for kind in ("packs", "snapshots") for path in (self.root / kind).rglob("*")]
        return sorted(path for path in found if path.is_file())

    def key_of(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def faults(self) -> list[Fault]:
        return Verification(self.store(), read_data=True).run().faults

    def pull(self, name: str, *, lazy: bool = False) -> None:
        """Begin or go on, to the end. Raises StoreDamaged."""
        key = None if self._secret is None else str(self._key)
        self.pool.begin_pull(PullRequest(self.url, name, name, lazy=lazy, key_file=key))
        entry = self.pool.catalog.by_name(name)
        assert entry is not None
        lazy_device = self.pool.lazy.of(entry)
        assert lazy_device is not None
        if not lazy:
            hydrate(lazy_device, threading.Event())
            self.pool.lazy.complete(entry)

    def assert_whole(self, name: str) -> None:
        assert blocks(self.pool, name) == self.wanted[name]

    def assert_unfinished(self, name: str) -> None:
        """No device, or one that nobody can use yet."""
        entry = self.pool.catalog.by_name(name)
        if entry is not None:
            with pytest.raises(DeviceReceiving):
                self.pool.open_session(entry)


@pytest.fixture(params=[None, b"a secret"], ids=["open", "encrypted"])
def damaged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Damaged]:
    monkeypatch.setattr(packs, "PACK_BYTES", 3 * BLOCK)  # several packs
    monkeypatch.setattr(keys, "SCRYPT_COST", 1 << 4)
    work = Path(tempfile.mkdtemp(prefix="thinpool-damage-", dir=WORK))
    with new_pool(work / "source") as source, new_pool(work / "target") as target:
        made = Damaged(work / "store", target, request.param)
        made.push(source)
        yield made
    shutil.rmtree(work)


def harms(path: Path, others: list[Path], chance: random.Random) -> Iterator[tuple[str, set[Path]]]:
    """Do one harm after the other to an object; yields what and to which objects. Undone afterwards."""
    whole = path.read_bytes()
    begin = PACK_HEAD_BYTES if "packs" in path.parts else 0

    def put(data: bytes) -> None:
        path.write_bytes(data)

    at = chance.randrange(begin, len(whole))
    put(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
    yield "flipped", {path}
    put(whole[: chance.randrange(begin, len(whole))])
    yield "cut", {path}
    put(b"")
    yield "emptied", {path}
    put(whole[:begin] + bytes(len(whole) - begin))
    yield "zeroed", {path}
    other = chance.choice([other for other in others if other != path])
    swapped = other.read_bytes()
    put(swapped)
    other.write_bytes(whole)
    yield "swapped", {path, other}
    other.write_bytes(swapped)
    path.unlink()
    yield "lost", {path}
    put(whole)


def test_every_harm_to_an_object_is_named_and_nothing_looks_whole(damaged: Damaged) -> None:
    chance = random.Random(21)
    files = damaged.files()
    assert len(files) >= 8
    needed = {
        name: {damaged.root / packs.pack_key(pack) for pack in damaged.store().snapshot(name).packs}
        | {damaged.root / damaged.store().snapshot_key(name)}
        for name in NAMES
    }
    for path in files:
        kin = [other for other in files if other.parts[-3] == path.parts[-3]] or files
        for harm, hurt in harms(path, kin, chance):
            keys_hurt = {damaged.key_of(each) for each in hurt}
            what = f"{damaged.key_of(path)} {harm}"
            faults = damaged.faults()
            lost_snapshot = harm == "lost" and "snapshots" in path.parts
            assert faults or lost_snapshot, what
            assert {fault.key for fault in faults} <= keys_hurt, what
            # A flipped bit may be in a chunk of one snapshot only; other harms are to all that need the object.
            suffering = {name for name in NAMES if hurt & needed[name]}
            if harm in ("flipped", "cut") and "packs" in path.parts:
                assert {fault.snapshot for fault in faults} <= suffering, what
                suffering = {fault.snapshot for fault in faults}
            for name in NAMES:
                if name in suffering:
                    with pytest.raises(ThinPoolError) as error:
                        damaged.pull(name)
                    if not lost_snapshot:
                        assert isinstance(error.value, StoreDamaged), what
                        assert error.value.key in keys_hurt, what
                        assert error.value.key in str(error.value)
                    damaged.assert_unfinished(name)
                else:
                    damaged.pull(name)
                    damaged.assert_whole(name)
                    damaged.pool.delete(name)
        for name in NAMES:
            damaged.pull(name)  # goes on with what arrived
            damaged.assert_whole(name)
            damaged.pool.delete(name)
    assert not list(damaged.store().held())


def test_a_lazy_device_of_a_damaged_store_gives_what_is_sound(damaged: Damaged) -> None:
    wanted = damaged.wanted["tue"]
    pack = next(path for path in damaged.files() if "packs" in path.parts)
    whole = pack.read_bytes()
    pack.write_bytes(whole[:PACK_HEAD_BYTES] + bytes(len(whole) - PACK_HEAD_BYTES))
    try:
        damaged.pull("tue", lazy=True)
    except StoreDamaged:
        pytest.fail("a lazy pull needs the manifest only")
    answers = []
    with session_on(damaged.pool, "tue") as session:
        for block in range(1040):
            try:
                assert session.read_bytes(block * BLOCK, BLOCK) == wanted.get(block, bytes(BLOCK))
                answers.append(True)
            except OSError as error:
                assert error.errno == errno.EIO
                assert damaged.key_of(pack) in str(error)
                answers.append(False)
    assert set(answers) == {True, False}
    pack.write_bytes(whole)
    with session_on(damaged.pool, "tue") as session:
        assert session.read_bytes(0, BLOCK) == wanted[0]
    damaged.pull("tue")
    damaged.assert_whole("tue")


def test_a_damaged_root_stops_the_collector(damaged: Damaged) -> None:
    damaged.store().forget("mon")
    (manifest,) = (path for path in damaged.files() if "snapshots" in path.parts)
    whole = manifest.read_bytes()
    before = damaged.files()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        manifest.write_bytes(whole[:cut])
        for _ in range(2):
            with pytest.raises(StoreDamaged) as error:
                collect(damaged.store(), grace_seconds=0)
            assert error.value.key == damaged.key_of(manifest)
        assert damaged.files() == before
    manifest.write_bytes(whole)
    damaged.pull("tue")
    damaged.assert_whole("tue")


def test_flipped_bits_of_the_description_of_a_store_destroy_nothing(damaged: Damaged) -> None:
    chance = random.Random(4)
    form = damaged.root / "format"
    whole = form.read_bytes()
    before = damaged.files()
    for _ in range(40):
        at = chance.randrange(len(whole))
        form.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        for work in (damaged.faults, lambda: collect(damaged.store(), grace_seconds=0)):
            try:
                found = work()
            except ThinPoolError:
                continue
            assert found is not None
        try:
            damaged.pull("tue")
        except ThinPoolError:
            damaged.assert_unfinished("tue")
        else:
            damaged.assert_whole("tue")
            damaged.pool.delete("tue")
        assert damaged.files() == before
    form.write_bytes(whole)
    damaged.pull("tue")
    damaged.assert_whole("tue")


def test_strange_objects_in_a_store_are_left_alone(damaged: Damaged) -> None:
    """What a tool, a file system or a person left there: neither an error of ours nor deleted by us."""
    strange = [
        damaged.root / folder / name
        for folder in ("packs", "packs/00", "condemned", "index", "clock")
        for name in (".nfs0000001", "README.txt", "0" * 32, "zz")
    ]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    damaged.store().forget("mon")
    for _ in range(2):
        collect(damaged.store(), grace_seconds=0)
    assert not damaged.faults()
    damaged.pull("tue")
    damaged.assert_whole("tue")

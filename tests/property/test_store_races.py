"""Hosts that push while the collector runs, and processes that are killed: nothing that was pushed is ever lost."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.fakes.store_source import FakeDevice, FakeSnapshot, restored
from thinpool.errors import StoreDamaged, StoreUnreachable
from thinpool.lazy_devices import PullRequest, _held
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation
from thinpool.store.backends import PARTIAL_SUFFIX, open_objects
from thinpool.store.collecting import collect
from thinpool.store.fetching import SnapshotReader
from thinpool.store.keys import CHUNK_BYTES, create_store
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.objects import Backend, Listed, Objects, PassingError
from thinpool.store.pushing import Push
from thinpool.store.store import Store
from thinpool.store.verifying import Verification

pytest.importorskip("obstore", reason="needs the package obstore")

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


class Dawdling:
    """A backend that takes its time at random, before and after what it does, and fails now and then."""

    def __init__(self, inner: Backend, seed: int, failures: float = 0.0) -> None:
        self._inner = inner
        self._random = random.Random(seed)
        self._failures = failures

    def _pause(self) -> None:
        time.sleep(self._random.random() ** 8 * 0.02)
        if self._random.random() < self._failures:
            raise PassingError("made up")

    def put(self, key: str, data: bytes, *, create: bool) -> bool:
        self._pause()
        done = self._inner.put(key, data, create=create)
        self._pause()
        return done

    def get(self, key: str, offset: int, length_bytes: int | None) -> bytes:
        self._pause()
        return self._inner.get(key, offset, length_bytes)

    def head(self, key: str) -> Listed:
        self._pause()
        return self._inner.head(key)

    def list(self, prefix: str) -> Iterator[Listed]:
        self._pause()
        found = list(self._inner.list(prefix))
        self._pause()
        return iter(found)

    def delete(self, keys: Sequence[str]) -> None:
        self._pause()
        self._inner.delete(keys)

    def now(self) -> float:
        self._pause()
        return self._inner.now()

    def sweep(self, before: float) -> int:
        self._pause()
        return self._inner.sweep(before)


def _store(url: str, seed: int, failures: float = 0.0) -> Store:
    plain = open_objects(url)
    keys = create_store(plain, None)
    dawdling = Dawdling(plain._backend, seed, failures)
    return Store(Objects(url, dawdling, attempts=8, sleep=lambda _: None), keys)


def _contents(store: Store, name: str) -> dict[int, bytes]:
    return restored(SnapshotReader(store, store.snapshot(name)))


def _expected(snapshot: FakeSnapshot) -> dict[int, bytes]:
    return {chunk: snapshot.content(chunk * CHUNK_BYTES, CHUNK_BYTES) for chunk in snapshot.mapped_chunks()}


class Host(threading.Thread):
    """Pushes increments of devices that share content with those of the other host, and forgets old ones."""

    def __init__(self, url: str, number: int, rounds: int) -> None:
        super().__init__()
        self._url, self._number, self._rounds = url, number, rounds
        self.failure: BaseException | None = None
        self.kept: dict[str, FakeSnapshot] = {}

    def run(self) -> None:
        try:
            self._push_all()
        except BaseException as error:
            self.failure = error

    def _push_all(self) -> None:
        chance = random.Random(self._number)
        known = KnownChunks(None)
        device = FakeDevice(65 * MIB)
        for round_number in range(self._rounds):
            for _ in range(4):
                # Few different contents: they vanish with one snapshot and come back with another, on both hosts.
                device.write(chance.randrange(1030), b"content %d" % chance.randrange(40))
            if chance.random() < 0.3:
                device.blocks.clear()
            snapshot = device.snapshot()
            name = f"host{self._number}-{round_number}"
            store = _store(self._url, round_number * 2 + self._number, 0.01)
            Push(store, snapshot, name, known).run()
            self.kept[name] = snapshot
            assert _contents(store, name) == _expected(snapshot)
            for old in list(self.kept):
                if chance.random() < 0.3:
                    store.forget(old)
                    del self.kept[old]
            if chance.random() < 0.2:
                device.snapshots.clear()


def _run_hosts(rounds: int) -> int:
    url = f"memory://{secrets.token_hex(8)}"
    create_store(open_objects(url), None)
    hosts = [Host(url, number, rounds) for number in range(2)]
    for host in hosts:
        host.start()
    collector = _store(url, 99)
    deleted = 0
    while any(host.is_alive() for host in hosts):
        deleted += collect(collector, grace_seconds=0).deleted
    for host in hosts:
        host.join()
        if host.failure is not None:
            raise host.failure
    plain = Store.open(url)
    assert not Verification(plain, read_data=True).run().faults
    kept = {name: snapshot for host in hosts for name, snapshot in host.kept.items()}
    assert {about.name for about in plain.descriptions()} == set(kept)
    for name, snapshot in kept.items():
        assert _contents(plain, name) == _expected(snapshot)
    collect(plain, grace_seconds=0)
    used = {pack for _, manifest in plain.manifests() for pack in manifest.packs}
    assert set(plain.packs()) == used
    return deleted


def test_two_hosts_push_while_the_collector_runs() -> None:
    assert _run_hosts(15) > 0


@pytest.mark.deep
def test_two_hosts_push_while_the_collector_runs_two_hundred_rounds() -> None:
    assert _run_hosts(200) > 0


def test_a_push_whose_packs_were_collected_while_it_slept_sends_them_again() -> None:
    """The intent was given up, the packs deleted; the push wakes up right before it makes its snapshot known."""
    url = f"memory://{secrets.token_hex(8)}"
    store = Store.open(url, create=True)
    device = FakeDevice(4 * MIB)
    device.write(3, b"something")
    snapshot = device.snapshot()
    push = Push(store, snapshot, "s", KnownChunks(None))
    publish = store.publish

    def sleep_first(manifest: object) -> None:
        store.publish = publish  # type: ignore[method-assign]
        collect(store, grace_seconds=0, lease_seconds=0)
        collect(store, grace_seconds=0, lease_seconds=0)
        assert not store.packs()
        publish(manifest)  # type: ignore[arg-type]

    store.publish = sleep_first  # type: ignore[method-assign,assignment]
    push.run()
    assert _contents(store, "s") == _expected(snapshot)
    assert not Verification(store, read_data=True).run().faults


@pytest.mark.parametrize("dies_with", [KeyboardInterrupt, None])
def test_a_snapshot_that_a_killed_push_left_without_packs_is_replaced(
    dies_with: type[BaseException] | None,
) -> None:
    """As above, but the push dies before it can take the snapshot back; or a pack of a good one is condemned."""
    store = Store.open(f"memory://{secrets.token_hex(8)}", create=True)
    device = FakeDevice(4 * MIB)
    device.write(3, b"something")
    snapshot, known = device.snapshot(), KnownChunks(None)
    publish = store.publish

    def sleep_and_die(manifest: object) -> None:
        store.publish = publish  # type: ignore[method-assign]
        collect(store, grace_seconds=0, lease_seconds=0)
        collect(store, grace_seconds=0, lease_seconds=0)
        publish(manifest)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    if dies_with is None:
        Push(store, snapshot, "s", known).run()
        for pack in store.packs():
            store.condemn(pack)
    else:
        store.publish = sleep_and_die  # type: ignore[method-assign,assignment]
        with pytest.raises(dies_with):
            Push(store, snapshot, "s", known).run()
        assert Verification(store, read_data=False).run().faults
    assert not Push(store, snapshot, "s", known).run().up_to_date
    collect(store, grace_seconds=0)
    assert not Verification(store, read_data=True).run().faults
    assert _contents(store, "s") == _expected(snapshot)
    assert Push(store, snapshot, "s", KnownChunks(None)).run().up_to_date


def test_a_push_does_not_end_another_of_the_same_host() -> None:
    """Both use one cache. The second ends, and the collector runs, right before the first makes its snapshot known."""
    url = f"memory://{secrets.token_hex(8)}"
    known = KnownChunks(None)
    first_store, store = Store.open(url, create=True), Store.open(url)
    first, second = FakeDevice(4 * MIB), FakeDevice(4 * MIB)
    first.write(3, b"something")
    second.write(4, b"something else")
    snapshot = first.snapshot()
    publish = first_store.publish

    def others_first(manifest: object) -> None:
        Push(store, second.snapshot(), "second", known).run()
        collect(store, grace_seconds=0)
        collect(store, grace_seconds=0)
        publish(manifest)  # type: ignore[arg-type]

    first_store.publish = others_first  # type: ignore[method-assign,assignment]
    Push(first_store, snapshot, "first", known).run()
    assert _contents(store, "first") == _expected(snapshot)
    assert not Verification(store, read_data=True).run().faults
    assert not store.objects.list("pending/")


def test_a_store_that_fails_now_and_then_is_asked_again_and_one_that_stays_away_is_named() -> None:
    url = f"memory://{secrets.token_hex(8)}"
    device = FakeDevice(65 * MIB)
    for block in range(200):
        device.write(block, secrets.token_bytes(99))
    snapshot = device.snapshot()
    unsteady = _store(url, 5, 0.2)
    Push(unsteady, snapshot, "s", KnownChunks(None)).run()
    assert _contents(unsteady, "s") == _expected(snapshot)
    away = _store(url, 6, 1.0)
    with pytest.raises(StoreUnreachable, match="snapshots/"):
        Push(away, device.snapshot(), "t", KnownChunks(None)).run()


@pytest.mark.parametrize("secret", [None, b"a key"])
def test_every_flipped_bit_and_lost_object_is_found_and_named(secret: bytes | None) -> None:
    url = f"memory://{secrets.token_hex(8)}"
    store = Store.open(url, secret, create=True)
    device = FakeDevice(70 * MIB)
    for block in (*range(20), 1025, 1026):
        device.write(block, secrets.token_bytes(600))
    snapshot = device.snapshot()
    Push(store, snapshot, "s", KnownChunks(None)).run()
    chance = random.Random(7)
    keys = [listed.key for listed in (*store.objects.list("packs/"), *store.objects.list("snapshots/"))]
    for _ in range(60):
        key = chance.choice(keys)
        whole = store.objects.get(key)
        bad = bytearray(whole)
        # The head of a pack says nothing that is used; everything behind it matters.
        at = chance.randrange(16 if key.startswith("packs/") else 0, len(bad))
        bad[at] ^= 1 << chance.randrange(8)
        store.objects.put(key, bytes(bad))
        report = Verification(store, read_data=True).run()
        assert [fault for fault in report.faults if fault.key == key]
        with pytest.raises(StoreDamaged) as damage:
            _contents(store, "s")
        assert damage.value.key == key
        store.objects.put(key, whole)
    for key in keys:
        whole = store.objects.get(key)
        store.objects.delete([key])
        if key.startswith("packs/"):
            assert [fault.key for fault in Verification(store, read_data=False).run().faults] == [key]
        store.objects.put(key, whole)
    assert _contents(store, "s") == _expected(snapshot)


def test_a_damaged_pack_that_was_condemned_is_not_relied_on() -> None:
    store = Store.open(f"memory://{secrets.token_hex(8)}", create=True)
    device, known = FakeDevice(4 * MIB), KnownChunks(None)
    for block in range(20):
        device.write(block, secrets.token_bytes(600))
    Push(store, device.snapshot(), "first", known).run()
    (chunks, _) = store.objects.list("packs/")
    bad = bytearray(store.objects.get(chunks.key))
    bad[500] ^= 4
    store.objects.put(chunks.key, bytes(bad))
    for pack in Verification(store, read_data=True).run().damaged_packs:
        store.condemn(pack)
    device.write(1, b"changed")
    second = device.snapshot()
    Push(store, second, "second", known).run()
    assert _contents(store, "second") == _expected(second)
    store.forget("first")
    collect(store, grace_seconds=0)
    assert not Verification(store, read_data=True).run().faults


# --- processes that are killed ---


def _command(*words: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "thinpool", *map(str, words)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _killed_until_done(after: Iterator[float], *words: str | Path) -> int:
    """Run a command, kill it after ever longer times until it ends by itself; how often it was killed."""
    kills = 0
    while True:
        process = _command(*words)
        try:
            _, said = process.communicate(timeout=next(after))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, said.decode()
        return kills


def _times(first: float, step: float) -> Iterator[float]:
    while True:
        yield first
        first += step


def _kill_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float, data_bytes: int) -> int:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, target, url = tmp_path / "source", tmp_path / "target", (tmp_path / "store").as_uri()
    for directory in (source, target):
        create_pool(directory, size_bytes=256 * MIB)
    contents = [random.Random(number).randbytes(data_bytes) for number in range(2)]
    pool = open_pool(PoolLocation.directory(source))
    pool.create_device("disk", 80 * MIB)
    entry = pool.catalog.by_name("disk")
    assert entry is not None
    session = pool.open_session(entry)
    for number, content in enumerate(contents):
        session.enter()
        session.write(number * data_bytes // 2, memoryview(content))
        session.leave()
        pool.create_snapshot("disk", f"s{number}", read_only=True)
    session.close()
    pool.close()
    kills = 0
    for number in range(2):
        kills += _killed_until_done(_times(0.25, step), "push", source, f"s{number}", url)
        kills += _killed_until_done(_times(0.2, step), "gc", url, "--grace", "0")
        assert not Verification(Store.open(url), read_data=True).run().faults
    kills += _killed_until_done(_times(0.3, step), "pull", url, target, "s1")
    pulled = open_pool(PoolLocation.directory(target))
    try:
        expected = bytearray(80 * MIB)
        expected[: len(contents[0])] = contents[0]
        expected[data_bytes // 2 : data_bytes // 2 + data_bytes] = contents[1]
        entry = pulled.catalog.by_name("s1")
        assert entry is not None
        assert pulled.open_session(entry).read_bytes(0, 80 * MIB) == expected
        assert len(pulled.catalog.entries()) == 1
    finally:
        pulled.close()
    return kills


def test_killed_pushes_pulls_and_collections_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _kill_everything(tmp_path, monkeypatch, 0.9, 16 * MIB) > 0


@pytest.mark.deep
def test_killed_at_many_instants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        assert _kill_everything(tmp_path / str(number), monkeypatch, 0.03, 40 * MIB) > 20


# --- what is left by the dead ---


NEW = "e" * 16  # as random as any


def _aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_unfinished_files_of_a_killed_push_go_and_fresh_ones_stay(tmp_path: Path) -> None:
    store = Store.open(tmp_path.as_uri(), create=True)
    device = FakeDevice(4 * MIB)
    device.write(3, b"something")
    snapshot = device.snapshot()
    Push(store, snapshot, "s", KnownChunks(None)).run()
    for key in ("packs/ab/x", "snapshots/y", "format"):
        (tmp_path / key).parent.mkdir(exist_ok=True)
        for age, word in ((7200, "01d" + "0" * 13), (0, NEW)):
            left = tmp_path / f"{key}.{word}{PARTIAL_SUFFIX}"
            left.write_bytes(b"half")
            _aged(left, age)
    assert collect(store).unfinished_writes == 3
    assert sorted(path.name for path in tmp_path.rglob(f"*{PARTIAL_SUFFIX}")) == [
        f"{name}.{NEW}{PARTIAL_SUFFIX}" for name in ("format", "x", "y")
    ]
    assert _contents(store, "s") == _expected(snapshot)


def test_an_object_whose_unfinished_file_is_swept_away_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push that was asleep for longer than the grace period, in the middle of a write."""
    store = Store.open(tmp_path.as_uri(), create=True)
    link, rename = os.link, Path.rename
    swept: list[str] = []

    def sweep_before(path: Path) -> None:
        if not swept:
            swept.append(str(path))
            _aged(path, 7200)
            assert store.objects.sweep(store.objects.now() - 3600) == 1

    def linked(source: Path, target: Path) -> None:
        sweep_before(source)
        link(source, target)

    def renamed(source: Path, target: Path) -> Path:
        sweep_before(source)
        return rename(source, target)

    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(Path, "rename", renamed)
    assert store.objects.create("index/one", b"whole")
    swept.clear()
    store.objects.put("index/two", b"whole")
    assert [store.objects.get(f"index/{name}") for name in ("one", "two")] == [b"whole"] * 2


def test_what_a_killed_collector_asked_the_time_with_goes() -> None:
    store = Store.open(f"memory://{secrets.token_hex(8)}", create=True)
    store.objects.put("clock/left", b"\n")
    assert collect(store, grace_seconds=3600).unfinished_writes == 0
    time.sleep(1.1)
    assert collect(store, grace_seconds=0).unfinished_writes == 1
    assert not store.objects.list("clock/")


def test_pulls_of_lost_pools_are_given_up_only_when_asked_to() -> None:
    store = Store.open(f"memory://{secrets.token_hex(8)}", create=True)
    device = FakeDevice(4 * MIB)
    device.write(3, b"something")
    Push(store, device.snapshot(), "s", KnownChunks(None)).run()
    store.hold(store.snapshot("s"))
    store.forget("s")
    for _ in range(2):
        assert collect(store, grace_seconds=0).pulls == 1
    assert store.packs()
    assert collect(store, grace_seconds=0, pull_seconds=0).pulls_given_up == 1
    collect(store, grace_seconds=0)
    assert not store.packs()


def test_verifying_beside_pushes_and_forgetting_sees_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that is pushed after the packs were listed, and one that is forgotten and collected after its manifest."""
    store = Store.open(f"memory://{secrets.token_hex(8)}", create=True)
    devices = [FakeDevice(4 * MIB) for _ in range(2)]
    for number, device in enumerate(devices):
        device.write(3, b"content %d" % number)
    Push(store, devices[0].snapshot(), "first", KnownChunks(None)).run()
    verification = Verification(store, read_data=True)
    Push(store, devices[1].snapshot(), "second", KnownChunks(None)).run()
    report = verification.run()
    assert (report.snapshots, report.faults) == (2, [])
    decoded = store.decoded

    def forgotten_meanwhile(key: str, content: bytes) -> object:
        monkeypatch.setattr(store, "decoded", decoded)
        manifest = decoded(key, content)
        store.forget(manifest.about.name)
        collect(store, grace_seconds=0)
        return manifest

    monkeypatch.setattr(store, "decoded", forgotten_meanwhile)
    report = Verification(store, read_data=True).run()
    assert (report.snapshots, report.faults, report.damaged_packs) == (1, [], set())


def test_a_pull_holds_what_the_name_stands_for_now() -> None:
    """Between a pull's look and its hold the snapshot is forgotten and collected, and another one gets its name."""
    url = f"memory://{secrets.token_hex(8)}"
    store = Store.open(url, create=True)
    seen = []
    for number in range(2):
        device = FakeDevice(4 * MIB)
        device.write(3, b"content %d" % number)
        snapshot = device.snapshot()
        Push(store, snapshot, "s", KnownChunks(None)).run()
        seen.append(store.snapshot("s"))
        if not number:
            store.forget("s")
            collect(store, grace_seconds=0)
            assert not store.packs()
    held, origin = _held(store, seen[0], PullRequest(url=url, snapshot="s", name="d"))
    assert held.encode() == seen[1].encode()
    assert [key for key, _ in store.held()] == [origin.root]
    assert restored(SnapshotReader(store, held)) == _expected(snapshot)

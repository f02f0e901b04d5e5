"""Histories of two hosts and a store, drawn from a seed: what devices live through, and how their snapshots travel.

In: the steps, what is expected of each, the checks at the end. Out: single devices and pools (`travel_hosts.py`), what a
device must hold (`device_model.py`), what they live through at home (`device_lives.py`).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.device_lives import CHANGES, DEVICES_MAX, ENDS, DeviceLives
from tests.fakes.device_model import ModelDevice, blocks_in
from tests.fakes.store_place import StorePlace
from tests.fakes.store_source import restored
from tests.fakes.travel_hosts import Host, chunks_of, watched_source
from tests.fakes.travel_streams import travel
from thinpool.errors import (
    BaseNotStored,
    DeviceIncomplete,
    DeviceReceiving,
    ThinPoolError,
)
from thinpool.lazy_devices import PullRequest
from thinpool.remote_blocks import is_lazy
from thinpool.store.collecting import collect
from thinpool.store.fetching import SnapshotReader
from thinpool.store.keys import CHUNK_BYTES
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.pushing import Push, SegmentWork
from thinpool.store.segments import SEGMENT_CHUNKS, Place
from thinpool.store.verifying import Verification

MIB = 1 << 20
BLOCK_SIZES = [CHUNK_BYTES, CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES, 4 * CHUNK_BYTES, MIB]
TRAVELS = {"push": 7, "forget": 2, "collect": 2, "verify": 1, "lose_cache": 1, "send": 2, "pull": 2}
LAZY = {
    "pull_lazily": 7,
    "hydrate": 5,
    "use_lazily": 24,
    "overtake": 9,
    "fork": 4,
    "away": 3,
    "back": 5,
    "refused": 4,
}


class PushedAnew(Push):
    """A push that tells which chunks it had to store anew because their packs are gone, condemned or sparse."""

    def __init__(self, *given: object, **named: object) -> None:
        super().__init__(*given, **named)  # type: ignore[arg-type]
        self.stale: set[int] = set()

    def _stale_work(self, manifest: object, stale: set[bytes]) -> list[SegmentWork]:
        work = super()._stale_work(manifest, stale)  # type: ignore[arg-type]
        for piece in work:
            for begin, end in piece.fresh:
                self.stale.update(
                    range(piece.number * SEGMENT_CHUNKS + begin, piece.number * SEGMENT_CHUNKS + end)
                )
        return work


class TravelHistory(DeviceLives):
    """One history. `counts` says how often each step was done."""

    def __init__(self, seed: int, work: Path, *, lazily: bool = False) -> None:
        self.seed = seed
        chance = random.Random(seed)
        self._work = work / f"history-{seed}"
        self._work.mkdir()
        self._weights = {**CHANGES, **ENDS, **TRAVELS, **(LAZY if lazily else {})}
        secret = b"a secret" if chance.random() < 0.15 else None
        place = StorePlace(self._work if chance.random() < 0.5 else None, secret)
        super().__init__(chance, place, background=lazily and chance.random() < 0.2)
        self._key = self._work / "key"
        self._key.write_bytes(secret or b"")
        self.hosts = [
            Host(self._work / f"host{number}", chance.choice(BLOCK_SIZES), background=self.background)
            for number in range(2)
        ]
        self.stored: dict[str, ModelDevice] = {}
        self._bases: dict[str, str] = {}
        self.log: list[str] = []

    # --- running ---

    def run(self, steps: int) -> None:
        """So many steps, then the end. Errors carry the steps that led to them."""
        try:
            for host in self.hosts:
                self._create(host)
                for kind in ("write", "write", "write", "snapshot", "push"):
                    self._step(host, kind)
            names = list(self._weights)
            for _ in range(steps):
                kind = self.chance.choices(names, list(self._weights.values()))[0]
                self._step(self.chance.choice(self.hosts), kind)
            self._end()
        except BaseException as error:
            error.add_note(
                f"history {self.seed}, blocks of {[host.block_bytes for host in self.hosts]}, {self.place.url}"
            )
            error.add_note("\n".join(self.log[-200:]))
            raise
        finally:
            for host in self.hosts:
                host.close()
            self.place.end()
            shutil.rmtree(self._work)

    def _step(self, host: Host, kind: str) -> None:
        step: Callable[[Host], str | None] = getattr(self, "_" + kind)
        self.log.append(f"{self.hosts.index(host)}: {kind} ...")
        done = step(host)
        if done is not None:  # else there was nothing to do it with
            self.log.append(f"{self.hosts.index(host)}: {kind} {done}")
            self.counts[kind] += 1

    def _end(self) -> None:
        """Everything is where it must be; what was pulled needs the store no more; each snapshot comes back alone."""
        if self.place.is_away:
            self.place.come_back()
        for host in self.hosts:
            for name in host.names(lazy=True):
                host.hydrate(name)
                with host.pool.engine.transaction:  # the background may be just completing it
                    assert not host.is_lazy(name)
        self._restore_each()
        for name in list(self.stored):
            self.place.store.forget(name)
        for _ in range(2):
            collect(self.place.store, grace_seconds=0)
        if not self._leaked:
            assert not list(self.place.store.held())
            assert not self.place.store.packs(), "packs that nobody needs"
        self.place.go_away()
        for host in self.hosts:
            host.check_all()
            host.restart()
            host.check_all()

    def _restore_each(self) -> None:
        """Each stored snapshot by itself: the others are forgotten and collected first, for some of them."""
        names = list(self.stored)
        self.chance.shuffle(names)
        fresh = Host(self._work / "fresh", self.chance.choice(BLOCK_SIZES))
        try:
            for name in names:
                self._pull_whole(fresh, name, "back-" + name)
                if self.chance.random() < 0.5:
                    self.place.store.forget(name)
                    del self.stored[name]
                    collect(self.place.store, grace_seconds=0)
                    self.counts["collect"] += 1
            fresh.check_all()
        finally:
            fresh.close()

    # --- the store ---

    def _push(self, host: Host) -> str | None:
        if self.place.is_away:
            return None
        if self.chance.random() < 0.5:
            # One day more, as in a rotation.
            for change in self.chance.choices(["write", "write", "zero", "discard", "resize"], k=2):
                self._step(host, change)
            self._step(host, "snapshot")
        name = self._one_of(host.names(writable=False, lazy=False)[-2:])
        if name is None:
            return None
        model, stored_as = host.models[name], self._new_name("p")
        with watched_source(host.pool, name) as source:
            push = PushedAnew(self.place.store, source, stored_as, host.known)
            relatives = source.relatives_by_name()
            report = push.run()
            read = blocks_in(source.ranges, CHUNK_BYTES)
            assert report.read_bytes == len(read) * CHUNK_BYTES, "something was read or named twice"
        if report.base is not None:
            # An unchanged block is neither read nor named.
            may = self._changed_blocks(host, model, report.base, relatives)
            assert read <= may | push.stale, ("unchanged chunks were read", read - may - push.stale)
            self.counts["increments"] += 1
        self.stored[stored_as] = model.copy()
        self.log.append(f"{name}: {report}, {relatives}")
        self._check_stored(stored_as)
        return f"{name} as {stored_as}, since {report.base}, {len(read)} chunks"

    def _changed_blocks(
        self, host: Host, model: ModelDevice, base: str, relatives: list[tuple[str, str | None]]
    ) -> set[int]:
        """Chunks that may differ from the base of an increment: of the first relative with its content and mappings."""
        about = self.place.store.snapshot(base).about
        old = next(
            host.models[name]
            for name, content_id in relatives
            if content_id == about.device
            and sum(1 for _ in host.models[name].chunks()) * CHUNK_BYTES == about.mapped_bytes
        )
        return chunks_of(model.changed_since(old), host.block_bytes, CHUNK_BYTES)

    def _check_stored(self, name: str) -> None:
        """A snapshot in the store has the chunks of its device, no others, with their content."""
        reader = SnapshotReader(self.place.store, self.place.store.snapshot(name))
        assert reader.size_bytes == self.stored[name].size_bytes
        found, expected = restored(reader), dict(self.stored[name].chunks())
        assert found.keys() == expected.keys(), (name, found.keys() ^ expected.keys())
        assert found == expected, (name, [chunk for chunk in found if found[chunk] != expected[chunk]])

    def _forget(self, host: Host) -> str | None:
        name = self._one_of(list(self.stored))
        if name is None or self.place.is_away:
            return None
        self.place.store.forget(name)
        del self.stored[name]
        return name

    def _collect(self, host: Host) -> str | None:
        if self.place.is_away:
            return None
        report = collect(self.place.store, grace_seconds=0)
        for name in self.stored:
            self._check_stored(name)
        return f"{report.deleted} packs"

    def _verify(self, host: Host) -> str | None:
        if self.place.is_away:
            return None
        report = Verification(self.place.store, read_data=True).run()
        assert not report.faults
        assert report.snapshots == len(self.stored)
        return ""

    def _lose_cache(self, host: Host) -> str:
        host.known = KnownChunks(None)
        return ""

    def _request(self, stored: str, name: str, *, lazy: bool, read_only: bool) -> PullRequest:
        key = None if self.place.secret is None else str(self._key)
        return PullRequest(self.place.url, stored, name, lazy=lazy, read_only=read_only, key_file=key)

    def _begin_pull(self, host: Host, request: PullRequest) -> PullRequest:
        """On a base where there may be one: any device whose content is known, which the store may know or not."""
        known = [
            entry.name for entry in host.pool.catalog.entries() if entry.content_id and not is_lazy(entry)
        ]
        base = self._one_of(known) if self.chance.random() < 0.6 else None
        try:
            host.pool.begin_pull(replace(request, base=base))
        except BaseNotStored:
            host.pool.begin_pull(request)
            return request
        if base is not None:
            self.counts["pulls on a base"] += 1
            self._bases[request.name] = base
        return replace(request, base=base)

    def _pulled(self, host: Host, stored: str, name: str) -> ModelDevice:
        """What a pulled device must be.

        Zeros that did not change since the base are a hole or allocated as they are in the base, which may have another
        opinion of it than the store: one content in pools of different block sizes.
        """
        model = ModelDevice.pulled(self.stored[stored], host.block_bytes)
        base = host.models.get(self._bases.pop(name, ""))
        if base is not None:
            missing, mapped = host.missing(name), host.mapped(name)
            for number in (set(model.blocks) | set(base.blocks)) - missing:
                if number * model.block_bytes < min(model.size_bytes, base.size_bytes) and not any(
                    any(one.blocks.get(number, b"")) for one in (model, base)
                ):
                    model.blocks.pop(number, None)
                    if number in mapped:
                        model.blocks[number] = bytearray(model.block_bytes)
        return model

    def _pull_whole(self, host: Host, stored: str, name: str) -> None:
        request = self._request(stored, name, lazy=False, read_only=self.chance.random() < 0.7)
        request = self._begin_pull(host, request)
        entry = host.entry(name)
        if not self.background:
            with pytest.raises(DeviceReceiving):
                host.pool.open_session(entry)
        host.hydrate(name, 1)
        host.pool.begin_pull(request)
        assert host.hydrate(name)
        host.models[name] = self._pulled(host, stored, name)
        host.check(name)

    def _pull(self, host: Host) -> str | None:
        stored = self._one_of(list(self.stored))
        if stored is None or self.place.is_away or len(host.models) >= DEVICES_MAX:
            return None
        name = self._new_name("w")
        self._pull_whole(host, stored, name)
        return f"{stored} as {name}"

    def _send(self, host: Host) -> str | None:
        """A snapshot to the other host in a stream, on top of a base where both have one."""
        name = self._one_of(host.names(writable=False, lazy=False))
        other = self.hosts[1 - self.hosts.index(host)]
        if name is None or len(other.models) >= DEVICES_MAX:
            return None
        made = self._new_name("v")
        base = travel(host, name, other, made, self.chance)
        other.check(made)
        return f"{name} as {made} on {base}"

    # --- devices that are partly in the store ---

    def _pull_lazily(self, host: Host) -> str | None:
        stored = self._one_of(list(self.stored))
        if stored is None or self.place.is_away or len(host.models) >= DEVICES_MAX:
            return None
        name = self._new_name("z")
        self._begin_pull(host, self._request(stored, name, lazy=True, read_only=self.chance.random() < 0.3))
        host.models[name] = self._pulled(host, stored, name)
        host.check(name)
        return f"{stored} as {name}"

    def _hydrate(self, host: Host) -> str | None:
        name = self._one_of(host.names(lazy=True))
        if name is None:
            return None
        try:
            complete = host.hydrate(name, self.chance.choice([None, 1, 2, 5]))
        except ThinPoolError:
            assert self.place.is_away
            complete = False
        self._leaked |= complete and self.place.is_away
        host.check(name)
        if not complete and self.chance.random() < 0.5:
            self._step(host, "kill")  # what is known to be here must be, also when nobody committed since
        return f"{name}{', complete' if complete else ''}"

    def _use_lazily(self, host: Host) -> str | None:
        name = self._one_of(host.names(lazy=True))
        if name is None:
            return None
        kinds = ["read"] if host.entry(name).read_only else ["read", "write", "zero", "discard"]
        kind = self.chance.choice(kinds)
        done = self._changed(host, name, kind)
        host.check(name)
        return f"{kind} {done}"

    def _overtake(self, host: Host) -> str | None:
        """A block is changed while its old content is on its way from the store: the newer one stays."""
        name = self._one_of([name for name in host.names(lazy=True, writable=True) if host.missing(name)])
        if name is None or self.place.is_away or self.background:
            return None
        lazy, model = host.pool.lazy.of(host.entry(name)), host.models[name]
        assert lazy is not None
        reader = lazy.reader(1)
        asked, unit = reader.fetch, host.block_bytes
        number = self.chance.choice(sorted(host.missing(name)))
        at, length = number * unit, model.inside(number)
        change = self.chance.choice(["write", "zero", "zero and keep", "discard"])

        def overtaken(places: Iterable[Place], found: Callable[[Place, bytes], None]) -> None:
            asked(places, found)
            if change == "write":
                host.write(name, at, self._content(length))
            elif change == "discard":
                host.trim(name, at, length)
            else:
                host.zero(name, at, length, keep=change == "zero and keep")

        reader.fetch = overtaken  # type: ignore[method-assign]
        try:
            lazy.fetch(range(number, number + 1), reader)
        finally:
            del reader.fetch
        host.check(name)
        return f"{change} {name} {at}+{length}"

    def _fork(self, host: Host) -> str | None:
        origin = self._one_of(host.names(lazy=True))
        if origin is None or len(host.models) >= DEVICES_MAX:
            return None
        name = self._new_name("f")
        host.snapshot(origin, name, read_only=self.chance.random() < 0.5)
        host.check(name)
        return f"{name} of {origin}"

    def _away(self, host: Host) -> str | None:
        if self.place.is_away:
            return None
        self._leaked |= self.background  # a hold that is to go meanwhile stays
        self.place.go_away()
        return ""

    def _back(self, host: Host) -> str | None:
        if not self.place.is_away:
            return None
        self.place.come_back()
        return ""

    def _refused(self, host: Host) -> str | None:
        """What needs a whole device is refused, and changes nothing."""
        name = self._one_of(host.names(lazy=True))
        whole = self._one_of(host.names(lazy=False, writable=True))
        if name is None or whole is None or self.background:
            return None
        pool = host.pool
        attempts: list[Callable[[], object]] = [
            lambda: pool.resize(name, MIB, shrink=True),
            lambda: pool.diff(name, whole),
            lambda: pool.diff(whole, name),
            lambda: pool.rollback(whole, name),
            lambda: pool.rollback(name, whole),
        ]
        if host.entry(name).read_only:
            attempts.append(lambda: watched_source(pool, name).__enter__())
        for attempt in attempts:
            with pytest.raises(DeviceIncomplete):
                attempt()
        host.check(name)
        host.check(whole)
        return name

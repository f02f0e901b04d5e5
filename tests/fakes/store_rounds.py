"""Rounds of separate processes on one store: two hosts push while others collect, forget, verify and pull; some are killed.

In: one round (everything at once, random SIGKILLs, then the judgement), and the judgement at the end. Out: what a host
does (`store_hosts.py`), how many rounds and where (`tools/store-rounds` and the tests).

What must be true after each round: the store holds exactly the snapshots that were reported as pushed and not forgotten,
and perhaps ones whose push was killed; every chunk any of them names is there and right; what they name is what the
host's device held; and what was just pushed comes back byte for byte in a pull. At the end, after a grace period,
nothing is left that no snapshot needs, whoever was killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.fakes.store_hosts import CONTENTS, Contents, Host, bytes_of
from thinpool.errors import ExitCode
from thinpool.store.backends import PARTIAL_SUFFIX
from thinpool.store.fetching import read_segments
from thinpool.store.index import INDEX
from thinpool.store.keys import CHUNK_BYTES
from thinpool.store.manifests import Manifest
from thinpool.store.segments import SEGMENT_CHUNKS
from thinpool.store.store import PACKS, SNAPSHOTS, Store
from thinpool.store.verifying import Verification

COMMAND_SECONDS_MAX = 900.0  # for a machine that swaps; it takes a second otherwise
DAY_SECONDS = 86400.0
GRACES = (0.0, 0.0, 0.0, 1.0)
# Snapshots that a round forgets. Where all go, so do the packs that a push beside it means to rely on.
SHARES_FORGOTTEN = (0.0, 0.3, 0.6, 1.0)
# 0 gives up whoever pushes at that instant: the hard case, that a laptop asleep for a day makes otherwise.
LEASES = (DAY_SECONDS, DAY_SECONDS, 20.0, 0.0)


class Violation(AssertionError):  # noqa: N818 -- it says what happened
    """A promise of the store was broken."""


@dataclass(slots=True)
class Totals:
    """What all rounds came to."""

    rounds: int = 0
    pushes: int = 0
    pushes_asleep: int = 0
    pushes_killed: int = 0
    pushes_abandoned: int = 0
    collections: int = 0
    collections_killed: int = 0
    packs_deleted: int = 0
    pushes_given_up: int = 0
    forgotten: int = 0
    verified_beside: int = 0
    pulled_beside: int = 0
    pulled_after: int = 0


class Rounds:
    """Rounds on the store at `url`, whose credentials are in the environment. `run` does one, `finish` judges the end."""

    def __init__(self, work: Path, url: str, seed: int) -> None:
        self._url = url
        self._chance = random.Random(seed)
        skew = 2 * DAY_SECONDS
        self._hosts = [Host(work, f"host{number}", sign * skew) for number, sign in ((0, -1), (1, 1))]
        self._puller = Host(work, "puller", -skew / 48)
        self._operator = Host(work, "operator", skew / 48)
        self._kept: dict[str, Contents] = {}
        self._perhaps: dict[str, Contents] = {}
        self._seconds = {"push": 0.8, "gc": 0.6}
        self.totals = Totals()
        self._store = Store.open(url, create=True)

    def run(self) -> None:
        """One round. Raises Violation."""
        number = self.totals.rounds
        pushing = threading.Barrier(1 + len(self._hosts))
        plans: list[Callable[[], None]] = []
        before = dict(self._kept)
        share = self._chance.choice(SHARES_FORGOTTEN)
        forgotten = [name for name in before if self._chance.random() < share]
        for host in self._hosts:
            name = f"{host.name}-{number}"
            contents = host.change(self._chance, name)
            plans.append(self._pushing(host, name, contents, self._seed(), pushing))
        self._ended = threading.Event()
        plans.append(self._collecting(self._seed()))
        if forgotten:
            plans.append(self._forgetting(forgotten, self._chance.random()))
        if self._chance.random() < 0.5:
            plans.append(self._verify_beside)
        if before and self._chance.random() < 0.5:
            name = self._chance.choice(list(before))
            plans.append(lambda: self._pull(name, before[name], may_be_gone=name in forgotten))
        self._all_at_once(plans, pushing)
        self.totals.rounds += 1
        self._judge([f"{host.name}-{number}" for host in self._hosts])

    def _seed(self) -> random.Random:
        return random.Random(self._chance.getrandbits(40))

    def _all_at_once(self, plans: list[Callable[[], None]], pushing: threading.Barrier) -> None:
        failures: list[BaseException] = []

        def guarded(plan: Callable[[], None]) -> None:
            try:
                plan()
            except BaseException as error:
                failures.append(error)
                pushing.abort()
                self._ended.set()

        threads = [threading.Thread(target=guarded, args=(plan,)) for plan in plans]
        for thread in threads:
            thread.start()
        with suppress(threading.BrokenBarrierError):  # the failure is raised below
            pushing.wait(10 * COMMAND_SECONDS_MAX)
        self._ended.set()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    # --- what runs beside each other ---

    def _command(
        self,
        host: Host,
        *words: str | Path,
        kill_after: float | None = None,
        asleep: tuple[float, float] | None = None,
        may: tuple[int, ...] = (0,),
    ) -> tuple[int, bytes]:
        """Run a command: its status and output. Killed ones have status -9. Raises Violation for any other failure.

        `asleep` are the instant at which its host falls asleep, and for how long, in seconds.
        """
        begun = time.monotonic()
        process = host.start(*words)
        if asleep is not None:
            time.sleep(asleep[0])
            process.send_signal(signal.SIGSTOP)
            time.sleep(asleep[1])
            process.send_signal(signal.SIGCONT)
            begun += asleep[1]
        try:
            output, said = process.communicate(timeout=kill_after or COMMAND_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            output, said = process.communicate()
            if kill_after is None:
                raise Violation(f"{words} did not end: {said.decode()}") from None
        status = process.returncode
        if status == 0 and str(words[0]) in self._seconds:
            kind = str(words[0])
            self._seconds[kind] = 0.7 * self._seconds[kind] + 0.3 * (time.monotonic() - begun)
        if status not in may and not (kill_after is not None and status == -signal.SIGKILL):
            raise Violation(f"{host.name}: {words} ended with {status}: {said.decode() or output.decode()}")
        return status, output

    def _instant(self, chance: random.Random, kind: str) -> float | None:
        """When to kill a command, if at all: any time until it would end, most of all while it works."""
        if chance.random() < 0.5:
            return None
        return self._seconds[kind] * (0.3 + 0.75 * chance.random())

    def _sleep(self, chance: random.Random) -> tuple[float, float] | None:
        """Whether a push is put to sleep: long enough for others to forget its base and to collect that."""
        if chance.random() < 0.4:
            return None
        return self._seconds["push"] * (0.35 + 0.65 * chance.random()), 1.0 + chance.random()

    def _pushing(
        self, host: Host, name: str, contents: Contents, chance: random.Random, done: threading.Barrier
    ) -> Callable[[], None]:
        def push() -> None:
            # A snapshot may be there from the instant before a push that was killed would have said so.
            self._perhaps[name] = contents
            while True:
                kill, asleep = self._instant(chance, "push"), self._sleep(chance)
                words = ("push", host.pool, name, self._url)
                # One or the other: a push that is to be killed has no time to sleep.
                if kill is not None:
                    status, _ = self._command(host, *words, kill_after=kill)
                else:
                    status, _ = self._command(host, *words, asleep=asleep)
                    self.totals.pushes_asleep += asleep is not None
                if status == 0:
                    self._kept[name] = self._perhaps.pop(name)
                    self.totals.pushes += 1
                    break
                self.totals.pushes_killed += 1
                if chance.random() < 0.3:
                    self.totals.pushes_abandoned += 1
                    break
            done.wait()

        return push

    def _collecting(self, chance: random.Random) -> Callable[[], None]:
        def collect() -> None:
            while True:
                grace, lease = chance.choice(GRACES), chance.choice(LEASES)
                words = ("gc", self._url, "--grace", str(grace), "--lease", str(lease), "--json")
                status, output = self._command(self._operator, *words, kill_after=self._instant(chance, "gc"))
                self.totals.collections += 1
                if status == 0:
                    self._count(json.loads(output)["collected"])
                else:
                    self.totals.collections_killed += 1
                if self._ended.wait(0.2):
                    return

        return collect

    def _count(self, collected: dict[str, Any]) -> None:
        self.totals.packs_deleted += collected["deleted"]
        self.totals.pushes_given_up += collected["pushes_given_up"]

    def _forgetting(self, names: list[str], delay: float) -> Callable[[], None]:
        def forget() -> None:
            time.sleep(delay * self._seconds["push"])
            self._command(self._operator, "forget", self._url, *names)
            for name in names:
                del self._kept[name]
            self.totals.forgotten += len(names)

        return forget

    def _verify_beside(self) -> None:
        self._command(self._operator, "verify", self._url, "--read-data")
        self.totals.verified_beside += 1

    def _pull(self, name: str, contents: Contents, *, may_be_gone: bool) -> None:
        """Pull a snapshot and compare it; one that is being forgotten may be found gone, and nothing else."""
        may = (0, int(ExitCode.NOT_FOUND)) if may_be_gone else (0,)
        status, _ = self._command(self._puller, "pull", self._url, self._puller.pool, name, may=may)
        if status == 0:
            content, mapped = self._puller.take(name)
            if content != bytes_of(contents) or mapped != len(contents) * CHUNK_BYTES:
                raise Violation(f"{name} was pulled and is not what was pushed")
        self.totals.pulled_beside += 1

    # --- judging ---

    def _judge(self, fresh: list[str]) -> None:
        store = self._store
        report = Verification(store, read_data=True).run()
        if report.faults:
            raise Violation(f"faults: {report.faults[:3]}")
        there = {manifest.about.name: manifest for _, manifest in store.manifests()}
        missing, strange = self._kept.keys() - there, there.keys() - self._kept - self._perhaps.keys()
        if missing or strange:
            raise Violation(f"missing: {sorted(missing)}, not forgotten: {sorted(strange)}")
        for name, manifest in there.items():
            self._compare(manifest, self._kept[name] if name in self._kept else self._perhaps[name])
        for name in fresh:
            if name in self._kept:
                self._pull(name, self._kept[name], may_be_gone=False)
                self.totals.pulled_beside -= 1
                self.totals.pulled_after += 1
        # A push that was killed at its very end did publish: from now on its snapshot is to stay.
        self._kept |= {name: self._perhaps[name] for name in there.keys() & self._perhaps.keys()}
        self._perhaps.clear()

    def _compare(self, manifest: Manifest, contents: Contents) -> None:
        """Does it name what the device held? That the named chunks are right was proven."""
        named = {
            number * SEGMENT_CHUNKS + position: place.name if place.length_bytes else b""
            for number, segment in read_segments(self._store, manifest, list(manifest.segments)).items()
            for position, place in segment.chunks.items()
        }
        expected = {
            position: self._store.keys.content_id(CONTENTS[content]) if content else b""
            for position, content in contents.items()
        }
        if named != expected:
            raise Violation(f"{manifest.about.name} holds something else than the device did")

    def finish(self) -> None:
        """Collect until a grace period is over, and look what is left. Raises Violation."""
        for _ in range(2):  # one gives up the pushes that were killed, the next marks what they had sent
            self._command(self._operator, "gc", self._url, "--grace", "1", "--lease", "0")
        time.sleep(2.5)
        _, output = self._command(self._operator, "gc", self._url, "--grace", "1", "--lease", "0", "--json")
        self._count(json.loads(output)["collected"])
        store = self._store
        used = {pack for _, manifest in store.manifests() for pack in manifest.packs}
        if set(store.packs()) != used:
            raise Violation(
                f"{len(set(store.packs()) ^ used)} packs are there and not needed, or the other way"
            )
        pushes = {pack.hex()[:24] for pack in used}
        for listed in store.objects.list(""):
            index_of = listed.key.removeprefix(INDEX).split("-")[0]
            if listed.key == "format" or listed.key.startswith((SNAPSHOTS, PACKS)) or index_of in pushes:
                continue
            raise Violation(f"{listed.key} is left over")
        if self._url.startswith("file:"):
            left = [
                name
                for _, _, names in os.walk(unquote(urlsplit(self._url).path))
                for name in names
                if name.endswith(PARTIAL_SUFFIX)
            ]
            if left:
                raise Violation(f"{left} are left over")
        self._judge([])

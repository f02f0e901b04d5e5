"""Random histories of real pools, a store and streams between them: whatever travels arrives as the model says.

`tests/fakes/travel_history.py` has the steps and what is compared after each of them.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.fakes.device_model import ModelDevice
from tests.fakes.store_place import StorePlace
from tests.fakes.transfer_pools import WORK
from tests.fakes.travel_history import TravelHistory
from tests.fakes.travel_hosts import Host, watched_source
from thinpool import hydration, lazy_device
from thinpool.lazy_devices import PullRequest
from thinpool.store import keys, objects
from thinpool.store.keys import CHUNK_BYTES
from thinpool.store.pushing import Push

pytest.importorskip("obstore", reason="needs the package obstore")

# Each of them found a fault that was put in on purpose, or one that was there.
SEEDS = (5, 7, 12, 32)
LAZY_SEEDS = (100, 103, 105, 112, 121)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Neither the pauses while a store is away nor the cost of a passphrase is what is tested here, nor a window of 8 MiB.
    monkeypatch.setattr(objects, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(lazy_device, "AWAY_SECONDS", 0.0)
    monkeypatch.setattr(hydration, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(hydration, "PAUSE_SECONDS_MAX", 0.05)
    monkeypatch.setattr(hydration, "WINDOW_BYTES", 256 << 10)
    monkeypatch.setattr(keys, "SCRYPT_COST", 1 << 4)
    path = Path(tempfile.mkdtemp(prefix="thinpool-travels-", dir=WORK))
    yield path
    shutil.rmtree(path)


def run(work: Path, seeds: Iterable[int], steps: int, *, lazily: bool) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        history = TravelHistory(seed, work, lazily=lazily)
        history.run(steps)
        counts.update(history.counts)
    return counts


def test_histories_through_a_store(work: Path) -> None:
    counts = run(work, SEEDS, 60, lazily=False)
    assert (
        min(
            counts[kind]
            for kind in ("push", "increments", "collect", "pull", "send", "kill", "pulls on a base")
        )
        > 3
    )


def test_histories_of_lazy_devices(work: Path) -> None:
    counts = run(work, LAZY_SEEDS, 80, lazily=True)
    assert (
        min(counts[kind] for kind in ("pull_lazily", "use_lazily", "overtake", "hydrate", "fork", "refused"))
        > 3
    )
    assert counts["refused while the store is away"]


def test_a_block_that_is_known_to_be_here_survives_a_power_cut(work: Path) -> None:
    """Its mapping is durable before the list of remote blocks says that it need not be fetched."""
    place = StorePlace(work)
    source, target = Host(work / "source", CHUNK_BYTES), Host(work / "target", CHUNK_BYTES)
    try:
        source.pool.create_device("disk", 64 * CHUNK_BYTES)
        source.models["disk"] = ModelDevice(64 * CHUNK_BYTES, CHUNK_BYTES)
        source.write("disk", 0, random.Random(1).randbytes(32 * CHUNK_BYTES))
        source.snapshot("disk", "image", read_only=True)
        with watched_source(source.pool, "image") as watched:
            Push(place.store, watched, "image", source.known).run()
        target.pool.begin_pull(PullRequest(place.url, "image", "copy", lazy=True))
        target.models["copy"] = ModelDevice.pulled(source.models["image"], CHUNK_BYTES)
        target.settle()
        assert not target.hydrate("copy", 1)
        assert 0 < len(target.missing("copy")) < 32
        target.kill(place, power_cut=True)
        target.check("copy")
        assert target.hydrate("copy")
        target.check("copy")
    finally:
        source.close()
        target.close()


@pytest.mark.deep
@pytest.mark.timeout(0)
@pytest.mark.parametrize("lazily", [False, True])
def test_many_histories(work: Path, lazily: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind for half of THINPOOL_DEEP_MINUTES; THINPOOL_DEEP_SEED says where the seeds begin."""
    end = time.monotonic() + 30 * float(os.environ.get("THINPOOL_DEEP_MINUTES", "30"))
    seed = int(os.environ.get("THINPOOL_DEEP_SEED", "1000"))
    counts: Counter[str] = Counter()
    histories = 0
    while time.monotonic() < end:
        counts += run(
            work, range(seed + histories, seed + histories + 1), 60 + histories % 5 * 60, lazily=lazily
        )
        histories += 1
    with capsys.disabled():
        print(f"\n{histories} histories, {counts.total()} steps: {dict(counts)}")

"""Receiving, cut after every single step that reaches the disk; and increments of snapshots taken under load.

A kill is imitated by a copy of the pool's files: whatever was written up to then is there, and nothing else. What a
power cut may do beyond that, and at any write, is the business of the crash search (`test_transfer_cuts.py`).
"""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.transfer_pools import (
    BLOCK,
    WORK,
    boundaries,
    content,
    new_pool,
    session_on,
    stream_of,
    take_in,
    write,
)
from thinpool import receiving
from thinpool.catalog import Catalog
from thinpool.engine import Engine
from thinpool.errors import StreamDamaged
from thinpool.opening import open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.receiving import ReceiveOptions, receive

MIB = 1 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="thinpool-steps-", dir=WORK))
    yield path
    shutil.rmtree(path)


class Copies:
    """Copies of a pool's files, one before and one after each step that writes."""

    def __init__(self, root: Path, target: Path) -> None:
        self._root, self._target = root, target
        self.made: list[Path] = []

    def take(self) -> None:
        self.made.append(self._target / str(len(self.made)))
        command = ["cp", "-r", "--sparse=always", str(self._root), str(self.made[-1])]
        subprocess.run(command, check=True)

    def around(self, patch: pytest.MonkeyPatch) -> None:
        steps = ((Catalog, "stage"), (Catalog, "promote"), (Catalog, "apply"), (Engine, "commit"))
        for owner, name in steps:
            patch.setattr(owner, name, self._copying(getattr(owner, name)))

    def _copying(self, step):
        def copying(*arguments, **options):
            self.take()
            result = step(*arguments, **options)
            self.take()
            return result

        return copying


def source_with_two_days(place: Path) -> tuple[bytes, bytes, bytes, bytes]:
    """Streams of `mon` and of `tue` on top of it, and the contents of both."""
    noise = random.Random(9)
    with new_pool(place / "source", size_bytes=16 * MIB) as pool:
        pool.create_device("disk", 2 * MIB)
        write(pool, "disk", 0, noise.randbytes(MIB))
        pool.create_snapshot("disk", "mon", read_only=True)
        write(pool, "disk", BLOCK, noise.randbytes(3 * BLOCK))
        pool.resize("disk", 3 * MIB)
        pool.create_snapshot("disk", "tue", read_only=True)
        streams = stream_of(pool, "mon"), stream_of(pool, "tue", "mon")
        return *streams, content(pool, "mon"), content(pool, "tue")


def states(copy: Path) -> dict[str, bytes | None]:
    """Whole devices with their contents, half-received ones with None."""
    pool = open_pool(PoolLocation.directory(copy))
    try:
        return {info.name: None if info.receiving else content(pool, info.name) for info in pool.devices()}
    finally:
        pool.close()


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize("name", ["tue", "replica"])
def test_a_kill_after_any_step(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, resumable: bool):
    full, increment, monday, tuesday = source_with_two_days(place)
    with new_pool(place / "target", size_bytes=16 * MIB) as target:
        take_in(target, full, "replica")
        copies = Copies(place / "target", place)
        with monkeypatch.context() as patch:
            copies.around(patch)
            cut = boundaries(increment)[2]
            if resumable:
                with pytest.raises(StreamDamaged):
                    take_in(target, increment[:cut], name, resumable=True)
                token = next(info.resume_token for info in target.devices() if info.resume_token)
                source = open_pool(PoolLocation.directory(place / "source"), read_only=True)
                increment = stream_of(source, token=token)
                source.close()
            take_in(target, increment, name)
    assert len(copies.made) > 10
    seen = set()
    for copy in copies.made:
        found = states(copy)
        half = found.pop(f"{name}/receiving", b"")
        seen.add((half is None, found.get(name) == tuesday))
        if name == "replica":
            assert found.keys() == {"replica"}
            assert found["replica"] in (monday, tuesday)
        else:
            assert found["replica"] == monday
            assert found.get("tue", tuesday) == tuesday
        assert not (half is None and found.get(name) == tuesday), "both at once"
    assert seen == {(False, False), (True, False), (False, True)}


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize("deleted", [False, True])
def test_what_becomes_of_the_base_meanwhile_is_not_forgotten(
    place: Path, monkeypatch: pytest.MonkeyPatch, deleted: bool, resumable: bool
):
    """The row of a device that is being received is changed by others too: its base gets another name, or goes."""
    monkeypatch.setattr(receiving, "NOTE_SECONDS", -1.0)
    full, increment, _, tuesday = source_with_two_days(place)
    with new_pool(place / "target", size_bytes=16 * MIB) as target:
        take_in(target, full, "mon")

        def change(_done: int, _total: int) -> None:
            if target.catalog.by_name("mon") is not None:
                if deleted:
                    target.delete("mon")
                else:
                    target.rename("mon", "monday")

        options = ReceiveOptions("tue", resumable=resumable)
        receive(target, io.BytesIO(increment).readinto, options, change)
        assert target.info("tue").origin == (None if deleted else "monday")
        assert content(target, "tue") == tuesday


def test_increments_of_snapshots_taken_under_load(place: Path):
    """A writer never stops; every snapshot is what all increments up to it make."""
    stopping = threading.Event()
    with new_pool(place / "a", metadata_bytes=64 * MIB) as ours, new_pool(place / "b") as theirs:
        ours.create_device("disk", 64 * BLOCK)

        def work() -> None:
            noise = random.Random(4)
            with session_on(ours, "disk") as session:
                while not stopping.is_set():
                    block = noise.randrange(64)
                    if noise.random() < 0.2:
                        session.trim(block * BLOCK, 2 * BLOCK if block < 63 else BLOCK)
                        continue
                    session.enter()
                    session.write(
                        block * BLOCK + noise.randrange(BLOCK // 2), memoryview(noise.randbytes(3000))
                    )
                    session.leave()
                    session.sent()

        writer = threading.Thread(target=work)
        writer.start()
        try:
            for number in range(25):
                ours.create_snapshot("disk", f"s{number}", read_only=True)
        finally:
            stopping.set()
            writer.join()
        compare_chain(ours, theirs, 25)


def compare_chain(ours: Pool, theirs: Pool, count: int) -> None:
    for number in range(count):
        base = f"s{number - 1}" if number else None
        take_in(theirs, stream_of(ours, f"s{number}", base), f"s{number}")
        assert content(theirs, f"s{number}") == content(ours, f"s{number}")

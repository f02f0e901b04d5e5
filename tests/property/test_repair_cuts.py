"""The power is cut at every write and flush of a repair in place: nothing is lost, and a second repair finishes it.

`check --auto-repair` and `check --clear-needs-check` change the metadata of a pool that is already damaged. Whatever
subset of their writes arrives, every device maps what it mapped, and repairing what the cut left ends in a sound pool;
that second repair is cut as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from metadata import PoolMetadata, Severity, clear_needs_check, mend, recount
from tests.fakes.crash_check import ImageStore
from tests.fakes.disk_history import Contents, File, FileImage, Image, Kind, Replay
from tests.fakes.file_history import Content, FileHistory
from tests.fakes.metadata_edits import Image as Edits
from tests.fakes.metadata_pools import contents, new_pool, packed, span
from tests.fakes.simulated_disk import BLOCK_SECTORS, SimulatedDisk, SimulatedStore
from tests.fakes.thin_tools import find_tool
from tests.fakes.traced_files import trace

Mappings = dict[int, dict[int, int]]
METADATA_BLOCKS = 400
ROOT = Path(__file__).resolve().parents[2]


def pool_with_sharing() -> Edits:
    """Three devices over several leaves; two of them share most."""
    store, pool = new_pool(METADATA_BLOCKS, 20_000)
    pool.create_device(1)
    pool.insert(1, span(0, 600), packed(span(0, 600), 0))
    pool.commit()
    pool.create_snapshot(2, 1)
    pool.insert(2, span(5, 300), packed(span(1000, 300), 1))
    pool.create_device(3)
    pool.insert(3, span(0, 20), packed(span(3000, 20), 1))
    pool.commit()
    return Edits(bytes(store.image))


def leak(image: Edits) -> None:
    image.set_count("data_space", image.free_block("data_space"), 1)
    image.set_count("metadata_space", image.free_block("metadata_space"), 1)


def low_counts(image: Edits) -> None:
    image.set_count("data_space", 7, 0)


def wrong_figures(image: Edits) -> None:
    image.edit_values(
        image.superblock.details_root, lambda values: values["mapped_blocks"].__setitem__(0, 17)
    )


def broken_bitmap(image: Edits) -> None:
    location, _ = image.bitmap_of("data_space", 0)
    image.put(location, bytes(4096))


def several(image: Edits) -> None:
    leak(image)
    wrong_figures(image)


def mappings_of(store: ImageStore | Edits) -> Mappings:
    pool = PoolMetadata.open(store)  # type: ignore[arg-type]
    return {record.device_id: contents(pool, record.device_id) for record in pool.devices()}


def disk_of(contents_table: Contents, image: bytes) -> SimulatedDisk:
    sectors = len(image) // 512
    metadata = FileImage(contents_table.intern(image), sectors)
    return SimulatedDisk(contents_table, Image((metadata, FileImage(np.zeros(0, np.int32), 0)), None))


def images_of(disk: SimulatedDisk, random: np.random.Generator, count: int) -> Iterator[bytes]:
    """What a cut at any write or flush may leave of the metadata."""
    replay = Replay(disk.start.copy())
    for event in disk.events:
        assert event.file is File.METADATA
        assert event.kind in (Kind.WRITE, Kind.FLUSH)
        replay.apply(event)
        cuts = [replay.latest(), replay.durable]
        cuts += [replay.cut(random, float(random.choice((0.1, 0.5, 0.9))), torn=True) for _ in range(count)]
        for cut in cuts:
            yield disk.contents.bytes_of(cut.metadata.contents[: cut.metadata.sectors])


def repaired(table: Contents, image: bytes, act: Callable[[SimulatedStore], object]) -> SimulatedDisk:
    """Run a repair on a disk that holds this image; the disk with its history."""
    disk = disk_of(table, image)
    act(SimulatedStore(disk))
    disk.close()
    return disk


@pytest.mark.parametrize("spoil", [leak, low_counts, wrong_figures, broken_bitmap, several])
def test_repair_in_place_may_be_cut_anywhere(spoil: Callable[[Edits], None]) -> None:
    image = pool_with_sharing()
    promised = mappings_of(image)
    spoil(image)
    assert recount(image)
    table, random, seen = Contents(), np.random.Generator(np.random.PCG64(5)), set[bytes]()
    disk = repaired(table, bytes(image.image), mend)
    assert len(disk.events) >= 4
    for after in images_of(disk, random, 6):
        if after in seen:
            continue
        seen.add(after)
        assert mappings_of(ImageStore(after)) == promised
        again = repaired(table, after, lambda store: recount(store) and mend(store))
        for twice in (*images_of(again, random, 1), end_of(again)):
            assert mappings_of(ImageStore(twice)) == promised
        assert not recount(ImageStore(end_of(again)))  # type: ignore[arg-type]
    assert len(seen) > 3


def end_of(disk: SimulatedDisk) -> bytes:
    """What a disk holds after all of its history."""
    replay = Replay(disk.start.copy())
    for event in disk.events:
        replay.apply(event)
    return disk.contents.bytes_of(replay.latest().metadata.contents[: METADATA_BLOCKS * BLOCK_SECTORS])


def test_clearing_the_mark_may_be_cut_anywhere() -> None:
    image = pool_with_sharing()
    promised = mappings_of(image)
    image.set_superblock(flags=1)
    table, random = Contents(), np.random.Generator(np.random.PCG64(6))
    disk = repaired(table, bytes(image.image), clear_needs_check)
    marks = set()
    for after in images_of(disk, random, 10):
        pool = PoolMetadata.open(ImageStore(after))  # type: ignore[arg-type]
        marks.add(pool.needs_check)
        assert mappings_of(ImageStore(after)) == promised
        assert not recount(ImageStore(after))  # type: ignore[arg-type]
    assert marks == {True, False}


@pytest.mark.peer
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_repair_into_another_file_may_be_cut_anywhere(tmp_path: Path, old: bool) -> None:
    """The source is never touched; the target is what was there before or everything that could be saved."""
    if find_tool("strace") is None:
        pytest.skip("strace is missing")
    image = pool_with_sharing()
    promised = mappings_of(image)
    image.set_superblock(flags=1)
    broken_bitmap(image)
    place = tmp_path / "place"
    place.mkdir()
    source, target, spoilt = place / "source", place / "target", bytes(image.image)
    source.write_bytes(spoilt)
    files = FileHistory()
    files.adopt(source)
    before = bytes(pool_with_sharing().image) if old else None
    if before is not None:
        target.write_bytes(before)
        files.adopt(target)
    command = [sys.executable, "-m", "thinpool", "repair", str(source), str(target), *["--force"] * old]
    seen = set()
    for call in trace(command, place, tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)}):
        files.apply(call)
        for cut in files.cuts(Random(len(seen)), 2):
            assert bytes_of(cut[str(source)]) == spoilt
            found = bytes_of(cut.get(str(target)))
            seen.add(found)
            if found not in (None, before):
                assert mappings_of(ImageStore(found)) == promised
                assert not recount(ImageStore(found))  # type: ignore[arg-type]
    assert target.read_bytes() in seen
    assert before in seen


def bytes_of(content: Content | None) -> bytes | None:
    """The bytes of a file that a cut left."""
    if content is None:
        return None
    data = bytearray(content.length)
    for number, sector in content.sectors.items():
        data[number * 512 : (number + 1) * 512] = sector
    return bytes(data[: content.length])


def test_a_repair_that_writes_the_superblock_first_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge of these tests sees a repair whose order is wrong."""
    image = pool_with_sharing()
    leak(image)
    flushes = SimulatedStore.flush
    monkeypatch.setattr(SimulatedStore, "flush", lambda store: None)
    disk = repaired(Contents(), bytes(image.image), mend)
    monkeypatch.setattr(SimulatedStore, "flush", flushes)
    wrong = 0
    for after in images_of(disk, np.random.Generator(np.random.PCG64(7)), 20):
        try:
            wrong += any(problem.severity >= Severity.ERROR for problem in recount(ImageStore(after)))  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 -- the superblock may be torn from what it names in any way
            wrong += 1
    assert wrong

"""A pool that gave up in the middle of a change stays readable: names, sizes and content are those of one state.

Each kind of change is done on a simulated disk of which one operation fails, every one in turn. Afterwards every
device can be read under its name, and opening the pool again shows exactly the same.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from metadata import MetadataError, MetadataFull, PoolMetadata
from metadata.devices import DeviceTable
from tests.fakes.disk_history import Contents
from tests.fakes.simulated_disk import SimulatedDisk
from thinpool import device
from thinpool.engine import Engine
from thinpool.errors import NoSpace, PoolPoisoned, ThinPoolError
from thinpool.extents import HOLE
from thinpool.pool import Pool
from thinpool.status import DeviceInfo

BLOCK_BYTES = 65536
Shown = dict[str, tuple[int, bytes]]

CHANGES: dict[str, Callable[[Pool], object]] = {
    "create": lambda pool: pool.create_device("more", BLOCK_BYTES),
    "snapshot": lambda pool: pool.create_snapshot("disk", "tuesday"),
    "delete": lambda pool: pool.delete("disk"),
    "rollback": lambda pool: pool.rollback("disk", "monday", keep=False),
    "rollback and keep": lambda pool: pool.rollback("disk", "monday", keep="before"),
    "shrink": lambda pool: pool.resize("disk", BLOCK_BYTES, shrink=True),
    "lengthen": lambda pool: pool.resize("disk", 6 * BLOCK_BYTES),
    "rename": lambda pool: pool.rename("disk", "other"),
}


@dataclass
class OneFault:
    """Fails operation `number`, counted from the first on; -1 only counts."""

    number: int = -1
    seen: list[str] = field(default_factory=list)

    def before(self, operation: str, count: int) -> int:
        self.seen.append(operation)
        if len(self.seen) - 1 == self.number:
            raise OSError(errno.EIO, "injected")
        return count


def write(pool: Pool, name: str, offset: int, content: bytes) -> None:
    entry = pool.catalog.by_name(name)
    assert entry is not None
    session = pool.open_session(entry)
    session.enter()
    session.write(offset, memoryview(content))
    session.leave()
    session.sent()
    session.close()


def prepared() -> tuple[SimulatedDisk, Pool]:
    """A device that differs from its snapshot, part of which was answered and never flushed."""
    disk = SimulatedDisk(Contents(), metadata_blocks=256)
    disk.format(data_blocks=24)
    pool = disk.open()
    pool.create_device("disk", 4 * BLOCK_BYTES + 512)
    write(pool, "disk", 0, b"m" * 4 * BLOCK_BYTES)
    pool.create_snapshot("disk", "monday")
    write(pool, "disk", BLOCK_BYTES // 2, b"t" * 3 * BLOCK_BYTES)
    return disk, pool


def shown(pool: Pool) -> Shown:
    """Size and content by name, read as a client reads; holes are told as they read."""
    found = {}
    for entry in pool.catalog.entries():
        session = pool.open_session(entry)
        content = bytes(session.read_bytes(0, entry.size_bytes))
        position = 0
        for length, kind in session.extents(0, entry.size_bytes):
            assert kind != HOLE or not any(content[position : position + length]), entry.name
            position += length
        assert position == entry.size_bytes
        session.close()
        found[entry.name] = entry.size_bytes, content
    return found


def operations(change: Callable[[Pool], object]) -> list[str]:
    disk, pool = prepared()
    fault = OneFault()
    disk.before = fault.before
    change(pool)
    disk.before = None
    pool.close()
    disk.close()
    return fault.seen


@pytest.mark.parametrize("kind", CHANGES)
def test_every_device_reads_right_under_its_name(kind: str) -> None:
    change = CHANGES[kind]
    gave_up = 0
    for number, operation in enumerate(operations(change)):
        disk, pool = prepared()
        before = shown(pool)
        disk.before = OneFault(number).before
        try:
            change(pool)
        except (OSError, MetadataError, ThinPoolError):
            pass
        else:
            # Space comes back another time, and figures may be unknown; the change is done all the same.
            assert operation in {"data punch", "metadata read"}, (
                f"{kind} does not care that {operation} failed"
            )
        disk.before = None
        now = shown(pool)
        if now != before:
            assert now.keys() != before.keys() or now["disk"] != before["disk"]
            assert now["monday"] == before["monday"]
        if pool.engine.failure is not None:
            gave_up += 1
            with pytest.raises(PoolPoisoned):
                pool.create_device("one-more", BLOCK_BYTES)
        pool.close()
        again = disk.open()
        assert same_but_for_what_was_not_flushed(shown(again), now), f"{kind}, {operation} failed"
        again.engine.data.close()
        disk.close()
    assert gave_up or kind == "rename"


def same_but_for_what_was_not_flushed(later: Shown, earlier: Shown) -> bool:
    """Where the pool gave up, writes that were never flushed are in the memory of the process only."""
    if later.keys() != earlier.keys():
        return False
    for name, (size_bytes, content) in later.items():
        if size_bytes != earlier[name][0]:
            return False
        if content != earlier[name][1]:
            lost = earlier[name][1]
            if any(
                new != old and (new, old) != (ord("m"), ord("t"))
                for new, old in zip(content, lost, strict=True)
            ):
                return False
    return True


def test_a_pool_whose_committed_state_cannot_be_read_again_shows_nothing_it_does_not_know() -> None:
    disk, pool = prepared()
    pool.create_device("never looked at", BLOCK_BYTES)
    entry = pool.catalog.by_name("never looked at")
    assert entry is not None

    def metadata_is_gone(operation: str, count: int) -> int:
        if operation.startswith("metadata"):
            raise OSError(errno.EIO, "injected")
        return count

    disk.before = metadata_is_gone
    with pytest.raises(OSError, match="injected"):
        pool.create_snapshot("disk", "tuesday")
    disk.before = None
    # What is in the block map was answered for; the rest may be half a change.
    session = pool.open_session(pool.catalog.by_name("disk"))  # type: ignore[arg-type]
    assert session.read_bytes(BLOCK_BYTES // 2, 1) == b"t"
    session.close()
    with pytest.raises(OSError, match="could not be read again"):
        pool.open_session(entry)
    with pytest.raises(OSError, match="could not be read again"):
        pool.devices()
    pool.close()
    again = disk.open()
    assert shown(again)["never looked at"][1] == bytes(BLOCK_BYTES)
    again.close()
    disk.close()


def test_what_changed_is_refused_where_it_is_not_known() -> None:
    disk, pool = prepared()
    disk.before = OneFault(0).before
    with pytest.raises(OSError, match="injected"):
        pool.engine.commit_if_dirty()
    disk.before = None
    with pytest.raises(PoolPoisoned):
        pool.diff("monday", "disk")
    session = pool.open_session(pool.catalog.by_name("disk"))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="not known after a failed commit"):
        session.dirty("monday", 0, 4 * BLOCK_BYTES)
    session.close()
    pool.close()
    disk.close()


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_done_although_its_figures_cannot_be_read(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, pool = prepared()

    def unreadable(*_: object) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(PoolMetadata, "usage", unreadable)
        told = CHANGES[kind](pool)
    if kind != "delete":
        assert isinstance(told, DeviceInfo)
        assert (told.mapped_bytes, told.exclusive_bytes, told.shared_bytes) == (None, None, None)
        assert pool.info(told.name).mapped_bytes is not None
        assert pool.info(told.name).size_bytes == told.size_bytes
    pool.close()
    disk.close()


def test_a_failure_after_the_commit_leaves_the_names_that_belong_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk, pool = prepared()

    def unreadable(*_: object) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_unreferenced", unreadable)
        with pytest.raises(OSError, match="injected"):
            pool.delete("disk")
    now = shown(pool)
    assert now.keys() == {"monday"}
    pool.close()
    again = disk.open()
    assert shown(again) == now
    again.engine.data.close()
    disk.close()


def interrupted_at(number: int) -> Callable[[str, int], int]:
    """Ctrl-C while operation `number` is done."""
    seen = 0

    def before(_: str, count: int) -> int:
        nonlocal seen
        seen += 1
        if seen - 1 == number:
            raise KeyboardInterrupt
        return count

    return before


@pytest.mark.parametrize("kind", CHANGES)
def test_an_interrupt_leaves_the_state_before_or_after(kind: str) -> None:
    """A command that has opened the pool itself closes it on its way out, and that commits."""
    change = CHANGES[kind]
    disk, pool = prepared()
    states = [shown(pool)]
    change(pool)
    states.append(shown(pool))
    pool.close()
    disk.close()
    for number, operation in enumerate(operations(change)):
        disk, pool = prepared()
        disk.before = interrupted_at(number)
        with contextlib.suppress(KeyboardInterrupt):
            change(pool)
        disk.before = None
        pool.close()
        again = disk.open()
        assert again.writable, f"{kind}, {operation} interrupted"
        now = shown(again)
        assert any(same_but_for_what_was_not_flushed(now, state) for state in states), (
            f"{kind}, {operation} interrupted"
        )
        again.close()
        disk.close()


def test_half_a_change_is_not_committed_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, pool = prepared()
    before = shown(pool)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DeviceTable, "delete", interrupted)  # its tree is gone by then, its record not yet
        with pytest.raises(KeyboardInterrupt):
            pool.delete("disk")
    pool.close()
    again = disk.open()
    assert again.writable
    assert same_but_for_what_was_not_flushed(shown(again), before)
    again.close()
    disk.close()


def test_a_device_is_cut_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit between two pieces would make one of them durable without the new size."""
    disk, pool = prepared()
    before = shown(pool)
    original, removed = PoolMetadata.remove, []

    def remove(self: PoolMetadata, device_id: int, begin: int, end: int) -> int:
        removed.append((begin, end))
        if len(removed) > room:
            raise MetadataFull(1, 0, 0)
        return original(self, device_id, begin, end)

    monkeypatch.setattr(device, "UNMAP_SLICE_BLOCKS", 1)
    monkeypatch.setattr(PoolMetadata, "remove", remove)
    room = 0
    with pytest.raises(MetadataFull):
        pool.resize("disk", BLOCK_BYTES, shrink=True)
    assert shown(pool) == before
    room = 2
    assert pool.resize("disk", BLOCK_BYTES, shrink=True).size_bytes == BLOCK_BYTES
    assert removed == [(1, 5), (1, 5)]
    pool.close()
    disk.close()


def test_a_device_in_use_keeps_its_size_where_the_row_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, pool = prepared()
    entry = pool.catalog.by_name("disk")
    assert entry is not None
    session = pool.open_session(entry)

    def refused(*_: object, **__: object) -> None:
        raise NoSpace(what="the catalogue", needed_bytes=4096, free_bytes=0)

    with monkeypatch.context() as full:
        full.setattr(pool.catalog, "apply", refused)
        with pytest.raises(NoSpace):
            pool.resize("disk", 6 * BLOCK_BYTES)
    assert pool.device(entry).size_bytes == pool.info("disk").size_bytes == entry.size_bytes
    assert pool.resize("disk", 6 * BLOCK_BYTES).size_bytes == 6 * BLOCK_BYTES == pool.device(entry).size_bytes
    session.close()
    pool.close()

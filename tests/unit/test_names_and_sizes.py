"""Names that two devices trade and snapshots larger than their origin: each one step, in use or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.fakes.transfer_pools import content, new_pool, session_on, write
from thinpool.errors import BadSize, DeviceExists, NoSuchDevice
from thinpool.opening import open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation

BLOCK = 65536


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with new_pool(tmp_path / "pool") as pool:
        yield pool


def origins(pool: Pool) -> dict[str, str | None]:
    return {info.name: info.origin for info in pool.devices()}


def content_id(pool: Pool, name: str) -> str | None:
    entry = pool.catalog.by_name(name)
    assert entry is not None
    return entry.content_id


def test_two_devices_exchange_their_names(pool: Pool, tmp_path: Path) -> None:
    """B121: what was restored beside a device that is in use takes its name; who has either open keeps it."""
    pool.create_device("disk", 2 * BLOCK)
    write(pool, "disk", 0, b"old" * 100)
    pool.create_snapshot("disk", "monday", read_only=True)
    pool.create_snapshot("disk", "restored")
    write(pool, "restored", 0, b"new" * 100)
    pool.create_snapshot("restored", "tuesday", read_only=True)
    with session_on(pool, "disk") as in_use:
        info = pool.rename("restored", "disk", exchange=True)
        assert (info.name, info.origin) == ("disk", "restored")
        assert in_use.read_bytes(0, 300) == b"old" * 100
        write(pool, "restored", BLOCK, b"more")
        assert in_use.read_bytes(BLOCK, 4) == b"more"
    wanted = {"disk": "restored", "restored": None, "monday": "restored", "tuesday": "disk"}
    assert origins(pool) == wanted
    pool.close()
    with closing(open_pool(PoolLocation.directory(tmp_path / "pool"))) as again:
        assert origins(again) == wanted
        assert content(again, "disk")[:300] == b"new" * 100
        assert content(again, "restored")[:300] == b"old" * 100
        with pytest.raises(NoSuchDevice):
            again.rename("disk", "nobody", exchange=True)
        with pytest.raises(DeviceExists):
            again.rename("disk", "restored")
        assert origins(again) == wanted


@pytest.mark.parametrize("read_only", [False, True])
def test_a_copy_larger_than_its_snapshot(pool: Pool, read_only: bool) -> None:
    """B59: the tail reads zeros, also what an origin that was once longer still has in its last block."""
    pool.create_device("disk", 4 * BLOCK)
    write(pool, "disk", 0, b"x" * 4 * BLOCK)
    pool.resize("disk", BLOCK + 512, shrink=True)
    pool.create_snapshot("disk", "small", read_only=read_only)
    copy = pool.create_snapshot("small", "large", size_bytes=6 * BLOCK)
    assert (copy.size_bytes, copy.origin) == (6 * BLOCK, "small")
    assert content_id(pool, "large") not in (None, content_id(pool, "small")), (
        "another size is another content"
    )
    wanted = b"x" * (BLOCK + 512)
    assert content(pool, "large") == wanted.ljust(6 * BLOCK, b"\0")
    assert content(pool, "small") == wanted
    for size_bytes in (BLOCK, 0, 1 << 60):
        with pytest.raises(BadSize):
            pool.create_snapshot("small", "none", size_bytes=size_bytes)
    assert set(origins(pool)) == {"disk", "small", "large"}

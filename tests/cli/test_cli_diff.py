"""`thinpool diff` as people type it: served, idle and on bare metadata alike; its ranges hold all that cmp finds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.fakes.warm_thinpool import warm_thinpool
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

CHECKOUT = Path(__file__).resolve().parents[2]
BLOCK = 64 << 10
MIB = 1 << 20


def thinpool(*arguments: object, code: int = 0) -> str:
    done = warm_thinpool(*map(str, arguments), environment={**os.environ, "PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == code, done.stdout + done.stderr
    return (done.stderr if code else done.stdout).decode()


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A pool with `disk` and two snapshots; between them data, a hole, a hole filled again, and a larger end."""
    path = tmp_path / "p"
    create_pool(path, size_bytes=64 * MIB, metadata_bytes=4 * MIB)
    opened = open_pool(PoolLocation.directory(path))
    opened.create_device("disk", 16 * MIB + 1000)
    session = opened.open_session(opened.catalog.by_name("disk"))

    def write(offset: int, data: bytes) -> None:
        session.enter()
        session.write(offset, memoryview(data))
        session.leave()
        session.sent()

    write(0, os.urandom(4 * MIB))
    write(16 * MIB + 990, b"0123456789")
    opened.create_snapshot("disk", "mon", read_only=True)
    write(MIB + 17, b"changed")
    session.trim(2 * MIB, MIB)
    write(2 * MIB + 5 * BLOCK, b"new in the hole")
    write(10 * MIB, b"z" * (BLOCK + 1))
    session.close()
    opened.resize("disk", 20 * MIB)
    opened.create_snapshot("disk", "tue", read_only=True)
    opened.close()
    return path


def ranges(text: str) -> list[tuple[int, int, str]]:
    return [(int(offset), int(length), state) for offset, length, state in map(str.split, text.splitlines())]


def test_served_idle_and_bare_say_the_same(pool: Path):
    idle = thinpool("diff", pool, "mon", "tue", "--map")
    summary = thinpool("diff", pool, "mon", "tue")
    # An unnamed device is as long as its last mapping, so only the end of the last range differs.
    bare = ranges(thinpool("diff", "--metadata", pool / "metadata", "thin-2", "thin-3", "--map"))
    assert bare[:-1] == ranges(idle)[:-1]
    document = json.loads(thinpool("diff", pool, "mon", "tue", "--json"))
    thinpool("serve", pool, "--detach")
    try:
        assert thinpool("diff", pool, "mon", "tue", "--map") == idle
        assert thinpool("diff", pool, "mon", "tue") == summary
        assert json.loads(thinpool("diff", pool, "mon", "tue", "--json")) == document
        assert "none" in thinpool("diff", pool, "mon", "none", code=3)
    finally:
        thinpool("stop", pool)
    listed = {device["name"]: device for device in json.loads(thinpool("list", pool, "--json"))["devices"]}
    assert document["new"]["content_id"] == listed["tue"]["content_id"]
    assert document["old"]["size_bytes"] == 16 * MIB + 1000
    assert document["new"]["size_bytes"] == 20 * MIB
    assert [each["state"] for each in document["ranges"]].count("hole") == 2
    assert document["hole_bytes"] == 15 * BLOCK


def test_what_cmp_finds_lies_in_the_ranges(pool: Path, tmp_path: Path):
    opened = open_pool(PoolLocation.directory(pool), read_only=True)
    images = []
    for name in ("mon", "tue"):
        entry = opened.catalog.by_name(name)
        session = opened.open_session(entry)
        images.append(session.read_bytes(0, entry.size_bytes).ljust(20 * MIB, b"\0"))
        session.close()
    opened.close()
    found = ranges(thinpool("diff", pool, "mon", "tue", "--map"))
    assert sum(length for _, length, _ in found) == 20 * MIB
    for offset, length, state in found:
        before, after = (image[offset : offset + length] for image in images)
        if state == "same":
            assert before == after
        else:
            assert before != after
        if state == "hole":
            assert not any(after)


def test_only_growing_changes_nothing(pool: Path):
    thinpool("resize", pool, "disk", "--size", "32M")
    thinpool("snapshot", pool, "disk", "wed", "--read-only")
    document = json.loads(thinpool("diff", pool, "tue", "wed", "--json"))
    assert document["ranges"] == []
    assert (document["old"]["size_bytes"], document["new"]["size_bytes"]) == (20 * MIB, 32 * MIB)


def test_a_device_that_clients_may_write_loses_its_content_id(pool: Path):
    def content_id(name: str) -> str | None:
        devices = json.loads(thinpool("list", pool, "--json"))["devices"]
        return next(device["content_id"] for device in devices if device["name"] == name)

    thinpool("snapshot", pool, "tue", "clone")
    assert content_id("clone") == content_id("tue"), "equal content, until somebody may have changed it"
    opened = open_pool(PoolLocation.directory(pool))
    opened.open_session(opened.catalog.by_name("tue")).close()
    opened.open_session(opened.catalog.by_name("clone")).close()
    opened.close()
    assert content_id("clone") is None
    assert content_id("tue") is not None

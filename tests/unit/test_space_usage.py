"""The used space of a pool is accounted for to the block, and what snapshots hold is told from what is live.

Field cases B37 and B41; B39 is in `test_space_watch.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.crash_scenario import scenario_of
from tests.unit.test_field_cases import BLOCK, fill, session_on
from thinpool.cli import cli
from thinpool.cli.report import run_reporting
from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    create_pool(tmp_path / "pool", size_bytes=256 * BLOCK)
    pool = open_pool(PoolLocation.directory(tmp_path / "pool"))
    pool.create_device("disk", 64 * BLOCK)
    yield pool
    pool.close()


def blocks_of(pool: Pool) -> dict[str, tuple[int, int, int, list[str]]]:
    """Live, alone, held in blocks, and by whom, by name."""
    return {
        use.name: (use.live_bytes // BLOCK, use.alone_bytes // BLOCK, use.held_bytes // BLOCK, use.held_by)
        for use in pool.space_use().devices
    }


def adds_up(pool: Pool) -> None:
    use = pool.space_use()
    assert use.alone_bytes + use.shared_bytes + use.unreached_bytes == use.used_bytes
    assert use.used_bytes == pool.status().data_used_bytes
    assert use.alone_bytes == sum(device.alone_bytes for device in use.devices)
    by_counts = {info.name: (info.mapped_bytes, info.exclusive_bytes) for info in pool.devices()}
    if not use.metadata_snapshot_held:
        assert use.unreached_bytes == 0
        assert by_counts == {each.name: (each.live_bytes, each.alone_bytes) for each in use.devices}


def test_what_was_trimmed_is_held_by_its_snapshots(pool: Pool) -> None:
    """B41: written, snapshotted, deleted and trimmed: nothing is live, and it is said who holds it."""
    fill(pool, "disk", range(32))
    pool.create_snapshot("disk", "monday", read_only=True)
    fill(pool, "disk", range(4))
    pool.create_snapshot("disk", "tuesday")
    pool.create_snapshot("disk", "wednesday")
    session = session_on(pool, "disk")
    session.trim(0, 64 * BLOCK)
    session.close()
    found = blocks_of(pool)
    assert found["disk"] == (0, 0, 36, ["monday", "tuesday", "wednesday"])
    assert found["monday"] == (32, 4, 0, [])
    # What is written to a snapshot is its own, and not held for the device.
    fill(pool, "tuesday", range(40, 45))
    assert blocks_of(pool)["disk"] == found["disk"]
    assert blocks_of(pool)["tuesday"] == (37, 5, 0, [])
    adds_up(pool)


def test_the_parts_of_the_command_add_up(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    fill(pool, "disk", range(20))
    pool.create_snapshot("disk", "monday", read_only=True)
    fill(pool, "disk", range(5))
    location = str(pool.location)
    pool.close()
    assert run_reporting(cli, ["status", location, "--explain", "--json"]) == 0
    use = json.loads(capsys.readouterr().out)
    assert (
        use["alone_bytes"] + use["shared_bytes"] + use["unreached_bytes"] == use["used_bytes"] == 25 * BLOCK
    )
    assert use["devices"][0] == {
        "name": "disk",
        "live_bytes": 20 * BLOCK,
        "alone_bytes": 5 * BLOCK,
        "held_bytes": 5 * BLOCK,
        "held_by": ["monday"],
    }
    assert run_reporting(cli, ["status", location, "--explain"]) == 0
    said = capsys.readouterr().out
    assert "by no device:" in said
    assert "monday" in said
    assert run_reporting(cli, ["status", location, "--explain", "--dm"]) == 2


@pytest.mark.parametrize("seed", range(8))
def test_every_block_is_accounted_for_after_anything(seed: int) -> None:
    """B37: random work with kills and openings; looked at after every few steps."""
    run = scenario_of(seed, steps_max=60)
    run.kill_share = 0.1
    for step in range(60):
        run.step()
        if step % 6 == 5:
            adds_up(run.pool)
    run.close()
    run.disk.close()


def test_what_only_a_metadata_snapshot_holds_is_no_ones(pool: Pool) -> None:
    fill(pool, "disk", range(10))
    pool.commit()
    pool.metadata_readers.enter()
    session = session_on(pool, "disk")
    session.trim(0, 10 * BLOCK)
    session.close()
    use = pool.space_use()
    assert use.metadata_snapshot_held
    assert (use.used_bytes, use.unreached_bytes) == (10 * BLOCK, 10 * BLOCK)
    pool.metadata_readers.leave()
    adds_up(pool)
    assert pool.space_use().used_bytes == 0

"""What a push reads out of a served pool stays the snapshot that it was when the push began."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.cli.test_cli_send import place, source, thinpool
from thinpool.errors import ExitCode, NoSuchDevice
from thinpool.pool_location import PoolLocation
from thinpool.push_source import push_source

__all__ = ["place", "source"]  # fixtures


def test_a_name_that_comes_to_mean_another_snapshot_is_not_read(source: Path) -> None:
    """Every thread that reads connects by name; snapshots called `daily` are replaced every day."""
    thinpool("serve", source, "--detach")
    with push_source(PoolLocation.directory(source), "tue") as tuesday:
        thinpool("delete", source, "tue", code=ExitCode.CONFLICT)
        assert list(tuesday.changes("none", 0) or []) == []
        base = tuesday.relatives()[0]
        (stored,) = (device["mapped_bytes"] for device in tuesday._devices if device["name"] == "mon")
        changes = tuesday.changes(base, stored)
        assert changes is not None
        thinpool("rename", source, "mon", "old-mon")
        thinpool("snapshot", source, "disk", "mon", "--read-only")
        with pytest.raises(NoSuchDevice, match="mon"):
            list(changes)
        thinpool("rename", source, "tue", "old-tue")
        thinpool("snapshot", source, "disk", "tue", "--read-only")
        assert len(tuesday.read(0, 4096)) == 4096
        raised: list[type[BaseException]] = []

        def read() -> None:
            try:
                tuesday.read(0, 4096)
            except NoSuchDevice as error:
                raised.append(type(error))

        other = threading.Thread(target=read)
        other.start()
        other.join()
    assert raised == [NoSuchDevice]

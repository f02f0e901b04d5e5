"""What tests of a real server on an unkind machine share: a small pool, stamps in it, and what must hold in the end."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from nbd.errors import RemoteError
from tests.conformance.running_pool import RunningPool
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

BLOCK = 65536
MIB = 1 << 20


def two_devices(path: Path, size_bytes: int = 64 * MIB, **settings: str) -> None:
    """Make a pool in this process, which is quicker than by commands."""
    create_pool(path, size_bytes=size_bytes, metadata_bytes=16 * MIB)
    made = open_pool(PoolLocation.directory(path))
    made.change_settings(settings)
    for name in ("a", "b"):
        made.create_device(name, 16 * MIB)
    made.close()
    del made
    gc.collect()  # a memory map holds its file until it is collected


def stamped(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


def contents(path: Path) -> dict[str, bytes]:
    """What the small files of a pool hold."""
    names = (file for file in path.iterdir() if file.name not in {"data", "lock", "journal"})
    return {file.name: file.read_bytes() for file in names}


def in_one_sentence(done: subprocess.CompletedProcess[str], code: int) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""


def require_ended_well(pool: RunningPool, seconds: float = 20) -> None:
    """The server has ended by itself, with status 0, and left nothing in the way."""
    assert pool.server is not None
    assert pool.server.wait(seconds) == 0, pool.log()
    assert "Traceback" not in pool.log()
    left = {path.name for path in pool.path.iterdir()}
    assert left == {"catalog", "catalog-journal", "data", "journal", "lock", "metadata"}
    assert not pool.socket.exists()


def require_kept(pool: RunningPool, device: str, answered: Mapping[int, int]) -> None:
    """The pool can be opened here and now, and holds these stamps."""
    opened = open_pool(PoolLocation.directory(pool.path))
    session = opened.open_session(opened.catalog.by_name(device))  # type: ignore[arg-type]
    wrong = [
        block
        for block, number in answered.items()
        if session.read_bytes(block * BLOCK, BLOCK) != stamped(number)
    ]
    session.close()
    opened.close()
    del session, opened
    gc.collect()
    assert not wrong


def answer(request: Callable[[], object]) -> int:
    """The error a request is answered with, 0 for none."""
    try:
        request()
    except RemoteError as error:
        return error.error
    return 0


def eventually_read_only(pool: RunningPool) -> str:
    """Wait until the pool has given up; why, as `thinpool status` says it."""
    deadline = time.monotonic() + 15
    while (status := pool.operate("status")["status"])["failure"] is None:
        assert time.monotonic() < deadline, "the pool goes on"
        time.sleep(0.05)
    assert status["mode"] in ("read_only", "fail")
    return str(status["failure"])

"""A real server, and real commands, on a machine that runs out of things or changes under them.

Descriptors and memory here; signals, files cut off by others and file systems that fill up or turn read-only further
down. Power cuts, kills and I/O errors are elsewhere (docs/crash-safety.md says where).
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbd import NbdError
from nbd.client import Client
from nbd.limits import Limits
from tests.conformance.running_pool import ENVIRONMENT, RunningPool
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

BLOCK = 65536
MIB = 1 << 20


@pytest.fixture
def pool() -> Iterator[RunningPool]:
    """A served pool of 64 MiB with two devices."""
    made = RunningPool(Path(tempfile.mkdtemp(prefix="tp-")))
    try:
        two_devices(made.path)
        made.start()
        made.access.server()  # it greets a moment before all of it has started
        yield made
    finally:
        made.clean_up()


def two_devices(path: Path, size_bytes: int = 64 * MIB, **settings: str) -> None:
    """Make a pool in this process, which is quicker than by commands."""
    create_pool(path, size_bytes=size_bytes, metadata_bytes=16 * MIB)
    made = open_pool(PoolLocation.directory(path))
    made.change_settings(settings)
    for name in ("a", "b"):
        made.create_device(name, 16 * MIB)
    made.close()


def stamped(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


def pid_of(pool: RunningPool) -> int:
    assert pool.server is not None
    return pool.server.pid


def cpu_seconds(pid: int) -> float:
    """What a process has used so far (proc(5), utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def limited(pool_path: Path, limit: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command under a limit of the shell: `limited(path, "-n 8", "list")`."""
    words = [sys.executable, "-m", "thinpool", arguments[0], str(pool_path), *arguments[1:]]
    return subprocess.run(
        ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        check=False,
    )


def contents(path: Path) -> dict[str, bytes]:
    """What the small files of a pool hold."""
    names = (file for file in path.iterdir() if file.name not in {"data", "lock", "journal"})
    return {file.name: file.read_bytes() for file in names}


def in_one_sentence(done: subprocess.CompletedProcess[str], code: int) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""


# --- descriptors ---


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_near_the_limit_of_descriptors_newcomers_are_turned_away_and_the_rest_works(
    pool: RunningPool,
) -> None:
    """Clients cannot use up what commands, the catalogue and the devices need."""
    first, pid = Client.connect(pool.uri("a")), pid_of(pool)
    wanted, kept = descriptors(pid) + 3, Limits().descriptors_kept
    limit = next(number for number in range(wanted, 4096) if number - min(kept, number // 4) == wanted)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, 4096))
    more = [Client.connect(pool.uri("b")) for _ in range(3)]
    for _ in range(3):
        with pytest.raises((OSError, NbdError)):
            Client.connect(pool.uri("b"), timeout_seconds=10)
    assert "limit of open files" in pool.log()
    first.write(0, stamped(1))
    first.flush()
    pool.operate("snapshot", origin="a", name="s")
    third = pool.operate("create", name="c", size_bytes=MIB)
    assert third["device"]["name"] == "c"
    more.pop().disconnect()
    deadline = time.monotonic() + 10
    while len(pool.access.server()["connections"]) > 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    again = Client.connect(pool.uri("c"))
    assert again.read(0, 512) == bytes(512)
    for client in (first, again, *more):
        client.close()


def test_without_any_descriptor_the_server_waits_quietly_and_goes_on(pool: RunningPool) -> None:
    client, pid = Client.connect(pool.uri("a")), pid_of(pool)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors(pid), 4096))
    waiting, asking = (socket.socket(socket.AF_UNIX) for _ in range(2))
    waiting.connect(str(pool.socket))
    asking.connect(str(pool.path / "control"))
    used, began = cpu_seconds(pid), time.monotonic()
    number = 0
    while time.monotonic() - began < 2.5:
        client.write(number % 64 * BLOCK, stamped(number))
        client.flush()
        number += 1
        time.sleep(0.1)
    assert cpu_seconds(pid) - used < 1.0
    assert len(pool.log().splitlines()) < 40
    assert "Traceback" not in pool.log()
    assert "Too many open files" in pool.log()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (1024, 4096))
    waiting.settimeout(10)
    assert waiting.recv(8) == b"NBDMAGIC"
    assert pool.access.server()["pid"] == pid
    assert client.read((number - 1) % 64 * BLOCK, BLOCK) == stamped(number - 1)
    for sock in (waiting, asking):
        sock.close()
    client.close()
    pool.stop()
    pool.check_metadata()


def test_commands_without_descriptors_say_so_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    two_devices(path)
    before = contents(path)
    for limit, words in ((6, "list"), (7, "create c --size 1M"), (8, "serve"), (11, "serve")):
        done = limited(path, f"-n {limit}", *words.split())
        in_one_sentence(done, 8)
        assert "ulimit -n" in done.stderr
    assert contents(path) == before
    assert limited(path, "-n 20", "list").returncode == 0


# --- memory ---


def test_maps_that_cannot_be_made_are_one_sentence(tmp_path: Path) -> None:
    """The data file of 1 TiB is mapped as a whole; half of that may be."""
    path = tmp_path / "pool"
    two_devices(path, 1 << 40)
    before = contents(path)
    for words in ("create c --size 1M", "serve"):
        done = limited(path, f"-v {512 << 10}", *words.split())
        in_one_sentence(done, 8)
        assert "ulimit -v" in done.stderr
    assert contents(path) == before
    assert limited(path, f"-v {512 << 10}", "check").returncode == 0  # needs no map


def test_a_device_whose_map_finds_no_memory_is_refused_alone(pool: RunningPool) -> None:
    """The block map of a device is address space: 2 GiB of it for 16 TiB."""
    pool.operate("create", name="huge", size_bytes=16 << 40, force=True)
    client, pid = Client.connect(pool.uri("a")), pid_of(pool)
    client.write(0, stamped(1))
    size_bytes = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (size_bytes + (1 << 30), before[1]))
    for _ in range(3):
        with pytest.raises((OSError, NbdError)):
            Client.connect(pool.uri("huge"), timeout_seconds=10)
    client.write(BLOCK, stamped(2))
    client.flush()
    other = Client.connect(pool.uri("b"))
    assert other.read(0, 512) == bytes(512)
    with pytest.raises(Exception, match=r"allocate memory.*ulimit -v"):
        pool.operate("grow", size_bytes=4 << 40)
    assert "Traceback" not in pool.log()
    resource.prlimit(pid, resource.RLIMIT_AS, before)
    huge = Client.connect(pool.uri("huge"))
    huge.write((16 << 40) - BLOCK, stamped(3))
    assert [client.read(0, BLOCK), client.read(BLOCK, BLOCK)] == [stamped(1), stamped(2)]
    for one in (client, other, huge):
        one.close()
    pool.stop()
    pool.check_metadata()

"""A real server, and real commands, on a machine that runs out of things or changes under them.

Descriptors, memory, signals, and files that others cut off. File systems are in `test_faults_of_file_systems.py`, power cuts, kills and I/O errors are elsewhere (docs/crash-safety.md says where).
"""

from __future__ import annotations

import os
import pty
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbd import NbdError
from nbd.client import Client
from nbd.constants import Command, Errno
from nbd.limits import Limits
from tests.conformance.running_pool import ENVIRONMENT, RunningPool
from tests.conformance.stamped_pool import (
    BLOCK,
    MIB,
    answer,
    contents,
    eventually_read_only,
    in_one_sentence,
    require_ended_well,
    require_kept,
    stamped,
    two_devices,
)


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
    # Below what is open already: one that is just being closed must not make room for a client.
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, 4096))
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


# --- signals ---


class StampedWriter:
    """Writes stamps through a connection of its own until it is told or the server ends it."""

    def __init__(self, pool: RunningPool, device: str, first_block: int) -> None:
        self.device = device
        self.answered: dict[int, int] = {}
        self.ended_by: Exception | None = None
        self._client = Client.connect(pool.uri(device), timeout_seconds=20)
        self._first = first_block
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        try:
            while True:
                block = self._first + number % 100
                self._client.write(block * BLOCK, stamped(number))
                self.answered[block] = number
                number += 1
        except (OSError, NbdError) as error:
            self.ended_by = error

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._client.close()


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,)])
def test_signals_under_load_lose_nothing(pool: RunningPool, signals: tuple[signal.Signals, ...]) -> None:
    """Also not a second one, while the server closes the pool."""
    writers = [StampedWriter(pool, device, first) for device in ("a", "b") for first in (0, 100)]
    time.sleep(0.5)
    for number in signals:
        os.kill(pid_of(pool), number)
        time.sleep(0.05)
    require_ended_well(pool)
    for writer in writers:
        writer.join()
        assert writer.answered
        require_kept(pool, writer.device, writer.answered)
    pool.check_metadata()


def test_a_second_signal_does_not_wait_for_a_client(pool: RunningPool) -> None:
    """The first gives a reply that a client does not take a while, the second none."""
    pool.stop()
    pool.start("--grace", "600", "--pid-file", str(pool.work / "pid"))
    pool.access.server()
    client = Client.connect(pool.uri("a"))
    client.write(0, stamped(1))
    reader = Client.connect(pool.uri("b"))
    reader.write(0, b"x" * (8 * MIB))
    for _ in range(4):
        reader.send_request(Command.READ, 0, 8 * MIB)
    time.sleep(0.2)
    os.kill(pid_of(pool), signal.SIGTERM)
    time.sleep(0.5)
    assert pool.server is not None
    assert pool.server.poll() is None
    os.kill(pid_of(pool), signal.SIGTERM)
    require_ended_well(pool)
    assert not (pool.work / "pid").exists()
    require_kept(pool, "a", {0: 1})
    client.close()
    reader.close()


def test_writes_that_wait_for_space_are_answered_when_a_signal_ends_the_server(pool: RunningPool) -> None:
    pool.operate("set", settings={"queue-timeout": "0"})
    pool.operate("create", name="large", size_bytes=64 * MIB, force=True)
    client = Client.connect(pool.uri("large"), timeout_seconds=20)
    other = Client.connect(pool.uri("a"), timeout_seconds=20)
    for number in range(64 * MIB // BLOCK):
        client.write(number * BLOCK, stamped(number))
    cookies = [
        other.send_request(Command.WRITE, block * BLOCK, BLOCK, payload=stamped(block)) for block in range(4)
    ]
    deadline = time.monotonic() + 10
    while "wait for space" not in pool.log() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid_of(pool), signal.SIGTERM)
    assert [other.reply_to(cookie).error for cookie in cookies] == [Errno.ESHUTDOWN] * 4
    require_ended_well(pool)
    require_kept(pool, "large", {number: number for number in range(64 * MIB // BLOCK)})
    client.close()
    other.close()


def test_a_hangup_stops_a_server_only_where_its_terminal_is_gone(pool: RunningPool) -> None:
    """Elsewhere it means what it means to daemons: read the configuration (certificates, here) again."""
    client = Client.connect(pool.uri("a"))
    os.kill(pid_of(pool), signal.SIGHUP)
    client.write(0, stamped(1))
    client.close()
    deadline = time.monotonic() + 15
    while "SIGHUP" not in pool.log():  # whoever answers clients does not wait for whoever reads signals
        assert time.monotonic() < deadline, "the signal was not taken note of"
        time.sleep(0.02)
    pool.stop()
    child, terminal = pty.fork()
    if not child:
        words = [sys.executable, "-m", "thinpool", "serve", str(pool.path), "--socket", str(pool.socket)]
        os.execve(sys.executable, words, ENVIRONMENT)
    try:
        deadline = time.monotonic() + 30
        while not pool.greets() and time.monotonic() < deadline:
            time.sleep(0.02)
        pool.access.server()
        client = Client.connect(pool.uri("b"))
        client.write(0, stamped(2))
        os.kill(child, signal.SIGHUP)  # the terminal is there: not the end
        client.write(BLOCK, stamped(3))
    finally:
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    client.close()
    require_kept(pool, "a", {0: 1})
    require_kept(pool, "b", {0: 2, 1: 3})


# --- files that others cut off ---


def test_a_data_file_that_is_cut_off_is_an_error_until_somebody_looks(pool: RunningPool) -> None:
    """What is gone reads EIO and never zeros, also after later writes would have lengthened the file; no flush lies."""
    a, b = (Client.connect(pool.uri(name), timeout_seconds=20) for name in ("a", "b"))
    a.write(0, stamped(1))
    for number in range(60):
        b.write(number * BLOCK, stamped(number))
    a.flush()
    os.truncate(pool.path / "data", 30 * BLOCK)
    assert answer(lambda: b.read(50 * BLOCK, BLOCK)) == Errno.EIO
    assert answer(lambda: b.read(40 * BLOCK, 8 * BLOCK)) == Errno.EIO
    assert "cut off" in eventually_read_only(pool)  # without anybody asking for a flush
    assert a.read(0, BLOCK) == stamped(1)
    assert b.read(10 * BLOCK, BLOCK) == stamped(10)
    assert answer(lambda: b.write(59 * BLOCK, stamped(1))) == Errno.EIO
    assert answer(lambda: b.read(50 * BLOCK, BLOCK)) == Errno.EIO
    assert answer(a.flush) == answer(a.flush) == Errno.EIO
    checked = pool.command("check", check=False)
    assert checked.returncode == 6
    assert "data file" in checked.stdout
    a.close()
    b.close()
    pool.stop()
    in_one_sentence(pool.command("list", check=False), 6)
    os.truncate(pool.path / "data", 64 * MIB)
    pool.command("check", "--clear-needs-check")
    require_kept(pool, "b", {number: number for number in range(20)})


def test_a_flush_notices_that_the_data_file_was_cut_off(pool: RunningPool) -> None:
    client = Client.connect(pool.uri("a"), timeout_seconds=20)
    for number in range(8):
        client.write(number * BLOCK, stamped(number))
    client.flush()
    os.truncate(pool.path / "data", 4 * BLOCK)
    client.write(0, stamped(0))
    assert answer(client.flush) == Errno.EIO
    assert "cut off" in eventually_read_only(pool)
    client.close()


def test_metadata_that_are_cut_off_are_not_written_to(pool: RunningPool) -> None:
    """A commit would make the file longer again, with zeros where there were trees."""
    a, b = (Client.connect(pool.uri(name), timeout_seconds=20) for name in ("a", "b"))
    a.write(0, stamped(1))
    a.flush()
    os.truncate(pool.path / "metadata", 5 * 4096)
    b.write(0, stamped(2))
    assert answer(b.flush) == Errno.EIO
    assert "truncated" in eventually_read_only(pool)
    assert a.read(0, BLOCK) == stamped(1)
    assert (pool.path / "metadata").stat().st_size == 5 * 4096
    a.close()
    b.close()
    pool.stop()
    in_one_sentence(pool.command("list", check=False), 6)
    assert pool.command("check", check=False).returncode == 6

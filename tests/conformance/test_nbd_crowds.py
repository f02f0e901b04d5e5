"""Many clients at once: verified data, handshakes that never finish, a reader that stops in the middle of a reply.

The server runs in a process of its own, as it does in life, so that its memory and its speed are its own.
"""

import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from nbd.client import Client
from nbd.constants import Command
from nbd.errors import NbdError
from nbd.uri import unix_uri

MIB = 1 << 20
SIZE = 256 * MIB
ROOT = Path(__file__).resolve().parents[2]

SERVER = """
import sys, time
from nbd import Limits, Server
from tests.fakes.memory_device import MemoryDevice, MemoryDirectory
device = MemoryDevice("disk", int(sys.argv[2]), record=False)
device.kinds[:] = b"\\1" * len(device.kinds)
server = Server(MemoryDirectory([device]), log=lambda text: print(text, flush=True))
server.listen_unix(sys.argv[1])
server.start()
sys.stdin.read()
server.shutdown(2)
"""


class Process:
    """The server, and what can be seen of it from outside."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "s"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.path), str(SIZE)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        end = monotonic() + 20
        while not self._listens():  # the path is there a moment before it listens
            assert monotonic() < end
            sleep(0.02)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.path)) == 0

    def client(self) -> Client:
        return Client.connect(unix_uri(self.path, "disk"))

    def private_bytes(self) -> int:
        """Memory of the process less the device's own pages."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if line.endswith("kB")}
        return (kib["VmRSS"] - kib["RssShmem"]) * 1024

    def stop(self) -> str:
        output, _ = self.process.communicate("", timeout=30)
        return output


@pytest.fixture
def server() -> Iterator[Process]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        process = Process(Path(folder))
        yield process
        process.stop()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def speed(server: Process, seconds: float) -> float:
    """Requests a second of one client that reads 4 KiB, eight in flight."""
    count = 0
    with server.client() as client:
        waiting = [client.send_request(Command.READ, at * 4096, 4096) for at in range(8)]
        end = monotonic() + seconds
        while monotonic() < end:
            client.reply_to(waiting.pop(0))
            waiting.append(client.send_request(Command.READ, count % 4096 * 4096, 4096))
            count += 1
    return count / seconds


def test_two_hundred_clients_with_verified_data(server: Process) -> None:
    failures: list[str] = []
    share = SIZE // 200 // 4096 * 4096

    def work(number: int) -> None:
        source = random.Random(number)
        try:
            with server.client() as client:
                written: dict[int, bytes] = {}
                for _ in range(10):
                    at = source.randrange(share // 4096) * 4096
                    written[at] = source.randbytes(4096)
                    client.write(number * share + at, written[at])
                client.flush()
                for at, data in written.items():
                    if client.read(number * share + at, 4096) != data:
                        failures.append(f"client {number} read something else at {at}")
                client.disconnect()
        except (NbdError, OSError) as error:
            failures.append(f"client {number}: {error!r}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_thousand_unfinished_handshakes(server: Process) -> None:
    server.client().close()
    before = server.private_bytes()
    idle = []
    for _ in range(1000):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(str(server.path))
        idle.append(sock)
    for _ in range(5):
        with server.client() as client:
            assert client.read(0, 512) == bytes(512)
    assert server.private_bytes() - before < 64 * MIB
    for sock in idle:
        sock.close()
    with server.client() as client:
        assert client.read(0, 512) == bytes(512)


def test_a_reader_that_stops_does_not_slow_others(server: Process) -> None:
    speed(server, 0.3)
    alone = max(speed(server, 0.7) for _ in range(2))
    before = server.private_bytes()
    stuck = []
    for _ in range(4):
        client = Client.connect(unix_uri(server.path, "disk"), structured=False)
        for _ in range(64):
            client.send_request(Command.READ, 0, 32 * MIB)
        client.socket.recv(MIB)
        stuck.append(client)
    sleep(0.3)
    beside = max(speed(server, 0.7) for _ in range(4))
    assert server.private_bytes() - before < 32 * MIB
    for client in stuck:
        client.close()
    # Nine tenths on a quiet machine; others run beside this test, so it is content with less.
    assert beside > 0.6 * alone, (alone, beside)
    assert os.path.exists(server.path)

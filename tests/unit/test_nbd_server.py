"""The running server: connections, disconnecting, shutdown, clients that vanish. Rows of section 3.4 of docs/nbd.md."""

import errno
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic, sleep

import pytest

from nbd import CannotListen, Limits, Server, activated_descriptors, transmission
from nbd.client import Client
from nbd.constants import Command, Errno
from nbd.errors import ConnectionEnded, RemoteError
from nbd.shared_loop import SharedLoop
from tests.fakes.memory_device import MemoryDevice, MemoryDirectory, MemorySession
from tests.fakes.nbd_server import Served, descriptors, eventually, serving
from tests.fakes.nbd_streams import Request, write

MIB = 1 << 20


def raw_client(served: Served, *, simple: bool = True) -> socket.socket:
    """A socket in transmission (simple replies)."""
    client = served.client(structured=not simple)
    return client.socket


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            break
        data += piece
    return data


def encoded(*requests: Request) -> bytes:
    for index, request in enumerate(requests):
        request.cookie = index + 1
    return b"".join(request.encode(extended=False) for request in requests)


@pytest.fixture(autouse=True, params=["own threads", "shared loop"])
def _served_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds as well where every wait of a connection is left to the shared loop."""
    if request.param == "shared loop":
        monkeypatch.setattr(SharedLoop, "wanted", lambda loop: not loop._activity.stopping)
        monkeypatch.setattr(transmission, "_BY_ITSELF_BATCHES", 0)


@pytest.fixture
def disk() -> MemoryDevice:
    return MemoryDevice("disk", 8 * MIB)


# --- ordinary life ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [{"structured": False}, {"structured": True}, {"extended": True}])
def test_a_client_reads_and_writes(disk: MemoryDevice, style: dict[str, bool]) -> None:
    with (
        serving([disk]) as served,
        served.client(
            "disk", contexts=[] if not any(style.values()) else ["base:allocation"], **style
        ) as client,
    ):
        data = random.Random(1).randbytes(3 * MIB)
        client.write(100, data)
        assert client.read(100, len(data)) == data
        client.trim(0, MIB)
        client.zero(2 * MIB, 4096, flags=2)
        client.cache(0, MIB)
        client.flush()
        assert client.read(0, MIB) == bytes(MIB)
        if any(style.values()):
            assert client.block_status(0, MIB)["base:allocation"] == [(MIB, 3)]
        client.disconnect()


def test_many_requests_in_flight_are_all_answered(disk: MemoryDevice) -> None:
    with serving([disk]) as served, served.client("disk") as client:
        expected = []
        for number in range(1000):
            expected.append(
                client.send_request(Command.READ, number * 512, random.Random(number).choice([512, 4096]))
            )
        for cookie in reversed(expected):
            assert client.reply_to(cookie).error == 0


def test_tcp_serves_ipv4_and_says_its_port(disk: MemoryDevice) -> None:
    with serving([disk]) as served:
        port = served.server.listen_tcp("127.0.0.1", 0)
        with Client.connect(f"nbd://127.0.0.1:{port}/disk") as client:
            client.write(0, b"over tcp")
            (connection,) = served.server._table.all()
            sock = connection._socket
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert client.read(0, 8) == b"over tcp"
        assert ("127.0.0.1", port) in served.server.addresses()


def test_connections_are_described(disk: MemoryDevice) -> None:
    with serving([disk]) as served, served.client("disk") as client:
        client.read(0, 1)
        (info,) = served.server.connections()
        assert (info.export, info.tls, info.reply_style) == ("disk", False, "structured")
        assert info.age_seconds >= 0


def test_multi_conn_writes_are_seen_and_flushed_by_every_connection(disk: MemoryDevice) -> None:
    with serving([disk]) as served, served.client("disk") as one, served.client("") as two:
        one.write(4096, b"shared")
        assert two.read(4096, 6) == b"shared"
        two.flush()
        assert [entry[0] for entry in disk.log or []][-1] == "flush"


def test_a_grown_export_shows_its_new_size_to_new_clients_only(disk: MemoryDevice) -> None:
    with serving([disk]) as served, served.client("disk") as old:
        grown = MemoryDevice("disk", 16 * MIB)
        served.directory.devices["disk"] = grown
        with served.client("disk") as new:
            assert new.info.size_bytes == 16 * MIB
            new.write(12 * MIB, b"x")
        with pytest.raises(RemoteError):
            old.read(8 * MIB, 1)


# --- DISC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [(0, 0, 0), (0xFFFF, 1 << 63, 0xFFFFFFFF)])
def test_disc_gets_no_reply_and_everything_before_it_does(
    disk: MemoryDevice, junk: tuple[int, int, int]
) -> None:
    flags, offset, length = junk
    with serving([disk]) as served:
        sock = raw_client(served)
        requests = [write(number * 4096, b"q" * 4096) for number in range(50)]
        requests += [Request(Command.READ, 0, 4096), Request(Command.FLUSH)]
        sock.sendall(encoded(*requests, Request(Command.DISC, offset, length, flags)))
        answer = b""
        while piece := sock.recv(1 << 16):
            answer += piece
        assert len(answer) == 52 * 16 + 4096
        assert disk.data[49 * 4096 : 50 * 4096] == b"q" * 4096
        sock.close()


def test_what_comes_after_disc_is_ignored(disk: MemoryDevice) -> None:
    with serving([disk]) as served:
        sock = raw_client(served)
        sock.sendall(encoded(Request(Command.DISC), write(0, b"never")))
        assert sock.recv(100) == b""
        assert disk.data[:5] == bytes(5)


# --- vanishing clients -----------------------------------------------------------------------------------------------


def test_a_half_closed_client_gets_all_its_replies(disk: MemoryDevice) -> None:
    with serving([disk]) as served:
        sock = raw_client(served)
        sock.sendall(encoded(*[Request(Command.READ, number * 65536, 65536) for number in range(8)]))
        sock.shutdown(socket.SHUT_WR)
        assert len(receive(sock, 8 * (65536 + 16))) == 8 * (65536 + 16)
        assert sock.recv(1) == b""


@pytest.mark.parametrize("cut", [1, 27, 28, 100])
def test_an_end_inside_a_request_drops_that_request_only(disk: MemoryDevice, cut: int) -> None:
    with serving([disk]) as served:
        sock = raw_client(served)
        whole = encoded(write(0, b"complete"), write(4096, b"x" * 200))
        sock.sendall(whole[: 28 + 8 + cut])
        sock.shutdown(socket.SHUT_WR)
        assert len(receive(sock, 1000)) == 16
        assert disk.data[:8] == b"complete"
        assert disk.data[4096:4097] == b"\0"


def test_clients_that_vanish_with_requests_in_flight_hurt_nobody(disk: MemoryDevice) -> None:
    """The fault of another server: an assertion when a client resets while its writes are being done."""
    disk.slow["flush"] = 0.01
    with serving([disk]) as served, served.client("disk") as steady:
        for number in range(40):
            sock = raw_client(served)
            requests = [write(at * 4096, b"w" * 4096) for at in range(20)] + [Request(Command.FLUSH)]
            requests += [Request(Command.READ, 0, MIB) for _ in range(20)]
            sock.sendall(encoded(*requests)[: 20_000 + number * 1511])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("<ii", 1, 0))
            sock.close()
            assert steady.read(0, 512) is not None
        eventually(lambda: len(served.server.connections()) == 1)
        assert served.log == []


@pytest.mark.parametrize("bytes_sent", [0, 1, 4, 10, 20])
def test_a_port_probe_is_no_news(disk: MemoryDevice, bytes_sent: int) -> None:
    """Faults of other servers: a probe that kills, or one that floods the log."""
    with serving([disk]) as served:
        port = served.server.listen_tcp("127.0.0.1", 0)
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", port)) as probe:
                probe.sendall((struct.pack(">I", 3) + b"IHAVEOPT" + bytes(8))[:bytes_sent])
        for _ in range(50):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(served.socket_path))
        eventually(lambda: not served.server.connections())
        assert served.log == []
        with served.client("disk") as client:
            assert client.read(0, 1) == b"\0"


def test_an_internal_error_ends_one_connection_only(
    disk: MemoryDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving([disk]) as served, served.client("disk") as good, served.client("disk") as bad:
        monkeypatch.setattr(type(disk.sessions[0]), "trim", lambda *_: 1 / 0)
        with pytest.raises((ConnectionEnded, OSError)):
            bad.trim(0, 512)
        assert good.read(0, 1) == b"\0"
        eventually(lambda: served.log)
        assert "internal error" in served.log[0]


class TruncatedDevice(MemoryDevice):
    """A mapped data file that lost its tail: touching it from Python is SIGBUS, the kernel says EFAULT."""

    def __init__(self, path: Path, kept_bytes: int) -> None:
        super().__init__("disk", 4 * MIB)
        path.write_bytes(b"d" * (4 * MIB))
        with path.open("r+b") as file:
            self.data = memoryview(mmap.mmap(file.fileno(), 4 * MIB))
            file.truncate(kept_bytes)
        self.kinds[:] = b"\1" * len(self.kinds)


@pytest.mark.parametrize("family", ["unix", "tcp"])
@pytest.mark.parametrize("style", [{"structured": False}, {"structured": True}, {"extended": True}])
@pytest.mark.parametrize("length", [512, 4096, 65536, 300_000])
def test_a_truncated_data_file_is_an_error_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, style: dict[str, bool], length: int
) -> None:
    kept = 2 * MIB
    disk = TruncatedDevice(tmp_path / "data", kept)
    original = MemorySession.read_copy

    def careful(self: MemorySession, offset: int, size: int) -> bytearray:
        if offset + size > kept:
            raise OSError(errno.EIO, "short read")
        return original(self, offset, size)

    monkeypatch.setattr(MemorySession, "read_copy", careful)
    with serving([disk]) as served:
        port = served.server.listen_tcp("127.0.0.1", 0)
        uri = served.uri("disk") if family == "unix" else f"nbd://127.0.0.1:{port}/disk"
        for offset in (3 * MIB, kept - length // 2):
            with Client.connect(uri, **style) as client:
                assert client.read(0, length) == b"d" * length
                try:
                    assert client.request(Command.READ, offset, length).error == Errno.EIO
                    assert client.read(0, length) == b"d" * length
                except (ConnectionEnded, ConnectionError):
                    # a reply had been begun without a way back
                    assert not style.get("extended") or length <= 65536
        with Client.connect(uri, **style) as client:
            assert client.read(0, 4096) == b"d" * 4096


# --- shutdown ----------------------------------------------------------------------------------------------------------


def test_shutdown_answers_what_is_in_flight_and_leaves_nothing_open(disk: MemoryDevice) -> None:
    """The fault of another server: a socket left open at shutdown."""
    before = descriptors()
    disk.slow["flush"] = 0.3
    with serving([disk]) as served:
        client = served.client("disk")
        idle = served.client("disk")
        cookie = client.send_request(Command.FLUSH)
        sleep(0.1)
        stopper = threading.Thread(target=served.server.shutdown, args=(5.0,))
        stopper.start()
        assert client.reply_to(cookie).error == 0
        stopper.join(10)
        assert not stopper.is_alive()
        assert not served.socket_path.exists()
        with pytest.raises(OSError, match=r".*"):
            served.client("disk")
        with pytest.raises((ConnectionEnded, OSError)):
            idle.read(0, 1)
        client.close()
        idle.close()
    assert descriptors() <= before  # fewer where the interpreter threw away what earlier tests left


def test_requests_during_shutdown_are_told_so(disk: MemoryDevice) -> None:
    disk.slow["flush"] = 0.5
    with serving([disk]) as served, served.client("disk") as slow, served.client("disk") as busy:
        slow.send_request(Command.FLUSH)
        sleep(0.1)
        stopper = threading.Thread(target=served.server.shutdown, args=(5.0,))
        stopper.start()
        sleep(0.1)
        replies = [
            busy.request(Command.READ, 0, 512),
            busy.request(Command.WRITE, 0, 5, payload=b"never"),
            busy.request(Command.WRITE, 0, 300_000, payload=bytes(300_000)),
            busy.request(Command.FLUSH),
        ]
        assert [reply.error for reply in replies] == [Errno.ESHUTDOWN] * 4
        stopper.join(10)
        assert "write" not in {entry[0] for entry in disk.log or []}


def test_shutdown_drops_unfinished_handshakes(disk: MemoryDevice) -> None:
    with serving([disk]) as served:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(served.socket_path))
        assert len(receive(sock, 18)) == 18
        started = monotonic()
        served.server.shutdown(30.0)
        assert monotonic() - started < 5.0
        assert receive(sock, 100) == b""
        sock.close()


def test_shutdown_with_idle_clients_is_quick(disk: MemoryDevice) -> None:
    with serving([disk]) as served, served.client("disk"), served.client("disk"):
        started = monotonic()
        served.server.shutdown(30.0)
        assert monotonic() - started < 5.0


def test_shutdown_does_not_wait_for_ever(disk: MemoryDevice) -> None:
    with serving([disk]) as served:
        sock = raw_client(served)
        sock.sendall(encoded(write(0, b"x" * MIB))[:1000])  # the rest never comes
        sleep(0.1)
        started = monotonic()
        served.server.shutdown(0.3)
        assert monotonic() - started < 5.0
        assert disk.data[:1] == b"\0"
        sock.close()


def test_disconnecting_an_export_closes_its_sessions_and_no_others(disk: MemoryDevice) -> None:
    other = MemoryDevice("other", MIB)
    with serving([disk, other]) as served:
        gone = [served.client("disk") for _ in range(3)]
        with served.client("other") as kept:
            assert served.server.disconnect("disk") == 3
            assert disk.open_sessions == 0
            assert kept.read(0, 1) == b"\0"
            for client in gone:
                with pytest.raises((ConnectionEnded, OSError)):
                    client.read(0, 1)
                client.close()
        assert served.server.disconnect("nobody") == 0


# --- listening ---------------------------------------------------------------------------------------------------------


def test_the_unix_socket_has_its_mode_and_replaces_a_stale_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    server = Server(MemoryDirectory([]))
    server.listen_unix(path, 0o660)
    assert path.stat().st_mode & 0o777 == 0o660
    second = Server(MemoryDirectory([]))
    with pytest.raises(CannotListen, match="another server"):
        second.listen_unix(path)
    second.shutdown()
    server.shutdown()
    assert not path.exists()


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    server = Server(MemoryDirectory([]))
    with pytest.raises(CannotListen, match="not a socket"):
        server.listen_unix(path)
    with pytest.raises(CannotListen, match="107"):
        server.listen_unix(tmp_path / ("x" * 120))
    with pytest.raises(CannotListen):
        server.listen_unix(tmp_path / "missing" / "s")
    server.shutdown()
    assert path.read_text() == "data"


def test_a_port_in_use_is_said_clearly() -> None:
    one, two = Server(MemoryDirectory([])), Server(MemoryDirectory([]))
    port = one.listen_tcp("127.0.0.1", 0)
    with pytest.raises(CannotListen, match=str(port)):
        two.listen_tcp("127.0.0.1", port)
    with pytest.raises(CannotListen):
        two.listen_tcp("no.such.host.invalid", 1)
    one.shutdown()
    two.shutdown()


def test_an_inherited_listener_is_adopted(disk: MemoryDevice, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "inherited"))
    listener.listen(5)
    server = Server(MemoryDirectory([disk]))
    server.adopt(listener.detach())
    server.start()
    with Client.connect(f"nbd+unix:///disk?socket={tmp_path}/inherited") as client:
        assert client.read(0, 1) == b"\0"
    server.shutdown()
    assert (tmp_path / "inherited").exists()  # the service manager's, not ours


def test_an_inherited_connection_is_served(disk: MemoryDevice) -> None:
    ours, theirs = socket.socketpair()
    server = Server(MemoryDirectory([disk]))
    server.start()
    server.adopt(ours.detach())
    client = Client(theirs)
    client.go("disk")
    assert client.read(0, 1) == b"\0"
    server.shutdown()
    client.close()
    with pytest.raises(CannotListen):
        server.adopt(9999)


def test_activation_variables_are_for_this_process_only() -> None:
    assert list(activated_descriptors({"LISTEN_PID": "7", "LISTEN_FDS": "2"}, 7)) == [3, 4]
    for environment in (
        {},
        {"LISTEN_PID": "8", "LISTEN_FDS": "2"},
        {"LISTEN_PID": "7"},
        {"LISTEN_PID": "7", "LISTEN_FDS": "many"},
        {"LISTEN_PID": "7", "LISTEN_FDS": "-1"},
    ):
        assert list(activated_descriptors(environment, 7)) == []


# --- waiting -------------------------------------------------------------------------------------------------------------


def test_an_idle_server_uses_no_cpu(disk: MemoryDevice) -> None:
    script = """
import sys, time
from nbd import Server
from nbd.client import Client
from tests.fakes.memory_device import MemoryDevice, MemoryDirectory, MemorySession
server = Server(MemoryDirectory([MemoryDevice("disk", 1 << 20)]))
server.listen_unix(sys.argv[1]); server.start()
clients = [Client.connect(f"nbd+unix:///disk?socket={sys.argv[1]}") for _ in range(20)]
for client in clients: client.read(0, 512)
time.sleep(0.2)
before = time.process_time(); time.sleep(1.0); print(time.process_time() - before)
server.shutdown()
"""
    folder = Path(__file__).resolve().parents[2]
    path = f"/tmp/nbd-idle-{os.getpid()}"
    result = subprocess.run(
        [sys.executable, "-c", script, path],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert float(result.stdout) < 0.01


@pytest.mark.parametrize("spin", [0.0, 50e-6])
def test_polling_before_sleeping_can_be_turned_off(disk: MemoryDevice, spin: float) -> None:
    with serving([disk], limits=Limits(spin_seconds=spin)) as served, served.client("disk") as client:
        for number in range(200):
            client.write(number, b"x")
        assert client.read(0, 200) == b"x" * 200


def test_an_export_that_goes_away_while_it_is_opened_is_refused_cleanly(disk: MemoryDevice) -> None:
    disk.open_error = OSError(errno.ESHUTDOWN, "being deleted")
    with serving([disk]) as served:
        with pytest.raises(Exception, match="being deleted"):
            served.client("disk")
        disk.open_error = None
        with served.client("disk") as client:
            assert client.read(0, 1) == b"\0"

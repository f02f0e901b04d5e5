"""What no client, and no thousand clients, may use up: connections, handshakes, time, memory, log lines."""

import socket
import threading
from pathlib import Path
from time import monotonic, sleep

import pytest

from nbd import Limits
from nbd.client import Client
from nbd.constants import Command, Option
from nbd.log_limit import LogLimit
from nbd.options import encode_export_query
from nbd.payload_memory import PayloadMemory
from nbd.stalled import Parking
from tests.fakes.memory_device import MemoryDevice
from tests.fakes.nbd_server import Served, eventually, resident_bytes, serving
from tests.fakes.nbd_streams import Request, option, write

MIB = 1 << 20


@pytest.fixture
def disk() -> MemoryDevice:
    device = MemoryDevice("disk", 64 * MIB, record=False)
    device.kinds[:] = b"\1" * len(device.kinds)
    return device


def connect(served: Served) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(served.socket_path))
    return sock


def flood(served: Served, *requests: Request, small_buffer: bool = True) -> socket.socket:
    """A client in transmission that sends these requests and then neither reads nor sends."""
    client = served.client("disk", structured=False)
    if small_buffer:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for index, request in enumerate(requests):
        request.cookie = index
    client.socket.sendall(b"".join(request.encode(extended=False) for request in requests))
    return client.socket


# --- handshakes
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"", b"\0\0\0\3", b"\0\0\0\3" + option(Option.GO, encode_export_query("disk", ()))[:-1]]
)
def test_a_stalled_handshake_times_out(disk: MemoryDevice, sent: bytes) -> None:
    with serving([disk], limits=Limits(handshake_seconds=0.3)) as served:
        sock = connect(served)
        sock.sendall(sent)
        started = monotonic()
        while sock.recv(4096):
            pass
        assert 0.1 < monotonic() - started < 5
        assert not disk.sessions
        assert served.log == []
        sock.close()


def test_a_dribbled_handshake_times_out_as_a_whole(disk: MemoryDevice) -> None:
    with serving([disk], limits=Limits(handshake_seconds=0.5)) as served:
        sock = connect(served)
        stream = b"\0\0\0\3" + option(99) * 1000
        started = monotonic()
        with pytest.raises(OSError, match=r".*"):
            for byte in stream:
                sock.sendall(bytes([byte]))
                sleep(0.02)
        assert monotonic() - started < 5
        sock.close()


def test_transmission_has_no_time_out(disk: MemoryDevice) -> None:
    with serving([disk], limits=Limits(handshake_seconds=0.2)) as served, served.client("disk") as client:
        sleep(0.5)
        assert client.read(0, 1) == b"\0"


def test_handshakes_that_never_finish_do_not_keep_others_out(disk: MemoryDevice) -> None:
    with serving([disk], limits=Limits(unfinished_handshakes_max=20)) as served:
        idle = [connect(served) for _ in range(20)]
        eventually(lambda: len(served.server.connections()) == 20)
        sleep(1.0)
        idle += [connect(served) for _ in range(100)]
        for _ in range(3):
            with served.client("disk") as client:
                assert client.read(0, 512) == bytes(512)
        assert len(served.server.connections()) <= 24
        for sock in idle:
            sock.close()


def test_a_crowd_of_honest_clients_is_not_evicted(disk: MemoryDevice) -> None:
    with serving([disk], limits=Limits(unfinished_handshakes_max=8)) as served:
        failures: list[Exception] = []

        def work(number: int) -> None:
            try:
                with served.client("disk") as client:
                    client.write(number * 4096, bytes([number]) * 4096)
                    assert client.read(number * 4096, 4096) == bytes([number]) * 4096
                    client.disconnect()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


def test_connections_beyond_the_limit_are_turned_away(disk: MemoryDevice) -> None:
    with serving([disk], limits=Limits(connections_max=5)) as served:
        clients = [served.client("disk") for _ in range(5)]
        extra = connect(served)
        assert extra.recv(100) == b""
        extra.close()
        clients.pop().disconnect()
        eventually(lambda: len(served.server.connections()) == 4)
        with served.client("disk") as client:
            assert client.read(0, 1) == b"\0"
        for client in clients:
            client.close()


def test_a_listing_nobody_reads_holds_no_memory(disk: MemoryDevice) -> None:
    with serving([disk]) as served:
        given = [0]

        def listing() -> object:
            for number in range(1_000_000):
                given[0] += 1
                yield f"export-{number}", "x" * 1000

        served.directory.listing = listing  # type: ignore[method-assign,assignment]
        sock = connect(served)
        sock.sendall(b"\0\0\0\3" + option(Option.LIST))
        sleep(0.5)
        assert 0 < given[0] < 50_000
        with served.client("disk") as client:
            assert client.read(0, 1) == b"\0"
        sock.close()


# --- memory and clients that do not read
# -----------------------------------------------------------------------------


def test_a_client_that_never_reads_is_held_back_alone(disk: MemoryDevice) -> None:
    with serving([disk]) as served:
        sock = flood(served, *[Request(Command.READ, 0, 32 * MIB) for _ in range(2000)])
        before = resident_bytes()
        with served.client("disk") as client:
            for number in range(500):
                client.write(number * 4096, b"y" * 4096)
                assert client.read(number * 4096, 4096) == b"y" * 4096
        assert resident_bytes() - before < 64 * MIB
        sock.close()


def test_a_stalled_reply_is_parked_and_lets_go_of_the_data(disk: MemoryDevice) -> None:
    """Blocks are not held for a client that does not read; what it gets later is what it asked for then."""
    disk.data[: 8 * MIB] = b"old!" * (2 * MIB)
    with serving([disk], limits=Limits(send_stall_seconds=0.2)) as served:
        sock = flood(served, Request(Command.READ, 0, 8 * MIB))
        (session,) = disk.sessions
        eventually(lambda: session.pinned)
        eventually(lambda: not session.pinned)
        disk.data[: 8 * MIB] = b"new!" * (2 * MIB)
        got = bytearray()
        while len(got) < 16 + 8 * MIB:
            got += sock.recv(MIB)
        assert got[16:] == b"old!" * (2 * MIB)
        sock.sendall(b"")
        sock.close()


def test_too_many_stalled_bytes_end_that_connection(disk: MemoryDevice) -> None:
    with serving([disk], limits=Limits(send_stall_seconds=0.1, stalled_bytes_max=MIB)) as served:
        sock = flood(served, Request(Command.READ, 0, 8 * MIB))
        eventually(lambda: not served.server.connections())
        assert "does not read" in served.log[0]
        sock.close()


def test_parking_is_an_account() -> None:
    parking = Parking(100)
    assert parking.take(60)
    assert not parking.take(60)
    parking.give_back(60)
    assert parking.take(100)
    assert parking.used_bytes == 100


def test_shutdown_ends_a_stalled_client(disk: MemoryDevice) -> None:
    for stall in (0.1, 60.0):
        with serving([disk], limits=Limits(send_stall_seconds=stall)) as served:
            sock = flood(served, Request(Command.READ, 0, 8 * MIB))
            sleep(0.4)
            started = monotonic()
            served.server.shutdown(0.2)
            assert monotonic() - started < 5
            sock.close()
        disk.sessions.clear()


def test_clients_stuck_in_a_payload_do_not_stop_large_writes_of_others(disk: MemoryDevice) -> None:
    limits = Limits(payload_memory_bytes=4 * MIB)
    with serving([disk], limits=limits) as served:
        stuck = []
        for _ in range(4):
            client = served.client("disk", structured=False)
            request = write(0, bytes(MIB))
            request.cookie = 1
            client.socket.sendall(request.encode(extended=False)[:700_000])
            stuck.append(client)
        sleep(0.2)
        with served.client("disk") as client:
            client.write(8 * MIB, b"z" * (2 * MIB))
            assert client.read(10 * MIB - 4, 8) == b"zzzz\0\0\0\0"
        for client in stuck:
            client.close()


def test_payload_memory_is_bounded_and_reused() -> None:
    memory = PayloadMemory(buffer_bytes=4096, total_bytes=3 * 4096)
    taken = [memory.take() for _ in range(4)]
    assert taken[3] is None
    assert taken[0] is not None
    memory.give_back(taken[0])
    assert memory.take() is taken[0]
    assert memory.in_use == 3


def test_idle_connections_cost_little_memory(disk: MemoryDevice) -> None:
    with serving([disk]) as served:
        served.client("disk").close()
        before = resident_bytes()
        clients = [served.client("disk") for _ in range(100)]
        for client in clients:
            client.read(0, 512)
        assert resident_bytes() - before < 100 * 128 * 1024
        for client in clients:
            client.close()


# --- the log
# ---------------------------------------------------------------------------------------------------------


def test_misbehaving_clients_do_not_decide_how_much_is_logged(disk: MemoryDevice) -> None:
    with serving([disk]) as served:
        for _ in range(200):
            sock = connect(served)
            sock.sendall(b"\0\0\0\3JUNKJUNK" + bytes(8))
            while sock.recv(100):
                pass
            sock.close()
        assert 0 < len(served.log) <= 20
        assert "option magic" in served.log[0]


def test_left_out_lines_are_counted() -> None:
    now = [0.0]
    lines: list[str] = []
    log = LogLimit(lines.append, lambda: now[0])
    for number in range(30):
        log(str(number))
    now[0] = 11.0
    log("later")
    assert len(lines) == 22
    assert lines[-2:] == ["10 more lines about clients were left out", "later"]


def test_names_that_are_not_text_do_not_hurt_the_log(disk: MemoryDevice, tmp_path: Path) -> None:
    with serving([disk]) as served:
        sock = connect(served)
        sock.sendall(b"\0\0\0\3" + option(Option.EXPORT_NAME, b"\xff\xfe\n\x1b[31m"))
        while sock.recv(100):
            pass
        sock.close()
        client = Client(connect(served))
        client.send_option(Option.EXPORT_NAME, b"tricky\n\x1b[31mname")
        client.close()
        eventually(lambda: len(served.log) == 2)
        assert all(line.isprintable() for line in served.log)

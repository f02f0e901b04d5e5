"""The shared loop: when connections go there, when they come back, and that nobody notices."""

import errno
import random
import threading
from collections.abc import Iterator
from time import monotonic, sleep

import pytest

from nbd import shared_loop, transmission
from nbd.activity import Activity
from nbd.client import Client
from nbd.errors import RemoteError
from nbd.shared_loop import SharedLoop
from tests.fakes.memory_device import MemoryDevice, MemorySession
from tests.fakes.nbd_server import Served, eventually, serving

MIB = 1 << 20


class Watched:
    """Counts stays in the loop and turns of its thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stays = 0
        self.turns = 0
        serve, turn = SharedLoop.serve, SharedLoop._turn

        def counted_serve(loop: SharedLoop, *arguments: object) -> None:
            self.stays += 1
            serve(loop, *arguments)  # type: ignore[arg-type]

        def counted_turn(loop: SharedLoop, member: object) -> bool:
            self.turns += 1
            return turn(loop, member)  # type: ignore[arg-type]

        monkeypatch.setattr(SharedLoop, "serve", counted_serve)
        monkeypatch.setattr(SharedLoop, "_turn", counted_turn)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedLoop, "wanted", lambda loop: not loop._activity.stopping)
    monkeypatch.setattr(transmission, "_BY_ITSELF_BATCHES", 0)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving([MemoryDevice("disk", 64 * MIB)]) as running:
        yield running


def work(served: Served, number: int, failures: list[str], seconds: float, sizes: tuple[int, ...]) -> None:
    """Write and read back in a share of the disk that is this client's alone, with everything off the hot path too."""
    numbers = random.Random(number)
    base, share = number * 4 * MIB, 4 * MIB
    model = bytearray(share)
    style = ({"structured": False}, {"structured": True}, {"extended": True})[number % 3]
    end = monotonic() + seconds
    with served.client("disk", **style) as client:
        while monotonic() < end:
            size = numbers.choice(sizes)
            at = numbers.randrange(0, share - size, 512)
            match numbers.randrange(8):
                case 0 | 1 | 2:
                    data = numbers.randbytes(size)
                    client.write(base + at, data)
                    model[at : at + size] = data
                case 3:
                    client.zero(base + at, size)
                    model[at : at + size] = bytes(size)
                case 4:
                    client.flush()
                case _:
                    if client.read(base + at, size) != bytes(model[at : at + size]):
                        failures.append(f"client {number}: {size} bytes at {at} differ")
                        return


@pytest.mark.parametrize("sizes", [(512, 4096), (512, 4096, 65536, 300_000)], ids=["small", "mixed"])
def test_busy_connections_share_and_see_their_own_data(
    served: Served, watched: Watched, always: None, sizes: tuple[int, ...]
) -> None:
    failures: list[str] = []
    threads = [
        threading.Thread(target=work, args=(served, number, failures, 1.0, sizes)) for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert watched.turns > 100


def test_three_busy_connections_begin_to_share_by_themselves(served: Served, watched: Watched) -> None:
    stop = threading.Event()

    def ask() -> None:
        with served.client("disk") as client:
            while not stop.is_set():
                client.read(0, 512)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: watched.turns > 200)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_connection_that_is_alone_comes_back_to_its_own_thread(
    served: Served, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_loop, "_TURN_SECONDS_MAX", 60.0)  # on a busy machine any turn may be slow
    asked = []
    monkeypatch.setattr(SharedLoop, "wanted", lambda loop: not asked and not asked.append(loop))
    with served.client("disk") as client:
        for _ in range(2 * shared_loop._ALONE_TURNS):
            client.read(0, 512)
    assert watched.stays == 1
    assert shared_loop._ALONE_TURNS <= watched.turns <= shared_loop._ALONE_TURNS + 2


def test_a_turn_that_waits_is_the_last_one(
    served: Served, watched: Watched, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that makes one connection wait must not make all wait in line."""
    monkeypatch.setattr(transmission, "_BY_ITSELF_BATCHES", 10)
    write = MemorySession.write

    def slow(session: MemorySession, offset: int, data: memoryview) -> None:
        sleep(2 * shared_loop._TURN_SECONDS_MAX)
        write(session, offset, data)

    monkeypatch.setattr(MemorySession, "write", slow)
    with served.client("disk") as client:
        for _ in range(11):
            client.write(0, b"x" * 512)
    assert watched.turns <= 4  # a header alone is a turn of its own


def test_a_reader_that_stops_does_not_stop_the_loop(served: Served, watched: Watched, always: None) -> None:
    with served.client("disk", structured=False) as stuck, served.client("disk") as other:
        head = bytes.fromhex("2560951300000000")
        requests = [
            head + number.to_bytes(8, "big") + bytes(8) + (4096).to_bytes(4, "big") for number in range(2000)
        ]
        stuck.socket.sendall(b"".join(requests))  # replies of 8 MiB, more than fits any socket buffer
        for _ in range(50):
            assert other.read(0, 512) == bytes(512)


def test_an_internal_error_in_a_turn_ends_one_connection_only(
    served: Served, watched: Watched, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = MemorySession.read

    def faulty(session: MemorySession, offset: int, length: int, parts: list[object]) -> int:
        if offset == 4096:
            message = "a bug"
            raise RuntimeError(message)
        return read(session, offset, length, parts)  # type: ignore[arg-type]

    monkeypatch.setattr(MemorySession, "read", faulty)
    with served.client("disk") as victim, served.client("disk") as other:
        assert other.read(0, 512) == bytes(512)
        with pytest.raises((OSError, Exception)):
            victim.read(4096, 512)
        assert other.read(0, 512) == bytes(512)
    assert any("a bug" in line for line in served.log)


def test_a_refused_request_is_answered_and_the_connection_goes_on(served: Served, always: None) -> None:
    with served.client("disk") as client:
        for _ in range(3):
            with pytest.raises(RemoteError) as refused:
                client.read(64 * MIB - 512, 1024)
            assert refused.value.error == errno.EINVAL
            assert client.read(0, 512) == bytes(512)


def test_stopping_gives_every_connection_back(always: None) -> None:
    with serving([MemoryDevice("disk", MIB)]) as served:
        clients: list[Client] = [served.client("disk") for _ in range(5)]
        for client in clients:
            client.read(0, 512)
        began = monotonic()
        served.server.shutdown(5.0)
        assert monotonic() - began < 3.0
        for client in clients:
            client.close()


def test_a_stopping_server_takes_nobody_in() -> None:
    activity = Activity()
    loop = SharedLoop(activity, 0.0)
    activity.stop()
    assert not loop.wanted()
    loop.serve(-1, lambda: True, object())  # returns at once
    loop.close()
    activity.close()

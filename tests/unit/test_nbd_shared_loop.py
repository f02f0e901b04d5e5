"""The shared loop: when connections go there, when they come back, and that nobody notices."""

import errno
import random
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from nbd import Server, shared_loop, transmission
from nbd.activity import Activity
from nbd.client import Client
from nbd.errors import RemoteError
from nbd.shared_loop import SharedLoop
from nbd.uri import unix_uri
from tests.fakes.memory_device import MemoryDevice, MemorySession
from tests.fakes.nbd_server import Served, eventually, serving
from thinpool.exports import PoolExports
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

MIB = 1 << 20


class Watched:
    """Counts stays in the loop and turns of its thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stays = 0
        self.turns = 0
        serve, turn = SharedLoop.serve, SharedLoop._turn

        def counted_serve(loop: SharedLoop, *arguments: object) -> bool:
            self.stays += 1
            return serve(loop, *arguments)  # type: ignore[arg-type]

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


def test_connections_that_wait_for_a_disk_come_ever_more_rarely(
    served: Served, watched: Watched, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a dozen of them would have the loop wait for their disk most of the time."""
    monkeypatch.setattr(transmission, "_BY_ITSELF_BATCHES", 4)
    disk = threading.Event()
    write = MemorySession.write

    def slow(session: MemorySession, offset: int, data: memoryview) -> None:
        if not disk.is_set():
            sleep(2 * shared_loop._TURN_SECONDS_MAX)
        write(session, offset, data)

    monkeypatch.setattr(MemorySession, "write", slow)
    with served.client("disk") as client:
        for _ in range(100):
            client.write(0, b"x" * 512)
        assert 2 <= watched.stays <= 6  # every fifth write would have been one
        disk.set()
        before = watched.turns
        for _ in range(200):
            client.write(0, b"x" * 512)
        assert watched.turns > before + 50


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


@pytest.fixture
def activity() -> Iterator[Activity]:
    made = Activity()
    yield made
    made.close()


def test_where_the_system_has_no_thread_for_the_loop_connections_keep_their_own(
    activity: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(thread: threading.Thread) -> None:
        message = "can't start new thread"
        raise RuntimeError(message)

    loop = SharedLoop(activity, 0.0)
    token, (ours, theirs) = object(), socket.socketpair()
    activity.working.add(token)
    with ours, theirs:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refused)
            for _ in range(2):
                loop.serve(ours.fileno(), lambda: False, token)  # returns at once
        assert token in activity.working
        theirs.send(b"x")
        loop.serve(ours.fileno(), lambda: False, token)  # later there is one
    activity.stop()
    loop.close()


def test_a_descriptor_that_cannot_be_watched_stays_with_its_thread(
    activity: Activity, tmp_path: Path
) -> None:
    """So it is where the user's epoll watches are used up. Nobody else's stay may end badly for it."""
    loop = SharedLoop(activity, 0.0)
    token, (ours, theirs) = object(), socket.socketpair()
    activity.working.add(token)
    with ours, theirs, (tmp_path / "file").open("wb") as unwatchable:
        loop.serve(unwatchable.fileno(), lambda: True, token)
        assert token in activity.working
        guest = threading.Thread(target=loop.serve, args=(ours.fileno(), lambda: True, object()), daemon=True)
        guest.start()
        eventually(lambda: ours.fileno() in loop._members)
        activity.stop()
        guest.join(5)
        assert not guest.is_alive()
        loop.close()


def test_a_snapshot_that_waits_for_a_disk_makes_its_own_device_wait_only(
    watched: Watched, always: None
) -> None:
    with tempfile.TemporaryDirectory(prefix="nbd-") as name:
        folder = Path(name)
        create_pool(folder / "pool", size_bytes=4 * MIB)
        pool = open_pool(PoolLocation.directory(folder / "pool"))
        for device in ("held", "other"):
            pool.create_device(device, MIB)
        server = Server(PoolExports(pool))
        server.listen_unix(folder / "s")
        server.start()
        try:
            with (
                Client.connect(unix_uri(folder / "s", "held")) as held,
                Client.connect(unix_uri(folder / "s", "other"), timeout_seconds=5.0) as other,
            ):
                held.write(0, b"x" * 512)
                (device_held,) = (d for d in pool.engine.devices.values() if d.block_map.entries[0])
                other.read(0, 512)
                with device_held.quiet():
                    before = watched.turns
                    cookie = held.send_request(0, 0, 512)
                    sleep(0.1)  # the loop has met the session that is held
                    for _ in range(20):
                        assert other.read(0, 512) == bytes(512)
                    # The loop goes on, whichever thread it was that met the held device.
                    assert watched.turns >= before + 20
                assert held.reply_to(cookie).data == b"x" * 512
        finally:
            server.shutdown(1.0)
            pool.close()


def test_a_session_that_may_wait_is_left_to_its_own_thread(
    served: Served, watched: Watched, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content of a device that is being pulled comes over a network."""
    monkeypatch.setattr(transmission, "_BY_ITSELF_BATCHES", 1)
    served.device().held_up = True
    with served.client("disk") as client:
        for _ in range(10):
            assert client.read(0, 512) == bytes(512)
        assert watched.turns == 0
        served.device().held_up = False
        for _ in range(10):
            assert client.read(0, 512) == bytes(512)
    assert watched.turns > 0

"""A server that is killed while it fetches a device from a store and clients change that device at the same time."""

from __future__ import annotations

import errno
import signal
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nbd import RemoteError
from nbd.client import Client
from nbd.errors import ConnectionEnded
from tests.conformance.running_pool import RunningPool, running_pool
from tests.fakes.store_source import FakeDevice
from thinpool.store.keys import CHUNK_BYTES
from thinpool.store.known_chunks import KnownChunks
from thinpool.store.pushing import Push
from thinpool.store.store import Store

pytestmark = pytest.mark.timeout(280)
pytest.importorskip("obstore", reason="needs the package obstore")

SECTOR_BYTES = 512

# Servers answer reads of up to 64 MiB.
READ_BYTES = 32 << 20


class Device:
    """A client of the lazy device, and what was answered to it. At most one request is under way."""

    def __init__(self, content: bytes, seed: int) -> None:
        self.random = Random(seed)
        self.content = bytearray(content)
        self.answered = 0
        self.failure: BaseException | None = None
        self._under_way: tuple[int, bytes] | None = None

    def work(self, uri_socket: Path, name: str) -> None:
        """Write, discard and read until the server is gone."""
        try:
            with Client.connect(f"nbd+unix:///{name}?socket={uri_socket}") as client:
                while True:
                    try:
                        self._one(client)
                    except RemoteError as error:
                        # What lies in a pack that is away; nothing of the request was done then.
                        assert error.error == errno.EIO
                        self._under_way = None
        except (OSError, EOFError, ConnectionEnded):
            pass  # killed
        except BaseException as error:  # carried to the test, which raises it
            self.failure = error

    def _one(self, client: Client) -> None:
        random, blocks = self.random, len(self.content) // CHUNK_BYTES
        # Most of it where the background comes last: what is changed there was never here.
        first = blocks * 3 // 4 if random.random() < 0.7 else 0
        block, choice = random.randrange(first, blocks) * CHUNK_BYTES, random.random()
        if choice < 0.2:
            assert client.read(block, CHUNK_BYTES) == self.content[block : block + CHUNK_BYTES]
            return
        offset, data = block, bytes(CHUNK_BYTES)
        if choice >= 0.4:
            count = random.choice((1, 8, 31, CHUNK_BYTES // SECTOR_BYTES))
            offset += random.randrange(CHUNK_BYTES // SECTOR_BYTES - count + 1) * SECTOR_BYTES
            data = random.randbytes(SECTOR_BYTES) * count
        self._under_way = offset, data
        if choice < 0.4:
            client.trim(offset, len(data))
        else:
            client.write(offset, data)
        self.content[offset : offset + len(data)] = data
        self._under_way = None
        self.answered += 1

    def judge(self, client: Client, *, everything: bool) -> None:
        """What was answered is there; of what was under way each sector is old or new."""
        if self._under_way is not None:
            self._settle(client, *self._under_way)
            self._under_way = None
        if everything:
            for at in range(0, len(self.content), READ_BYTES):
                self._compare(at, client.read(at, min(READ_BYTES, len(self.content) - at)))

    def _settle(self, client: Client, offset: int, data: bytes) -> None:
        try:
            shown = client.read(offset, len(data))
        except RemoteError as error:
            # The block is still in a pack that is away, so nothing was done to it.
            assert error.error == errno.EIO
            return
        for at in range(0, len(data), SECTOR_BYTES):
            if shown[at : at + SECTOR_BYTES] == data[at : at + SECTOR_BYTES]:
                self.content[offset + at : offset + at + SECTOR_BYTES] = data[at : at + SECTOR_BYTES]
        self._compare(offset, shown)

    def _compare(self, offset: int, shown: bytes) -> None:
        wrong = [
            offset + at
            for at in range(0, len(shown), SECTOR_BYTES)
            if shown[at : at + SECTOR_BYTES] != self.content[offset + at : offset + at + SECTOR_BYTES]
        ]
        assert not wrong, f"{len(wrong)} sectors are wrong, the first at byte {wrong[0]}"


def pushed(url: str, blocks: int) -> bytes:
    """A snapshot in a new store: a quarter of it holes, the rest noise."""
    noise, device = Random(1), FakeDevice(blocks * CHUNK_BYTES)
    for block in range(blocks):
        if block % 4:
            device.blocks[block] = noise.randbytes(CHUNK_BYTES)
    snapshot = device.snapshot()
    Push(Store.open(url, create=True), snapshot, "image", KnownChunks(None)).run()
    return snapshot.content(0, snapshot.size_bytes)


def sent_away(packs: Path) -> dict[Path, Path]:
    """Move the second half of the packs of chunks out of the store; the last pack, of segments, stays."""
    found = sorted(path for path in packs.rglob("*") if path.is_file())
    away = {path: path.with_name(f"{path.name}.partial") for path in found[len(found) // 2 : -1]}
    assert away
    for path, aside in away.items():
        path.rename(aside)
    return away


def state(pool: RunningPool) -> dict[str, Any]:
    return dict(pool.operate("pull-state", name="copy")["pull"])


def kill_while_fetching(tmp_path: Path, seed: int, *, blocks: int, kills: int) -> None:
    """Kill, start again and compare; the packs of the end are away until the last time."""
    url = (tmp_path / "store").as_uri()
    device = Device(pushed(url, blocks), seed)
    away = sent_away(tmp_path / "store" / "packs")
    with running_pool("1G") as pool:
        # As `pull --lazy` asks for it; that command would come back when most has been fetched.
        pool.operate("pull", url=url, snapshot="image", name="copy", lazy=True, read_only=False)
        for number in range(kills):
            kill_at_work(pool, device)
            if number == kills - 1:
                for path, aside in away.items():
                    aside.rename(path)
            pool.start()
            assert number == kills - 1 or state(pool)["remote_bytes"], "all was fetched before the kill"
            with Client.connect(pool.uri("copy")) as client:
                device.judge(client, everything=number == kills - 1)
        deadline = time.monotonic() + 120
        while not state(pool)["complete"]:
            assert time.monotonic() < deadline, pool.log()
            time.sleep(0.05)
        with Client.connect(pool.uri("copy")) as client:
            device.judge(client, everything=True)
        assert not list((pool.path / "remote").iterdir())
        pool.stop()
        pool.check_metadata()


def kill_at_work(pool: RunningPool, device: Device) -> None:
    """Let a client work for a few requests, and kill the server."""
    worker = threading.Thread(target=device.work, args=(pool.socket, "copy"))
    worker.start()
    enough, latest = device.answered + device.random.randrange(5, 40), time.monotonic() + 60
    while device.answered < enough and device.failure is None:
        assert time.monotonic() < latest, "the server answers nothing"
        time.sleep(0.002)
    assert pool.server is not None
    pool.server.send_signal(signal.SIGKILL)
    pool.server.wait()
    worker.join()
    if device.failure is not None:
        raise device.failure


def test_a_few_kills_while_a_device_is_fetched(tmp_path: Path) -> None:
    kill_while_fetching(tmp_path, 1, blocks=768, kills=3)


@pytest.mark.deep
@pytest.mark.timeout(0)
def test_many_kills_while_a_device_is_fetched(tmp_path: Path) -> None:
    for seed in range(10):
        (place := tmp_path / str(seed)).mkdir()
        kill_while_fetching(place, seed, blocks=2048, kills=8)

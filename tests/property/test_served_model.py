"""The oracle of `test_engine_model` again, with every read and write going over real NBD connections to a server.

Two connections a device, in simple, structured or extended mode or inside TLS, stay open over snapshots: what one wrote and was
answered, the other reads, and the snapshot taken in between holds.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from nbd import CertificateTls
from nbd.client import Client
from nbd.server import Server
from nbd.uri import unix_uri
from tests.fakes.nbd_server import make_certificates
from thinpool.errors import DeviceInUse
from thinpool.exports import PoolExports
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation

BLOCK = 65536
OFFSETS = st.one_of(st.integers(0, 6 * BLOCK), st.integers(0, 6).map(lambda n: n * BLOCK))
LENGTHS = st.one_of(st.integers(1, 3 * BLOCK), st.sampled_from([512, 4096, BLOCK, 2 * BLOCK]))


@functools.cache
def certificates() -> Path:
    directory = tempfile.mkdtemp(prefix="tp-pki-")
    atexit.register(shutil.rmtree, directory)
    return make_certificates(Path(directory))


class ServedModel(RuleBasedStateMachine):
    form = ""  # of replies, or inside TLS; each has a subclass below
    names = Bundle("names")

    @initialize()
    def start(self) -> None:
        self.work = tempfile.TemporaryDirectory(prefix="tp-")
        root = Path(self.work.name, "pool")
        create_pool(root, size_bytes=256 * BLOCK)
        self.pool = open_pool(PoolLocation.directory(root))
        tls = CertificateTls(certificates()) if self.form == "tls" else None
        self.server = Server(PoolExports(self.pool), tls=tls)
        self.socket = os.path.join(self.work.name, "s")
        self.server.listen_unix(self.socket)
        self.server.start()
        self.clients: dict[str, list[Client]] = {}
        self.oracle: dict[str, bytearray] = {}
        self.count = 0

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for name in list(self.clients):
                self.hang_up(name)
            self.server.shutdown(1)
            self.pool.close()
            self.work.cleanup()

    def hang_up(self, name: str) -> None:
        for client in self.clients.pop(name, []):
            client.disconnect()
            client.close()
        deadline = time.monotonic() + 10
        while self.pool.info(name).open_count and time.monotonic() < deadline:
            time.sleep(0.001)

    def client(self, name: str, which: int) -> Client:
        if name not in self.clients:
            self.clients[name] = [self.connect(name), self.connect(name)]
        return self.clients[name][which]

    def connect(self, name: str) -> Client:
        uri = unix_uri(self.socket, name, tls=self.form == "tls")
        if self.form == "tls":
            uri += f"&tls-certificates={certificates()}&tls-hostname=localhost"
        return Client.connect(uri, structured=self.form != "simple", extended=self.form == "extended")

    @rule(target=names, size=st.integers(1, 7 * BLOCK))
    def create(self, size: int) -> str:
        self.count += 1
        name = f"d{self.count}"
        self.pool.create_device(name, size)
        self.oracle[name] = bytearray(size)
        return name

    def span(self, name: str, offset: int, length: int) -> tuple[int, int]:
        size = len(self.oracle[name])
        offset = min(offset, size - 1)
        return offset, min(length, size - offset)

    @rule(
        name=names,
        which=st.integers(0, 1),
        offset=OFFSETS,
        length=LENGTHS,
        seed=st.integers(1, 255),
        fua=st.booleans(),
    )
    def write(self, name: str, which: int, offset: int, length: int, seed: int, fua: bool) -> None:
        offset, length = self.span(name, offset, length)
        data = bytes((seed * 7 + i) & 255 for i in range(251)) * (length // 251 + 1)
        self.client(name, which).write(offset, data[:length], flags=1 if fua else 0)
        self.oracle[name][offset : offset + length] = data[:length]
        self.compare(name, 1 - which)

    @rule(name=names, which=st.integers(0, 1), offset=OFFSETS, length=LENGTHS)
    def zero(self, name: str, which: int, offset: int, length: int) -> None:
        offset, length = self.span(name, offset, length)
        self.client(name, which).zero(offset, length)
        self.oracle[name][offset : offset + length] = bytes(length)
        self.compare(name, 1 - which)

    @rule(name=names, which=st.integers(0, 1), offset=OFFSETS, length=LENGTHS)
    def trim(self, name: str, which: int, offset: int, length: int) -> None:
        offset, length = self.span(name, offset, length)
        self.client(name, which).trim(offset, length)
        end = offset + length
        begin = -(-offset // BLOCK) * BLOCK
        end = end if end == len(self.oracle[name]) else end // BLOCK * BLOCK
        if begin < end:
            self.oracle[name][begin:end] = bytes(end - begin)
        self.compare(name, 1 - which)

    @rule(name=names, which=st.integers(0, 1))
    def flush(self, name: str, which: int) -> None:
        self.client(name, which).flush()

    @rule(target=names, origin=names)
    def snapshot(self, origin: str) -> str:
        self.count += 1
        name = f"s{self.count}"
        self.pool.create_snapshot(origin, name)
        self.oracle[name] = bytearray(self.oracle[origin])
        self.compare(name, 0)
        return name

    @rule(name=names, snapshot=names)
    def rollback(self, name: str, snapshot: str) -> None:
        if name == snapshot:
            return
        if name in self.clients:
            with pytest.raises(DeviceInUse):
                self.pool.rollback(name, snapshot, keep=False)
            self.hang_up(name)
        self.pool.rollback(name, snapshot, keep=False)
        self.oracle[name] = bytearray(self.oracle[snapshot])
        self.compare(name, 0)

    @rule()
    def reclaim(self) -> None:
        self.pool.commit()
        self.pool.engine.reclaim()
        for name in self.clients:
            self.compare(name, 0)

    def compare(self, name: str, which: int) -> None:
        assert self.client(name, which).read(0, len(self.oracle[name])) == bytes(self.oracle[name])


def machine(form: str) -> type:
    case = type(f"Served{form.title()}", (ServedModel,), {"form": form}).TestCase
    case.settings = settings(
        max_examples=int(os.environ.get("THINPOOL_EXAMPLES", "10")),
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize="THINPOOL_EXAMPLES" not in os.environ,
    )
    return case


TestSimple, TestStructured, TestExtended, TestTls = map(machine, ("simple", "structured", "extended", "tls"))

"""A real server over memory devices, on a Unix socket in a short temporary directory, and certificates for it."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep

from nbd import Limits, Server, ServerTls
from nbd.access import Access
from nbd.client import Client
from nbd.uri import unix_uri
from tests.fakes.memory_device import MemoryDevice, MemoryDirectory


class Served:
    """What a test needs to know of a running server."""

    def __init__(self, server: Server, socket_path: Path, directory: MemoryDirectory, log: list[str]) -> None:
        self.server = server
        self.socket_path = socket_path
        self.directory = directory
        self.log = log

    def uri(self, export: str = "", *, tls: bool = False) -> str:
        return unix_uri(self.socket_path, export, tls=tls)

    def client(self, export: str = "", **options: object) -> Client:
        return Client.connect(self.uri(export), **options)  # type: ignore[arg-type]

    def device(self, name: str = "disk") -> MemoryDevice:
        return self.directory.devices[name]


@contextlib.contextmanager
def serving(
    devices: Sequence[MemoryDevice],
    *,
    limits: Limits | None = None,
    tls: ServerTls | None = None,
    access: Access | None = None,
    default: str | None = None,
) -> Iterator[Served]:
    """Serve these devices and check in the end that nothing is left: sessions, connections, the socket's path."""
    log: list[str] = []
    directory = MemoryDirectory(devices, default)
    folder = Path(tempfile.mkdtemp(prefix="nbd-"))  # short: a socket path has room for 107 bytes
    path = folder / "s"
    server = Server(directory, tls=tls, access=access, limits=limits, log=log.append)
    try:
        server.listen_unix(path)
        server.start()
        yield Served(server, path, directory, log)
    finally:
        server.shutdown(1.0)
        assert not path.exists()
        assert server.connections() == []
        assert all(device.open_sessions == 0 for device in devices)
        shutil.rmtree(folder)


def eventually(condition: object, seconds: float = 10.0) -> None:
    """Wait for a condition that another thread brings about."""
    assert callable(condition)
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it did not come to that"
        sleep(0.005)


def descriptors() -> int:
    """Number of open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def make_certificates(folder: Path) -> Path:
    """Make an authority, a server certificate for localhost and client certificates `alice` and (foreign) `mallory`.

    The layout is that of nbdkit and QEMU; `folder/mallory` holds a client whose authority is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _authority(folder, "test authority")
    _certificate(folder, folder, "server", "localhost", "serverAuth")
    _certificate(folder, folder, "client", "alice", "clientAuth")
    mallory = folder / "mallory"
    mallory.mkdir()
    _authority(mallory, "another authority")
    _certificate(mallory, mallory, "client", "mallory", "clientAuth")
    shutil.copy(folder / "ca-cert.pem", mallory / "ca-cert.pem")
    return folder


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def _authority(folder: Path, name: str) -> None:
    _openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-keyout", str(folder / "ca-key.pem"), "-out", str(folder / "ca-cert.pem")),
        *("-subj", f"/CN={name}", "-days", "30", "-addext", "basicConstraints=critical,CA:TRUE"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )


def _certificate(authority: Path, folder: Path, stem: str, name: str, purpose: str) -> None:
    request = folder / f"{stem}.csr"
    extensions = folder / f"{stem}.ext"
    extensions.write_text(
        f"basicConstraints=CA:FALSE\nextendedKeyUsage={purpose}\nkeyUsage=digitalSignature\n"
        f"subjectAltName=DNS:{name},IP:127.0.0.1,IP:::1\n"
    )
    _openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-keyout", str(folder / f"{stem}-key.pem"), "-out", str(request), "-subj", f"/CN={name}"),
    )
    _openssl(
        *("x509", "-req", "-in", str(request), "-days", "30", "-CAcreateserial"),
        *("-CA", str(authority / "ca-cert.pem"), "-CAkey", str(authority / "ca-key.pem")),
        *("-extfile", str(extensions), "-out", str(folder / f"{stem}-cert.pem")),
    )

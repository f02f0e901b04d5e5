"""nbd-tester-client, the test client of the nbd project, built from a Debian source package by tools/nbd-tester."""

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbd.tls import CertificateTls
from tests.fakes.memory_device import MemoryDevice
from tests.fakes.nbd_server import Served, make_certificates, serving

ROOT = Path(__file__).resolve().parents[2]
SIZE = 50 << 20  # what the project's own test suite gives its exports

pytestmark = [pytest.mark.peer, pytest.mark.xdist_group("nbd-tester")]


@functools.cache
def program() -> Path:
    built = subprocess.run(
        [ROOT / "tools" / "nbd-tester"], capture_output=True, text=True, timeout=280, check=False
    )
    if built.returncode != 0:
        pytest.skip(f"machine: nbd-tester-client cannot be built here: {built.stderr.strip()[-300:]}")
    return Path(built.stdout.strip())


@pytest.fixture(params=["plain", "tls"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Served, list[str]]]:
    disk = MemoryDevice("disk", SIZE, record=False)
    if request.param == "plain":
        with serving([disk]) as running:
            yield running, []
        return
    folder = make_certificates(tmp_path / "pki")
    options = ["-C", str(folder / "client-cert.pem"), "-K", str(folder / "client-key.pem")]
    options += ["-A", str(folder / "ca-cert.pem"), "-H", "localhost"]
    with serving([disk], tls=CertificateTls(folder, verify_peer=True)) as running:
        yield running, options


def run(served: tuple[Served, list[str]], *options: str) -> None:
    running, tls = served
    done = subprocess.run(
        [program(), "-N", "disk", "-u", running.socket_path, *options, *tls],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.stdout[-200:], done.stderr[-1000:])


@pytest.mark.parametrize("options", [[], ["-w"], ["-o"]], ids=["read", "write", "oversize"])
def test_the_nbd_projects_own_tester(served: tuple[Served, list[str]], options: list[str]) -> None:
    run(served, *options)


def test_the_nbd_projects_handshake_test() -> None:
    """It never begins TLS, so it is for plain servers only."""
    with serving([MemoryDevice("disk", SIZE, record=False)]) as running:
        run((running, []), "-h")


@pytest.mark.parametrize(
    "log", ["integrity-test.tr", pytest.param("integrityhuge-test.tr", marks=pytest.mark.deep)]
)
def test_the_nbd_projects_integrity_logs(served: tuple[Served, list[str]], log: str) -> None:
    """Recorded requests of a file system, and of up to 50 MB each, whose data are checked as they are read back."""
    run(served, "-i", "-t", str(program().parent / log))

"""Foreign clients against the server with a device in memory: libnbd's tools, QEMU's, fio, nbd-client.

Each runs in a plain directory with a plain PATH (libnbd's Python module is called `nbd` too). With TLS they use the same
certificates as the server, made once by openssl.
"""

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbd import CertificateTls, ServerTls
from tests.fakes.memory_device import BLOCK_BYTES, MemoryDevice
from tests.fakes.nbd_server import Served, make_certificates, serving

MIB = 1 << 20
SIZE = 64 * MIB
ENVIRONMENT = {**os.environ, "PYTHONSAFEPATH": "1", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C"}
for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
    ENVIRONMENT.pop(name, None)

pytestmark = [pytest.mark.peer, pytest.mark.timeout(120)]


def require(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool, path=ENVIRONMENT["PATH"]) is None:
            pytest.skip(f"{tool} is not installed")


def run(*command: str | Path, cwd: Path, ok: bool = True, text: str | None = None) -> str:
    """Run a client and return what it printed."""
    require(str(command[0]))
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        check=False,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        input=text,
    )
    shown = f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert (result.returncode == 0) == ok, shown
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("openssl")
    return make_certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def disk() -> MemoryDevice:
    """Four pieces of data with holes between them, and a dirty bitmap."""
    device = MemoryDevice("disk", SIZE, description="a test disk", dirty={"snap": [(MIB, 0), (2 * MIB, 1)]})
    source = random.Random(7)
    for at in (0, 10 * MIB, 11 * MIB, SIZE - MIB):
        device.data[at : at + MIB] = source.randbytes(MIB)
        first = at // BLOCK_BYTES
        device.kinds[first : first + MIB // BLOCK_BYTES] = b"\1" * (MIB // BLOCK_BYTES)
    device.log = None
    return device


class Peer(Served):
    """A served device and how each family of clients is told about it."""

    certificates: Path | None = None

    @classmethod
    def of(cls, served: Served, certificates: Path | None) -> "Peer":
        peer = cls(served.server, served.socket_path, served.directory, served.log)
        peer.certificates = certificates
        return peer

    def libnbd(self, export: str = "disk") -> str:
        """A URI for libnbd."""
        if self.certificates is None:
            return self.uri(export)
        more = f"&tls-certificates={self.certificates}&tls-hostname=localhost"
        return f"nbds+unix://localhost/{export}?socket={self.socket_path}{more}"

    def qemu(self, export: str = "disk", *, more: str = "") -> list[str]:
        """Arguments for QEMU's tools: always as image options, always raw."""
        where = f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={self.socket_path}"
        where += f",file.export={export}{more}"
        if self.certificates is None:
            return ["--image-opts", where]
        tls = f"tls-creds-x509,id=tls0,dir={self.certificates},endpoint=client"
        return ["--object", tls, "--image-opts", f"{where},file.tls-creds=tls0,file.tls-hostname=localhost"]


@pytest.fixture(params=["plain", "tls"])
def peer(request: pytest.FixtureRequest, disk: MemoryDevice, certificates: Path) -> Iterator[Peer]:
    tls: ServerTls | None = CertificateTls(certificates) if request.param == "tls" else None
    with serving([disk, MemoryDevice("small", 1000, read_only=True)], tls=tls, default="disk") as served:
        yield Peer.of(served, certificates if tls else None)
        assert [line for line in served.log if "internal" in line] == []


@pytest.fixture
def plain(disk: MemoryDevice) -> Iterator[Peer]:
    with serving([disk, MemoryDevice("small", 1000, read_only=True)], default="disk") as served:
        yield Peer.of(served, None)
        assert served.log == []


# --- libnbd ------------------------------------------------------------------------------------------------------------


def test_nbdinfo_shows_everything(peer: Peer, tmp_path: Path) -> None:
    info = json.loads(run("nbdinfo", "--json", peer.libnbd(), cwd=tmp_path))
    (export,) = info["exports"]
    assert info["structured"] is True
    assert (info["TLS"] is True) == (peer.certificates is not None)
    assert export["export-size"] == SIZE
    assert export["description"] == "a test disk"
    assert set(export["contexts"]) == {"base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:snap"}
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == 65536
    assert export["block_size_maximum"] == 32 * MIB
    for can in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{can}"] is True
    assert export["is_read_only"] is False


def test_nbdinfo_lists_all_exports(peer: Peer, tmp_path: Path) -> None:
    info = json.loads(run("nbdinfo", "--list", "--json", peer.libnbd(), cwd=tmp_path))
    assert {export["export-name"]: export["is_read_only"] for export in info["exports"]} == {
        "disk": False,
        "small": True,
    }


def test_nbdinfo_answers_questions_by_its_status(plain: Peer, tmp_path: Path) -> None:
    assert run("nbdinfo", "--size", plain.libnbd(), cwd=tmp_path).strip() == str(SIZE)
    run("nbdinfo", "--can", "multi-conn", plain.libnbd(), cwd=tmp_path)
    run("nbdinfo", "--is", "read-only", plain.libnbd("small"), cwd=tmp_path)
    run("nbdinfo", "--is", "read-only", plain.libnbd(), cwd=tmp_path, ok=False)
    assert "nobody" in run("nbdinfo", plain.libnbd("nobody"), cwd=tmp_path, ok=False)


def test_nbdinfo_maps_every_context(peer: Peer, tmp_path: Path) -> None:
    def shown(context: str) -> list[tuple[int, int, int]]:
        found = json.loads(run("nbdinfo", "--json", f"--map={context}", peer.libnbd(), cwd=tmp_path))
        return [(extent["offset"], extent["length"], extent["type"]) for extent in found]

    assert shown("base:allocation") == [
        (0, MIB, 0),
        (MIB, 9 * MIB, 3),
        (10 * MIB, 2 * MIB, 0),
        (12 * MIB, 51 * MIB, 3),
        (63 * MIB, MIB, 0),
    ]
    assert [extent[2] for extent in shown("qemu:allocation-depth")] == [1, 0, 1, 0, 1]
    assert shown("qemu:dirty-bitmap:snap") == [(0, MIB, 0), (MIB, 2 * MIB, 1), (3 * MIB, 61 * MIB, 0)]
    run("nbdinfo", "--map=qemu:dirty-bitmap:gone", peer.libnbd(), cwd=tmp_path, ok=False)


def test_nbdcopy_both_ways(peer: Peer, disk: MemoryDevice, tmp_path: Path) -> None:
    out = tmp_path / "out.img"
    run("nbdcopy", peer.libnbd(), out, cwd=tmp_path)
    assert out.read_bytes() == bytes(disk.data)
    other = random.Random(1).randbytes(5 * MIB) + bytes(SIZE - 5 * MIB)
    out.write_bytes(other)
    run("nbdcopy", "--flush", out, peer.libnbd(), cwd=tmp_path)
    assert bytes(disk.data) == other


def test_nbdcopy_of_one_request_at_a_time(plain: Peer, disk: MemoryDevice, tmp_path: Path) -> None:
    run("nbdcopy", "--connections=1", "--requests=1", plain.libnbd(), tmp_path / "o", cwd=tmp_path)
    assert (tmp_path / "o").read_bytes() == bytes(disk.data)


NBDSH = """
h.set_uri_allow_local_file(True)
h.connect_uri(URI)
h.pwrite(b"x" * 65536, 1 << 20)
assert h.pread(4, 1 << 20) == b"xxxx"
assert h.pread(70000, (1 << 20) + 65530)[:10] == b"xxxxxx" + bytes(4)
h.pwrite(b"f" * 10, 100, nbd.CMD_FLAG_FUA)
h.flush(); h.cache(4096, 0); h.trim(65536, 1 << 20); h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(65536, 1 << 20) == bytes(65536)
seen = []
def chunk(data, offset, status, error):
    seen.append((offset, len(data), status))
h.pread_structured(4 << 20, 9 << 20, chunk)
assert {status for _, _, status in seen} == {nbd.READ_DATA, nbd.READ_HOLE}, seen
assert sum(length for _, length, status in seen if status == nbd.READ_DATA) == 2 << 20, seen
seen.clear()
h.pread_structured(65536, 0, chunk, nbd.CMD_FLAG_DF)
assert len(seen) == 1
h.set_strict_mode(0)
def refused(call, number):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == number, (error.errnum, number, str(error))
    else:
        raise AssertionError("not refused")
refused(lambda: h.pread(2, h.get_size() - 1), 22)
refused(lambda: h.pwrite(b"xx", h.get_size() - 1), 28)
refused(lambda: h.zero(2, h.get_size() - 1), 28)
refused(lambda: h.trim(2, h.get_size() - 1), 22)
refused(lambda: h.pread(8, 0, nbd.CMD_FLAG_REQ_ONE), 22)
refused(lambda: h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE), 95)
h.pwrite(b"y" * (40 << 20), 0)
assert h.pread(8, (40 << 20) - 4) == b"yyyy" + bytes(4)
assert h.pread(40 << 20, 0) == b"y" * (40 << 20)
h.shutdown()
"""


def test_nbdsh_script(peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(f"URI = {peer.libnbd()!r}\n{NBDSH}")
    run("nbdsh", "-c", "exec(open('script.py').read())", cwd=tmp_path)


def test_nbdsh_goes_through_the_options_one_by_one(plain: Peer, tmp_path: Path) -> None:
    script = f"""
h.set_opt_mode(True)
h.connect_uri("{plain.libnbd()}")
names = []
h.opt_list(lambda name, description: names.append((name, description)))
assert names == [("disk", "a test disk"), ("small", "")], names
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name))
assert len(contexts) == 3, contexts
h.set_export_name("nobody")
try:
    h.opt_go()
except nbd.Error:
    pass
else:
    raise AssertionError
h.set_export_name("disk")
h.opt_info()
assert h.get_size() == {SIZE}
h.opt_go()
assert h.get_structured_replies_negotiated()
h.shutdown()
"""
    (tmp_path / "script.py").write_text(script)
    run("nbdsh", "-c", "exec(open('script.py').read())", cwd=tmp_path)


@pytest.mark.root
def test_nbdfuse_reads_and_writes(plain: Peer, disk: MemoryDevice, tmp_path: Path) -> None:
    require("nbdfuse", "fusermount3")
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("machine: no permission to use FUSE here")
    folder = tmp_path / "mnt"
    folder.mkdir()
    fuse = subprocess.Popen(["nbdfuse", folder / "disk", plain.libnbd()], cwd=tmp_path, env=ENVIRONMENT)
    try:
        end = time.monotonic() + 20
        while not (folder / "disk").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        with open(folder / "disk", "r+b") as file:
            assert file.read(MIB) == bytes(disk.data[:MIB])
            file.seek(20 * MIB)
            file.write(b"through fuse")
            file.flush()
            os.fsync(file.fileno())
        assert bytes(disk.data[20 * MIB : 20 * MIB + 12]) == b"through fuse"
    finally:
        subprocess.run(["fusermount3", "-u", str(folder)], check=False)
        fuse.wait(20)


# --- QEMU --------------------------------------------------------------------------------------------------------------


def test_qemu_img_info_and_map(peer: Peer, tmp_path: Path) -> None:
    info = json.loads(run("qemu-img", "info", "--output=json", *peer.qemu(), cwd=tmp_path))
    assert info["virtual-size"] == SIZE
    extents = json.loads(run("qemu-img", "map", "--output=json", *peer.qemu(), cwd=tmp_path))
    assert [(extent["start"], extent["length"], extent["data"]) for extent in extents] == [
        (0, MIB, True),
        (MIB, 9 * MIB, False),
        (10 * MIB, 2 * MIB, True),
        (12 * MIB, 51 * MIB, False),
        (63 * MIB, MIB, True),
    ]


def test_qemu_img_reads_a_dirty_bitmap(peer: Peer, tmp_path: Path) -> None:
    where = peer.qemu(more=",file.x-dirty-bitmap=qemu:dirty-bitmap:snap")
    extents = json.loads(run("qemu-img", "map", "--output=json", *where, cwd=tmp_path))
    assert [(extent["start"], extent["length"]) for extent in extents if not extent["data"]] == [
        (MIB, 2 * MIB)
    ]


def test_qemu_img_converts_both_ways_and_compares(peer: Peer, disk: MemoryDevice, tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(random.Random(3).randbytes(7 * MIB) + bytes(SIZE - 7 * MIB))
    object_options, image_options = peer.qemu()[:-2], peer.qemu()[-1]
    run(
        *("qemu-img", "convert", *object_options, "-n", "--target-image-opts", "-W", "-m", "16"),
        *("-f", "raw", str(source), image_options),
        cwd=tmp_path,
    )
    assert bytes(disk.data) == source.read_bytes()
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", *peer.qemu(), "-O", "qcow2", copy, cwd=tmp_path)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", copy, tmp_path / "copy.img", cwd=tmp_path)
    assert (tmp_path / "copy.img").read_bytes() == source.read_bytes()
    if peer.certificates is None:
        uri = peer.libnbd()
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri, cwd=tmp_path)
        run(
            "qemu-img",
            "dd",
            "-f",
            "raw",
            "-O",
            "raw",
            "bs=1M",
            "count=4",
            f"if={uri}",
            "of=o.raw",
            cwd=tmp_path,
        )
        assert (tmp_path / "o.raw").read_bytes() == source.read_bytes()[: 4 * MIB]


def test_qemu_img_bench(plain: Peer, tmp_path: Path) -> None:
    common = ["qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4k"]
    run(*common, plain.libnbd(), cwd=tmp_path)
    run(*common, "-w", "--flush-interval=100", plain.libnbd(), cwd=tmp_path)


def test_qemu_io_patterns(peer: Peer, tmp_path: Path) -> None:
    commands = [
        *("write -P 0xa5 0 1M", "read -P 0xa5 0 1M", "write -P 0x11 1000 777", "read -P 0x11 1000 777"),
        *("read -P 0xa5 0 1000", "read -P 0xa5 1777 1000", "write -z 2M 1M", "read -P 0 2M 1M"),
        *("write -z -u 5M 1M", "read -P 0 5M 1M", "discard 8M 4M", "read -P 0 8M 4M", "flush"),
        *(
            "write -P 0x77 63M 1M",
            "read -P 0x77 63M 1M",
            "aio_write -P 9 20M 2M",
            "aio_read -P 9 20M 2M",
            "aio_flush",
        ),
        "write -f -P 3 30M 64k",
    ]
    arguments = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", *peer.qemu()[:-2], *arguments, *peer.qemu()[-2:], cwd=tmp_path)
    assert "failed" not in output


def test_qemu_io_on_a_read_only_export(plain: Peer, tmp_path: Path) -> None:
    assert "failed" not in run("qemu-io", "-r", "-c", "read -P 0 0 512", *plain.qemu("small"), cwd=tmp_path)
    run("qemu-io", "-c", "write 0 512", *plain.qemu("small"), cwd=tmp_path, ok=False)


def test_qemu_nbd_lists(plain: Peer, tmp_path: Path) -> None:
    output = run("qemu-nbd", "-L", "-k", plain.socket_path, cwd=tmp_path)
    assert "exports available: 2" in output
    assert "qemu:dirty-bitmap:snap" in output


# --- fio, nbd-client -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [
        ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--verify=crc32c", "--verify_backlog=1024"],
        ["--rw=randwrite", "--bsrange=512-256k", "--iodepth=16", "--verify=crc32c"],
        ["--rw=randtrimwrite", "--bs=64k", "--iodepth=1", "--number_ios=500"],
        ["--rw=randwrite", "--bs=4k", "--iodepth=8", "--fsync=16", "--number_ios=3000", "--verify=crc32c"],
        ["--rw=randrw", "--bs=64k", "--iodepth=8", "--numjobs=4", "--size=16m", "--offset_increment=16m"],
    ],
    ids=["4k", "mixed sizes", "trims", "fsync", "4 jobs"],
)
def test_fio(plain: Peer, tmp_path: Path, job: list[str]) -> None:
    common = ["--name=v", "--thread", "--ioengine=nbd", f"--uri={plain.libnbd()}", "--randrepeat=0"]
    size = [] if any(part.startswith("--size") for part in job) else [f"--size={SIZE}"]
    verify = ["--do_verify=1", "--verify_fatal=1"] if any("verify" in part for part in job) else []
    output = run("fio", *common, *size, *job, *verify, cwd=tmp_path)
    assert "err= 0" in output


def test_nbd_client_lists(plain: Peer, tmp_path: Path) -> None:
    output = run("nbd-client", "-unix", plain.socket_path, "-l", cwd=tmp_path)
    assert {"disk", "small"} <= set(output.split())


def test_nbd_client_lists_over_tcp(plain: Peer, tmp_path: Path) -> None:
    port = plain.server.listen_tcp("127.0.0.1", 0)
    assert "disk" in run("nbd-client", "-l", "127.0.0.1", str(port), cwd=tmp_path)


# --- tools that chain ----------------------------------------------------------------------------------------------------


def test_nbdkit_reads_through_its_client_plugin(plain: Peer, disk: MemoryDevice, tmp_path: Path) -> None:
    require("nbdkit", "nbdcopy")
    run(
        *("nbdkit", "-U", "-", "nbd", f"uri={plain.libnbd()}", "--run", "nbdcopy $uri out.img"),
        cwd=tmp_path,
    )
    assert (tmp_path / "out.img").read_bytes() == bytes(disk.data)


def test_tls_clients_with_the_wrong_authority_stay_out(
    disk: MemoryDevice, certificates: Path, tmp_path: Path
) -> None:
    with serving([disk], tls=CertificateTls(certificates, verify_peer=True)) as served:
        good = Peer.of(served, certificates)
        run("nbdinfo", "--size", good.libnbd(), cwd=tmp_path)
        bad = Peer.of(served, certificates / "mallory")
        run("nbdinfo", "--size", bad.libnbd(), cwd=tmp_path, ok=False)
        plain = Peer.of(served, None)
        assert "TLS" in run("nbdinfo", "--size", plain.libnbd(), cwd=tmp_path, ok=False)
        run("nbdinfo", "--size", good.libnbd(), cwd=tmp_path)

"""A virtual machine with a stock kernel whose root directory is the host's, and which runs scripts that tests send.

In: the QEMU process from start to end, jobs, disks that come and go, power cuts, what QEMU counted for a disk. Out: the
kernel (`kernel.py`), the first file system (`initramfs.py`), what is tested.

How it works. The host's `/` is mounted read-only over 9p, under a layer in memory, so every program of the host is there
under its own path and nothing the guest writes reaches the host. A second 9p share, read-write, carries jobs: the host
writes a script, names it through a virtio port, and the guest's agent runs it with its output in files beside it.
Disks are attached to a SCSI controller while the machine runs: one boot serves many tests. User networking lets the
guest reach TCP ports of the host's loopback as 10.0.2.2.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.thin_tools import find_tool
from tests.guest import accelerator
from tests.guest.initramfs import build_initramfs
from tests.guest.kernel import Kernel, KernelUnavailableError, fetch_kernel
from tests.guest.qmp import Qmp, QmpError

HOST = "10.0.2.2"  # the host's loopback, seen from the guest
MEMORY_MIB = 1024
BOOT_MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "virtio_scsi",
    "sd_mod",
    "9pnet_virtio",
    "9p",
    "overlay",
)
KERNEL_LINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t net.ifnames=0 random.trust_cpu=on mitigations=off"
)
AGENT = Path(__file__).with_name("agent.sh")
JOB_SECONDS = 120.0  # a machine that does much else makes an emulated one very slow
POLL_SECONDS = 0.01
WAIT_FOR_DISK = """
for _ in $(seq 500); do
    set -- /sys/bus/scsi/devices/0:0:0:{lun}/block/*
    if [ -e "$1" ]; then
        ln -sfn "/dev/${{1##*/}}" /dev/disks/{name}
        exit
    fi
    sleep 0.02
done
echo "disk {name} did not appear" >&2
exit 1
"""
DROP_DISK = """
blockdev --flushbufs /dev/disks/{name}
echo 1 > /sys/bus/scsi/devices/0:0:0:{lun}/delete
rm /dev/disks/{name}
"""
LEAVE_NOTHING = """
awk '$2 ~ "^/mnt/" { print $2 }' /proc/mounts | tac | xargs -r umount
for pid in /sys/block/nbd*/pid; do
    [ ! -e "$pid" ] || nbd-client -d "/dev/$(basename "${pid%/pid}")"
done
for _ in 1 2 3 4; do
    [ "$(dmsetup ls)" = "No devices found" ] && exit
    dmsetup remove_all
done
dmsetup ls
exit 1
"""


class GuestUnavailableError(Exception):
    """No guest can be run here; the text says why."""


class GuestDiedError(Exception):
    """QEMU ended, or the guest does not answer; the text has the end of the kernel's log."""


class GuestJobError(Exception):
    """A script failed or took too long; the text has its output."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a script ended."""

    status: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class DiskWork:
    """What a guest did to one disk since it was attached."""

    written_bytes: int
    writes: int
    read_bytes: int
    flushes: int
    unmaps: int


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the running machine; the guest sees it as `path`."""

    name: str
    lun: int

    @property
    def path(self) -> str:
        return f"/dev/disks/{self.name}"


class Job:
    """A script that runs in the guest."""

    def __init__(self, machine: Machine, number: int, place: Path, script: str) -> None:
        self._machine = machine
        self._number = number
        self._place = place
        self._script = script

    def output(self) -> str:
        """What it has printed so far."""
        return _text(self._place / "out")

    def is_running(self) -> bool:
        return self._machine.status_of(self._number, 0.0) is None

    def wait(self, seconds: float = JOB_SECONDS, *, check: bool = True) -> Done:
        """Wait for its end; a script that takes longer is killed. Raises GuestJobError, GuestDiedError."""
        status = self._machine.status_of(self._number, seconds)
        if status is None:
            self.kill()
            self._machine.status_of(self._number, 5.0)
        done = Done(-1 if status is None else status, self.output(), _text(self._place / "err"))
        if status is None or (check and status != 0):
            how = f"took more than {seconds} seconds" if status is None else f"ended with status {status}"
            raise GuestJobError(f"{self._script.strip()}\n--- {how}\n{done.out[-3000:]}\n{done.err[-3000:]}")
        return done

    def kill(self) -> None:
        """Kill the script with all it started."""
        self._machine.send(f"kill {self._number}")


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


class Machine:
    """A running guest. Use `booted`; `run` is what tests need most."""

    def __init__(self, kernel: Kernel, qemu: str, busybox: Path) -> None:
        self._kernel = kernel
        self._qemu = qemu
        # Not pytest's directory: the address of a Unix socket ends at 107 bytes.
        self.work = Path(tempfile.mkdtemp(prefix="tpg-"))
        self.share = self.work / "share"
        self.console = self.work / "console"
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: Qmp
        self._port: socket.socket
        self._received = b""
        self._statuses: dict[int, int] = {}
        self._jobs = 0
        self._disks: dict[str, Disk] = {}
        (self.work / "initramfs").write_bytes(build_initramfs(busybox, kernel.load_order(BOOT_MODULES)))
        (self.share / "jobs").mkdir(parents=True)
        shutil.copy(AGENT, self.share)
        (self.share / "settings").write_text(f"release={kernel.release}\nmodules={kernel.modules}\n")

    # --- life ---

    def boot(self) -> None:
        """Start QEMU and wait for the agent. Raises GuestDiedError."""
        *hopes, last = accelerator.candidates()
        for name in hopes:
            try:
                self._start(name)
                return
            except GuestDiedError:
                self._kill()
        try:
            self._start(last)
        except BaseException:
            self._kill()
            raise

    def _start(self, accelerated_by: str) -> None:
        deadline = time.monotonic() + accelerator.BOOT_SECONDS_MAX[accelerated_by]
        with (self.work / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                # The guest must not outlive a test run that was killed.
                ["setpriv", "--pdeathsig", "KILL", *self._command(accelerated_by)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._received = b""
        self._port = self._connect(self.work / "port", deadline)
        self._qmp = Qmp(self._connect(self.work / "qmp", deadline))
        if self._next_line(deadline - time.monotonic()) is None:
            raise self._death("the guest did not boot")

    def _connect(self, path: Path, deadline: float) -> socket.socket:
        """Connect to a socket of QEMU's, which makes it a moment before it listens."""
        assert self._process is not None
        while self._process.poll() is None and time.monotonic() < deadline:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
            except OSError:
                connection.close()
                time.sleep(POLL_SECONDS)
            else:
                return connection
        raise self._death("QEMU did not start")

    def _command(self, accelerated_by: str) -> list[str]:
        def ninep(name: str, path: Path, *more: str) -> list[str]:
            options = ("security_model=none", "multidevs=remap", *more)
            return [
                "-fsdev", f"local,id={name},path={path},{','.join(options)}",
                "-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}",
            ]  # fmt: skip

        return [
            self._qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35",
            *accelerator.OPTIONS[accelerated_by], "-m", str(MEMORY_MIB), "-smp", "1",
            "-kernel", str(self._kernel.image), "-initrd", str(self.work / "initramfs"), "-append", KERNEL_LINE,
            "-serial", f"file:{self.console}",
            "-qmp", f"unix:{self.work / 'qmp'},server=on,wait=off",
            "-chardev", f"socket,id=port,path={self.work / 'port'},server=on,wait=off",
            "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=jobs",
            "-device", "virtio-scsi-pci,id=scsi",
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net",
            *ninep("hostroot", Path("/"), "readonly=on"), *ninep("guest", self.share),
        ]  # fmt: skip

    def power_cut(self) -> None:
        """End the machine in an instant: what the guest had not yet given to its disks is lost."""
        self._kill()

    def close(self) -> None:
        """Halt the guest and remove everything."""
        try:
            if self.is_alive():
                self.send("halt")
                assert self._process is not None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(10)
        except GuestDiedError:
            pass
        finally:
            self._kill()
            shutil.rmtree(self.work, ignore_errors=True)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _kill(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None
        self._disks.clear()
        for name in ("_port", "_qmp"):
            if hasattr(self, name):
                getattr(self, name).close()
        for path in (self.work / "qmp", self.work / "port"):
            path.unlink(missing_ok=True)

    def _death(self, what: str) -> GuestDiedError:
        return GuestDiedError(
            f"{what}\n{_text(self.work / 'qemu.log')[-1000:]}\n{_text(self.console)[-3000:]}"
        )

    # --- jobs ---

    def run(self, script: str, *, seconds: float = JOB_SECONDS, check: bool = True) -> Done:
        """Run a bash script (`-euo pipefail`) and wait. Raises GuestJobError where it fails and `check` is set."""
        return self.start(script).wait(seconds, check=check)

    def start(self, script: str) -> Job:
        """Start a bash script beside whatever runs."""
        self._jobs += 1
        place = self.share / "jobs" / str(self._jobs)
        place.mkdir()
        (place / "script").write_text(script)
        self.send(f"run {self._jobs}")
        return Job(self, self._jobs, place, script)

    def send(self, line: str) -> None:
        """Say a line to the agent."""
        try:
            self._port.sendall(f"{line}\n".encode())
        except OSError as error:
            raise self._death(f"cannot send {line!r}: {error}") from error

    def status_of(self, number: int, seconds: float) -> int | None:
        """The exit status of a job once it has ended, None when it has not within the time."""
        deadline = time.monotonic() + seconds
        while number not in self._statuses:
            line = self._next_line(max(deadline - time.monotonic(), 0.0))
            if line is None:
                return None
            ended, _, status = line.partition(" ")
            self._statuses[int(ended)] = int(status)
        return self._statuses[number]

    def _next_line(self, seconds: float) -> str | None:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            self._port.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                received = self._port.recv(65536)
            except TimeoutError:
                return None
            except OSError as error:
                raise self._death(f"the guest is gone: {error}") from error
            if not received:
                raise self._death("the guest is gone")
            self._received += received
        self._port.settimeout(None)
        line, self._received = self._received.split(b"\n", 1)
        return line.decode()

    # --- disks ---

    def attach(self, name: str, path: Path, *, block_bytes: int = 512, read_only: bool = False) -> Disk:
        """Give the guest a file as a disk with a volatile write cache and discard."""
        lun = next(number for number in range(256) if number not in {d.lun for d in self._disks.values()})
        self._qmp.execute(
            "blockdev-add",
            **{"driver": "raw", "node-name": name, "discard": "unmap", "read-only": read_only},
            file={"driver": "file", "filename": str(path), "discard": "unmap"},
        )
        properties: Mapping[str, Any] = {
            "logical_block_size": block_bytes,
            "physical_block_size": block_bytes,
        }
        self._qmp.execute(
            "device_add", driver="scsi-hd", id=f"disk-{name}", bus="scsi.0", drive=name, lun=lun, **properties
        )
        disk = self._disks[name] = Disk(name, lun)
        self.run(WAIT_FOR_DISK.format(name=name, lun=lun))
        return disk

    def detach(self, disk: Disk) -> None:
        """Take a disk away; everything written to it is in the file then."""
        self.run(DROP_DISK.format(name=disk.name, lun=disk.lun))
        self._qmp.execute("device_del", id=f"disk-{disk.name}")
        self._qmp.wait_for("DEVICE_DELETED", device=f"disk-{disk.name}")
        self._qmp.execute("blockdev-del", **{"node-name": disk.name})
        del self._disks[disk.name]

    def settle(self) -> None:
        """Leave nothing of a test behind: mounts, device-mapper devices, nbd connections, disks.

        Where that fails, the machine is killed, so that the next test boots a new one.
        """
        if not self.is_alive():
            return
        try:
            self.run(LEAVE_NOTHING, seconds=20)
            for disk in list(self._disks.values()):
                self.detach(disk)
        except (GuestJobError, GuestDiedError, QmpError):
            self._kill()

    def work_of(self, name: str) -> DiskWork:
        """What QEMU counted for a disk."""
        for device in self._qmp.execute("query-blockstats"):
            if f"disk-{name}" in device.get("qdev", ""):
                stats = device["stats"]
                return DiskWork(
                    stats["wr_bytes"],
                    stats["wr_operations"],
                    stats["rd_bytes"],
                    stats["flush_operations"],
                    stats.get("unmap_operations", 0),
                )
        raise QmpError(f"no disk {name}")


def make_machine() -> Machine:
    """A machine that is not running yet. Raises GuestUnavailableError where QEMU or a kernel cannot be had."""
    found: dict[str, str] = {}
    for program, package in (
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("setpriv", "util-linux"),
    ):
        path = find_tool(program)
        if path is None:
            raise GuestUnavailableError(f"{package} is not installed")
        found[program] = path
    try:
        kernel = fetch_kernel()
    except KernelUnavailableError as error:
        raise GuestUnavailableError(f"a kernel for the guest is not available: {error}") from error
    return Machine(kernel, found["qemu-system-x86_64"], Path(found["busybox"]))


@contextlib.contextmanager
def booted() -> Iterator[Machine]:
    """A running machine for the time of a with block."""
    machine = make_machine()
    try:
        machine.boot()
        yield machine
    finally:
        machine.close()


def required_packages() -> Sequence[str]:
    """Debian packages that the guest tests use, from their one list."""
    lines = Path(__file__).with_name("packages.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]

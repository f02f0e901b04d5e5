"""A stock Debian kernel for the guest: fetched once through apt, unpacked, never installed.

In: which package, the cache outside the repository, the uncompressed image, the modules in load order. Out: booting
it (`machine.py`). The cache is `$XDG_CACHE_HOME/thinpool/guest` (`~/.cache` by default), some 500 MB; a new kernel
package gets a directory of its own, and only a complete one is moved into place.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.thin_tools import find_tool

META_PACKAGE = "linux-image-amd64"
XZ_MAGIC = b"\xfd7zXZ\0"
ELF_MAGIC = b"\x7fELF"
DOWNLOAD_SECONDS_MAX = 240


class KernelUnavailableError(Exception):
    """No kernel can be had here; the text says why."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel: `release` as `uname -r` says it, the image QEMU boots, the directory of its modules."""

    release: str
    image: Path
    modules: Path

    def load_order(self, names: Sequence[str]) -> list[Path]:
        """Files of the named modules and of all they need, each after what it needs. Built-in ones are left out."""
        paths: dict[str, Path] = {}
        needs: dict[Path, list[Path]] = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            file, _, needed = line.partition(":")
            path = self.modules / file
            paths[path.name.partition(".")[0].replace("-", "_")] = path
            needs[path] = [self.modules / word for word in needed.split()]
        built_in = {
            Path(line).stem.replace("-", "_")
            for line in (self.modules / "modules.builtin").read_text().splitlines()
        }
        order: dict[Path, None] = {}
        for name in names:
            if name in built_in:
                continue
            if name not in paths:
                raise KernelUnavailableError(f"kernel {self.release} has no module {name}")
            # modules.dep names what a module needs with the deepest need last.
            for path in (*reversed(needs[paths[name]]), paths[name]):
                order[path] = None
        return list(order)


def cache_directory() -> Path:
    """Where kernels are kept, outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thinpool" / "guest"


def fetch_kernel() -> Kernel:
    """The newest kernel that apt knows, from the cache or the archive. Raises KernelUnavailableError."""
    for program in ("apt-get", "apt-cache", "dpkg-deb", "depmod"):
        if find_tool(program) is None:
            raise KernelUnavailableError(f"{program} is missing")
    package = _package_name()
    try:
        with _locked(cache_directory()):
            place = cache_directory() / package
            if not place.is_dir():
                _unpack(package, place)
    except OSError as error:
        raise KernelUnavailableError(f"{cache_directory()}: {error}") from error
    [modules] = [path for path in (place / "lib" / "modules").iterdir() if path.is_dir()]
    return Kernel(modules.name, place / "boot" / "vmlinux", modules)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    program = find_tool(str(command[0])) or str(command[0])
    try:
        done = subprocess.run(
            [program, *command[1:]],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise KernelUnavailableError(f"{command[0]} took more than {DOWNLOAD_SECONDS_MAX} seconds") from error
    if done.returncode != 0:
        raise KernelUnavailableError(f"{command[0]}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def _package_name() -> str:
    """The package behind the meta package; without package lists, the newest one in the cache."""
    for line in _run("apt-cache", "depends", META_PACKAGE).splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith("linux-image-"):
            return name
    cached = sorted(cache_directory().glob("linux-image-*"), key=lambda path: path.stat().st_mtime)
    if cached:
        return cached[-1].name
    raise KernelUnavailableError(
        f"apt knows no {META_PACKAGE}; its package lists are missing (apt-get update)"
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Test workers start at the same time; one of them fetches."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unpack(package: str, place: Path) -> None:
    building = Path(tempfile.mkdtemp(prefix="building-", dir=place.parent))
    try:
        building.chmod(0o755)  # apt downloads as a user of its own where it can
        _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=building)
        [archive] = building.glob("*.deb")
        _run("dpkg-deb", "-x", archive, building)
        archive.unlink()
        modules_of = building / "lib" / "modules"
        [release] = [path.name for path in modules_of.iterdir()]
        _run("depmod", "-b", building, release)
        _expand(building / "boot" / f"vmlinuz-{release}", building / "boot" / "vmlinux")
        building.rename(place)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _expand(compressed: Path, image: Path) -> None:
    """Unpack the kernel here, once: QEMU starts the ELF file directly, which saves each boot three seconds."""
    packed = compressed.read_bytes()
    begin = packed.find(XZ_MAGIC)
    plain = b"" if begin < 0 else lzma.LZMADecompressor().decompress(packed[begin:])
    image.write_bytes(plain if plain.startswith(ELF_MAGIC) else packed)

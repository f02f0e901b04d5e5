"""Devices to image files and back through qemu, on served and idle pools: equal by `qemu-img compare`, holes stay holes."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.running_pool import require
from tests.fakes.transfer_pools import BLOCK, WORK, allocation, content, new_pool, session_on, write, zero
from thinpool.errors import DeviceExists, DeviceHeld, ImageExists, ImageFailed
from thinpool.image_files import ImageFile, export_image, import_image
from thinpool.opening import open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.receiving import ReceiveOptions

pytestmark = pytest.mark.peer
MIB = 1 << 20
SIZE = 40 * MIB + 512


@pytest.fixture
def place() -> Iterator[Path]:
    require("qemu-img", "qemu-nbd")
    path = Path(tempfile.mkdtemp(prefix="thinpool-images-", dir=WORK))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def location(place: Path) -> PoolLocation:
    """`disk`: data, zeros that are mapped, holes, and an end inside a block."""
    with new_pool(place / "p") as pool:
        pool.create_device("disk", SIZE)
        write(pool, "disk", 0, random.Random(2).randbytes(2 * MIB + 5))
        write(pool, "disk", SIZE - 7, b"the end")
        zero(pool, "disk", 8 * MIB, 3 * BLOCK, keep=True)
    return PoolLocation.directory(place / "p")


def opened(location: PoolLocation) -> Pool:
    return open_pool(location, read_only=True)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_out_and_in_again(location: PoolLocation, place: Path, image_format: str):
    image = ImageFile(place / "image", image_format)
    export_image(location, "disk", image, force=False, show=False)
    taken = import_image(location, image, ReceiveOptions("copy", read_only=False))
    pool = opened(location)
    try:
        assert content(pool, "copy") == content(pool, "disk")
        zeros = {8 * MIB // BLOCK + number for number in range(3)}
        assert allocation(pool, "copy") == allocation(pool, "disk") - zeros
        assert taken["device"]["size_bytes"] == SIZE
        assert not pool.info("copy").read_only
    finally:
        pool.close()
    # As qemu sees it, and as large as what is in it.
    with open(place / "plain", "wb") as plain:
        pool = opened(location)
        plain.write(content(pool, "disk"))
        pool.close()
    done = subprocess.run(
        ["qemu-img", "compare", "-f", image_format, "-F", "raw", str(image.path), str(place / "plain")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert image.path.stat().st_blocks * 512 < 4 * MIB


def test_what_exists_or_fails_changes_nothing(location: PoolLocation, place: Path):
    (place / "image").write_bytes(b"precious" * 512)
    with pytest.raises(ImageExists):
        export_image(location, "disk", ImageFile(place / "image"), force=False, show=False)
    with pytest.raises(ImageFailed):
        export_image(location, "disk", ImageFile(place / "image", "nonsense"), force=True, show=False)
    assert (place / "image").read_bytes() == b"precious" * 512
    with pytest.raises(ImageFailed):
        import_image(location, ImageFile(place / "image", "qcow2"), ReceiveOptions("new"))
    with pytest.raises(DeviceExists):
        import_image(location, ImageFile(place / "image", "raw"), ReceiveOptions("disk"))
    with pytest.raises(FileNotFoundError):
        import_image(location, ImageFile(place / "none"), ReceiveOptions("new"))
    pool = opened(location)
    assert [info.name for info in pool.devices()] == ["disk"]
    pool.close()
    assert {path.name for path in place.iterdir()} == {"p", "image"}
    export_image(location, "disk", ImageFile(place / "image"), force=True, show=False)
    assert (place / "image").stat().st_size == SIZE


def test_a_device_is_held_while_it_is_exported(location: PoolLocation, place: Path):
    from thinpool.source_access import SourceRequest, held_here

    pool = open_pool(location)
    pool.create_snapshot("disk", "mon", read_only=True)
    with held_here(pool, SourceRequest("mon")), pytest.raises(DeviceHeld):
        pool.delete("mon")
    with session_on(pool, "disk"), held_here(pool, SourceRequest("disk")):
        assert len(pool.devices()) == 3
    pool.close()

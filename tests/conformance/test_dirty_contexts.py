"""What backup clients see over NBD of what changed: the ranges of `thinpool diff`, by nbdinfo and by qemu-img."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nbd import Server
from tests.conformance.running_pool import require
from tests.fakes.transfer_pools import BLOCK, discard, new_pool, write
from thinpool.device_diff import with_same
from thinpool.exports import PoolExports

pytestmark = pytest.mark.peer
MIB = 1 << 20


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("export", ["tue", "disk"])
def test_nbdinfo_and_qemu_img_see_the_ranges_of_diff(tmp_path: Path, export: str):
    require("nbdinfo", "qemu-img")
    with new_pool(tmp_path / "p") as pool:
        pool.create_device("disk", 16 * MIB)
        write(pool, "disk", 0, b"x" * 8 * MIB)
        pool.create_snapshot("disk", "mon", read_only=True)
        write(pool, "disk", MIB + 5, b"changed")
        write(pool, "disk", 12 * MIB, b"new")
        discard(pool, "disk", 3 * MIB, 2 * BLOCK)
        pool.create_snapshot("disk", "tue", read_only=True)
        page = pool.diff("mon", export)
        wanted = [
            (offset, length, int(state != 0))
            for offset, length, state in with_same(iter(page.ranges), 16 * MIB)
        ]
        assert [changed for _, _, changed in wanted].count(1) == 3
        server = Server(PoolExports(pool))
        server.listen_unix(tmp_path / "s")
        server.start()
        try:
            uri = f"nbd+unix:///{export}?socket={tmp_path}/s"
            mapped = json.loads(output_of("nbdinfo", "--map=qemu:dirty-bitmap:mon", "--json", uri))
            assert [(each["offset"], each["length"], each["type"]) for each in mapped] == wanted
            options = (
                f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={tmp_path}/s,"
                f"file.export={export},file.x-dirty-bitmap=qemu:dirty-bitmap:mon"
            )
            # QEMU shows the bitmap in place of the allocation: dirty ranges are those without data.
            ranges = json.loads(output_of("qemu-img", "map", "--output=json", "--image-opts", options))
            assert [(each["start"], each["length"], int(not each["data"])) for each in ranges] == wanted
        finally:
            server.shutdown(0)

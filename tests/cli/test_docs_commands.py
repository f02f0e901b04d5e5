"""The commands of docs/send-receive.md and docs/object-storage.md, run as they are written, in order.

`/srv/pool` is a pool in the current directory, `ssh backup` runs on another one, the bucket is a directory. Left out are
lines that need what no test has: a token of an earlier run, LVM's metadata, an installation from an index.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.transfer_pools import new_pool, write

CHECKOUT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
LEFT_OUT = ("1-V1Q", "vg-pool_tmeta", "pip install")
SSH = '#!/bin/sh\nshift\ncd "$BACKUP" && exec "$@"\n'


def blocks(page: str) -> list[str]:
    """The shell commands of a page, a string for each block."""
    text = (CHECKOUT / "docs" / page).read_text()
    found = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [
        "".join(line for line in block.splitlines(True) if not any(word in line for word in LEFT_OUT))
        for block in found
    ]


@pytest.fixture
def shell(tmp_path: Path) -> Callable[[str], str]:
    """Run commands where a pool `pool` with a device `disk` is; `ssh` goes to a directory with an empty one."""
    here, backup, programs = (tmp_path / name for name in ("here", "backup", "bin"))
    for directory in (here, backup, programs):
        directory.mkdir()
    (programs / "ssh").write_text(SSH)
    (programs / "ssh").chmod(0o755)
    with new_pool(here / "pool", size_bytes=64 * MIB) as pool:
        pool.create_device("disk", 8 * MIB)
        write(pool, "disk", 0, os.urandom(MIB))
    for place in (backup / "pool", here / "other"):
        with new_pool(place, size_bytes=64 * MIB):
            pass
    environment = {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LC_ALL": "C.UTF-8",
        "BACKUP": str(backup),
    }

    def run(commands: str) -> str:
        commands = commands.replace("s3://bucket/fleet", (tmp_path / "store").as_uri()).replace("/srv/", "")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
        assert "\r" not in done.stderr, "progress is for terminals"
        return done.stdout

    return run


@pytest.mark.peer
def test_moving_snapshots(shell: Callable[[str], str]) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    pages = blocks("send-receive.md")
    assert len(pages) == 5
    first, common, _, changed, images = pages  # the one left out goes on after an interruption
    shell(first)
    shell("thinpool snapshot /srv/pool disk disk-wed --read-only")
    shell(common)
    assert "disk-wed" in shell("ssh backup thinpool list pool")
    assert "same" in shell(changed)
    shell("qemu-img create -q -f qcow2 debian-12.qcow2 8M")
    shell(images)


def test_object_storage(shell: Callable[[str], str]) -> None:
    pytest.importorskip("obstore", reason="needs the package obstore")
    trip, repair = blocks("object-storage.md")
    listed = shell(trip)
    assert "disk-monday" in listed
    assert "no faults" in listed
    arrived = json.loads(shell("thinpool list /srv/other --json"))["devices"]
    assert {device["name"]: device["origin"] for device in arrived} == {
        "disk-monday": None,
        "disk-tuesday": "disk-monday",
    }
    shell("thinpool push /srv/pool disk-monday s3://bucket/fleet")
    shell(repair)

"""The tour of the README, command by command, as a newcomer would type it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
TOOLS = ("mkfs.ext4", "nbdcopy", "qemu-io", "qemu-img")


def tour() -> list[str]:
    text = (CHECKOUT / "README.md").read_text()
    return re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_tour_covers_the_main_job():
    commands = "".join(tour())
    for word in ("init", "create", "serve", "snapshot", "rollback", "stop", "list", "status"):
        assert f"thinpool {word}" in commands


@pytest.mark.peer
def test_every_command_of_the_tour_works(tmp_path: Path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    for tool in TOOLS:
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not installed")
    environment = {"PATH": path, "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    try:
        for block in tour():
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                stdin=subprocess.DEVNULL,
                check=False,
            )
            assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    finally:
        subprocess.run(
            ["thinpool", "stop", "pool"], cwd=tmp_path, env=environment, capture_output=True, check=False
        )

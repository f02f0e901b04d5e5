"""Debian's thin-provisioning-tools as judges of our metadata: run on a file, in a clean environment.

In: finding the tools, running them, what they say. Out: what is compared with what (the tests).
thin_check wants a regular file of whole blocks. Each call waits some 40 milliseconds for the kernel to give back its
asynchronous I/O context, which costs no processor time: run several at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SEARCHED = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"
ENVIRONMENT = {"PATH": SEARCHED, "LC_ALL": "C", "LANG": "C"}


def find_tool(name: str) -> str | None:
    """Where a program is, also where the user's own PATH leaves out sbin."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SEARCHED}")


class Verdict:
    """thin_check and thin_dump at work on a file, started at once; the file must not change until they are done."""

    def __init__(self, path: Path, *, held: bool = False) -> None:
        self._output = path.with_name(f"{path.name}.{'held' if held else 'live'}.xml")
        option = ["-m"] if held else []
        self._check = _start("thin_check", *option, path)
        self._dump = _start("thin_dump", *option, path, "-o", self._output)

    def dump(self) -> str:
        """Assert that thin_check finds nothing at all; what thin_dump wrote."""
        for name, process in (("thin_check", self._check), ("thin_dump", self._dump)):
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, f"{name}: {said}"
        return self._output.read_text()


def _start(name: str, *arguments: str | Path) -> subprocess.Popen[str]:
    program = find_tool(name)
    assert program is not None, f"{name} is missing; ask for it with require_tool first"
    return subprocess.Popen(
        [program, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )


def run_tool(name: str, *arguments: str | Path) -> tuple[int, str]:
    """Run a tool to its end; its exit code and all it said."""
    process = _start(name, *arguments)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def assert_clean(path: Path, *, held: bool = False) -> str:
    """Assert that thin_check finds nothing at all; what thin_dump writes."""
    return Verdict(path, held=held).dump()


def thin_restore(xml: str, target: Path, *, blocks: int) -> None:
    """Make a metadata file of `blocks` blocks from XML."""
    source = target.with_suffix(".xml")
    source.write_text(xml)
    with open(target, "wb") as file:
        file.truncate(blocks * 4096)
    code, said = run_tool("thin_restore", "-i", source, "-o", target)
    assert code == 0, f"thin_restore: {said}"

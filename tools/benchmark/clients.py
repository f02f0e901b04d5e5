"""The programs that send requests, and how their figures are read."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .workloads import Client, Workload

MIB = 1 << 20
QEMU_IMG_REQUESTS_PER_SECOND_GUESS = 20_000


class ClientFailedError(Exception):
    """A client ended with an error; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One run of one client: what it did, in what time, and how long a request took (microseconds)."""

    requests: int
    transferred_bytes: int
    seconds: float
    mean_us: float | None = None
    p99_us: float | None = None

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def megabytes_per_second(self) -> float:
        return self.transferred_bytes / self.seconds / 1e6


def _run(command: list[str], *, timeout: float = 900, home: Path | None = None) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=None if home is None else {**os.environ, "HOME": str(home)},
    )
    if done.returncode != 0:
        message = (
            f"{command[0]} ended with status {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}"
        )
        raise ClientFailedError(message)
    return done.stdout


def fio(
    uri: str, options: tuple[str, ...], size_bytes: int, seconds: float | None, home: Path | None = None
) -> Figures:
    """Run fio's nbd engine: for a time, or (``seconds`` None) one pass over the device.

    ``home`` is where libnbd looks for certificates: fio passes a URI on and nothing else.
    """
    timing = [f"--runtime={seconds:g}s", "--time_based"] if seconds is not None else []
    command = ["fio", "--name=cell", "--thread", "--ioengine=nbd", f"--uri={uri}", f"--size={size_bytes}"]
    command += ["--randrepeat=0", "--group_reporting", "--output-format=json", *options, *timing]
    text = _run(command, home=home)
    job = json.loads(text[text.index("{") :])["jobs"][0]
    if job["error"]:
        message = f"fio reports error {job['error']}"
        raise ClientFailedError(message)
    sides = [job["read"], job["write"]]
    requests = sum(side["total_ios"] for side in sides)
    busy = [side for side in sides if side["total_ios"]]
    mean = sum(side["clat_ns"]["mean"] * side["total_ios"] for side in busy) / max(requests, 1) / 1000
    slowest = (
        max((side["clat_ns"].get("percentile", {}).get("99.000000", 0) for side in busy), default=0) / 1000
    )
    elapsed = max(side["runtime"] for side in sides) / 1000
    return Figures(requests, sum(side["io_bytes"] for side in sides), elapsed, mean, slowest)


def fill(uri: str, size_bytes: int, request: str = "64k") -> None:
    """Write an export once from end to end; every server's file is filled by this one function."""
    fio(uri, ("--rw=write", f"--bs={request}", "--iodepth=8", "--end_fsync=1"), size_bytes, None)


def first_touch_list(path: Path, size_bytes: int) -> Path:
    """Write the list fio replays for first touches: 4 KiB at the start of each 64 KiB block, blocks in random order."""
    offsets = list(range(0, size_bytes, 64 << 10))
    random.Random(size_bytes).shuffle(offsets)
    lines = [f"disk write {offset} 4096" for offset in offsets]
    path.write_text("\n".join(["fio version 2 iolog", "disk add", "disk open", *lines, "disk close", ""]))
    return path


def nbdcopy(source: str, destination: str, size_bytes: int) -> Figures:
    """Copy a whole export out to nothing, or a file in."""
    begun = time.monotonic()
    _run(["nbdcopy", source, destination])
    return Figures(max(size_bytes // (256 << 10), 1), size_bytes, time.monotonic() - begun)


def qemu_img_bench(uri: str, size_bytes: int, seconds: float, *, write: bool) -> Figures:
    """Run QEMU's own client; it steps through the device, so its requests are spread by a large odd step."""
    count = int(QEMU_IMG_REQUESTS_PER_SECOND_GUESS * seconds)
    step = 4096 * 1031
    text = _run(
        [
            "qemu-img",
            "bench",
            "-f",
            "raw",
            "-c",
            str(count),
            "-d",
            "32",
            "-s",
            "4096",
            "-S",
            str(step % size_bytes),
        ]
        + (["-w"] if write else [])
        + [uri]
    )
    found = re.search(r"completed in ([0-9.]+) seconds", text)
    if found is None:
        message = f"qemu-img bench said: {text.strip()[-200:]}"
        raise ClientFailedError(message)
    return Figures(count, count * 4096, float(found.group(1)))


def run(
    workload: Workload, uri: str, *, size_bytes: int, seconds: float, source: Path, home: Path | None = None
) -> Figures:
    """Run the client of one workload against one export. ``source`` is a file to copy in, of the export's size."""
    if workload.client is Client.NBDCOPY_OUT:
        return nbdcopy(uri, "null:", size_bytes)
    if workload.client is Client.NBDCOPY_IN:
        return nbdcopy(str(source), uri, size_bytes)
    if workload.client in (Client.QEMU_IMG_READ, Client.QEMU_IMG_WRITE):
        return qemu_img_bench(uri, size_bytes, seconds, write=workload.client is Client.QEMU_IMG_WRITE)
    options = workload.fio
    if workload.first_touch:
        replayed = first_touch_list(source.with_suffix(".iolog"), size_bytes)
        options = (*options, f"--read_iolog={replayed}", "--replay_no_stall=1")
    return fio(uri, options, size_bytes, None if workload.one_pass else seconds, home)

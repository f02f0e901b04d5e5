"""Devices to image files and back: qemu does the formats, a stream does the rest.

In: running qemu-img and qemu-nbd, what becomes of a file that is not complete. Out: reading images and devices
(`image_source.py`), what arrives in the pool (`receiving.py`).

An export is written beside its place and moved there when it is complete and on disk. An import is a stream like any
other: the device appears when all of it is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nbd import Server

from .errors import ImageExists, ImageFailed, ToolMissing
from .image_source import ImageSource, SourceExports
from .pool_location import PoolLocation
from .receiving import ReceiveOptions
from .sending import Progress, Sender, SendOptions
from .source_access import SourceRequest
from .transfer_access import open_source, receive_into

START_SECONDS = 20.0
POLL_SECONDS = 0.01
PACKAGE = "qemu-utils"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image: where it is, and its format as qemu calls it; None lets qemu find out."""

    path: Path
    format: str | None = None


def export_image(location: PoolLocation, name: str, image: ImageFile, *, force: bool, show: bool) -> None:
    """Write a device or snapshot into an image file or onto a block device. Raises ThinPoolError, OSError."""
    _require("qemu-img")
    path = image.path
    onto_device = path.exists() and stat.S_ISBLK(path.stat().st_mode)
    if path.exists() and not force:
        raise ImageExists(str(path))
    with open_source(location, SourceRequest(name)) as (source, _), _directory() as scratch:
        server = Server(SourceExports(source))
        try:
            server.listen_unix(scratch / "s")
            server.start()
            target = path if onto_device else path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                _convert(
                    _uri(scratch / "s"), target, image.format or "raw", onto_device=onto_device, show=show
                )
                source.still_held()
                _sync(target)
                if not onto_device:
                    target.replace(path)
                    _sync(path.parent)
            except BaseException:
                if not onto_device:
                    target.unlink(missing_ok=True)
                raise
        finally:
            server.shutdown(0)


def _convert(uri: str, target: Path, image_format: str, *, onto_device: bool, show: bool) -> None:
    options = ["-n"] if onto_device else []
    options += ["-p"] if show else []
    command = ["qemu-img", "convert", "-f", "raw", *options, "-O", image_format, uri, str(target)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ImageFailed(str(target), _last_line(done.stderr) or f"qemu-img ended with {done.returncode}")


def import_image(
    location: PoolLocation, image: ImageFile, options: ReceiveOptions, progress: Progress | None = None
) -> dict[str, Any]:
    """Make a device of an image. Returns what `receive` does. Raises ThinPoolError, OSError."""
    _require("qemu-img")
    _require("qemu-nbd")
    image.path.stat()
    size_bytes = _virtual_size(image)
    with _served_image(image) as uri:
        source = ImageSource(uri, options.name or image.path.stem, size_bytes=size_bytes)
        try:
            return _poured(location, source, options, progress)
        finally:
            source.close()


def _poured(
    location: PoolLocation, source: ImageSource, options: ReceiveOptions, progress: Progress | None
) -> dict[str, Any]:
    """A stream from the image into the pool, through a pipe between two threads."""
    reading, writing = os.pipe()
    failures: list[BaseException] = []

    def sink(data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(writing, rest) :]

    def send() -> None:
        try:
            Sender(source, sink, SendOptions(level=0), progress).run()
        except BaseException as error:  # told below, in place of the cut stream that it causes
            failures.append(error)
        finally:
            os.close(writing)

    sender = threading.Thread(target=send, name="image", daemon=True)
    sender.start()
    try:
        return receive_into(location, lambda count: os.read(reading, count), options)
    except Exception:
        os.close(reading)
        reading = -1
        sender.join()
        for failure in failures:
            if not isinstance(failure, BrokenPipeError):
                raise failure from None
        raise
    finally:
        if reading >= 0:
            os.close(reading)
        sender.join()


def _virtual_size(image: ImageFile) -> int:
    options = [] if image.format is None else ["-f", image.format]
    command = ["qemu-img", "info", "--output=json", *options, "--", str(image.path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageFailed(str(image.path), _last_line(done.stderr))
    size_bytes = int(json.loads(done.stdout)["virtual-size"])
    if size_bytes <= 0:
        raise ImageFailed(str(image.path), "it is empty")
    return size_bytes


@contextlib.contextmanager
def _served_image(image: ImageFile) -> Iterator[str]:
    """The image behind qemu-nbd; its URI."""
    with _directory() as scratch:
        options = [] if image.format is None else ["-f", image.format]
        command = ["qemu-nbd", "--read-only", "-t", "-k", str(scratch / "s"), *options, str(image.path)]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as server:
            try:
                _await_socket(server, scratch / "s", image.path)
                yield _uri(scratch / "s")
            finally:
                server.kill()


def _await_socket(server: subprocess.Popen[str], path: Path, image: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _listens(path):
        if server.poll() is not None:
            assert server.stderr is not None
            raise ImageFailed(str(image), _last_line(server.stderr.read()))
        if time.monotonic() > deadline:
            raise ImageFailed(str(image), f"qemu-nbd did not start in {START_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)


def _listens(path: Path) -> bool:
    """Tell whether somebody accepts connections there: the path is there a moment before that."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise ToolMissing(program, PACKAGE)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """A private directory with a short path, as sockets want it."""
    with tempfile.TemporaryDirectory(prefix="tp-") as path:
        yield Path(path)


def _uri(path: Path) -> str:
    return f"nbd+unix:///?socket={quote(str(path), safe='/')}"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

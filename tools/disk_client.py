"""The least NBD client that can read and write an export, for the tour, the benchmarks and the tests.

In: one export over a Unix socket, one request at a time or a window of writes, simple replies. Out: everything else
of the protocol. It shares no line with the package ``nbd`` on purpose: a mistake in the product's codec cannot hide
behind the same mistake here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

GREETING = struct.Struct(">8s8sH")
OPTION = struct.Struct(">8sII")
EXPORT_NAME_REPLY = struct.Struct(">QH")
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")

REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
FIXED_NEWSTYLE_AND_NO_ZEROES = 3
READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, WRITE_ZEROES = range(7)
FUA = 1
WINDOW = 16  # writes in flight


class DiskClient:
    """A connection to one export. Errors of the server are OSError with its errno."""

    def __init__(self, path: Path | str, export: str, *, timeout: float = 120.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._cookie = 0
        try:
            self._socket.connect(os.fspath(path))
            self.size_bytes, self.flags = self._negotiate(export.encode())
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> DiskClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            got = self._socket.recv_into(view)
            if got == 0:
                message = "the server closed the connection"
                raise ConnectionError(message)
            view = view[got:]
        return data

    def _negotiate(self, export: bytes) -> tuple[int, int]:
        magic, option_magic, _ = GREETING.unpack(self._receive(GREETING.size))
        if (magic, option_magic) != (b"NBDMAGIC", b"IHAVEOPT"):
            message = f"not a newstyle NBD server: {magic!r}"
            raise ConnectionError(message)
        self._socket.sendall(FIXED_NEWSTYLE_AND_NO_ZEROES.to_bytes(4, "big"))
        self._socket.sendall(OPTION.pack(b"IHAVEOPT", 1, len(export)) + export)
        size_bytes, flags = EXPORT_NAME_REPLY.unpack(self._receive(EXPORT_NAME_REPLY.size))
        return size_bytes, flags

    def _send(
        self, command: int, offset: int, length: int, payload: bytes | memoryview = b"", flags: int = 0
    ) -> None:
        self._cookie += 1
        self._socket.sendall(REQUEST.pack(REQUEST_MAGIC, flags, command, self._cookie, offset, length))
        if payload:
            self._socket.sendall(payload)

    def _reply(self) -> None:
        magic, error, _ = REPLY.unpack(self._receive(REPLY.size))
        if magic != REPLY_MAGIC:
            message = f"unexpected reply magic {magic:#x}"
            raise ConnectionError(message)
        if error:
            raise OSError(error, os.strerror(error))

    def read(self, offset: int, length: int) -> bytearray:
        """Return ``length`` bytes from ``offset``."""
        self._send(READ, offset, length)
        self._reply()
        return self._receive(length)

    def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        """Write ``data`` at ``offset``; durable on return where ``fua`` is set."""
        self._send(WRITE, offset, len(data), data, FUA if fua else 0)
        self._reply()

    def write_many(self, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
        """Write (offset, data) pairs with several requests in flight."""
        waiting = 0
        for offset, data in pieces:
            if waiting == WINDOW:
                self._reply()
                waiting -= 1
            self._send(WRITE, offset, len(data), data)
            waiting += 1
        for _ in range(waiting):
            self._reply()

    def trim(self, offset: int, length: int) -> None:
        """Discard a range."""
        self._send(TRIM, offset, length)
        self._reply()

    def cache(self, offset: int, length: int) -> None:
        """Ask for a range to be read ahead; the server looks its mappings up."""
        self._send(CACHE, offset, length)
        self._reply()

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros."""
        self._send(WRITE_ZEROES, offset, length)
        self._reply()

    def flush(self) -> None:
        """Make every write replied to so far durable."""
        self._send(FLUSH, 0, 0)
        self._reply()

    def close(self) -> None:
        """Take leave and close."""
        with contextlib.suppress(
            OSError
        ):  # the server may have gone first; there is nothing left to say to it
            self._send(DISCONNECT, 0, 0)
        self._socket.close()

"""Three shapes of one small server, to compare shapes and nothing else. Not a product: no safety, no durability.

    python spike_server.py threads|epoll|processes SOCKET FILE SIZE_BYTES

All three share the loop that takes in what is waiting, looks up a flat map, and sends slices of a mapped file:
one thread a connection, one thread for all connections with epoll, or two processes that share map and file.
"""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Iterator

BLOCK_BYTES = 65536
PROCESSES = 2
BUFFER_BYTES = 1 << 18
SOCKET_BUFFER_BYTES = 1 << 21
IOV_MAX = 1000
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
OPTION = struct.Struct(">QII")
ANSWER = struct.Struct(">QIII")
INFO = struct.Struct(">HQH")
GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)
ANSWER_MAGIC, SIMPLE_MAGIC = 0x3E889045565A9, 0x67446698
INFO_OPTION, GO, ABORT = 6, 7, 2
ACK, INFO_REPLY, UNSUPPORTED = 1, 3, 0x80000001
READ, WRITE, DISCONNECT = 0, 1, 2
MULTI_CONN_FLAGS = 1 | 4 | 256


class Disk:
    """A file behind a flat map from virtual to data blocks; the map lies in memory that forked processes share."""

    def __init__(self, path: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.descriptor = os.open(path, os.O_RDWR)
        self.data = memoryview(mmap.mmap(self.descriptor, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ))
        blocks = size_bytes // BLOCK_BYTES
        shared = mmap.mmap(-1, blocks * 8)
        self.entries = memoryview(shared).cast("Q")
        self.entries[:] = memoryview(array.array("Q", range(blocks)))


class Connection:
    """The bytes of one connection; `work` applies and answers all complete requests, False at the end."""

    def __init__(self, sock: socket.socket, disk: Disk) -> None:
        self.socket, self.disk = sock, disk
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._have = 0
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def negotiate(self) -> None:
        """Haggle, blocking."""
        self.socket.sendall(GREETING)
        self._exactly(4)
        while True:
            _, option, length = OPTION.unpack(self._exactly(OPTION.size))
            self._exactly(length)
            replies = [(UNSUPPORTED, b"")]
            if option in (INFO_OPTION, GO):
                replies = [(INFO_REPLY, INFO.pack(0, self.disk.size_bytes, MULTI_CONN_FLAGS)), (ACK, b"")]
            for kind, body in replies:
                self.socket.sendall(ANSWER.pack(ANSWER_MAGIC, option, kind, len(body)) + body)
            if option == GO:
                return
            if option == ABORT:
                raise EOFError

    def work(self) -> bool:
        """Receive once, apply, answer. Replies are sent blocking in all shapes: they fit the socket's buffer."""
        got = self.socket.recv_into(self._view[self._have :])
        if not got:
            return False
        self._have += got
        position, parts = self._apply()
        for start in range(0, len(parts), IOV_MAX):
            self._send(parts[start : start + IOV_MAX])
        if position < 0:
            return False
        rest = self._have - position
        self._view[:rest] = self._view[position : self._have]
        self._have = rest
        return True

    def _send(self, parts: list[bytes | memoryview]) -> None:
        sent = self.socket.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self.socket.sendall(memoryview(part)[sent:])
            sent = max(0, sent - len(part))

    def _apply(self) -> tuple[int, list[bytes | memoryview]]:
        entries, data, descriptor = self.disk.entries, self.disk.data, self.disk.descriptor
        have, buffer, view = self._have, self._buffer, self._view
        parts: list[bytes | memoryview] = []
        position = 0
        while have - position >= REQUEST.size:
            _, _, command, cookie, offset, length = REQUEST.unpack_from(buffer, position)
            at = entries[offset // BLOCK_BYTES] * BLOCK_BYTES + offset % BLOCK_BYTES
            if command == READ:
                parts += (REPLY.pack(SIMPLE_MAGIC, 0, cookie), data[at : at + length])
                position += REQUEST.size
            elif command == WRITE:
                end = position + REQUEST.size + length
                if end > have:
                    break
                os.pwrite(descriptor, view[position + REQUEST.size : end], at)
                parts.append(REPLY.pack(SIMPLE_MAGIC, 0, cookie))
                position = end
            elif command == DISCONNECT:
                return -1, parts
            else:
                parts.append(REPLY.pack(SIMPLE_MAGIC, 0, cookie))
                position += REQUEST.size
        return position, parts


def accepted(listener: socket.socket, disk: Disk) -> Iterator[Connection]:
    """Yield connections, not yet negotiated."""
    while True:
        yield Connection(listener.accept()[0], disk)


def serve_blocking(connection: Connection) -> None:
    """One connection from beginning to end."""
    try:
        connection.negotiate()
        while connection.work():
            pass
    except (OSError, EOFError):
        pass
    connection.socket.close()


def threads(listener: socket.socket, disk: Disk) -> None:
    """One thread a connection."""
    for connection in accepted(listener, disk):
        threading.Thread(target=serve_blocking, args=(connection,), daemon=True).start()


def epoll(listener: socket.socket, disk: Disk) -> None:
    """One thread for all: whoever has something to say is worked for, in turn."""
    waiting = select.epoll()
    waiting.register(listener, select.EPOLLIN)
    connections: dict[int, Connection] = {}
    while True:
        for descriptor, _ in waiting.poll():
            if descriptor == listener.fileno():
                fresh = Connection(listener.accept()[0], disk)
                connections[fresh.socket.fileno()] = fresh
                try:
                    fresh.negotiate()
                    waiting.register(fresh.socket, select.EPOLLIN)
                except (OSError, EOFError):
                    fresh.socket.close()
                continue
            connection = connections[descriptor]
            try:
                goes_on = connection.work()
            except OSError:
                goes_on = False
            if not goes_on:
                waiting.unregister(descriptor)
                connection.socket.close()
                del connections[descriptor]


def processes(listener: socket.socket, disk: Disk) -> None:
    """Two processes that accept from one socket; each has a thread a connection."""
    for _ in range(PROCESSES - 1):
        if os.fork() == 0:
            break
    threads(listener, disk)


def main() -> None:
    shape, path, file, size_bytes = sys.argv[1:]
    disk = Disk(file, int(size_bytes))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    {"threads": threads, "epoll": epoll, "processes": processes}[shape](listener, disk)


if __name__ == "__main__":
    main()

"""The kernel's NBD driver over netlink, with a time in which it waits for a server that is gone. Runs inside the guest.

    python reconnecting.py connect|reconnect INDEX URI

In: just enough generic netlink (linux/genetlink.h, linux/nbd-netlink.h). Out: connecting as people usually do, which is
nbd-client's business; version 3.24 has no option for the waiting time. `connect` makes /dev/nbdINDEX; after the server
was away, `reconnect` gives the driver a new socket and it repeats what was not answered.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

from nbd.client import Client

NETLINK_GENERIC = 16
CONTROL_FAMILY = 16
REQUEST_AND_ACK = 5
NLMSG_ERROR = 2
# Netlink is in the byte order of the machine; the guest is an amd64 one.
MESSAGE = struct.Struct("<IHHII")  # length, type, flags, sequence, port
GENERIC = struct.Struct("<BBH")  # command, version, reserved
ATTRIBUTE = struct.Struct("<HH")  # length with this header, type
NESTED = 0x8000
GET_FAMILY, FAMILY_ID, FAMILY_NAME = 3, 1, 2
COMMANDS = {"connect": 1, "reconnect": 3}
INDEX, SIZE_BYTES, BLOCK_BYTES, TIMEOUT, SERVER_FLAGS, SOCKETS, DEAD_TIMEOUT = 1, 2, 3, 4, 5, 7, 8
SOCKET_ITEM, SOCKET_FD = 1, 1
ANSWER_SECONDS = 2  # a request unanswered so long is sent again once there is a socket
DEAD_SECONDS = 60


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    packed = ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value
    return packed + bytes(-len(packed) % 4)


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("<I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("<Q", value))


def ask(netlink: socket.socket, family: int, command: int, attributes: bytes) -> list[bytes]:
    """Send a generic message; the payloads that came before the acknowledgement. Raises OSError."""
    body = GENERIC.pack(command, 1, 0) + attributes
    netlink.send(MESSAGE.pack(MESSAGE.size + len(body), family, REQUEST_AND_ACK, 1, 0) + body)
    answers: list[bytes] = []
    while True:
        received = netlink.recv(65536)
        while received:
            length, kind, *_ = MESSAGE.unpack_from(received)
            payload, received = received[MESSAGE.size : length], received[length + -length % 4 :]
            if kind == NLMSG_ERROR:
                (status,) = struct.unpack_from("<i", payload)
                if status:
                    raise OSError(-status, os.strerror(-status))
                return answers
            answers.append(payload[GENERIC.size :])


def family_of(netlink: socket.socket, name: str) -> int:
    """The number the kernel gave to a generic family."""
    [payload] = ask(netlink, CONTROL_FAMILY, GET_FAMILY, attribute(FAMILY_NAME, name.encode() + b"\0"))
    while payload:
        length, kind = ATTRIBUTE.unpack_from(payload)
        if kind == FAMILY_ID:
            return int.from_bytes(payload[ATTRIBUTE.size : length], sys.byteorder)
        payload = payload[length + -length % 4 :]
    raise LookupError(name)


def main(verb: str, index: str, uri: str) -> None:
    client = Client.connect(uri, structured=False)
    client.socket.settimeout(None)
    item = attribute(SOCKET_ITEM | NESTED, u32(SOCKET_FD, client.socket.fileno()))
    attributes = u32(INDEX, int(index)) + attribute(SOCKETS | NESTED, item)
    attributes += u64(TIMEOUT, ANSWER_SECONDS) + u64(DEAD_TIMEOUT, DEAD_SECONDS)
    if verb == "connect":
        attributes += u64(SIZE_BYTES, client.info.size_bytes) + u64(BLOCK_BYTES, 512)
        attributes += u64(SERVER_FLAGS, int(client.info.flags))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as netlink:
        netlink.bind((0, 0))
        ask(netlink, family_of(netlink, "nbd"), COMMANDS[verb], attributes)


if __name__ == "__main__":
    main(*sys.argv[1:])

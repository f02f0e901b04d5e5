"""A small blocking NBD client, for tests and tools.

In: negotiation option by option, all commands, raw requests for negative tests. Out: speed, reconnecting,
several connections. It runs over the same codecs as the server (`wire`, `options`, `reply_stream`).
"""

import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from .constants import (
    EXTENDED_REQUEST_MAGIC,
    INIT_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_ERROR_BIT,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    UNPADDED_EXPORT_NAME_ZEROES,
    Command,
    CommandFlag,
    HandshakeFlag,
    InfoType,
    Option,
    OptionReply,
    TransmissionFlag,
)
from .device import Extents
from .errors import ConnectionEnded, LocalProtocolError, OptionRefused, RemoteError, RemoteProtocolError
from .options import encode_context_query, encode_export_query
from .reply_stream import Reply, ReplyStream
from .uri import parse_uri
from .wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    EXTENDED_REQUEST,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    OPTION_REPLY,
    REQUEST,
    U16,
    U32,
    U64,
)

_OPTION_REPLY_BYTES_MAX = 1 << 20


@dataclass(slots=True)
class ExportInfo:
    """What the server told about an export."""

    size_bytes: int = 0
    flags: TransmissionFlag = field(default_factory=lambda: TransmissionFlag(0))
    name: str | None = None
    description: str | None = None
    block_sizes: tuple[int, int, int] | None = None


class Client:
    """One connection. Use `Client.connect(uri)` for a ready one, or the constructor to negotiate by hand."""

    def __init__(self, sock: socket.socket, *, flags: int = 3) -> None:
        self.socket = sock
        self.structured = False
        self.extended = False
        self.contexts: dict[int, str] = {}
        self.info = ExportInfo()
        self._cookie = 0
        self._stream: ReplyStream | None = None
        self._finished: dict[int, Reply] = {}
        magic, option_magic, self.server_flags = GREETING.unpack(self._receive(GREETING.size))
        if (magic, option_magic) != (INIT_MAGIC, OPTION_MAGIC):
            raise RemoteProtocolError(what="a greeting that is not newstyle NBD")
        self._padded = not flags & HandshakeFlag.NO_ZEROES
        sock.sendall(CLIENT_FLAGS.pack(flags))

    @classmethod
    def connect(
        cls,
        uri: str,
        *,
        structured: bool = True,
        extended: bool = False,
        contexts: Sequence[str] = (),
        tls: ssl.SSLContext | None = None,
        timeout_seconds: float | None = 60.0,
    ) -> "Client":
        """Connect, negotiate and enter the transmission phase. `extended` falls back where the server lacks it."""
        address = parse_uri(uri)
        if address.socket_path is not None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_seconds)
            sock.connect(address.socket_path)
        else:
            sock = socket.create_connection((address.host, address.port), timeout=timeout_seconds)
        client = cls(sock)
        if address.tls:
            if tls is None:
                tls = client_context(address.certificates)
            client.start_tls(tls, address.tls_hostname or address.host or "localhost")
        if extended:
            client.negotiate_extended()
        if structured and not client.extended:
            client.negotiate_structured()
        if contexts:
            client.set_contexts(address.export_name, contexts)
        client.go(address.export_name)
        return client

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- handshake
    # ---------------------------------------------------------------------------------------------

    def send_option(self, option: int, data: bytes = b"") -> None:
        """Send an option without waiting for the answer."""
        self.socket.sendall(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)

    def option_answer(self, option: int) -> tuple[int, bytes]:
        """Receive one reply to an option: (reply type, data)."""
        magic, echoed, reply, length = OPTION_REPLY.unpack(self._receive(OPTION_REPLY.size))
        if magic != OPTION_REPLY_MAGIC or echoed != option or length > _OPTION_REPLY_BYTES_MAX:
            raise RemoteProtocolError(
                what=f"an option reply {magic:#x} {echoed} {reply:#x} of {length} bytes"
            )
        return reply, self._receive(length)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option and return all replies before the final ACK; OptionRefused on an error reply."""
        self.send_option(option, data)
        answers: list[tuple[int, bytes]] = []
        while True:
            reply, payload = self.option_answer(option)
            if reply & OPTION_REPLY_ERROR_BIT:
                raise OptionRefused(option=option, reply=reply, text=payload.decode(errors="replace"))
            if reply == OptionReply.ACK:
                return answers
            answers.append((reply, payload))

    def start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        """Upgrade the connection."""
        self.option(Option.STARTTLS)
        self.socket = context.wrap_socket(self.socket, server_hostname=hostname)

    def negotiate_structured(self) -> None:
        """Ask for structured replies."""
        self.option(Option.STRUCTURED_REPLY)
        self.structured = True

    def negotiate_extended(self) -> None:
        """Ask for extended headers; a server without them is fine."""
        try:
            self.option(Option.EXTENDED_HEADERS)
        except OptionRefused as refusal:
            if refusal.reply != OptionReply.ERR_UNSUP:
                raise
        else:
            self.extended = True

    def list_exports(self) -> list[tuple[str, str]]:
        """Return (name, description) of all exports."""
        found = []
        for _, payload in self.option(Option.LIST):
            (length,) = U32.unpack_from(payload)
            found.append((payload[4 : 4 + length].decode(), payload[4 + length :].decode()))
        return found

    def list_contexts(self, export_name: str, queries: Sequence[str] = ()) -> list[str]:
        """Return the meta contexts that match."""
        answers = self.option(Option.LIST_META_CONTEXT, encode_context_query(export_name, queries))
        return [payload[4:].decode() for _, payload in answers]

    def set_contexts(self, export_name: str, queries: Sequence[str]) -> dict[int, str]:
        """Select meta contexts; returns id → name."""
        self.contexts = {}
        for _, payload in self.option(Option.SET_META_CONTEXT, encode_context_query(export_name, queries)):
            self.contexts[U32.unpack_from(payload)[0]] = payload[4:].decode()
        return self.contexts

    def ask_info(self, export_name: str, details: Sequence[int] = (1, 2, 3)) -> ExportInfo:
        """Ask about an export without entering it."""
        return self._info(Option.INFO, export_name, details)

    def go(self, export_name: str, details: Sequence[int] = (1, 2, 3)) -> ExportInfo:
        """Enter the transmission phase."""
        self.info = self._info(Option.GO, export_name, details)
        self._begin()
        return self.info

    def export_name(self, export_name: str) -> ExportInfo:
        """Enter the transmission phase the old way; ConnectionEnded where the server does not want to."""
        self.send_option(Option.EXPORT_NAME, export_name.encode())
        size, flags = EXPORT_NAME_REPLY.unpack(self._receive(EXPORT_NAME_REPLY.size))
        if self._padded and self._receive(UNPADDED_EXPORT_NAME_ZEROES).strip(b"\0"):
            raise RemoteProtocolError(what="padding that is not zero")
        self.info = ExportInfo(size, TransmissionFlag(flags))
        self._begin()
        return self.info

    def _info(self, option: Option, export_name: str, details: Sequence[int]) -> ExportInfo:
        info = ExportInfo()
        for reply, payload in self.option(option, encode_export_query(export_name, details)):
            if reply != OptionReply.INFO:
                raise RemoteProtocolError(what=f"reply {reply} to INFO or GO")
            (kind,) = U16.unpack_from(payload)
            if kind == InfoType.EXPORT:
                _, info.size_bytes, flags = INFO_EXPORT.unpack(payload)
                info.flags = TransmissionFlag(flags)
            elif kind == InfoType.NAME:
                info.name = payload[2:].decode()
            elif kind == InfoType.DESCRIPTION:
                info.description = payload[2:].decode()
            elif kind == InfoType.BLOCK_SIZE:
                _, minimum, preferred, maximum = INFO_BLOCK_SIZE.unpack(payload)
                info.block_sizes = (minimum, preferred, maximum)
        return info

    def _begin(self) -> None:
        self._stream = ReplyStream(structured=self.structured, extended=self.extended)

    # --- transmission
    # ------------------------------------------------------------------------------------------

    def send_request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes | memoryview = b"",
        cookie: int | None = None,
    ) -> int:
        """Send one request exactly as given and return its cookie; `reply_to` waits for the answer."""
        if self._stream is None:
            raise LocalProtocolError(what="a request before GO")
        if cookie is None:
            self._cookie += 1
            cookie = self._cookie
        layout, magic = (
            (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if self.extended else (REQUEST, REQUEST_MAGIC)
        )
        if command != Command.DISC:
            self._stream.expect(cookie, command, offset, length)
        head = layout.pack(magic, flags, command, cookie, offset, length)
        self.socket.sendall(head + payload if len(payload) < 65536 else head)
        if len(payload) >= 65536:
            self.socket.sendall(payload)
        return cookie

    def reply_to(self, cookie: int) -> Reply:
        """Wait for the complete reply to a request."""
        assert self._stream is not None
        while cookie not in self._finished:
            data = self.socket.recv(1 << 18)
            if not data:
                raise ConnectionEnded
            for reply in self._stream.feed(data):
                self._finished[reply.cookie] = reply
        return self._finished.pop(cookie)

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes | memoryview = b"",
    ) -> Reply:
        """Send one request and return its reply, errors included."""
        return self.reply_to(self.send_request(command, offset, length, flags=flags, payload=payload))

    def _checked(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes | memoryview = b"",
    ) -> Reply:
        reply = self.request(command, offset, length, flags=flags, payload=payload)
        if reply.error:
            raise RemoteError(command=command, error=reply.error, text=reply.text)
        return reply

    def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        """Return bytes of the export; RemoteError where the server refuses."""
        return bytes(self._checked(Command.READ, offset, length, flags=flags).data)

    def write(self, offset: int, data: bytes | memoryview, *, flags: int = 0) -> None:
        """Write bytes."""
        flags |= CommandFlag.PAYLOAD_LEN if self.extended else 0
        self._checked(Command.WRITE, offset, len(data), flags=flags, payload=data)

    def flush(self) -> None:
        """Make everything that was answered durable."""
        self._checked(Command.FLUSH)

    def trim(self, offset: int, length: int, *, flags: int = 0) -> None:
        """Discard a range."""
        self._checked(Command.TRIM, offset, length, flags=flags)

    def zero(self, offset: int, length: int, *, flags: int = 0) -> None:
        """Make a range read as zeros."""
        self._checked(Command.WRITE_ZEROES, offset, length, flags=flags)

    def cache(self, offset: int, length: int) -> None:
        """Ask for a range to be read ahead."""
        self._checked(Command.CACHE, offset, length)

    def block_status(
        self, offset: int, length: int, *, flags: int = 0, only: Sequence[int] | None = None
    ) -> dict[str, Extents]:
        """Return context name → (length, status) pairs; `only` sends a filter of context ids (extended headers)."""
        if only is None:
            reply = self._checked(Command.BLOCK_STATUS, offset, length, flags=flags)
        else:
            payload = U64.pack(length) + b"".join(U32.pack(number) for number in only)
            flags |= CommandFlag.PAYLOAD_LEN
            reply = self._checked(Command.BLOCK_STATUS, offset, len(payload), flags=flags, payload=payload)
        return {self.contexts[number]: extents for number, extents in reply.statuses.items()}

    def disconnect(self) -> None:
        """End the connection in an orderly way and wait until the server has closed it."""
        self.send_request(Command.DISC)
        while self.socket.recv(1 << 16):
            pass
        self.close()

    def close(self) -> None:
        """Close the socket at once."""
        self.socket.close()

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.socket.recv(min(count - len(data), 1 << 20))
            if not piece:
                raise ConnectionEnded
            data += piece
        return bytes(data)


def client_context(certificates: Path | None) -> ssl.SSLContext:
    """Return a TLS context: `certificates` holds ca-cert.pem and perhaps client-cert.pem and client-key.pem."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    if certificates is not None:
        context.load_verify_locations(certificates / "ca-cert.pem")
        if (certificates / "client-cert.pem").exists():
            context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    return context

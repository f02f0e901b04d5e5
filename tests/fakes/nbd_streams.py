"""NBD without sockets: a scripted byte stream under the transmission loop, and a dialogue with the handshake.

Which faults a `ScriptedLink` can suffer: it delivers its input in any pieces, takes replies in any pieces (`take_max`), stops
taking them (`stall_after`), and lets the kernel fail to read the data at an absolute position of the output (`fault_at`), once.
"""

import errno
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nbd.access import Access, TlsMode
from nbd.activity import Activity
from nbd.constants import (
    EXTENDED_REQUEST_MAGIC,
    OPTION_MAGIC,
    REQUEST_MAGIC,
    Command,
    Option,
    TransmissionFlag,
)
from nbd.device import Buffer
from nbd.errors import SendFault
from nbd.events import Close, Event, Send, StartTls, Transmit
from nbd.execution import Executor
from nbd.handshake import ServerHandshake
from nbd.limits import Limits
from nbd.payload_memory import PayloadMemory
from nbd.reply_stream import Reply, ReplyStream
from nbd.terms import SelectedContext, Terms
from nbd.transmission import transmit
from nbd.wire import CLIENT_FLAGS, EXTENDED_REQUEST, OPTION, OPTION_REPLY, REQUEST
from tests.fakes.memory_device import MemoryDevice, MemoryDirectory

ALL_FLAGS = TransmissionFlag(0xFFF) & ~(
    TransmissionFlag.READ_ONLY | TransmissionFlag.ROTATIONAL | TransmissionFlag.SEND_RESIZE
)


def pieces(data: bytes, size: int) -> list[bytes]:
    """Cut bytes into pieces of one size."""
    return [data[at : at + size] for at in range(0, len(data), size)]


class ScriptedLink:
    """Satisfies `nbd.link.Link`."""

    copies = False
    descriptor = -1

    def __init__(
        self, data: bytes | Iterable[bytes], *, take_max: int = 1 << 30, fault_at: int | None = None
    ) -> None:
        self._input = [data] if isinstance(data, bytes) else list(data)
        self._take_max = take_max
        self._fault_at = fault_at
        self.fast_read_max = 32 << 20
        self.output = bytearray()
        self.received = 0
        self.on_receive: Callable[[], None] = lambda: None
        self.receive = self._receive
        self.gather = self._receive
        self.send_some = self._send_some

    def buffered(self) -> bool:
        return True

    def arrived(self) -> bool:
        return True

    def _receive(self, target: memoryview) -> int:
        self.on_receive()
        while self._input and not self._input[0]:
            del self._input[0]
        if not self._input:
            return 0
        piece = self._input[0]
        count = min(len(piece), len(target))
        target[:count] = piece[:count]
        self._input[0] = piece[count:]
        self.received += count
        return count

    def _send_some(self, parts: list[Buffer]) -> int:
        taken = 0
        for part in parts:
            room = self._take_max - taken
            if self._fault_at is not None:
                left = self._fault_at - len(self.output)
                if left < min(len(part), room):
                    self.output += bytes(part)[:left]
                    taken += left
                    if taken:
                        return taken
                    self._fault_at = None
                    raise OSError(errno.EFAULT, "bad address")
            piece = bytes(part)[:room]
            self.output += piece
            taken += len(piece)
            if len(piece) < len(part):
                break
        return taken

    def finish(self, parts: Sequence[Buffer], sent: int, release: Callable[[], None]) -> None:
        whole = b"".join(bytes(part) for part in parts)
        total = sent
        while total < len(whole):
            try:
                total += self._send_some([whole[total:]])
            except OSError:
                raise SendFault(sent=total) from None
        release()


@dataclass
class Request:
    """A request as a client would put it; `payload` is sent as given, whatever the header says."""

    command: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    payload: bytes = b""
    cookie: int = -1
    magic: int | None = None

    def encode(self, *, extended: bool) -> bytes:
        layout = EXTENDED_REQUEST if extended else REQUEST
        magic = self.magic
        if magic is None:
            magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        return (
            layout.pack(magic, self.flags, self.command, self.cookie, self.offset, self.length) + self.payload
        )


def write(offset: int, data: bytes, *, flags: int = 0, extended: bool = False) -> Request:
    """A WRITE as the negotiated form wants it."""
    return Request(Command.WRITE, offset, len(data), flags | (0x20 if extended else 0), data)


@dataclass
class Outcome:
    """What came of a transmission: replies by request, the error that ended it, the link and the device."""

    replies: list[Reply | None]
    ended_by: Exception | None
    link: ScriptedLink
    executor_have: int = 0

    @property
    def errors(self) -> list[int | None]:
        return [None if reply is None else reply.error for reply in self.replies]


def terms_for(
    device: MemoryDevice,
    *,
    structured: bool = False,
    extended: bool = False,
    contexts: Sequence[str] = (),
    flags: TransmissionFlag | None = None,
) -> Terms:
    """Terms as a handshake would have left them."""
    if flags is None:
        flags = ALL_FLAGS
        if not (structured or extended):
            flags &= ~TransmissionFlag.SEND_DF
        if device.read_only:
            flags |= TransmissionFlag.READ_ONLY
        if extended and contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    return Terms(
        export=device,
        session=device.open(),
        size_bytes=device.size_bytes,
        flags=flags,
        structured=structured,
        extended=extended,
        contexts=tuple(SelectedContext(index + 1, name) for index, name in enumerate(contexts)),
    )


def converse(
    device: MemoryDevice,
    requests: Sequence[Request],
    *,
    structured: bool = False,
    extended: bool = False,
    contexts: Sequence[str] = (),
    piece: int = 1 << 30,
    limits: Limits | None = None,
    activity: Activity | None = None,
    pending: int = 0,
    take_max: int = 1 << 30,
    fault_at: int | None = None,
    flags: TransmissionFlag | None = None,
    tail: bytes = b"",
) -> Outcome:
    """Run the server's transmission over these requests, then decode what it sent with the client's decoder."""
    for index, request in enumerate(requests):
        if request.cookie == -1:
            request.cookie = 0x1000 + index
    data = b"".join(request.encode(extended=extended) for request in requests) + tail
    terms = terms_for(device, structured=structured, extended=extended, contexts=contexts, flags=flags)
    link = ScriptedLink(pieces(data[pending:], piece), take_max=take_max, fault_at=fault_at)
    ended = run_transmission(link, terms, limits=limits, activity=activity, pending=data[:pending])
    return Outcome(
        decode(
            bytes(link.output), requests, structured=structured, extended=extended, partial=ended is not None
        ),
        ended,
        link,
    )


def run_transmission(
    link: ScriptedLink,
    terms: Terms,
    *,
    limits: Limits | None = None,
    activity: Activity | None = None,
    pending: bytes = b"",
) -> Exception | None:
    """Run the loop to its end and return the exception that ended it, if any."""
    limits = limits or Limits()
    own = activity is None
    activity = activity or Activity()
    memory = PayloadMemory(buffer_bytes=limits.whole_payload_bytes, total_bytes=limits.payload_memory_bytes)
    executor = Executor(link, terms, activity, memory, limits, pending=pending)
    try:
        transmit(link, terms, executor, activity, limits)
    except Exception as error:
        return error
    finally:
        assert memory.in_use == 0
        terms.session.close()
        if own:
            activity.close()
    return None


def decode(
    output: bytes, requests: Sequence[Request], *, structured: bool, extended: bool, partial: bool = False
) -> list[Reply | None]:
    """Decode a server's output strictly; None for requests without a reply."""
    stream = ReplyStream(structured=structured, extended=extended)
    for request in requests:
        if request.command != Command.DISC:
            stream.expect(request.cookie, request.command, request.offset, request.length)
    found = {reply.cookie: reply for reply in stream.feed(output)}
    if not partial:
        assert stream.unread == 0, "bytes behind the last reply"
    return [found.get(request.cookie) for request in requests]


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """One handshake option; `length` may lie."""
    return OPTION.pack(OPTION_MAGIC, number, len(data) if length is None else length) + data


@dataclass
class Dialogue:
    """A client's view of one handshake, whole or byte by byte."""

    handshake: ServerHandshake
    bytewise: bool = False
    output: bytearray = field(default_factory=bytearray)
    sends: int = 0
    terms: Terms | None = None
    closed: bool = False
    reason: str | None = None
    tls_started: bool = False

    def say(self, data: bytes) -> "Dialogue":
        """Send bytes and carry out what the handshake wants."""
        for piece in pieces(data, 1) if self.bytewise else [data]:
            for event in self.handshake.feed(piece):
                self._carry_out(event)
        return self

    def _carry_out(self, event: Event) -> None:
        assert not self.closed
        assert self.terms is None
        match event:
            case Send(data=data):
                self.output += data
                self.sends += 1
            case StartTls():
                self.tls_started = True
            case Transmit(terms=terms):
                self.terms = terms
            case Close(reason=reason):
                self.closed, self.reason = True, reason

    def raw(self, data: bytes) -> bytes:
        """Send bytes and return exactly what came back."""
        before = len(self.output)
        self.say(data)
        return bytes(self.output[before:])

    def ask(self, number: int, data: bytes = b"", *, length: int | None = None) -> list[tuple[int, bytes]]:
        """Send one option and return its replies as (type, data); checks that each echoes the option."""
        return replies(self.raw(option(number, data, length=length)), number)

    def final(self, number: int, data: bytes = b"", *, length: int | None = None) -> int:
        """Send one option and return the type of its last reply."""
        return self.ask(number, data, length=length)[-1][0]

    def usable(self) -> bool:
        """Whether the next option is still answered correctly."""
        return not self.closed and self.final(99) == 0x80000001


def replies(data: bytes, number: int) -> list[tuple[int, bytes]]:
    """Decode option replies."""
    out = []
    at = 0
    while at < len(data):
        magic, echoed, kind, length = OPTION_REPLY.unpack_from(data, at)
        assert magic == 0x0003E889045565A9
        assert echoed == number
        at += OPTION_REPLY.size
        payload = data[at : at + length]
        assert len(payload) == length
        if kind & 0x80000000:
            assert len(payload.decode("utf-8")) > 0
            assert len(payload) <= 4096
        out.append((kind, payload))
        at += length
    return out


def dialogue(
    directory: MemoryDirectory,
    *,
    tls: TlsMode = TlsMode.OFF,
    access: Access | None = None,
    limits: Limits | None = None,
    listing: bool = True,
    flags: int | None = 3,
    bytewise: bool = False,
) -> Dialogue:
    """Begin a handshake; `flags` None leaves the client's flags to the test."""
    handshake = ServerHandshake(directory, tls=tls, access=access, limits=limits, listing=listing)
    talk = Dialogue(handshake, bytewise)
    if flags is not None:
        talk.say(CLIENT_FLAGS.pack(flags))
    return talk


GO, INFO = Option.GO, Option.INFO

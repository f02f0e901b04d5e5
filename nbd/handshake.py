"""The server's side of the handshake, without I/O: bytes in, events out.

Theory of operation. The driver sends `greeting()`, then passes whatever it receives to `feed()` and carries
out the events in order:

    Send(data)        send it (a long listing is many of these, so a slow reader holds nothing but its own thread)
    StartTls()        the ACK has been sent: if `pending` is not empty, drop the connection (bytes that arrived in
                      plaintext behind STARTTLS would otherwise be taken for encrypted ones); else do the TLS handshake
                      and call `tls_established`
    Transmit(terms)   the transmission phase begins, with the bytes of `take_pending()` already received
    Close(reason)     close; `reason` is None where that is the regular end

Every option is framed first (magic, number, length; the payload is buffered up to a limit, discarded up to a
second, refused beyond) and only then looked at, so a malformed payload costs an ERR_INVALID and never the
framing. The export is opened at the last moment, when nothing but the final ACK is left to send. Options
themselves are in `negotiation`.
"""

from collections.abc import Iterator
from enum import Enum, auto

from .access import Access, OpenAccess, PeerIdentity, TlsMode
from .constants import INIT_MAGIC, OPTION_MAGIC, HandshakeFlag, Option, OptionReply
from .device import ExportDirectory
from .events import Close, Event, Send, StartTls, Transmit
from .limits import Limits
from .negotiation import Negotiation
from .wire import CLIENT_FLAGS, GREETING, OPTION, limited_text, option_reply


class Phase(Enum):
    """Where a handshake stands."""

    CLIENT_FLAGS = auto()
    OPTION = auto()
    DISCARDING = auto()
    STARTING_TLS = auto()
    FINISHED = auto()


class ServerHandshake:
    """Negotiates one connection; not thread-safe, one per connection."""

    def __init__(
        self,
        exports: ExportDirectory,
        *,
        tls: TlsMode = TlsMode.OFF,
        access: Access | None = None,
        limits: Limits | None = None,
        listing: bool = True,
    ) -> None:
        self._limits = limits or Limits()
        self._negotiation = Negotiation(exports, tls, access or OpenAccess(), self._limits, listing=listing)
        self._buffer = bytearray()
        self._phase = Phase.CLIENT_FLAGS
        self._options = 0
        self._discard_option = 0
        self._discard_bytes = 0

    @property
    def phase(self) -> Phase:
        """The present phase."""
        return self._phase

    @property
    def opened_export(self) -> str | None:
        """The canonical name of the export that is being or has been opened, set before the client is told."""
        export = self._negotiation.opened
        return None if export is None else export.name

    @property
    def pending(self) -> int:
        """Number of bytes received and not yet consumed."""
        return len(self._buffer)

    def take_pending(self) -> bytes:
        """Hand over the bytes that follow the handshake."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def greeting(self) -> bytes:
        """Return the 18 bytes that open the connection."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        return GREETING.pack(INIT_MAGIC, OPTION_MAGIC, flags)

    def tls_established(self, identity: PeerIdentity) -> None:
        """Go on inside TLS; everything negotiated before is forgotten, as the specification demands."""
        assert self._phase is Phase.STARTING_TLS
        assert not self._buffer
        self._negotiation.restart_inside_tls(identity)
        self._phase = Phase.OPTION

    def abandon(self) -> None:
        """Release a session that was opened but never handed over (the peer vanished before the ACK)."""
        self._negotiation.abandon()

    def feed(self, data: bytes | memoryview) -> Iterator[Event]:
        """Take in bytes of any number and yield what has to be done, in order."""
        self._buffer += data
        while True:
            events = self._step()
            if events is None:
                return
            for event in events:
                if isinstance(event, Transmit | Close):
                    self._phase = Phase.FINISHED
                elif isinstance(event, StartTls):
                    self._phase = Phase.STARTING_TLS
                yield event

    def _step(self) -> Iterator[Event] | None:
        """Consume one unit of the stream; None where more bytes are needed or the handshake is over."""
        match self._phase:
            case Phase.CLIENT_FLAGS:
                return self._client_flags()
            case Phase.DISCARDING:
                return self._discard()
            case Phase.OPTION:
                return self._option()
            case Phase.STARTING_TLS | Phase.FINISHED:
                return None

    def _client_flags(self) -> Iterator[Event] | None:
        if len(self._buffer) < CLIENT_FLAGS.size:
            return None
        (flags,) = CLIENT_FLAGS.unpack_from(self._buffer)
        del self._buffer[: CLIENT_FLAGS.size]
        if flags & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
            return iter([Close(f"unknown client flags {flags:#x}")])
        self._phase = Phase.OPTION
        return self._negotiation.client_flags(HandshakeFlag(flags))

    def _option(self) -> Iterator[Event] | None:
        if len(self._buffer) < OPTION.size:
            return None
        magic, option, length = OPTION.unpack_from(self._buffer)
        if magic != OPTION_MAGIC:
            return iter([Close(f"bad option magic {magic:#018x}")])
        if self._options >= self._limits.options_max:
            return iter([Close(f"more than {self._limits.options_max} options")])
        if length > self._limits.option_bytes_max:
            return self._too_long(option, length)
        if len(self._buffer) < OPTION.size + length:
            return None
        payload = bytes(self._buffer[OPTION.size : OPTION.size + length])
        del self._buffer[: OPTION.size + length]
        self._options += 1
        return self._negotiation.option(option, payload)

    def _too_long(self, option: int, length: int) -> Iterator[Event]:
        """Begin to discard a payload that is too long to be looked at, or give up where discarding is too much."""
        if length > self._limits.option_discard_bytes_max or option == Option.EXPORT_NAME:
            return iter([Close(f"option {option} announces {length} bytes")])
        del self._buffer[: OPTION.size]
        self._options += 1
        self._discard_option, self._discard_bytes = option, length
        self._phase = Phase.DISCARDING
        return iter([])

    def _discard(self) -> Iterator[Event] | None:
        taken = min(self._discard_bytes, len(self._buffer))
        del self._buffer[:taken]
        self._discard_bytes -= taken
        if self._discard_bytes:
            return None
        self._phase = Phase.OPTION
        option = self._discard_option
        plaintext_refused = self._negotiation.refuses_plaintext and option != Option.STARTTLS
        if option == Option.ABORT or plaintext_refused:
            return self._negotiation.option(option, b"")
        self._negotiation.forget_for(option)
        text = limited_text(f"the option's payload is longer than {self._limits.option_bytes_max} bytes")
        known = option in set(Option)
        reply = OptionReply.ERR_TOO_BIG if known else OptionReply.ERR_UNSUP
        return iter([Send(option_reply(option, reply, text))])

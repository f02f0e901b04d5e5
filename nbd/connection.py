"""One connection from accept to close: the driver of the handshake, then of the transmission.

In: socket options, time limits, TLS wrapping, orderly closing, and that a session which was opened is closed
whatever happens. Out: what the bytes mean. Runs in the connection's own thread; `drop` may be called from
any.
"""

import contextlib
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from .access import Access, PeerIdentity, TlsMode
from .activity import Activity
from .device import ExportDirectory
from .errors import ConnectionEnded, DataLost, NbdError, RemoteProtocolError, ReplyBacklog
from .events import Close, Send, StartTls, Transmit
from .execution import Executor
from .handshake import ServerHandshake
from .limits import Limits
from .link import PlainLink
from .payload_memory import PayloadMemory
from .queued import QueuedMemory
from .shared_loop import SharedLoop
from .stalled import Parking
from .terms import Terms
from .tls import ServerTls
from .tls_link import TlsLink
from .transmission import transmit

_SOCKET_BUFFER_BYTES = 2 << 20
_HANDSHAKE_RECEIVE_BYTES = 16 * 1024
_LINGER_SECONDS = 1.0
# struct timeval of a 64-bit system
_TIMEVAL = struct.Struct("<qq" if sys.byteorder == "little" else ">qq")


@dataclass(frozen=True, slots=True)
class Services:
    """What all connections of a server share."""

    exports: ExportDirectory
    limits: Limits
    activity: Activity
    shared: SharedLoop
    memory: PayloadMemory
    queued: QueuedMemory
    parking: Parking
    access: Access
    tls: ServerTls | None
    listing: bool
    log: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """What `Server.connections` tells about one connection."""

    peer: str
    export: str | None
    tls: bool
    reply_style: str | None
    age_seconds: float


@dataclass(slots=True)
class _Standing:
    """What other threads may look at."""

    started: float = field(default_factory=monotonic)
    terms: Terms | None = None
    tls: bool = False
    dropped: bool = False


class Connection:
    """A client."""

    def __init__(self, services: Services, sock: socket.socket, peer: str) -> None:
        self._services = services
        self._socket = sock
        self._peer = peer
        self._standing = _Standing()
        self._drop_lock = threading.Lock()
        self._closed = False
        self._handshake: ServerHandshake | None = None

    @property
    def negotiating(self) -> bool:
        """Whether the handshake has not finished."""
        return self._standing.terms is None

    @property
    def started(self) -> float:
        """When the connection was accepted (monotonic clock)."""
        return self._standing.started

    @property
    def export_name(self) -> str | None:
        """The canonical name of the export in use."""
        handshake = self._handshake
        return None if handshake is None else handshake.opened_export

    def info(self) -> ConnectionInfo:
        """Describe the connection for a status display."""
        terms = self._standing.terms
        style = None
        if terms is not None:
            style = "extended" if terms.extended else "structured" if terms.structured else "simple"
        age = monotonic() - self._standing.started
        return ConnectionInfo(self._peer, self.export_name, self._standing.tls, style, age)

    def drop(self) -> None:
        """End the connection from another thread: whatever it waits for fails at once."""
        with self._drop_lock:
            self._standing.dropped = True
            if not self._closed:
                with contextlib.suppress(OSError):
                    # past SSLSocket.shutdown, which would take the TLS state away under the other thread
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def run(self) -> None:
        """Serve the client to the end. Never raises; what is worth knowing is logged."""
        try:
            self._serve()
        except (ConnectionEnded, ConnectionError, TimeoutError):
            pass  # clients vanish; that is their right, and no news
        except (RemoteProtocolError, DataLost, ReplyBacklog) as problem:
            self._log(str(problem))
        except (OSError, NbdError) as problem:
            if not self._standing.dropped:
                self._log(str(problem))
        except Exception as problem:  # one client's trouble must not end the server
            self._log(f"internal error: {problem!r}")
        finally:
            with self._drop_lock:
                self._closed = True
                self._socket.close()

    def _log(self, text: str) -> None:
        export = self.export_name
        self._services.log(f"{self._peer}{f' on {export}' if export else ''}: {text}")

    def _serve(self) -> None:
        handshake = ServerHandshake(
            self._services.exports,
            tls=self._services.tls.mode if self._services.tls else TlsMode.OFF,
            access=self._services.access,
            limits=self._services.limits,
            listing=self._services.listing,
        )
        self._handshake = handshake
        try:
            terms = self._negotiate(handshake)
        except BaseException:
            handshake.abandon()
            raise
        if terms is None:
            handshake.abandon()
            return
        try:
            self._standing.terms = terms
            self._transmit(terms, handshake.take_pending())
        finally:
            terms.session.close()

    # --- handshake
    # ---------------------------------------------------------------------------------------------

    def _negotiate(self, handshake: ServerHandshake) -> Terms | None:
        """Drive the handshake; None where it ended without an export."""
        self._prepare_socket()
        deadline = self._standing.started + self._services.limits.handshake_seconds
        self._send(handshake.greeting(), deadline)
        while True:
            self._set_deadline(deadline)
            data = self._socket.recv(_HANDSHAKE_RECEIVE_BYTES)
            if not data or self._standing.dropped:
                return None
            for event in handshake.feed(data):
                match event:
                    case Send(data=reply):
                        self._send(reply, deadline)
                    case StartTls():
                        self._start_tls(handshake, deadline)
                    case Transmit(terms=terms):
                        return terms
                    case Close(reason=reason):
                        if reason is not None:
                            raise RemoteProtocolError(what=reason)
                        self._close_politely()
                        return None

    def _start_tls(self, handshake: ServerHandshake, deadline: float) -> None:
        if handshake.pending:
            raise RemoteProtocolError(what="plaintext behind STARTTLS")
        assert self._services.tls is not None
        self._set_deadline(deadline)
        try:
            wrapped, identity = self._services.tls.wrap(self._socket)
        except ssl.SSLError as error:
            raise RemoteProtocolError(what=f"the TLS handshake failed: {error.reason or error}") from None
        self._adopt_tls(wrapped, identity)
        handshake.tls_established(identity)

    def _adopt_tls(self, wrapped: ssl.SSLSocket, identity: PeerIdentity) -> None:
        with self._drop_lock:
            self._socket = wrapped
            self._standing.tls = identity.tls
            if self._standing.dropped:
                raise ConnectionEnded

    def _set_deadline(self, deadline: float) -> None:
        left = deadline - monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _send(self, data: bytes, deadline: float) -> None:
        self._set_deadline(deadline)
        self._socket.sendall(data)

    def _prepare_socket(self) -> None:
        sock = self._socket
        if sock.family == socket.AF_UNIX:
            # For TCP the kernel's own tuning goes further than most systems let us ask for.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
        elif sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    # --- transmission
    # ------------------------------------------------------------------------------------------

    def _transmit(self, terms: Terms, pending: bytes) -> None:
        services, limits = self._services, self._services.limits
        self._socket.settimeout(None)
        link: PlainLink | TlsLink
        if isinstance(self._socket, ssl.SSLSocket):
            spin = limits.spin_seconds
            link = TlsLink(self._socket, services.activity, terms.session.sent, spin_seconds=spin)
        else:
            stall = limits.send_stall_seconds
            timeout = _TIMEVAL.pack(int(stall), int(stall % 1 * 1_000_000))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            link = PlainLink(
                self._socket,
                services.activity,
                services.parking,
                spin_seconds=limits.spin_seconds,
                read_max=terms.read_bytes_max,
            )
        executor = Executor(
            link,
            terms,
            services.activity,
            services.memory,
            limits,
            pending=pending,
            queued=services.queued,
        )
        try:
            transmit(link, terms, executor, services.activity, limits, shared=services.shared)
            self._close_politely()
        finally:
            executor.close()
            link.close()

    def _close_politely(self) -> None:
        """End our side, give the client a moment to take in the last replies, then let go."""
        sock = self._socket
        with contextlib.suppress(OSError, ValueError):
            sock.settimeout(_LINGER_SECONDS)
            if isinstance(sock, ssl.SSLSocket):
                self._socket = sock = sock.unwrap()
            sock.shutdown(socket.SHUT_WR)
            end = monotonic() + _LINGER_SECONDS
            while monotonic() < end and sock.recv(_HANDSHAKE_RECEIVE_BYTES):
                pass

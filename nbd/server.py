"""The NBD server: listeners, one thread a connection, limits, orderly shutdown.

In: the life of the server. Out: the life of a connection (`connection`). Shutdown goes in three steps: no
newcomers (listeners closed, socket paths removed, unfinished handshakes dropped); whoever is working finishes
its batch while every later request is answered with ESHUTDOWN; then all are disconnected. Sessions are closed
by their own threads before `shutdown` returns.
"""

import resource
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

from .access import Access, OpenAccess
from .activity import Activity
from .connection import Connection, ConnectionInfo, Services
from .connection_table import ConnectionTable
from .constants import DEFAULT_PORT
from .device import ExportDirectory
from .limits import Limits
from .listeners import Listener, adopted_socket, tcp_listeners, unix_listener
from .log_limit import LogLimit
from .payload_memory import PayloadMemory
from .queued import QueuedMemory
from .shared_loop import SharedLoop
from .stalled import Parking
from .tls import ServerTls

_QUIET_SECONDS = 0.05  # nobody has worked for this long: nothing is in flight
_STEP_SECONDS = 0.005
_NO_DESCRIPTORS_SECONDS = 0.1
_END_SECONDS = 10.0


class Server:
    """Serves exports until `shutdown`. Listen first or later, in any number; `start` begins to accept."""

    def __init__(
        self,
        exports: ExportDirectory,
        *,
        tls: ServerTls | None = None,
        access: Access | None = None,
        limits: Limits | None = None,
        listing: bool = True,
        log: Callable[[str], None] | None = None,
    ) -> None:
        limits = limits or Limits()
        self._activity = Activity()
        self._shared = SharedLoop(self._activity, limits.spin_seconds)
        self._services = Services(
            exports=exports,
            limits=limits,
            activity=self._activity,
            shared=self._shared,
            memory=PayloadMemory(
                buffer_bytes=limits.whole_payload_bytes, total_bytes=limits.payload_memory_bytes
            ),
            queued=QueuedMemory(limits.queued_bytes_max),
            parking=Parking(limits.stalled_bytes_max),
            access=access or OpenAccess(),
            tls=tls,
            listing=listing,
            log=LogLimit(log or (lambda text: None)),
        )
        self._table = ConnectionTable(limits)
        self._listeners: list[Listener] = []
        self._acceptors: list[threading.Thread] = []
        self._started = False
        self._lock = threading.Lock()
        self._ended = False
        self._hurried = False

    # --- listening
    # ---------------------------------------------------------------------------------------------

    def listen_unix(self, path: Path | str, mode: int = 0o600, *, uid: int = -1, gid: int = -1) -> None:
        """Listen on a Unix socket; CannotListen where that fails."""
        self._add(unix_listener(Path(path), mode=mode, uid=uid, gid=gid))

    def listen_tcp(self, host: str, port: int = DEFAULT_PORT) -> int:
        """Listen on all addresses of `host` and return the port (useful with port 0)."""
        listeners = tcp_listeners(host, port)
        for listener in listeners:
            self._add(listener)
        return int(listeners[0].socket.getsockname()[1])

    def adopt(self, descriptor: int) -> None:
        """Take over an inherited socket: a listening one (systemd) or a connection (inetd)."""
        sock, listening = adopted_socket(descriptor)
        if listening:
            self._add(Listener(sock))
        else:
            self._table.start(Connection(self._services, sock, _peer_name(sock)))

    def addresses(self) -> list[Path | tuple[str, int]]:
        """Return where the server listens: paths of Unix sockets, (host, port) of TCP ones."""
        found: list[Path | tuple[str, int]] = []
        for listener in self._listeners:
            name = listener.socket.getsockname()
            if listener.socket.family == socket.AF_UNIX:
                found.append(Path(name.decode() if isinstance(name, bytes) else name))
            else:
                found.append((str(name[0]), int(name[1])))
        return found

    def _add(self, listener: Listener) -> None:
        with self._lock:
            self._listeners.append(listener)
            if self._started:
                self._start_acceptor(listener)

    def start(self) -> None:
        """Begin to accept; returns at once."""
        with self._lock:
            self._started = True
            for listener in self._listeners:
                self._start_acceptor(listener)

    def _start_acceptor(self, listener: Listener) -> None:
        thread = threading.Thread(target=self._accept, args=(listener,), name="nbd-listener", daemon=True)
        self._acceptors.append(thread)
        thread.start()

    # --- accepting
    # ---------------------------------------------------------------------------------------------

    def _accept(self, listener: Listener) -> None:
        listener.socket.setblocking(False)
        waiting = select.poll()
        waiting.register(listener.socket, select.POLLIN)
        waiting.register(self._activity.wake_descriptor, select.POLLIN)
        while True:
            waiting.poll()
            if self._activity.stopping:
                return
            try:
                sock, _ = listener.socket.accept()
            except (BlockingIOError, ConnectionError):
                continue  # gone before we looked
            except OSError as error:
                self._services.log(f"accepting a connection failed: {error}")
                sleep(_NO_DESCRIPTORS_SECONDS)
                continue
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        if self._table.full():
            sock.close()
            self._services.log(
                f"more than {self._services.limits.connections_max} connections: one was turned away"
            )
            return
        if not self._leaves_descriptors(sock):
            sock.close()
            self._services.log("the limit of open files (ulimit -n) is near: a connection was turned away")
            return
        self._table.make_room()
        try:
            self._table.start(Connection(self._services, sock, _peer_name(sock)))
        except (OSError, RuntimeError) as error:
            sock.close()
            self._services.log(f"a connection could not be served: {error}")

    def _leaves_descriptors(self, sock: socket.socket) -> bool:
        """Whether there are descriptors left for other things: a socket always gets the lowest one that is free."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        kept = min(self._services.limits.descriptors_kept, limit // 4)
        return limit == resource.RLIM_INFINITY or sock.fileno() < limit - kept

    # --- looking and ending
    # ------------------------------------------------------------------------------------

    def connections(self) -> list[ConnectionInfo]:
        """Describe the present connections."""
        return [connection.info() for connection in self._table.all()]

    def disconnect(self, export_name: str, seconds: float = _END_SECONDS) -> int:
        """Drop all connections of an export, wait until their sessions are closed; return their number."""
        using = [connection for connection in self._table.all() if connection.export_name == export_name]
        for connection in using:
            connection.drop()
        self._table.wait_for(using, seconds)
        return len(using)

    def shutdown(self, grace_seconds: float = 5.0) -> None:
        """Stop: finish what is in flight within the grace, refuse the rest, disconnect all. May be called twice."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self._activity.stop()
        for thread in self._acceptors:
            thread.join()
        for listener in self._listeners:
            listener.close()
        for connection in self._table.all():
            if connection.negotiating:
                connection.drop()
        self._wait_until_quiet(monotonic() + grace_seconds)
        left = self._table.all()
        for connection in left:
            connection.drop()
        if self._table.wait_for(left, _END_SECONDS):
            self._shared.close()
            self._activity.close()

    def hurry(self) -> None:
        """Let a shutdown that has begun, or that comes, end its grace at once. Safe in a signal handler."""
        self._hurried = True

    def _wait_until_quiet(self, end: float) -> None:
        quiet_since = monotonic()
        while len(self._table) and monotonic() < end and not self._hurried:
            if self._activity.working:
                quiet_since = monotonic()
            elif monotonic() - quiet_since >= _QUIET_SECONDS:
                return
            sleep(_STEP_SECONDS)


def _peer_name(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        return "a client"
    if sock.family == socket.AF_UNIX:
        return "a local client"
    return f"{name[0]}:{name[1]}"

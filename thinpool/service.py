"""The service: one pool, its NBD server, its control API, from start to orderly end.

In: `thinpool serve` and everything it owns. Out: the protocol (`nbd`), the engine (`pool.py`), the API (`control.py`),
the background (`daemon.py`).

Order of the end, so that no acknowledged write is lost and nobody meets half a server: NBD first (requests in flight
finish, clients are disconnected), then the control socket goes, then the pool is committed and closed, then its lock
goes. Whoever finds no control socket and a busy pool waits a moment (`pool_access.py`).
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nbd import (
    AllowList,
    CertificateTls,
    Limits,
    NbdError,
    PskTls,
    Server,
    ServerTls,
    activated_descriptors,
)

from . import __version__
from .control import ControlServer
from .errors import NoSuchDevice, PoolBusy, PoolServed, ServerStartFailed, ThinPoolError
from .exports import PoolExports
from .operations import as_leaf
from .pool import Pool
from .pool_access import BUSY_SECONDS, RETRY_SECONDS, PoolAccess, open_here
from .pool_location import PoolLocation
from .serve_settings import ServeSettings
from .space_watch import SpaceWatch
from .supervision import has_terminal, pid_file, tell_supervisor, when_parent_ends
from .unix_sockets import ADDRESS_BYTES_MAX, listen, on_read_only_file_system

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104 -- recognised, not bound to

log = logging.getLogger("thinpool")


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the NBD server listens."""

    sockets: Sequence[Path] = ()
    tcp: Sequence[tuple[str, int]] = field(default_factory=tuple)
    tls: bool = False

    def uris(self, export: str) -> list[str]:
        """NBD URIs of an export, Unix sockets first (github.com/NetworkBlockDevice/nbd, doc/uri.md)."""
        kind = "nbds" if self.tls else "nbd"
        name = quote(export, safe="@")
        local = [
            f"{kind}+unix:///{name}?socket={quote(os.fsencode(path), safe='/@')}" for path in self.sockets
        ]
        remote = [f"{kind}://{_uri_host(host)}:{port}/{name}" for host, port in self.tcp]
        return local + remote


def _uri_host(host: str) -> str:
    if host in WILDCARDS:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


class Service:
    """A served pool. `run` does everything; the other methods are what the control API needs."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.pool_path = str(settings.location)
        self.pool: Pool
        self.stopping = False
        self._grace_seconds = settings.grace_seconds
        self._stop = threading.Event()
        self._started = datetime.datetime.now(datetime.UTC)
        self._server: Server
        self._hurry: Callable[[], None] = lambda: None
        self._ends_with_terminal = False
        self._tls: ServerTls | None = None
        self._addresses = Addresses()
        self._closing = contextlib.ExitStack()

    # --- life ---

    def run(self, announce: Callable[[dict[str, Any]], None]) -> None:
        """Serve until a signal or the control API says stop. `announce` gets `describe()` when all is ready.

        Raises ThinPoolError where the service could not start, with everything undone.
        """
        outlives_terminal = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup(1)
        self._ends_with_terminal = has_terminal() and not outlives_terminal
        _take_signals(self._on_signal)
        self._closing.callback(_ignore_signals)
        with self._closing:
            self._start_or_say_why()
            announce(self.describe())
            tell_supervisor(f"READY=1\nMAINPID={os.getpid()}\nSTATUS=serving {self.pool_path}")
            self._stop.wait()
            tell_supervisor("STOPPING=1")
            log.info("stopping")

    def _start_or_say_why(self) -> None:
        try:
            self._start()
        except (OSError, MemoryError) as error:
            raise as_leaf(error, self.pool_path) from error

    def _start(self) -> None:
        settings = self._settings
        if settings.exit_with_parent:
            # First of all: a parent that ends while we start must not go unnoticed.
            when_parent_ends(lambda: self.request_stop(None))
        self.pool = open_for_service(settings.location, read_only=settings.read_only)
        self._closing.callback(self.pool.close)
        self._closing.callback(self.pool.lazy.stop_background)
        self.pool.override_settings(settings.overrides)
        watch = SpaceWatch(self.pool)
        self._closing.callback(watch.close)
        watch.start()
        if settings.default_export is not None and self.pool.catalog.by_name(settings.default_export) is None:
            raise NoSuchDevice(settings.default_export, self.pool_path)
        control = settings.location.control_path
        if control is not None and settings.read_only and on_read_only_file_system(control.parent):
            log.warning(
                "%s cannot be made, so commands do not reach this server: end it by a signal", control
            )
            control = None
        if control is not None:
            self._control = ControlServer(self, control)
            self._closing.callback(self._control.close)
        try:
            self._tls = _tls(settings)
            self._server = Server(
                PoolExports(self.pool, settings.default_export),
                tls=self._tls,
                access=AllowList(settings.allowed) if settings.allowed else None,
                limits=_limits(settings),
                listing=settings.listing,
                log=log.warning,
            )
            self._hurry = self._server.hurry
            self._closing.callback(self._end_server)
            self._listen()
        except NbdError as error:
            raise ServerStartFailed(str(error)) from error
        self._server.start()
        if self.pool.writable:
            self.pool.lazy.start_background()
        if control is not None:
            self._control.start()
        if settings.pid_file is not None:
            self._closing.enter_context(pid_file(settings.pid_file))

    def _listen(self) -> None:
        """Listen where systemd says (then nowhere else unless asked to), otherwise on the sockets of the settings."""
        settings = self._settings
        activated = activated_descriptors(os.environ, os.getpid())
        for descriptor in activated:
            self._server.adopt(descriptor)
        addresses = self._server.addresses()
        sockets = [address for address in addresses if isinstance(address, Path)]
        tcp = [address for address in addresses if not isinstance(address, Path)]
        path = settings.socket_path
        if path is None and not activated:
            path = settings.location.nbd_socket_path
        if path is not None:
            self._listen_unix(path)
            sockets.append(path)
        tcp += [(host, self._server.listen_tcp(host, port)) for host, port in settings.listen]
        if not sockets and not tcp:
            raise ServerStartFailed(reason="a bare pool needs --socket or --listen")
        self._addresses = Addresses(sockets, tcp, tls=self._tls is not None)

    def _listen_unix(self, path: Path) -> None:
        mode, (user, group) = self._settings.socket_mode, self._settings.socket_owner
        if len(os.fsencode(path)) <= ADDRESS_BYTES_MAX:
            self._server.listen_unix(path, mode, uid=user, gid=group)
            return
        descriptor = listen(path, mode).detach()
        self._closing.callback(path.unlink, missing_ok=True)
        os.chown(path, user, group)
        self._server.adopt(descriptor)

    def _end_server(self) -> None:
        self.stopping = True
        self._server.shutdown(self._grace_seconds)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP and not (self._ends_with_terminal and not has_terminal()):
            self._reload()
            return
        if self._stop.is_set():
            self._grace_seconds = 0.0
            self._hurry()
        self.request_stop(None)

    def _reload(self) -> None:
        """Read the certificates again; connections that are open keep theirs."""
        if not isinstance(self._tls, CertificateTls):
            log.info("SIGHUP: there is nothing to reload")
            return
        try:
            self._tls.reload()
        except (NbdError, OSError) as error:
            log.warning("SIGHUP: the certificates stay as they were: %s", error)
        else:
            log.info("SIGHUP: certificates read again")

    # --- what the control API needs ---

    def describe(self) -> dict[str, Any]:
        """Who serves what, as JSON."""
        names = [entry.name for entry in self.pool.catalog.entries() if entry.receiving is None]
        connections = [
            {
                "peer": info.peer,
                "device": info.export,
                "tls": info.tls,
                "age_seconds": round(info.age_seconds, 3),
            }
            for info in self._server.connections()
        ]
        return {
            "pool": self.pool_path,
            "pid": os.getpid(),
            "version": __version__,
            "started": self._started.isoformat(timespec="seconds"),
            "default_export": self._settings.default_export,
            "sockets": [os.fsdecode(path) for path in self._addresses.sockets],
            "tcp": [list(pair) for pair in self._addresses.tcp],
            "uris": {name: self._addresses.uris(name) for name in sorted(names)},
            "connections": connections,
        }

    def disconnect(self, name: str) -> int:
        """Drop the NBD connections of a device."""
        if self.pool.catalog.by_name(name) is None:
            raise NoSuchDevice(name, self.pool_path)
        return self._server.disconnect(name)

    def request_stop(self, grace_seconds: float | None) -> None:
        """Begin to stop; returns at once."""
        if grace_seconds is not None:
            self._grace_seconds = grace_seconds
        self.stopping = True
        self._stop.set()


def open_for_service(location: PoolLocation, *, read_only: bool) -> Pool:
    """Open the pool, waiting a moment for a command that has it. Raises PoolServed where a server has it."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return open_here(location, read_only=read_only)
        except PoolBusy as busy:
            try:
                pid = PoolAccess(location).server()["pid"]
            except ThinPoolError:
                if time.monotonic() > deadline:
                    raise busy from None
            else:
                raise PoolServed(str(location), int(pid)) from busy
        time.sleep(RETRY_SECONDS)


def _limits(settings: ServeSettings) -> Limits:
    return Limits() if settings.connections_max is None else Limits(connections_max=settings.connections_max)


def _tls(settings: ServeSettings) -> ServerTls | None:
    if settings.tls_psk is not None:
        return PskTls(settings.tls_psk, required=settings.tls_required)
    if settings.tls_certificates is None:
        return None
    return CertificateTls(
        settings.tls_certificates, required=settings.tls_required, verify_peer=settings.tls_verify_peer
    )


def _take_signals(handle: Callable[[int], None]) -> None:
    """Signals go to `handle` from now on. Elsewhere than in the main thread they are left alone."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, lambda received, _: handle(received))


def _ignore_signals() -> None:
    """For the rest of the process: one that comes late must not change the status of a server that lost nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

"""All connections of a server: limits on their number, and finding them again."""

import threading
from time import monotonic, sleep

from .connection import Connection
from .limits import Limits

_GRACE_SECONDS = 1.0  # nobody is evicted from a handshake younger than this
_WAIT_SECONDS = 0.01


class ConnectionTable:
    """Thread-safe; holds a connection from accept until its thread ends."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._threads: dict[Connection, threading.Thread] = {}

    def __len__(self) -> int:
        return len(self._threads)

    def all(self) -> list[Connection]:
        """Return the present connections."""
        with self._lock:
            return list(self._threads)

    def full(self) -> bool:
        """Return whether newcomers must be turned away."""
        return len(self._threads) >= self._limits.connections_max

    def make_room(self) -> None:
        """Evict the oldest unfinished handshakes until another one is allowed.

        Handshakes that were begun just now are given a moment first: a crowd of honest clients finishes in
        milliseconds, the ones who never finish are the ones who are old.
        """
        while True:
            negotiating = [connection for connection in self.all() if connection.negotiating]
            if len(negotiating) < self._limits.unfinished_handshakes_max:
                return
            oldest = min(negotiating, key=lambda connection: connection.started)
            if monotonic() - oldest.started >= _GRACE_SECONDS:
                oldest.drop()
                self.wait_for([oldest], _GRACE_SECONDS)
            else:
                sleep(_WAIT_SECONDS)

    def start(self, connection: Connection) -> None:
        """Run the connection in a thread of its own."""

        def run() -> None:
            try:
                connection.run()
            finally:
                with self._lock:
                    self._threads.pop(connection, None)

        thread = threading.Thread(target=run, name="nbd-connection", daemon=True)
        with self._lock:
            self._threads[connection] = thread
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads: this client has to come back later
            with self._lock:
                self._threads.pop(connection, None)
            raise

    def wait_for(self, connections: list[Connection], seconds: float) -> bool:
        """Wait until these connections have ended; False where the time ran out first."""
        end = monotonic() + seconds
        for connection in connections:
            with self._lock:
                thread = self._threads.get(connection)
            if thread is None or thread is threading.current_thread():
                continue
            thread.join(max(0.0, end - monotonic()))
            if thread.is_alive():
                return False
        return True

"""What the connections of one server know of each other: who is working, and whether the server is leaving.

A connection is *working* from the moment it has received something until it goes to sleep again. The set of
working connections decides whether polling before sleeping is allowed (a polling thread takes the interpreter
lock from its neighbours), and shutdown waits until it is empty. Set operations are single steps under the
interpreter lock, so no other lock is needed on this path.
"""

import os


class Activity:
    """Shared by all connections of a server."""

    def __init__(self) -> None:
        self.working: set[object] = set()
        self.stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def wake_descriptor(self) -> int:
        """A descriptor that becomes readable, for good, once the server is stopping."""
        return self._wake

    def stop(self) -> None:
        """Tell every connection, also the sleeping ones, that the server is leaving."""
        self.stopping = True
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Release the descriptor; no connection may be left."""
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

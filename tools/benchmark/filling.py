"""Content for the pools that are measured, written without a server."""

from __future__ import annotations

from thinpool.session import Session


def write(session: Session, offset: int, data: bytes) -> None:
    """Write as a server does for a client: where there is no room, it is made, once. Raises OSError."""
    for retry in (True, False):
        session.enter()
        try:
            session.write(offset, memoryview(data))
            return
        except OSError as error:
            refused = error
        finally:
            session.leave()
            session.sent()
        if not retry or not session.wait_for_space(refused):
            raise refused

"""What `thinpool serve` can be asked for, as data: made by the command, read by the service.

Kept apart from `service.py` so that the command can fork into the background before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .pool_location import PoolLocation

GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What `thinpool serve` was asked for. Paths are absolute; `listen` holds (host, port) pairs."""

    location: PoolLocation
    socket_path: Path | None = None
    socket_mode: int = 0o600
    socket_owner: tuple[int, int] = (-1, -1)  # user and group id, -1 to leave it
    listen: Sequence[tuple[str, int]] = ()
    default_export: str | None = None
    pid_file: Path | None = None
    grace_seconds: float = GRACE_SECONDS
    tls_certificates: Path | None = None
    tls_required: bool = True
    tls_verify_peer: bool = False
    tls_psk: Path | None = None
    allowed: Mapping[str, Sequence[str]] = field(default_factory=dict)  # export -> TLS names of clients
    exit_with_parent: bool = False
    connections_max: int | None = None
    listing: bool = True
    read_only: bool = False
    overrides: Mapping[str, str] = field(default_factory=dict)  # pool settings for this server only

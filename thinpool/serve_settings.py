"""What `thinpool serve` can be asked for, as data: made by the command, read by the service.

Kept apart from `service.py` so that the command can fork into the background before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .pool_location import PoolLocation

GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What `thinpool serve` was asked for. Paths are absolute; `listen` holds (host, port) pairs."""

    location: PoolLocation
    socket_path: Path | None = None
    listen: Sequence[tuple[str, int]] = ()
    default_export: str | None = None
    pid_file: Path | None = None
    grace_seconds: float = GRACE_SECONDS
    tls_certificates: Path | None = None
    tls_required: bool = True
    tls_verify_peer: bool = False
    read_only: bool = False

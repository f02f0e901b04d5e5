"""What the sans-IO handshake asks its driver to do."""

from dataclasses import dataclass
from typing import TypeAlias

from .terms import Terms


@dataclass(frozen=True, slots=True)
class Send:
    """Send these bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StartTls:
    """Begin the TLS handshake; everything before has been sent."""


@dataclass(frozen=True, slots=True)
class Transmit:
    """The handshake succeeded; the session in `terms` is the driver's to close."""

    terms: Terms


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection. `reason` is None where the client asked for it."""

    reason: str | None


Event: TypeAlias = Send | StartTls | Transmit | Close

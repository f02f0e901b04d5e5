"""Who may see which export: TLS modes, the identity of a peer, and the rule that joins both to export names."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class TlsMode(Enum):
    """The three modes of the specification; constant during one connection."""

    OFF = "off"  # NOTLS
    OPTIONAL = "optional"  # SELECTIVETLS
    REQUIRED = "required"  # FORCEDTLS


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """What is known about the client: whether it speaks TLS, and the names TLS proved (certificate or PSK)."""

    tls: bool = False
    names: frozenset[str] = field(default_factory=frozenset)


class Access(Protocol):
    """Decides per export; both questions are asked with canonical names and must be cheap."""

    def tls_only(self, export_name: str) -> bool:
        """Whether the export is hidden from clients without TLS (on a server where TLS is optional)."""

    def allowed(self, export_name: str, identity: PeerIdentity) -> bool:
        """Whether this client may use the export."""


class OpenAccess:
    """Everybody may use everything."""

    def tls_only(self, export_name: str) -> bool:
        """Return False."""
        del export_name
        return False

    def allowed(self, export_name: str, identity: PeerIdentity) -> bool:
        """Return True."""
        del export_name, identity
        return True


class AllowList:
    """Exports by client name. An export without an entry is open to all; an entry implies TLS for that export.

    `entries` maps an export name to the certificate names (common name or alternative DNS name) or PSK
    identities that may use it.
    """

    def __init__(self, entries: Mapping[str, Collection[str]]) -> None:
        self._entries = {name: frozenset(clients) for name, clients in entries.items()}

    def tls_only(self, export_name: str) -> bool:
        """Return whether the export has an entry: without TLS there is no name to compare."""
        return export_name in self._entries

    def allowed(self, export_name: str, identity: PeerIdentity) -> bool:
        """Return whether one of the proven names is in the export's entry."""
        clients = self._entries.get(export_name)
        return clients is None or not clients.isdisjoint(identity.names)

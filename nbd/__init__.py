"""NBD: the network block device protocol, a server for any device that satisfies `Session`, and a small client."""

from .access import Access, AllowList, OpenAccess, PeerIdentity, TlsMode
from .connection import ConnectionInfo
from .device import (
    EXTENT_EXCLUSIVE,
    EXTENT_HOLE,
    EXTENT_SHARED,
    Buffer,
    Export,
    ExportDirectory,
    Extents,
    Session,
)
from .errors import CannotListen, NbdError, RemoteError, RemoteProtocolError, TlsUnavailable
from .limits import Limits
from .listeners import activated_descriptors
from .server import Server
from .tls import CertificateTls, PskTls, ServerTls

__all__ = [
    "EXTENT_EXCLUSIVE",
    "EXTENT_HOLE",
    "EXTENT_SHARED",
    "Access",
    "AllowList",
    "Buffer",
    "CannotListen",
    "CertificateTls",
    "ConnectionInfo",
    "Export",
    "ExportDirectory",
    "Extents",
    "Limits",
    "NbdError",
    "OpenAccess",
    "PeerIdentity",
    "PskTls",
    "RemoteError",
    "RemoteProtocolError",
    "Server",
    "ServerTls",
    "Session",
    "TlsMode",
    "TlsUnavailable",
    "activated_descriptors",
]

"""TLS of the server: certificates or pre-shared keys, in the directory layout of nbdkit and QEMU.

In: building contexts, wrapping a socket, the names a client has proved. Out: when TLS is demanded (`access`,
`negotiation`). Certificates are read when a context is built; `reload` builds a new one for later
connections, live ones keep theirs. TLS 1.2 is the oldest version accepted.
"""

import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from .access import PeerIdentity, TlsMode
from .errors import TlsUnavailable

CA_CERTIFICATE = "ca-cert.pem"
SERVER_CERTIFICATE = "server-cert.pem"
SERVER_KEY = "server-key.pem"
REVOCATION_LIST = "ca-crl.pem"
PSK_FILE = "keys.psk"


class ServerTls(Protocol):
    """A way to do TLS."""

    @property
    def mode(self) -> TlsMode:
        """OPTIONAL or REQUIRED."""

    def wrap(self, sock: socket.socket) -> tuple[ssl.SSLSocket, PeerIdentity]:
        """Do the server's side of the TLS handshake; ssl.SSLError or OSError where it fails."""


class CertificateTls:
    """X.509: `directory` holds ca-cert.pem, server-cert.pem, server-key.pem and perhaps ca-crl.pem.

    With `verify_peer`, clients must show a certificate of that authority; their names can then be compared
    with an allow-list.
    """

    def __init__(self, directory: Path, *, required: bool = True, verify_peer: bool = False) -> None:
        self._directory = directory
        self._mode = TlsMode.REQUIRED if required else TlsMode.OPTIONAL
        self._verify_peer = verify_peer
        self._context = self._load()

    @property
    def mode(self) -> TlsMode:
        """Whether clients must or may use TLS."""
        return self._mode

    def reload(self) -> None:
        """Read the certificates again, for connections to come; on failure the old ones stay in use."""
        self._context = self._load()

    def _load(self) -> ssl.SSLContext:
        directory = self._directory
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(directory / SERVER_CERTIFICATE, directory / SERVER_KEY)
            if self._verify_peer:
                context.load_verify_locations(directory / CA_CERTIFICATE)
                context.verify_mode = ssl.CERT_REQUIRED
                if (directory / REVOCATION_LIST).exists():
                    context.load_verify_locations(directory / REVOCATION_LIST)
                    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        except FileNotFoundError:
            needed = [SERVER_CERTIFICATE, SERVER_KEY] + ([CA_CERTIFICATE] if self._verify_peer else [])
            missing = [name for name in needed if not (directory / name).exists()]
            raise TlsUnavailable(
                why=f"{directory} lacks {', '.join(missing) or 'a certificate file'}"
            ) from None
        except (OSError, ssl.SSLError) as error:
            raise TlsUnavailable(why=f"the certificates in {directory} cannot be used: {error}") from error
        return context

    def wrap(self, sock: socket.socket) -> tuple[ssl.SSLSocket, PeerIdentity]:
        """Do the TLS handshake."""
        wrapped = self._context.wrap_socket(sock, server_side=True)
        return wrapped, PeerIdentity(tls=True, names=certificate_names(wrapped))


def certificate_names(sock: ssl.SSLSocket) -> frozenset[str]:
    """Return common names, DNS names and mail addresses of a verified client certificate; empty without one."""
    certificate = sock.getpeercert()
    if not certificate:
        return frozenset()
    names = set()
    subject: Any = certificate.get("subject", ())
    for key, value in (pair for relative in subject for pair in relative):
        if key == "commonName":
            names.add(str(value))
    alternatives: Any = certificate.get("subjectAltName", ())
    for kind, value in alternatives:
        if kind in ("DNS", "email"):
            names.add(str(value))
    return frozenset(names)


class PskTls:
    """Pre-shared keys from a file of `identity:hexkey` lines, as psktool makes them. Needs Python 3.13."""

    def __init__(self, path: Path, *, required: bool = True) -> None:
        if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
            raise TlsUnavailable(
                why="pre-shared keys need Python 3.13 or newer; use certificates, or run under a newer Python"
            )
        self._keys = read_psk_file(path / PSK_FILE if path.is_dir() else path)
        self._mode = TlsMode.REQUIRED if required else TlsMode.OPTIONAL

    @property
    def mode(self) -> TlsMode:
        """Whether clients must or may use TLS."""
        return self._mode

    def wrap(self, sock: socket.socket) -> tuple[ssl.SSLSocket, PeerIdentity]:
        """Do the TLS handshake; the identity of the key that fitted is the client's name."""
        seen: list[str] = []
        keys = self._keys

        def key_of(identity: str | None) -> bytes:
            seen.append(identity or "")
            return keys.get(identity or "", b"")  # an empty key refuses the client

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.num_tickets = 0  # in TLS 1.3 a ticket would come back as one more identity to look up
        context.set_ciphers("PSK")
        set_callback: Callable[[Callable[[str | None], bytes]], None] = getattr(  # noqa: B009
            context, "set_psk_server_callback"
        )
        set_callback(key_of)
        wrapped = context.wrap_socket(sock, server_side=True)
        return wrapped, PeerIdentity(tls=True, names=frozenset(seen[-1:]))


def read_psk_file(path: Path) -> Mapping[str, bytes]:
    """Return identity → key; TlsUnavailable where the file is missing or a line has another form."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TlsUnavailable(why=f"the key file {path} cannot be read: {error}") from error
    keys = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        identity, _, key = line.strip().rpartition(":")
        try:
            value = bytes.fromhex(key)
        except ValueError:
            value = b""
        if not identity or not value:
            raise TlsUnavailable(why=f"line {number} of {path} is not 'identity:hexadecimal key'")
        keys[identity] = value
    if not keys:
        raise TlsUnavailable(why=f"the key file {path} holds no key")
    return keys

"""NBD URIs: how a client is told where an export is (the NBD project's URI specification).

In: building `nbd://`, `nbds://`, `nbd+unix://` and `nbds+unix://` addresses, and taking them apart for the
client. Out: connecting.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .constants import DEFAULT_PORT
from .errors import AddressInvalid

_SCHEMES = {
    "nbd": (False, False),
    "nbds": (True, False),
    "nbd+unix": (False, True),
    "nbds+unix": (True, True),
}
_KNOWN_PARAMETERS = {
    "socket",
    "tls-certificates",
    "tls-psk-file",
    "tls-hostname",
    "tls-type",
    "tls-username",
    "tls-verify-peer",
}


def unix_uri(socket_path: Path | str, export_name: str = "", *, tls: bool = False) -> str:
    """Return the URI of an export behind a Unix socket."""
    scheme = "nbds+unix" if tls else "nbd+unix"
    return f"{scheme}:///{_quoted_name(export_name)}?socket={quote(str(socket_path), safe='/')}"


def tcp_uri(host: str, port: int = DEFAULT_PORT, export_name: str = "", *, tls: bool = False) -> str:
    """Return the URI of an export behind a TCP port; IPv6 addresses are put in brackets."""
    scheme = "nbds" if tls else "nbd"
    shown = f"[{host}]" if ":" in host else quote(host)
    where = shown if port == DEFAULT_PORT else f"{shown}:{port}"
    return f"{scheme}://{where}/{_quoted_name(export_name)}"


def _quoted_name(name: str) -> str:
    """Quote an export name. Exactly one leading slash separates it, further ones belong to the name."""
    return quote(name, safe="/@+:,~")


@dataclass(frozen=True, slots=True)
class Address:
    """A URI taken apart: either `socket_path` or `host` and `port` is set."""

    export_name: str
    tls: bool
    socket_path: str | None = None
    host: str | None = None
    port: int = DEFAULT_PORT
    user: str | None = None
    certificates: Path | None = None
    psk_file: Path | None = None
    tls_hostname: str | None = None


def parse_uri(text: str) -> Address:
    """Take a URI apart; AddressInvalid says what is wrong, also about unknown parameters."""
    parts = urlsplit(text)
    if parts.scheme not in _SCHEMES:
        raise AddressInvalid(uri=text, why=f"the scheme must be one of {', '.join(_SCHEMES)}")
    tls, unix = _SCHEMES[parts.scheme]
    try:
        parameters = {key: values[-1] for key, values in parse_qs(parts.query, strict_parsing=True).items()}
        port = parts.port or DEFAULT_PORT
    except ValueError as error:
        if parts.query or "port" in str(error).lower():
            raise AddressInvalid(uri=text, why=str(error)) from None
        parameters, port = {}, parts.port or DEFAULT_PORT
    unknown = [key for key in parameters if key not in _KNOWN_PARAMETERS and not key.startswith("x-")]
    if unknown:
        raise AddressInvalid(uri=text, why=f"unknown parameter {unknown[0]}")
    if unix != ("socket" in parameters):
        raise AddressInvalid(uri=text, why="`socket=` is needed with a +unix scheme, and only there")
    certificates, psk_file = parameters.get("tls-certificates"), parameters.get("tls-psk-file")
    return Address(
        export_name=unquote(parts.path.removeprefix("/")),
        tls=tls,
        socket_path=parameters.get("socket"),
        host=None if unix else parts.hostname or "localhost",
        port=port,
        user=parts.username or parameters.get("tls-username"),
        certificates=Path(certificates) if certificates else None,
        psk_file=Path(psk_file) if psk_file else None,
        tls_hostname=parameters.get("tls-hostname"),
    )

# ruff: noqa: N818 -- the names say what happened; an Error suffix adds nothing to them
"""Errors of the package, and the translation of host errors into the protocol's closed set.

Each class answers one question: does the connection survive? `RemoteProtocolError` ends it (the peer broke
the framing or a rule without an error reply), `RequestError` is answered on the request alone,
`LocalProtocolError` is a mistake of this side. Sentences are made in `__str__` from the fields.
"""

import errno
from dataclasses import dataclass

from .constants import Command, Errno, OptionReply


class NbdError(Exception):
    """Root of everything this package raises on its own account."""


@dataclass(slots=True)
class RemoteProtocolError(NbdError):
    """The peer broke the protocol in a way that leaves no common ground; the connection must be closed."""

    what: str

    def __str__(self) -> str:
        return f"the peer broke the NBD protocol: {self.what}"


@dataclass(slots=True)
class LocalProtocolError(NbdError):
    """A call that is not possible in the present state of the connection: a mistake of the caller."""

    what: str

    def __str__(self) -> str:
        return f"not possible in this state of the NBD connection: {self.what}"


@dataclass(slots=True)
class RequestError(NbdError):
    """One request failed and the connection goes on; `reason` may be shown to the user at the other end."""

    error: Errno
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.error.name}: {self.reason}" if self.reason else self.error.name


@dataclass(slots=True)
class OptionRefused(NbdError):
    """The server answered an option with an error (client side)."""

    option: int
    reply: int
    text: str

    def __str__(self) -> str:
        name = OptionReply(self.reply).name if self.reply in set(OptionReply) else hex(self.reply)
        return f"the server refused option {self.option} with {name}" + (
            f": {self.text}" if self.text else ""
        )


@dataclass(slots=True)
class RemoteError(NbdError):
    """The server answered a request with an error (client side)."""

    command: Command | int
    error: int
    text: str = ""

    def __str__(self) -> str:
        name = Errno(self.error).name if self.error in set(Errno) else str(self.error)
        return f"request {self.command!r} failed with {name}" + (f": {self.text}" if self.text else "")


class EndOfRequests(NbdError):
    """The client sent DISC; everything before it has been answered."""

    def __str__(self) -> str:
        return "the client ended the connection"


@dataclass(slots=True)
class SendFault(NbdError):
    """The kernel could not read a buffer (EFAULT): a bad sector or a truncated data file under a mapping."""

    sent: int

    def __str__(self) -> str:
        return f"the data under a reply could not be read; {self.sent} bytes of the batch had been sent"


class DataLost(NbdError):
    """A reply had been begun and cannot be finished honestly; the connection must end."""

    def __str__(self) -> str:
        return "the data of a reply could not be read after its header had been sent"


class ReplyBacklog(NbdError):
    """The client does not read its replies, and the server keeps too many bytes for such clients already."""

    def __str__(self) -> str:
        return "the client does not read its replies and too many bytes wait for such clients already"


@dataclass(slots=True)
class OptionInvalid(NbdError):
    """An option's payload does not follow its layout."""

    why: str

    def __str__(self) -> str:
        return f"malformed option: {self.why}"


@dataclass(slots=True)
class CannotListen(NbdError):
    """A listening socket could not be made."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"cannot listen on {self.where}: {self.why}"


class ConnectionEnded(NbdError):
    """The peer closed the connection; not an error by itself where it happens between two requests."""

    def __str__(self) -> str:
        return "the NBD peer closed the connection"


@dataclass(slots=True)
class TlsUnavailable(NbdError):
    """TLS was asked for in a form that this Python or these files cannot give."""

    why: str

    def __str__(self) -> str:
        return f"TLS cannot be set up: {self.why}"


@dataclass(slots=True)
class AddressInvalid(NbdError):
    """A text that should be an NBD URI is none."""

    uri: str
    why: str

    def __str__(self) -> str:
        return f"{self.uri!r} is not a usable NBD URI: {self.why}"


# Everything not named here is EIO. EDQUOT and EFBIG mean "no room" to whoever wrote.
_FROM_HOST = {
    errno.EPERM: Errno.EPERM,
    errno.EACCES: Errno.EPERM,
    errno.EROFS: Errno.EPERM,
    errno.ENOMEM: Errno.ENOMEM,
    errno.EINVAL: Errno.EINVAL,
    errno.ENOSPC: Errno.ENOSPC,
    errno.EDQUOT: Errno.ENOSPC,
    errno.EFBIG: Errno.ENOSPC,
    errno.EOVERFLOW: Errno.EOVERFLOW,
    errno.ENOTSUP: Errno.ENOTSUP,
    errno.EOPNOTSUPP: Errno.ENOTSUP,
    errno.ESHUTDOWN: Errno.ESHUTDOWN,
}


def wire_errno(error: OSError, command: int, *, fast_only: bool = False) -> Errno:
    """Translate a device's failure into what may be sent.

    EOVERFLOW and ENOTSUP have narrow meanings in the protocol ("Error values"): ENOTSUP belongs to a fast
    zero that would be slow and to nothing else, EOVERFLOW to over-long requests, which are refused before the
    device sees them.
    """
    found = _FROM_HOST.get(error.errno or 0, Errno.EIO)
    if found is Errno.ENOTSUP and not (command == Command.WRITE_ZEROES and fast_only):
        return Errno.EIO
    if found is Errno.EOVERFLOW:
        return Errno.EIO
    return found

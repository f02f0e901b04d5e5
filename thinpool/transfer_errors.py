# ruff: noqa: N818 -- the names say what happened, as `NoSpace`; an Error suffix adds nothing to them
"""Errors about snapshots that travel: streams, bases, targets, tokens. See `errors.py` for the rules of all leaves."""

from __future__ import annotations

from .error_root import ExitCode, ThinPoolError, leaf
from .wording import escaped, quoted, shown_path


@leaf(ExitCode.DAMAGED)
class StreamDamaged(ThinPoolError):
    """A stream that is cut, changed, out of order, or none at all; `position_bytes` is how much of it was read."""

    reason: str
    position_bytes: int

    def __str__(self) -> str:
        return f"the stream is damaged after {self.position_bytes} bytes: {escaped(self.reason)}"


@leaf(ExitCode.FAILURE)
class StreamUnsupported(ThinPoolError):
    """A stream of a later format."""

    reason: str

    def __str__(self) -> str:
        return f"this version cannot read the stream: {escaped(self.reason)}; nothing was changed"


@leaf(ExitCode.CONFLICT)
class BaseMissing(ThinPoolError):
    """An increment whose base is not in the pool. `found` is what the device of the base's name holds, "" for none.

    `common_there` is the nearest snapshot that both sides have, by its name where the stream comes from, `common_here`
    by its name here; "" where the sender knows of none.
    """

    base: str
    content_id: str
    found: str
    common_there: str = ""
    common_here: str = ""

    def __str__(self) -> str:
        here = "there is none of that name here either"
        if self.found == "changed":
            here = f"{quoted(self.base)} here may have been written to since"
        elif self.found:
            here = f"{quoted(self.base)} here holds content {self.found}"
        return (
            f"the stream is an increment on {quoted(self.base)} with content {self.content_id}, which no device of "
            f"this pool holds ({here}); {self._advice()}; nothing was changed"
        )

    def _advice(self) -> str:
        if not self.common_there:
            return "send the increments between first, or a full stream"
        named = "" if self.common_here == self.common_there else f" ({quoted(self.common_here)} here)"
        return (
            f"the nearest snapshot that both sides have is {quoted(self.common_there)}{named}: "
            "send on top of that one, with -i"
        )


@leaf(ExitCode.CONFLICT)
class TargetDiverged(ThinPoolError):
    """The device to be brought forward is not what the increment begins with. `found` is "" where it was changed."""

    name: str
    expected: str
    found: str

    def __str__(self) -> str:
        here = (
            f"holds content {self.found}" if self.found else "may have been written to since it was received"
        )
        return (
            f"{quoted(self.name)} {here}, and the stream begins with content {self.expected}; receive under another "
            "name, or roll it back first; nothing was changed"
        )


@leaf(ExitCode.CONFLICT)
class PartlyReceived(ThinPoolError):
    """Another stream under the name of a half-received device."""

    name: str
    token: str

    def __str__(self) -> str:
        return (
            f"{quoted(self.name)} is partly received already; go on with `thinpool send --resume {self.token}`, or "
            "drop it with `thinpool receive --abort`"
        )


@leaf(ExitCode.NOT_FOUND)
class NotReceiving(ThinPoolError):
    """A resumed stream, or an abort, without a half-received device."""

    name: str

    def __str__(self) -> str:
        return f"nothing is partly received under the name {quoted(self.name)}"


@leaf(ExitCode.CONFLICT)
class ResumeMismatch(ThinPoolError):
    """A resumed stream that does not go on where the half-received device ends."""

    name: str
    token: str

    def __str__(self) -> str:
        return (
            f"the stream does not go on where {quoted(self.name)} was interrupted; send with `--resume {self.token}`; "
            "nothing was changed"
        )


@leaf(ExitCode.USAGE)
class TokenInvalid(ThinPoolError):
    """No token, or one that was changed on its way."""

    token: str
    reason: str

    def __str__(self) -> str:
        return f"{quoted(self.token)} cannot be resumed: {escaped(self.reason)}"


@leaf(ExitCode.CONFLICT)
class BaseNotFrozen(ThinPoolError):
    """A base that clients may have changed."""

    name: str

    def __str__(self) -> str:
        return (
            f"{quoted(self.name)} may have changed since it was sent and cannot be a base; take a read-only snapshot "
            "before sending, and send that"
        )


@leaf(ExitCode.NOT_FOUND)
class BaseGone(ThinPoolError):
    """The base to send on top of is not in the pool. `others` are related snapshots that are, the nearest first."""

    name: str
    pool: str
    others: list[str]

    def __str__(self) -> str:
        others = ", ".join(map(quoted, self.others))
        there = f"related snapshots are {others}" if others else "no related snapshot is there either"
        advice = "`send --common` finds one that the other side has" if others else "send a full stream"
        return (
            f"no device {quoted(self.name)} in pool {shown_path(self.pool)} to be the base; {there}; {advice}"
        )


@leaf(ExitCode.CONFLICT)
class NothingInCommon(ThinPoolError):
    """No snapshot that an increment could begin with is on both sides."""

    name: str

    def __str__(self) -> str:
        return (
            f"no snapshot related to {quoted(self.name)} is in both pools; send a full stream, without --common; "
            "nothing was sent"
        )


@leaf(ExitCode.NOT_FOUND)
class ContentGone(ThinPoolError):
    """No device here holds what a token asks for. `content_id` is that of the base where `what` says so."""

    what: str
    content_id: str

    def __str__(self) -> str:
        return (
            f"no device of this pool holds the {escaped(self.what)} with content {self.content_id} any more; drop the "
            "partly received device with `thinpool receive --abort`, and send anew"
        )


@leaf(ExitCode.CONFLICT)
class DeviceHeld(ThinPoolError):
    """A device that is being sent."""

    name: str

    def __str__(self) -> str:
        return f"device {quoted(self.name)} is being sent or copied; wait until that has ended"


@leaf(ExitCode.SERVER)
class HoldLost(ThinPoolError):
    """The server that kept a snapshot in place is gone."""

    path: str

    def __str__(self) -> str:
        return f"the server of {escaped(self.path)} ended while the snapshot was read; what was sent so far is right"


@leaf(ExitCode.FAILURE)
class ImageFailed(ThinPoolError):
    """An image that qemu cannot read or write; `reason` is what it said."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"image {shown_path(self.path)}: {escaped(self.reason)}"


@leaf(ExitCode.CONFLICT)
class ImageExists(ThinPoolError):
    """An export would overwrite a file."""

    path: str

    def __str__(self) -> str:
        return f"{shown_path(self.path)} exists already; --force overwrites it when the export is complete"


@leaf(ExitCode.FAILURE)
class ToolMissing(ThinPoolError):
    """A program that is needed is not installed."""

    program: str
    package: str

    def __str__(self) -> str:
        return f"{escaped(self.program)} is not installed (Debian has it in {escaped(self.package)})"

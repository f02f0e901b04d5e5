"""The check of one request against the terms of its connection: a pure function, applied before anything is touched.

The order is fixed: payload size, command, flags, read-only, range, alignment. The minimum block size is
always 1, so the last step has nothing to refuse. The caller has read (or discarded) the payload before the
answer goes out.
"""

from .constants import Command, CommandFlag, Errno, TransmissionFlag
from .errors import RequestError
from .terms import Terms

_MODIFYING = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})
_RANGED = frozenset(Command) - {Command.FLUSH, Command.DISC}


def legal_flags(terms: Terms, command: Command) -> CommandFlag:
    """Return the flags that may come with a command under these terms. FUA may come with any."""
    legal = CommandFlag.FUA
    match command:
        case Command.READ:
            if terms.flags & TransmissionFlag.SEND_DF:
                legal |= CommandFlag.DF
        case Command.WRITE:
            if terms.extended:
                legal |= CommandFlag.PAYLOAD_LEN
        case Command.WRITE_ZEROES:
            legal |= CommandFlag.NO_HOLE
            if terms.flags & TransmissionFlag.SEND_FAST_ZERO:
                legal |= CommandFlag.FAST_ZERO
        case Command.BLOCK_STATUS:
            legal |= CommandFlag.REQ_ONE
            if terms.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD:
                legal |= CommandFlag.PAYLOAD_LEN
        case _:
            pass
    return legal


def payload_bytes(terms: Terms, flags: int, command: int, length: int) -> int:
    """Return how many bytes follow the request's header.

    In the compact form only WRITE has a payload, unknown commands have none; in the extended form PAYLOAD_LEN
    says so for any command.
    """
    if terms.extended:
        return length if flags & CommandFlag.PAYLOAD_LEN else 0
    return length if command == Command.WRITE else 0


def framing_fault(terms: Terms, flags: int, command: int, length: int) -> str | None:
    """Return why the stream cannot go on after this header, or None."""
    if payload_bytes(terms, flags, command, length) > terms.payload_bytes_max:
        return f"a payload of {length} bytes, at most {terms.payload_bytes_max} are accepted"
    if terms.extended and command == Command.WRITE and not flags & CommandFlag.PAYLOAD_LEN:
        return "an extended WRITE without PAYLOAD_LEN, so nobody can tell whether data follow"
    return None


def check(terms: Terms, flags: int, command: int, offset: int, length: int) -> RequestError | None:
    """Return the error that answers the request, or None where it may be executed.

    For BLOCK_STATUS with a payload, `length` is the payload's; the range in the payload is checked by
    `check_range` once it is known.
    """
    if command not in set(Command):
        return RequestError(Errno.EINVAL, f"command {command} is not known")
    known = Command(command)
    illegal = flags & ~int(legal_flags(terms, known))
    if illegal:
        return RequestError(Errno.EINVAL, f"flags {illegal:#x} are not possible with {known.name}")
    if terms.read_only and known in _MODIFYING:
        return RequestError(Errno.EPERM, "the export is read-only")
    if known is Command.BLOCK_STATUS:
        if not terms.chunked or not terms.contexts:
            return RequestError(Errno.EINVAL, "no meta context was selected")
        if flags & CommandFlag.PAYLOAD_LEN:
            return None
    if known in _RANGED:
        return check_range(terms, known, offset, length)
    return None


def check_range(terms: Terms, command: Command, offset: int, length: int) -> RequestError | None:
    """Check that the range lies inside the export and that the command can have this length."""
    if offset + length > terms.size_bytes:
        error = Errno.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else Errno.EINVAL
        return RequestError(error, f"{offset}+{length} is beyond the end of the export at {terms.size_bytes}")
    if command is Command.READ and length > terms.read_bytes_max:
        error = Errno.EOVERFLOW if terms.chunked else Errno.EINVAL
        return RequestError(error, f"reads are limited to {terms.read_bytes_max} bytes")
    if command is Command.BLOCK_STATUS and length == 0:
        return RequestError(Errno.EINVAL, "block status of an empty range")
    return None

"""What to do when the kernel cannot read a reply's data: EFAULT from sendmsg on a slice of the data file's mapping.

Everything is known that is needed: the replies of a batch lie in the order of its requests, each beginning
with a `bytes` header (the session's buffers are memoryviews), and the requests themselves are still in the
receive buffer. So:

    replies that had gone out       nothing to do
    the reply that was being sent   padded with zeros and ended by an error chunk where its data chunk does not
                                    carry DONE; otherwise the connection ends: all data had been promised
    replies not begun               writes are confirmed; reads are answered again from private copies
                                    (`read_copy` learns the true error, EIO as a rule)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .constants import Command, Errno
from .device import Buffer
from .errors import DataLost
from .wire import EXTENDED_REQUEST, HOT_EXTENDED_NONE, REQUEST

if TYPE_CHECKING:
    from .execution import Executor

_PAD = memoryview(bytes(65536))


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch whose sending failed after `sent` bytes; `requests` are the raw plain requests it answers."""

    parts: Sequence[Buffer]
    sent: int
    requests: memoryview


def recover(batch: Batch, executor: "Executor") -> None:
    """Finish the batch as far as it can be; raises DataLost where a begun reply cannot."""
    before = 0
    for request, reply in _pairs(batch, extended=executor.terms.extended):
        length = sum(map(len, reply))
        if before + length <= batch.sent:
            pass
        elif before < batch.sent:
            _finish_begun(request, reply, batch.sent - before, executor)
        elif request[2] == Command.READ:
            executor.answer_again(*request[3:])
        else:
            executor.send(list(reply))
        before += length


def _pairs(batch: Batch, *, extended: bool) -> list[tuple[tuple[int, ...], list[Buffer]]]:
    """Return (request header, reply buffers) in order."""
    layout = EXTENDED_REQUEST if extended else REQUEST
    requests = []
    position = 0
    while position < len(batch.requests):
        request = layout.unpack_from(batch.requests, position)
        position += layout.size + (request[5] if request[2] == Command.WRITE else 0)
        requests.append(request)
    replies: list[list[Buffer]] = []
    for part in batch.parts:
        if not isinstance(part, bytes) or (replies and _is_trailer(part, replies[-1])):
            replies[-1].append(part)
        else:
            replies.append([part])
    return list(zip(requests, replies, strict=True))


def _is_trailer(part: bytes, reply: list[Buffer]) -> bool:
    """Return whether a header is the closing NONE chunk of the read in front of it.

    Only a reply with data can have one, and its length differs from every header of a new reply with data
    behind it; a NONE chunk that confirms a write never follows an unfinished read.
    """
    return len(reply) > 1 and not _self_done(reply) and len(part) in (20, HOT_EXTENDED_NONE.size)


def _self_done(reply: list[Buffer]) -> bool:
    """Return whether the first chunk of a reply carries DONE, or the reply is a simple one."""
    head = bytes(reply[0])
    return len(head) == 16 or bool(head[5] & 1) or isinstance(reply[-1], bytes)


def _finish_begun(request: tuple[int, ...], reply: list[Buffer], sent: int, executor: "Executor") -> None:
    head = reply[0]
    if _simple_or_done(head) or sent < len(head):
        raise DataLost
    trailer = reply[-1]
    padding = sum(map(len, reply)) - sent - len(trailer)
    if padding < 0:
        raise DataLost  # inside the trailer: cannot happen, it is ours and readable
    while padding > 0:
        piece = _PAD[: min(padding, len(_PAD))]
        executor.send([piece])
        padding -= len(piece)
    _, _, _, cookie, offset, length = request
    reached = offset + max(0, min(length - 1, sent - len(head)))
    executor.send(
        executor.replies.error_at(
            cookie, offset, Errno.EIO, reached, "the data could not be read from storage"
        )
    )


def _simple_or_done(head: Buffer) -> bool:
    return len(head) == 16 or bool(memoryview(head)[5] & 1)

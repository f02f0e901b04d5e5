"""THE HOT LOOP of the server: everything in this module runs per request. Measure before and after any change.

Theory of operation. One receive takes in as many requests as are waiting. Under `session.enter()` all plain
READs and WRITEs in the buffer are applied: a READ appends its reply header and the buffers the session hands
out, a WRITE passes a slice of the receive buffer on and appends its reply. Then the lock is dropped, one
`sendmsg` carries all replies, and `session.sent()` lets go of the buffers. Nothing in between waits for the
client.

Whatever is not plain (other commands, flags, errors, payloads that do not fit the buffer) ends the batch and
is handed to `Executor.handle`, which may wait and which sends its own replies. The first eight bytes of a
request are magic, flags and command: one comparison tells the plain ones. A batch also ends after
`batch_bytes` of replies, so a client that asks for much and reads nothing holds a bounded list of views and
its own thread, nothing else.

House rules of the loop: locals only, prepacked structs, no logging, no exception and no object beyond the
reply itself on the normal path.
"""

import contextlib
import errno
from collections.abc import Callable
from typing import TypeAlias

from .activity import Activity
from .constants import (
    CHUNK_DONE,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
    CommandFlag,
)
from .device import Buffer
from .errors import ConnectionEnded, EndOfRequests, SendFault
from .execution import Executor
from .limits import Limits
from .link import IOV_MAX, Link
from .send_fault import Batch, recover
from .shared_loop import SharedLoop
from .shift import TURN_BYTES_MAX, Shift
from .terms import Terms
from .wire import (
    EXTENDED_REQUEST,
    HOT_EXTENDED_DATA,
    HOT_EXTENDED_HOLE,
    HOT_EXTENDED_NONE,
    HOT_EXTENDED_REQUEST,
    HOT_REQUEST,
    HOT_SIMPLE_OK,
    HOT_SIMPLE_OK_KIND,
    HOT_STRUCTURED_DATA,
    HOT_STRUCTURED_HOLE,
    HOT_STRUCTURED_NONE,
    REQUEST,
    hot_kind,
)

# Data chunks up to this size carry DONE themselves. Longer ones leave it to a NONE chunk behind them, so that
# a fault while they are being sent can still be told to the client.
SELF_DONE_BYTES_MAX = 65536

# Holes inside a read that are worth chunks of their own.
_MIXED_HOLE_BYTES_MIN = 65536

# After a batch with no more reply bytes than this, more requests may be let gather.
_SHORT_REPLIES_BYTES_MAX = 16384

# How long a connection stays with its own thread after the shared loop had to give it back.
_BY_ITSELF_BATCHES = 32

# Remainders up to this size are moved to the front of the buffer without much thought.
_SMALL_MOVE_BYTES = 8192

_READ = hot_kind(REQUEST_MAGIC, 0, Command.READ)
_WRITE = hot_kind(REQUEST_MAGIC, 0, Command.WRITE)
_EXTENDED_READ = hot_kind(EXTENDED_REQUEST_MAGIC, 0, Command.READ)
_EXTENDED_WRITE = hot_kind(EXTENDED_REQUEST_MAGIC, CommandFlag.PAYLOAD_LEN, Command.WRITE)
_NEVER = -1  # a kind no request has: writes on a read-only export take the slow path

_STRUCTURED_DONE = hot_kind(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.OFFSET_DATA)
_STRUCTURED_MORE = hot_kind(STRUCTURED_REPLY_MAGIC, 0, ChunkType.OFFSET_DATA)
_STRUCTURED_HOLE = hot_kind(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.OFFSET_HOLE)
_STRUCTURED_NONE = hot_kind(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.NONE)
_EXTENDED_DONE = hot_kind(EXTENDED_REPLY_MAGIC, CHUNK_DONE, ChunkType.OFFSET_DATA)
_EXTENDED_MORE = hot_kind(EXTENDED_REPLY_MAGIC, 0, ChunkType.OFFSET_DATA)
_EXTENDED_HOLE = hot_kind(EXTENDED_REPLY_MAGIC, CHUNK_DONE, ChunkType.OFFSET_HOLE)
_EXTENDED_NONE = hot_kind(EXTENDED_REPLY_MAGIC, CHUNK_DONE, ChunkType.NONE)

# (reply buffers to append to, begin, end of the received bytes) to (new begin, reply bytes, bytes needed,
# failure). Bytes needed: what must be in the buffer before the next call can do something; 0 where the
# request at the new begin is not a plain one, or failed.
Apply: TypeAlias = Callable[[list[Buffer], int, int], tuple[int, int, int, OSError | None]]


def transmit(
    link: Link,
    terms: Terms,
    executor: Executor,
    activity: Activity,
    limits: Limits,
    *,
    shared: SharedLoop | None = None,
) -> None:
    """Serve requests until the client is done.

    Returns after DISC and at an end of the stream between two requests; raises ConnectionEnded where it ends
    inside a request, RemoteProtocolError where the client breaks the framing, OSError where the stream fails.
    `executor.have` bytes are already in `executor.buffer` when this is called. `shared` is the loop that serves
    connections together where many are busy.
    """
    with contextlib.suppress(EndOfRequests):
        _transmit(link, terms, executor, activity, limits, shared)


def _transmit(  # noqa: PLR0912, PLR0917 -- one loop, kept in one piece
    link: Link,
    terms: Terms,
    executor: Executor,
    activity: Activity,
    limits: Limits,
    shared: SharedLoop | None,
) -> None:
    receive, gather, send_some, finish = link.receive, link.gather, link.send_some, link.finish
    sent = terms.session.sent
    view, capacity = executor.view, len(executor.buffer)
    head = EXTENDED_REQUEST.size if terms.extended else REQUEST.size
    apply = _applier(link, terms, executor, limits)
    shift = None if shared is None or link.direct is None else Shift(shared, link, executor, head)
    pos, have, need, total = 0, executor.have, head, 0
    # Bytes that the last batch received and sent; batches for which the connection stays with its own thread.
    moved = by_itself = 0
    while True:
        if by_itself:
            by_itself -= 1
        elif shift is not None and have == pos and moved <= TURN_BYTES_MAX and shift.wanted():
            pos, have, need = _stay(shift, apply, link, executor)
            by_itself = _BY_ITSELF_BATCHES << shift.slow_stays
            continue
        while need > have - pos:
            if pos:
                rest = have - pos
                if not rest:
                    pos = have = 0
                elif rest <= _SMALL_MOVE_BYTES or pos + need > capacity:
                    view[:rest] = view[pos:have]
                    pos, have = 0, rest
            # A large write is received to its end and no further, so that what follows need not be moved.
            if need > SELF_DONE_BYTES_MAX:
                count = receive(view[have : pos + need])
            elif need == head and total <= _SHORT_REPLIES_BYTES_MAX:
                count = gather(view[have:])
            else:
                count = receive(view[have:])
            if not count:
                raise ConnectionEnded if have > pos else EndOfRequests
            have += count
        if activity.stopping:
            apply = _nothing
        parts: list[Buffer] = []
        first = pos
        pos, total, need, failure = apply(parts, pos, have)
        moved = total + pos - first
        if parts:
            try:
                count = send_some(parts) if len(parts) <= IOV_MAX else 0
                if count != total:
                    finish(parts, count, sent)
            except (SendFault, OSError) as problem:
                _repair(problem, link, Batch(parts, 0, view[first:pos]), executor)
        sent()
        if not need or need > capacity:
            pos, have = executor.handle(pos, have, failure)
            need = head


def _applier(link: Link, terms: Terms, executor: Executor, limits: Limits) -> Apply:
    kind = _extended if terms.extended else _structured if terms.structured else _simple
    return kind(terms, executor, min(link.fast_read_max, terms.read_bytes_max), limits.batch_bytes)


def _stay(shift: Shift, apply: Apply, link: Link, executor: Executor) -> tuple[int, int, int]:
    """Be served by the shared loop, then do what it left: the rest of a batch, what went wrong, a slow request.

    Returns the bounds of what is in the buffer and the bytes needed next.
    """
    shift.stay(apply)
    if shift.ended:
        raise ConnectionEnded if shift.have > shift.pos else EndOfRequests
    sent = executor.terms.session.sent
    try:
        if shift.problem is not None:
            raise shift.problem
        if shift.parts:
            link.finish(shift.parts, shift.count, sent)
    except (SendFault, OSError) as problem:
        _repair(problem, link, Batch(shift.parts, 0, executor.view[shift.first : shift.pos]), executor)
    sent()
    if shift.need and shift.need <= len(executor.buffer):
        return shift.pos, shift.have, shift.need
    return *executor.handle(shift.pos, shift.have, shift.failure), shift.head


def _repair(problem: SendFault | OSError, link: Link, batch: Batch, executor: Executor) -> None:
    """Go on after a send that failed: it stalled, or the data could not be read. Other failures are raised."""
    if isinstance(problem, BlockingIOError):  # the client has taken nothing for some seconds
        try:
            link.finish(batch.parts, 0, executor.terms.session.sent)
        except SendFault as fault:
            recover(Batch(batch.parts, fault.sent, batch.requests), executor)
    elif isinstance(problem, SendFault):
        recover(Batch(batch.parts, problem.sent, batch.requests), executor)
    elif problem.errno == errno.EFAULT:
        recover(batch, executor)
    else:
        raise problem


def _nothing(parts: list[Buffer], pos: int, have: int) -> tuple[int, int, int, OSError | None]:
    """While the server is stopping every request takes the slow path, which refuses it."""
    del parts, have
    return pos, 0, 0, None


# The three functions below are one loop, written out for each form of reply. They differ in layouts only; a
# common function with a branch or a call in it costs a tenth of the throughput.


def _simple(terms: Terms, executor: Executor, read_max: int, batch_bytes: int) -> Apply:
    session, view, buffer, size = terms.session, executor.view, executor.buffer, terms.size_bytes
    enter, leave, read, write = session.enter, session.leave, executor.read, session.write
    unpack, pack, ok = HOT_REQUEST.unpack_from, HOT_SIMPLE_OK.pack, HOT_SIMPLE_OK_KIND
    write_kind = _NEVER if terms.read_only else _WRITE

    def apply(parts: list[Buffer], pos: int, have: int) -> tuple[int, int, int, OSError | None]:
        total = mark = 0
        add = parts.append
        enter()
        try:
            while have - pos >= 28:
                kind, cookie, offset, length = unpack(buffer, pos)
                if kind == _READ and 0 < length <= read_max and offset + length <= size:
                    mark = len(parts)
                    add(pack(ok, cookie))
                    read(offset, length, parts)
                    total += length + 16
                    pos += 28
                elif kind == write_kind and length > 0 and offset + length <= size:
                    end = pos + 28 + length
                    if end > have:
                        return pos, total, end - pos, None
                    mark = len(parts)
                    write(offset, view[pos + 28 : end])
                    add(pack(ok, cookie))
                    total += 16
                    pos = end
                else:
                    return pos, total, 0, None
                if total >= batch_bytes:
                    break
        except OSError as error:
            del parts[mark:]
            return pos, sum(map(len, parts)), 0, error
        finally:
            leave()
        return pos, total, 28, None

    return apply


def _structured(terms: Terms, executor: Executor, read_max: int, batch_bytes: int) -> Apply:
    session, view, buffer, size = terms.session, executor.view, executor.buffer, terms.size_bytes
    enter, leave, read, write = session.enter, session.leave, executor.read, session.write
    unpack, ok_pack, ok = HOT_REQUEST.unpack_from, HOT_SIMPLE_OK.pack, HOT_SIMPLE_OK_KIND
    pack, hole_pack, none_pack = HOT_STRUCTURED_DATA.pack, HOT_STRUCTURED_HOLE.pack, HOT_STRUCTURED_NONE.pack
    write_kind = _NEVER if terms.read_only else _WRITE

    def apply(parts: list[Buffer], pos: int, have: int) -> tuple[int, int, int, OSError | None]:
        total = mark = 0
        add = parts.append
        enter()
        try:
            while have - pos >= 28:
                kind, cookie, offset, length = unpack(buffer, pos)
                if kind == _READ and 0 < length <= read_max and offset + length <= size:
                    mark = len(parts)
                    if length <= SELF_DONE_BYTES_MAX:
                        add(pack(_STRUCTURED_DONE, cookie, length + 8, offset))
                        holes = read(offset, length, parts)
                        bytes_ = length + 28
                    else:
                        add(pack(_STRUCTURED_MORE, cookie, length + 8, offset))
                        holes = read(offset, length, parts)
                        add(none_pack(_STRUCTURED_NONE, cookie, 0))
                        bytes_ = length + 48
                    if holes:
                        if holes == length:
                            parts[mark:] = [hole_pack(_STRUCTURED_HOLE, cookie, 12, offset, length)]
                            bytes_ = 32
                        elif holes >= _MIXED_HOLE_BYTES_MIN:
                            del parts[mark:]
                            return pos, total, 0, None
                    total += bytes_
                    pos += 28
                elif kind == write_kind and length > 0 and offset + length <= size:
                    end = pos + 28 + length
                    if end > have:
                        return pos, total, end - pos, None
                    mark = len(parts)
                    write(offset, view[pos + 28 : end])
                    add(ok_pack(ok, cookie))
                    total += 16
                    pos = end
                else:
                    return pos, total, 0, None
                if total >= batch_bytes:
                    break
        except OSError as error:
            del parts[mark:]
            return pos, sum(map(len, parts)), 0, error
        finally:
            leave()
        return pos, total, 28, None

    return apply


def _extended(terms: Terms, executor: Executor, read_max: int, batch_bytes: int) -> Apply:
    session, view, buffer, size = terms.session, executor.view, executor.buffer, terms.size_bytes
    enter, leave, read, write = session.enter, session.leave, executor.read, session.write
    unpack = HOT_EXTENDED_REQUEST.unpack_from
    pack, hole_pack, none_pack = HOT_EXTENDED_DATA.pack, HOT_EXTENDED_HOLE.pack, HOT_EXTENDED_NONE.pack
    write_kind = _NEVER if terms.read_only else _EXTENDED_WRITE

    def apply(parts: list[Buffer], pos: int, have: int) -> tuple[int, int, int, OSError | None]:
        total = mark = 0
        add = parts.append
        enter()
        try:
            while have - pos >= 32:
                kind, cookie, offset, length = unpack(buffer, pos)
                if kind == _EXTENDED_READ and 0 < length <= read_max and offset + length <= size:
                    mark = len(parts)
                    if length <= SELF_DONE_BYTES_MAX:
                        add(pack(_EXTENDED_DONE, cookie, offset, length + 8, offset))
                        holes = read(offset, length, parts)
                        bytes_ = length + 40
                    else:
                        add(pack(_EXTENDED_MORE, cookie, offset, length + 8, offset))
                        holes = read(offset, length, parts)
                        add(none_pack(_EXTENDED_NONE, cookie, offset, 0))
                        bytes_ = length + 72
                    if holes:
                        if holes == length:
                            parts[mark:] = [hole_pack(_EXTENDED_HOLE, cookie, offset, 12, offset, length)]
                            bytes_ = 44
                        elif holes >= _MIXED_HOLE_BYTES_MIN:
                            del parts[mark:]
                            return pos, total, 0, None
                    total += bytes_
                    pos += 32
                elif kind == write_kind and length > 0 and offset + length <= size:
                    end = pos + 32 + length
                    if end > have:
                        return pos, total, end - pos, None
                    mark = len(parts)
                    write(offset, view[pos + 32 : end])
                    add(none_pack(_EXTENDED_NONE, cookie, offset, 0))
                    total += 32
                    pos = end
                else:
                    return pos, total, 0, None
                if total >= batch_bytes:
                    break
        except OSError as error:
            del parts[mark:]
            return pos, sum(map(len, parts)), 0, error
        finally:
            leave()
        return pos, total, 32, None

    return apply

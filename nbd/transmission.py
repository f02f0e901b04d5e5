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

import errno

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
    REQUEST,
    hot_kind,
)

_SIMPLE, _STRUCTURED, _EXTENDED = 0, 1, 2

# Data chunks up to this size carry DONE themselves. Longer ones leave it to a NONE chunk behind them, so that
# a fault while they are being sent can still be told to the client.
SELF_DONE_BYTES_MAX = 65536

# Holes inside a read that are worth chunks of their own.
_MIXED_HOLE_BYTES_MIN = 65536

_NEVER = -1  # a kind no request has: while the server is stopping every request takes the slow path

_SD = ChunkType.OFFSET_DATA
_SH = ChunkType.OFFSET_HOLE
_STRUCTURED_DONE = hot_kind(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _SD)
_STRUCTURED_MORE = hot_kind(STRUCTURED_REPLY_MAGIC, 0, _SD)
_STRUCTURED_HOLE = hot_kind(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _SH)
_STRUCTURED_NONE = hot_kind(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.NONE)
_EXTENDED_DONE = hot_kind(EXTENDED_REPLY_MAGIC, CHUNK_DONE, _SD)
_EXTENDED_MORE = hot_kind(EXTENDED_REPLY_MAGIC, 0, _SD)
_EXTENDED_HOLE = hot_kind(EXTENDED_REPLY_MAGIC, CHUNK_DONE, _SH)
_EXTENDED_NONE = hot_kind(EXTENDED_REPLY_MAGIC, CHUNK_DONE, ChunkType.NONE)


def transmit(  # noqa: PLR0912, PLR0915
    link: Link, terms: Terms, executor: Executor, activity: Activity, limits: Limits
) -> None:
    """Serve requests until the client is done.

    Returns after DISC and at an end of the stream between two requests; raises ConnectionEnded where it ends
    inside a request, RemoteProtocolError where the client breaks the framing, OSError where the stream fails.
    `executor.have` bytes are already in `executor.buffer` when this is called.
    """
    session = terms.session
    enter, leave, sent, read, write = session.enter, session.leave, session.sent, executor.read, session.write
    receive, send_some, finish = link.receive, link.send_some, link.finish
    buffer, view = executor.buffer, executor.view
    capacity = len(buffer)
    size, batch_bytes, read_max = (
        terms.size_bytes,
        limits.batch_bytes,
        min(link.fast_read_max, terms.read_bytes_max),
    )
    simple_pack, simple_kind = HOT_SIMPLE_OK.pack, HOT_SIMPLE_OK_KIND
    structured_pack, structured_hole_pack = HOT_STRUCTURED_DATA.pack, HOT_STRUCTURED_HOLE.pack
    extended_pack, extended_hole_pack, extended_none_pack = (
        HOT_EXTENDED_DATA.pack,
        HOT_EXTENDED_HOLE.pack,
        HOT_EXTENDED_NONE.pack,
    )
    self_done_max, mixed_min = SELF_DONE_BYTES_MAX, _MIXED_HOLE_BYTES_MIN
    if terms.extended:
        mode, magic, head, unpack = (
            _EXTENDED,
            EXTENDED_REQUEST_MAGIC,
            EXTENDED_REQUEST.size,
            HOT_EXTENDED_REQUEST.unpack_from,
        )
    else:
        mode = _STRUCTURED if terms.structured else _SIMPLE
        magic, head, unpack = REQUEST_MAGIC, REQUEST.size, HOT_REQUEST.unpack_from
    read_kind = hot_kind(magic, 0, Command.READ)
    write_flags = CommandFlag.PAYLOAD_LEN if mode == _EXTENDED else 0
    write_kind = _NEVER if terms.read_only else hot_kind(magic, write_flags, Command.WRITE)
    pos, have, need = 0, executor.have, head

    while True:
        # --- take in what is there
        # -----------------------------------------------------------------------------
        while need > have - pos:
            if pos:
                rest = have - pos
                if not rest:
                    pos = have = 0
                elif rest <= 8192 or pos + need > capacity:
                    view[:rest] = view[pos:have]
                    pos, have = 0, rest
            # A large write is received to its end and no further, so that what follows need not be moved.
            count = receive(view[have : pos + need] if need > self_done_max else view[have:])
            if not count:
                if have > pos:
                    raise ConnectionEnded
                return
            have += count
            if activity.stopping:
                read_kind = write_kind = _NEVER
        need = head

        # --- apply one batch
        # -----------------------------------------------------------------------------------
        first, total, mark = pos, 0, 0
        odd = False
        failure: OSError | None = None
        parts: list[Buffer] = []
        add = parts.append
        enter()
        try:
            while have - pos >= head:
                kind, cookie, offset, length = unpack(buffer, pos)
                if kind == read_kind and 0 < length <= read_max and offset + length <= size:
                    mark = len(parts)
                    if mode == _SIMPLE:
                        add(simple_pack(simple_kind, cookie))
                        read(offset, length, parts)
                        total += length + 16
                    elif mode == _STRUCTURED:
                        if length <= self_done_max:
                            add(structured_pack(_STRUCTURED_DONE, cookie, length + 8, offset))
                            holes = read(offset, length, parts)
                            total += length + 28
                        else:
                            add(structured_pack(_STRUCTURED_MORE, cookie, length + 8, offset))
                            holes = read(offset, length, parts)
                            add(simple_pack(_STRUCTURED_NONE, cookie) + b"\0\0\0\0")
                            total += length + 48
                        if holes:
                            if holes == length:
                                del parts[mark:]
                                add(structured_hole_pack(_STRUCTURED_HOLE, cookie, 12, offset, length))
                                total += 32 - (length + (28 if length <= self_done_max else 48))
                            elif holes >= mixed_min:
                                del parts[mark:]
                                total -= length + (28 if length <= self_done_max else 48)
                                odd = True
                                break
                    else:
                        if length <= self_done_max:
                            add(extended_pack(_EXTENDED_DONE, cookie, offset, length + 8, offset))
                            holes = read(offset, length, parts)
                            total += length + 40
                        else:
                            add(extended_pack(_EXTENDED_MORE, cookie, offset, length + 8, offset))
                            holes = read(offset, length, parts)
                            add(extended_none_pack(_EXTENDED_NONE, cookie, offset, 0))
                            total += length + 72
                        if holes:
                            if holes == length:
                                del parts[mark:]
                                add(extended_hole_pack(_EXTENDED_HOLE, cookie, offset, 12, offset, length))
                                total += 44 - (length + (40 if length <= self_done_max else 72))
                            elif holes >= mixed_min:
                                del parts[mark:]
                                total -= length + (40 if length <= self_done_max else 72)
                                odd = True
                                break
                    pos += head
                elif kind == write_kind and length > 0 and offset + length <= size:
                    end = pos + head + length
                    if end > have:
                        need = head + length
                        odd = need > capacity
                        break
                    mark = len(parts)
                    write(offset, view[pos + head : end])
                    if mode == _EXTENDED:
                        add(extended_none_pack(_EXTENDED_NONE, cookie, offset, 0))
                        total += 32
                    else:
                        add(simple_pack(simple_kind, cookie))
                        total += 16
                    pos = end
                else:
                    odd = True
                    break
                if total >= batch_bytes:
                    break
        except OSError as error:
            del parts[mark:]
            total = sum(map(len, parts))
            failure, odd = error, True
        finally:
            leave()

        # --- answer it
        # -----------------------------------------------------------------------------------------
        if parts:
            try:
                try:
                    count = send_some(parts) if len(parts) <= IOV_MAX else 0
                except (BlockingIOError, InterruptedError):
                    count = 0
                if count != total:
                    finish(parts, count, sent)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                recover(Batch(parts, 0, view[first:pos]), executor)
            except SendFault as fault:
                recover(Batch(parts, fault.sent, view[first:pos]), executor)
        sent()
        if odd:
            try:
                pos, have = executor.handle(pos, have, failure)
            except EndOfRequests:
                return
            need = head

"""BLOCK_STATUS: from a device's extents to one chunk per selected context.

In: the filter payload, gathering, merging and clipping of extents. Out: the meaning of status values
(`meta_contexts`), the layout of chunks (`replies`).
"""

from .constants import ALLOCATION_DEPTH, BASE_ALLOCATION, CommandFlag, Errno
from .device import Buffer, Extents
from .errors import RequestError
from .meta_contexts import allocation_status, dirty_bitmap_name, is_dirty_bitmap
from .replies import Replies
from .terms import SelectedContext, Terms
from .wire import U32, U64

_DESCRIPTORS_MAX = 1 << 15  # of a chunk; the client asks again for the rest
_EXTENT_32_MAX = (1 << 32) - 65536  # largest aligned length a compact descriptor is given
FILTER_BYTES_MAX = 64 * 1024  # longer filters cannot be right and are discarded unread


def decode_filter(terms: Terms, payload: bytes | memoryview) -> tuple[int, tuple[SelectedContext, ...]]:
    """Return (effect length, contexts) of a filter payload; RequestError(EINVAL) where it is malformed."""
    if len(payload) < U64.size or (len(payload) - U64.size) % U32.size:
        raise RequestError(Errno.EINVAL, f"a status filter of {len(payload)} bytes")
    (length,) = U64.unpack_from(payload)
    ids = [number for (number,) in U32.iter_unpack(payload[U64.size :])]
    by_id = {context.context_id: context for context in terms.contexts}
    if len(set(ids)) != len(ids) or not by_id.keys() >= set(ids):
        raise RequestError(Errno.EINVAL, "the status filter names an unknown context or one twice")
    return length, tuple(by_id[number] for number in ids)


def merged(extents: Extents, *, length_max: int) -> Extents:
    """Join equal neighbours; stop at an extent that would be longer than `length_max`."""
    out: Extents = []
    for length, status in extents:
        if out and out[-1][1] == status:
            out[-1] = (out[-1][0] + length, status)
        elif len(out) == _DESCRIPTORS_MAX:
            break
        else:
            out.append((length, status))
    for index, (length, status) in enumerate(out):
        if length > length_max:
            return [*out[:index], (length_max, status)]
    return out


class BlockStatus:
    """Answers BLOCK_STATUS for one connection."""

    def __init__(self, terms: Terms, replies: Replies) -> None:
        self._session = terms.session
        self._replies = replies
        self._length_max = 1 << 63 if terms.extended else _EXTENT_32_MAX

    def reply(
        self, cookie: int, flags: int, offset: int, length: int, contexts: tuple[SelectedContext, ...]
    ) -> list[Buffer]:
        """Return the whole reply. OSError where the device cannot tell."""
        if not contexts:
            return self._replies.success(cookie, offset, read=True)  # a filter that names no context
        answers = self._answers(offset, length, contexts)
        parts: list[Buffer] = []
        for index, (context, extents) in enumerate(zip(contexts, answers, strict=True)):
            chosen = extents[:1] if flags & CommandFlag.REQ_ONE else extents
            done = index == len(contexts) - 1
            parts += self._replies.status(cookie, offset, context.context_id, chosen, done=done)
        return parts

    def _answers(self, offset: int, length: int, contexts: tuple[SelectedContext, ...]) -> list[Extents]:
        """Collect all answers before the first chunk is built, so that a failure is an error and nothing else."""
        extents: Extents | None = None
        answers = []
        for context in contexts:
            if is_dirty_bitmap(context.name):
                found = self._session.dirty(dirty_bitmap_name(context.name), offset, length)
            else:
                assert context.name in (BASE_ALLOCATION, ALLOCATION_DEPTH)
                if extents is None:
                    extents = self._session.extents(offset, length)
                found = allocation_status(context.name, extents)
            answers.append(merged(_clipped(found, length), length_max=self._length_max))
        return answers


def _clipped(extents: Extents, length: int) -> Extents:
    """Drop what lies beyond the request and anything empty: the peer takes both for a broken server."""
    out: Extents = []
    left = length
    for extent, status in extents:
        if extent > 0 and left > 0:
            out.append((min(extent, left), status))
            left -= extent
    if not out:
        raise RequestError(Errno.EIO, "the device returned no extents")
    return out

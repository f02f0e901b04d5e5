"""Receiving without doing it: a stream is read to its end and proven, and the pool is asked whether it would fit.

In: the same refusals as for a real stream, before anything is read and after all of it. Out: the refusals themselves
(`transfers.py`), reading (`stream_reader.py`). Nothing is written, no device is made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .errors import NoSpace
from .receiving import (
    Progress,
    ReceiveOptions,
    Unpacker,
    refusing_with_common_base,
    resumable_part,
    wanted_device,
)
from .stream_format import RecordKind
from .stream_reader import ReadInto, StreamReader

if TYPE_CHECKING:
    from .pool import Pool


@dataclass(frozen=True, slots=True)
class Examined:
    """A whole, sound stream, and what would become of it here.

    `base` is the name here of the device that the increment would begin with, None for a full stream. `replaces` says
    that the device of that name would be brought forward, `start_bytes` where a resumed stream goes on. `free_bytes` is
    what the pool has for new data now.
    """

    name: str
    content_id: str
    size_bytes: int
    base: str | None
    replaces: bool
    start_bytes: int
    data_bytes: int
    hole_bytes: int
    free_bytes: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object, sizes as integers."""
        return {"dry_run": True, **asdict(self)}


def examine(
    pool: Pool, read_into: ReadInto, options: ReceiveOptions, progress: Progress | None = None
) -> Examined:
    """Read a stream and say what `receive` would do with it. Raises as `receive`.

    NoSpace where the blocks that its data touches are more than are free and the pool may not grow by itself.
    """
    reader = StreamReader(read_into)
    begin = reader.begin()
    name = options.name or begin.name
    # The stream is not read on while others wait: who sends it may be slow.
    with refusing_with_common_base(pool, reader), pool.engine.transaction:
        resumed = resumable_part(pool, name, begin)
        base, replaced = (
            (None, None) if resumed else pool.transfers.fitting(wanted_device(name, begin, options))
        )
    unpacker = Unpacker()
    data_bytes = hole_bytes = blocks = next_block = 0
    for record in reader.records():
        header = record.header
        if header.kind == RecordKind.DATA:
            unpacker.unpacked(record)
            data_bytes += header.length_bytes
            # In blocks of this pool, which may be larger than those it was sent from.
            end = -(-(header.offset_bytes + header.length_bytes) // pool.block_bytes)
            blocks += end - max(header.offset_bytes // pool.block_bytes, next_block)
            next_block = end
        else:
            hole_bytes += header.length_bytes
        if progress is not None:
            progress(data_bytes, begin.data_bytes)
    status = pool.status()
    needed_bytes = blocks * pool.block_bytes
    if needed_bytes > status.data_free_bytes and status.autogrow_limit_bytes <= status.data_bytes:
        raise NoSpace(what=f"device {name}", needed_bytes=needed_bytes, free_bytes=status.data_free_bytes)
    return Examined(
        name=name,
        content_id=begin.content_id,
        size_bytes=begin.size_bytes,
        base=None if base is None else base.name,
        replaces=replaced is not None,
        start_bytes=begin.start_bytes,
        data_bytes=data_bytes,
        hole_bytes=hole_bytes,
        free_bytes=status.data_free_bytes,
        digest=reader.digest,
    )

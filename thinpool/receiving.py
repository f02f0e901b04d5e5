"""Taking in a stream: checked record by record, written to a hidden device, which gets its name when all is there.

In: what is checked before anything is written, writing, when progress is noted, what becomes of a device when the
stream breaks. Out: reading the stream (`stream_reader.py`), the hidden device (`transfers.py`).

What can go wrong with a stream leaves one of two states. Without `resumable` the hidden device is dropped, and the
pool is as it was. With it, what arrived whole is made durable and noted, and a token says where to go on. Only one
fault drops it there as well: when every record was right by its checksum and the SHA-256 of the whole is not, nothing
tells which of them to believe.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import zstandard

from .common_bases import nearest
from .errors import BaseMissing, NoSpace, NotReceiving, ResumeMismatch, StreamDamaged
from .receiving_state import Wanted
from .stream_format import Begin, RecordFlag, RecordKind
from .stream_reader import ReadInto, Record, StreamReader, read_ahead

if TYPE_CHECKING:
    from .catalog_rows import CatalogEntry
    from .pool import Pool
    from .receiving_state import ReceivingState
    from .session import Session

NOTE_SECONDS = 5.0

log = logging.getLogger("thinpool")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ReceiveOptions:
    """`name` None takes the device's name in the stream. With `dry_run`, `receive_plan.examine` does what is asked."""

    name: str | None = None
    resumable: bool = False
    read_only: bool = True
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Received:
    """What arrived."""

    device: dict[str, Any]
    data_bytes: int
    hole_bytes: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object, sizes as integers."""
        return asdict(self)


def receive(
    pool: Pool, read_into: ReadInto, options: ReceiveOptions, progress: Progress | None = None
) -> Received:
    """Take in one stream. Raises the errors of streams, targets and space; the pool is as the module says then."""
    reader = StreamReader(read_into)
    begin = reader.begin()
    name = options.name or begin.name
    with refusing_with_common_base(pool, reader):
        entry = _hidden_device(pool, name, begin, options)
    return _Receiving(pool, name, entry, begin, progress).run(reader)


@contextmanager
def refusing_with_common_base(pool: Pool, reader: StreamReader) -> Iterator[None]:
    """Where the base of an increment is missing, look in the stream for the nearest one that both sides have."""
    try:
        yield
    except BaseMissing as error:
        held = {entry.content_id: entry.name for entry in pool.catalog.entries() if entry.receiving is None}
        common = nearest(reader.bases(), held)
        if common is None:
            raise
        raise BaseMissing(
            error.base, error.content_id, error.found, common.name, held[common.content_id]
        ) from error


def resumable_part(pool: Pool, name: str, begin: Begin) -> tuple[CatalogEntry, ReceivingState] | None:
    """The half-received device that a stream goes on with. Raises ResumeMismatch, NotReceiving."""
    found = pool.transfers.partial(name)
    if found is None:
        if begin.start_bytes:
            raise NotReceiving(name)
        return None
    state = found[1]
    same = (
        state.content_id == begin.content_id
        and state.base_content_id == begin.base_content_id
        and state.size_bytes == begin.size_bytes
        and state.position_bytes == begin.start_bytes
    )
    if same and state.resumable:
        return found
    if begin.start_bytes:
        raise ResumeMismatch(name, state.token)
    return None


def wanted_device(name: str, begin: Begin, options: ReceiveOptions) -> Wanted:
    """What a stream is to become."""
    return Wanted(
        name=name,
        content_id=begin.content_id,
        size_bytes=begin.size_bytes,
        base_content_id=begin.base_content_id,
        base_name=begin.base_name,
        read_only=options.read_only,
        resumable=options.resumable,
    )


def _hidden_device(pool: Pool, name: str, begin: Begin, options: ReceiveOptions) -> CatalogEntry:
    with pool.engine.transaction:
        found = resumable_part(pool, name, begin)
        if found is not None:
            return pool.transfers.resumed(*found)
        return pool.transfers.claim(pool.transfers.begin(wanted_device(name, begin, options)))


class Unpacker:
    """Data records as they were before they were packed. Not thread-safe."""

    def __init__(self) -> None:
        self._unpacker = zstandard.ZstdDecompressor()

    def unpacked(self, record: Record) -> memoryview:
        """The bytes of the device. Raises StreamDamaged."""
        if not record.header.flags & RecordFlag.ZSTD:
            return memoryview(record.payload)
        length, at = record.header.length_bytes, record.header.offset_bytes
        try:
            raw = self._unpacker.decompress(record.payload, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise StreamDamaged(reason=f"a record cannot be unpacked: {error}", position_bytes=at) from error
        if len(raw) != length:
            raise StreamDamaged(reason="a record unpacks to another length than it says", position_bytes=at)
        return memoryview(raw)


class _Receiving:
    """One stream on its way into one hidden device."""

    def __init__(
        self, pool: Pool, name: str, entry: CatalogEntry, begin: Begin, progress: Progress | None
    ) -> None:
        self._pool = pool
        self._name = name
        self._entry = entry
        self._begin = begin
        self._progress = progress
        self._position = begin.start_bytes
        self._data_bytes = 0
        self._hole_bytes = 0
        self._noted = time.monotonic()
        self._unpacker = Unpacker()
        state = pool.transfers.partial(name)
        self._resumable = state is not None and state[1].resumable

    def run(self, reader: StreamReader) -> Received:
        try:
            with (
                self._pool.transfers.writing(self._entry) as session,
                read_ahead(reader.records()) as records,
            ):
                self._take(session, records)
            device = self._pool.transfers.finish(self._entry)
        except BaseException:
            self._leave(drop=not self._resumable or reader.doubtful)
            raise
        self._pool.transfers.unclaim(self._entry)
        return Received(device.to_json(), self._data_bytes, self._hole_bytes, reader.digest)

    def _take(self, session: Session, records: Iterator[Record]) -> None:
        for record in records:
            header = record.header
            if header.kind == RecordKind.DATA:
                self._write(session, header.offset_bytes, self._unpacker.unpacked(record))
                self._data_bytes += header.length_bytes
            else:
                session.zero(header.offset_bytes, header.length_bytes, keep_allocated=False, fast_only=False)
                self._hole_bytes += header.length_bytes
            self._position = header.offset_bytes + header.length_bytes
            if self._resumable and time.monotonic() - self._noted > NOTE_SECONDS:
                self._note()
            if self._progress is not None:
                self._progress(self._data_bytes, self._begin.data_bytes)

    def _write(self, session: Session, offset: int, data: memoryview) -> None:
        """Write, and where there is no space see once whether some can be found, as the NBD server does."""
        try:
            _apply(session, offset, data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            if not session.wait_for_space(error):
                free = self._pool.status().data_free_bytes
                raise NoSpace(what=f"device {self._name}", needed_bytes=len(data), free_bytes=free) from error
            _apply(session, offset, data)

    def _note(self) -> None:
        self._entry = self._pool.transfers.note(self._entry, self._position)
        self._noted = time.monotonic()

    def _leave(self, *, drop: bool) -> None:
        """Keep what arrived, or drop it. The error that ended it all is the one to be told."""
        transfers = self._pool.transfers
        try:
            if not drop:
                self._note()
            transfers.unclaim(self._entry)
            if drop:
                transfers.abort(self._name)
        except Exception as second:  # a pool that gave up, a full disk: what is there stays half received
            transfers.unclaim(self._entry)
            log.warning("what was received of %r stays as it is: %s", self._name, second)


def _apply(session: Session, offset: int, data: memoryview) -> None:
    session.enter()
    try:
        session.write(offset, data)
    finally:
        session.leave()
        session.sent()

"""Reading a stream in order, and refusing everything that is not exactly what was written.

In: exact reads, every check of a record against the ones before it, reading ahead in a thread. Out: the bytes of a
record (`stream_format.py`), what becomes of a record (`receiving.py`).
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .common_bases import KnownBase, decode_bases
from .errors import StreamDamaged, StreamUnsupported
from .stream_format import (
    HEADER_BYTES,
    OPTIONAL,
    PAYLOAD_BYTES_MAX,
    PREAMBLE_BYTES,
    RECORD_BYTES_MAX,
    Begin,
    End,
    RecordFlag,
    RecordHeader,
    RecordKind,
    check_preamble,
    checked_record,
)

# Fills a part of the buffer, and says how much; 0 is the end.
ReadInto = Callable[[memoryview], int]
AHEAD_RECORDS = 8
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Record:
    """One record, checked."""

    header: RecordHeader
    payload: bytes | bytearray


class StreamReader:
    """The records of one stream. `begin` first, then `records` to their end. Raises StreamDamaged, StreamUnsupported.

    `digest` is the SHA-256 of the stream, once `records` has ended. `doubtful`: every record was right by itself, and
    the whole is not, so nothing says which of them to believe.
    """

    def __init__(self, read_into: ReadInto) -> None:
        self._read_into = read_into
        self._hash = hashlib.sha256()
        self._position = 0
        self._number = 0
        self._covered_bytes = 0
        self._data_bytes = 0
        self._size_bytes = 0
        self.digest = ""
        self.doubtful = False

    def begin(self) -> Begin:
        """Read preamble and first record."""
        check_preamble(self._exactly(PREAMBLE_BYTES, "it is empty"))
        record = self._record()
        if record.header.kind != RecordKind.BEGIN:
            raise self._damaged(reason="its first record is of another kind")
        try:
            begin = Begin.decode(record.payload)
        except (ValueError, UnicodeDecodeError):
            raise self._damaged(reason="its first record makes no sense") from None
        self._size_bytes, self._covered_bytes = begin.size_bytes, begin.start_bytes
        return begin

    def bases(self) -> list[KnownBase]:
        """The snapshots that the sender could have begun with; none where it does not tell. Instead of `records`."""
        try:
            record = self._record()
            return decode_bases(record.payload) if record.header.kind == RecordKind.BASES else []
        except (StreamDamaged, ValueError):
            return []  # the stream is refused for another reason already; this was to be a hint

    def records(self) -> Iterator[Record]:
        """Yield the records between the first and the last one, and check the last one."""
        while True:
            before = self._hash.digest()
            record = self._record()
            header = record.header
            if header.kind == RecordKind.END:
                self._end(record, before)
                return
            if header.kind == RecordKind.BEGIN:
                raise self._damaged(reason="a second first record")
            if header.kind < OPTIONAL:
                self._check_range(header)
                yield record

    def _end(self, record: Record, digest: bytes) -> None:
        try:
            end = End.decode(record.payload)
        except ValueError:
            raise self._damaged(reason="its last record makes no sense") from None
        if end.digest != digest:
            self.doubtful = True
            raise self._damaged(reason="its contents are not those that were sent (SHA-256)")
        if end.records != self._number - 1 or end.data_bytes != self._data_bytes:
            raise self._damaged(reason="it does not hold as much as its last record says")
        if self._read_into(memoryview(bytearray(1))):
            raise self._damaged(reason="something follows its end")
        self.digest = digest.hex()

    def _check_range(self, header: RecordHeader) -> None:
        if header.kind not in (RecordKind.DATA, RecordKind.HOLE):
            raise StreamUnsupported(reason=f"it holds a record of kind {header.kind}")
        if header.flags & ~RecordFlag.ZSTD:
            raise StreamUnsupported(reason=f"a record has flags {header.flags:#x}")
        end = header.offset_bytes + header.length_bytes
        if header.offset_bytes < self._covered_bytes or not header.length_bytes or end > self._size_bytes:
            raise self._damaged(
                reason="a record is about a range that is out of order or outside of the device"
            )
        if header.kind == RecordKind.DATA:
            whole = not header.flags and header.payload_bytes != header.length_bytes
            if header.length_bytes > RECORD_BYTES_MAX or whole:
                raise self._damaged(reason="a data record of impossible length")
            self._data_bytes += header.length_bytes
        elif header.payload_bytes or header.flags:
            raise self._damaged(reason="a hole with a payload")
        self._covered_bytes = end

    def _record(self) -> Record:
        raw = self._exactly(HEADER_BYTES, "it ends before its last record")
        header = RecordHeader.decode(raw)
        if header.payload_bytes > PAYLOAD_BYTES_MAX:
            raise self._damaged(reason="a record is longer than any")
        payload = self._exactly(header.payload_bytes, "it ends inside a record")
        if not checked_record(raw, payload, header):
            raise self._damaged(reason="the checksum of a record does not fit")
        if header.number != self._number:
            raise self._damaged(reason=f"record {header.number} comes where {self._number} belongs")
        self._number += 1
        return Record(header, payload)

    def _exactly(self, count: int, at_end: str) -> bytearray:
        buffer = bytearray(count)
        view = memoryview(buffer)
        done = 0
        while done < count:
            got = self._read_into(view[done:])
            if not got:
                self._position += done
                raise self._damaged(at_end)
            done += got
        self._position += count
        self._hash.update(buffer)
        return buffer

    def _damaged(self, reason: str) -> StreamDamaged:
        return StreamDamaged(reason, self._position)


@contextmanager
def read_ahead(records: Iterator[Record]) -> Iterator[Iterator[Record]]:
    """The same records, read by a thread of their own a few ahead. What it raises is raised in its place."""
    waiting: queue.Queue[Record | BaseException | None] = queue.Queue(AHEAD_RECORDS)
    stopping = threading.Event()

    def put(item: Record | BaseException | None) -> None:
        while not stopping.is_set():
            try:
                waiting.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for record in records:
                put(record)
                if stopping.is_set():
                    return
            put(None)
        except BaseException as error:  # handed over, and raised where the records are used
            put(error)

    def taken() -> Iterator[Record]:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    # A daemon: it may be waiting for a pipe that nobody writes to any more.
    threading.Thread(target=work, name="stream", daemon=True).start()
    try:
        yield taken()
    finally:
        stopping.set()

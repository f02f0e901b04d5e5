"""Writing a stream: what differs from the base, packed and numbered, one record after another.

In: the order of records, packing in several threads, the checksums, the rate limit. Out: where the device comes from
(`snapshot_source.py`), the bytes of a record (`stream_format.py`), the command (`cli/sending.py`).

Reading and packing of a record run in worker threads, because zstd, SHA-256 and the system calls let other threads
run; writing and hashing follow in order. A handful of records is in memory at any time.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import zstandard

from .common_bases import KnownBase, encode_bases
from .content_identity import new_identity
from .snapshot_source import Piece, SourceDevice
from .stream_format import (
    RECORD_BYTES_MAX,
    Begin,
    End,
    RecordFlag,
    RecordHeader,
    RecordKind,
    preamble,
)

LEVEL_DEFAULT = 1
WORKERS = max(min(os.cpu_count() or 1, 8), 1)
IN_FLIGHT = 2 * WORKERS + 2
HASHED_LATER_MAX = 8
# The longest burst of a limited stream: shorter ones make many small writes, longer ones stall what shares the line.
BURST_SECONDS = 0.1

Sink = Callable[[bytes | memoryview], None]
Progress = Callable[[int, int], None]


class StreamSource(Protocol):
    """What a stream is made from: a held device (`snapshot_source.py`), or an image (`image_source.py`)."""

    block_bytes: int
    device: SourceDevice
    base: SourceDevice | None
    bases: Sequence[KnownBase]

    def still_held(self) -> None:
        """Raise where what was read so far may be wrong."""

    def pieces(self, begin_bytes: int, piece_bytes_max: int) -> Iterator[Piece]:
        """Yield what is not as in the base, ascending."""

    def read(self, at_bytes: int, buffer: memoryview) -> None:
        """Fill the buffer with the data of a piece, by its place. In any thread."""

    def totals(self, begin_bytes: int = 0) -> tuple[int, int]:
        """Return about how many bytes of data and of holes there are."""


@dataclass(frozen=True, slots=True)
class SendOptions:
    """`level` is zstd's, 0 for none; `rate_bytes` a second, 0 for no limit; `start_bytes` as in a resumed stream."""

    level: int = LEVEL_DEFAULT
    rate_bytes: int = 0
    start_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """What went out."""

    content_id: str
    records: int
    data_bytes: int
    hole_bytes: int
    stream_bytes: int
    digest: str


class Sender:
    """One stream from one held source."""

    def __init__(
        self, source: StreamSource, sink: Sink, options: SendOptions, progress: Progress | None = None
    ) -> None:
        self._source = source
        self._options = options
        self._sink = _Limited(sink, options.rate_bytes) if options.rate_bytes else sink
        self._progress = progress
        self._hash = hashlib.sha256()
        self._stream_bytes = 0
        self._number = 0
        self._data_bytes = 0
        self._hole_bytes = 0
        self._hashed_later: deque[Future[None]] = deque()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._packers = threading.local()

    def run(self) -> Sent:
        """Write the whole stream. Raises what the source and the sink raise; nothing may follow then."""
        begin = describe(self._source, self._options.start_bytes)
        with self._hasher, ThreadPoolExecutor(WORKERS, thread_name_prefix="pack") as workers:
            self._write(preamble())
            payload = begin.encode()
            self._record(RecordHeader(RecordKind.BEGIN, 0, 0, 0, 0, len(payload)), payload)
            if self._source.base is not None and self._source.bases:
                # For a receiver that has not got this base: which one it might have.
                told = encode_bases(self._source.bases)
                self._record(RecordHeader(RecordKind.BASES, 0, self._number, 0, 0, len(told)), told)
            for header, packed in self._in_order(workers):
                self._record(header, packed)
                if self._progress is not None:
                    self._progress(self._data_bytes, self._stream_bytes)
            self._source.still_held()
            digest = self._digest()
            end = End(self._number, self._data_bytes, digest)
            self._record(RecordHeader(RecordKind.END, 0, self._number, 0, 0, End.LAYOUT.size), end.encode())
        return Sent(
            content_id=begin.content_id,
            records=self._number - 2,
            data_bytes=self._data_bytes,
            hole_bytes=self._hole_bytes,
            stream_bytes=self._stream_bytes,
            digest=digest.hex(),
        )

    def _in_order(self, workers: ThreadPoolExecutor) -> Iterator[tuple[RecordHeader, bytes | memoryview]]:
        waiting: deque[tuple[Piece, Future[tuple[int, bytes | memoryview]] | None]] = deque()
        pieces = self._source.pieces(self._options.start_bytes, RECORD_BYTES_MAX)
        for piece in pieces:
            job = None if piece.at_bytes is None else workers.submit(self._pack, piece)
            waiting.append((piece, job))
            if len(waiting) >= IN_FLIGHT:
                yield self._next(*waiting.popleft())
        while waiting:
            yield self._next(*waiting.popleft())

    def _next(
        self, piece: Piece, job: Future[tuple[int, bytes | memoryview]] | None
    ) -> tuple[RecordHeader, bytes | memoryview]:
        if job is None:
            self._hole_bytes += piece.length_bytes
            kind, flags, payload = RecordKind.HOLE, 0, memoryview(b"")
        else:
            flags, packed = job.result()
            kind, payload = RecordKind.DATA, memoryview(packed)
            self._data_bytes += piece.length_bytes
        # What was read is right only if the device was held afterwards: a resumed stream relies on every record.
        self._source.still_held()
        header = RecordHeader(kind, flags, self._number, piece.offset_bytes, piece.length_bytes, len(payload))
        return header, payload

    def _pack(self, piece: Piece) -> tuple[int, bytes | memoryview]:
        """Read a piece and pack it, where that makes it smaller. Runs in a worker."""
        assert piece.at_bytes is not None
        raw = memoryview(bytearray(piece.length_bytes))
        self._source.read(piece.at_bytes, raw)
        if self._options.level:
            packer = getattr(self._packers, "zstd", None)
            if packer is None:
                packer = self._packers.zstd = zstandard.ZstdCompressor(level=self._options.level)
            packed: bytes = packer.compress(raw)
            if len(packed) < len(raw):
                return RecordFlag.ZSTD, packed
        return 0, raw

    def _record(self, header: RecordHeader, payload: bytes | memoryview) -> None:
        self._write(header.encode(payload))
        if len(payload):
            self._write(payload)
        self._number += 1

    def _write(self, data: bytes | memoryview) -> None:
        self._hashed_later.append(self._hasher.submit(self._hash.update, data))
        if len(self._hashed_later) > HASHED_LATER_MAX:
            self._hashed_later.popleft().result()
        self._sink(data)
        self._stream_bytes += len(data)

    def _digest(self) -> bytes:
        """The hash of everything written so far."""
        while self._hashed_later:
            self._hashed_later.popleft().result()
        return self._hash.digest()


def describe(source: StreamSource, start_bytes: int = 0) -> Begin:
    """The first record of a stream from that source."""
    device, base = source.device, source.base
    return Begin(
        name=device.name,
        size_bytes=device.size_bytes,
        block_bytes=source.block_bytes,
        device_uuid=device.uuid,
        content_id=device.content_id or new_identity(),
        created_seconds=int(time.time()),
        read_only=device.read_only,
        base_name="" if base is None else base.name,
        base_uuid=None if base is None else base.uuid,
        base_content_id=None if base is None else base.content_id,
        base_size_bytes=0 if base is None else base.size_bytes,
        start_bytes=start_bytes,
        data_bytes=source.totals(start_bytes)[0],
    )


class _Limited:
    """A sink that lets so many bytes a second through, in short bursts."""

    def __init__(self, sink: Sink, rate_bytes: int) -> None:
        self._sink = sink
        self._rate = rate_bytes
        self._burst = max(int(rate_bytes * BURST_SECONDS), 1)
        self._due = time.monotonic()

    def __call__(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            now = time.monotonic()
            # Time that was not used is not saved up: a limit is one at every moment.
            self._due = max(self._due, now)
            if self._due > now:
                time.sleep(self._due - now)
            piece, rest = rest[: self._burst], rest[self._burst :]
            self._sink(piece)
            self._due += len(piece) / self._rate

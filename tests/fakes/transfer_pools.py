"""Pools between which snapshots travel, and streams taken apart into their records.

In: small pools in memory-backed files, writing and reading their devices, streams as bytes, records of a stream. Out:
what is expected of a transfer (the tests).
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from thinpool.opening import create_pool, open_pool
from thinpool.pool import Pool
from thinpool.pool_location import PoolLocation
from thinpool.receiving import Received, ReceiveOptions, receive
from thinpool.sending import Sender, SendOptions
from thinpool.source_access import SourceRequest, held_here
from thinpool.stream_format import HEADER_BYTES, PREAMBLE_BYTES, RecordHeader

BLOCK = 64 << 10
MIB = 1 << 20
WORK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextmanager
def new_pool(
    path: Path, *, size_bytes: int = 256 << 20, block_bytes: int = BLOCK, metadata_bytes: int = 4 << 20
) -> Iterator[Pool]:
    create_pool(path, size_bytes=size_bytes, block_bytes=block_bytes, metadata_bytes=metadata_bytes)
    pool = open_pool(PoolLocation.directory(path))
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def session_on(pool: Pool, name: str) -> Iterator:
    entry = pool.catalog.by_name(name)
    assert entry is not None, name
    session = pool.open_session(entry)
    try:
        yield session
    finally:
        session.close()


def write(pool: Pool, name: str, offset: int, data: bytes) -> None:
    with session_on(pool, name) as session:
        session.enter()
        session.write(offset, memoryview(data))
        session.leave()
        session.sent()


def zero(pool: Pool, name: str, offset: int, length: int, *, keep: bool = False) -> None:
    with session_on(pool, name) as session:
        session.zero(offset, length, keep_allocated=keep, fast_only=False)


def discard(pool: Pool, name: str, offset: int, length: int) -> None:
    with session_on(pool, name) as session:
        session.trim(offset, length)


def content(pool: Pool, name: str) -> bytes:
    entry = pool.catalog.by_name(name)
    assert entry is not None, name
    with session_on(pool, name) as session:
        return bytes(session.read_bytes(0, entry.size_bytes))


def allocation(pool: Pool, name: str) -> set[int]:
    """Mapped virtual blocks."""
    entry = pool.catalog.by_name(name)
    assert entry is not None, name
    pool.commit()
    return {key for keys, _ in pool.engine.metadata.mappings(entry.device_id) for key in keys.tolist()}


def stream_of(
    pool: Pool, name: str = "", base: str | None = None, *, token: str | None = None, level: int = 1
) -> bytes:
    """A whole stream, as `thinpool send` writes it."""
    written = bytearray()
    with held_here(pool, SourceRequest(name, base, token)) as (source, start_bytes):
        Sender(source, written.extend, SendOptions(level=level, start_bytes=start_bytes)).run()
    return bytes(written)


def take_in(pool: Pool, stream: bytes, name: str | None = None, *, resumable: bool = False) -> Received:
    return receive(pool, io.BytesIO(stream).readinto, ReceiveOptions(name, resumable=resumable))


def boundaries(stream: bytes) -> list[int]:
    """Where each record begins, and the end of the stream."""
    places = [PREAMBLE_BYTES]
    while places[-1] < len(stream):
        header = RecordHeader.decode(stream[places[-1] : places[-1] + HEADER_BYTES])
        places.append(places[-1] + HEADER_BYTES + header.payload_bytes)
    assert places[-1] == len(stream)
    return places


def picture(pool: Pool) -> dict[str, object]:
    """All there is to see of a pool: what a refused stream must leave as it was."""
    devices = {
        info.name: (info.to_json(), allocation(pool, info.name), content(pool, info.name))
        for info in pool.devices()
    }
    return {"devices": devices, "used": pool.status().data_used_bytes}


def two_days(pool: Pool) -> None:
    """`disk` with snapshots `mon` and `tue`: data that packs and data that does not, holes, and a longer end."""
    noise = random.Random(5)
    pool.create_device("disk", 4 * MIB + 100)
    write(pool, "disk", 0, noise.randbytes(MIB))
    write(pool, "disk", 3 * MIB, b"q" * MIB)
    pool.create_snapshot("disk", "mon", read_only=True)
    write(pool, "disk", 5, noise.randbytes(3 * BLOCK))
    discard(pool, "disk", 3 * MIB, 4 * BLOCK)
    write(pool, "disk", 3 * MIB + BLOCK, b"in the hole")
    write(pool, "disk", 2 * MIB, b"z" * 5 * BLOCK)
    pool.resize("disk", 5 * MIB)
    write(pool, "disk", 5 * MIB - 1, b"!")
    pool.create_snapshot("disk", "tue", read_only=True)


def token_of(pool: Pool) -> str:
    """The token of the half-received device."""
    return next(info.resume_token for info in pool.devices() if info.resume_token)


def records(stream: bytes) -> list[bytes]:
    """Each record with its payload."""
    places = boundaries(stream)
    return [stream[low:high] for low, high in pairwise(places)]

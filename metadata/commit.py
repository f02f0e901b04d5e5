"""Commit: the order of writes that makes a transaction atomic.

In: encoding a settled transaction, writing it. Out: settling (pool_state), the data flush before it
(the caller's).

Changed blocks go to places free in the committed map, so they can be written at any time. They are made
durable before the superblock, whose meaningful bytes lie in one 512-byte sector, names them; then
the superblock is made durable. A crash anywhere leaves the old or the new pool, whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .layout import BLOCK_BYTES, SUPERBLOCK_LOCATION, U64Array
from .store import BlockStore
from .superblock import Superblock
from .transaction import Encodable

# Longest run of neighbouring blocks joined into one write.
_RUN_BLOCKS_MAX = 256


@dataclass(frozen=True, slots=True)
class PreparedCommit:
    """What a commit has to write.

    Attributes:
        superblock: the new superblock, None when there is nothing to commit at all.
        runs: (first block, bytes) in ascending order, neighbours joined.
        blocks: metadata blocks in `runs`.
    """

    superblock: Superblock | None
    runs: tuple[tuple[int, bytes], ...]
    blocks: int


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What a finished commit did.

    Attributes:
        transaction_id: the userspace transaction id now in storage.
        metadata_blocks_written: changed blocks, the superblock not included.
        freed_data: data blocks in use before this commit and no longer, ascending, shape (n,), uint64.
    """

    transaction_id: int
    metadata_blocks_written: int
    freed_data: U64Array


def encode_commit(superblock: Superblock, dirty: Sequence[tuple[int, Encodable]]) -> PreparedCommit:
    """Encode changed blocks, given in ascending order, joining neighbours."""
    runs: list[tuple[int, bytes]] = []
    pieces: list[bytes] = []
    first = 0
    for location, content in dirty:
        if pieces and (location != first + len(pieces) or len(pieces) == _RUN_BLOCKS_MAX):
            runs.append((first, b"".join(pieces)))
            pieces = []
        if not pieces:
            first = location
        pieces.append(content.encode(location))
    if pieces:
        runs.append((first, b"".join(pieces)))
    return PreparedCommit(superblock, tuple(runs), len(dirty))


def write_prepared(store: BlockStore, prepared: PreparedCommit) -> None:
    """Write blocks, flush, write the superblock, flush. Raises OSError; the pool must then be given up."""
    if prepared.superblock is None:
        return
    for first, data in prepared.runs:
        store.write(first, data)
    if prepared.runs:
        store.flush()
    encoded = prepared.superblock.pack()
    assert len(encoded) == BLOCK_BYTES
    store.write(SUPERBLOCK_LOCATION, encoded)
    store.flush()

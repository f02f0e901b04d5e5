"""A device that is kept as it is while it is read for long: the mappings that changed, and the data behind them.

In: the ranges to send with the places of their data, reading them, proof that what was read is still what it was. Out:
streams (`sending.py`), how long the hold lasts and who else may use the pool (`source_access.py`).

Theory of operation. What a held device consists of, the nodes of its tree and its data blocks, is never overwritten
while the device is there: a change of anything else makes new nodes and takes other blocks. So it can be read straight
from the two files of the pool beside a server that goes on writing. Only when the device might be gone could its
blocks hold something else; so whoever reads asks `still_held` afterwards, and what was read before a good answer is
right.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metadata import ABSENT, FileStore
from metadata.block_cache import BlockCache
from metadata.btree import leaves
from metadata.difference import Difference, differences
from metadata.layout import TIME_BITS

from .common_bases import KnownBase

Buffer = bytearray | memoryview


@dataclass(frozen=True, slots=True)
class SourceDevice:
    """A device as it was when the hold began. `root` is the metadata block of its mapping tree."""

    name: str
    size_bytes: int
    uuid: str
    content_id: str | None
    read_only: bool
    root: int
    device_id: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of the device that is not as in the base; `at_bytes` is its place in the data file, None for a hole."""

    offset_bytes: int
    length_bytes: int
    at_bytes: int | None


class SnapshotSource:
    """One held device, and the base it is compared with. Close it when done."""

    def __init__(
        self,
        paths: tuple[Path, Path],
        block_bytes: int,
        devices: tuple[SourceDevice, SourceDevice | None],
        still_held: Callable[[], None],
        bases: Sequence[KnownBase] = (),
    ) -> None:
        self.block_bytes = block_bytes
        self.bases = bases
        self.device, self.base = devices
        self.still_held = still_held
        self._store = FileStore(paths[0], writable=False)
        self._nodes = BlockCache(self._store)
        try:
            self._data = os.open(paths[1], os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self._store.close()
            raise

    def close(self) -> None:
        """Let the files go."""
        self._store.close()
        os.close(self._data)

    def pieces(self, begin_bytes: int, piece_bytes_max: int) -> Iterator[Piece]:
        """What differs from the base, from a byte on, ascending; data in pieces that lie in one run of the file.

        Data pieces end at multiples of `piece_bytes_max`, holes have any length. Raises BlockDamaged, OSError.
        """
        size_bytes = self.device.size_bytes
        first, end = begin_bytes // self.block_bytes, -(-size_bytes // self.block_bytes)
        base_root = None if self.base is None else self.base.root
        for difference in differences(self._nodes, base_root, self.device.root, first, end):
            for run in _runs(difference, self.block_bytes):
                yield from _cut(_clipped(run, begin_bytes, size_bytes), piece_bytes_max)

    def read(self, at_bytes: int, buffer: memoryview) -> None:
        """Fill a buffer from the data file. Raises OSError(EIO) where the file ends early."""
        done = 0
        while done < len(buffer):
            got = os.preadv(self._data, [buffer[done:]], at_bytes + done)
            if not got:
                raise OSError(errno.EIO, "the data file ends before the block does")
            done += got

    def mapped(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(offset, length, place in the data file) of the mapped parts of a range of the device, ascending."""
        first, end = offset // self.block_bytes, -(-(offset + length) // self.block_bytes)
        for keys, values in leaves(self._nodes, 8, self.device.root, first, end):
            blocks = values >> np.uint64(TIME_BITS)
            for run in _runs(Difference(end, keys, blocks, blocks), self.block_bytes):
                piece = _clipped(run, offset, offset + length)
                assert piece.at_bytes is not None
                yield piece.offset_bytes, piece.length_bytes, piece.at_bytes

    def totals(self, begin_bytes: int = 0) -> tuple[int, int]:
        """(bytes of data, bytes of holes) that `pieces` would yield."""
        data = holes = 0
        for piece in self.pieces(begin_bytes, 1 << 62):
            if piece.at_bytes is None:
                holes += piece.length_bytes
            else:
                data += piece.length_bytes
        return data, holes


def _runs(difference: Difference, block_bytes: int) -> Iterator[Piece]:
    """Thin blocks in a row that are holes, or whose data blocks are in a row too."""
    keys, blocks = difference.keys, difference.new
    if not len(keys):
        return
    holes = blocks == np.uint64(ABSENT)
    follows = (np.diff(keys) == 1) & (holes[1:] == holes[:-1]) & (holes[1:] | (np.diff(blocks) == 1))
    breaks = np.flatnonzero(~follows) + 1
    starts = np.concatenate(([0], breaks)).tolist()
    ends = np.concatenate((breaks, [len(keys)])).tolist()
    for start, end in zip(starts, ends, strict=True):
        at = None if holes[start] else int(blocks[start]) * block_bytes
        yield Piece(int(keys[start]) * block_bytes, (end - start) * block_bytes, at)


def _clipped(piece: Piece, begin_bytes: int, end_bytes: int) -> Piece:
    low = max(piece.offset_bytes, begin_bytes)
    high = min(piece.offset_bytes + piece.length_bytes, end_bytes)
    at = None if piece.at_bytes is None else piece.at_bytes + low - piece.offset_bytes
    return Piece(low, max(high - low, 0), at)


def _cut(piece: Piece, piece_bytes_max: int) -> Iterator[Piece]:
    if piece.at_bytes is None:
        if piece.length_bytes:
            yield piece
        return
    offset, end, at = piece.offset_bytes, piece.offset_bytes + piece.length_bytes, piece.at_bytes
    while offset < end:
        length = min(piece_bytes_max - offset % piece_bytes_max, end - offset)
        yield Piece(offset, length, at)
        offset, at = offset + length, at + length

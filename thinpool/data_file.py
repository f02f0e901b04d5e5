"""The data file of a pool: block contents, and nothing about who owns them.

In: positioned reads and writes, the memory map that replies are sent from, hole punching, copying between
data blocks, durability. Out: which block belongs to whom (`metadata`), which blocks are free (`free_map`).

Two rules hold everywhere above this module:

* Only the kernel may touch the memory map. A slice of `view` may be handed to `sendmsg`; it is never indexed,
  copied or compared from Python, because a bad sector or a truncated file is then `EFAULT` from the system
  call instead of a SIGBUS that kills the process.
* Writes go through `pwrite`, which reports ENOSPC and EIO properly, never through the map.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path

from .errors import DataFileMissing, DataFileTooShort

PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h
ZERO_RANGE_KEEP_SIZE = 0x10 | 0x01  # FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.ENOTTY})
ZERO_PIECE_BYTES = 1 << 20
FREE_BYTES_UNKNOWN = 1 << 62

Buffer = bytes | bytearray | memoryview

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_ZEROS = bytes(ZERO_PIECE_BYTES)


def fallocate(descriptor: int, mode: int, offset: int, length_bytes: int) -> None:
    """fallocate(2), gone on with after signals. Raises OSError."""
    while _libc.fallocate(descriptor, mode, offset, length_bytes) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


class DataFile:
    """An open data file or block device, cut into data blocks of `block_bytes`.

    `view` is a read-only map of the first `blocks * block_bytes` bytes. Raises DataFileMissing and
    DataFileTooShort on opening; OSError from the system calls afterwards.
    """

    def __init__(self, path: Path, *, block_bytes: int, blocks: int, writable: bool) -> None:
        self.path = path
        self.block_bytes = block_bytes
        self.writable = writable
        try:
            self.descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataFileMissing(str(path)) from None
        self.is_block_device = stat.S_ISBLK(os.fstat(self.descriptor).st_mode)
        # One write system call, short writes and all. The hot path calls it directly; fault tests replace it.
        self.pwrite: Callable[[Buffer, int], int] = functools.partial(os.pwrite, self.descriptor)
        self.punches = writable
        self.zeroes_range = writable
        self._copies = True
        # Somebody else made the file shorter than it must be. Later writes may lengthen it again, with zeros where
        # there was something: so this is for good, and no flush succeeds any more.
        self._cut_off = False
        try:
            self._require(blocks)
            self._map(blocks)
        except BaseException:
            os.close(self.descriptor)
            raise

    def size_bytes(self) -> int:
        """Length of the file, or of the block device."""
        return os.lseek(self.descriptor, 0, os.SEEK_END)

    def allocated_bytes(self) -> int:
        """Bytes that the file system holds for the file (0 for a block device, which does not tell)."""
        return os.fstat(self.descriptor).st_blocks * 512

    def disk_free_bytes(self) -> int:
        """What the file system has left for this user; FREE_BYTES_UNKNOWN where there is none or it cannot tell."""
        if self.is_block_device:
            return FREE_BYTES_UNKNOWN
        try:
            figures = os.fstatvfs(self.descriptor)
        except OSError:
            return FREE_BYTES_UNKNOWN
        return (figures.f_bfree if os.geteuid() == 0 else figures.f_bavail) * figures.f_frsize

    def _require(self, blocks: int) -> None:
        has_bytes, needs_bytes = self.size_bytes(), blocks * self.block_bytes
        if has_bytes < needs_bytes:
            raise DataFileTooShort(str(self.path), has_bytes, needs_bytes)

    def _map(self, blocks: int) -> None:
        self.blocks = blocks
        length = blocks * self.block_bytes
        # An empty file cannot be mapped; a pool without data blocks has nothing to send from it either.
        source = mmap.mmap(self.descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ) if length else b""
        self.view = memoryview(source)

    def grow(self, blocks: int) -> None:
        """Make room for `blocks` data blocks and map them. Views handed out before stay valid."""
        if not self.is_block_device and self.size_bytes() < blocks * self.block_bytes:
            os.ftruncate(self.descriptor, blocks * self.block_bytes)
            os.fsync(self.descriptor)
        self._require(blocks)
        self._map(blocks)

    def read(self, offset: int, length_bytes: int) -> bytearray:
        """Read into memory. Raises OSError(EIO) where the file ends early."""
        buffer = bytearray(length_bytes)
        filled = memoryview(buffer)
        done = 0
        while done < length_bytes:
            got = os.preadv(self.descriptor, [filled[done:]], offset + done)
            if not got:
                self._cut_off = True
                raise OSError(errno.EIO, "the data file ends before the block does")
            done += got
        return buffer

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`. Raises OSError; a part may have been written then."""
        length = len(data)
        done = self.pwrite(data, offset)
        if done != length:
            rest = memoryview(data)
            while done < length:
                done += self.pwrite(rest[done:], offset + done)

    def copy(self, source: int, target: int, length_bytes: int) -> None:
        """Copy inside the file; a file system with reflinks shares the extents instead."""
        while length_bytes and self._copies:
            try:
                done = os.copy_file_range(self.descriptor, self.descriptor, length_bytes, source, target)
            except OSError as error:
                if error.errno not in UNSUPPORTED and error.errno != errno.EXDEV:
                    raise
                self._copies = False
                break
            if not done:
                raise OSError(errno.EIO, "the data file ends before the block does")
            source, target, length_bytes = source + done, target + done, length_bytes - done
        while length_bytes:
            piece = min(length_bytes, ZERO_PIECE_BYTES)
            self.write(target, self.read(source, piece))
            source, target, length_bytes = source + piece, target + piece, length_bytes - piece

    def punch(self, offset: int, length_bytes: int) -> bool:
        """Turn a range into a hole that reads zeros. False where this file cannot do that at all."""
        if self.punches:
            try:
                fallocate(self.descriptor, PUNCH_HOLE_KEEP_SIZE, offset, length_bytes)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self.punches = False
        return self.punches

    def zero(self, offset: int, length_bytes: int) -> None:
        """Make a range read zeros and keep it allocated."""
        if self.zeroes_range:
            try:
                fallocate(self.descriptor, ZERO_RANGE_KEEP_SIZE, offset, length_bytes)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self.zeroes_range = False
            else:
                return
        zeros = memoryview(_ZEROS)
        while length_bytes:
            piece = min(length_bytes, ZERO_PIECE_BYTES)
            self.write(offset, zeros[:piece])
            offset, length_bytes = offset + piece, length_bytes - piece

    def has_data(self, offset: int, length_bytes: int) -> bool:
        """Whether any byte of the range is stored; True where the file system cannot tell."""
        try:
            return os.lseek(self.descriptor, offset, os.SEEK_DATA) < offset + length_bytes
        except OSError as error:
            return error.errno != errno.ENXIO  # ENXIO: nothing but holes up to the end

    def prefetch(self, offset: int, length_bytes: int) -> None:
        """Ask the kernel to read a range ahead."""
        os.posix_fadvise(self.descriptor, offset, length_bytes, os.POSIX_FADV_WILLNEED)

    def flush(self) -> None:
        """Make everything written durable. A failure is final for the pool: the kernel may drop the pages.

        Raises OSError, EIO also where the file was found shorter than the pool: something that was written is gone.
        """
        os.fdatasync(self.descriptor)
        if self._cut_off or self._is_short():
            self._cut_off = True
            raise OSError(errno.EIO, f"the data file {self.path} was cut off while it was in use")

    def _is_short(self) -> bool:
        return not self.is_block_device and os.fstat(self.descriptor).st_size < self.blocks * self.block_bytes

    def close(self) -> None:
        """Close the descriptor; the map goes when its last slice does."""
        os.close(self.descriptor)

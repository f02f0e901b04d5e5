"""What a file has of the file system: how far its space reaches without a hole.

In: the FIEMAP ioctl (Documentation/filesystems/fiemap.rst in Linux). Out: what for (`metadata_margin.py`). SEEK_HOLE
would not do: space that was allocated and never written is a hole to it.
"""

from __future__ import annotations

import fcntl
import struct
import sys

FS_IOC_FIEMAP = 0xC020660B  # linux/fs.h: _IOWR('f', 11, struct fiemap)
NATIVE = "<" if sys.byteorder == "little" else ">"  # the kernel's own order, without padding of Python's
# Start and length of the range, flags, extents found, extents there is room for (linux/fiemap.h).
REQUEST = struct.Struct(NATIVE + "QQIIII")
# Where it is in the file and on the disk, its length, flags.
EXTENT = struct.Struct(NATIVE + "QQQ16xI12x")
EXTENTS_AT_ONCE = 128
TO_THE_END = (1 << 63) - 1

assert (REQUEST.size, EXTENT.size) == (32, 56)


def allocated_up_to(descriptor: int, offset: int) -> int:
    """The end of the space that begins at `offset` and has no hole; `offset` for a hole, or where nobody can tell."""
    end = offset
    while True:
        buffer = bytearray(REQUEST.size + EXTENTS_AT_ONCE * EXTENT.size)
        REQUEST.pack_into(buffer, 0, end, TO_THE_END - end, 0, 0, EXTENTS_AT_ONCE, 0)
        try:
            fcntl.ioctl(descriptor, FS_IOC_FIEMAP, buffer, True)
        except OSError:
            return end
        found = REQUEST.unpack_from(buffer)[3]
        begun = end
        for number in range(found):
            start, _, length_bytes, _ = EXTENT.unpack_from(buffer, REQUEST.size + number * EXTENT.size)
            if start > end:
                return end
            end = max(end, start + length_bytes)
        if end == begun:
            return end

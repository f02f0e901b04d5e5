"""A blob: one chunk or one segment as it lies in a pack, compressed where that helps, sealed where the store is.

In: from content to stored bytes and back, with the proof that the content is what its name says. Out: where blobs lie
(`packs.py`), whole documents (`documents.py`).

Stored form: one byte for the method (0 as it is, 1 zstd), then the bytes; in an encrypted store both together inside
AES-256-GCM, whose nonce is the offset in the pack.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING

from thinpool.errors import StoreExtraMissing

from .damage import DamagedError
from .keys import SealBrokenError, StoreKeys, same

if TYPE_CHECKING:
    import zstandard

RAW, ZSTD = b"\0", b"\1"
LEVEL = 3
CONTENT_BYTES_MAX = 1 << 26

_local = threading.local()


@functools.cache
def _zstandard() -> type[zstandard.ZstdCompressor]:
    try:
        import zstandard
    except ImportError:
        raise StoreExtraMissing(package="zstandard") from None
    return zstandard.ZstdCompressor


def compressed(content: bytes) -> bytes:
    """Method and bytes; compressed where that makes it shorter. Thread-safe."""
    compressor = getattr(_local, "compressor", None)
    if compressor is None:
        compressor = _local.compressor = _zstandard()(level=LEVEL)
    packed: bytes = compressor.compress(content)
    return ZSTD + packed if len(packed) < len(content) else RAW + content


def expanded(stored: bytes, content_bytes_max: int = CONTENT_BYTES_MAX) -> bytes:
    """Undo `compressed`. Raises DamagedError."""
    method, rest = stored[:1], stored[1:]
    if method == RAW:
        return rest
    if method != ZSTD:
        raise DamagedError(reason="its compression method is unknown")
    import zstandard

    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    try:
        declared = zstandard.frame_content_size(rest)
        if not 0 <= declared <= content_bytes_max:
            raise DamagedError(reason=f"it claims to hold {declared} bytes")
        content: bytes = decompressor.decompress(rest, max_output_size=content_bytes_max)
    except zstandard.ZstdError as error:
        raise DamagedError(reason="it cannot be decompressed") from error
    return content


def opened(keys: StoreKeys, pack: bytes, offset: int, stored: bytes, name: bytes) -> bytes:
    """The content of a blob, proven to be what `name` stands for. Raises DamagedError."""
    try:
        content = expanded(keys.open(pack, offset, stored))
    except SealBrokenError as error:
        raise DamagedError(reason="its seal is broken") from error
    if not same(keys.content_id(content), name):
        raise DamagedError(reason="its content is not what its name says")
    return content

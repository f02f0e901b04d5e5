"""Small self-contained objects: manifests, intents, holds, indices.

In: their frame. Out: what is in them.

A document is compressed, then sealed together with its key: one that was moved to another key, cut or changed does not
open. Without encryption a keyed digest stands in for the seal; it finds damage, and forgery only by those who cannot
read `format`.

    bytes 0..3    "TPsd"
    byte  4       version, 1
    byte  5       1 when encrypted
    bytes 6..21   salt
    then          encrypted: AES-256-GCM of the compressed content; otherwise its digest (32 bytes) and the content
"""

from __future__ import annotations

import hashlib
import secrets
import struct

from thinpool.errors import StoreDamaged

from .blobs import compressed, expanded
from .damage import DamagedError
from .keys import ID_BYTES, SealBrokenError, StoreKeys, same

MAGIC = b"TPsd"
VERSION = 1
HEADER = struct.Struct("<4sBB16s")
assert HEADER.size == 22
DOCUMENT_BYTES_MAX = 1 << 32


def sealed_document(keys: StoreKeys, key: str, content: bytes) -> bytes:
    """Frame the content of the object `key`."""
    salt = secrets.token_bytes(16)
    head = HEADER.pack(MAGIC, VERSION, keys.encrypted, salt)
    body = compressed(content)
    if keys.encrypted:
        return head + keys.seal(b"document" + salt, 0, body, head + key.encode())
    return head + _digest(keys, head + key.encode(), body) + body


def opened_document(keys: StoreKeys, url: str, key: str, data: bytes) -> bytes:
    """The content of the object `key`. Raises StoreDamaged."""
    if len(data) < HEADER.size:
        raise StoreDamaged(url, key, "it is too short")
    magic, version, is_encrypted, salt = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or bool(is_encrypted) != keys.encrypted:
        raise StoreDamaged(url, key, "it does not begin as a document of this store")
    about, body = data[: HEADER.size] + key.encode(), data[HEADER.size :]
    try:
        if keys.encrypted:
            return expanded(keys.open(b"document" + salt, 0, body, about), DOCUMENT_BYTES_MAX)
        if not same(_digest(keys, about, body[ID_BYTES:]), body[:ID_BYTES]):
            raise StoreDamaged(url, key, "its digest does not match")
        return expanded(body[ID_BYTES:], DOCUMENT_BYTES_MAX)
    except (SealBrokenError, DamagedError) as error:
        raise StoreDamaged(url, key, "its seal is broken" if keys.encrypted else str(error)) from error


def _digest(keys: StoreKeys, about: bytes, body: bytes) -> bytes:
    digest = hashlib.blake2b(about, key=keys.id_key, person=b"document", digest_size=ID_BYTES)
    digest.update(body)
    return digest.digest()

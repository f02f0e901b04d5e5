"""The keys of a store: what names chunks, and what encrypts them.

In: making and opening the `format` object, deriving keys, names of content, sealing and opening bytes. Out: what is
sealed (`blobs.py`, `documents.py`) and where the secret comes from (`cli/store.py`).

Every store has an *id key*: the name of a chunk is a keyed BLAKE2b of its content, so equal content has equal names
within a store and nobody without the key can test whether it holds a known file. In a store without encryption the key
lies open in `format`. In an encrypted one a random master key is wrapped with AES-256-GCM under a key that scrypt
derives from the secret; id key and data key are derived from the master key. A new secret means a new wrapping, not new
chunks.

Nonces never repeat: every pack and every document has a random name or salt of its own that its key is derived from,
and within a pack the nonce is the offset. A pack is written once.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinpool.errors import NotAStore, StoreDamaged, StoreExtraMissing, StoreKeyNeeded, WrongStoreKey

from .objects import Objects

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FORMAT_KEY = "format"
FORMAT_VERSION = 1
KEY_BYTES = 32
ID_BYTES = 32
CHUNK_BYTES = 64 << 10
NONCE_BYTES = 12
SEAL_BYTES = 16  # the tag of AES-GCM
SCRYPT_COST, SCRYPT_BLOCK, SCRYPT_LANES = 1 << 16, 8, 1  # 64 MiB and about a quarter of a second
SCRYPT_COST_MAX = 1 << 22


class SealBrokenError(Exception):
    """Bytes that were not sealed with this key, or were changed since."""


def _derived(key: bytes, purpose: bytes, context: bytes = b"") -> bytes:
    return hashlib.blake2b(context, key=key, person=purpose.ljust(16, b"\0"), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class StoreKeys:
    """The keys of one store. `data_key` is None where nothing is encrypted."""

    store_id: str
    id_key: bytes
    data_key: bytes | None

    @property
    def encrypted(self) -> bool:
        """Whether content is sealed."""
        return self.data_key is not None

    def content_id(self, content: bytes | memoryview) -> bytes:
        """The name of content: 32 bytes."""
        return hashlib.blake2b(content, key=self.id_key, digest_size=ID_BYTES).digest()

    def name_id(self, name: str) -> str:
        """What stands for a snapshot's name in the keys of objects: 32 hex digits."""
        raw = name.encode("utf-8", "surrogateescape")
        return hashlib.blake2b(raw, key=self.id_key, person=b"name", digest_size=16).hexdigest()

    def seal(self, context: bytes, number: int, content: bytes, about: bytes = b"") -> bytes:
        """Encrypt and authenticate; `context` and `number` together are used once. As it is without encryption."""
        if self.data_key is None:
            return content
        return _cipher(self.data_key, context).encrypt(number.to_bytes(NONCE_BYTES, "big"), content, about)

    def open(self, context: bytes, number: int, sealed: bytes, about: bytes = b"") -> bytes:
        """Undo `seal`. Raises SealBrokenError."""
        if self.data_key is None:
            return sealed
        from cryptography.exceptions import InvalidTag

        try:
            return _cipher(self.data_key, context).decrypt(number.to_bytes(NONCE_BYTES, "big"), sealed, about)
        except (InvalidTag, ValueError) as error:
            raise SealBrokenError from error


@functools.lru_cache(maxsize=256)
def _cipher(data_key: bytes, context: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(_derived(data_key, b"content", context))


def _wrapping_key(secret: bytes, salt: bytes, cost: int) -> bytes:
    try:
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    except ImportError:
        raise StoreExtraMissing(package="cryptography") from None
    return Scrypt(salt=salt, length=KEY_BYTES, n=cost, r=SCRYPT_BLOCK, p=SCRYPT_LANES).derive(secret)


def _of_master(store_id: str, master: bytes) -> StoreKeys:
    return StoreKeys(store_id, _derived(master, b"id"), _derived(master, b"data"))


def create_store(objects: Objects, secret: bytes | None) -> StoreKeys:
    """Make the `format` object, encrypted where there is a secret. A store that is there already is opened.

    Raises as `open_store`.
    """
    found = objects.find_content(FORMAT_KEY)
    if found is not None:
        return _open(objects, found, secret)
    store_id = secrets.token_hex(16)
    document: dict[str, object] = {"format": FORMAT_VERSION, "id": store_id, "chunk_bytes": CHUNK_BYTES}
    if secret is None:
        keys = StoreKeys(store_id, secrets.token_bytes(KEY_BYTES), None)
        document["id_key"] = keys.id_key.hex()
    else:
        master, salt = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(16)
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        wrapping = AESGCM(_wrapping_key(secret, salt, SCRYPT_COST))
        wrapped = wrapping.encrypt(bytes(NONCE_BYTES), master, store_id.encode())
        document["encryption"] = {
            "cipher": "AES-256-GCM",
            "kdf": "scrypt",
            "cost": SCRYPT_COST,
            "salt": salt.hex(),
            "wrapped": wrapped.hex(),
        }
        keys = _of_master(store_id, master)
    if objects.create(FORMAT_KEY, json.dumps(document, indent=2).encode()):
        return keys
    return open_store(objects, secret)  # another host was quicker


def open_store(objects: Objects, secret: bytes | None) -> StoreKeys:
    """Open a store. Raises NotAStore, StoreDamaged, StoreKeyNeeded, WrongStoreKey."""
    found = objects.find_content(FORMAT_KEY)
    if found is None:
        raise NotAStore(objects.url)
    return _open(objects, found, secret)


def _open(objects: Objects, found: bytes, secret: bytes | None) -> StoreKeys:
    try:
        document = json.loads(found)
        version, store_id = document["format"], str(document["id"])
        encryption = document.get("encryption")
        plain_key = None if encryption else bytes.fromhex(document["id_key"])
        chunk_bytes = document["chunk_bytes"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreDamaged(objects.url, FORMAT_KEY, f"it does not describe a store ({error})") from error
    if version != FORMAT_VERSION or chunk_bytes != CHUNK_BYTES:
        raise StoreDamaged(
            objects.url, FORMAT_KEY, f"format {version} with chunks of {chunk_bytes} bytes is not known here"
        )
    if plain_key is not None:
        if secret is not None:
            reason = "is not encrypted, but a key was given; leave the key out, or use another prefix"
            raise StoreKeyNeeded(objects.url, reason)
        return StoreKeys(store_id, plain_key, None)
    if secret is None:
        raise StoreKeyNeeded(objects.url, "is encrypted; give its key with --key-file")
    return _of_master(store_id, _unwrap(objects, store_id, encryption, secret))


def _unwrap(objects: Objects, store_id: str, encryption: dict[str, object], secret: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        salt, wrapped = bytes.fromhex(str(encryption["salt"])), bytes.fromhex(str(encryption["wrapped"]))
        cost = int(str(encryption["cost"]))
        if not 1 < cost <= SCRYPT_COST_MAX:
            raise ValueError(cost)
    except (KeyError, ValueError, TypeError) as error:
        raise StoreDamaged(objects.url, FORMAT_KEY, "its description of the key makes no sense") from error
    try:
        wrapping = AESGCM(_wrapping_key(secret, salt, cost))
        return wrapping.decrypt(bytes(NONCE_BYTES), wrapped, store_id.encode())
    except (InvalidTag, ValueError) as error:
        raise WrongStoreKey(objects.url) from error


def same(left: bytes, right: bytes) -> bool:
    """Compare digests in constant time."""
    return hmac.compare_digest(left, right)

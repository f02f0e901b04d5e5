"""How far a device that is being received got: what the catalogue keeps of it, and the token it can be resumed with.

In: the state with its JSON form, the token with its text form. Out: changing a pool (`transfers.py`), the stream
(`stream_format.py`).

A token says which content is wanted, on top of which base, from which byte on; that is all a sender needs. It is text
that survives mail and shells: the version, a hyphen, then base64url of the fields and their CRC-32C.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import uuid
from dataclasses import asdict, dataclass

from metadata.checksum import crc32c

from .errors import TokenInvalid

TOKEN_VERSION = "1"  # noqa: S105 -- a format version, no secret
_TOKEN = struct.Struct(">16s16sQ")
_CHECKSUM = struct.Struct(">I")
NO_BASE = bytes(16)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A device that is about to arrive: its name here, its content, and the base it is an increment on.

    `base_name` is the base's name where it comes from. Its content is what is looked for; the name tells of several.
    """

    name: str
    content_id: str
    size_bytes: int
    base_content_id: str | None = None
    base_name: str = ""
    read_only: bool = True
    resumable: bool = False


@dataclass(frozen=True, slots=True)
class ReceivingState:
    """What is being received, and what is there of it: everything below `position_bytes`, durably.

    `replaces` is the uuid of the device of the same name that the finished one takes the place of.
    """

    target: str
    content_id: str
    base_content_id: str | None
    size_bytes: int
    read_only: bool
    resumable: bool
    position_bytes: int = 0
    replaces: str | None = None

    def to_text(self) -> str:
        """The form in the catalogue."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> ReceivingState:
        """Back from the catalogue. Raises TypeError, ValueError."""
        return cls(**json.loads(text))

    @property
    def token(self) -> str:
        """What `send --resume` takes."""
        return ResumeToken(self.content_id, self.base_content_id, self.position_bytes).to_text()


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """Send this content, as an increment on that base if there is one, from this byte on."""

    content_id: str
    base_content_id: str | None
    position_bytes: int

    def to_text(self) -> str:
        """The token as text."""
        base = NO_BASE if self.base_content_id is None else uuid.UUID(self.base_content_id).bytes
        fields = _TOKEN.pack(uuid.UUID(self.content_id).bytes, base, self.position_bytes)
        encoded = base64.urlsafe_b64encode(fields + _CHECKSUM.pack(crc32c(fields)))
        return f"{TOKEN_VERSION}-{encoded.decode('ascii').rstrip('=')}"

    @classmethod
    def from_text(cls, text: str) -> ResumeToken:
        """Read a token. Raises TokenInvalid."""
        version, _, encoded = text.strip().partition("-")
        if version != TOKEN_VERSION:
            raise TokenInvalid(text, "it is of another version, or no token")
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            raise TokenInvalid(text, "it holds characters that no token has") from None
        if len(raw) != _TOKEN.size + _CHECKSUM.size:
            raise TokenInvalid(text, "a part of it is missing or too much")
        fields = raw[: _TOKEN.size]
        if _CHECKSUM.unpack(raw[_TOKEN.size :])[0] != crc32c(fields):
            raise TokenInvalid(text, "its checksum does not fit; a character was changed")
        content, base, position = _TOKEN.unpack(fields)
        base_content_id = None if base == NO_BASE else str(uuid.UUID(bytes=base))
        return cls(str(uuid.UUID(bytes=content)), base_content_id, position)


def token_of(receiving: str | None) -> str | None:
    """The token of a half-received device that was meant to be resumed, None for any other (a pull, for one)."""
    if receiving is None or "content_id" not in json.loads(receiving):
        return None
    state = ReceivingState.from_text(receiving)
    return state.token if state.resumable else None

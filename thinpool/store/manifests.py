"""A manifest: one snapshot in a store, complete in itself: what it is, its segments, the packs it needs.

In: the document's content. Out: its frame and key (`documents.py`, `roots.py`), the segments (`segments.py`).

    u32           length of a JSON object with the snapshot's description
    JSON
    u32, u32      number of segments, number of packs
    segments      number u64, pack u32 (into the list of packs), offset u32, length u32, name 32 bytes; ascending
    packs         name 16 bytes, bytes of it that this snapshot uses u64; ascending

The list of packs is all the collector has to read: it tells what must stay without looking at a single segment.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from .damage import DamagedError
from .keys import CHUNK_BYTES
from .segments import PACK_ID_BYTES, SEGMENT_CHUNKS, Place

LENGTH = struct.Struct("<I")
COUNTS = struct.Struct("<II")
SEGMENT_ROW = struct.Struct("<QIII32s")
PACK_ROW = struct.Struct("<16sQ")
assert (SEGMENT_ROW.size, PACK_ROW.size) == (52, 24)
SEGMENT_BYTES = SEGMENT_CHUNKS * CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Description:
    """What a snapshot is. `created` and `pushed` are for people, seconds since the epoch; nothing is ordered by them.

    `device` is the identity of the device at its source, "" where it has none. `mapped_bytes` counts whole chunks,
    `stored_bytes` what this push added to the store.
    """

    name: str
    device: str
    size_bytes: int
    block_bytes: int
    mapped_bytes: int
    stored_bytes: int
    created: float
    pushed: float
    host: str

    @classmethod
    def of_json(cls, document: Any) -> Description:
        """Raises DamagedError."""
        try:
            kinds = {"name": str, "device": str, "host": str, "created": float, "pushed": float}
            found = cls(**{key: kinds.get(key, int)(document[key]) for key in cls.__slots__})
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(reason="its description makes no sense") from error
        if found.size_bytes <= 0 or found.block_bytes <= 0 or found.block_bytes % CHUNK_BYTES:
            raise DamagedError(reason="its sizes make no sense")
        return found


@dataclass(slots=True)
class Manifest:
    """One snapshot: `segments` by their number, and the bytes it uses of each pack (segments included)."""

    about: Description
    segments: dict[int, Place] = field(default_factory=dict)
    packs: Counter[bytes] = field(default_factory=Counter)

    def encode(self) -> bytes:
        """The content of the document."""
        text = json.dumps(asdict(self.about), sort_keys=True).encode("ascii")
        packs = sorted(pack for pack, used in self.packs.items() if used > 0)
        number = {pack: index for index, pack in enumerate(packs)}
        return b"".join(
            (
                LENGTH.pack(len(text)),
                text,
                COUNTS.pack(len(self.segments), len(packs)),
                *(
                    SEGMENT_ROW.pack(index, number[place.pack], place.offset, place.length_bytes, place.name)
                    for index, place in sorted(self.segments.items())
                ),
                *(PACK_ROW.pack(pack, self.packs[pack]) for pack in packs),
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Raises DamagedError."""
        try:
            (length,) = LENGTH.unpack_from(data)
            about = Description.of_json(json.loads(data[LENGTH.size : LENGTH.size + length]))
            at = LENGTH.size + length
            segments_count, packs_count = COUNTS.unpack_from(data, at)
            at += COUNTS.size
            middle = at + segments_count * SEGMENT_ROW.size
            if len(data) != middle + packs_count * PACK_ROW.size:
                raise DamagedError(reason="its length is wrong")
            packs = dict(PACK_ROW.iter_unpack(data[middle:]))
            names = list(packs)
            segments = {
                index: Place(names[pack], offset, used, name)
                for index, pack, offset, used, name in SEGMENT_ROW.iter_unpack(data[at:middle])
            }
        except (ValueError, struct.error, IndexError) as error:
            raise DamagedError(reason="it cannot be decoded") from error
        return cls(about, segments, Counter(packs))

    def use(self, used: Counter[bytes], sign: int = 1) -> None:
        """Count (or, with -1, discount) bytes of packs."""
        for pack, amount in used.items():
            self.packs[pack] += sign * amount
            if self.packs[pack] <= 0:
                del self.packs[pack]


def pack_key(pack: bytes) -> str:
    """The object of a pack: packs/<push>-<number>, spread over 256 prefixes by the push's first byte."""
    name = pack.hex()
    return f"packs/{name[:2]}/{name[:24]}-{name[24:]}"


def pack_of(key: str) -> bytes | None:
    """The pack an object's key names, None for a foreign object."""
    name = key.rsplit("/", 1)[-1].replace("-", "")
    try:
        pack = bytes.fromhex(name)
    except ValueError:
        return None
    return pack if len(pack) == PACK_ID_BYTES and pack_key(pack) == key else None

"""Which snapshots two pools have in common: how an increment finds its way back after one side deleted its base.

In: the snapshots related to a device with their content ids, nearest first, as a stream tells them; the nearest that
the other side has too. Out: where both lists come from (`source_access.py`, `transfers.py`, `cli/sending.py`).

Related are the devices that hang together by their origins, whatever became of those. Others are not told of: a stream
may go to people who are not meant to know what else is in the pool.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

BASES_MAX = 1000
_ROW = struct.Struct(">16sH")


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A snapshot that could be a base."""

    name: str
    content_id: str


class Relative(Protocol):
    """What is asked of a device (`catalog_rows.CatalogEntry` is one)."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def device_id(self) -> int:
        """Its number in the pool."""

    @property
    def origin(self) -> str | None:
        """The name of what it was taken of."""

    @property
    def created(self) -> float:
        """When, in seconds since the epoch."""

    @property
    def content_id(self) -> str | None:
        """Names its content; None where clients may have changed it."""


def related(device: Relative, devices: Iterable[Relative]) -> list[KnownBase]:
    """Snapshots that could be bases of `device`, the nearest in time first, at most `BASES_MAX`."""
    others = [other for other in devices if other.name != device.name]
    tied: dict[str, list[str]] = {}
    for other in (device, *others):
        if other.origin is not None:
            tied.setdefault(other.name, []).append(other.origin)
            tied.setdefault(other.origin, []).append(other.name)
    family, waiting = {device.name}, [device.name]
    while waiting:
        for name in tied.get(waiting.pop(), ()):
            if name not in family:
                family.add(name)
                waiting.append(name)
    found = [
        other
        for other in others
        if other.name in family and other.content_id not in (None, device.content_id)
    ]
    # Clocks go back, and lists tell whole seconds; numbers of devices only ever go up.
    found.sort(
        key=lambda other: (
            abs(other.created - device.created) // 1,
            abs(other.device_id - device.device_id),
        )
    )
    return [KnownBase(other.name, str(other.content_id)) for other in found[:BASES_MAX]]


def nearest(bases: Iterable[KnownBase], held: Collection[str | None]) -> KnownBase | None:
    """The first of them whose content id is among those held."""
    return next((base for base in bases if base.content_id in held), None)


def encode_bases(bases: Iterable[KnownBase]) -> bytes:
    """The payload of a record: for each the content id, the length of its name, the name in UTF-8."""
    rows = []
    for base in bases:
        name = base.name.encode()
        rows.append(_ROW.pack(uuid.UUID(base.content_id).bytes, len(name)) + name)
    return b"".join(rows)


def decode_bases(payload: bytes | bytearray | memoryview) -> list[KnownBase]:
    """Read such a payload. Raises ValueError."""
    found, at, raw = [], 0, bytes(payload)
    while at < len(raw):
        if len(raw) - at < _ROW.size:
            raise ValueError(at)
        content_id, length = _ROW.unpack_from(raw, at)
        at += _ROW.size
        if len(raw) - at < length:
            raise ValueError(at)
        found.append(KnownBase(raw[at : at + length].decode(), str(uuid.UUID(bytes=content_id))))
        at += length
    return found

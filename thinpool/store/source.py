"""What a push reads: a snapshot that does not change while it is read. Implemented above (`pushing.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

DATA, HOLE = True, False
# (offset_bytes, length_bytes, DATA or HOLE), ascending, whole data blocks except at the device's end.
Ranges = Iterator[tuple[int, int, bool]]


class BlockSource(Protocol):
    """One snapshot. Reads may come from several threads."""

    @property
    def identity(self) -> str:
        """Names this content for ever: a uuid."""

    @property
    def size_bytes(self) -> int:
        """Length of the device."""

    @property
    def block_bytes(self) -> int:
        """The pool's data block."""

    @property
    def created(self) -> float:
        """When the snapshot was made, seconds since the epoch; for people."""

    def relatives(self) -> list[str]:
        """Identities of snapshots that still exist and can be compared with, the likeliest first."""

    def mapped(self, begin_bytes: int, end_bytes: int) -> Ranges:
        """Ranges that are mapped, all DATA."""

    def changes(self, base: str, mapped_bytes: int) -> Ranges | None:
        """What differs from a relative, found without reading data; None where that cannot be told.

        Of devices with one content those that have another size of what is mapped are no relatives: a copy that went
        through a pool with larger blocks has zeros where the first one has holes.
        """

    def read(self, offset: int, length_bytes: int) -> bytes | bytearray | memoryview:
        """Content."""

# ruff: noqa: N818 -- the names say what happened; an Error suffix would add nothing
"""Everything that can go wrong in this package, as types whose fields hold the facts.

In: `MetadataError` and its leaves; `Damage`, the closed list of what can be wrong with one block.
Out: formatting for terminals, exit codes (the application's business).
The sentence is composed in `__str__`: what is wrong, where, and where possible what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any


class Damage(Enum):
    """What is wrong with the bytes of one block; decoders report the first in this order."""

    OUTSIDE = "its number lies outside the metadata"
    SHORT = "it is shorter than 4096 bytes"
    ZEROED = "it is all zeros"
    OTHER_KIND = "it is an intact block of another kind"
    CHECKSUM = "its checksum does not match its contents"
    LOCATION = "it records another location as its own"
    NODE_FLAGS = "it is marked neither, or both, internal node and leaf"
    VALUE_SIZE = "its value size is not the one of this tree"
    MAX_ENTRIES = "its capacity is impossible"
    ENTRY_COUNT = "it claims more entries than it can hold"
    EMPTY_INTERNAL = "it is an internal node without children"
    KEY_ORDER = "its keys are not strictly ascending"
    TOO_DEEP = "the path to it is longer than any tree can be"
    RANGE = "it holds a value outside the permitted range"


class MetadataError(Exception):
    """Root of all errors of this package."""

    def __reduce__(self) -> tuple[type[MetadataError], tuple[Any, ...]]:
        values = tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return type(self), values


@dataclass(eq=False)
class BlockDamaged(MetadataError):
    """A metadata block is not what its referrer expects."""

    location: int
    expected: str
    damage: Damage
    found: str = ""

    def __str__(self) -> str:
        tail = f" ({self.found})" if self.found else ""
        return (
            f"metadata block {self.location} should be a {self.expected}, but {self.damage.value}{tail}; "
            "the pool metadata is damaged and needs checking"
        )


@dataclass(eq=False)
class NotPoolMetadata(MetadataError):
    """The storage does not start with a dm-thin superblock at all."""

    found: str

    def __str__(self) -> str:
        return f"this is not dm-thin pool metadata: block 0 {self.found}"


@dataclass(eq=False)
class UnsupportedPool(MetadataError):
    """The superblock is intact but asks for something this code must not touch."""

    field: str
    value: int
    writable: bool

    def __str__(self) -> str:
        action = "write to" if self.writable else "open"
        return f"refusing to {action} this pool: its superblock has {self.field} {self.value:#x}"


@dataclass(eq=False)
class MetadataTooShort(MetadataError):
    """The storage is smaller than the space map says it is."""

    recorded_blocks: int
    actual_blocks: int

    def __str__(self) -> str:
        return (
            f"the metadata should have {self.recorded_blocks} blocks of 4096 bytes, but the storage holds "
            f"only {self.actual_blocks}; it was truncated or is the wrong device"
        )


@dataclass(eq=False)
class CountDamaged(MetadataError):
    """A reference count contradicts the structure it counts."""

    space: str
    block: int
    problem: str

    def __str__(self) -> str:
        return (
            f"the reference count of {self.space} block {self.block} {self.problem}; the pool needs checking"
        )


@dataclass(eq=False)
class AlreadyFormatted(MetadataError):
    """Formatting would overwrite something."""

    found: str

    def __str__(self) -> str:
        return f"refusing to format: block 0 {self.found}; force the format if that may be destroyed"


@dataclass(eq=False)
class NoSuchDevice(MetadataError):
    """No thin device has this id."""

    device_id: int

    def __str__(self) -> str:
        return f"there is no thin device {self.device_id} in this pool"


@dataclass(eq=False)
class DeviceIncomplete(MetadataError):
    """A device is in only one of the two trees that describe devices."""

    device_id: int
    missing: str

    def __str__(self) -> str:
        return f"thin device {self.device_id} has no {self.missing}; the pool metadata needs checking"


@dataclass(eq=False)
class DeviceExists(MetadataError):
    """A thin device with this id is already there."""

    device_id: int

    def __str__(self) -> str:
        return f"thin device {self.device_id} already exists in this pool"


@dataclass(eq=False)
class MetadataFull(MetadataError):
    """The operation would eat into the blocks kept back for commits and deletions."""

    needed_blocks: int
    free_blocks: int
    reserved_blocks: int

    def __str__(self) -> str:
        return (
            f"not enough metadata space: up to {self.needed_blocks} blocks needed, {self.free_blocks} free of "
            f"which {self.reserved_blocks} are reserved; grow the metadata or delete devices"
        )


@dataclass(eq=False)
class OutOfRange(MetadataError):
    """An argument is outside what the format can express or the pool contains."""

    what: str
    value: int
    minimum: int
    maximum: int

    def __str__(self) -> str:
        return f"{self.what} {self.value} is outside {self.minimum}..{self.maximum}"


@dataclass(eq=False)
class ClockExhausted(MetadataError):
    """The 24-bit clock that marks mappings has counted all the snapshots it can."""

    time: int

    def __str__(self) -> str:
        return f"no further snapshot is possible: the pool's snapshot clock stands at {self.time}, its limit"


@dataclass(eq=False)
class ReadOnlyMetadata(MetadataError):
    """A change was asked of metadata opened for reading."""

    operation: str

    def __str__(self) -> str:
        return f"cannot {self.operation}: the metadata was opened read-only"


@dataclass(eq=False)
class CommitPending(MetadataError):
    """A change was asked for between prepare_commit and finish_commit, or after a commit failed."""

    operation: str

    def __str__(self) -> str:
        return f"cannot {self.operation}: a commit is being written, or failed and was not aborted"


@dataclass(eq=False)
class MetadataSnapshotExists(MetadataError):
    """A metadata snapshot is already held."""

    location: int

    def __str__(self) -> str:
        return f"a metadata snapshot is already held at block {self.location}; release it first"


@dataclass(eq=False)
class NoMetadataSnapshot(MetadataError):
    """No metadata snapshot is held."""

    def __str__(self) -> str:
        return "the pool holds no metadata snapshot"


@dataclass(eq=False)
class ShortRead(MetadataError):
    """The storage ended in the middle of a read."""

    first: int
    count: int
    received_bytes: int

    def __str__(self) -> str:
        return (
            f"reading {self.count} metadata block(s) at {self.first} gave only {self.received_bytes} bytes; "
            "the storage is shorter than it was when it was opened"
        )


@dataclass(eq=False)
class SuperblockLost(MetadataError):
    """A repair without a superblock needs to be told what only the superblock knew."""

    needed: str

    def __str__(self) -> str:
        return f"the superblock of the pool is lost; a repair has to be told {self.needed}"


@dataclass(eq=False)
class XmlInvalid(MetadataError):
    """A dump in XML cannot be read."""

    line: int
    problem: str

    def __str__(self) -> str:
        return f"the XML dump is not usable at line {self.line}: {self.problem}"


@dataclass(eq=False)
class RestoreInvalid(MetadataError):
    """A device in a dump contradicts itself or its pool."""

    device_id: int
    problem: str

    def __str__(self) -> str:
        return f"device {self.device_id} of the dump cannot be restored: {self.problem}"

"""What a check can find wrong, as records: the vocabulary shared by recount, check and repair.

In: `Problem`, where it is and what it affects, its sentence. Out: finding problems, names of devices (the
application knows them), fixing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

from .layout import KEY_LIMIT


class Severity(IntEnum):
    """How bad it is; the worst of a pool's problems decides whether it may be used.

    HINT: a redundant figure is wrong; it can be worked out again from the rest.
    LEAK: space counts as used that nothing uses, or as shared more often than it is; no data is at risk.
    ERROR: something is lost, unreadable, or will be overwritten by going on.
    """

    HINT = 1
    LEAK = 2
    ERROR = 3


class Fault(Enum):
    """The kinds of problems; the value is the middle of the sentence."""

    SUPERBLOCK = "the superblock is not usable"
    FIELD = "a field of the superblock is impossible"
    HELD = "the metadata snapshot is not usable"
    UNREADABLE = "a block is damaged"
    OUTSIDE = "a block lies outside the metadata"
    CROSS_LINKED = "a block belongs to two structures"
    LOOP = "a node is its own ancestor"
    TOO_DEEP = "the tree is deeper than any tree can be"
    UNDERFULL = "a node has too few entries"
    BELOW_RANGE = "keys lie below the range of their parent"
    ABOVE_RANGE = "keys lie above the range of their parent"
    UNEVEN = "leaves are at different depths"
    DEVICE_ID = "a device id is impossible"
    DATA_OUTSIDE = "mappings point outside the data space"
    FUTURE_TIME = "mappings are stamped later than the pool's clock"
    NO_RECORD = "a device has mappings but no record"
    NO_TREE = "a device has a record but no mappings tree"
    MAPPED_BLOCKS = "the number of mapped blocks in a device's record is wrong"
    RECORD_TIME = "a device's record has impossible times"
    SHARED_AS_OWN = "mappings are shared, but not older than the device's last snapshot"
    NO_BITMAP = "a bitmap is missing"
    EXTRA_BITMAP = "there is a bitmap for blocks that do not exist"
    TAIL = "blocks past the end count as used"
    COUNT_LEAK = "blocks count as used, but nothing refers to them"
    COUNT_HIGH = "blocks are counted more often than they are used"
    COUNT_LOW = "blocks are counted less often than they are used"
    NO_OVERFLOW = "blocks are counted three times or more, but the exact count is missing"
    EXTRA_OVERFLOW = "there is an exact count for blocks that do not need one"
    FREE_BLOCKS = "the number of free blocks of a bitmap is wrong"
    FIRST_FREE = "free blocks lie before the place where the search for them begins"
    ALLOCATED = "the number of blocks in use is wrong"
    UNVERIFIED = "counts could not be verified"
    DATA_SHORT = "the file is shorter than the data space"
    MORE = "there are more problems of this kind"


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the metadata.

    Attributes:
        structure: "mappings", "device records", "data space map", ... as a person would say it.
        path: blocks from the structure's root to the place, the block itself included.
        begin, end: half-open range of keys the place answers for; `end` may be 2**64.
        device: the device whose tree this is, None elsewhere.
        held: in the metadata snapshot, not in the live pool.
    """

    structure: str
    path: tuple[int, ...] = ()
    begin: int = 0
    end: int = KEY_LIMIT
    device: int | None = None
    held: bool = False

    def child(self, location: int, begin: int, end: int) -> Place:
        """The place one level below."""
        return Place(self.structure, (*self.path, location), begin, end, self.device, self.held)

    def narrowed(self, begin: int, end: int) -> Place:
        """The same place, a part of its key range."""
        return Place(self.structure, self.path, begin, end, self.device, self.held)

    def __str__(self) -> str:
        text = self.structure if self.device is None else f"{self.structure} of device {self.device}"
        if self.held:
            text += " in the metadata snapshot"
        if (self.begin, self.end) != (0, KEY_LIMIT):
            text += f", keys {self.begin}..{'' if self.end == KEY_LIMIT else self.end - 1}"
        if self.path:
            text += f", path {'/'.join(map(str, self.path))}"
        return text


@dataclass(frozen=True, slots=True)
class Affected:
    """Thin blocks begin..end-1 of a device that a problem concerns; `end` may be 2**64."""

    device: int
    begin: int
    end: int
    held: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        detail: what is particular about this case; the end of the sentence.
        first, count: the blocks it is about (metadata or data, see `place`); count 0 when it is about none.
        expected, found: the figures that disagree, where it is about figures.
        affects: devices whose contents it concerns.
    """

    severity: Severity
    fault: Fault
    place: Place
    detail: str = ""
    first: int = 0
    count: int = 0
    expected: int | None = None
    found: int | None = None
    affects: tuple[Affected, ...] = ()

    def __str__(self) -> str:
        text = f"{self.severity.name.lower()}: {self.place}: {self.fault.value}"
        if self.count:
            last = self.first + self.count - 1
            text += f", block {self.first}" if self.count == 1 else f", blocks {self.first}..{last}"
        if self.expected is not None:
            text += f": {self.found} instead of {self.expected}"
        return f"{text}: {self.detail}" if self.detail else text

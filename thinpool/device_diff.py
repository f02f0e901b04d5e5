"""What `thinpool diff` tells of two devices: their sizes and identities, and the changed ranges, a page at a time.

In: pages with a JSON form, the whole of a comparison out of its pages. Out: finding the changes (`delta.py`), printing
them (`cli/diffing.py`).

A page holds a bounded number of ranges and says where the next one begins, so that neither side ever holds a million
ranges in one message. Between two pages a device that is in use may change; two snapshots do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metadata import PoolMetadata

    from .catalog_rows import CatalogEntry

RANGES_PER_PAGE = 1 << 15
# Names of the states in JSON and in `--map`; the numbers are those of `delta.Change`.
STATE_NAMES = {0: "same", 1: "data", 2: "hole"}


@dataclass(frozen=True, slots=True)
class ComparedDevice:
    """One side of a comparison."""

    name: str
    size_bytes: int
    uuid: str
    content_id: str | None


@dataclass(frozen=True, slots=True)
class DiffPage:
    """Ranges (offset_bytes, length_bytes, state) of `new`, ascending; `next_bytes` is None on the last page."""

    old: ComparedDevice
    new: ComparedDevice
    block_bytes: int
    ranges: list[tuple[int, int, int]]
    next_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object, sizes as integers."""
        # Not asdict of the page: it would copy every range three times over.
        return {
            "old": asdict(self.old),
            "new": asdict(self.new),
            "block_bytes": self.block_bytes,
            "ranges": self.ranges,
            "next_bytes": self.next_bytes,
        }


def compare(
    metadata: PoolMetadata, old: CatalogEntry, new: CatalogEntry, block_bytes: int, begin_bytes: int = 0
) -> DiffPage:
    """One page of the comparison. The caller keeps the metadata from changing. Raises MetadataError, OSError."""
    from .delta import joined

    end = -(-new.size_bytes // block_bytes)
    begin = min(max(begin_bytes, 0) // block_bytes, end)
    ranges: list[tuple[int, int, int]] = []
    following: int | None = None
    found = metadata.differences(old.device_id, new.device_id, begin, end)
    for changed in joined(found, block_bytes, new.size_bytes):
        if len(ranges) == RANGES_PER_PAGE:
            following = changed.offset_bytes
            break
        ranges.append((changed.offset_bytes, changed.length_bytes, int(changed.change)))
    return DiffPage(_side(old), _side(new), block_bytes, ranges, following)


def _side(entry: CatalogEntry) -> ComparedDevice:
    return ComparedDevice(entry.name, entry.size_bytes, entry.uuid, entry.content_id)


def all_pages(ask: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield page after page, as JSON; `ask` gets the offset a page begins at."""
    begin: int | None = 0
    while begin is not None:
        page = ask(begin)
        yield page
        begin = page["next_bytes"]


def with_same(ranges: Iterator[tuple[int, int, int]], size_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Fill the gaps between changed ranges with the state `same`, up to the end of the device."""
    position = 0
    for offset, length, state in ranges:
        if offset > position:
            yield position, offset - position, 0
        yield offset, length, state
        position = offset + length
    if position < size_bytes:
        yield position, size_bytes - position, 0

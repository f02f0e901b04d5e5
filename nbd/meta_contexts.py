"""Which meta contexts an export has, and how queries name them.

In: the name space `base:allocation`, `qemu:allocation-depth`, `qemu:dirty-bitmap:<x>`, the wildcards of
listing, and the mapping from a device's extents to status values. Out: option framing (`options`), reply
framing (`replies`).
"""

from collections.abc import Iterator, Sequence

from .constants import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP_PREFIX, AllocationState
from .device import EXTENT_EXCLUSIVE, EXTENT_HOLE, EXTENT_SHARED, Export, Extents

_QEMU = "qemu:"

# Values of the two allocation contexts by kind of extent. A block that is shared with a snapshot is not a
# hole, yet the first write to it needs space: documented as the exception that the specification allows.
_ALLOCATION = {
    EXTENT_HOLE: int(AllocationState.HOLE | AllocationState.ZERO),
    EXTENT_EXCLUSIVE: 0,
    EXTENT_SHARED: 0,
}
_DEPTH = {EXTENT_HOLE: 0, EXTENT_EXCLUSIVE: 1, EXTENT_SHARED: 2}


def available(export: Export) -> Iterator[str]:
    """Yield every context of the export that may be selected."""
    yield BASE_ALLOCATION
    yield ALLOCATION_DEPTH
    for name in export.dirty_contexts():
        yield DIRTY_BITMAP_PREFIX + name


def listed(export: Export, queries: Sequence[str]) -> Iterator[str]:
    """Yield the contexts that LIST_META_CONTEXT shows, each once; no queries means all.

    A query may be a wildcard: `base:`, `qemu:` and `qemu:dirty-bitmap:`. Unknown name spaces, unknown leaves
    and queries without a colon match nothing.
    """
    wanted = set(queries)
    for name in available(export):
        if not queries or not wanted.isdisjoint(_names_of(name)):
            yield name


def selected(export: Export, queries: Sequence[str]) -> list[str]:
    """Return the contexts that SET_META_CONTEXT selects: exact names only, each once, in the order asked for."""
    known = set(available(export)) if queries else set()
    return [name for name in dict.fromkeys(queries) if name in known]


def _names_of(context: str) -> Iterator[str]:
    yield context
    yield context[: context.index(":") + 1]
    if context.startswith(DIRTY_BITMAP_PREFIX):
        yield DIRTY_BITMAP_PREFIX


def is_dirty_bitmap(context: str) -> bool:
    """Return whether the context is answered by `Session.dirty`."""
    return context.startswith(DIRTY_BITMAP_PREFIX)


def dirty_bitmap_name(context: str) -> str:
    """Return the leaf of a dirty-bitmap context."""
    return context[len(DIRTY_BITMAP_PREFIX) :]


def allocation_status(context: str, extents: Extents) -> Extents:
    """Translate (length, kind) into (length, status) for one of the two allocation contexts."""
    values = _DEPTH if context == ALLOCATION_DEPTH else _ALLOCATION
    assert context.startswith((BASE_ALLOCATION, _QEMU))
    return [(length, values[kind]) for length, kind in extents]

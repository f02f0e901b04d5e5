"""What a pull need not fetch: the base that pool and store both have, and the blocks in which two snapshots differ.

In: finding the base, comparing two manifests, a device that begins as a snapshot of the base. Out: fetching
(`lazy_device.py`, `hydration.py`), beginning and ending of pulls (`lazy_devices.py`).

Manifests list segments by what they hold, and segments list chunks so; equal names are equal content. So only segments
that differ are read, and only blocks in which a chunk differs are fetched.

The device begins hidden, as everything does that arrives: a snapshot of its base, at its own size. There the blocks
that differ are unmapped, and this is committed. Only then, in one step, the row gets its name and the list of remote
blocks: in such a device a block that is mapped is taken for newer than the store's, and what the base had there is not.
A kill before leaves a hidden device that the next pull drops, one after it a device that goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitarray import bitarray

from .errors import BaseNotStored, NoSuchDevice
from .store.fetching import read_segments
from .store.keys import CHUNK_BYTES
from .store.segments import SEGMENT_CHUNKS

if TYPE_CHECKING:
    from .catalog import CatalogEntry
    from .pool import Pool
    from .receiving_state import Wanted
    from .store.manifests import Manifest
    from .store.segments import Segment
    from .store.store import Store

SEGMENTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class PullBase:
    """A device of the pool by its name and content, and the snapshot in the store that holds the same."""

    name: str
    content_id: str
    manifest: Manifest


def find_base(pool: Pool, store: Store, name: str) -> PullBase:
    """The base called `name` here, whatever it is called there.

    Raises NoSuchDevice, BaseNotStored, DeviceIncomplete, the store's errors.
    """
    entry = pool.catalog.by_name(name)
    if entry is None or entry.receiving is not None:
        raise NoSuchDevice(name, str(pool.location))
    pool.lazy.require_whole(entry)
    if entry.content_id is None:
        raise BaseNotStored(name, store.url, changed=True)
    manifest = store.find_snapshot(name)
    if manifest is None or manifest.about.device != entry.content_id:
        stored = [about.name for about in store.descriptions() if about.device == entry.content_id]
        manifest = store.find_snapshot(stored[0]) if stored else None
    if manifest is None:
        raise BaseNotStored(name, store.url)
    return PullBase(name, entry.content_id, manifest)


def differing_blocks(store: Store, old: Manifest, new: Manifest, block_bytes: int) -> bitarray:
    """A bit for every block of the new snapshot, set where some chunk is not what it was. Raises the store's errors."""
    blocks = -(-new.about.size_bytes // block_bytes)
    bits = bitarray(blocks, endian="little")
    bits.setall(0)
    numbers = [
        number
        for number in sorted(old.segments.keys() | new.segments.keys())
        if old.segments.get(number) != new.segments.get(number)
    ]
    for first in range(0, len(numbers), SEGMENTS_AT_ONCE):
        some = numbers[first : first + SEGMENTS_AT_ONCE]
        before, after = (
            read_segments(store, manifest, [number for number in some if number in manifest.segments])
            for manifest in (old, new)
        )
        for number in some:
            for position in _differing_chunks(before.get(number), after.get(number)):
                block = (number * SEGMENT_CHUNKS + position) * CHUNK_BYTES // block_bytes
                if block < blocks:
                    bits[block] = 1
    return bits


def _differing_chunks(before: Segment | None, after: Segment | None) -> Iterator[int]:
    old = {} if before is None else before.chunks
    new = {} if after is None else after.chunks
    for position in old.keys() | new.keys():
        was, is_now = old.get(position), new.get(position)
        if was is None or is_now is None or was.name != is_now.name:
            yield position


@contextmanager
def begun_from_base(pool: Pool, wanted: Wanted, differing: bitarray) -> Iterator[CatalogEntry]:
    """The hidden device, claimed and durable, with nothing mapped where it differs. Dropped where the body fails.

    Raises as `Transfers.begin`, MetadataFull, what a commit raises.
    """
    transfers = pool.transfers
    with pool.engine.transaction:
        hidden = transfers.claim(transfers.begin(wanted))
    try:
        with transfers.writing(hidden) as session:
            for begin, end in _runs(differing):
                at, limit = (min(block * pool.block_bytes, wanted.size_bytes) for block in (begin, end))
                session.trim(at, limit - at)
        settle(pool)
        yield hidden
    except Exception:
        transfers.unclaim(hidden)
        if transfers.partial(wanted.name) is not None:
            transfers.abort(wanted.name)
        raise
    finally:
        transfers.unclaim(hidden)


def settle(pool: Pool) -> None:
    """What was unmapped must be so durably before anybody takes what is mapped for newer than the store."""
    pool.commit()


def _runs(bits: bitarray) -> Iterator[tuple[int, int]]:
    begin = bits.find(1)
    while begin >= 0:
        end = bits.find(0, begin)
        end = len(bits) if end < 0 else end
        yield begin, end
        begin = bits.find(1, end)

"""Building trees from sorted entries, bottom up, equal nodes stored once.

In: cutting entries into leaves, writing leaves and inner nodes, counting who refers to whom. Out: which trees a pool
has and what their values mean (pool_build).

Theory of operation. Entries arrive in order; whole leaves are cut off as soon as enough have come. Where to cut is
decided by the keys themselves: within the allowed sizes the cut falls before the key whose hash is smallest. So two
devices with mostly equal mappings get equal leaves again soon after each difference, as snapshots of one another
have, however the mappings came to be equal. A leaf with the same content as one written before is that leaf; its
parent gains a reference. Inner nodes are cut by the same rule and shared in the same way, up to whole trees.
Nothing is ever rewritten, blocks are handed out in ascending order and written in large pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from .checksum import BlockKind, raw_sum
from .errors import MetadataFull
from .layout import (
    BLOCK_BYTES,
    METADATA_BLOCKS_MAX,
    NODE_HEADER_BYTES,
    NODE_LEAF,
    VALUE_TYPES,
    U32Array,
    U64Array,
    ValueArray,
)
from .node import CAPACITY, make_internal
from .node_batch import HEADER
from .store import BlockStore

_WRITE_BYTES = 4 << 20
# Entries collected before leaves are cut off: enough to encode many at once.
_CUT_ENTRIES = 1 << 16
# Knuth's multiplier for 64 bits; any odd number with mixed bits would do.
_HASH = np.uint64(0x9E3779B97F4A7C15)


class BlockSink:
    """Writes new blocks one after another and counts references to them."""

    def __init__(self, store: BlockStore, first: int) -> None:
        self._store = store
        self.size_blocks = min(store.size_blocks(), METADATA_BLOCKS_MAX)
        self._next = first
        self._waiting = bytearray()
        self._references: U32Array = np.zeros(1 << 12, np.uint32)

    @property
    def used_blocks(self) -> int:
        """Blocks below this number have been handed out."""
        return self._next

    def references(self) -> U32Array:
        """References to each block handed out, shape (used_blocks,)."""
        return self._references[: self._next]

    def refer(self, locations: U64Array) -> None:
        """One more reference to each of these blocks, which may repeat."""
        np.add.at(self._references, locations.astype(np.int64), 1)

    def location(self) -> int:
        """Where the next block will be."""
        return self._next

    def append(self, blocks: bytes | bytearray) -> int:
        """Write whole blocks at `location()`; returns the first one's place. Raises MetadataFull, OSError."""
        first = self._next
        self._take(len(blocks) // BLOCK_BYTES)
        self._waiting += blocks
        if len(self._waiting) >= _WRITE_BYTES:
            self.flush()
        return first

    def _take(self, count: int) -> None:
        if self._next + count > self.size_blocks:
            raise MetadataFull(count, self.size_blocks - self._next, 0)
        self._next += count
        if self._next > len(self._references):
            grown = np.zeros(max(2 * len(self._references), self._next), np.uint32)
            grown[: len(self._references)] = self._references
            self._references = grown

    def flush(self) -> None:
        """Hand everything to the store. Raises OSError."""
        if self._waiting:
            self._store.write(self._next - len(self._waiting) // BLOCK_BYTES, self._waiting)
            self._waiting = bytearray()


class TreeBuilder:
    """Builds trees with values of one size, one after another, sharing equal nodes among them.

    `on_leaf_values` is called with the values of leaves that are really written: each is one reference to whatever
    the values name.
    """

    def __init__(
        self,
        sink: BlockSink,
        value_bytes: int,
        on_leaf_values: Callable[[ValueArray], None] = lambda _: None,
    ) -> None:
        self._sink = sink
        self._value_bytes = value_bytes
        self._on_leaf_values = on_leaf_values
        self._known: dict[bytes, int] = {}
        self._reset()

    def _reset(self) -> None:
        self._keys: list[U64Array] = []
        self._values: list[ValueArray] = []
        self._waiting = 0
        self._leaf_keys: list[int] = []
        self._leaf_places: list[int] = []
        self.entries = 0

    def add(self, keys: U64Array, values: ValueArray) -> None:
        """Further entries, ascending and above all before. Raises MetadataFull, OSError."""
        self._keys.append(keys)
        self._values.append(values)
        self._waiting += len(keys)
        self.entries += len(keys)
        if self._waiting >= _CUT_ENTRIES:
            self._cut_leaves(last=False)

    def finish(self) -> int:
        """Complete the tree; returns its root, to which no reference was counted yet. Raises MetadataFull, OSError."""
        self._cut_leaves(last=True)
        keys, places = self._leaf_keys, self._leaf_places
        while len(places) > 1:
            keys, places = self._inner_level(keys, places)
        root = places[0]
        self._reset()
        return root

    def _cut_leaves(self, *, last: bool) -> None:
        keys = np.concatenate([np.empty(0, np.uint64), *self._keys])
        values = np.concatenate([np.empty(0, VALUE_TYPES[self._value_bytes]), *self._values])
        cuts = cut_points(keys, CAPACITY[self._value_bytes], last=last)
        if last and not self._leaf_places and not cuts:
            cuts = [0]  # an empty tree is one empty leaf
        begin = 0
        fresh: list[tuple[int, int]] = []
        for end in cuts:
            content = keys[begin:end].tobytes() + values[begin:end].tobytes()
            digest = hashlib.blake2b(content, digest_size=16).digest()
            place = self._known.get(digest)
            if place is None:
                place = self._known[digest] = self._sink.location() + len(fresh)
                fresh.append((begin, end))
            self._leaf_keys.append(int(keys[begin]) if end > begin else 0)
            self._leaf_places.append(place)
            begin = end
        if fresh:
            self._write_leaves(keys, values, fresh)
        self._keys, self._values, self._waiting = [keys[begin:]], [values[begin:]], len(keys) - begin

    def _write_leaves(self, keys: U64Array, values: ValueArray, spans: list[tuple[int, int]]) -> None:
        begins, ends = (np.array(column, np.int64) for column in zip(*spans, strict=True))
        # The spans' entries one after another; equal leaves in between were left out.
        chosen = np.repeat(begins - np.append(0, np.cumsum(ends - begins)[:-1]), ends - begins)
        chosen += np.arange(len(chosen))
        blocks = encode_leaves(keys[chosen], values[chosen], ends - begins, self._sink.location())
        self._sink.append(blocks)
        self._on_leaf_values(values[chosen])

    def _inner_level(self, keys: list[int], places: list[int]) -> tuple[list[int], list[int]]:
        all_keys, children = np.array(keys, np.uint64), np.array(places, np.uint64)
        above_keys: list[int] = []
        above_places: list[int] = []
        begin = 0
        for end in cut_points(all_keys, CAPACITY[8], last=True):
            part = slice(begin, end)
            content = b"inner" + all_keys[part].tobytes() + children[part].tobytes()
            digest = hashlib.blake2b(content, digest_size=16).digest()
            place = self._known.get(digest)
            if place is None:
                node = make_internal(all_keys[part], children[part])
                place = self._known[digest] = self._sink.append(node.encode(self._sink.location()))
                self._sink.refer(children[part])
            above_keys.append(int(all_keys[begin]))
            above_places.append(place)
            begin = end
        return above_keys, above_places


def cut_points(keys: U64Array, capacity: int, *, last: bool) -> list[int]:
    """Ends of the nodes that ascending keys are divided into.

    Each node gets between three quarters of `capacity` and all of it. `last`: the keys end here, the final nodes may be
    smaller, but none below a third unless it is the only one. Otherwise keys that might still be cut differently are
    left over.
    """
    least = capacity * 3 // 4
    minimum = capacity // 3
    hashes = keys * _HASH
    cuts: list[int] = []
    begin, count = 0, len(keys)
    # What follows must be known for two nodes ahead, or the sizes at the very end could depend on the pieces given.
    while count - begin >= (capacity + 1 if last else 2 * capacity):
        most = min(capacity, count - begin - minimum)
        low = min(least, most)
        begin += low + int(hashes[begin + low : begin + most + 1].argmin())
        cuts.append(begin)
    if last and begin < count:
        cuts.append(count)
    return cuts


def encode_leaves(keys: U64Array, values: ValueArray, counts: np.ndarray, first: int) -> bytearray:
    """Leaves of standard capacity for consecutive blocks from `first`; `counts` entries go to each."""
    value_bytes = values.dtype.itemsize
    capacity = CAPACITY[value_bytes]
    blocks = bytearray(len(counts) * BLOCK_BYTES)
    matrix = np.frombuffer(blocks, np.uint8).reshape(-1, BLOCK_BYTES)
    header = np.zeros(len(counts), HEADER)
    header["flags"] = NODE_LEAF
    header["location"] = np.arange(first, first + len(counts))
    header["count"] = counts
    header["capacity"] = capacity
    header["value_bytes"] = value_bytes
    matrix[:, :NODE_HEADER_BYTES] = header.view(np.uint8).reshape(-1, NODE_HEADER_BYTES)
    used = np.arange(capacity) < counts[:, np.newaxis]
    values_at = NODE_HEADER_BYTES + 8 * capacity
    matrix[:, NODE_HEADER_BYTES:values_at].view("<u8")[used] = keys
    area = matrix[:, values_at : values_at + value_bytes * capacity]
    area.view(values.dtype)[used] = values
    view = memoryview(blocks)
    sums = [
        raw_sum(view[offset : offset + BLOCK_BYTES]) ^ BlockKind.NODE
        for offset in range(0, len(blocks), BLOCK_BYTES)
    ]
    matrix[:, :4] = np.array(sums, "<u4").view(np.uint8).reshape(-1, 4)
    return blocks

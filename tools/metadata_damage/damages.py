"""The damage generator: from a seed to a damaged image, the same every time.

In: bit flips, zeroed, swapped, misdirected and stale blocks, cut trees, truncated files, each with checksums as they
fall or computed anew; one to three at once. Out: what is done with the image (judgement).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from metadata.checksum import BlockKind, seal, sniff
from metadata.node import decode_node

from .specimen import BLOCK_BYTES, Specimen

STRUCTURES = ("mappings", "mappings", "list of roots", "records", "space maps", "superblock")


@dataclass
class Damaged:
    """A damaged image. `kinds`: what was done. `resealed`: checksums were computed anew. `blocks`: which changed."""

    seed: int
    image: bytearray
    kinds: list[str] = field(default_factory=list)
    resealed: bool = False
    blocks: set[int] = field(default_factory=set)

    def block(self, location: int) -> bytes:
        return bytes(self.image[location * BLOCK_BYTES : (location + 1) * BLOCK_BYTES])

    def put(self, location: int, block: bytes, kind: BlockKind | None) -> None:
        """Write a block, sealed as `kind` where checksums are computed anew."""
        if self.resealed and kind is not None:
            block = seal(bytearray(block), kind, location)
        if block != self.block(location):
            self.blocks.add(location)
            self.image[location * BLOCK_BYTES : (location + 1) * BLOCK_BYTES] = block


def damage(specimen: Specimen, seed: int) -> Damaged:
    """Return the image that belongs to a seed; at least one block differs."""
    choice = random.Random(seed)
    while True:
        made = Damaged(seed, bytearray(specimen.image), resealed=choice.random() < 0.5)
        drawn = [choice.choice(list(KINDS)) for _ in range(choice.choice((1, 1, 1, 2, 3)))]
        for kind in sorted(
            drawn, key=lambda name: name == "truncated file"
        ):  # what is cut off cannot be damaged
            made.kinds.append(kind)
            KINDS[kind](made, specimen, choice)
        if made.blocks:
            return made


def _pick(specimen: Specimen, choice: random.Random) -> int:
    return choice.choice(specimen.used[choice.choice(STRUCTURES)])


def _flip(made: Damaged, specimen: Specimen, choice: random.Random) -> None:
    location = _pick(specimen, choice)
    kind = sniff(made.block(location))
    block = bytearray(made.block(location))
    for _ in range(choice.choice((1, 1, 2, 8))):
        place = choice.choice((choice.randrange(BLOCK_BYTES), choice.randrange(64), choice.randrange(400)))
        block[place] ^= 1 << choice.randrange(8)
    made.put(location, bytes(block), kind)


def _zero(made: Damaged, specimen: Specimen, choice: random.Random) -> None:
    location = _pick(specimen, choice)
    made.put(location, bytes(BLOCK_BYTES), sniff(made.block(location)))


def _swap(made: Damaged, specimen: Specimen, choice: random.Random) -> None:
    one, other = _pick(specimen, choice), _pick(specimen, choice)
    first, second = made.block(one), made.block(other)
    made.put(one, second, sniff(second))
    made.put(other, first, sniff(first))


def _misdirect(made: Damaged, specimen: Specimen, choice: random.Random) -> None:
    block = made.block(_pick(specimen, choice))
    made.put(_pick(specimen, choice), block, sniff(block))


def _stale(made: Damaged, specimen: Specimen, choice: random.Random) -> None:
    """A write that never arrived: the block as it was at an earlier commit."""
    start = choice.randrange(len(specimen.history))
    places = [block for blocks in specimen.used.values() for block in blocks]
    choice.shuffle(places)
    for location in places:
        before = specimen.history[start][location * BLOCK_BYTES : (location + 1) * BLOCK_BYTES]
        if before != made.block(location):
            made.put(location, before, sniff(before))
            return


def _cut(made: Damaged, specimen: Specimen, choice: random.Random) -> None:
    """A tree loses an entry of one of its nodes, or the entry leads somewhere else."""
    trees = [*specimen.used["list of roots"], *specimen.used["mappings"], *specimen.used["records"]]
    choice.shuffle(trees)
    for location in trees:
        try:
            node = decode_node(made.block(location), location)
        except Exception:
            continue
        if len(node.keys) < 2 or (node.leaf and location in specimen.used["mappings"]):
            continue
        place = choice.randrange(len(node.keys))
        keys, values = node.keys.copy(), node.values.copy()
        if choice.random() < 0.5 or values.dtype.itemsize != 8:
            keep = [number for number in range(len(keys)) if number != place]
            keys, values = keys[keep], values[keep]
        else:
            values[place] = choice.randrange(len(made.image) // BLOCK_BYTES)
        block = type(node)(node.leaf, keys, values, node.capacity).encode(location)
        made.put(
            location,
            bytes(block) if made.resealed else _with_sum_of(made.block(location), block),
            BlockKind.NODE,
        )
        return


def _with_sum_of(before: bytes, block: bytes) -> bytes:
    return before[:4] + block[4:]


def _truncate(made: Damaged, specimen: Specimen, choice: random.Random) -> None:
    used = [block for blocks in specimen.used.values() for block in blocks]
    keep = choice.randrange(1, max(used) + 1)
    if keep * BLOCK_BYTES < len(made.image):
        made.blocks.update(range(keep, len(made.image) // BLOCK_BYTES))
        del made.image[keep * BLOCK_BYTES :]


Damage = Callable[[Damaged, Specimen, random.Random], None]
KINDS: dict[str, Damage] = {
    "bit flips": _flip,
    "zeroed block": _zero,
    "swapped blocks": _swap,
    "misdirected write": _misdirect,
    "stale block": _stale,
    "cut tree": _cut,
    "truncated file": _truncate,
}

"""What a thin device holds, in plain dictionaries: the rules of dm-thin for writes, zeros, discards and new sizes.

In: content and allocation of one device, what a kill may leave of them, what a snapshot in a store makes of them. Out:
real pools (`travel_hosts.py`).

A block that is written is a new object each time, so two models share exactly the objects whose mappings two devices of
one pool share; that is how the model knows what an increment may read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from thinpool.store.keys import CHUNK_BYTES


class ModelDevice:
    """`blocks` are the mapped ones by number, each of full length; what lies behind the end of the device is kept."""

    def __init__(self, size_bytes: int, block_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.block_bytes = block_bytes
        self.blocks: dict[int, bytes] = {}
        # What the content in the store was when a lazy device was pulled; blocks that were not fetched yet are that.
        self.remote: dict[int, bytes] = {}
        # All states of a block since the last commit that is known of, the oldest first; None is unmapped.
        self._past: dict[int, list[bytes | None]] = {}

    @classmethod
    def pulled(cls, source: ModelDevice, block_bytes: int) -> ModelDevice:
        """What a pull makes of a snapshot: a block is mapped where any chunk of it was."""
        made = cls(source.size_bytes, block_bytes)
        for chunk, content in source.chunks():
            number, inside = divmod(chunk * CHUNK_BYTES, block_bytes)
            old = made.blocks.get(number) or bytes(block_bytes)
            made.blocks[number] = _fresh(old[:inside] + content + old[inside + CHUNK_BYTES :])
        made.remote = dict(made.blocks)
        return made

    def copy(self) -> ModelDevice:
        """A snapshot or clone."""
        made = ModelDevice(self.size_bytes, self.block_bytes)
        made.blocks, made.remote = dict(self.blocks), dict(self.remote)
        return made

    # --- looking ---

    def read(self, offset: int, length: int) -> bytes:
        """Content, holes as zeros."""
        parts = []
        while length:
            number, inside = divmod(offset, self.block_bytes)
            piece = min(self.block_bytes - inside, length)
            block = self.blocks.get(number)
            parts.append(bytes(piece) if block is None else block[inside : inside + piece])
            offset, length = offset + piece, length - piece
        return b"".join(parts)

    def inside(self, number: int) -> int:
        """How many bytes of a block lie inside the device."""
        return min(self.block_bytes, self.size_bytes - number * self.block_bytes)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Chunks that are mapped and inside the device, with zeros behind its end."""
        for number, block in sorted(self.blocks.items()):
            for at in range(0, self.inside(number), CHUNK_BYTES):
                content = block[at : min(at + CHUNK_BYTES, self.inside(number))]
                yield (
                    (number * self.block_bytes + at) // CHUNK_BYTES,
                    content + bytes(CHUNK_BYTES - len(content)),
                )

    def changed_since(self, base: ModelDevice) -> set[int]:
        """Blocks whose mappings differ, and those that an end of either device cuts."""
        numbers = {*self.blocks, *base.blocks}
        changed = {number for number in numbers if self.blocks.get(number) is not base.blocks.get(number)}
        if self.size_bytes != base.size_bytes:
            changed |= {self.size_bytes // self.block_bytes, base.size_bytes // self.block_bytes}
        return changed

    # --- changing ---

    def _set(self, number: int, content: bytes | None) -> None:
        self._past.setdefault(number, [self.blocks.get(number)]).append(content)
        if content is None:
            self.blocks.pop(number, None)
        else:
            self.blocks[number] = content

    def write(self, offset: int, data: bytes) -> None:
        """Every block of the range is mapped afterwards."""
        position = 0
        while position < len(data):
            number, inside = divmod(offset + position, self.block_bytes)
            piece = min(self.block_bytes - inside, len(data) - position)
            old = self.blocks.get(number) or bytes(self.block_bytes)
            self._set(
                number, _fresh(old[:inside] + data[position : position + piece] + old[inside + piece :])
            )
            position += piece

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        limit = offset + length
        last = limit // self.block_bytes
        if limit == self.size_bytes:
            last = -(-limit // self.block_bytes)
        return -(-offset // self.block_bytes), last

    def trim(self, offset: int, length: int) -> None:
        """Whole blocks go, the last one of the device also where it is a partial one; nothing else happens."""
        begin, end = self._whole(offset, length)
        for number in [number for number in self.blocks if begin <= number < end]:
            self._set(number, None)

    def zero(self, offset: int, length: int, *, keep: bool) -> None:
        """Zeros: kept allocated everywhere, or whole blocks unmapped and mapped edges written."""
        if keep:
            self.write(offset, bytes(length))
            return
        begin, end = self._whole(offset, length)
        low, high = begin * self.block_bytes, end * self.block_bytes
        limit = offset + length
        for first, last in ((offset, min(low, limit)), (max(high, low), limit)):
            if first < last and first // self.block_bytes in self.blocks:
                self.write(first, bytes(last - first))
        self.trim(offset, length)

    def resize(self, size_bytes: int) -> None:
        """Blocks behind a nearer end go; what the last block holds behind the end is cleared before it is seen."""
        number, inside = divmod(self.size_bytes, self.block_bytes)
        tail = self.blocks.get(number, b"")[inside:]
        if size_bytes >= self.size_bytes and inside and tail.count(0) != len(tail):
            self.write(self.size_bytes, bytes(len(tail)))
        self.size_bytes = size_bytes
        end = -(-size_bytes // self.block_bytes)
        for gone in [number for number in self.blocks if number >= end]:
            self._set(gone, None)
        self._past = {number: past for number, past in self._past.items() if number < end}

    # --- kills ---

    def settle(self) -> None:
        """The pool has committed: what is there now survives a kill."""
        self._past.clear()

    def survives_as(self, found: dict[int, bytes]) -> None:
        """A kill left `found`: each block is as it is, or as it was at some time since the last commit.

        Raises AssertionError for anything else; the model is what was found afterwards.
        """
        for number in {*found, *self.blocks, *self._past}:
            now = found.get(number)
            states = [*self._past.get(number, []), self.blocks.get(number)]
            length = self.inside(number)
            assert any(
                (now is None) == (state is None) and (now or b"")[:length] == (state or b"")[:length]
                for state in states
            ), f"block {number} came out of a kill as it never was"
            if now is None:
                self.blocks.pop(number, None)
            elif now[:length] != (self.blocks.get(number) or b"")[:length]:
                self.blocks[number] = now
        self.settle()


def _fresh(content: bytes) -> bytes:
    """An object of its own, where Python would give out one that there is."""
    return bytes(bytearray(content))


def blocks_in(ranges: Iterable[tuple[int, int]], unit_bytes: int) -> set[int]:
    """Numbers of all blocks that (offset, length) ranges touch."""
    return {
        number
        for offset, length in ranges
        for number in range(offset // unit_bytes, -(-(offset + length) // unit_bytes))
    }

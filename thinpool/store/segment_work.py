"""What a push does to single segments: ranges of a device, cut at the borders of segments and grouped by them.

In: from ranges to positions. Out: storing them (`pushing.py`), what a segment is (`segments.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from .keys import CHUNK_BYTES
from .segments import SEGMENT_CHUNKS


@dataclass(frozen=True, slots=True)
class SegmentWork:
    """Positions of one segment to store anew, and to empty."""

    number: int
    fresh: tuple[tuple[int, int], ...]
    gone: tuple[tuple[int, int], ...]


def segment_work(ranges: Iterable[tuple[int, int, bool]]) -> Iterator[SegmentWork]:
    """Cut ranges of a device at the borders of segments, and group them."""

    def pieces() -> Iterator[tuple[int, int, int, bool]]:
        for offset, length, is_data in ranges:
            chunk, end = offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES)
            while chunk < end:
                number, position = divmod(chunk, SEGMENT_CHUNKS)
                count = min(end - chunk, SEGMENT_CHUNKS - position)
                yield number, position, position + count, is_data
                chunk += count

    for number, group in groupby(pieces(), key=lambda piece: piece[0]):
        found = list(group)
        yield SegmentWork(
            number,
            tuple(_united((begin, end) for _, begin, end, is_data in found if is_data)),
            tuple((begin, end) for _, begin, end, is_data in found if not is_data),
        )


def merged(left: Iterable[SegmentWork], right: Iterable[SegmentWork]) -> list[SegmentWork]:
    """The work of both, by segment; what one empties the other does not fill."""
    result = {work.number: work for work in left}
    for work in right:
        mine = result.get(work.number)
        if mine is None:
            result[work.number] = work
            continue
        taken = {p for begin, end in (*mine.fresh, *mine.gone) for p in range(begin, end)}
        extra = [p for begin, end in work.fresh for p in range(begin, end) if p not in taken]
        fresh = (*mine.fresh, *spans(extra))
        result[work.number] = SegmentWork(work.number, tuple(sorted(fresh)), mine.gone)
    return [result[number] for number in sorted(result)]


def _united(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans in ascending order as spans that neither overlap nor touch: nothing is read twice."""
    low = high = 0
    for begin, end in spans:
        if low < high and begin <= high:
            high = max(high, end)
            continue
        if low < high:
            yield low, high
        low, high = begin, end
    if low < high:
        yield low, high


def spans(positions: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive positions."""
    for _, group in groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0]):
        run = [position for _, position in group]
        yield run[0], run[-1] + 1

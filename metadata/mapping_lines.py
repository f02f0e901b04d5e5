"""Lines of mappings in a dump, read by the hundred thousand instead of one by one.

In: telling lines in exactly the form thin_dump writes from all other text, and their numbers as arrays.
Out: everything else of the XML (xml).

A line counts only if it is `    <single_mapping origin_block="N" data_block="N" time="N"/>` or the like for a range,
to the byte. That is verified for a whole block of lines at once: without their digits the lines must be the two
templates in the right order, and all digits must stand between quotes. Anything else is left to the XML parser.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .layout import U8Array, U64Array

_SINGLE = b'    <single_mapping origin_block="" data_block="" time=""/>\n'
_RANGE = b'    <range_mapping origin_begin="" data_begin="" length="" time=""/>\n'
# Numbers in a line; as bytes these do not occur in the text.
_SINGLE_NUMBERS, _RANGE_NUMBERS = 3, 4
# The place of the first letter, which tells the two apart.
_KIND_AT = 5
_LINE_BYTES_MIN = len(_SINGLE) + _SINGLE_NUMBERS
# Longer numbers might not fit 64 bits; the XML parser's path judges them.
_DIGITS_MAX = 19
# Fewer lines than this are not worth the effort.
_LINES_MIN = 8


@dataclass(frozen=True, slots=True)
class MappingLines:
    """Consecutive lines; all arrays have shape (lines,), uint64."""

    begins: U64Array
    data_begins: U64Array
    lengths: U64Array
    times: U64Array

    @property
    def lines(self) -> int:
        """How many lines these were."""
        return len(self.begins)


def split_mapping_lines(text: bytes) -> Iterator[MappingLines | bytes]:
    """The text in order, blocks of mapping lines read, everything in between as it is."""
    data = np.frombuffer(text, np.uint8)
    line_ends = np.flatnonzero(data == ord("\n"))
    starts = np.concatenate([[0], line_ends + 1])[:-1]
    kinds = _kinds(data, starts, line_ends)
    bounds = [0, *(np.flatnonzero(np.diff(kinds != 0)) + 1).tolist(), len(kinds)]
    done = 0
    for first, stop in pairwise(bounds):
        if stop - first < _LINES_MIN or not kinds[first]:
            continue
        begin, end = int(starts[first]), int(line_ends[stop - 1]) + 1
        lines = _read(text[begin:end], data[begin:end], kinds[first:stop])
        if lines is not None:
            if done < begin:
                yield text[done:begin]
            yield lines
            done = end
    if done < len(text):
        yield text[done:]


def _kinds(data: U8Array, starts: NDArray[np.int64], line_ends: NDArray[np.int64]) -> U8Array:
    """For each line how many numbers it would have as a mapping, 0 where it cannot be one."""
    long = line_ends - starts >= _LINE_BYTES_MIN - 1
    kinds = np.zeros(len(starts), np.uint8)
    places = starts[long]
    letters = data[places + _KIND_AT]
    found = np.select([letters == ord("s"), letters == ord("r")], [_SINGLE_NUMBERS, _RANGE_NUMBERS], 0)
    found[data[places + _KIND_AT - 1] != ord("<")] = 0
    kinds[long] = found
    return kinds


def _read(text: bytes, data: U8Array, kinds: U8Array) -> MappingLines | None:
    """The numbers of a block of lines; None when they are not exactly of the two forms."""
    digits = data - np.uint8(ord("0"))
    is_digit = digits <= 9
    expected = kinds.tobytes().replace(b"\x03", _SINGLE).replace(b"\x04", _RANGE)
    if data[~is_digit].tobytes() != expected:
        return None
    quotes = np.flatnonzero(data == ord('"'))
    begins = quotes[0::2] + 1
    lengths = quotes[1::2] - begins
    total_digits = len(text) - len(expected)
    if lengths.sum() != total_digits or lengths.min() == 0 or lengths.max() > _DIGITS_MAX:
        return None
    numbers = _numbers(digits, begins, lengths)
    counts = kinds.astype(np.int64)
    firsts = np.cumsum(counts) - counts
    run_lengths = np.where(kinds == _RANGE_NUMBERS, numbers[firsts + 2], np.uint64(1))
    return MappingLines(numbers[firsts], numbers[firsts + 1], run_lengths, numbers[firsts + counts - 1])


def _numbers(digits: U8Array, begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> U64Array:
    numbers = digits[begins].astype(np.uint64)
    open_ones = np.arange(len(begins))
    for place in range(1, int(lengths.max())):
        open_ones = open_ones[lengths[open_ones] > place]
        found = digits[begins[open_ones] + place].astype(np.uint64)
        numbers[open_ones] = numbers[open_ones] * np.uint64(10) + found
    return numbers

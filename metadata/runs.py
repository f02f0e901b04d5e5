"""Runs: mappings whose thin block and data block advance together and whose time is the same.

In: finding runs in arrays of mappings, carrying the open one over from one array to the next.
Out: where mappings come from, what runs are written as.

A packed mapping is data block << 24 | time. So a run goes on exactly where the key grows by 1 and the packed value
by 2**24: one comparison covers block and time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import TIME_BITS, TIME_LIMIT, U64Array

_STEP = np.uint64(1 << TIME_BITS)
_ONE = np.uint64(1)


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs in order; all arrays have shape (n,), uint64. `values` are the packed mappings they begin with."""

    begins: U64Array
    values: U64Array
    lengths: U64Array

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def data_begins(self) -> U64Array:
        """First data block of each run."""
        blocks: U64Array = self.values >> np.uint64(TIME_BITS)
        return blocks

    @property
    def times(self) -> U64Array:
        """Time stamp of each run."""
        times: U64Array = self.values & np.uint64(TIME_LIMIT - 1)
        return times


NO_RUNS = Runs(*(np.empty(0, np.uint64) for _ in range(3)))


def find_runs(keys: U64Array, values: U64Array) -> Runs:
    """The runs of mappings with ascending `keys`, which must not be empty."""
    broken = (keys[1:] - keys[:-1] != _ONE) | (values[1:] - values[:-1] != _STEP)
    starts = np.concatenate([[0], np.flatnonzero(broken) + 1])
    lengths = np.diff(np.append(starts, len(keys))).astype(np.uint64)
    return Runs(keys[starts], values[starts], lengths)


class RunMerger:
    """Turns a sequence of arrays of mappings into runs; the last run stays open until it cannot go on."""

    def __init__(self) -> None:
        self._open: tuple[int, int, int] | None = None

    def add(self, keys: U64Array, values: U64Array) -> Runs:
        """Take the next mappings; returns the runs that are complete now."""
        if not len(keys):
            return NO_RUNS
        return self.add_runs(find_runs(keys, values))

    def add_runs(self, runs: Runs) -> Runs:
        """As `add` for mappings already put together to runs (at least one)."""
        begins, values, lengths = runs.begins, runs.values, runs.lengths
        if self._open is not None:
            begin, value, length = self._open
            goes_on = int(begins[0]) == begin + length and int(values[0]) == value + (length << TIME_BITS)
            if goes_on:
                begins, values, lengths = begins.copy(), values.copy(), lengths.copy()
                begins[0], values[0], lengths[0] = begin, value, int(lengths[0]) + length
            else:
                first = np.array([begin, value, length], np.uint64)
                begins, values, lengths = (
                    np.concatenate([first[i : i + 1], array])
                    for i, array in enumerate((begins, values, lengths))
                )
        self._open = int(begins[-1]), int(values[-1]), int(lengths[-1])
        return Runs(begins[:-1], values[:-1], lengths[:-1])

    def finish(self) -> Runs:
        """The run still open, if any; the merger is then as new."""
        if self._open is None:
            return NO_RUNS
        rest = Runs(*(np.array([number], np.uint64) for number in self._open))
        self._open = None
        return rest

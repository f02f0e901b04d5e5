"""Contents, times and identities for scenarios that are the same in every run of a seed."""

from __future__ import annotations

import uuid
from random import Random

import numpy as np

STAMP = 0x7468696E706F6F6C  # "thinpool"


def stamp(device: int, number: int, first: int, count: int) -> bytes:
    """Sectors that say whose they are, which change wrote them, and where."""
    words = np.empty((count, 64), "<u8")
    words[:, 0::4] = STAMP
    words[:, 1::4] = device
    words[:, 2::4] = number
    words[:, 3::4] = np.arange(first, first + count, dtype=np.uint64)[:, None]
    return words.tobytes()


class Ticking:
    """`time` for the pool: later with every look, the same in every run."""

    def __init__(self) -> None:
        self._now = 1_000_000_000.0

    def time(self) -> float:
        self._now += 1.0
        return self._now


class Identities:
    """`uuid` for the pool: random to look at, the same in every run."""

    UUID, uuid5 = uuid.UUID, staticmethod(uuid.uuid5)

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def uuid4(self) -> uuid.UUID:
        return uuid.UUID(int=self._random.getrandbits(128), version=4)

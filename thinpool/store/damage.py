"""Bytes from a store that are not what was written there, before it is known which object they belong to."""

from __future__ import annotations


class DamagedError(Exception):
    """`reason` completes "it is damaged: ..."."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)

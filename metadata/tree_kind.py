"""What distinguishes the format's trees from one another: the type of their values and what those refer to.

In: the contract between trees and the owners of what values point at. Out: the trees' shape (btree*).
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import U64Array, ValueArray


@dataclass(frozen=True, slots=True)
class TreeKind:
    """A tree of plain values; subclasses count what their values refer to.

    `name` is for messages, `value_bytes` the size of a value on disk (4, 8, 16 or 24).
    """

    name: str
    value_bytes: int

    def share(self, values: ValueArray) -> None:
        """A leaf was copied and the original stays: each value is now held twice."""

    def release(self, values: ValueArray) -> None:
        """These values left the tree for good, or the leaf holding them did."""

    def exchange(self, old: ValueArray, new: ValueArray) -> None:
        """Values were overwritten, position by position."""

    def adopt(self, values: ValueArray) -> None:
        """New values were inserted under keys that were not there."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Keys and values of one leaf, or the part of it that lies in a wanted range."""

    keys: U64Array
    values: ValueArray

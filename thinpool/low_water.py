"""Marks that a fill level crosses on its way up: each tells once, and again only after the level fell below it.

In: one mark, its state. Out: what is done then (`space_watch.py`).
"""

from __future__ import annotations


class LowWaterMark:
    """A mark at some per cent of a size; 0 per cent is none."""

    def __init__(self) -> None:
        self._crossed = False

    def reached(self, used: int, size: int, percent: int) -> bool:
        """Whether the level is at the mark or above."""
        return percent > 0 and used * 100 >= size * percent

    def crossed(self, used: int, size: int, percent: int) -> bool:
        """Whether the level is at the mark now and was below it before."""
        if self.reached(used, size, percent):
            first, self._crossed = not self._crossed, True
            return first
        # A hundredth of the whole below the mark: a level that trembles at the mark is one crossing.
        if not percent or not used or used * 100 < size * (percent - 1):
            self._crossed = False
        return False

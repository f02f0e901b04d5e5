"""What a check found, for people and programs: whom each problem concerns, and what to do about it.

In: problems of the `metadata` package with the names of devices. Out: finding them, printing them (`cli/checking.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metadata import Affected, Fault, Problem, Severity

from .wording import iec, quoted

KEY_LIMIT = 1 << 64
# Devices named in one sentence; JSON has them all.
AFFECTED_SHOWN_MAX = 8

REPAIR = "`thinpool repair` makes a new pool of everything that can still be read and says what is lost"
AUTO_REPAIR = "`thinpool check --auto-repair` sets it right; no data is at risk"
RECOUNT = "`thinpool check --auto-repair` counts anew; until then do not use the pool, a block in use may be handed out"
UNREAD = "repair what cannot be read first, then check again"
ADVICE: Mapping[Fault, str] = {
    Fault.SUPERBLOCK: "`thinpool repair` with --data-block-size and --nr-data-blocks looks for the trees by themselves",
    Fault.FIELD: "is this the metadata of the pool, all of it, and not of a newer kernel? If so: " + REPAIR,
    Fault.HELD: "the pool itself is not affected; release the metadata snapshot, or " + REPAIR,
    Fault.UNVERIFIED: UNREAD,
    Fault.DATA_SHORT: "what lay beyond the end is lost: bring the file back from a copy, or lengthen it with "
    "`truncate`, and the lost blocks read zeros",
    Fault.SHARED_AS_OWN: "`thinpool check --auto-repair` sets the time; until then the kernel may overwrite snapshots",
}
HINT_OR_LEAK_ADVICE = AUTO_REPAIR
COUNT_FAULTS = (Fault.COUNT_LOW, Fault.NO_OVERFLOW)


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem in the words of the pool: names, bytes, advice."""

    problem: Problem
    names: Mapping[int, str]
    block_bytes: int

    @property
    def advice(self) -> str:
        """What to do about it."""
        fault = self.problem.fault
        if fault in ADVICE:
            return ADVICE[fault]
        if fault in COUNT_FAULTS:
            return RECOUNT
        return HINT_OR_LEAK_ADVICE if self.problem.severity < Severity.ERROR else REPAIR

    def lines(self) -> list[str]:
        """The problem for a terminal: what and where, whom it affects, what to do."""
        affects = self._affects()
        said = [str(self.problem)]
        if affects:
            said.append(f"  affects: {affects}")
        return [*said, f"  do: {self.advice}"]

    def _affects(self) -> str:
        shown = [self._affected(each) for each in self.problem.affects[:AFFECTED_SHOWN_MAX]]
        more = len(self.problem.affects) - len(shown)
        return "; ".join(shown) + (f"; and {more} more" if more else "")

    def _affected(self, affected: Affected) -> str:
        text = self._device(affected.device)
        if affected.held:
            text += " in the metadata snapshot"
        return f"{text}, {range_text(affected.begin, affected.end, self.block_bytes)}"

    def _device(self, device: int) -> str:
        name = self.names.get(device)
        return f"device {device}" if name is None else f"{quoted(name)} (device {device})"

    def to_json(self) -> dict[str, Any]:
        """The problem for programs; ends of ranges are exclusive, an `end` of null means without end."""
        problem, place = self.problem, self.problem.place
        return {
            "severity": problem.severity.name.lower(),
            "fault": problem.fault.name.lower(),
            "message": str(problem),
            "structure": place.structure,
            "path": list(place.path),
            "key_begin": place.begin,
            "key_end": None if place.end == KEY_LIMIT else place.end,
            "in_metadata_snapshot": place.held,
            "block": problem.first if problem.count else None,
            "blocks": problem.count,
            "expected": problem.expected,
            "found": problem.found,
            "affects": [
                {
                    "device_id": each.device,
                    "name": self.names.get(each.device),
                    "begin_block": each.begin,
                    "end_block": None if each.end == KEY_LIMIT else each.end,
                    "in_metadata_snapshot": each.held,
                }
                for each in problem.affects
            ],
            "advice": self.advice,
        }


def range_text(begin: int, end: int, block_bytes: int) -> str:
    """A range of thin blocks, in blocks and in bytes where their size is known."""
    if (begin, end) == (0, KEY_LIMIT):
        return "all of it"
    if end == KEY_LIMIT:
        return f"blocks {begin}.." + (f" (from {iec(begin * block_bytes)})" if block_bytes else "")
    text = f"block {begin}" if end == begin + 1 else f"blocks {begin}..{end - 1}"
    return text + (f" ({iec(begin * block_bytes)} to {iec(end * block_bytes)})" if block_bytes else "")


def summary(problems: Sequence[Problem]) -> str:
    """How many there are of each kind: "2 errors, 1 leak"."""
    counts = dict.fromkeys(sorted(Severity, reverse=True), 0)
    for problem in problems:
        counts[problem.severity] += 1
    words = [
        f"{count} {severity.name.lower()}{'' if count == 1 else 's'}"
        for severity, count in counts.items()
        if count
    ]
    return ", ".join(words) or "nothing is wrong"

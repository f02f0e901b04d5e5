"""What the crash search has been through so far, kept in a directory between runs.

In: the digests of all states ever checked, one line of JSON for each run, which seed comes next. Out: searching
(`crash_search`). Both files are replaced or appended to only after a run has ended, so a run that is killed counts for
nothing and its seeds are tried again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

Digests = np.ndarray[Any, np.dtype[np.uint64]]


class Ledger:
    """The runs of a directory, which is made when it does not exist."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._digests_path = directory / "digests.npy"
        self._runs_path = directory / "runs.jsonl"
        self.runs: list[dict[str, Any]] = []
        if self._runs_path.exists():
            self.runs = [json.loads(line) for line in self._runs_path.read_text().splitlines()]

    def next_seed(self, kind: str) -> int:
        """The first seed that no run of this kind has tried."""
        return max((run["seeds"][1] + 1 for run in self.runs if run["kind"] == kind), default=0)

    def digests(self) -> Digests:
        """Of all states ever checked, ascending."""
        if not self._digests_path.exists():
            return np.empty(0, np.uint64)
        found: Digests = np.load(self._digests_path)
        return found

    def add(self, figures: dict[str, Any], digests: Iterable[Digests]) -> int:
        """Enter a run; return how many distinct states all runs have checked together."""
        together = np.unique(np.concatenate([self.digests(), *digests]))
        fresh = self._digests_path.with_name("digests.new.npy")
        np.save(fresh, together)
        fresh.replace(self._digests_path)
        self.runs.append(figures)
        with self._runs_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
        return len(together)

    def summary(self) -> str:
        """All runs as a Markdown table: one row for each kind, one for the sum."""
        rows = [
            "| kind | seeds | scenarios | states checked | recovered by the engine | thin_check | violations |"
        ]
        rows.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        sums = [0] * 5
        keys = ("scenarios", "states", "recoveries", "thin_checks", "violations")
        for name in dict.fromkeys(run["kind"] for run in self.runs):
            runs = [run for run in self.runs if run["kind"] == name]
            counts = [sum(run[key] for run in runs) for key in keys]
            sums = [one + other for one, other in zip(sums, counts, strict=True)]
            first, last = min(run["seeds"][0] for run in runs), max(run["seeds"][1] for run in runs)
            rows.append(f"| {name} | {first} to {last} | {' | '.join(f'{count:,}' for count in counts)} |")
        rows.append(f"| together | | {' | '.join(f'{count:,}' for count in sums)} |")
        rows.append(f"\n{len(self.digests()):,} of the states are distinct.")
        return "\n".join(rows)

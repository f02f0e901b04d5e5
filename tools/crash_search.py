"""Search for crash states that break the promise, on several processes, for as long as asked.

In: handing out seeds, counting distinct states over all workers, the replay command, shrinking. Out: the search itself
(tests/fakes/crash_search.py), which the default tests run a fixed slice of.

Workers take one seed after the other from a common counter, and what is done with a seed depends on nothing else, so
every seed from the first to the last is covered, in the same way on every machine; only how many depends on the time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
from crash_ledger import Ledger

from tests.fakes.crash_search import Budget, Found, ScenarioKind, Search, shrink
from tests.fakes.mutants import MUTANTS, detect


@dataclass(slots=True)
class Total:
    """What all workers did."""

    scenarios: int = 0
    images: int = 0
    recoveries: int = 0
    thin_checks: int = 0
    next_seed: int = 0
    digests: list[np.ndarray[Any, np.dtype[np.uint64]]] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def distinct(self) -> int:
        """Distinct images over all workers."""
        return len(np.unique(np.concatenate(self.digests))) if self.digests else 0


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 nothing found, 1 violations."""
    options = parse(arguments)
    if options.mutants:
        return mutants()
    if options.summary:
        print(Ledger(options.ledger).summary())
        return 0
    if options.seed is None:
        options.seed = Ledger(options.ledger).next_seed(kind_of(options).name) if options.ledger else 0
    with mutation(options.mutant):
        if options.replay is not None:
            return replay(options)
        return search(options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="tools/crash-search", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to search (default: 1)")
    parser.add_argument("--seed", type=int, help="first seed (default: 0, or where the ledger ends)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of a scenario (default: 60)")
    parser.add_argument("--images", type=int, default=24, help="images tried per cut (default: 24)")
    parser.add_argument(
        "--threads", action="store_true", help="several clients at once, interleaved by the seed"
    )
    parser.add_argument(
        "--transfers", action="store_true", help="snapshots arrive, by streams and from an object store"
    )
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one seed and print what it does")
    parser.add_argument(
        "--mutant", choices=[mutant.name for mutant in MUTANTS], help="with a deliberate mistake"
    )
    parser.add_argument(
        "--mutants", action="store_true", help="find every deliberate mistake and print a table"
    )
    parser.add_argument(
        "--ledger",
        type=Path,
        metavar="DIRECTORY",
        help="count over many runs, each going on where the last ended",
    )
    parser.add_argument("--summary", action="store_true", help="print what all runs of --ledger come to")
    options = parser.parse_args(arguments)
    if options.summary and options.ledger is None:
        parser.error("--summary needs --ledger")
    return options


@contextmanager
def mutation(name: str | None) -> Iterator[None]:
    """The deliberate mistake of that name, if any."""
    chosen = [mutant for mutant in MUTANTS if mutant.name == name]
    if not chosen:
        yield
        return
    with chosen[0].switch():
        yield


def kind_of(options: argparse.Namespace) -> ScenarioKind:
    """Which scenarios the options ask for."""
    return ScenarioKind(threads=options.threads, transfers=options.transfers)


def budget_of(options: argparse.Namespace) -> Budget:
    """The budget that the options ask for; part of what makes a run the same again."""
    return Budget(images_per_cut=options.images, thin_check_every=4000)


def replay(options: argparse.Namespace) -> int:
    """Run one seed, printing its steps where it fails."""
    try:
        Search(budget_of(options)).seed(options.replay, steps=options.steps, kind=kind_of(options))
    except Found as found:
        print(*(f"{number:4}  {text}" for number, text in enumerate(found.text, 1)), sep="\n")
        print(f"\ncut after event {found.cut}: {found.what}")
        return 1
    print(f"seed {options.replay}: nothing found")
    return 0


def mutants() -> int:
    """Print how soon each deliberate mistake is found."""
    print(
        "| mistake | what it does | found after | by seed | at the latest |",
        "| --- | --- | ---: | ---: | ---: |",
        sep="\n",
    )
    missed = 0
    for mutant in MUTANTS:
        found = detect(mutant)
        missed += found is None
        unit = "scenarios" if mutant.uncut else "states"
        at = "**not found** |" if found is None else f"{found.states:,} {unit} | {found.seed}"
        print(f"| `{mutant.name}` | {mutant.breaks} | {at} | {mutant.states:,} |", flush=True)
    return 1 if missed else 0


def worker(options: argparse.Namespace, seeds: Synchronized[int], results: Queue[tuple[Any, ...]]) -> None:
    """Take seeds until the time is up."""
    found = None
    budget = budget_of(options)
    searching = Search(budget)
    deadline = time.monotonic() + options.minutes * 60
    while time.monotonic() < deadline and found is None:
        with seeds.get_lock():
            seed = seeds.value
            seeds.value += 1
        try:
            searching.seed(seed, steps=options.steps, kind=kind_of(options))
        except Found as problem:
            found = shrink(problem, budget)
    tally = searching.tally
    digests = np.fromiter(tally.digests, np.uint64, len(tally.digests))
    mutant = f" --mutant {options.mutant}" if options.mutant else ""
    text = None if found is None else f"{found}{mutant}"
    counts = (tally.scenarios, tally.images + tally.nested_images, tally.recoveries, tally.thin_checks)
    results.put((counts, digests, text))


def search(options: argparse.Namespace) -> int:
    """Search with all workers and print what came of it."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    seeds = context.Value("q", options.seed)
    started = time.monotonic()
    workers = [context.Process(target=worker, args=(options, seeds, results)) for _ in range(options.workers)]
    for process in workers:
        process.start()
    total = Total()
    for _ in workers:
        (scenarios, images, recoveries, thin_checks), digests, text = results.get()
        total.scenarios += scenarios
        total.images += images
        total.recoveries += recoveries
        total.thin_checks += thin_checks
        total.digests.append(digests)
        total.found += [text] if text else []
    for process in workers:
        process.join()
    total.next_seed = seeds.value
    return report(options, total, time.monotonic() - started)


def report(options: argparse.Namespace, total: Total, seconds: float) -> int:
    """Print the figures."""
    distinct = total.distinct()
    print(f"seeds {options.seed}..{total.next_seed - 1}: {total.scenarios} scenarios in {seconds:.0f} s")
    print(
        f"{total.images} crash states checked, {distinct} of them distinct, {distinct / seconds:.0f} a second"
    )
    print(f"{total.recoveries} recovered by the engine, {total.thin_checks} shown to thin_check")
    print(*(total.found or ["no violation"]), sep="\n")
    if options.ledger:
        figures = {
            "seeds": [options.seed, total.next_seed - 1],
            "kind": kind_of(options).name,
            "scenarios": total.scenarios,
            "states": total.images,
            "distinct": distinct,
            "recoveries": total.recoveries,
            "thin_checks": total.thin_checks,
            "violations": len(total.found),
            "seconds": round(seconds),
        }
        print(f"{Ledger(options.ledger).add(figures, total.digests)} distinct over all runs of the ledger")
    return 1 if total.found else 0


if __name__ == "__main__":
    sys.exit(main())

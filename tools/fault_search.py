"""Let every operation of a pool's disk fail in every way, on several processes, for as long as asked.

In: handing out seeds, adding up, the table, the replay command. Out: one run with one fault
(tests/fakes/fault_search.py) and one opening after a kill with one (tests/fakes/opening_faults.py), of which the
default tests run a fixed slice.

Every seed that was begun is done to its end, so the table is that of a range of seeds, the same on every machine; only
where the range ends depends on the time. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized

from tests.fakes.crash_faults import Fault
from tests.fakes.crash_oracle import Violation
from tests.fakes.fault_search import STEPS, Count, Counts, faults, kind_in_words, with_fault
from tests.fakes.opening_faults import Kill, kill_after, kills, open_with_fault

KILLS_A_SEED = 3
COLUMNS = ("tried", "refused", "gave_up", "marked", "killed", "images", "violations")
HEADINGS = (
    "tried",
    "answers with an error",
    "pools that gave up",
    "marked `needs_check`",
    "ended by a kill",
    "images checked after a cut",
    "violations",
)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 nothing found, 1 violations."""
    options = parse(arguments)
    logging.disable()  # pools say aloud that they gave up, which here they do all the time
    if options.replay:
        seed, number, kind = options.replay
        kill = (
            None
            if options.killed_after is None
            else kill_after(int(seed), options.killed_after, options.steps)
        )
        return replay(int(seed), Fault(int(number), kind, options.lasting), options.steps, kill)
    return search(options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="tools/fault-search", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=1.0, help="begin no seed after that time (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--seeds", type=int, help="so many seeds, however long they take")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of a scenario (default: {STEPS})")
    parser.add_argument(
        "--replay",
        nargs=3,
        metavar=("SEED", "OPERATION", "KIND"),
        help="run with one fault, say what happens",
    )
    parser.add_argument("--lasting", action="store_true", help="with --replay: it goes on failing")
    parser.add_argument(
        "--killed-after",
        type=int,
        metavar="STEPS",
        help="with --replay: the operation is one of opening the pool, after a kill",
    )
    return parser.parse_args(arguments)


def replay(seed: int, fault: Fault, steps: int, kill: Kill | None) -> int:
    """Run with one fault."""
    try:
        if kill is None:
            with_fault(seed, fault, Count(), steps)
        else:
            open_with_fault(kill, fault, Count())
    except Violation as problem:
        print(problem)
        return 1
    print(f"seed {seed}, operation {fault.number} ({fault.struck or 'never reached'}): nothing found")
    return 0


def worker(
    options: argparse.Namespace, seeds: Synchronized[int], results: Queue[tuple[Counts, list[str]]]
) -> None:
    """Take seeds until the time is up."""
    counts, found = Counts(), []
    deadline = time.monotonic() + options.minutes * 60
    while options.seeds is not None or time.monotonic() < deadline:
        with seeds.get_lock():
            seed = seeds.value
            if options.seeds is not None and seed >= options.seed + options.seeds:
                break
            seeds.value += 1
        for operation, fault in faults(seed, options.steps):
            count = counts.of(operation, kind_in_words(fault))
            try:
                with_fault(seed, fault, count, options.steps)
            except Violation as problem:
                count.violations += 1
                found.append(f"{command(options, seed, fault)}\n  {problem}")
        for kill in kills(seed, KILLS_A_SEED, options.steps):
            for operation, fault in kill.faults():
                count = counts.of(f"opening: {operation}", kind_in_words(fault))
                try:
                    open_with_fault(kill, fault, count)
                except Violation as problem:
                    count.violations += 1
                    found.append(f"{command(options, seed, fault)} --killed-after {kill.after}\n  {problem}")
    results.put((counts, found))


def command(options: argparse.Namespace, seed: int, fault: Fault) -> str:
    """Return what shows a violation again."""
    lasting = " --lasting" if fault.lasting else ""
    return f"tools/fault-search --steps {options.steps} --replay {seed} {fault.number} {fault.kind}{lasting}"


def search(options: argparse.Namespace) -> int:
    """Search with all workers and print what came of it."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    seeds = context.Value("q", options.seed)
    workers = [context.Process(target=worker, args=(options, seeds, results)) for _ in range(options.workers)]
    for process in workers:
        process.start()
    total, found = Counts(), []
    for _ in workers:
        counts, problems = results.get()
        total.add(counts)
        found += problems
    for process in workers:
        process.join()
    print(f"seeds {options.seed} to {seeds.value - 1}, {options.steps} steps each\n")
    print_table(total)
    print(*(found or ["\nno violation"]), sep="\n")
    return 1 if found else 0


def print_table(counts: Counts) -> None:
    """Print all counts in Markdown, and their sum."""
    print(f"| operation | fault | {' | '.join(HEADINGS)} |")
    print(f"| --- | --- |{' ---: |' * len(HEADINGS)}")
    everything = Count()
    for (operation, kind), count in sorted(counts.table.items()):
        everything.add(count)
        print_row(operation, kind, count)
    print_row("together", "", everything)


def print_row(operation: str, kind: str, count: Count) -> None:
    """Print one row."""
    figures = " | ".join(f"{getattr(count, column):,}" for column in COLUMNS)
    print(f"| {operation} | {kind} | {figures} |")


if __name__ == "__main__":
    sys.exit(main())

"""Kill servers under load at random instants, reopen their pools, and look whether the promise was kept.

In: how many runs, seeds, the figures. Out: a run itself (tests/fakes/killed_pool.py), which the default tests make a
few of. The instants are a matter of the machine, so a seed repeats what the clients ask for, not when the kill falls;
a pool that broke the promise is kept and named.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.fakes.killed_pool import KilledPool

RUNS_PER_POOL = 25


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 the promise was kept, 1 it was not."""
    parser = argparse.ArgumentParser(prog="tools/kill-runs", description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=300, help="how often to kill a server under load (default: 300)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first pool (default: 0)")
    options = parser.parse_args(arguments)
    started, left, seed = time.monotonic(), options.runs, options.seed
    counts = dict.fromkeys(("runs", "kills", "kills_at_start", "acknowledged", "flushed", "administered"), 0)
    counts["in_flight_steps"] = 0
    while left:
        work = Path(tempfile.mkdtemp(prefix="tp-"))  # short: the address of a Unix socket ends at 107 bytes
        pool = KilledPool(work, seed)
        try:
            for _ in range(min(RUNS_PER_POOL, left)):
                pool.run()
                left -= 1
        except AssertionError as error:
            print(f"seed {seed}, run {pool.totals.runs}: {error}\nthe pool is kept in {work}")
            return 1
        for key in counts:
            counts[key] += getattr(pool.totals, key)
        shutil.rmtree(work)
        seed += 1
    print(f"seeds {options.seed}..{seed - 1}, {time.monotonic() - started:.0f} s, no violation")
    print(*(f"{key.replace('_', ' ')}: {count:,}" for key, count in counts.items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

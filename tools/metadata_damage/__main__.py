"""Command line of tools/damage."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from .damages import damage
from .histories import choices
from .judgement import Verdict, judge
from .specimen import specimen
from .table import document

CHUNK = 10


def parser() -> argparse.ArgumentParser:
    """Return the option parser."""
    made = argparse.ArgumentParser(
        prog="tools/damage",
        description="Damage a pool's metadata at random; judge what check and repair make of it.",
    )
    made.add_argument("--cases", type=int, default=1000, help="how many seeds (default 1000)")
    made.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default 0)")
    made.add_argument(
        "--histories", type=int, default=100, help="how many pools lose their superblock (default 100)"
    )
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--no-debian", action="store_true", help="leave thin_check and thin_repair out")
    made.add_argument("--output", type=Path, help="write the table here, as Markdown")
    made.add_argument(
        "--image", type=Path, help="only write the image of the first seed here, and say what it is"
    )
    return made


def case(seed: int, *, debian: bool) -> Verdict:
    """One seed, in a directory of its own."""
    if not debian:
        return judge(specimen(), seed)
    with tempfile.TemporaryDirectory(prefix="tp-damage-") as work:
        return judge(specimen(), seed, Path(work))


def main() -> int:
    """Run the cases, print the table and every case that falls short."""
    options = parser().parse_args()
    if options.image is not None:
        made = damage(specimen(), options.first)
        options.image.write_bytes(made.image)
        sums = "computed anew" if made.resealed else "as they fell"
        print(
            f"seed {made.seed}: {', '.join(made.kinds)}, checksums {sums}; blocks {sorted(made.blocks)[:20]}"
        )
        return 0
    debian = not options.no_debian and shutil.which("thin_repair") is not None
    seeds = range(options.first, options.first + options.cases)
    with ProcessPoolExecutor(options.workers) as workers:
        verdicts = list(workers.map(partial(case, debian=debian), seeds, chunksize=CHUNK))
        found = [each for some in workers.map(choices, range(options.histories)) for each in some]
    command = f"tools/damage --first {options.first} --cases {options.cases} --histories {options.histories}"
    text = document(verdicts, found, command)
    if options.output is not None:
        options.output.write_text(text)
    print(text)
    failed = [
        each.seed
        for each in verdicts
        if not each.source_kept or (each.meaning == "changed" and not each.found)
    ]
    if failed:
        print(f"seeds that fail the promise: {failed}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

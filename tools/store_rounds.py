"""Two hosts push to one store while others collect, forget, verify and pull, all as processes; some are killed.

In: how many rounds, seeds, a directory or a real S3 server on loopback, the table. Out: a round and its judgement
(tests/fakes/store_rounds.py), of which the default tests make a few. A seed repeats what is written, asked for and
killed, not the instants, which are a matter of the machine; a store that broke a promise is kept and named.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.fakes.s3_server import S3Server
from tests.fakes.store_rounds import Rounds

ROUNDS_PER_STORE = 50


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 all promises were kept, 1 one was not."""
    parser = argparse.ArgumentParser(prog="tools/store-rounds", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="how many in all (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first store (default: 0)")
    parser.add_argument("--s3", action="store_true", help="an S3 server on loopback rather than a directory")
    options = parser.parse_args(arguments)
    work = Path(tempfile.mkdtemp(prefix="tp-rounds-"))
    # Ended by SIGTERM it stops its server as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    server = S3Server(work / "s3") if options.s3 else None
    if server is not None:
        server.start()
        os.environ.update(server.environment)
    try:
        broken = _all(work, options.rounds, options.seed, s3=options.s3)
    finally:
        if server is not None:
            server.stop()
    if broken:
        print(f"{broken}\neverything is kept in {work}")
        return 1
    shutil.rmtree(work)
    return 0


def _all(work: Path, left: int, seed: int, *, s3: bool) -> str:
    """Run them; what was broken, nothing at best."""
    started, first, counts = time.monotonic(), seed, dict[str, int]()
    while left:
        place = work / f"seed{seed}"
        place.mkdir()
        url = f"s3://bucket/seed{seed}" if s3 else (place / "store").as_uri()
        rounds = Rounds(place, url, seed)
        try:
            for _ in range(min(ROUNDS_PER_STORE, left)):
                rounds.run()
                left -= 1
            rounds.finish()
        except AssertionError as error:
            return f"seed {seed}, round {rounds.totals.rounds}: {error}"
        for key, count in asdict(rounds.totals).items():
            counts[key] = counts.get(key, 0) + count
        shutil.rmtree(place)
        seed += 1
        _table(f"seeds {first}..{seed - 1} so far, {time.monotonic() - started:.0f} s", counts)
    seconds = time.monotonic() - started
    print(f"{'S3' if s3 else 'directory'}: seeds {first}..{seed - 1}, {seconds:.0f} s, no violation")
    return ""


def _table(title: str, counts: dict[str, int]) -> None:
    print(title)
    print(*(f"{key.replace('_', ' ')}: {count:,}" for key, count in counts.items()), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())

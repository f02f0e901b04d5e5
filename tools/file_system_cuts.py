"""Cut the power under real file systems on served devices, mount what is left, read every fsynced file, check.

In: how many cuts of which file systems, the figures. Out: recording and judging (tests/fakes/file_system_cuts.py).
Needs root, FUSE and loop devices. What the kernel writes and when is its own matter, so a seed repeats the load and
the choice of cuts but not the history.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.fakes.file_system_cuts import EXT4, XFS, Recording

CUTS_PER_RECORDING = 15
STEPS = 50


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 all whole, 1 something was lost."""
    parser = argparse.ArgumentParser(prog="tools/file-system-cuts", description=__doc__)
    parser.add_argument("--cuts", type=int, default=45, help="cuts of each file system (default: 45)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--only", choices=("ext4", "xfs"), help="one file system only")
    options = parser.parse_args(arguments)
    print(
        "| file system | cuts | with writes in flight | mounts | fsynced files read | seconds | violations |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for system in (EXT4, XFS):
        if options.only not in (None, system.name):
            continue
        started, cuts, torn, mounts, files, seed = time.monotonic(), 0, 0, 0, 0, options.seed
        while cuts < options.cuts:
            recording = Recording(system, seed)
            recording.record(STEPS)
            try:
                for cut in recording.cuts(min(CUTS_PER_RECORDING, options.cuts - cuts)):
                    cuts += 1
                    torn += cut.waiting_sectors > 0
                    mounts += 1 + (len(cut.snapshots) if cuts % 3 == 0 else 0)
                    files += cut.judge(with_snapshots=cuts % 3 == 0)
            except AssertionError as error:
                print(f"{system.name}, seed {seed}: {error}")
                return 1
            finally:
                recording.close()
            seed += 1
        seconds = time.monotonic() - started
        print(f"| {system.name} | {cuts} | {torn} | {mounts} | {files} | {seconds:.0f} | 0 |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

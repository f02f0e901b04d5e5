"""The `thinpool` command on a host whose clock is wrong: `python -m tests.fakes.skewed_host SECONDS COMMAND ...`.

In: what Python's clocks tell, moved by so many seconds, before anything of the product is loaded. Out: what the store
dates objects with, which is the store's own clock, and what signs requests to S3, which has to be right within minutes.
"""

from __future__ import annotations

import runpy
import sys
import time


def main() -> None:
    seconds = float(sys.argv[1])
    told = time.time
    time.time = lambda: told() + seconds
    sys.argv[1:2] = []
    runpy.run_module("thinpool", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

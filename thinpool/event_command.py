"""Running the command that an operator set for events of a pool.

In: one run: words, environment, time-out, what becomes of its output. Out: which events there are (`space_watch.py`).
It runs in a thread and a session of its own, with no input, and never holds anything up: a command that
hangs is ended after its time-out, one that runs when the server stops goes on without it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping

OUTPUT_BYTES_MAX = 4096


def start_event_command(
    command: str,
    words: tuple[str, ...],
    environment: Mapping[str, str],
    timeout_seconds: float,
    log: Callable[[str], None],
) -> threading.Thread:
    """Run `command` (split as a shell would, without one) with `words` behind it; returns at once."""
    line = [*shlex.split(command), *words]
    thread = threading.Thread(
        target=_run, args=(line, dict(environment), timeout_seconds, log), name="event", daemon=True
    )
    thread.start()
    return thread


def _run(
    line: list[str], environment: dict[str, str], timeout_seconds: float, log: Callable[[str], None]
) -> None:
    try:
        # A file, not a pipe: a child that outlives the command cannot hold us up, and output costs no memory.
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={**os.environ, **environment},
                start_new_session=True,
            )
            try:
                status = process.wait(timeout_seconds or None)
                ended = "" if status == 0 else f"ended with status {status}"
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                ended = f"was ended after {timeout_seconds:g} s"
            output.seek(0)
            text = output.read(OUTPUT_BYTES_MAX).decode(errors="replace")
    except OSError as error:
        log(f"the event command {line[0]!r} could not be run: {error}")
        return
    for said in text.splitlines():
        log(f"event command: {said}")
    if ended:
        log(f"the event command {line[0]!r} {ended}")

"""How a command ends: output, error messages and exit codes, in one place.

In: the exit code of every exception, the message on standard error, the JSON forms. Out: the sentences of our own
errors (`thinpool.errors`), tables (`tables.py`).
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import click

from thinpool.errors import ExitCode, ThinPoolError
from thinpool.service_errors import lacking_resources
from thinpool.wording import escaped

JSON_VERSION = 1
BROKEN_PIPE = 141  # what a shell reports for a command that SIGPIPE ended: 128 + 13
EXIT_CODES = {
    ExitCode.OK: "done",
    ExitCode.FAILURE: "failed, for a reason without a code of its own",
    ExitCode.USAGE: "bad option, argument, name or size; nothing was done",
    ExitCode.NOT_FOUND: "no such pool or device",
    ExitCode.CONFLICT: "exists already, or in use, or busy",
    ExitCode.NO_SPACE: "no space in the pool, its metadata or its file system",
    ExitCode.DAMAGED: "not a pool, or a damaged one",
    ExitCode.SERVER: "no server, or it cannot be reached",
    ExitCode.RESOURCES: "no memory or file descriptors left; nothing is wrong with the pool",
    ExitCode.INTERRUPTED: "interrupted",
}
EXIT_CODES_HELP = "Exit codes:\n" + "\n".join(
    f"  {int(code):<4} {meaning}" for code, meaning in EXIT_CODES.items()
)
ERRNO_EXIT_CODES = {
    errno.ENOENT: ExitCode.NOT_FOUND,
    errno.ENOTDIR: ExitCode.NOT_FOUND,
    errno.EEXIST: ExitCode.CONFLICT,
    errno.EBUSY: ExitCode.CONFLICT,
    errno.ENOSPC: ExitCode.NO_SPACE,
    errno.EDQUOT: ExitCode.NO_SPACE,
    errno.ECONNREFUSED: ExitCode.SERVER,
}


def emit_json(document: Mapping[str, Any]) -> None:
    """Print a result for programs: one JSON object with the version of its form, ASCII, sizes as integers."""
    click.echo(json.dumps({"version": JSON_VERSION, **document}, indent=2))


def warn(text: str) -> None:
    """Say something on standard error that is no failure."""
    click.echo(f"thinpool: {text}", err=True)


def run_reporting(command: click.Command, arguments: list[str] | None) -> int:
    """Run a click command; print what went wrong, if anything; return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = _run(command, given)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        return BROKEN_PIPE
    return code


def _run(command: click.Command, given: list[str]) -> int:
    debug, as_json = "--debug" in given, "--json" in given
    try:
        result = command.main(args=given, prog_name="thinpool", standalone_mode=False)
    except BrokenPipeError:
        raise
    except click.ClickException as error:
        error.show()
        return int(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("thinpool: interrupted", err=True)
        return int(ExitCode.INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message, document = described(error)
        click.echo(f"thinpool: {message}", err=True)
        if as_json:
            emit_json(document)
        return code
    # With standalone_mode=False click returns the code of ctx.exit().
    return result if isinstance(result, int) else int(ExitCode.OK)


def described(error: Exception) -> tuple[int, str, dict[str, Any]]:
    """Return exit code, sentence and JSON form of any exception."""
    error = lacking_resources(error, "") or error
    if isinstance(error, ThinPoolError):
        return int(error.exit_code), str(error), error.to_json()
    if isinstance(error, OSError):
        code = ERRNO_EXIT_CODES.get(error.errno or 0, ExitCode.FAILURE)
        message = os_sentence(error)
    else:
        code = ExitCode.FAILURE
        # Not expected to be seen; still a sentence, and the way to more.
        message = f"internal error: {type(error).__name__}: {escaped(str(error))} (--debug shows where)"
    return int(code), message, _foreign_json(error, message, code)


def _foreign_json(error: Exception, message: str, code: ExitCode) -> dict[str, Any]:
    return {"error": type(error).__name__, "fields": {}, "message": message, "exit_code": int(code)}


def os_sentence(error: OSError) -> str:
    """Say what the system refused, and where."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return escaped(reason)
    return f"{escaped(str(error.filename))}: {escaped(reason)}"


def _forget_stdout() -> None:
    """Nobody reads on: keep Python from complaining once more when it flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)

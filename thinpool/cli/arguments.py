"""Arguments that many commands share: which pool, which names, sizes, how to print.

In: the pool on the command line, in THINPOOL_POOL, or as two bare paths; the size type; the options of output. Out:
what commands do with them.

POOL may be left out where THINPOOL_POOL is set or `--metadata` and `--data` are given. Which words are then names
follows from how many there are: a command has a fixed number of names, and one word more is the pool.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from thinpool.errors import BadSize
from thinpool.pool_location import PoolLocation
from thinpool.units import parse_size

POOL_VARIABLE = "THINPOOL_POOL"
KEY_FILE_VARIABLE = "THINPOOL_STORE_KEY_FILE"
Function = TypeVar("Function", bound=Callable[..., Any])


class SizeType(click.ParamType[int]):
    """A size as in `10G`; becomes bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse, or complain the way click does, naming the option."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except BadSize as error:
            self.fail(str(error), param, ctx)


SIZE = SizeType()


class EndpointType(click.ParamType[tuple[str, int]]):
    """HOST:PORT, [IPV6]:PORT, :PORT (all interfaces) or HOST alone (port 10809)."""

    name = "host:port"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Split host and port."""
        if isinstance(value, tuple):
            return value
        text = str(value)
        if text.startswith("["):
            host, bracket, rest = text[1:].partition("]")
            port = rest[1:] if rest.startswith(":") else rest and "?"
            if not bracket:
                self.fail(f"{text!r} lacks its ']'", param, ctx)
        elif text.count(":") > 1:
            host, port = text, ""
        else:
            host, _, port = text.partition(":")
        if not port and not text.endswith(":"):
            return host, 10809
        if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
            self.fail(f"{text!r} does not end in a port number from 0 to 65535", param, ctx)
        return host, int(port)


ENDPOINT = EndpointType()


class OctalType(click.ParamType[int]):
    """File permissions such as 0660."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse octal digits."""
        if isinstance(value, int):
            return value
        try:
            mode = int(str(value), 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            self.fail(f"{value!r} is not a mode from 0000 to 0777", param, ctx)
        return mode


OCTAL = OctalType()


def json_option(function: Function) -> Function:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(function)


def key_file_option(function: Function) -> Function:
    """Add --key-file, the key of an encrypted store."""
    return click.option(
        "--key-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        envvar=KEY_FILE_VARIABLE,
        metavar="FILE",
        help=f"The key of an encrypted store: all of FILE but a newline at its end (or {KEY_FILE_VARIABLE}).",
    )(function)


def pool_command(
    *names: str,
    bare: bool = True,
    data_needed: bool = True,
    store: bool = False,
    dropped_by: str = "",
) -> Callable[[Function], Callable[..., Any]]:
    """Add the pool and `names` as arguments; the function gets `location` and each name in lower case.

    `bare`: the command also works with `--metadata X --data Y` in place of a pool directory. Without `data_needed`,
    `--metadata X` alone will do. With `store`, the URL of an object store may stand in the place of the pool; the
    function then gets it as `url` and no location, otherwise `url` is None. Where the option `dropped_by` is given, no
    names are (they are empty then).
    """

    def decorate(function: Function) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*, words: Sequence[str], **options: Any) -> Any:
            bare_paths = [options.pop(key, None) for key in ("metadata", "data", "names")]
            if store:
                options["url"] = None
                if len(words) == 1 and "://" in words[0]:
                    return function(location=None, **{**options, "url": words[0]})
            if not data_needed and bare_paths[0] is not None and bare_paths[1] is None:
                bare_paths[1] = os.devnull
            wanted = () if dropped_by and options[dropped_by] is not None else names
            location, given = _split(words, wanted, *bare_paths)
            for name in names:
                options[name.lower()] = ""
            for name, word in zip(wanted, given, strict=True):
                options[name.lower()] = word
            return function(location=location, **options)

        wrapped: Any = wrapper
        if bare:
            wrapped = click.option(
                "--names",
                metavar="FILE",
                help="Names of such a pool's devices: vgcfgbackup's output, or lines ID NAME [SIZE].",
            )(wrapped)
            wrapped = click.option("--data", metavar="PATH", help="Data of a pool without a directory.")(
                wrapped
            )
            wrapped = click.option(
                "--metadata", metavar="PATH", help="Metadata of a pool without a directory (LVM's _tmeta)."
            )(wrapped)
        metavar = " ".join(("[POOL|URL]" if store else "[POOL]", *names))
        return click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar=metavar)(wrapped)  # type: ignore[no-any-return]

    return decorate


def _split(
    words: Sequence[str],
    names: Sequence[str],
    metadata: str | None,
    data: str | None,
    names_file: str | None,
) -> tuple[PoolLocation, Sequence[str]]:
    """Tell the pool from the names. Raises click.UsageError."""
    for word in words:
        if not word:
            raise click.UsageError(message="an argument is empty")
    if metadata is not None or data is not None:
        if metadata is None or data is None:
            raise click.UsageError(message="--metadata and --data go together")
        if len(words) != len(names):
            raise _wrong_number(words, ["(no POOL beside --metadata)", *names])
        names_path = None if names_file is None else Path(names_file)
        return PoolLocation.bare(Path(metadata), Path(data), names_path), words
    if names_file is not None:
        raise click.UsageError(message="--names goes with --metadata and --data; a pool directory has names")
    if len(words) == len(names) + 1:
        return PoolLocation.directory(Path(words[0])), words[1:]
    variable = os.environ.get(POOL_VARIABLE)
    if len(words) == len(names) and variable:
        return PoolLocation.directory(Path(variable)), words
    raise _wrong_number(words, ["POOL", *names])


def _wrong_number(words: Sequence[str], expected: Sequence[str]) -> click.UsageError:
    if len(words) > len(expected):
        return click.UsageError(message=f"too many arguments; expected {' '.join(expected)}")
    hint = f" (POOL may come from {POOL_VARIABLE})" if expected[0] == "POOL" else ""
    return click.UsageError(message=f"expected {' '.join(expected)}{hint}")

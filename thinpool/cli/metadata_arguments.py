"""Arguments of the commands on metadata, which need no data: a pool, or a metadata file or device by itself.

In: telling what a path is; progress of long reading. Out: pools in full (`arguments.py`).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from thinpool.pool_location import PoolLocation

from .arguments import POOL_VARIABLE

if TYPE_CHECKING:
    from metadata import BlockStore

Function = TypeVar("Function", bound=Callable[..., Any])
Read = Callable[[int], None]


def metadata_location(path: str, names: str | None = None) -> PoolLocation:
    """A pool directory, or a metadata file or device by itself."""
    if Path(path).is_dir():
        if names is not None:
            raise click.UsageError(message="--names is for metadata by itself; a pool directory has names")
        return PoolLocation.directory(Path(path))
    return PoolLocation.metadata_alone(Path(path), None if names is None else Path(names))


def metadata_command(function: Function) -> Callable[..., Any]:
    """Add [POOL], --metadata and --names; the function gets `location`."""

    @functools.wraps(function)
    def wrapper(*, word: str | None, metadata: str | None, names: str | None, **options: Any) -> Any:
        if word is not None and metadata is not None:
            raise click.UsageError(message="give POOL or --metadata, not both")
        path = metadata or word or os.environ.get(POOL_VARIABLE)
        if not path:
            raise click.UsageError(
                message=f"expected POOL (it may come from {POOL_VARIABLE}) or --metadata PATH"
            )
        if metadata is not None and Path(metadata).is_dir():
            raise click.UsageError(
                message="--metadata takes a file or block device; give a pool directory as POOL"
            )
        return function(location=metadata_location(path, names), **options)

    wrapped: Any = wrapper
    wrapped = click.option(
        "--names", metavar="FILE", help="Names of the devices: vgcfgbackup's output, or lines ID NAME [SIZE]."
    )(wrapped)
    wrapped = click.option(
        "--metadata",
        metavar="PATH",
        help="A metadata file or device by itself (LVM's _tmeta); as POOL may be too.",
    )(wrapped)
    return click.argument("word", required=False, metavar="[POOL]")(wrapped)  # type: ignore[no-any-return]


class CountedStore:
    """A store that tells how many blocks were read of it."""

    def __init__(self, below: BlockStore, on_read: Read) -> None:
        self._below = below
        self._on_read = on_read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)

    def read(self, first: int, count: int) -> bytes:
        """Read, and tell."""
        data = self._below.read(first, count)
        self._on_read(count)
        return data


@contextmanager
def progress(
    title: str, store: BlockStore, total_blocks: int, *, quiet: bool = False
) -> Iterator[BlockStore]:
    """Show on a terminal how far reading `store` has come; elsewhere the store as it is."""
    if quiet or not sys.stderr.isatty():
        yield store
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=total_blocks or None)
        counted: Any = CountedStore(store, lambda count: shown.advance(task, count))
        yield counted

"""Commands on the pool itself: init, status, grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thinpool.errors import PoolNotServed, ServerUnreachable
from thinpool.pool_location import PoolLocation
from thinpool.wording import iec, shown_path

from .arguments import SIZE, json_option, pool_command
from .report import emit_json
from .tables import print_pairs, size_text


@click.command(
    "init",
    epilog="\b\nExamples:\n  thinpool init /srv/pool --size 100G\n"
    "  thinpool init /srv/pool --size 10T --block-size 1M --metadata-size 2G",
)
@click.option(
    "--size", type=SIZE, required=True, help="Size of the data, e.g. 100G. Taken as it is written to."
)
@click.option(
    "--block-size", type=SIZE, default="64K", show_default=True, help="64K to 1G, a multiple of 64K."
)
@click.option("--metadata-size", type=SIZE, help="Size of the metadata; by default enough for the data.")
@json_option
@pool_command(bare=False)
def init_command(
    location: PoolLocation, *, size: int, block_size: int, metadata_size: int | None, as_json: bool
) -> None:
    """Make a pool: a directory that is new or empty.

    Nothing is allocated yet: the data file is sparse. The pool can grow later, the block size stays.
    """
    from thinpool.opening import create_pool
    from thinpool.operations import as_leaf
    from thinpool.pool_access import PoolAccess

    assert location.root is not None
    try:
        create_pool(
            Path(location.root), size_bytes=size, block_bytes=block_size, metadata_bytes=metadata_size
        )
    except Exception as error:
        translated = as_leaf(error, str(location))
        if translated is error:
            raise
        raise translated from error
    status = PoolAccess(location).operate("status", {})["status"]
    if as_json:
        emit_json(status)
    else:
        click.echo(
            f"pool {shown_path(location)}: {iec(status['data_bytes'])} of data in blocks of {iec(block_size)}, "
            f"{iec(status['metadata_bytes'])} of metadata"
        )


@click.command(
    "status",
    epilog="\b\nExamples:\n  thinpool status /srv/pool\n  thinpool status /srv/pool --json\n"
    "  thinpool status /srv/pool --dm",
)
@click.option("-b", "--bytes", "exact", is_flag=True, help="Print sizes in bytes.")
@click.option("--dm", "as_dm", is_flag=True, help="Print the lines `dmsetup status` would print.")
@json_option
@pool_command()
def status_command(location: PoolLocation, *, exact: bool, as_dm: bool, as_json: bool) -> None:
    """Show how full a pool is, its mode, and who serves it."""
    from thinpool.pool_access import PoolAccess

    access = PoolAccess(location)
    if as_dm:
        lines = access.operate("dm-status", {})["lines"]
        if as_json:
            emit_json({"lines": lines})
        for line in [] if as_json else lines:
            click.echo(line)
        return
    status = access.operate("status", {})["status"]
    try:
        server: dict[str, Any] | None = access.server()
    except (PoolNotServed, ServerUnreachable):
        server = None
    if as_json:
        emit_json({**status, "server": server})
    else:
        _print_status(status, server, exact=exact)


def _print_status(status: dict[str, Any], server: dict[str, Any] | None, *, exact: bool) -> None:
    def amount(kind: str) -> str:
        total, used = int(status[f"{kind}_bytes"]), int(status[f"{kind}_used_bytes"])
        free = size_text(int(status[f"{kind}_free_bytes"]), exact=exact)
        percent = 100 * used / total if total else 0.0
        return f"{size_text(used, exact=exact)} of {size_text(total, exact=exact)} ({percent:.1f} %), {free} free"

    pairs = [
        ("pool", shown_path(status["location"])),
        ("mode", str(status["mode"]) + (" (needs check)" if status.get("needs_check") else "")),
        ("data", amount("data")),
        ("metadata", amount("metadata")),
        ("block size", size_text(int(status["block_bytes"]), exact=exact)),
        (
            "devices",
            f"{status['devices']}, {size_text(int(status['virtual_bytes']), exact=exact)} promised to them",
        ),
        ("on disk", f"{size_text(int(status['file_bytes']), exact=exact)} taken by the data file"),
        ("transaction", str(status["transaction_id"])),
    ]
    if status.get("failure"):
        pairs.append(("failure", str(status["failure"])))
    if server is None:
        pairs.append(("server", "none"))
    else:
        clients = len(server["connections"])
        noun = "connection" if clients == 1 else "connections"
        pairs.append(("server", f"process {server['pid']}, {clients} {noun}"))
        where = [shown_path(path) for path in server["sockets"]]
        where += [f"{host}:{port}" for host, port in server["tcp"]]
        pairs.append(("listening on", ", ".join(where)))
    print_pairs(pairs)


@click.command(
    "grow",
    epilog="\b\nExamples:\n  thinpool grow /srv/pool --size 200G\n  thinpool grow /srv/pool --metadata-size 1G",
)
@click.option("--size", type=SIZE, help="New size of the data.")
@click.option("--metadata-size", type=SIZE, help="New size of the metadata.")
@json_option
@pool_command()
def grow_command(
    location: PoolLocation, *, size: int | None, metadata_size: int | None, as_json: bool
) -> None:
    """Make a pool larger, while it is in use.

    Sizes are the new totals. Pools never shrink.
    """
    from thinpool.pool_access import PoolAccess

    if size is None and metadata_size is None:
        raise click.UsageError(message="give --size or --metadata-size or both")
    parameters = {"size_bytes": size, "metadata_bytes": metadata_size}
    status = PoolAccess(location).operate("grow", parameters)["status"]
    if as_json:
        emit_json(status)
    else:
        click.echo(
            f"pool {shown_path(location)}: {iec(status['data_bytes'])} of data, "
            f"{iec(status['metadata_bytes'])} of metadata"
        )

"""Commands on the pool itself: init, status, grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thinpool.errors import PoolNotServed, ServerUnreachable
from thinpool.pool_location import PoolLocation
from thinpool.wording import duration, iec, shown_path

from .arguments import SIZE, json_option, pool_command
from .report import emit_json
from .tables import Column, print_pairs, print_table, size_text


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
    "  thinpool status /srv/pool --reclaim\n  thinpool status /srv/pool --explain\n  thinpool status /srv/pool --dm",
)
@click.option("-b", "--bytes", "exact", is_flag=True, help="Print sizes in bytes.")
@click.option("--reclaim", is_flag=True, help="Show what deleting snapshots would give back.")
@click.option("--explain", is_flag=True, help="Show what the used space is used for, to the block.")
@click.option("--dm", "as_dm", is_flag=True, help="Print the lines `dmsetup status` would print.")
@json_option
@pool_command()
def status_command(
    location: PoolLocation, *, exact: bool, reclaim: bool, explain: bool, as_dm: bool, as_json: bool
) -> None:
    """Show how full a pool is, how long it lasts at the present rate, its mode, and who serves it.

    The rate is that of the last ten minutes; a server measures it. With --reclaim: the snapshots, oldest first, with
    what deleting each would free, alone and together with all above it. What several share is freed by the last. With
    --explain: every device, what it shows (LIVE), what of that nobody else does (ALONE), and what only its
    snapshots still hold (HELD); above them how all of it adds up to what is used. It counts every mapping.
    """
    from thinpool.pool_access import PoolAccess

    access = PoolAccess(location)
    if reclaim + explain + as_dm > 1:
        raise click.UsageError(message="--reclaim, --explain and --dm exclude each other")
    if explain:
        _print_use(access.operate("explain", {})["use"], exact=exact, as_json=as_json)
        return
    if reclaim:
        _print_reclaim(access.operate("reclaim", {}), exact=exact, as_json=as_json)
        return
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


USE_COLUMNS = (
    Column("DEVICE"),
    Column("LIVE", figures=True),
    Column("ALONE", figures=True),
    Column("HELD", figures=True),
    Column("BY"),
)


def _print_use(use: dict[str, Any], *, exact: bool, as_json: bool) -> None:
    if as_json:
        emit_json(use)
        return
    unreached = "a metadata snapshot is held" if use["metadata_snapshot_held"] else "leaks: `thinpool check`"

    def size(key: str) -> str:
        return size_text(use[key], exact=exact)

    print_pairs(
        [
            ("data used", size("used_bytes")),
            ("by one device each", size("alone_bytes")),
            ("shared by several", size("shared_bytes")),
            ("by no device", size("unreached_bytes") + (f" ({unreached})" if use["unreached_bytes"] else "")),
            ("free, but set aside", size("reserved_bytes")),
            ("metadata used", size("metadata_used_bytes")),
        ]
    )
    click.echo()
    rows = [
        (
            device["name"],
            *(size_text(device[key], exact=exact) for key in ("live_bytes", "alone_bytes", "held_bytes")),
            ", ".join(device["held_by"]) or "-",
        )
        for device in use["devices"]
    ]
    print_table(USE_COLUMNS, rows)


RECLAIM_COLUMNS = (
    Column("SNAPSHOT"),
    Column("CREATED"),
    Column("ORIGIN"),
    Column("MODE"),
    Column("OPEN", figures=True),
    Column("ALONE", figures=True),
    Column("WITH ALL ABOVE", figures=True),
)


def _print_reclaim(result: dict[str, Any], *, exact: bool, as_json: bool) -> None:
    if as_json:
        emit_json(result)
        return
    rows = [
        (
            snapshot["name"],
            snapshot["created"],
            snapshot["origin"] or "-",
            "ro" if snapshot["read_only"] else "rw",
            str(snapshot["open_count"]),
            size_text(snapshot["alone_bytes"], exact=exact),
            size_text(snapshot["together_bytes"], exact=exact),
        )
        for snapshot in result["snapshots"]
    ]
    print_table(RECLAIM_COLUMNS, rows)


def _lasts(status: dict[str, Any], kind: str) -> str:
    """How long a level lasts, in words."""
    rate, full_in = status[f"{kind}_rate_bytes_per_second"], status[f"{kind}_full_in_seconds"]
    if rate is None:
        return "unknown yet" if status["watched"] else "unknown (measured while the pool is served)"
    if full_in is None:
        return "not growing"
    return f"{duration(full_in)} at {iec(int(rate))}/s"


def _marks(status: dict[str, Any], kind: str, limit_key: str, *, exact: bool) -> str:
    """What happens on the way up."""
    mark, limit, size = (
        status[f"{kind}_low_water_bytes"],
        int(status[limit_key]),
        int(status[f"{kind}_bytes"]),
    )
    low = (
        f"tells at {size_text(mark, exact=exact)}" if mark is not None else "does not tell before it is full"
    )
    if limit > size:
        return f"{low}, grows by itself up to {size_text(limit, exact=exact)}"
    return f"{low}, does not grow by itself"


def _full_policy(status: dict[str, Any]) -> str:
    seconds = int(status["queue_timeout_seconds"])
    if status["when_full"] == "error":
        return "writes that need space fail at once"
    limit = f"up to {seconds} s" if seconds else "for ever"
    text = f"writes that need space wait {limit}"
    if status["refusing"]:
        return text + "; that has passed, they fail now"
    waiting = int(status["waiting_connections"])
    return text + (f"; {waiting} connections wait now" if waiting else "")


def _print_status(status: dict[str, Any], server: dict[str, Any] | None, *, exact: bool) -> None:
    def amount(kind: str) -> str:
        total, used = int(status[f"{kind}_bytes"]), int(status[f"{kind}_used_bytes"])
        free = size_text(int(status[f"{kind}_free_bytes"]), exact=exact)
        percent = 100 * used / total if total else 0.0
        text = f"{size_text(used, exact=exact)} of {size_text(total, exact=exact)} ({percent:.1f} %), {free} free"
        reserved = int(status["data_reserved_bytes"]) if kind == "data" else 0
        return text + (f", {size_text(reserved, exact=exact)} of it reserved" if reserved else "")

    pairs = [
        ("pool", shown_path(status["location"])),
        ("mode", str(status["mode"]) + (" (needs check)" if status.get("needs_check") else "")),
        ("data", amount("data")),
        ("data lasts", _lasts(status, "data")),
        ("metadata", amount("metadata")),
        ("metadata lasts", _lasts(status, "metadata")),
        ("low water", _marks(status, "data", "autogrow_limit_bytes", exact=exact)),
        ("of metadata", _marks(status, "metadata", "metadata_autogrow_limit_bytes", exact=exact)),
        ("when full", _full_policy(status)),
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

"""Commands on object stores: push, verify, forget, gc, and the listing of a store.

In: options, progress, what is printed. Out: the work (`thinpool/store/`), reaching pools (`push_source.py`).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thinpool.pool_location import PoolLocation
from thinpool.wording import escaped, iec, quoted

from .arguments import json_option, key_file_option, pool_command
from .report import emit_json
from .tables import Column, print_table, size_text
from .work_progress import WorkProgress

if TYPE_CHECKING:
    from thinpool.store.store import Store

COLUMNS = (
    Column("NAME"),
    Column("SIZE", figures=True),
    Column("MAPPED", figures=True),
    Column("SENT", figures=True),
    Column("CREATED"),
    Column("PUSHED"),
    Column("HOST"),
)
FAULTS_SHOWN_MAX = 100


def secret_of(key_file: Path | None) -> bytes | None:
    """The key in a file; None where no file is given. Raises click.UsageError for an empty one."""
    if key_file is None:
        return None
    secret = key_file.read_bytes().removesuffix(b"\n")
    if not secret:
        raise click.UsageError(message=f"{key_file} is empty")
    return secret


def open_store(url: str, key_file: Path | None, *, create: bool = False) -> Store:
    """The store at a URL. Raises the leaves of `store_errors.py`."""
    from thinpool.store.store import Store

    return Store.open(url, secret_of(key_file), create=create)


def _date(seconds: float) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


@click.command(
    "push",
    epilog="\b\nExamples:\n  thinpool push /srv/pool disk-monday s3://bucket/fleet\n"
    "  thinpool push /srv/pool disk-monday file:///mnt/backup/store --as web1-monday\n"
    "  thinpool push /srv/pool disk-monday s3://bucket/private --key-file /etc/thinpool/key",
)
@click.option(
    "--as", "stored_as", metavar="NAME", help="Its name in the store; otherwise that of the snapshot."
)
@key_file_option
@json_option
@pool_command("SNAPSHOT", "URL")
def push_command(
    location: PoolLocation,
    *,
    snapshot: str,
    url: str,
    stored_as: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Send a read-only snapshot into an object store.

    Only what the store does not have is sent: against a snapshot of this pool that was pushed before, the mappings
    are compared and unchanged blocks are not even read; equal blocks of other devices and hosts are sent once. Each
    snapshot in a store is complete in itself. An interrupted push goes on where it was when it is run again, and any
    number of hosts may push at once.

    The first push makes the store, encrypted where a key is given.
    """
    from thinpool.push_source import push_source
    from thinpool.store.known_chunks import KnownChunks, cache_path
    from thinpool.store.pushing import Push

    with push_source(location, snapshot) as source:
        store = open_store(url, key_file, create=True)
        known = KnownChunks(cache_path(store.keys.store_id))
        try:
            with WorkProgress("pushing") as progress:
                push = Push(store, source, stored_as or snapshot, known, progress=progress.show)
                report = push.run()
        finally:
            known.close()
    if as_json:
        emit_json({"push": asdict(report), "requests": asdict(store.objects.traffic)})
    elif report.up_to_date:
        click.echo(f"snapshot {quoted(report.name)} is in the store already")
    else:
        since = f" since {quoted(report.base)}" if report.base is not None else ""
        click.echo(
            f"snapshot {quoted(report.name)}: {iec(report.read_bytes)} looked at{since}, "
            f"{report.new_chunks} new chunks, {iec(report.sent_bytes)} sent"
        )


def list_store(url: str, key_file: Path | None, *, exact: bool, no_header: bool, as_json: bool) -> None:
    """Print the snapshots of a store."""
    found = open_store(url, key_file).descriptions()
    if as_json:
        emit_json({"snapshots": [asdict(about) for about in found]})
        return
    rows = [
        [
            about.name,
            *(
                size_text(size, exact=exact)
                for size in (about.size_bytes, about.mapped_bytes, about.stored_bytes)
            ),
            _date(about.created),
            _date(about.pushed),
            about.host,
        ]
        for about in found
    ]
    print_table(COLUMNS, rows, header=not no_header)


@click.command(
    "verify",
    epilog="\b\nExamples:\n  thinpool verify s3://bucket/fleet\n"
    "  thinpool verify s3://bucket/fleet disk-monday --read-data",
)
@click.argument("url", metavar="URL")
@click.argument("names", nargs=-1, metavar="[SNAPSHOT]...")
@click.option("--read-data", is_flag=True, help="Read every chunk and prove its content.")
@click.option(
    "--condemn",
    is_flag=True,
    help="Let no later push rely on damaged packs: what lies in them is sent anew when it is pushed again.",
)
@key_file_option
@json_option
@click.pass_context
def verify_command(
    context: click.Context,
    *,
    url: str,
    names: tuple[str, ...],
    read_data: bool,
    condemn: bool,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Check that a store holds all its snapshots need.

    Manifests and segments are read and proven, packs are looked for; with --read-data every chunk is read as well.
    What is damaged is named, with the snapshots that suffer; the exit code is 6 then.
    """
    from thinpool.errors import ExitCode
    from thinpool.store.keys import CHUNK_BYTES
    from thinpool.store.verifying import Verification

    store = open_store(url, key_file)
    with WorkProgress("verifying") as progress:

        def show(chunks: int) -> None:
            progress.show(chunks * CHUNK_BYTES, None)

        report = Verification(store, read_data=read_data, progress=show).run(names)
    if condemn:
        for pack in report.damaged_packs:
            store.condemn(pack)
    if as_json:
        emit_json(
            {
                "snapshots": report.snapshots,
                "chunks": report.chunks,
                "read_bytes": report.read_bytes,
                "faults": [asdict(fault) for fault in report.faults],
            }
        )
    else:
        for fault in report.faults[:FAULTS_SHOWN_MAX]:
            click.echo(f"snapshot {quoted(fault.snapshot)}: {escaped(fault.key)}: {escaped(fault.reason)}")
        if len(report.faults) > FAULTS_SHOWN_MAX:
            click.echo(f"and {len(report.faults) - FAULTS_SHOWN_MAX} more")
        state = f"{len(report.faults)} faults" if report.faults else "no faults"
        click.echo(f"{report.snapshots} snapshots, {report.chunks} chunks: {state}")
    if report.faults:
        context.exit(int(ExitCode.DAMAGED))


@click.command("forget", epilog="\b\nExample:\n  thinpool forget s3://bucket/fleet disk-monday")
@click.argument("url", metavar="URL")
@click.argument("names", nargs=-1, required=True, metavar="SNAPSHOT...")
@key_file_option
@json_option
def forget_command(*, url: str, names: tuple[str, ...], key_file: Path | None, as_json: bool) -> None:
    """Remove snapshots from a store. Others are not affected; `gc` gives the space back."""
    store = open_store(url, key_file)
    for name in names:
        store.forget(name)
    if as_json:
        emit_json({"forgotten": list(names)})
    else:
        click.echo(f"forgot {', '.join(quoted(name) for name in names)}")


@click.command(
    "gc",
    epilog="\b\nExamples:\n  thinpool gc s3://bucket/fleet\n  thinpool gc s3://bucket/fleet --grace 0\n"
    "  thinpool gc s3://bucket/fleet --lease 600 --drop-pulls 604800 --json",
)
@click.argument("url", metavar="URL")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a pack that nobody needs stays before it is deleted, by the store's clock.",
)
@click.option(
    "--lease",
    type=click.FloatRange(min=0),
    default=86400.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a push may be silent before it is given up; one at work is heard of every 600 s.",
)
@click.option(
    "--drop-pulls",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Give up pulls that began so long ago, of pools that are lost; never done otherwise.",
)
@key_file_option
@json_option
def gc_command(
    *, url: str, grace: float, lease: float, drop_pulls: float | None, key_file: Path | None, as_json: bool
) -> None:
    """Delete what no snapshot in a store needs. May run at any time, beside pushes and pulls.

    What is not needed is marked by one run and deleted by the first that comes after the grace period. Pushes that
    died are given up after a day, or --lease; one that was alive all the same sends again what was deleted. A pull
    keeps what it needs until it is complete; one that was given up by --drop-pulls has to be begun anew.
    """
    import math

    from thinpool.store.collecting import collect

    store = open_store(url, key_file)
    report = collect(
        store,
        grace_seconds=grace,
        lease_seconds=lease,
        pull_seconds=math.inf if drop_pulls is None else drop_pulls,
    )
    if as_json:
        emit_json({"collected": asdict(report), "requests": asdict(store.objects.traffic)})
        return
    click.echo(
        f"{report.snapshots} snapshots, {report.packs} packs: {report.deleted} deleted ({iec(report.freed_bytes)}), "
        f"{iec(report.waiting_bytes)} to go after the grace period"
    )
    if report.pushes or report.pulls:
        click.echo(f"{report.pushes} pushes and {report.pulls} pulls keep what they need")
    left = report.pushes_given_up + report.pulls_given_up + report.unfinished_writes
    if left:
        click.echo(
            f"given up: {report.pushes_given_up} pushes, {report.pulls_given_up} pulls; "
            f"{report.unfinished_writes} unfinished writes removed"
        )

"""The command that brings snapshots back from an object store: pull.

In: beginning in a server or here, waiting for the end. Out: the work (`thinpool/lazy_devices.py`, `hydration.py`).
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thinpool.pool_location import PoolLocation
from thinpool.wording import iec, quoted

from .arguments import json_option, key_file_option, pool_command
from .report import emit_json, warn
from .store import secret_of
from .work_progress import WorkProgress

if TYPE_CHECKING:
    from thinpool.lazy_devices import PullRequest
    from thinpool.pool_access import PoolAccess

POLL_SECONDS = 0.2


@click.command(
    "pull",
    epilog="\b\nExamples:\n  thinpool pull s3://bucket/fleet /srv/pool disk --snapshot disk-monday\n"
    "  thinpool pull s3://bucket/fleet /srv/pool disk-tuesday --base disk-monday --read-only\n"
    "  thinpool pull s3://bucket/images /srv/pool debian-12 --lazy --read-only\n"
    "  thinpool pull s3://bucket/fleet /srv/pool disk --abort",
)
@click.argument("url", metavar="URL")
@click.option("--snapshot", metavar="STORED", help="Its name in the store; otherwise NAME.")
@click.option(
    "-i", "--base", metavar="DEVICE", help="Fetch only what this snapshot in the pool does not have."
)
@click.option("--lazy", is_flag=True, help="Make the device usable at once, and fetch while it is used.")
@click.option(
    "--read-only", is_flag=True, help="Nobody may write to the device; it may be a base of later pushes."
)
@click.option("--abort", is_flag=True, help="Drop a device that was not pulled to its end.")
@key_file_option
@json_option
@pool_command("NAME", bare=False)
def pull_command(
    location: PoolLocation,
    *,
    url: str,
    name: str,
    snapshot: str | None,
    base: str | None,
    lazy: bool,
    read_only: bool,
    abort: bool,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Bring a snapshot from an object store into a pool, as a new device.

    Every chunk is proven to be what was pushed. The device appears when it is complete; interrupted, the same command
    goes on. The pool may have another block size than the one the snapshot came from.

    With --base the device begins as a snapshot of one that was pulled, received or pushed before, under whatever name,
    and shares with it all that did not change. The store must still have that snapshot too.

    With --lazy the device is there at once. Blocks are fetched when they are first read, and all others in the
    background by the server of the pool, also after a restart; what is there stays readable when the store goes away,
    the rest is an I/O error until it is back. The server needs the credentials, and the key file at its place. The
    same command without --lazy waits until everything is there.
    """
    from thinpool.errors import PoolNotServed
    from thinpool.lazy_devices import PullRequest
    from thinpool.pool_access import PoolAccess

    access = PoolAccess(location)
    if abort:
        _report({"aborted": access.operate("pull-abort", {"name": name})["aborted"]}, as_json=as_json)
        return
    secret_of(key_file)
    request = PullRequest(
        url=url,
        snapshot=snapshot or name,
        name=name,
        lazy=lazy,
        read_only=read_only,
        key_file=None if key_file is None else str(key_file.absolute()),
        base=base,
    )
    try:
        access.server()
    except PoolNotServed:
        state = _pull_here(location, request)
    else:
        state = _pull_there(access, request)
    _report({"pull": state}, as_json=as_json)


def _report(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit_json(result)
    elif "aborted" in result:
        click.echo(f"dropped {quoted(result['aborted'])}")
    elif result["pull"]["complete"]:
        click.echo(f"device {quoted(result['pull']['name'])} of {iec(result['pull']['size_bytes'])}")
    else:
        state = result["pull"]
        click.echo(
            f"device {quoted(state['name'])} of {iec(state['size_bytes'])}, up to {iec(state['remote_bytes'])} still "
            "in the store; it is fetched while the pool is served"
        )


def _pull_here(location: PoolLocation, request: PullRequest) -> dict[str, Any]:
    """In a pool that nobody serves: this process fetches."""
    from thinpool.hydration import hydrate
    from thinpool.operations import as_leaf
    from thinpool.pool_access import open_here

    pool = open_here(location)
    try:
        try:
            pool.begin_pull(request)
            entry = pool.catalog.by_name(request.name)
            assert entry is not None
            lazy = pool.lazy.of(entry)
            if lazy is not None and not request.lazy:
                with WorkProgress("pulling") as progress:
                    hydrate(lazy, threading.Event(), progress.show)
                pool.lazy.complete(entry)
            return pool.pull_state(request.name)
        except Exception as error:
            translated = as_leaf(error, str(location))
            if translated is error:
                raise
            raise translated from error
    finally:
        pool.close()


def _pull_there(access: PoolAccess, request: PullRequest) -> dict[str, Any]:
    """In a served pool: its server fetches, and goes on should this command end."""
    from thinpool.errors import RemoteFailure

    state: dict[str, Any] = access.operate("pull", asdict(request))["pull"]
    total, warned = state["remote_bytes"], False
    with WorkProgress("pulling") as progress:
        while not request.lazy and not state["complete"]:
            if state["may_pass"] and not warned:
                warn(f"{state['failure']} (the server of the pool goes on trying; so does this command wait)")
                warned = True
            elif state["failure"] is not None and not state["may_pass"]:
                raise RemoteFailure(
                    kind="pull", message=f"{state['failure']}; it goes on trying in the background"
                )
            progress.show(total - state["remote_bytes"], total)
            time.sleep(POLL_SECONDS)
            state = access.operate("pull-state", {"name": request.name})["pull"]
    return state

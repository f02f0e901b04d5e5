"""The commands that move snapshots: send, receive."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO

import click

from thinpool.pool_location import PoolLocation
from thinpool.wording import iec, quoted

from .arguments import SIZE, json_option, pool_command
from .progress import TransferProgress
from .report import emit_json, warn

if TYPE_CHECKING:
    from thinpool.sending import Sent
    from thinpool.snapshot_source import SnapshotSource

LEVEL_MAX = 19
PIPE_BYTES = 1 << 20
F_SETPIPE_SZ = 1031  # linux/fcntl.h


@click.command(
    "send",
    epilog="\b\nExamples:\n  thinpool send /srv/pool disk-monday > monday.stream\n"
    "  thinpool send /srv/pool disk-tuesday -i disk-monday | ssh host thinpool receive /srv/pool disk-tuesday\n"
    "  thinpool send /srv/pool disk-tuesday -i disk-monday -n\n"
    "  ssh host thinpool list /srv/pool --json > there; thinpool send /srv/pool disk-tuesday --common there > stream\n"
    "  thinpool send /srv/pool --resume TOKEN | ssh host thinpool receive -s /srv/pool disk-tuesday",
)
@click.option("-i", "--base", metavar="SNAPSHOT", help="Send only what changed since this snapshot.")
@click.option(
    "--common",
    type=click.File("r"),
    metavar="FILE",
    help="Send what changed since the nearest snapshot that is in FILE too: `thinpool list --json` of the other pool.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Send nothing; say how much it would be.")
@click.option("-v", "--verbose", is_flag=True, help="Say on standard error what was sent.")
@click.option(
    "--compress",
    "level",
    type=click.IntRange(0, LEVEL_MAX),
    default=1,
    show_default=True,
    metavar="LEVEL",
    help="Level of zstd, 0 for none.",
)
@click.option("--rate-limit", type=SIZE, metavar="SIZE", help="Bytes a second at most, e.g. 20M.")
@click.option(
    "--resume", metavar="TOKEN", help="Go on where an interrupted `receive -s` ended; no NAME then."
)
@json_option
@pool_command("NAME", dropped_by="resume")
def send_command(
    location: PoolLocation,
    *,
    name: str,
    base: str | None,
    common: TextIO | None,
    dry_run: bool,
    verbose: bool,
    level: int,
    rate_limit: int | None,
    resume: str | None,
    as_json: bool,
) -> None:
    """Write a device or snapshot as a stream to standard output, for `thinpool receive`.

    With -i the stream holds only what changed, holes included, and can be received where the base is. A device
    that clients may write to is frozen in a snapshot first, which is deleted afterwards; for increments, take
    read-only snapshots yourself. See docs/send-receive.md.
    """
    from thinpool.source_access import SourceRequest
    from thinpool.transfer_access import open_source

    if as_json and not dry_run:
        raise click.UsageError(message="--json goes with --dry-run; standard output is the stream")
    if resume is not None and base is not None:
        raise click.UsageError(message="--resume and --base exclude each other; the token knows the base")
    if not dry_run and sys.stdout.isatty():
        raise click.UsageError(message="a stream is not for a terminal; redirect it or pipe it")
    if common is not None:
        if base is not None or resume is not None:
            raise click.UsageError(message="--common finds the base; it excludes --base and --resume")
        base = _common_base(location, name, common)
    request = SourceRequest(token=resume) if resume is not None else SourceRequest(name, base)
    with open_source(location, request) as (source, start_bytes):
        if dry_run:
            _estimate(source, start_bytes, as_json=as_json)
            return
        sent = _send(source, start_bytes, level, rate_limit)
    if verbose:
        warn(_sent_sentence(source, sent))


def _common_base(location: PoolLocation, name: str, common: TextIO) -> str:
    """The nearest snapshot that both pools have. Raises NoSuchDevice, NothingInCommon, click.UsageError."""
    from datetime import datetime

    from thinpool.common_bases import nearest, related
    from thinpool.errors import NoSuchDevice, NothingInCommon
    from thinpool.pool_access import PoolAccess

    def seconds_of(date: str) -> float:
        return datetime.fromisoformat(date).timestamp()

    try:
        held = {device["content_id"] for device in json.load(common)["devices"] if _is_whole(device)}
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{common.name} is no output of `thinpool list --json`: {error}"
        raise click.UsageError(message=reason) from error
    listed = PoolAccess(location).operate("list", {})["devices"]
    held &= {found["content_id"] for found in listed if _is_whole(found)}
    devices = [SimpleNamespace(**{**found, "created": seconds_of(found["created"])}) for found in listed]
    device = next((found for found in devices if found.name == name), None)
    if device is None:
        raise NoSuchDevice(name, str(location))
    base = nearest(related(device, devices), held)
    if base is None:
        raise NothingInCommon(name)
    return base.name


def _is_whole(device: dict[str, Any]) -> bool:
    """Whether a device can be a base: not one that is still on its way into its pool."""
    return not device["receiving"] and not device["remote_bytes"]


def _send(source: SnapshotSource, start_bytes: int, level: int, rate_limit: int | None) -> Sent:
    from thinpool.sending import Sender, SendOptions

    descriptor = sys.stdout.fileno()
    _widen(descriptor)

    def sink(data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    total = source.totals(start_bytes)[0] if TransferProgress.wanted() else 0
    with TransferProgress(f"sending {source.device.name}", total) as progress:
        options = SendOptions(level=level, rate_bytes=rate_limit or 0, start_bytes=start_bytes)
        return Sender(source, sink, options, progress.update).run()


def _widen(descriptor: int) -> None:
    """Ask for a larger pipe; where it is none, or the user has no more room, it stays as it is."""
    import fcntl

    try:
        fcntl.fcntl(descriptor, F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        return


def _sent_sentence(source: SnapshotSource, sent: Sent) -> str:
    since = "" if source.base is None else f" since {quoted(source.base.name)}"
    return (
        f"sent {quoted(source.device.name)}{since}: {iec(sent.data_bytes)} of data and {iec(sent.hole_bytes)} of holes "
        f"in {iec(sent.stream_bytes)}; SHA-256 {sent.digest}"
    )


def _estimate(source: SnapshotSource, start_bytes: int, *, as_json: bool) -> None:
    data_bytes, hole_bytes = source.totals(start_bytes)
    device, base = source.device, source.base
    if as_json:
        emit_json(
            {
                "device": device.name,
                "content_id": device.content_id,
                "size_bytes": device.size_bytes,
                "base": None if base is None else base.name,
                "start_bytes": start_bytes,
                "data_bytes": data_bytes,
                "hole_bytes": hole_bytes,
            }
        )
        return
    since = "full stream" if base is None else f"increment on {quoted(base.name)}"
    click.echo(
        f"would send {quoted(device.name)} ({since}): {iec(data_bytes)} of data before compression, "
        f"{iec(hole_bytes)} of holes"
    )


@click.command(
    "receive",
    epilog="\b\nExamples:\n  thinpool receive /srv/pool disk-monday < monday.stream\n"
    "  ssh host thinpool send /srv/pool disk-tuesday -i disk-monday | thinpool receive -s /srv/pool disk-tuesday\n"
    "  thinpool receive -n /srv/pool disk-tuesday < tuesday.stream\n"
    "  thinpool receive --abort /srv/pool disk-tuesday",
)
@click.option("-s", "--resumable", is_flag=True, help="If interrupted, keep what arrived and print a token.")
@click.option(
    "-n", "--dry-run", is_flag=True, help="Check the whole stream, say what would be done, write nothing."
)
@click.option("-v", "--verbose", is_flag=True, help="Say what was received, with the stream's SHA-256.")
@click.option("--writable", is_flag=True, help="Let clients write to the device; it is read-only otherwise.")
@click.option("--abort", is_flag=True, help="Drop what is partly received under NAME.")
@json_option
@pool_command("NAME")
def receive_command(
    location: PoolLocation,
    *,
    name: str,
    resumable: bool,
    dry_run: bool,
    verbose: bool,
    writable: bool,
    abort: bool,
    as_json: bool,
) -> None:
    """Take in a stream of `thinpool send` from standard input, as a new device NAME.

    The device appears when the whole stream has arrived and was found right, and not before. An increment needs its
    base in the pool, under whatever name, and shares with it what did not change. Where NAME is that base itself,
    unchanged and not in use, it is brought forward. Anything else that is called NAME is refused.
    """
    from thinpool.pool_access import PoolAccess

    if abort:
        result = PoolAccess(location).operate("receive-abort", {"name": name})
        if as_json:
            emit_json(result)
        else:
            click.echo(f"dropped what was received of {quoted(name)}")
        return
    if sys.stdin.isatty():
        raise click.UsageError(message="a stream comes from a file or a pipe, not from a terminal")
    result = _receive(location, name, resumable=resumable, read_only=not writable, dry_run=dry_run)
    if as_json:
        emit_json(result)
    elif dry_run:
        click.echo(_plan_sentence(result))
    elif verbose:
        click.echo(
            f"received {quoted(name)}: {iec(result['data_bytes'])} of data and {iec(result['hole_bytes'])} of holes; "
            f"SHA-256 {result['digest']}"
        )


def _plan_sentence(plan: dict[str, Any]) -> str:
    what = "full stream" if plan["base"] is None else f"increment on {quoted(plan['base'])}"
    if plan["start_bytes"]:
        what = f"resumed after {iec(plan['start_bytes'])}"
    verb = "bring forward" if plan["replaces"] else "receive"
    return (
        f"would {verb} {quoted(plan['name'])} of {iec(plan['size_bytes'])} ({what}): {iec(plan['data_bytes'])} of data "
        f"and {iec(plan['hole_bytes'])} of holes, {iec(plan['free_bytes'])} free; the stream is whole, "
        f"SHA-256 {plan['digest']}"
    )


def _receive(
    location: PoolLocation, name: str, *, resumable: bool, read_only: bool, dry_run: bool
) -> dict[str, Any]:
    from thinpool.receiving import ReceiveOptions
    from thinpool.transfer_access import receive_into

    descriptor = sys.stdin.fileno()
    _widen(descriptor)
    options = ReceiveOptions(name, resumable=resumable, read_only=read_only, dry_run=dry_run)
    doing = "checking" if dry_run else "receiving"
    with TransferProgress(f"{doing} {name}", None) as progress:
        try:
            return receive_into(location, progress.counting(_reader(descriptor)), options)
        except BaseException:
            if resumable and not dry_run:
                _print_token(location, name)
            raise


def _reader(descriptor: int) -> Callable[[int], bytes]:
    return lambda count: os.read(descriptor, count)


def _print_token(location: PoolLocation, name: str) -> None:
    """Say how to go on, where something is there to go on with."""
    from thinpool.errors import ThinPoolError
    from thinpool.pool_access import PoolAccess

    try:
        devices = PoolAccess(location).operate("list", {})["devices"]
    except (ThinPoolError, OSError):
        return
    for device in devices:
        if device["name"] == f"{name}/receiving" and device["resume_token"]:
            warn(f"to go on: thinpool send POOL --resume {device['resume_token']}")

"""Commands on devices: create, list, snapshot, delete, rename, resize, reserve, rollback."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from thinpool.pool_location import PoolLocation
from thinpool.wording import iec, quoted

from .arguments import SIZE, json_option, key_file_option, pool_command
from .report import emit_json
from .tables import Column, print_table, size_text

COLUMNS = (
    Column("NAME"),
    Column("SIZE", figures=True),
    Column("MAPPED", figures=True),
    Column("EXCLUSIVE", figures=True),
    Column("SHARED", figures=True),
    Column("ORIGIN"),
    Column("CREATED"),
    Column("MODE"),
    Column("OPEN", figures=True),
    Column("RESERVED", figures=True),
)
force_option = click.option(
    "--force", is_flag=True, help="Overrule the pool's min-free settings and its overcommit limit."
)
disconnect_option = click.option(
    "--disconnect", is_flag=True, help="Drop clients that are connected, instead of refusing."
)


def _operate(location: PoolLocation, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    from thinpool.pool_access import PoolAccess

    return PoolAccess(location).operate(name, parameters)


def _drop_clients(location: PoolLocation, name: str) -> None:
    """Disconnect a device's clients; nothing to do where nobody serves the pool."""
    from thinpool.errors import PoolNotServed
    from thinpool.pool_access import PoolAccess

    try:
        PoolAccess(location).client().disconnect(name)
    except PoolNotServed:
        return


def _report(result: dict[str, Any], sentence: str, *, as_json: bool) -> None:
    if as_json:
        emit_json(result)
    else:
        click.echo(sentence)


@click.command(
    "create",
    epilog="\b\nExamples:\n  thinpool create /srv/pool disk --size 10G\n"
    "  thinpool create /srv/pool database --size 100G --reserve 20G",
)
@click.option(
    "--size", type=SIZE, required=True, help="Size of the device, e.g. 10G. It may exceed the pool's."
)
@click.option(
    "--reserve", type=SIZE, default=0, help="Set so much of the pool aside for it (see `thinpool reserve`)."
)
@force_option
@json_option
@pool_command("NAME")
def create_command(
    location: PoolLocation, *, name: str, size: int, reserve: int, force: bool, as_json: bool
) -> None:
    """Create an empty device. It takes space as it is written."""
    parameters = {"name": name, "size_bytes": size, "force": force, "reservation_bytes": reserve}
    result = _operate(location, "create", parameters)
    made = result["device"]
    _report(result, f"device {quoted(made['name'])} of {iec(made['size_bytes'])}", as_json=as_json)


@click.command(
    "list",
    epilog="\b\nExamples:\n  thinpool list /srv/pool\n  thinpool list /srv/pool -H -b | cut -f1,3\n"
    "  thinpool ls s3://bucket/fleet",
)
@click.option("-b", "--bytes", "exact", is_flag=True, help="Print sizes in bytes.")
@click.option("-H", "--no-header", is_flag=True, help="No header, fields separated by one tab.")
@key_file_option
@json_option
@pool_command(store=True)
def list_command(
    location: PoolLocation | None,
    *,
    url: str | None,
    key_file: Path | None,
    exact: bool,
    no_header: bool,
    as_json: bool,
) -> None:
    """List devices and snapshots with what they hold, or the snapshots in an object store.

    MAPPED is what a device can read that was written; EXCLUSIVE of that is what deleting it alone would free; SHARED
    is held by others as well. OPEN counts connections. RESERVED is what a device can always have for itself.

    A word with `://` in it is the URL of a store. Of its snapshots MAPPED is what they can read, SENT what their push
    added to the store.
    """
    if location is None:
        from .store import list_store

        list_store(str(url), key_file, exact=exact, no_header=no_header, as_json=as_json)
        return
    result = _operate(location, "list", {})
    if as_json:
        emit_json(result)
        return
    rows = [_row(device, exact=exact) for device in result["devices"]]
    print_table(COLUMNS, rows, header=not no_header)


def _row(device: Mapping[str, Any], *, exact: bool) -> list[str]:
    sizes = ("size_bytes", "mapped_bytes", "exclusive_bytes", "shared_bytes")
    return [
        str(device["name"]),
        *("?" if device[key] is None else size_text(int(device[key]), exact=exact) for key in sizes),
        str(device["origin"] or "-"),
        str(device["created"]),
        "receiving" if device["receiving"] else "ro" if device["read_only"] else "rw",
        str(device["open_count"]),
        size_text(int(device["reservation_bytes"]), exact=exact) if device["reservation_bytes"] else "-",
    ]


@click.command(
    "snapshot",
    epilog="\b\nExamples:\n  thinpool snapshot /srv/pool disk disk-monday --read-only\n"
    "  thinpool snapshot /srv/pool disk-monday disk-test --size 200G",
)
@click.option("--read-only", is_flag=True, help="Nobody may write to the snapshot.")
@click.option("--size", type=SIZE, help="A larger size than the origin's; what is beyond that reads zeros.")
@force_option
@json_option
@pool_command("ORIGIN", "NAME")
def snapshot_command(
    location: PoolLocation,
    *,
    origin: str,
    name: str,
    read_only: bool,
    size: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Snapshot a device, also while it is in use.

    Whatever was acknowledged to clients before is in it. A file system that is mounted is caught as by a power
    cut; `sync` (or fsfreeze) before makes it current.
    """
    given = {"origin": origin, "name": name, "read_only": read_only, "force": force, "size_bytes": size}
    result = _operate(location, "snapshot", given)
    _report(result, f"snapshot {quoted(name)} of {quoted(origin)}", as_json=as_json)


@click.command("delete", epilog="\b\nExample:\n  thinpool delete /srv/pool disk-monday")
@disconnect_option
@json_option
@pool_command("NAME")
def delete_command(location: PoolLocation, *, name: str, disconnect: bool, as_json: bool) -> None:
    """Delete a device or snapshot.

    Blocks that no other device shares become free. Snapshots of it stay whole. Also called rm and destroy.
    """
    if disconnect:
        _drop_clients(location, name)
    result = _operate(location, "delete", {"name": name})
    _report(result, f"deleted {quoted(name)}", as_json=as_json)


@click.command(
    "rename",
    epilog="\b\nExamples:\n  thinpool rename /srv/pool disk old-disk\n"
    "  thinpool rename /srv/pool disk-restored disk --exchange",
)
@click.option("--exchange", is_flag=True, help="NEW is a device too: the two trade names, at once.")
@json_option
@pool_command("OLD", "NEW")
def rename_command(location: PoolLocation, *, old: str, new: str, exchange: bool, as_json: bool) -> None:
    """Rename a device. Clients that have it open keep it.

    With --exchange what was received or restored beside a device takes its place, with no moment in which the name
    is nobody's: whoever connects from then on gets the other one.
    """
    result = _operate(location, "rename", {"old": old, "new": new, "exchange": exchange})
    said = f"exchanged the names of {quoted(old)} and {quoted(new)}"
    _report(result, said if exchange else f"renamed {quoted(old)} to {quoted(new)}", as_json=as_json)


@click.command("resize", epilog="\b\nExample:\n  thinpool resize /srv/pool disk --size 20G")
@click.option("--size", type=SIZE, required=True, help="The new size.")
@click.option("--shrink", is_flag=True, help="Allow a smaller size; what lies beyond is lost.")
@json_option
@pool_command("NAME")
def resize_command(location: PoolLocation, *, name: str, size: int, shrink: bool, as_json: bool) -> None:
    """Change the size of a device. Clients see it when they connect again."""
    result = _operate(location, "resize", {"name": name, "size_bytes": size, "shrink": shrink})
    _report(result, f"device {quoted(name)} of {iec(result['device']['size_bytes'])}", as_json=as_json)


@click.command(
    "reserve",
    epilog="\b\nExamples:\n  thinpool reserve /srv/pool disk 20G\n  thinpool reserve /srv/pool disk none",
)
@json_option
@pool_command("NAME", "SIZE", bare=False)
def reserve_command(location: PoolLocation, *, name: str, size: str, as_json: bool) -> None:
    """Set part of a pool aside for a device; SIZE is none for nothing.

    The device can always have SIZE of data for itself, whatever other devices write. What it has already counts. A
    snapshot of it shares everything it has, so it needs SIZE to be free once more, and is refused otherwise. The
    reservation is refused where the pool has too little free, besides those of other devices.
    """
    reserved = 0 if size == "none" else SIZE.convert(size, None, None)
    result = _operate(location, "reserve", {"name": name, "reservation_bytes": reserved})
    amount = iec(result["device"]["reservation_bytes"]) if reserved else "nothing"
    _report(result, f"{amount} is reserved for device {quoted(name)}", as_json=as_json)


@click.command(
    "rollback",
    epilog="\b\nExamples:\n  thinpool rollback /srv/pool disk disk-monday\n"
    "  thinpool rollback /srv/pool disk disk-monday --keep disk-broken",
)
@click.option("--keep", metavar="NAME", help="Call the prior state NAME; otherwise a name is made up.")
@click.option("--no-keep", is_flag=True, help="Throw the prior state away.")
@disconnect_option
@json_option
@pool_command("NAME", "SNAPSHOT")
def rollback_command(
    location: PoolLocation,
    *,
    name: str,
    snapshot: str,
    keep: str | None,
    no_keep: bool,
    disconnect: bool,
    as_json: bool,
) -> None:
    """Give a device the content of a snapshot, at once.

    The snapshot stays. The prior state is kept as a read-only snapshot, unless --no-keep. The device must not be
    in use: unmount it and detach it first.
    """
    if keep is not None and no_keep:
        raise click.UsageError(message="--keep and --no-keep exclude each other")
    if disconnect:
        _drop_clients(location, name)
    wanted: str | bool | None = False if no_keep else keep
    result = _operate(location, "rollback", {"name": name, "snapshot": snapshot, "keep": wanted})
    kept = result["kept"]
    sentence = f"{quoted(name)} is as {quoted(snapshot)} now"
    if kept is not None:
        sentence += f"; the prior state is kept as {quoted(kept)}"
    _report(result, sentence, as_json=as_json)

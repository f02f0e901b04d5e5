"""Commands about block devices on this machine: attach, detach."""

from __future__ import annotations

from pathlib import Path

import click

from thinpool.pool_location import PoolLocation

from .arguments import json_option, pool_command
from .report import emit_json


@click.command(
    "attach",
    epilog="\b\nExamples:\n  thinpool attach /srv/pool disk\n  thinpool attach /srv/pool disk --mount /mnt\n"
    "  thinpool attach /srv/pool disk-monday --read-only --mount /mnt/monday",
)
@click.option(
    "--mount", "mount", type=click.Path(path_type=Path, file_okay=False), help="Mount it at this directory."
)
@click.option("--read-only", is_flag=True, help="Attach for reading only, as read-only snapshots always are.")
@json_option
@pool_command("NAME", bare=False)
def attach_command(
    location: PoolLocation, *, name: str, mount: Path | None, read_only: bool, as_json: bool
) -> None:
    """Make a device of a served pool a block device on this machine, and print which.

    Takes kernel nbd where it is loaded, otherwise nbdfuse and (as root) a loop device. Never formats anything. A
    journal that a snapshot of a mounted file system left is not replayed on a read-only device: look at such a
    snapshot through a writable snapshot of it.
    """
    from thinpool.attachment import Attachments

    attachment = Attachments(location).attach(name, mount=mount, read_only=read_only)
    if as_json:
        emit_json(attachment.to_json())
    else:
        click.echo(attachment.where)


@click.command("detach", epilog="\b\nExample:\n  thinpool detach /srv/pool disk")
@json_option
@pool_command("NAME", bare=False)
def detach_command(location: PoolLocation, *, name: str, as_json: bool) -> None:
    """Undo all that attach did for a device: unmount, loop device, FUSE mount.

    Works when the server has gone, too.
    """
    from thinpool.attachment import Attachments

    attachment = Attachments(location).detach(name)
    if as_json:
        emit_json(attachment.to_json())

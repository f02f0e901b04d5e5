"""The commands that turn devices into image files and back: export, import."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from thinpool.pool_location import PoolLocation
from thinpool.wording import iec, quoted, shown_path

from .arguments import json_option, pool_command
from .progress import TransferProgress
from .report import emit_json

format_option = click.option(
    "-f", "--format", "image_format", metavar="FORMAT", help="raw, qcow2, or any that qemu-img knows."
)


@click.command(
    "export",
    epilog="\b\nExamples:\n  thinpool export /srv/pool disk-monday monday.qcow2 -f qcow2\n"
    "  thinpool export /srv/pool disk disk.img",
)
@format_option
@click.option("--force", is_flag=True, help="Overwrite FILE, when the export is complete.")
@json_option
@pool_command("NAME", "FILE")
def export_command(
    location: PoolLocation, *, name: str, file: str, image_format: str | None, force: bool, as_json: bool
) -> None:
    """Write a device or snapshot into an image file: raw, unless -f says otherwise.

    A device that clients may write to is frozen in a snapshot meanwhile. The file appears when it is complete. FILE
    may be a block device (with --force). Needs qemu-img.
    """
    from thinpool.image_files import ImageFile, export_image

    show = not as_json and sys.stdout is not None and sys.stdout.isatty()
    export_image(location, name, ImageFile(Path(file), image_format), force=force, show=show)
    if as_json:
        emit_json({"exported": name, "file": file})
    else:
        click.echo(f"exported {quoted(name)} to {shown_path(file)}")


@click.command(
    "import",
    epilog="\b\nExamples:\n  thinpool import /srv/pool disk debian-12.qcow2\n"
    "  thinpool import /srv/pool golden disk.img -f raw --read-only",
)
@format_option
@click.option("--read-only", is_flag=True, help="Nobody may write to the device.")
@json_option
@pool_command("NAME", "FILE")
def import_command(
    location: PoolLocation, *, name: str, file: str, image_format: str | None, read_only: bool, as_json: bool
) -> None:
    """Make a device of an image file, whatever format qemu finds it to be in; -f says which.

    Blocks of zeros take no space. The device appears when all of it is there. Of an image that you do not trust say
    the format: an image can pass for another one, and name files of this machine as parts of it. Needs qemu-img and
    qemu-nbd.
    """
    from thinpool.image_files import ImageFile, import_image
    from thinpool.receiving import ReceiveOptions

    with TransferProgress(f"importing {name}", None) as progress:
        options = ReceiveOptions(name, read_only=read_only)
        result = import_image(location, ImageFile(Path(file), image_format), options, progress.update)
    if as_json:
        emit_json(result)
    else:
        device = result["device"]
        click.echo(
            f"imported {quoted(name)} of {iec(device['size_bytes'])}, {iec(device['mapped_bytes'])} of it mapped"
        )

"""Commands that turn metadata into XML and back: dump, restore."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from thinpool.pool_location import PoolLocation
from thinpool.wording import iec, shown_path

from .arguments import SIZE, json_option
from .metadata_arguments import metadata_command, metadata_location, progress
from .report import emit_json

Write = Callable[[str], object]


@click.command(
    "dump",
    epilog="\b\nExamples:\n  thinpool dump /srv/pool -o pool.xml\n"
    "  thinpool dump /dev/mapper/vg-pool_tmeta | xz > pool.xml.xz\n"
    "  thinpool dump /srv/pool --dev-id 3 --dev-id 7",
)
@click.option(
    "-o", "--output", metavar="FILE", help="Write here, complete or not at all; standard output without it."
)
@click.option("-m", "--metadata-snap", is_flag=True, help="Dump the metadata snapshot.")
@click.option("--dev-id", type=int, multiple=True, help="Only this device; may be given several times.")
@click.option("--skip-mappings", is_flag=True, help="Leave out what devices map.")
@metadata_command
def dump_command(
    location: PoolLocation,
    *,
    output: str | None,
    metadata_snap: bool,
    dev_id: tuple[int, ...],
    skip_mappings: bool,
) -> None:
    """Write the metadata of a pool as XML, byte for byte as thin_dump 0.9 does.

    POOL is a pool directory, served or not, or a metadata file or device by itself. A served pool is read through a
    metadata snapshot while its clients go on. Damaged metadata ends the dump
    with 6; `thinpool repair` makes sound metadata of it first.
    """
    from metadata import NoMetadataSnapshot
    from metadata.dump import dump
    from thinpool.errors import NoSnapshotHeld
    from thinpool.metadata_view import view_metadata

    with _complete_output(output) as write, view_metadata(location, snapshot=metadata_snap) as view:
        total = 0 if skip_mappings else view.metadata_blocks
        with progress("dumping", view.shown, total, quiet=output is None) as store:
            chosen = set(dev_id) if dev_id else None
            try:
                dump(store, write, held=metadata_snap, devices=chosen, mappings=not skip_mappings)
            except NoMetadataSnapshot as error:
                raise NoSnapshotHeld(str(location)) from error


@contextmanager
def _complete_output(output: str | None) -> Iterator[Write]:
    """Takes text for a file that appears under its name when all is in it, or for standard output."""
    if output is None or output == "-":
        yield sys.stdout.write
        return
    path = Path(output)
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        with path.open("w", encoding="ascii") as stream:  # a pipe or device is written as it comes
            yield stream.write
        return
    with tempfile.NamedTemporaryFile(
        "w", encoding="ascii", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as stream:
        try:
            yield stream.write
            stream.flush()
            os.fsync(stream.fileno())
            mask = os.umask(0)
            os.umask(mask)
            Path(stream.name).chmod(0o666 & ~mask)
            Path(stream.name).rename(path)
        except BaseException:
            Path(stream.name).unlink()
            raise


@click.command(
    "restore",
    epilog="\b\nExamples:\n  thinpool restore -i pool.xml -o metadata.img\n"
    "  xzcat pool.xml.xz | thinpool restore -i - -o /srv/pool\n"
    "  thinpool restore -i pool.xml -o /dev/mapper/vg-new_meta",
)
@click.option(
    "-i", "--input", "source", metavar="FILE", required=True, help="XML of a dump; - for standard input."
)
@click.option(
    "-o", "--output", "target", metavar="PATH", required=True, help="A file, new or not, a device, a pool."
)
@click.option("--metadata-size", type=SIZE, help="Size of a new file; by default enough for the data.")
@click.option("--nr-data-blocks", type=int, help="Size of the data in blocks, instead of what the XML says.")
@click.option("--force", is_flag=True, help="Overwrite a file or device that holds a pool.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
@json_option
def restore_command(
    *,
    source: str,
    target: str,
    metadata_size: int | None,
    nr_data_blocks: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make metadata from the XML of a dump, of thinpool dump or of any version of thin_dump.

    Leaves that devices have in common are shared again. In a pool directory the new metadata takes the place of the old
    when it is complete, and the old stays beside it as metadata.before-N. A pool that is in use is refused, and so is
    a file or device that holds a pool, unless --force is given.
    """
    from thinpool.metadata_target import MetadataTarget, restore_into

    destination = MetadataTarget(metadata_location(target), force=force, size_bytes=metadata_size)
    with _input(source) as stream:
        made = restore_into(stream, source, destination, nr_data_blocks)
    if as_json:
        emit_json(made.to_json())
    elif not quiet:
        click.echo(
            f"{shown_path(target)}: {made.report.devices} devices with {made.report.mapped_blocks} mappings, "
            f"{iec(made.report.metadata_blocks_used * 4096)} of {iec(made.size_bytes)} of metadata used"
        )
        if made.kept is not None:
            click.echo(f"the metadata before is {shown_path(made.kept)}")


@contextmanager
def _input(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield sys.stdin.buffer
        return
    with Path(source).open("rb") as stream:
        yield stream

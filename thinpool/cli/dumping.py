"""Commands that turn metadata into XML and back: dump, restore."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import click

from thinpool.errors import ExitCode
from thinpool.pool_location import PoolLocation
from thinpool.wording import iec, shown_path

from .arguments import SIZE, json_option
from .metadata_arguments import metadata_command, metadata_location, progress
from .repairing import report_lines
from .report import emit_json

Write = Callable[[str], object]
SECTOR_BYTES = 512
AT_LEAST_ONE = click.IntRange(min=1)


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
@click.option(
    "-f",
    "--format",
    "form",
    type=click.Choice(["xml", "human_readable"]),
    default="xml",
    show_default=True,
    help="Only xml can be restored.",
)
@click.option(
    "-r", "--repair", "repaired", is_flag=True, help="Dump what `thinpool repair` makes of damaged metadata."
)
@metadata_command
@click.pass_context
def dump_command(
    ctx: click.Context,
    /,
    location: PoolLocation,
    *,
    form: str,
    repaired: bool,
    output: str | None,
    metadata_snap: bool,
    dev_id: tuple[int, ...],
    skip_mappings: bool,
) -> None:
    """Write the metadata of a pool as XML, byte for byte as thin_dump 0.9 does.

    POOL is a pool directory, served or not, or a metadata file or device by itself. A served pool is read through a
    metadata snapshot while its clients go on. Damaged metadata ends the dump with 6; with --repair what can be read of
    it is dumped, and what was lost is said on standard error.
    """
    chosen = set(dev_id) if dev_id else None
    how = _Chosen(form, metadata_snap, chosen, mappings=not skip_mappings)
    if repaired:
        if metadata_snap:
            raise click.UsageError(message="--repair is for the pool itself, not for its metadata snapshot")
        ctx.exit(int(_dump_repaired(location, output, how)))
    with _complete_output(output) as write:
        _dump(location, write, how, quiet=output is None)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What of a pool is dumped, and how it is worded."""

    form: str
    held: bool
    devices: set[int] | None
    mappings: bool


def _dump(location: PoolLocation, write: Write, how: _Chosen, *, quiet: bool) -> None:
    from metadata import NoMetadataSnapshot
    from metadata.dump import dump
    from metadata.dump_format import FORMATS
    from thinpool.errors import NoSnapshotHeld
    from thinpool.metadata_view import view_metadata

    with view_metadata(location, snapshot=how.held) as view:
        total = view.metadata_blocks if how.mappings else 0
        with progress("dumping", view.shown, total, quiet=quiet) as store:
            try:
                dump(
                    store,
                    write,
                    held=how.held,
                    devices=how.devices,
                    mappings=how.mappings,
                    form=FORMATS[how.form],
                )
            except NoMetadataSnapshot as error:
                raise NoSnapshotHeld(str(location)) from error


def _dump_repaired(location: PoolLocation, output: str | None, how: _Chosen) -> ExitCode:
    """Repair into a file of our own, dump that; what was lost is said on standard error."""
    from thinpool.metadata_repair import repair_into
    from thinpool.metadata_target import MetadataTarget

    with tempfile.TemporaryDirectory(prefix="thinpool-") as directory, _complete_output(output) as write:
        path = Path(directory) / "metadata"
        repaired = repair_into(
            location,
            MetadataTarget(metadata_location(str(path))),
            watch=lambda store, blocks: progress("repairing", store, blocks, quiet=output is None),
        )
        _dump(metadata_location(str(path)), write, how, quiet=output is None)
    for line in report_lines(repaired):
        click.echo(line, err=True)
    return ExitCode.OK if repaired.report.lossless else ExitCode.DAMAGED


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
@click.option(
    "--nr-data-blocks", type=AT_LEAST_ONE, help="Size of the data in blocks, instead of what the XML says."
)
@click.option("--data-block-size", type=SIZE, help="Size of a data block, instead of what the XML says.")
@click.option(
    "--transaction-id",
    type=click.IntRange(0, (1 << 64) - 1),
    help="The pool's transaction id, instead of what the XML says.",
)
@click.option("--force", is_flag=True, help="Overwrite a file or device that holds a pool.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
@json_option
def restore_command(
    *,
    source: str,
    target: str,
    metadata_size: int | None,
    nr_data_blocks: int | None,
    data_block_size: int | None,
    transaction_id: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make metadata from the XML of a dump, of thinpool dump or of any version of thin_dump.

    Leaves that devices have in common are shared again. In a pool directory the new metadata takes the place of the old
    when it is complete, and the old stays beside it as metadata.before-N. A pool that is in use is refused, and so is
    a file or device that holds a pool, unless --force is given.
    """
    from metadata import Instead
    from thinpool.metadata_target import MetadataTarget, restore_into

    destination = MetadataTarget(metadata_location(target), force=force, size_bytes=metadata_size)
    if data_block_size is not None and data_block_size % SECTOR_BYTES:
        raise click.UsageError(message="--data-block-size is a multiple of 512 bytes")
    if Path(target).is_dir() and (data_block_size or transaction_id is not None):
        raise click.UsageError(
            message="--data-block-size and --transaction-id are for metadata by itself; a pool directory has its own"
        )
    sectors = None if data_block_size is None else data_block_size // SECTOR_BYTES
    instead = Instead(nr_data_blocks, transaction_id, sectors)
    with _input(source) as stream:
        made = restore_into(stream, source, destination, instead)
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

"""The repair command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import click

from thinpool.errors import ExitCode
from thinpool.wording import iec, quoted, shown_path

from .arguments import SIZE, json_option
from .metadata_arguments import metadata_location, progress
from .report import emit_json

if TYPE_CHECKING:
    from metadata import DeviceOutcome
    from thinpool.metadata_repair import Repaired

RANGES_SHOWN_MAX = 20


@click.command(
    "repair",
    epilog="\b\nExamples:\n  thinpool repair /srv/pool rescued.img\n"
    "  thinpool repair --plan /srv/pool\n"
    "  thinpool repair /dev/mapper/vg-pool_meta0 /dev/mapper/vg-new_meta --names vg.backup\n"
    "  thinpool repair broken.img new.img --data-block-size 64K --nr-data-blocks 1638400",
)
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="[DST]", required=False)
@click.option(
    "--plan", is_flag=True, help="Say what a repair would change and what would be lost; write nothing."
)
@click.option("--metadata-size", type=SIZE, help="Size of a new file; by default that of SRC.")
@click.option(
    "--data-block-size", type=SIZE, help="Where the superblock is lost: size of a data block, e.g. 64K."
)
@click.option("--nr-data-blocks", type=int, help="Where the superblock is lost: size of the data in blocks.")
@click.option("--transaction-id", type=int, help="The transaction id that LVM expects.")
@click.option("--names", metavar="FILE", help="Names of the devices, for the report: vgcfgbackup's output.")
@click.option("--force", is_flag=True, help="Overwrite a file or device that holds a pool.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing, the exit code says it.")
@json_option
@click.pass_context
def repair_command(ctx: click.Context, /, source: str, target: str | None, **how: Any) -> None:
    """Make sound metadata in DST of everything that can be read of SRC.

    SRC is a pool directory, a metadata file or device; it is never written to. DST is a file, new or not, or a device
    that is large enough; not SRC. Each device that is intact comes out complete, whatever happened to others. Says what
    each damaged device has lost. Ends with 0 when nothing was lost, with 6 when something was, or may have been.

    With --plan there is no DST: the repair is carried out without writing anything, and what is wrong with each
    structure is said with what becomes of it. The exit code is that of the repair.
    """
    from thinpool.metadata_repair import repair_into
    from thinpool.metadata_target import MetadataTarget

    if how["data_block_size"] is not None and how["data_block_size"] % 512:
        raise click.UsageError(message="--data-block-size is a multiple of 512 bytes")
    if how["plan"] == (target is not None):
        raise click.UsageError(message="give a DST, or --plan without one")
    if target is None:
        _plan(ctx, source, how)
    destination = MetadataTarget(
        metadata_location(target), force=how["force"], size_bytes=how["metadata_size"]
    )
    repaired = repair_into(
        metadata_location(source, how["names"]),
        destination,
        data_block_bytes=how["data_block_size"],
        data_blocks=how["nr_data_blocks"],
        transaction_id=how["transaction_id"],
        watch=lambda store, blocks: progress("repairing", store, blocks, quiet=how["quiet"]),
    )
    if how["as_json"]:
        emit_json(repaired.to_json())
    elif not how["quiet"]:
        _print(repaired, target)
    ctx.exit(int(ExitCode.OK if repaired.report.lossless else ExitCode.DAMAGED))


def _plan(ctx: click.Context, source: str, how: dict[str, Any]) -> NoReturn:
    from thinpool.metadata_repair import Given, plan_repair

    plan = plan_repair(
        metadata_location(source, how["names"]),
        Given(how["data_block_size"], how["nr_data_blocks"], how["transaction_id"]),
        size_bytes=how["metadata_size"],
        watch=lambda store, blocks: progress("planning", store, blocks, quiet=how["quiet"]),
    )
    if how["as_json"]:
        emit_json(plan.to_json())
    elif not how["quiet"]:
        for change in plan.changes:
            counts = ((change.errors, "error"), (change.leaks, "leak"), (change.hints, "hint"))
            found = ", ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in counts if count)
            click.echo(f"{change.structure}: {found}; {change.remedy}")
        for line in report_lines(plan.repaired):
            click.echo(line)
        click.echo(f"nothing was written; {_sum(plan.repaired)}")
    ctx.exit(int(ExitCode.OK if plan.repaired.report.lossless else ExitCode.DAMAGED))


def _sum(repaired: Repaired) -> str:
    report = repaired.report
    whole = sum(device.outcome.name in ("WHOLE", "FOUND") for device in report.devices)
    return (
        f"{whole} of {len(report.devices)} devices complete, "
        f"{report.built.mapped_blocks} mappings, {iec(report.built.metadata_blocks_used * 4096)} of metadata used"
    )


def _print(repaired: Repaired, target: str) -> None:
    for line in report_lines(repaired):
        click.echo(line)
    click.echo(f"{shown_path(target)}: {_sum(repaired)}")


def report_lines(repaired: Repaired) -> list[str]:
    """What became of each device, and what there is to say of the repair as a whole."""
    lines = [f"note: {remark}" for remark in repaired.report.remarks]
    for device in repaired.report.devices:
        lines += _lines(device, repaired)
    return lines


def _lines(device: DeviceOutcome, repaired: Repaired) -> list[str]:
    from thinpool.findings import range_text

    name = repaired.names.get(device.device)
    title = f"device {device.device}" if name is None else f"{quoted(name)} (device {device.device})"
    recorded = "" if device.recorded_blocks is None else f" of {device.recorded_blocks}"
    lines = [f"{title} {device.outcome.value}: {device.mapped_blocks}{recorded} blocks"]
    lines += [
        f"  lost, if it was written: {range_text(begin, end, repaired.block_bytes)}"
        for begin, end in device.lost[:RANGES_SHOWN_MAX]
    ]
    if len(device.lost) > RANGES_SHOWN_MAX:
        lines.append(f"  and {len(device.lost) - RANGES_SHOWN_MAX} more ranges; --json has them all")
    return lines

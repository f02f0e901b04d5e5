"""The check command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from thinpool.errors import ExitCode
from thinpool.pool_location import PoolLocation
from thinpool.wording import shown_path

from .arguments import json_option
from .metadata_arguments import metadata_command, progress
from .report import emit_json

if TYPE_CHECKING:
    from metadata import Extent, Problem
    from thinpool.metadata_view import MetadataView

READ_ONLY_OPTIONS = ("metadata_snap", "skip_mappings", "super_block_only", "ignore_non_fatal_errors")


@click.command(
    "check",
    epilog="\b\nExamples:\n  thinpool check /srv/pool\n  thinpool check /dev/mapper/vg-pool_tmeta\n"
    "  thinpool check /srv/pool --auto-repair --clear-needs-check\n  thinpool check --metadata tmeta.img --json",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing, the exit code says it.")
@click.option("-m", "--metadata-snap", is_flag=True, help="Check the metadata snapshot only.")
@click.option("--super-block-only", is_flag=True, help="Check the superblock only.")
@click.option("--skip-mappings", is_flag=True, help="Leave out what devices map, and so the counts.")
@click.option(
    "--ignore-non-fatal-errors", is_flag=True, help="Only errors make the check fail, leaks do not."
)
@click.option(
    "--auto-repair", is_flag=True, help="Set counts, figures and records right, if trees are whole."
)
@click.option(
    "--clear-needs-check",
    "--clear-needs-check-flag",
    "clear",
    is_flag=True,
    help="Clear the flag if nothing is wrong.",
)
@json_option
@metadata_command
@click.pass_context
def check_command(
    ctx: click.Context,
    /,
    location: PoolLocation,
    *,
    quiet: bool,
    auto_repair: bool,
    clear: bool,
    as_json: bool,
    **how: bool,
) -> None:
    """Check the metadata of a pool: every tree, every count, every figure.

    POOL is a pool directory, served or not, or a metadata file or device by itself. A served pool is read through a
    metadata snapshot while its clients go on. Nothing is written unless --auto-repair or --clear-needs-check is given.
    Says of each fault what is wrong, where, which devices it affects and what to do. Ends with 6 when there are errors
    or leaks; wrong hints alone, which any pool may have and which nothing depends on, do not make it fail.
    """
    writing = auto_repair or clear
    if writing and any(how[name] for name in READ_ONLY_OPTIONS):
        raise click.UsageError(message="--auto-repair and --clear-needs-check go with a full check only")
    report = (
        _mend(location, auto_repair=auto_repair, clear=clear, quiet=quiet)
        if writing
        else _look(location, how, quiet)
    )
    if as_json:
        emit_json(report.to_json())
    elif not quiet:
        report.print()
    ctx.exit(int(report.exit_code(ignore_leaks=how["ignore_non_fatal_errors"])))


class _Report:
    """What a check found and did."""

    def __init__(
        self, location: PoolLocation, view: MetadataView, problems: Sequence[Problem], extent: Extent
    ) -> None:
        from thinpool.findings import Finding

        self._location = location
        self._view = view
        self._problems = problems
        self._extent = extent
        self._findings = [Finding(problem, view.names, view.block_bytes) for problem in problems]
        self.done: list[str] = []
        self.needs_check = view.needs_check

    def exit_code(self, *, ignore_leaks: bool) -> ExitCode:
        from metadata import Severity

        worst = max((problem.severity for problem in self._problems), default=Severity.HINT)
        failing = Severity.ERROR if ignore_leaks else Severity.LEAK
        return ExitCode.DAMAGED if worst >= failing else ExitCode.OK

    def print(self) -> None:
        from thinpool.findings import summary

        for finding in self._findings:
            for line in finding.lines():
                click.echo(line)
        for done in self.done:
            click.echo(done)
        if self._view.remark:
            click.echo(f"note: {self._view.remark}")
        if self.needs_check:
            click.echo(
                "note: the pool is marked as needing a check; --clear-needs-check takes the mark off a sound pool"
            )
        looked_at = "" if self._extent.name == "WHOLE" else f" ({self._extent.value} only)"
        click.echo(f"{shown_path(self._location)}: {summary(self._problems)}{looked_at}")

    def to_json(self) -> dict[str, Any]:
        from metadata import Severity

        counts = {f"{severity.name.lower()}s": 0 for severity in sorted(Severity, reverse=True)}
        for problem in self._problems:
            counts[f"{problem.severity.name.lower()}s"] += 1
        return {
            "pool": str(self._location),
            "checked": self._extent.value,
            "remark": self._view.remark,
            "needs_check": self.needs_check,
            **counts,
            "done": self.done,
            "problems": [finding.to_json() for finding in self._findings],
        }


def _look(location: PoolLocation, how: dict[str, bool], quiet: bool) -> _Report:
    from metadata import Extent, NoMetadataSnapshot, recount
    from thinpool.errors import NoSnapshotHeld
    from thinpool.metadata_view import view_metadata

    with view_metadata(location, snapshot=how["metadata_snap"]) as view:
        extent = view.extent
        if how["super_block_only"]:
            extent = Extent.SUPERBLOCK
        elif how["skip_mappings"] and extent is Extent.WHOLE:
            extent = Extent.NO_MAPPINGS
        with progress("checking", view.store, view.metadata_blocks, quiet=quiet) as store:
            try:
                problems = recount(store, extent)
            except NoMetadataSnapshot as error:
                raise NoSnapshotHeld(str(location)) from error
        return _Report(location, view, [*problems, *view.data_file_problems(location)], extent)


def _mend(location: PoolLocation, *, auto_repair: bool, clear: bool, quiet: bool) -> _Report:
    from metadata import Extent, Severity, clear_needs_check, mend, mendable, recount
    from thinpool.findings import summary
    from thinpool.metadata_view import change_metadata

    with change_metadata(location) as view:
        with progress("checking", view.store, view.metadata_blocks, quiet=quiet) as store:
            problems = recount(store)
        done: list[str] = []
        if problems and auto_repair:
            if mendable(problems):
                found = summary(problems)
                problems = mend(view.store)
                done.append(f"repaired: {found}")
            else:
                done.append("not repaired: not everything can be read; nothing was written")
        worst = max((problem.severity for problem in problems), default=Severity.HINT)
        report = _Report(location, view, problems, Extent.WHOLE)
        if clear and view.needs_check:
            if worst < Severity.LEAK:
                clear_needs_check(view.store)
                report.needs_check = False
                done.append("the mark that the pool needs a check was taken off")
            else:
                done.append("the mark that the pool needs a check stays, because of what is wrong")
        report.done = done
        return report

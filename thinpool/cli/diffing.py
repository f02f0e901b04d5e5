"""The command that compares two devices: diff."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from thinpool.device_diff import STATE_NAMES, all_pages, with_same
from thinpool.pool_location import PoolLocation
from thinpool.wording import iec, quoted

from .arguments import json_option, pool_command
from .report import emit_json


@click.command(
    "diff",
    epilog="\b\nExamples:\n  thinpool diff /srv/pool disk-monday disk-tuesday\n"
    "  thinpool diff /srv/pool disk-monday disk --map\n"
    "  thinpool diff --metadata pool_tmeta thin-1 thin-2 --json",
)
@click.option("--map", "as_map", is_flag=True, help="Print every range: offset, length, same, data or hole.")
@json_option
@pool_command("OLD", "NEW", data_needed=False)
def diff_command(location: PoolLocation, *, old: str, new: str, as_map: bool, as_json: bool) -> None:
    """Show which ranges changed from one device or snapshot to another.

    Only the mappings are compared, and whatever the two share is skipped: the work grows with what changed, not with
    the device. `data` is mapped to other blocks than before, `hole` was mapped and reads as zeros now, `same` is
    untouched. Ranges are whole data blocks. Of a pool without a directory the metadata alone is enough.
    """
    if as_map and as_json:
        raise click.UsageError(message="--map and --json exclude each other; --json holds the ranges as well")
    pages = _pages(location, old, new)
    first = next(pages)
    ranges = _ranges(first, pages)
    if as_map:
        for offset, length, state in with_same(ranges, int(first["new"]["size_bytes"])):
            click.echo(f"{offset:>14} {length:>14}  {STATE_NAMES[state]}")
        return
    if as_json:
        listed = [
            {"offset_bytes": offset, "length_bytes": length, "state": STATE_NAMES[state]}
            for offset, length, state in ranges
        ]
        emit_json(
            {
                "old": first["old"],
                "new": first["new"],
                "block_bytes": first["block_bytes"],
                **{
                    f"{state}_bytes": sum(each["length_bytes"] for each in listed if each["state"] == state)
                    for state in ("data", "hole")
                },
                "ranges": listed,
            }
        )
        return
    _summarise(first, ranges)


def _pages(location: PoolLocation, old: str, new: str) -> Iterator[dict[str, Any]]:
    from thinpool.pool_access import PoolAccess

    access = PoolAccess(location)
    return all_pages(lambda begin: access.operate("diff", {"old": old, "new": new, "begin_bytes": begin}))


def _ranges(first: dict[str, Any], pages: Iterator[dict[str, Any]]) -> Iterator[tuple[int, int, int]]:
    yield from first["ranges"]
    for page in pages:
        yield from page["ranges"]


def _summarise(first: dict[str, Any], ranges: Iterator[tuple[int, int, int]]) -> None:
    totals = {1: 0, 2: 0}
    count = 0
    for _, length, state in ranges:
        totals[state] += length
        count += 1
    before, after = int(first["old"]["size_bytes"]), int(first["new"]["size_bytes"])
    size = f"size {iec(before)}" if before == after else f"size {iec(before)} -> {iec(after)}"
    places = "1 range" if count == 1 else f"{count} ranges"
    click.echo(
        f"{quoted(first['old']['name'])} -> {quoted(first['new']['name'])}: {iec(totals[1])} of data and "
        f"{iec(totals[2])} of holes changed, in {places}; {size}"
    )

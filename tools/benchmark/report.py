"""Turns measured rows into Markdown: figures with their spread, ratios with their targets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .matrix import Cell, Row
from .workloads import ALL_SERVERS, OURS

FILLING = (
    "Every server's file was filled the same way, through the server: one pass of 64 KiB writes with fio. "
    "How a file was filled decides how large the page cache's folios are, and with that the speed of small writes; "
    "rows that say 1 MiB or cold differ on purpose."
)


def amount(cell: Cell, *, in_bytes: bool) -> str:
    """Return a cell's figure with its spread."""
    if cell.failure is not None:
        return "failed"
    if not cell.values:
        return "-"
    number = f"{cell.median:,.0f}" if cell.median >= 100 else f"{cell.median:.3g}"
    return f"{number}{' MB/s' if in_bytes else ''} ±{cell.spread:.0%}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|",
        *["| " + " | ".join(row) + " |" for row in rows],
    ]


def present_servers(rows: Sequence[Row]) -> list[str]:
    """Return the servers that occur in the rows, ours first."""
    return [name for name in ALL_SERVERS if any(name in row.cells for row in rows)]


def throughput(rows: Sequence[Row]) -> list[str]:
    """Requests a second, or MB/s where the cell says so."""
    names = present_servers(rows)
    lines = []
    for row in rows:
        cells = [row.cells.get(name) for name in names]
        figures = [amount(cell, in_bytes=row.workload.in_bytes) if cell else "" for cell in cells]
        lines.append([row.workload.title, *figures])
    return table(["workload", *names], lines)


def ratios(rows: Sequence[Row]) -> list[str]:
    """Ours over each peer, the range of single rounds, and the target where one is set."""
    peers = [name for name in present_servers(rows) if name != OURS]
    lines = []
    for row in rows:
        if OURS not in row.cells:
            continue
        line = [row.workload.title]
        for peer in peers:
            ratio = row.ratio(peer)
            if ratio is None:
                line.append("")
                continue
            target = row.workload.targets.get(peer)
            verdict = (
                "" if target is None else f", target {target:g} {'met' if ratio >= target else '**missed**'}"
            )
            rounds = row.round_ratios(peer)
            line.append(f"{ratio:.2f} ({min(rounds):.2f} to {max(rounds):.2f}{verdict})")
        lines.append(line)
    return table(["ours over", *peers], lines)


def costs(rows: Sequence[Row]) -> list[str]:
    """Server processor time a request, and the latency fio saw."""
    names = present_servers(rows)
    lines = []
    for row in rows:
        line = [row.workload.title]
        for name in names:
            cell = row.cells.get(name)
            if cell is None or cell.cpu_median_us is None:
                line.append("")
                continue
            latency = f", {cell.mean_us[0]:.0f} / {max(cell.p99_us):.0f}" if cell.mean_us else ""
            line.append(f"{cell.cpu_median_us:.1f}{latency}")
        lines.append(line)
    return table(["µs of server CPU a request, mean / p99 latency", *names], lines)


def depth_line(rows: Sequence[Row]) -> list[str]:
    """Reads at depth 1,000 over depth 1, for every server that has both."""
    by_name = {row.workload.name: row for row in rows}
    shallow, deep = by_name.get("read-depth-1"), by_name.get("read-depth-1000")
    if shallow is None or deep is None:
        return []
    lines = ["", "Random reads with 1,000 snapshots below over reads with one:", ""]
    for name, cell in deep.cells.items():
        other = shallow.cells.get(name)
        if other is not None and other.values and cell.values:
            target = " (target 0.95)" if name == OURS else ""
            lines.append(f"- {name}: {cell.median / other.median:.2f}{target}")
    return lines


def failures(rows: Sequence[Row]) -> list[str]:
    """What did not run, and why."""
    found = [
        f"- {row.workload.title}, {cell.server}: {' '.join(cell.failure.split())[:300]}"
        for row in rows
        for cell in row.cells.values()
        if cell.failure is not None
    ]
    return ["", "## Left out", "", *found] if found else []


def memory(rows: Sequence[Row]) -> list[str]:
    """Most anonymous memory of each server over all its cells."""
    lines = []
    for name in present_servers(rows):
        most = max((row.cells[name].anonymous_bytes for row in rows if name in row.cells), default=0)
        lines.append([name, f"{most / (1 << 20):.1f} MiB"])
    return table(["server", "most anonymous memory in any cell"], lines)


def markdown(rows: Sequence[Row], facts: Sequence[str], command: str, plot_name: str | None) -> str:
    """Return the whole report."""
    parts = [
        "# Data path beside other NBD servers",
        "",
        f"Made by `{command}`.",
        "",
        *[f"- {fact}" for fact in facts],
    ]
    parts += [
        f"- {FILLING}",
        "",
        "Medians of all rounds, ± half the distance between the worst and the best round.",
    ]
    parts += ["Servers take turns within each round.", ""]
    if plot_name:
        parts += [f"![ours over each peer]({plot_name})", ""]
    parts += ["## Throughput", "", "Requests a second unless MB/s is given.", "", *throughput(rows), ""]
    parts += ["## Ratios", "", "In brackets: the range of single rounds, and the target.", "", *ratios(rows)]
    parts += [*depth_line(rows), "", "## Cost", "", *costs(rows), "", *memory(rows), *failures(rows), ""]
    return "\n".join(parts)


def write(directory: Path, name: str, rows: Sequence[Row], facts: Sequence[str], command: str) -> Path:
    """Write NAME.md, NAME.svg and NAME.json into a directory; return the path of the first."""
    from .plot import ratio_plot

    directory.mkdir(parents=True, exist_ok=True)
    drawing = ratio_plot(rows)
    if drawing is not None:
        (directory / f"{name}.svg").write_text(drawing)
    (directory / f"{name}.json").write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    path = directory / f"{name}.md"
    path.write_text(markdown(rows, facts, command, f"{name}.svg" if drawing is not None else None))
    return path

"""Tables and figures for people: rich on a terminal, plain aligned text in a pipe.

In: the look. Out: what the columns are (`devices.py`, `pool.py`). rich is imported on a terminal only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import click

from thinpool.wording import escaped, iec


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, and whether it holds figures."""

    title: str
    figures: bool = False


def on_terminal() -> bool:
    """Whether a person is looking at standard output."""
    return sys.stdout is not None and sys.stdout.isatty()


def size_text(size_bytes: int, *, exact: bool) -> str:
    """A size for a cell: IEC, or the plain number."""
    return str(size_bytes) if exact else iec(size_bytes)


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, header: bool = True) -> None:
    """Print rows. Without a header: tab-separated, for scripts."""
    shown = [[escaped(cell) for cell in row] for row in rows]
    if not header:
        for row in shown:
            click.echo("\t".join(row))
    elif on_terminal():
        _print_rich(columns, shown)
    else:
        _print_plain(columns, shown)


def _print_plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    titles = [column.title for column in columns]
    widths = [max(len(row[index]) for row in (titles, *rows)) for index in range(len(columns))]
    for row in (titles, *rows):
        cells = [
            cell.rjust(width) if column.figures else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _print_rich(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="right" if column.figures else "left", no_wrap=column.figures)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in names are no markup
    Console(highlight=False).print(table)


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print facts, one a line."""
    width = max(len(key) for key, _ in pairs) + 1
    for key, value in pairs:
        click.echo(f"{(key + ':').ljust(width)} {value}")

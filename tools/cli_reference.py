"""Writes docs/cli.md from the commands themselves: what `--help` prints is what the page says.

.venv/bin/python tools/cli_reference.py           write the page
.venv/bin/python tools/cli_reference.py --check   exit with 1 if the page is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from thinpool.cli import ALIASES, COMMANDS, cli
from thinpool.cli.report import EXIT_CODES_HELP

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEADER = """\
# Command line

Every command works alike on a pool that is being served (through the control API, a Unix socket in the pool directory)
and on one that is not. `POOL` may be left out where `THINPOOL_POOL` is set, or where `--metadata` and `--data` name a
pool of two bare paths. Sizes accept `64K`, `10G`, `10GiB` (binary) and `10GB` (decimal). Every listing and result has
`--json`; JSON documents carry `"version": 1`, sizes are integers in bytes.

This page is made from the commands' own help by `tools/cli_reference.py`.
"""


def sections(command: click.Command, path: str, parent: click.Context | None = None) -> list[str]:
    """Return the section of a command, then those of its subcommands."""
    context = click.Context(
        command, info_name=path if parent is None else path.rsplit(maxsplit=1)[-1], parent=parent
    )
    context.max_content_width = context.terminal_width = 100
    made = [f"## {path}\n\n```\n{command.get_help(context).rstrip()}\n```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                made += sections(inner, f"{path} {name}", context)
    return made


def page() -> str:
    """Return the whole page."""
    aliases = ", ".join(f"`{alias}` for `{name}`" for alias, name in ALIASES.items())
    parts = [HEADER, f"## Exit codes\n\n```\n{EXIT_CODES_HELP.rstrip()}\n```\n", f"Aliases: {aliases}.\n"]
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        parts += sections(command, f"thinpool {name}")
    return "\n".join(parts)


def main() -> int:
    """Write or check the page."""
    wanted = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() == wanted:
            return 0
        print("docs/cli.md is not what the commands say; run tools/cli_reference.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())

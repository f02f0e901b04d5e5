"""The `thinpool` command.

In: the entry point, the list of commands, what holds for all of them. Out: each command (the other modules here),
what a pool is asked (`operations.py`) and how it is reached (`pool_access.py`).

Commands are imported when they are used, and the engine (numpy, starlette) only by those that open a pool
themselves: `thinpool --help`, completion and every command on a served pool start in a tenth of a second.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, NoReturn

import click

from thinpool import __version__

from .report import EXIT_CODES_HELP, run_reporting

# Command -> module here. Shown in this order.
COMMANDS = {
    "init": "pool",
    "status": "pool",
    "grow": "pool",
    "set": "settings",
    "get": "settings",
    "create": "devices",
    "list": "devices",
    "snapshot": "devices",
    "delete": "devices",
    "rename": "devices",
    "resize": "devices",
    "reserve": "devices",
    "rollback": "devices",
    "diff": "diffing",
    "send": "sending",
    "receive": "sending",
    "export": "images",
    "import": "images",
    "serve": "serving",
    "stop": "serving",
    "check": "checking",
    "dump": "dumping",
    "restore": "dumping",
    "repair": "repairing",
    "attach": "attaching",
    "detach": "attaching",
    "push": "store",
    "pull": "pulling",
    "verify": "store",
    "forget": "store",
    "gc": "store",
    "completion": "shells",
}
ALIASES = {"ls": "list", "rm": "delete", "destroy": "delete", "snap": "snapshot", "recv": "receive"}
EPILOG = f"""\b
{EXIT_CODES_HELP}

\b
Environment:
  THINPOOL_POOL            the pool, where a command line does not name one
  THINPOOL_STORE_KEY_FILE  the file with the key of an encrypted object store
  AWS_*, GOOGLE_*, AZURE_* where an object store is and who asks, as other programs read them

\b
A pool in two commands:
  thinpool init /srv/pool --size 100G
  thinpool create /srv/pool disk --size 10G
Then serve it and mount it:
  thinpool serve /srv/pool --detach
  thinpool attach /srv/pool disk                (prints the block device: mkfs it once)
  thinpool snapshot /srv/pool disk disk-monday --read-only
"""


class CommandTable(click.Group):
    """The commands of the table above, imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name or alias."""
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[name]}", __package__)
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve aliases to the command's own name, for its usage line."""
        _, command, rest = super().resolve_command(ctx, args)
        return (command.name if command else None), command, rest


@click.group(
    cls=CommandTable,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="thinpool", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.pass_context
def cli(ctx: click.Context, *, debug: bool) -> None:
    """Thin-provisioned block devices and snapshots, served over NBD.

    A pool is a directory with one data file and the metadata of dm-thin. Its devices take space as they are
    written; a snapshot shares every block with its origin. Every command works alike on a pool that is being
    served and on one that is not.
    """
    ctx.obj = {"debug": debug}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # A name that the terminal's encoding lacks must not turn a message into a traceback.
            reconfigure(errors="backslashreplace")
    sys.exit(run_reporting(cli, arguments))

"""The completion command: scripts that complete commands and options in bash, zsh and fish."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

VARIABLE = "_THINPOOL_COMPLETE"


@click.command(
    "completion",
    epilog='\b\nExamples:\n  eval "$(thinpool completion bash)"                                  (in ~/.bashrc)\n'
    "  thinpool completion fish > ~/.config/fish/completions/thinpool.fish",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print a script that makes a shell complete thinpool's commands and options."""
    from . import cli

    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(cli, {}, "thinpool", VARIABLE).source())

"""Commands on the settings of a pool: set, get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from thinpool.errors import BadSetting
from thinpool.pool_location import PoolLocation
from thinpool.pool_settings import BY_NAME, SETTINGS, Setting

from .arguments import json_option, pool_command
from .report import emit_json
from .tables import Column, print_table

COLUMNS = (Column("SETTING"), Column("VALUE"), Column("SOURCE"))


def _checked(setting: Setting) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    def check(_: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
        if text is not None:
            try:
                setting.parse(text)
            except BadSetting as error:
                raise click.BadParameter(error.reason, param=parameter) from error
        return text

    return check


def _setting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every setting."""
    for setting in reversed(SETTINGS):
        function = click.option(
            f"--{setting.name}",
            metavar=setting.metavar,
            callback=_checked(setting),
            help=f"{setting.help} [default: {setting.show(setting.default)}]",
        )(function)
    return function


@click.command(
    "set",
    epilog="\b\nExamples:\n  thinpool set /srv/pool --when-full error\n"
    "  thinpool set /srv/pool --when-full queue --queue-timeout 300\n"
    "  thinpool set /srv/pool --reset queue-timeout",
)
@_setting_options
@click.option(
    "--reset",
    type=click.Choice(sorted(BY_NAME)),
    multiple=True,
    metavar="SETTING",
    help="Back to the default. May be given several times.",
)
@json_option
@pool_command(bare=False)
def set_command(location: PoolLocation, *, reset: Sequence[str], as_json: bool, **given: str | None) -> None:
    """Change settings of a pool; they stay with it. A server obeys them at once.

    What happens when a pool is full, and how to avoid that, is described in docs/full-pools.md.
    """
    from thinpool.pool_access import PoolAccess

    changes: dict[str, str | None] = {
        setting.name: given[setting.field] for setting in SETTINGS if given[setting.field] is not None
    }
    for name in reset:
        if name in changes:
            raise click.UsageError(message=f"--{name} and --reset {name} exclude each other")
        changes[name] = None
    if not changes:
        raise click.UsageError(message="give at least one setting")
    _show(PoolAccess(location).operate("set", {"settings": changes}), as_json=as_json)


@click.command(
    "get", epilog="\b\nExamples:\n  thinpool get /srv/pool\n  thinpool get /srv/pool --json | jq .settings"
)
@json_option
@pool_command(bare=False)
def get_command(location: PoolLocation, *, as_json: bool) -> None:
    """Show the settings of a pool: those that were set, and the defaults of the others.

    In JSON sizes are bytes, times seconds, shares per cent, and 0 stands for "off" or "for ever".
    """
    from thinpool.pool_access import PoolAccess

    _show(PoolAccess(location).operate("get", {}), as_json=as_json)


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit_json(result)
        return
    rows = []
    for setting in SETTINGS:
        source = "set" if setting.name in result["set"] else "default"
        if setting.name in result["overridden"]:
            source = "serve --set"
        rows.append((setting.name, setting.show(result["settings"][setting.name]), source))
    print_table(COLUMNS, rows)
